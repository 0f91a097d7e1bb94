#!/usr/bin/env python3
"""check_export.py - what kne exported, as transformers and peft load it. Not part of make test: needs torch, transformers, peft.

    mkdir /tmp/out && build/test_export /tmp/out
    test/check_export.py /tmp/out models/atlas test/golden/{llama,gpt2,phi3,gpt_neox}

For each MODEL: every weight of BASE + adapter, merged, is the exported folder's to fp32 rounding, and logits of the two agree; they differ
from BASE's. With a file FOLDER/MODEL.tsv of (prompt, continuation, log-probability), as kne_logprob gives it, these are compared too.
"""
import os
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_texts(model, folder, tsv):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"))
    worst = 0.0
    with open(tsv) as lines:
        for line in lines:
            prompt, continuation, said = line.rstrip("\n").split("\t")
            head, whole = (tokenizer(t)["input_ids"] for t in (prompt, prompt + " " + continuation))
            p = logits(model, torch.tensor([whole])).log_softmax(-1)[0]
            is_ = sum(p[i - 1, whole[i]].item() for i in range(len(head), len(whole)))
            worst = max(worst, abs(is_ - float(said)))
    return worst


def main():
    out, bad = sys.argv[1], 0
    for base_folder in sys.argv[2:]:
        name = os.path.basename(base_folder)
        base, edited = load(base_folder), load(f"{out}/{name}-hf")
        adapted = PeftModel.from_pretrained(load(base_folder), f"{out}/{name}-peft")
        ids = torch.randint(0, base.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
        a, b, c = (logits(m, ids) for m in (base, edited, adapted))
        moved, apart = (a - b).abs().max().item(), (b - c).abs().max().item()
        merged = adapted.merge_and_unload().state_dict()
        rows = max((w - merged[k]).abs().max().item() / max(w.abs().max().item(), 1e-9) for k, w in edited.state_dict().items())
        tsv = f"{out}/{name}.tsv"
        texts = check_texts(edited, f"{out}/{name}-hf", tsv) if os.path.exists(tsv) else None
        good = moved > 1e-3 and apart < 1e-4 * max(1, b.abs().max().item()) and rows < 1e-6 and (texts is None or texts < 1e-3)
        bad += not good
        print(f"{'ok' if good else 'not ok'} - {name}: logits moved {moved:.3g}, adapter's apart {apart:.2g}, merged weights apart {rows:.2g} (relative)"
              + (f", log-probabilities of kne apart {texts:.2g}" if texts is not None else ""))
    return bad


sys.exit(main())
