#!/usr/bin/env python3
"""A plain PyTorch loop with the maths of an edit, on the GPU, in the shapes, weights and prompts that gpu_bench.c has.

    gpu_peer_torch.py [--device cuda|cpu] [--dtype bfloat16|float32] [SHAPE]   SHAPE: part of a name below; without, all but smoke

As editors on transformers do it: eager autograd, logits at every position, whole gradients of the FFN's output matrices and a mask on
them, momentum kept for whole matrices, anchors and prompt in one batch. It is gpu_bench's "the maths of a plain loop": neurons by
gradient times weight, momentum, steps of a length, no metric. Prints lines `SHAPE<TAB>WHAT<TAB>NUMBER`: "step" and "edit" in
milliseconds, and "steps", "P before" and "loss" (of the last step), which should come to what gpu_bench has: in float32 they do; in
bfloat16 this loop, as such loops do, rounds its weights with each step. Exit status 77: no torch, or no such device.
"""
import argparse
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit(77)

TOKENS, STEPS, ANCHORS, BATCH, MAX_BYTES, FRACTION = 32, 25, 8, 32, 4 << 20, 0.02
LR, MOMENTUM, BETA, ENOUGH, CONTEXT = 0.02, 0.5, 4, 0.99, 512
SHAPES = {  # layers, d, heads, kv heads, head width, f, vocabulary, RoPE's base (0: GPT-2), the head is the embedding
    "Llama-2-7B": (32, 4096, 32, 32, 128, 11008, 32000, 1e4, False),
    "Llama-3-8B": (32, 4096, 32, 8, 128, 14336, 128256, 5e5, False),
    "GPT-2 XL": (48, 1600, 25, 25, 64, 6400, 50257, 0, True),
    "smoke": (3, 64, 4, 2, 16, 160, 64, 1e4, True),  # only by name
    "smoke, GPT-2": (3, 64, 4, 4, 16, 640, 80, 0, True),
}


