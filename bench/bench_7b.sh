#!/bin/bash
# bench_7b.sh TOKENIZER.JSON - a folder of Llama-2-7B's shape with random bfloat16 weights (13.5 GB, in a temporary folder,
# deleted after), opened, and one edit of 32 tokens on it. Takes minutes and is no part of make test or make bench.
# TOKENIZER.JSON: of a Llama-2 model (32000 tokens). KNE_BENCH_OPTIONS: options of the edit. KNE_BUILD: where the programs are.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${KNE_BUILD:-build} tokenizer=${1:?tokenizer.json of a Llama-2 model}
work=$(mktemp -d "${TMPDIR:-/tmp}/kne-7b.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
free=$(df -Pk "$work" | awk 'NR == 2 {print $4}')
[ "$free" -gt 15000000 ] || { echo "15 GB of disk are needed in ${TMPDIR:-/tmp}, $((free / 1000000)) are free" >&2; exit 1; }
[ -x "$build/bench_big" ] && [ -x "$build/bench_make" ] || make -s -f src/engine.mk BUILD="$build" "$build/bench_big" "$build/bench_make"
"$build/bench_make" llama2-7b "$work/model" "$tokenizer"
sync
"$build/bench_big" "$work/model" --options "${KNE_BENCH_OPTIONS:-}"
