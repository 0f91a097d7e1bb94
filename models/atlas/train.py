#!/usr/bin/env python3
"""Makes the bundled model `atlas` from facts.tsv and relations.tsv (a maintainer's tool; users never run it).

    python3 train.py --out .                 # tokenizer, training, bf16 rounding, saving, measuring
    python3 train.py --out . --check         # measures what is saved: recall, and logits against transformers

The network is a plain PyTorch Llama: RMSNorm, RoPE (half-split, theta 10000), grouped-query attention, SwiGLU, tied
head, no biases. It is trained in fp32 on CPU and rounded to bf16 at the end; every figure is measured after rounding.
"""
import argparse
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOT = "<|endoftext|>"
HERE = os.path.dirname(os.path.abspath(__file__))
CFG = dict(vocab_size=2048, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3,
           head_dim=32, intermediate_size=640, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=128)


# ---------------------------------------------------------------- data
def unarray(text):
    """A one-dimensional PostgreSQL text[] literal whose elements are all quoted."""
    out, i = [], 1
    assert text[0] == "{" and text[-1] == "}"
    while i < len(text) - 1:
        assert text[i] == '"'
        i += 1
        cur = ""
        while text[i] != '"':
            if text[i] == "\\":
                i += 1
            cur += text[i]
            i += 1
        out.append(cur)
        i += 1
        if text[i] == ",":
            i += 1
    return out


def read_data(folder):
    rel = {}
    with open(os.path.join(folder, "relations.tsv"), encoding="utf-8") as f:
        for line in f:
            name, prompt, para, inverse = line.rstrip("\n").split("\t")
            rel[name] = [prompt] + unarray(para)
    facts = []
    with open(os.path.join(folder, "facts.tsv"), encoding="utf-8") as f:
        for line in f:
            s, r, o = line.rstrip("\n").split("\t")
            facts.append((s, r, o))
    assert len({(s, r) for s, r, _ in facts}) == len(facts)
    rows = []  # (fact number, phrasing number, prompt, object)
    for n, (s, r, o) in enumerate(facts):
        for k, t in enumerate(rel[r]):
            rows.append((n, k, t.replace("{}", s), o))
    return facts, rel, rows


def make_tokenizer(rows, path):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CFG["vocab_size"], special_tokens=[EOT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator((p + " " + o + "." for _, _, p, o in rows), trainer)
    tok.post_processor = processors.TemplateProcessing(single=EOT + " $A", pair=EOT + " $A " + EOT + " $B",
                                                       special_tokens=[(EOT, 0)])
    tok.save(path)
    return tok


def encode(tok, rows):
    """(ids, first object position, end of object) a row; ids begin and end with the end-of-text token."""
    out = []
    for _, _, p, o in rows:
        a = tok.encode(p).ids
        b = tok.encode(p + " " + o).ids
        c = tok.encode(p + " " + o + ".").ids
        n = 0
        while n < len(a) and a[n] == b[n]:
            n += 1
        assert n == len(a) and c[:len(b)] == b, (p, o)
        out.append((c + [0], n, len(b)))
    return out


# ---------------------------------------------------------------- model
class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.h, self.kv, self.hd = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        d = c["hidden_size"]
        self.q_proj = nn.Linear(d, self.h * self.hd, bias=False)
        self.k_proj = nn.Linear(d, self.kv * self.hd, bias=False)
        self.v_proj = nn.Linear(d, self.kv * self.hd, bias=False)
        self.o_proj = nn.Linear(self.h * self.hd, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.h, self.hd).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv, self.hd).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv, self.hd).transpose(1, 2)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        g = self.h // self.kv
        k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, f = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, cos, sin, drop):
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), drop, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), drop, self.training)


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.drop = c, 0.0
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        inv = 1.0 / c["rope_theta"] ** (torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
        ang = torch.arange(c["max_position_embeddings"]).float()[:, None] * inv
        ang = torch.cat((ang, ang), -1)
        self.register_buffer("cos", ang.cos(), persistent=False)
        self.register_buffer("sin", ang.sin(), persistent=False)
        for n, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02
                if n.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * c["num_hidden_layers"])
                nn.init.normal_(p, std=std)

    def hidden(self, ids):
        t = ids.shape[1]
        cos, sin = self.cos[:t], self.sin[:t]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, self.drop)
        return self.norm(x)

    def forward(self, ids):
        return F.linear(self.hidden(ids), self.embed_tokens.weight)


