#!/usr/bin/env python3
"""The same edits written plainly in PyTorch, beside kne: seconds an edit, and whether both come to the same numbers.

    peer_torch.py BENCH_PEER MODEL EDITS [--rounds R] [--steps N] [--threads T] [--settings PROMPTS:ANCHORS ...]

MODEL and EDITS as bench_make writes them (GPT-2). The peer does what editors written on transformers do: the model in
float32 with eager autograd, right-padded batches, logits at every position, full gradients of weight matrices and a mask
on them, torch.optim.Adam over whole matrices. In one form every parameter has a gradient, as from_pretrained gives them; in the
other only the matrices that are edited. It edits one fact at a time: with a delta of its own for each, autograd
has no cheaper way. Attribution is gradient times weight, summed over a neuron's value vector.

Rounds alternate between the two, since machines are shared; each figure is the least of the rounds (what the machine
gives when it gives most), the ratio of these is what to read; on a busy machine the ratio of CPU seconds with one thread
is steadier. Prints Markdown.
"""
import argparse
import json
import subprocess
import sys
import time

import torch
import transformers
from tokenizers import Tokenizer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def read_edits(path):
    edits = []
    for line in open(path, encoding="utf-8"):
        kind, target, *prompts = line.rstrip("\n").split("\t")
        if kind == "edit":
            edits.append(dict(target=target, prompts=prompts, anchors=[]))
        else:
            edits[-1]["anchors"].append((prompts[0], target))
    return edits


class Peer:
    def __init__(self, folder, options):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
        self.o = options
        # row k of c_proj is the value vector of neuron k
        self.weights = [block.mlp.c_proj.weight for block in self.model.transformer.h]
        self.original = [w.detach().clone() for w in self.weights]

    def tokens(self, prompt, target):
        before = self.tokenizer.encode(prompt).ids
        whole = self.tokenizer.encode(prompt + " " + target).ids
        assert whole[:len(before)] == before
        return whole, len(before)

    def batch(self, facts):
        """Right-padded ids and mask; where the targets are predicted (sequence, position) and what they are."""
        longest = max(len(ids) for ids, _ in facts)
        ids = torch.zeros(len(facts), longest, dtype=torch.long)
        mask = torch.zeros(len(facts), longest, dtype=torch.long)
        rows, cols, want = [], [], []
        for i, (t, n) in enumerate(facts):
            ids[i, :len(t)] = torch.tensor(t)
            mask[i, :len(t)] = 1
            for j in range(n, len(t)):
                rows.append(i), cols.append(j - 1), want.append(t[j])
        return ids, mask, (torch.tensor(rows), torch.tensor(cols)), torch.tensor(want)

    def logp(self, batch):
        ids, mask, at, _ = batch
        return torch.log_softmax(self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[at], dim=-1)

    def need(self, all_gradients):
        for p in self.model.parameters():
            p.requires_grad_(all_gradients)
        for w in self.weights:
            w.requires_grad_(True)

    def edit(self, e):
        o, out = self.o, {}
        c0, t0 = time.process_time(), time.perf_counter()
        prompts = [self.tokens(p, e["target"]) for p in e["prompts"]]
        anchors = [self.tokens(p, t) for p, t in e["anchors"]]

        # what the model says before, and with which probability it says the target
        ids, n = prompts[0]
        with torch.no_grad():
            self.model.generate(torch.tensor([ids[:n]]), attention_mask=torch.ones(1, n, dtype=torch.long),
                                max_new_tokens=8, do_sample=False, pad_token_id=0)
            first = self.batch(prompts[:1])
            out["p_before"] = self.logp(first).gather(1, first[3][:, None]).sum().exp().item()

        # attribution: the gradient of log P of the target's tokens, times weight; the best neurons of all layers
        self.model.zero_grad(set_to_none=True)
        self.logp(first).gather(1, first[3][:, None]).sum().backward()
        score = torch.stack([(w.grad * w.detach()).sum(1) for w in self.weights]).abs().flatten()
        best = score.topk(max(1, min(o["max_neurons"], round(o["fraction"] * score.numel())))).indices
        chosen = torch.zeros_like(score).index_fill_(0, best, 1.0).view(len(self.weights), -1)
        masks = [m[:, None] for m in chosen]
        out["ensemble"] = best.tolist()
        t1 = time.perf_counter()

        # anchors' distributions before
        facts = self.batch(prompts + anchors)
        n_target = sum(len(t) - k for t, k in prompts)
        with torch.no_grad():
            reference = self.logp(facts)[n_target:]
        optimiser = torch.optim.Adam(self.weights, lr=o["lr"])
        losses = []
        for step in range(o["max_steps"] + 1):
            self.model.zero_grad()
            logp = self.logp(facts)
            loss = -logp[:n_target].gather(1, facts[3][:n_target, None]).mean()
            if len(anchors):
                beta = o["beta"] * 2.0 ** (-10 * max(0.0, step / o["max_steps"] - 0.2))  # fades after a fifth of the steps
                loss = loss + beta * (reference.exp() * (reference - logp[n_target:])).sum(1).mean()
            losses.append(loss.item())
            if len(losses) > o["max_steps"]:
                break
            loss.backward()
            for w, m in zip(self.weights, masks):
                w.grad.mul_(m)
            optimiser.step()
        t2, c2 = time.perf_counter(), time.process_time()

        # undone for the next one
        with torch.no_grad():
            for w, w0 in zip(self.weights, self.original):
                w.copy_(w0)
        out.update(seconds=t2 - t0, cpu=c2 - c0, attribution=t1 - t0, optimisation=t2 - t1, losses=losses)
        return out


