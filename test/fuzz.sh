#!/bin/bash
# fuzz.sh [--can] - each libFuzzer target (test/fuzz_*.c) under ASan and UBSan: first the corpus as committed, then
# KNE_FUZZ_SECONDS (30) of mutations, two targets at a time. TAP on stdout; skipped where no clang here can link a fuzzer.
# --can: only says (by its exit code) whether one can. Nothing is written but to a temporary folder.
# A finding is printed in base64, so that a log is enough to reproduce it:
#   base64 -d >finding && build the target as its head says && ./target finding
# and goes into test/corpus/TARGET with its mending.
set -u
cd "$(dirname "$0")/.."
seconds=${KNE_FUZZ_SECONDS:-30} seed=${KNE_FUZZ_SEED:-1}
work=$(mktemp -d "${TMPDIR:-/tmp}/kne-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# Any clang that can link a fuzzer: its runtime is a package of its own (libclang-rt-N-dev).
echo '#include <stddef.h>
int LLVMFuzzerTestOneInput(const unsigned char *p, size_t n);
int LLVMFuzzerTestOneInput(const unsigned char *p, size_t n) { return p == NULL && n; }' >"$work/try.c"
clang=
for c in ${CLANG:-clang $(ls /usr/bin /usr/lib/llvm-*/bin 2>/dev/null | grep -xE 'clang-[0-9]+' | sort -t- -k2 -rnu)}; do
    if command -v "$c" >/dev/null && "$c" -fsanitize=fuzzer,address,undefined "$work/try.c" -o "$work/try" 2>/dev/null; then
        clang=$c
        break
    fi
done
[ "${1:-}" != --can ] || { [ -n "$clang" ]; exit; }

targets=$(ls test/fuzz_*.c | sed 's,.*/fuzz_\(.*\)\.c,\1,')
if [ -z "$clang" ]; then
    n=0
    for t in $targets; do
        n=$((n + 1))
        echo "ok $n - fuzz $t # SKIP no clang that links a fuzzer (packages clang and libclang-rt-N-dev, N as clang --version says)"
    done
    echo "1..$n"
    exit 0
fi

# What a target is linked with besides the base.
sources() {
    case $1 in
        json) echo src/kne_options.c src/kne_options_json.c src/kne_safetensors.c ;;
        config) echo src/kne_arch.c src/kne_safetensors.c ;;
        safetensors) echo src/kne_safetensors.c ;;
        tokenizer) echo src/kne_tokenizer*.c src/kne_bpe*.c src/kne_added_tokens.c src/kne_normalizer.c \
            src/kne_pretokenizer.c src/kne_decoder.c ;;
    esac
}

# run TARGET: build, replay, mutate; leaves "ok" or what went wrong in $work/TARGET.result
run() {
    local t=$1 dir=$work/$1 dict=() rc=0 found
    mkdir -p "$dir/new" "$dir/seed"
    [ ! -d test/corpus/$t ] || cp test/corpus/$t/* "$dir/seed/"
    # the tokenizers of its unit tests, whole; a finding that was kept is a seed like any other
    [ $t != tokenizer ] || [ ! -x "${KNE_BUILD:-build}/test_tokenizer" ] ||
        "${KNE_BUILD:-build}/test_tokenizer" --cases "$dir/seed" >/dev/null 2>&1 || true
    [ ! -f test/corpus/$t.dict ] || dict=(-dict=test/corpus/$t.dict)
    if ! "$clang" -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
        -Isrc test/fuzz_$t.c $(sources $t) src/kne_base.c src/kne_error.c -lpcre2-8 -lutf8proc -lcjson -lcrypto -lm \
        -o "$dir/fuzz" >"$dir/log" 2>&1; then
        echo "does not compile" >"$dir.result"
        return
    fi
    TMPDIR=$dir "$dir/fuzz" -runs=0 -timeout=20 -rss_limit_mb=2048 -artifact_prefix="$dir/" "$dir/seed" >"$dir/log" 2>&1 || rc=$?
    if [ $rc != 0 ]; then
        echo "a file of the corpus" >"$dir.result"
    else
        TMPDIR=$dir "$dir/fuzz" -max_total_time=$seconds -seed=$seed -timeout=20 -rss_limit_mb=2048 -max_len=8192 \
            -print_final_stats=1 -artifact_prefix="$dir/" "${dict[@]}" "$dir/new" "$dir/seed" >"$dir/log" 2>&1 || rc=$?
        [ $rc = 0 ] && echo ok >"$dir.result" || echo "exit code $rc" >"$dir.result"
    fi
    if [ $rc != 0 ]; then
        for found in "$dir"/crash-* "$dir"/timeout-* "$dir"/oom-* "$dir"/leak-*; do
            [ -f "$found" ] && { echo "$(basename "$found") in base64:"; head -c 16384 "$found" | base64; } >>"$dir/log"
        done
    fi
    echo "$(ls "$dir/seed" | wc -l) seeds, $(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/log") runs" >"$dir.figures"
}

jobs_at_once=2
[ "$(nproc)" -ge 2 ] || jobs_at_once=1
for t in $targets; do
    while [ "$(jobs -pr | wc -l)" -ge $jobs_at_once ]; do
        wait -n
    done
    run $t &
done
wait

n=0 bad=0
for t in $targets; do
    n=$((n + 1))
    result=$(cat "$work/$t.result" 2>/dev/null || echo "died")
    if [ "$result" = ok ]; then
        echo "ok $n - fuzz $t: $(cat "$work/$t.figures")"
    else
        bad=1
        echo "not ok $n - fuzz $t: $result"
        grep -vE '^#[0-9]+' "$work/$t/log" | tail -60 | sed 's/^/# /'
    fi
done
echo "1..$n"
exit $bad
