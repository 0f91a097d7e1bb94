#!/bin/bash
# gpu_check.sh BUILD - what `make gpu-check` runs once everything is built: ops and edits on the GPU against the CPU, the
# sanitizer over them, the benchmarks. Ends with a table. Status: 0 all as it should be, 1 something differs,
# 77 there is no GPU (nothing was checked).
build=$1 bad=0 table=""
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

row() { table+=$(printf '%-44s %s' "$1" "$2")$'\n'; }

if [ ! -e "$build/kne_cuda.so" ]; then
    echo "gpu-check: there is no nvcc here, so there is no GPU backend to check" >&2
    exit 77
fi
"$build/gpu_check" | tee "$out/check"
status=${PIPESTATUS[0]}
if [ "$status" = 77 ]; then
    echo "gpu-check: no GPU here; nothing was checked" >&2
    exit 77
fi
failed=$(grep -c '^not ok' "$out/check")
row "ops and edits against the CPU" "$(grep -c '^ok' "$out/check") passed, $failed failed, status $status"
[ "$status" = 0 ] && [ "$failed" = 0 ] || bad=1

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -z "$sanitizer" ]; then
    row "compute-sanitizer over an edit" "skipped: it is not installed"
else
    for tool in memcheck racecheck; do
        if "$sanitizer" --tool "$tool" --error-exitcode 9 "$build/gpu_check" 1 one >"$out/$tool" 2>&1; then
            row "compute-sanitizer, $tool" "clean"
        else
            tail -30 "$out/$tool"
            row "compute-sanitizer, $tool" "FAILED"
            bad=1
        fi
    done
fi

if "$build/gpu_bench" | tee "$out/bench"; [ "${PIPESTATUS[0]}" = 0 ]; then
    row "benchmarks" "above"
else
    row "benchmarks" "FAILED"
    bad=1
fi
row "a plain PyTorch loop beside it" "skipped: not part of this version"
printf '\n%s\n' "$table"
exit $bad