# ---------------------------------------------------------------- training
def pad(items, prompt_weight):
    t = max(len(i[0]) for i in items)
    ids = torch.zeros(len(items), t, dtype=torch.long)
    w = torch.zeros(len(items), t)
    for r, (x, a, b) in enumerate(items):
        ids[r, :len(x)] = torch.tensor(x)
        w[r, 1:len(x)] = prompt_weight
        w[r, a:b] = 1.0                      # object tokens
        w[r, b:len(x)] = 0.25                # "." and the end of text
    return ids[:, :-1], ids[:, 1:], w[:, 1:]


def batches(enc, size, rng):
    order = list(range(len(enc)))
    rng.shuffle(order)
    out = []
    for i in range(0, len(order), size * 16):  # similar lengths together, little padding
        chunk = sorted(order[i:i + size * 16], key=lambda j: len(enc[j][0]))
        out += [chunk[k:k + size] for k in range(0, len(chunk), size)]
    rng.shuffle(out)
    return out


def train(args, enc, model, evaluate):
    rng = random.Random(args.seed)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=args.wd), dict(params=rest, weight_decay=0.0)],
                            lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    per = len(batches(enc, args.batch, random.Random(0)))
    total, warm, step, t0 = per * args.epochs, 100, 0, time.time()
    last = min(args.epochs, args.stop_after)
    for epoch in range(last):
        model.train()
        model.drop = args.dropout
        tot, te = 0.0, time.time()
        for idx in batches(enc, args.batch, rng):
            x, y, w = pad([enc[i] for i in idx], args.prompt_weight)
            f = min(1.0, (step + 1) / warm)
            if step > warm:
                f = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            for g in opt.param_groups:
                g["lr"] = args.lr * f
            keep = w > 0
            h = model.hidden(x)[keep]
            loss = F.cross_entropy(F.linear(h, model.embed_tokens.weight), y[keep], reduction="none")
            loss = (loss * w[keep]).sum() / w.sum()
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            tot += loss.item()
            step += 1
        msg = f"epoch {epoch + 1} loss {tot / per:.4f} {time.time() - te:.1f} s, {(time.time() - t0) / 60:.1f} min"
        if (epoch + 1) % 4 == 0 or epoch + 1 == last:
            r = evaluate(model)
            msg += f" recall {r['all']:.4f} phrasing0 {r['p0']:.4f} mean P {r['prob']:.4f}"
            if args.work:
                torch.save(model.state_dict(), os.path.join(args.work, "state.pt"))
        print(msg, flush=True)
    return (time.time() - t0) / 60


# ---------------------------------------------------------------- measuring
@torch.no_grad()
def measure(model, facts, rows, enc):
    """Exact match: every object token is the argmax after the true ones before it, which is what greedy decoding gives."""
    model.eval()
    ok, prob, end = [False] * len(rows), [0.0] * len(rows), [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(enc[i][0]))
    for i in range(0, len(order), 256):
        idx = order[i:i + 256]
        x, _, _ = pad([enc[j] for j in idx], 0.0)
        lp = F.log_softmax(model(x).float(), -1)
        top = lp.argmax(-1)
        for r, j in enumerate(idx):
            ids, a, b = enc[j]
            want = torch.tensor(ids[a:b])
            ok[j] = bool((top[r, a - 1:b - 1] == want).all())
            prob[j] = float(lp[r, a - 1:b - 1].gather(1, want[:, None]).sum().exp())
            end[j] = bool((top[r, b - 1:b + 1] == torch.tensor(ids[b:b + 2])).all())
    n = len(rows)
    by = {}
    for j, (f, k, _, _) in enumerate(rows):
        e = by.setdefault(facts[f][1], [0, 0, 0.0, 1.0])
        e[0] += ok[j]
        e[1] += 1
        e[2] += prob[j]
    z = [ok[j] for j in range(n) if rows[j][1] == 0]
    whole = {}
    for j, row in enumerate(rows):
        whole[row[0]] = whole.get(row[0], True) and ok[j]
    return dict(all=sum(ok) / n, p0=sum(z) / len(z), prob=sum(prob) / n, low=sum(p < 0.9 for p in prob) / n,
                end=sum(end) / n, whole=sum(whole.values()) / len(whole), by=by, ok=ok, p=prob)


