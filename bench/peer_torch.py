#!/usr/bin/env python3
"""The same edits written plainly in PyTorch, beside kne: seconds an edit, and whether both come to the same numbers.

    peer_torch.py BENCH_PEER MODEL EDITS [--rounds R] [--steps N] [--probability P] [--lr L] [--threads T] [--settings PROMPTS:ANCHORS ...]

MODEL and EDITS as bench_make writes them (GPT-2). The peer does what editors written on transformers do: the model in
float32 with eager autograd, right-padded batches, logits at every position, full gradients of weight matrices and a mask
on them, torch.optim.Adam over whole matrices. In one form every parameter has a gradient, as from_pretrained gives them; in the
other only the matrices that are edited. It edits one fact at a time: with a delta of its own for each, autograd
has no cheaper way. It chooses neurons and steps as kne does with `step` = `adam` and no protecting facts (docs/method.md):
the energy of a neuron is then the squared norm of the gradient of its value vector, ranked for each object token; quiet anchors
sit out; it stops once every token of the object is reached.

Rounds alternate between the two, since machines are shared. A ratio is of one round, its median over the rounds and its
least are printed: read those, and on a busy machine those of CPU seconds. Prints Markdown.
"""
import argparse
import json
import statistics
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

    def select(self, prompts):
        """The ensemble: every token of the object ranks the neurons, a neuron counts by its best rank, ties to the lower one."""
        n_all = sum(w.shape[0] for w in self.weights)
        n = max(1, min(self.o["max_neurons"], self.o["max_bytes"] // (4 * self.weights[0].shape[1]), round(self.o["fraction"] * n_all)))
        whole = self.batch(prompts)
        token = torch.cat([torch.arange(len(t) - k) for t, k in prompts])
        logp = self.logp(whole).gather(1, whole[3][:, None])[:, 0]
        rank = {}
        for j in range(int(token.max()) + 1):
            self.model.zero_grad(set_to_none=True)
            logp[token == j].sum().backward(retain_graph=j < int(token.max()))
            energy = torch.cat([w.grad.square().sum(1) for w in self.weights])
            for r, i in enumerate(energy.topk(n).indices.tolist()):
                rank[i] = min(r, rank.get(i, r))
        return sorted(rank, key=lambda i: (rank[i], i))[:n]

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

        # for each token of the object: the gradient of its log P over all prompts; squared, the energy of every neuron
        out["ensemble"] = self.select(prompts)
        chosen = torch.zeros(len(self.weights) * self.weights[0].shape[0])
        masks = chosen.index_fill_(0, torch.tensor(out["ensemble"]), 1.0).view(len(self.weights), -1, 1)
        t1 = time.perf_counter()

        # anchors' distributions before
        reference = []
        if anchors:
            with torch.no_grad():
                reference = self.logp(self.batch(anchors)).split([len(t) - n for t, n in anchors])
        outs = sum(len(t) - n for t, n in anchors)
        n_target = sum(len(t) - n for t, n in prompts)
        rest, pause = [1] * len(anchors), [0] * len(anchors)  # rounds an anchor sits out, and how many it sat out last
        optimiser = torch.optim.Adam(self.weights, lr=o["lr"])
        losses = []
        for step in range(o["max_steps"] + 1):
            turn = [i for i in range(len(anchors)) if not rest[i]]
            rest = [max(0, r - 1) for r in rest]
            facts = self.batch(prompts + [anchors[i] for i in turn])
            self.model.zero_grad()
            logp = self.logp(facts)
            target = logp[:n_target].gather(1, facts[3][:n_target, None])[:, 0]
            kl, at = [], n_target
            for i in turn:
                n = len(reference[i])
                kl.append((reference[i].exp() * (reference[i] - logp[at:at + n])).sum())
                at += n
                pause[i] = 0 if kl[-1].item() > 1e-3 * n else 4 if pause[i] else 1
                rest[i] = pause[i]
            kl = sum(kl) / outs if kl else torch.zeros(())
            # beta fades after a fifth of the steps
            beta = [o["beta"] * 2.0 ** (-10 * max(0.0, s / o["max_steps"] - 0.2)) for s in (step, step + 1)]
            losses.append(-target.mean().item() + beta[0] * kl.item())
            reached = bool((logp[:n_target].argmax(1) == facts[3][:n_target]).all()) and target.exp().min().item() >= o["probability"]
            if reached or step == o["max_steps"]:
                break
            (beta[1] * kl - target.mean()).backward()
            for w, m in zip(self.weights, masks):
                w.grad.mul_(m)
            optimiser.step()
        with torch.no_grad():
            out["p_after"] = self.logp(first).gather(1, first[3][:, None]).sum().exp().item()
        out["steps"], out["reached"] = step, reached
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
    a.add_argument("--steps", type=int, default=40)
    a.add_argument("--probability", type=float, default=0.95)
    a.add_argument("--lr", type=float, default=5e-4)
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--settings", nargs="+", default=["3:8", "1:0"])
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    options = dict(step="adam", protect=0, points=1, lr=a.lr, probability=a.probability, max_steps=a.steps, fraction=0.02,
                   max_neurons=4096, max_bytes=4 << 20, beta=1)
    peer = Peer(a.folder, options)
    print(f"GPT-2 small, float32, random weights, {a.threads} threads, until each token has probability {a.probability}; "
          f"peer: torch {torch.__version__}, transformers {transformers.__version__}.")
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
        at = r % len(edits)
        peer.need(True)
        theirs.append(peer.edit(edits[at]))
        run = [a.program, a.folder, a.edits, "--threads", str(a.threads), "--from", str(at), "--alone", "1", "--batch", "16",
               "--prompts", str(prompts), "--anchors", str(anchors), "--options", json.dumps(options)]
        kne = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        ours.append(kne["alone"][0])
        batch.append(kne["batch"])
        peer.need(False)
        lean.append(peer.edit(edits[at]))

    def ratios(slow, fast, key):
        """Of each round; the batch, whose edits are others, by the step."""
        return [(x[key] / x["steps"]) / (y[key] / y["steps"]) for x, y in zip(slow, fast)]

    print(f"\n{prompts} prompt{'s' * (prompts > 1)} and {anchors} anchors an edit; {kne['backend']}; {a.rounds} rounds: medians of "
          "seconds an edit, median (least) of how many times kne is faster\n")
    print("| | steps | attribution and before | optimisation | all | CPU seconds | kne faster alone | in CPU seconds | together | in CPU seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, rows in (("peer", theirs), ("peer, gradients of the edited matrices alone", lean), ("kne, alone", ours),
                       (f"kne, {batch[0]['edits']} together", batch)):
        n = rows[0].get("edits", 1)
        f = [f"{statistics.median(row[k] for row in rows) / n:.3f}" for k in ("attribution", "optimisation", "seconds", "cpu")]
        if rows in (theirs, lean):
            for fast in (ours, batch):
                for k in ("seconds", "cpu"):
                    times = ratios(rows, fast, k)
                    f.append(f"{statistics.median(times):.1f} ({min(times):.1f})")
        else:
            f += [""] * 4
        print(f"| {name} | {statistics.mean(row['steps'] for row in rows) / n:.1f} | " + " | ".join(f) + " |")

    # the same numbers?
    loss = p = 0.0
    overlap, steps = 1.0, True
    for x, y in zip(theirs, ours):
        n = min(x["steps"], y["steps"])
        loss = max([loss] + [abs(x["losses"][k] - y["losses"][k]) / max(1.0, abs(x["losses"][k])) for k in range(n)])
        overlap = min(overlap, len(set(x["ensemble"]) & set(y["ensemble"])) / len(x["ensemble"]))
        p = max(p, abs(x["p_before"] / y["p_before"] - 1), abs(x["p_after"] - y["p_after"]) if y["applied"] else 0)
        steps &= x["steps"] == y["steps"] and x["reached"] == bool(y["applied"])
    print(f"\nOver {a.rounds} edits: at least {100 * overlap:.2f} % of the neurons are the same; "
          f"{'as many steps' if steps else 'NOT AS MANY STEPS'}; the loss differs by at most {loss:.1e}, the probabilities before and after "
          f"by {p:.1e}. Reached: peer {sum(x['reached'] for x in theirs)}, kne {sum(y['applied'] for y in ours)} of {a.rounds}; "
          f"together {batch[0]['applied']} of {batch[0]['edits']}.")
    if overlap < 0.99 or not steps or loss > 1e-2 or p > 1e-2:
        print("\nNOT THE SAME NUMBERS")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