def main():
    a = argparse.ArgumentParser()
    a.add_argument("program"), a.add_argument("folder"), a.add_argument("edits")
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--steps", type=int, default=20)
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--settings", nargs="+", default=["3:8", "1:0"])
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    options = dict(step="adam", contrast=0, protect=0, reference=1, points=1, lr=2e-4, probability=0.9999,
                   max_steps=a.steps, fraction=0.02, max_neurons=4096, beta=1)
    peer = Peer(a.folder, options)
    print(f"GPT-2 small, float32, random weights, {a.threads} threads, {a.steps} steps; peer: torch {torch.__version__}, "
          f"transformers {transformers.__version__}.")
    bad = 0
    for setting in a.settings:
        bad |= compare(a, peer, options, *map(int, setting.split(":")))
    return bad


def compare(a, peer, options, prompts, anchors):
    edits = read_edits(a.edits)
    for e in edits:
        e["prompts"], e["anchors"] = e["prompts"][:prompts], e["anchors"][:anchors]
    theirs, lean, ours, batch = [], [], [], []
    peer.need(True)
    peer.edit(edits[0])  # not timed, as kne's first
    for r in range(a.rounds):
        peer.need(True)
        theirs.append(peer.edit(edits[r % len(edits)]))
        peer.need(False)
        lean.append(peer.edit(edits[r % len(edits)]))
        run = [a.program, a.folder, a.edits, "--threads", str(a.threads), "--alone", str(a.rounds), "--batch", "16",
               "--prompts", str(prompts), "--anchors", str(anchors), "--options", json.dumps(options)]
        kne = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        ours.append(kne["alone"][r])
        batch.append(kne["batch"])

    def least(rows, key):
        return min(row[key] for row in rows)

    print(f"\n{prompts} prompt{'s' * (prompts > 1)} and {anchors} anchors an edit; {kne['backend']}; seconds an edit, and how many "
          "times faster than the peer (than the one with fewer gradients)\n")
    print("| | attribution and before | optimisation | all | times | CPU seconds | times |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in (("peer", theirs), ("peer, gradients of the edited matrices alone", lean), ("kne, alone", ours),
                       (f"kne, {batch[0]['edits']} together", batch)):
        n = rows[0].get("edits", 1)
        f = {k: least(rows, k) / n for k in ("attribution", "optimisation", "seconds", "cpu")}
        times = {k: f"{least(theirs, k) / f[k]:.1f} ({least(lean, k) / f[k]:.1f})" for k in ("seconds", "cpu")}
        print(f"| {name} | {f['attribution']:.3f} | {f['optimisation']:.3f} | {f['seconds']:.3f} | {times['seconds']} "
              f"| {f['cpu']:.3f} | {times['cpu']} |")

    # the same numbers?
    worst = overlap = 0.0
    for x, y in zip(theirs, ours):
        n = min(len(x["losses"]), len(y["losses"]) - 1, a.steps)
        worst = max([worst] + [abs(x["losses"][k] - y["losses"][k]) / max(1.0, abs(x["losses"][k])) for k in range(n)])
        overlap += len(set(x["ensemble"]) & set(y["ensemble"])) / len(x["ensemble"]) / a.rounds
    print(f"\nSame ensemble: {100 * overlap:.2f} % of the neurons. Largest relative difference of the loss over {a.steps} "
          f"steps: {worst:.1e}; last loss {theirs[0]['losses'][a.steps - 1]:.5f} and {ours[0]['losses'][a.steps - 1]:.5f}.")
    if worst > 1e-2 or overlap < 0.99:
        print("\nNOT THE SAME NUMBERS")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