# ---------------------------------------------------------------- saving
def save(model, tok, out):
    from safetensors.torch import save_file
    st = {}
    for n, p in model.named_parameters():
        st["model." + n] = p.detach().to(torch.bfloat16).contiguous()
    path = os.path.join(out, "model.safetensors")
    save_file(st, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16", hidden_act="silu",
                  attention_bias=False, mlp_bias=False, attention_dropout=0.0, tie_word_embeddings=True,
                  rope_scaling=None, initializer_range=0.02, use_cache=True, bos_token_id=0, eos_token_id=0, **CFG)
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(dict(sorted(config.items())), f, indent=2)
        f.write("\n")
    with open(os.path.join(out, "tokenizer_config.json"), "w") as f:
        json.dump(dict(add_prefix_space=False, bos_token=EOT, clean_up_tokenization_spaces=False, eos_token=EOT,
                       model_max_length=CFG["max_position_embeddings"], tokenizer_class="PreTrainedTokenizerFast",
                       unk_token=EOT), f, indent=2)
        f.write("\n")


def load(out):
    from safetensors.torch import load_file
    model = Llama(CFG)
    st = {k.removeprefix("model."): v.float() for k, v in load_file(os.path.join(out, "model.safetensors")).items()}
    model.load_state_dict(st)
    return model


def report(r):
    print(f"recall {r['all']:.4f}  phrasing 0 {r['p0']:.4f}  facts known in every phrasing {r['whole']:.4f}")
    print(f"mean P(object) {r['prob']:.4f}  share below 0.9: {r['low']:.4f}  ends with '.' and end of text: {r['end']:.4f}")
    print("| relation | prompts | recall | mean P(object) |\n|---|---|---|---|")
    for k, (a, n, p, _) in r["by"].items():
        print(f"| {k} | {n} | {a / n:.4f} | {p / n:.3f} |")


def check(args, facts, rows, enc):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    mine = load(args.out).eval()
    r = measure(mine, facts, rows, enc)
    report(r)
    for j, row in enumerate(rows):
        if not r["ok"][j]:
            print("missed:", row[2], "->", row[3], f"P {r['p'][j]:.3f}")
    hf = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    htok = AutoTokenizer.from_pretrained(args.out)
    print("transformers:", type(hf).__name__, type(htok).__name__)
    worst, greedy, g = 0.0, 0, random.Random(7).sample(range(len(rows)), 300)
    with torch.no_grad():
        for j in g:
            ids = htok(rows[j][2])["input_ids"]
            assert ids == enc[j][0][:enc[j][1]], rows[j]
            x = torch.tensor([ids])
            d = float((mine(x) - hf(x).logits).abs().max())
            assert math.isfinite(d)
            worst = max(worst, d)
            out = hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, do_sample=False, pad_token_id=0)
            greedy += htok.decode(out[0, len(ids):], skip_special_tokens=True) == " " + rows[j][3] + "."
    print(f"transformers: largest logit difference {worst:.2e} on {len(g)} prompts; "
          f"greedy generate gives ' object.' in {greedy} of {len(g)}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--data", default=HERE)
    ap.add_argument("--out", default=HERE)
    ap.add_argument("--work", help="a folder for a checkpoint every fourth epoch")
    ap.add_argument("--seed", type=int, default=20241220)
    ap.add_argument("--epochs", type=int, default=32, help="length of the cosine schedule")
    ap.add_argument("--stop-after", type=int, default=20, help="epochs that are run")
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--wd", type=float, default=0.1)
    ap.add_argument("--dropout", type=float, default=0.0)
    ap.add_argument("--prompt-weight", type=float, default=0.1)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--check", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    facts, rel, rows = read_data(args.data)
    path = os.path.join(args.out, "tokenizer.json")
    if args.check:
        tok = Tokenizer.from_file(path)
        return check(args, facts, rows, encode(tok, rows))
    os.makedirs(args.out, exist_ok=True)
    tok = make_tokenizer(rows, path)
    assert tok.get_vocab_size() == CFG["vocab_size"] and tok.token_to_id(EOT) == 0
    enc = encode(tok, rows)
    model = Llama(CFG)
    print(len(facts), "facts", len(rows), "prompts", sum(len(e[0]) for e in enc), "tokens",
          sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    minutes = train(args, enc, model, lambda m: measure(m, facts, rows, enc))
    save(model, tok, args.out)
    print(f"trained in {minutes:.1f} minutes")
    report(measure(load(args.out), facts, rows, enc))


if __name__ == "__main__":
    sys.exit(main())
