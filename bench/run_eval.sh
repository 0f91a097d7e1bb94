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
    seeds=${KNE_EVAL_SEEDS:-1 2 3} edits=${KNE_EVAL_EDITS:-200}
else
    seeds=${KNE_EVAL_SEEDS:-1} edits=${KNE_EVAL_EDITS:-20}
fi
mkdir -p "$dir"
lines=$dir/eval.tsv
: >"$lines"

# The methods compared: name, options. Learning rates are the best of some on a few other edits: docs/quality.md.
everything='"max_neurons":16777216,"max_bytes":1073741824'
methods() {
    cat <<LIST
kne {}
paper's, plain {"select":"attribution","score":"p","fraction":0.01,"contrast":0,"anchors":0,"step":"adam","lr":0.001}
FT-M: one layer {"select":"all","layer_min":0,"layer_max":0,"step":"adam","lr":0.0003,"anchors":0,$everything}
all value vectors {"select":"all","lr":0.003,$everything}
random neurons {"select":"random"}
by attribution with contrast {"select":"attribution"}
by attribution without contrast {"select":"attribution","contrast":0}
without anchors {"anchors":0}
without protected step {"step":"adam","lr":0.001}
without phrasings {"phrasings":0}
LIST
}
fractions() {
    for f in 0.0025 0.005 0.01 0.02 0.05 0.1 0.2; do echo "fraction $f {\"fraction\":$f,$everything}"; done
}

# run SUITE MODES METHODS MODEL FACTS RELATIONS|- arguments: METHODS prints them
run() {
    local suite=$1 modes=$2 methods=$3 line variants=()
    shift 3
    while read -r line; do
        variants+=(--variant "$line")
    done < <($methods)
    "$build/bench_eval" "$@" --mode "$modes" "${variants[@]}" --seed "${seeds// /,}" --tsv "$suite" >>"$lines" ||
        echo "$suite: failed" >&2
}
method() { methods | head -1; }

facts() { # SUITE MODEL FACTS RELATIONS|-
    local suite=$1
    shift
    if [ "$size" != full ]; then
        run "$suite" "single:$edits,batch:16,consolidated:16" method "$@" --fluency 5
        return
    fi
    run "$suite" "single:$edits,batch:64,shared:64,consolidated:100" methods "$@" --fluency 20
    run "$suite, 500 edits" consolidated:500 method "$@"
    run "$suite, size of the ensemble" single:50,batch:64,sequence:100 fractions "$@"
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
    run "$(basename "$file" .json)" "single:$edits,batch:$edits,consolidated:$edits" \
        "$([ "$size" = full ] && echo methods || echo method)" "${KNE_EVAL_MODEL:?a model folder}" "$file" - --fluency 20
done

printf '# Edits, judged %s\n\n' "$(date -u +%Y-%m-%d)"
sed -n 's/^model name[^:]*: */CPU: /p' /proc/cpuinfo 2>/dev/null | head -1
printf '%s CPUs, load %s. What the columns mean: docs/quality.md.\n' "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg 2>/dev/null || echo unknown)"
awk -f bench/eval_table.awk "$lines"
awk -f bench/eval_chart.awk "$lines" >"$dir/eval.svg"
echo "lines in $lines, chart in $dir/eval.svg" >&2
