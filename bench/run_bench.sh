#!/bin/bash
# run_bench.sh - what make bench measures without a server: Markdown on stdout. Needs the programs of
# `make engine-bench` in build/ (or KNE_BUILD). Model folders are made in a temporary folder and deleted.
#   KNE_BENCH_PYTHON  a python with torch and transformers, for the peer (default: python3; skipped where it has none)
#   KNE_BENCH_EDITS   edits of the quality run, 200
set -euo pipefail
cd "$(dirname "$0")/.."
build=${KNE_BUILD:-build} python=${KNE_BENCH_PYTHON:-python3} atlas=models/atlas edits=${KNE_BENCH_EDITS:-200}
work=$(mktemp -d "${TMPDIR:-/tmp}/kne-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

title() { printf '\n## %s\n\n' "$1"; }

printf '# Measured %s\n\n' "$(date -u +%Y-%m-%d)"
sed -n 's/^model name[^:]*: */CPU: /p' /proc/cpuinfo 2>/dev/null | head -1
echo "$(nproc) CPUs, load $(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo unknown). On a shared machine read the ratios."

title "Matrix products and other ops, beside OpenBLAS"
"$build/bench_ops"

title "Tokenizers: CPU time to load, and English text encoded"
"$build/bench_tokenizer" README.md $atlas/tokenizer.json $(ls ../shared/tokenizers/*/tokenizer.json 2>/dev/null || true)

title "$edits counterfactual edits of atlas, one at a time and together"
"$build/bench_eval" $atlas $atlas/facts.tsv $atlas/relations.tsv --edits "$edits" --mode single
echo
"$build/bench_eval" $atlas $atlas/facts.tsv $atlas/relations.tsv --edits "$edits" --mode batch

"$build/bench_make" edits $atlas/facts.tsv $atlas/relations.tsv 16 >"$work/edits.tsv"
"$build/bench_make" gpt2 "$work/gpt2" $atlas/facts.tsv $atlas/relations.tsv
title "Where the time of an edit goes: atlas"
"$build/bench_phases" $atlas "$work/edits.tsv" --edits 8
echo
"$build/bench_phases" $atlas "$work/edits.tsv" --edits 16 --together
title "Where the time of an edit goes: the shape of GPT-2 small"
fixed='{"step":"adam","contrast":0,"protect":0,"reference":1,"lr":0.0002,"max_steps":10,"probability":0.9999}'
"$build/bench_phases" "$work/gpt2" "$work/edits.tsv" --edits 2 --options "$fixed"
echo
"$build/bench_phases" "$work/gpt2" "$work/edits.tsv" --edits 16 --together --options "$fixed"

title "Beside a peer in PyTorch"
if "$python" -c 'import torch, transformers, tokenizers' 2>/dev/null; then
    "$python" bench/peer_torch.py "$build/bench_peer" "$work/gpt2" "$work/edits.tsv" --rounds 3 --steps 10 --lr 2e-4 --probability 0.9999
    echo
    "$python" bench/peer_torch.py "$build/bench_peer" "$work/gpt2" "$work/edits.tsv" --rounds 2 --settings 1:0
else
    echo "Skipped: $python has no torch, transformers and tokenizers; set KNE_BENCH_PYTHON to one that has."
fi
