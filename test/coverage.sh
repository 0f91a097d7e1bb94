# coverage.sh - which lines of src/ and extension/ the tests run: sourced by run.sh, which has built $tmp/src for gcov. All tests run, but
# what `make torture` does at length (kills for KNE_TORTURE_SECONDS, 20 here) and the fuzzers; a test that fails is
# `make test`'s affair. A process that is killed counts nothing. Kernels and programs of test/ are not counted.
export KNE_TORTURE_SECONDS=${KNE_TORTURE_SECONDS:-20}

say "engine tests"
as make -s -j"$(nproc)" -C "$tmp/src" -f src/engine.mk BUILD=build engine-tests
for t in "$tmp"/src/test/test_*.c; do
    name=$(basename "$t" .c)
    as env -C "$tmp/src" build/$name >"$tmp/part.log" 2>&1 || { echo "$name failed"; grep '^not ok' "$tmp/part.log" || true; }
done

say "SQL, isolation and TAP tests"
start_server
for what_not in TAP_TESTS= "REGRESS= ISOLATION="; do
    [ "$what_not" = TAP_TESTS= ] || stop_server
    as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck $what_not >"$tmp/part.log" 2>&1 ||
        { grep -E 'FAILED|Failed test|Dubious' "$tmp/part.log" || tail "$tmp/part.log"; }
done

say "lines"
(cd "$tmp/src" && "$clone/test/coverage.pl" $(find . -name '*.gcda')) | tee "${KNE_COVERAGE:-/dev/null}"
