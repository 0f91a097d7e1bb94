#!/usr/bin/env python3
"""A plain PyTorch loop with the maths of an edit, on the GPU, in the shapes that gpu_bench.c has.

    gpu_peer_torch.py [SHAPE]     SHAPE: part of a name below, all of them without

Random bfloat16 weights, 32 tokens a fact, the anchors of the prompt in one padded batch. As editors on transformers do it: eager
autograd, logits at every position, whole gradients of the FFN's output matrices and a mask on them, momentum kept for whole matrices.
Prints a line a figure: `SHAPE<TAB>step<TAB>milliseconds` and `SHAPE<TAB>edit<TAB>milliseconds`. Exit status 77: no torch, or no GPU.
"""
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    assert torch.cuda.is_available()
except (ImportError, AssertionError):
    sys.exit(77)

TOKENS, STEPS, ANCHORS, MAX_BYTES = 32, 25, 8, 4 << 20
SHAPES = {  # layers, d, heads, kv heads, head width, f, vocabulary, gated
    "Llama-2-7B": (32, 4096, 32, 32, 128, 11008, 32000, True),
    "Llama-3-8B": (32, 4096, 32, 8, 128, 14336, 128256, True),
    "GPT-2 XL": (48, 1600, 25, 25, 64, 6400, 50257, False),
}


def norm(x):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)


class Model:
    def __init__(self, shape):
        self.shape = shape
        n, d, h, kv, hd, f, v, gated = shape
        new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16) * 0.02
        self.embed, self.head = new(v, d), new(v, d)
        self.layers = [dict(q=new(h * hd, d), k=new(kv * hd, d), v=new(kv * hd, d), o=new(d, h * hd), up=new(f, d),
                            gate=new(f, d) if gated else None, down=new(d, f).requires_grad_()) for _ in range(n)]
        self.down = [layer["down"] for layer in self.layers]
        angle = torch.arange(TOKENS, device="cuda")[:, None] * 1e4 ** (-torch.arange(0, hd, 2, device="cuda") / hd)
        self.cos, self.sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)

    def rope(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)

    def logits(self, ids):
        n, d, h, kv, hd, f, v, gated = self.shape
        x = F.embedding(ids, self.embed)
        s = x.shape[:2]
        for w in self.layers:
            y = norm(x)
            q, k, u = ((y @ w[m].T).view(*s, c, hd).transpose(1, 2) for m, c in (("q", h), ("k", kv), ("v", kv)))
            if gated:
                q, k = self.rope(q), self.rope(k)
            k, u = k.repeat_interleave(h // kv, 1), u.repeat_interleave(h // kv, 1)
            y = F.scaled_dot_product_attention(q, k, u, is_causal=True).transpose(1, 2).reshape(*s, h * hd)
            x = x + y @ w["o"].T
            y = norm(x)
            a = F.silu(y @ w["gate"].T) * (y @ w["up"].T) if gated else F.gelu(y @ w["up"].T, approximate="tanh")
            x = x + a @ w["down"].T
        return (norm(x) @ self.head.T).float()

    def edit(self, seed):
        """Attribution, then STEPS steps. Returns seconds of both and of one step."""
        n, d, h, kv, hd, f, v, gated = self.shape
        torch.manual_seed(seed)
        ids = torch.randint(v, (1 + ANCHORS, TOKENS), device="cuda")
        target = torch.randint(v, (1,), device="cuda")
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        for w in self.down:
            w.grad = None
        torch.log_softmax(self.logits(ids[:1])[:, -1], -1)[0, target].sum().backward()
        score = torch.stack([(w.grad * w.detach()).float().sum(0) for w in self.down]).abs()
        best = score.flatten().topk(MAX_BYTES // (4 * d)).indices
        mask = torch.zeros_like(score).flatten().index_fill_(0, best, 1).view_as(score).to(torch.bfloat16)
        with torch.no_grad():
            reference = torch.log_softmax(self.logits(ids[1:])[:, -1], -1)
        moment = [torch.zeros_like(w) for w in self.down]
        kept = [w.detach().clone() for w in self.down]
        torch.cuda.synchronize()
        t1 = time.perf_counter()
        for _ in range(STEPS):
            for w in self.down:
                w.grad = None
            logp = torch.log_softmax(self.logits(ids)[:, -1], -1)
            loss = -logp[0, target].sum() + 4 * (reference.exp() * (reference - logp[1:])).sum(-1).mean()
            loss.backward()
            float(loss)  # the stop rule
            with torch.no_grad():
                total = 0.0
                for w, m, keep in zip(self.down, moment, mask):
                    m.mul_(0.5).add_(w.grad * keep)
                    total += m.float().pow(2).sum()
                size = float(total) ** 0.5
                for w, m in zip(self.down, moment):
                    w.sub_(m * (0.02 / max(size, 1e-30)))
        torch.cuda.synchronize()
        t2 = time.perf_counter()
        with torch.no_grad():
            for w, k in zip(self.down, kept):
                w.copy_(k)
        return t2 - t0, (t2 - t1) / STEPS


def main():
    for name, shape in SHAPES.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        try:
            model = Model(shape)
            model.edit(0)  # not timed
            edit, step = (min(x) for x in zip(*(model.edit(s) for s in (1, 2, 3))))
        except torch.cuda.OutOfMemoryError:
            print(f"# {name}: out of device memory", file=sys.stderr)
            continue
        finally:
            model = None
            torch.cuda.empty_cache()
        print(f"{name}\tstep\t{1e3 * step:.2f}\n{name}\tedit\t{1e3 * edit:.1f}", flush=True)


if __name__ == "__main__":
    main()
