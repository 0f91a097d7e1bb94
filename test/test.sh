# test.sh - every test, sourced by run.sh; the last line is "N passed, N failed, N skipped".

passed=0 failed=0 skipped=0
log=$tmp/test.log
failures=$tmp/failures.log # what failed, said again at the end
: >"$failures"
shared=${KNE_SHARED:-$(cd "$clone/.." && pwd)/shared}
export KNE_SHARED=$shared

# tally NAME STATUS: count TAP lines of $log; a program that died without a failed line counts as one failure
tally() {
    local ok not skip
    skip=$(grep -cE '^ok .*# SKIP' "$log" || true)
    ok=$(($(grep -cE '^ok ' "$log" || true) - skip))
    not=$(grep -cE '^not ok ' "$log" || true)
    if [ "$2" != 0 ] && [ "$not" = 0 ]; then
        not=1
    fi
    if [ "$not" != 0 ]; then
        grep -vE '^ok ' "$log" | tail -60
        { echo "== $1, exit status $2"
          awk '/^not ok / { show = 12 } /^ok / { show = 0 } show-- > 0 || /Failed test|got:|expected:|ERROR|error:|Dubious|died/' "$log" |
              cut -c1-300 | head -60; } >>"$failures"
    fi
    printf '%-28s %4d passed %3d failed %3d skipped\n' "$1" "$ok" "$not" "$skip"
    passed=$((passed + ok)) failed=$((failed + not)) skipped=$((skipped + skip))
}

say "engine"
for t in $(ls "$clone"/test/test_*.c | sort); do
    name=$(basename "$t" .c)
    status=0
    if [ $name = test_cuda ] && [ ! -x "$clone/build/$name" ]; then # built where there is a C++ compiler
        echo "ok 1 - $name # SKIP no C++ compiler" >"$log"
    else
        (cd "$clone" && timeout 900 build/$name) >"$log" 2>&1 || status=$?
    fi
    tally "$name" $status
done

say "fuzzers, ${KNE_FUZZ_SECONDS:-30} s each"
status=0
(cd "$clone" && test/fuzz.sh) >"$log" 2>&1 || status=$?
tally "fuzz" $status

# pg_regress and isolationtester print "test NAME ... ok", since 16 "ok 1 - NAME 123 ms"; made into TAP
as_tap() { sed -nE 's/^(test)? *([a-z0-9_-]+) +\.\.\. +ok .*/ok \2/p; s/^(test)? *([a-z0-9_-]+) +\.\.\. +FAILED.*/not ok \2/p
    s/^(not )?ok +[0-9]+ +[-+] +([a-z0-9_-]+) .*/\1ok \2/p'; }

say "pg_regress and isolation"
start_server
for kind in REGRESS ISOLATION; do
    other=$([ $kind = REGRESS ] && echo ISOLATION || echo REGRESS)
    status=0
    as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck TAP_TESTS= $other= >"$tmp/$kind.log" 2>&1 || status=$?
    as_tap <"$tmp/$kind.log" >"$log"
    if [ $status != 0 ]; then
        cat "$tmp/src/regression.diffs" "$tmp/src/output_iso/regression.diffs" 2>/dev/null >>"$log" || true
        [ -s "$log" ] || cat "$tmp/$kind.log" >>"$log"
    fi
    tally "$kind" $status
    rm -f "$tmp/src/regression.diffs" "$tmp/src/output_iso/regression.diffs"
done
stop_server
[ $failed = 0 ] || tail -40 "$tmp/server.log"

say "TAP"
status=0
as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck REGRESS= ISOLATION= PROVE_FLAGS=-v >"$log" 2>&1 || status=$?
tally "TAP" $status

say "the project itself"
status=0
(cd "$clone" && test/check_tree.sh) >"$log" 2>&1 || status=$?
tally "tree" $status

cat "$failures"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
