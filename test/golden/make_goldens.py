#!/usr/bin/env python3
"""Make the golden vectors of test/golden/: tiny random models of every family, run by transformers.

Made once with transformers 5.23.0, torch 2.15.0 (CPU), tokenizers as it requires; the tests need
none of these. `python3 make_goldens.py [family ...]` rewrites the folders beside this file.
What the files hold is described in README.md. Everything is seeded and single-threaded float32.
"""
import os
import sys

import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = os.path.dirname(os.path.abspath(__file__))
VOCAB = 131
LENGTHS = (4, 11, 17)
STEPS = 10
COMMON = dict(vocab_size=VOCAB, bos_token_id=None, eos_token_id=0, pad_token_id=None)
LLAMA = dict(COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=88, max_position_embeddings=48,
             rms_norm_eps=1e-5)
GPT = dict(COMMON, n_embd=32, n_layer=2, n_head=4, n_inner=96, n_positions=48)
HALF_ROTATED = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
NEOX = dict(COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=48, tie_word_embeddings=False)

# folder: (configuration, suffixes of the FFN's weight matrices, suffix of the down matrices)
SWIGLU = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
FAMILIES = {
    "llama": (lambda: tf.LlamaConfig(**LLAMA, tie_word_embeddings=False), SWIGLU),
    # all optional biases, a scaling whose bands (unchanged, blended, divided) all occur, tied head
    "llama3": (lambda: tf.LlamaConfig(
        **LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        rope_parameters=dict(rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=64)), SWIGLU),
    "mistral": (lambda: tf.MistralConfig(**LLAMA, sliding_window=24, tie_word_embeddings=False),
                SWIGLU),
    "qwen2": (lambda: tf.Qwen2Config(**LLAMA, tie_word_embeddings=True), SWIGLU),
    # head_dim * heads = 48 is not the model's width
    "qwen3": (lambda: tf.Qwen3Config(**LLAMA, head_dim=12, tie_word_embeddings=False), SWIGLU),
    "phi3": (lambda: tf.Phi3Config(
        **LLAMA, tie_word_embeddings=False, original_max_position_embeddings=48,
        rope_parameters=dict(HALF_ROTATED)),
        ("gate_up_proj.weight", "down_proj.weight")),
    "gpt2": (lambda: tf.GPT2Config(**GPT), ("c_fc.weight", "mlp.c_proj.weight")),
    "gptj": (lambda: tf.GPTJConfig(**GPT, rotary_dim=4, tie_word_embeddings=False),
             ("fc_in.weight", "fc_out.weight")),
    "gpt_neox": (lambda: tf.GPTNeoXConfig(
        **NEOX, use_parallel_residual=True, rope_parameters=dict(HALF_ROTATED)),
        ("dense_h_to_4h.weight", "dense_4h_to_h.weight")),
    "gpt_neox_seq": (lambda: tf.GPTNeoXConfig(
        **NEOX, use_parallel_residual=False, rope_parameters=dict(HALF_ROTATED)),
        ("dense_h_to_4h.weight", "dense_4h_to_h.weight")),
}
MERGES = ("Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o",
          "e n", "o r", "i s", "Ġ c", "i t", "e s", "a n", "Ġ i", "o u", "e d", "a l", "Ġ b",
          "in g", "Ġo f", "a r", "Ġ p", "Ġ m", "Ġa n", "i on")


def tokenizer():
    """Byte-level BPE of 128 ids: end of text, printable ASCII, space, newline, the merges above."""
    vocab = {"<|endoftext|>": 0}
    for c in [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]:
        vocab[c] = len(vocab)
    pairs = [tuple(m.split(" ")) for m in MERGES]
    for a, b in pairs:
        vocab[a + b] = len(vocab)
    t = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens(["<|endoftext|>"])
    assert t.get_vocab_size() == 128
    return t


def init(model, seed):
    """Weights that leave nothing at a neutral value: biases not 0, norm weights not 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=g)
            if p.dim() == 1:
                norm = "norm" in name or "ln_" in name
                p.copy_(1 + 0.3 * r if norm and name.endswith("weight") else 0.2 * r)
            else:
                p.copy_(r * (0.5 if "emb" in name or "wte" in name or "wpe" in name else 0.25))


def run(model, ids):
    """Logits of each sequence, and the mean of -log P(next) over all predictions of all of them."""
    logits = [model(torch.tensor([s])).logits[0] for s in ids]
    loss = sum(torch.nn.functional.cross_entropy(z[:-1], torch.tensor(s[1:]), reduction="sum")
               for z, s in zip(logits, ids)) / sum(len(s) - 1 for s in ids)
    return logits, loss


def make(name, seed):
    config, ffn = FAMILIES[name]
    folder = os.path.join(HERE, name)
    model = tf.AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    model = model.float().eval()
    init(model, seed)
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "generation_config.json"))
    tokenizer().save(os.path.join(folder, "tokenizer.json"))

    g = torch.Generator().manual_seed(seed + 1000)
    ids = [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in LENGTHS]
    mats = {n: p for n, p in model.named_parameters() if n.endswith(ffn)}
    down = [p for n, p in mats.items() if n.endswith(ffn[-1])]
    logits, loss = run(model, ids)
    loss.backward()
    out = {"loss": loss.detach().reshape(1)}
    for i, s in enumerate(ids):
        out[f"ids.{i}"] = torch.tensor(s, dtype=torch.int32)
        out[f"logits.{i}"] = logits[i].detach().contiguous()
    for n, p in mats.items():
        out["grad." + n] = p.grad.clone()
    lr, losses = 0.1, []
    for _ in range(STEPS):
        model.zero_grad()
        run(model, ids)[1].backward()
        with torch.no_grad():
            for p in down:
                p -= lr * p.grad
            losses.append(run(model, ids)[1].item())
    out["sgd_lr"] = torch.tensor([lr])
    out["sgd_losses"] = torch.tensor(losses)
    save_file(out, os.path.join(folder, "golden.safetensors"))
    for f in os.listdir(folder):
        os.chmod(os.path.join(folder, f), 0o644)
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name}: {size} bytes, loss {out['loss'].item():.4f} ->",
          " ".join(f"{x:.4f}" for x in losses))
    assert size < 300_000


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tf.logging.set_verbosity_error()
    for i, name in enumerate(FAMILIES):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            make(name, 100 + i)
