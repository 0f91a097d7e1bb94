#!/bin/bash
# gpu_check.sh BUILD - what `make gpu-check` runs once everything is built: ops and edits on the GPU against the CPU, the
# sanitizer over them, the benchmarks. Ends with a table. Status: 0 all as it should be, 1 something differs,
# 77 there is no GPU (nothing was checked).
build=$1 bad=0 table=""
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

row() { table+=$(printf '%-44s %s' "$1" "$2")$'\n'; }

if [ ! -e "$build/kne_cuda.so" ]; then
    echo "gpu-check: the GPU backend was not built (make kernels says why), so there is nothing to check" >&2
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
    own=$(grep -ohE '[a-z0-9_]+_kernel\(' kernels/*.cu | sort -u | tr -d '(' | paste -sd '|')
    for tool in memcheck racecheck synccheck; do
        if "$sanitizer" --tool "$tool" --error-exitcode 9 "$build/gpu_check" 1 one >"$out/$tool" 2>&1; then
            row "compute-sanitizer, $tool" "clean"
        elif [ "$tool" = racecheck ] && ! grep -q '^not ok' "$out/$tool" && grep -q '^1\.\.' "$out/$tool" && ! grep -qE "($own)\\(" "$out/$tool"; then
            row "compute-sanitizer, $tool" "clean but for kernels of the library"
        else
            tail -30 "$out/$tool"
            row "compute-sanitizer, $tool" "FAILED"
            bad=1
        fi
    done
fi

if KNE_FIGURES="$out/kne" "$build/gpu_bench" | tee "$out/bench"; [ "${PIPESTATUS[0]}" = 0 ]; then
    row "benchmarks" "above"
else
    row "benchmarks" "FAILED"
    bad=1
fi

# the same maths in plain PyTorch, where there is one that sees the GPU
python3 bench/gpu_peer_torch.py >"$out/peer" 2>"$out/peer.err"
status=$?
if [ "$status" = 77 ]; then
    row "a plain PyTorch loop beside it" "skipped: no torch that sees a GPU"
elif [ "$status" != 0 ]; then
    tail -5 "$out/peer.err"
    row "a plain PyTorch loop beside it" "FAILED"
    bad=1
else
    table+=$(awk -F '\t' 'NR == FNR { kne[$1, $2] = $3; next }
        function beside(what) { return ($1, what) in kne ? sprintf(", kne %s %.2f ms (%.1f times)", what, kne[$1, what], $3 / kne[$1, what]) : "" }
        $2 == "step" { printf "%-44s %.2f ms%s\n", "PyTorch, " $1 ", a step", $3, beside("step") }
        $2 == "edit" { printf "%-44s %.2f ms%s\n", "PyTorch, " $1 ", an edit", $3, beside("plain") beside("edit") beside("six") beside("batch") }
        $2 == "steps" || $2 == "P before" || $2 == "loss" { printf "%-44s %s, kne %s\n", "PyTorch, " $1 ", " $2, $3, kne[$1, $2] }' \
        "$out/kne" "$out/peer")$'\n'
fi
printf '\n%s\n' "$table"
exit $bad