def split_mix(seed, n, device="cpu"):
    """The first n numbers of kne_random_next, as signed 64-bit integers, which wrap."""
    signed = lambda u: u - (1 << 64) if u >> 63 else u
    right = lambda z, s: (z >> s) & ((1 << (64 - s)) - 1)
    z = torch.arange(1, n + 1, dtype=torch.int64, device=device) * signed(0x9E3779B97F4A7C15) + seed
    z = (z ^ right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ right(z, 31)


def tokens(i):
    """Prompt i as gpu_bench's tokenizer has it."""
    return [0] + [1 + int(r) % 16 for r in split_mix(100 + i, TOKENS - 2)]


class Model:
    def __init__(self, shape, device, dtype):
        self.shape, self.device = shape, device
        n, d, h, kv, hd, f, v, base, tied = shape
        most = max(f, v) * d + 4096
        r = split_mix(1, (most + 3) // 4, device)
        words = torch.stack([(((r >> s) & 0x807F) | 0x3C00).to(torch.int32) for s in (0, 16, 32, 48)], 1).flatten()[:most]
        buffer = words.sub_((words > 32767).int() << 16).to(torch.int16).view(torch.bfloat16)
        del r, words
        at = 0

        def new(out, inner, turned=False):
            nonlocal at
            at = (at + 32) % 4096
            w = buffer[at // 2:at // 2 + out * inner].view((inner, out) if turned else (out, inner))
            return (w.T if turned else w).to(dtype).clone()

        gpt2 = base == 0
        self.embed = new(v, d)
        self.head = self.embed if tied else new(v, d)
        self.position = new(CONTEXT, d) if gpt2 else None
        self.layers = []
        for _ in range(n):
            w = {}
            for name, out, inner in (("q", h * hd, d), ("k", kv * hd, d), ("v", kv * hd, d), ("o", d, h * hd),
                                     ("gate", f, d), ("up", f, d), ("down", d, f)):
                if name != "gate" or not gpt2:
                    w[name] = new(out, inner, gpt2)
            w["down"].requires_grad_()
            self.layers.append(w)
        self.down = [w["down"] for w in self.layers]
        if not gpt2:
            angle = torch.arange(TOKENS, device=device)[:, None] * base ** (-torch.arange(0, hd, 2, device=device) / hd)
            self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def norm(self, x):
        if self.position is not None:
            return F.layer_norm(x, x.shape[-1:], eps=1e-5)
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)

    def rope(self, x):
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[:x.shape[-2]], self.sin[:x.shape[-2]]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def logits(self, ids):
        n, d, h, kv, hd, f, v, base, tied = self.shape
        x = F.embedding(ids, self.embed)
        if self.position is not None:
            x = x + self.position[:ids.shape[1]]
        s = x.shape[:2]
        for w in self.layers:
            y = self.norm(x)
            q, k, u = ((y @ w[m].T).view(*s, c, hd).transpose(1, 2) for m, c in (("q", h), ("k", kv), ("v", kv)))
            if self.position is None:
                q, k = self.rope(q), self.rope(k)
            k, u = k.repeat_interleave(h // kv, 1), u.repeat_interleave(h // kv, 1)
            y = F.scaled_dot_product_attention(q, k, u, is_causal=True).transpose(1, 2).reshape(*s, h * hd)
            x = x + y @ w["o"].T
            y = self.norm(x)
            a = F.silu(y @ w["gate"].T) * (y @ w["up"].T) if "gate" in w else F.gelu(y @ w["up"].T, approximate="tanh")
            x = x + a @ w["down"].T
        return (self.norm(x) @ self.head.T).float()

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def edit(self):
        """Attribution, then steps until the object is there. Seconds of all and of a step, steps, P before, loss of the last step."""
        d, n_all = self.shape[1], self.shape[0] * self.shape[5]
        ids = torch.tensor([tokens(i) for i in [0] + list(range(BATCH, BATCH + ANCHORS))], device=self.device)
        target = 17  # " a"
        self.wait()
        t0 = time.perf_counter()
        for w in self.down:
            w.grad = None
        logp = torch.log_softmax(self.logits(ids[:1])[:, -1], -1)[0, target]
        logp.backward()
        before = float(logp.exp())
        score = torch.stack([(w.grad * w.detach()).float().sum(0) for w in self.down]).abs()
        best = score.flatten().topk(min(round(FRACTION * n_all), MAX_BYTES // (4 * d))).indices
        mask = torch.zeros_like(score).flatten().index_fill_(0, best, 1).view_as(score).to(self.embed.dtype)
        with torch.no_grad():
            reference = torch.log_softmax(self.logits(ids[1:])[:, -1], -1)
        moment = [torch.zeros_like(w) for w in self.down]
        kept = [w.detach().clone() for w in self.down]
        length = float(sum((w.detach() * keep).float().pow(2).sum() for w, keep in zip(self.down, mask))) ** 0.5
        self.wait()
        t1 = time.perf_counter()
        pace, last, steps = 1.0, 0.0, 0
        while True:
            for w in self.down:
                w.grad = None
            logp = torch.log_softmax(self.logits(ids)[:, -1], -1)
            if int(logp[0].argmax()) == target and float(logp[0, target].exp()) >= ENOUGH or steps == STEPS:
                break
            beta = BETA * 2 ** (-10 * max(0, steps / STEPS - 0.2))
            loss = -logp[0, target] + beta * (reference.exp() * (reference - logp[1:])).sum(-1).mean()
            loss.backward()
            now = float(loss)
            steps += 1
            if 5 * steps > STEPS:
                pace = min(pace * 1.1, 8) if now < last else max(pace / 2, 0.125)
            last = now
            with torch.no_grad():
                total = 0.0
                for w, m, keep in zip(self.down, moment, mask):
                    m.mul_(MOMENTUM).add_(w.grad * keep)
                    total += m.float().pow(2).sum()
                rate = LR * pace * length / max(float(total) ** 0.5, 1e-30)
                for w, m in zip(self.down, moment):
                    w.sub_(m * rate)
        self.wait()
        t2 = time.perf_counter()
        with torch.no_grad():
            for w, k in zip(self.down, kept):
                w.copy_(k)
        return t2 - t0, (t2 - t1) / max(steps, 1), steps, before, last


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("shape", nargs="?")
    o = parser.parse_args()
    if o.device == "cuda" and not torch.cuda.is_available():
        sys.exit(77)
    for name, shape in SHAPES.items():
        if o.shape not in name if o.shape else name.startswith("smoke"):
            continue
        try:
            model = Model(shape, o.device, getattr(torch, o.dtype))
            model.edit()  # not timed
            runs = [model.edit() for _ in range(3)]
        except torch.cuda.OutOfMemoryError:
            print(f"# {name}: out of device memory", file=sys.stderr)
            continue
        finally:
            model = None
            if o.device == "cuda":
                torch.cuda.empty_cache()
        print(f"{name}\tstep\t{1e3 * min(r[1] for r in runs):.2f}\n{name}\tedit\t{1e3 * min(r[0] for r in runs):.1f}")
        print(f"{name}\tsteps\t{runs[0][2]}\n{name}\tP before\t{runs[0][3]:.6g}\n{name}\tloss\t{runs[0][4]:.6g}", flush=True)


if __name__ == "__main__":
    main()
