#!/bin/bash
# run_eval.sh - what `make eval` measures: edits of models that know their facts, by several methods on the same edits.
# Needs build/bench_eval (`make engine-bench`, or KNE_BUILD). Markdown on stdout; the lines behind it and a chart in KNE_EVAL_DIR.
#   KNE_EVAL         short (default; minutes: few edits, one seed, the method alone) or full (hours: everything)
#   KNE_EVAL_SEEDS   1 (full: "1 2 3")     KNE_EVAL_EDITS  edits one at a time, 20 (full: 200)
#   KNE_EVAL_SUITES  "atlas lre", as far as they are here; or none: only the following
#   KNE_EVAL_MODEL, KNE_EVAL_CASES  a model folder, and files of CounterFact, zsRE or KnowEdit to edit it with
#   KNE_EVAL_DIR     eval.tsv and eval.svg go there (default: build/eval)
set -euo pipefail
cd "$(dirname "$0")/.."
size=${KNE_EVAL:-short} build=${KNE_BUILD:-build} dir=${KNE_EVAL_DIR:-build/eval}
if [ "$size" = full ]; then
    seeds=${KNE_EVAL_SEEDS:-1 2 3} edits=${KNE_EVAL_EDITS:-200} sequence="100 500"
else
    seeds=${KNE_EVAL_SEEDS:-1} edits=${KNE_EVAL_EDITS:-20} sequence=
fi
mkdir -p "$dir"
lines=$dir/eval.tsv
: >"$lines"

# The methods compared: name, options. Learning rates of the others are usual ones, not tuned here.
methods() {
    cat <<'LIST'
kne {}
paper's, plain {"select":"attribution","contrast":0,"anchors":0,"step":"adam","lr":0.003}
one layer, all weights (FT-M) {"select":"all","layer_min":0,"layer_max":0,"step":"adam","lr":0.001,"anchors":0}
all value vectors {"select":"all","lr":0.003}
random neurons {"select":"random"}
by attribution with contrast {"select":"attribution"}
by attribution without contrast {"select":"attribution","contrast":0}
without anchors {"anchors":0}
without protected step {"step":"adam","lr":0.003}
without phrasings {"phrasings":0}
LIST
}
fractions() {
    for f in 0.0025 0.005 0.01 0.02 0.05 0.1; do echo "fraction $f {\"fraction\":$f}"; done
}

# run SUITE "VARIANT {options}" MODEL FACTS RELATIONS|- arguments
run() {
    local suite=$1 variant=${2%% \{*} options="{${2#*\{}" seed
    shift 2
    for seed in $seeds; do
        "$build/bench_eval" "$@" --seed "$seed" --options "$options" --tsv "$suite:$variant" >>"$lines" ||
            echo "$suite, $variant, seed $seed: failed" >&2
    done
}

facts() { # SUITE MODEL FACTS RELATIONS|-
    local suite=$1 n line
    shift
    if [ "$size" != full ]; then
        run "$suite" "kne {}" "$@" --mode single --edits "$edits" --fluency 5
        run "$suite" "kne {}" "$@" --mode batch --edits 16 --batch 16
        run "$suite" "kne {}" "$@" --mode sequence --edits 16
        return
    fi
    while read -r line; do
        run "$suite" "$line" "$@" --mode single --edits "$edits" --fluency 20
        run "$suite" "$line" "$@" --mode batch --edits 64 --batch 64
        run "$suite" "$line" "$@" --mode sequence --edits 100
    done < <(methods)
    for n in $sequence; do
        run "$suite, $n edits" "kne {}" "$@" --mode sequence --edits "$n"
    done
    while read -r line; do
        run "$suite, size of the ensemble" "$line" "$@" --mode single --edits 50
        run "$suite, size of the ensemble" "$line" "$@" --mode batch --edits 64 --batch 64
    done < <(fractions)
}

suites=${KNE_EVAL_SUITES-atlas lre}
lre=../shared/models/lre-llama-5m
for s in $suites; do
    case $s in
    atlas) facts atlas models/atlas models/atlas/facts.tsv models/atlas/relations.tsv ;;
    lre) if [ -d "$lre" ]; then facts lre-llama-5m "$lre" "$lre/facts.json" -; else echo "lre-llama-5m is not here: skipped" >&2; fi ;;
    none) ;;
    *) echo "unknown suite $s" >&2; exit 2 ;;
    esac
done
for file in ${KNE_EVAL_CASES:-}; do
    name=$(basename "$file" .json)
    while read -r line; do
        [ "$size" = full ] || [ "${line%% \{*}" = kne ] || continue
        for mode in single batch sequence; do
            run "$name" "$line" "${KNE_EVAL_MODEL:?a model folder}" "$file" - --mode $mode --edits "$edits" --fluency 20
        done
    done < <(methods)
done

printf '# Edits, judged %s\n\n' "$(date -u +%Y-%m-%d)"
sed -n 's/^model name[^:]*: */CPU: /p' /proc/cpuinfo 2>/dev/null | head -1
printf '%s CPUs, load %s. What the columns mean: docs/quality.md.\n' "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo unknown)"
awk -f bench/eval_table.awk "$lines"
awk -f bench/eval_chart.awk "$lines" >"$dir/eval.svg"
echo "lines in $lines, chart in $dir/eval.svg" >&2
