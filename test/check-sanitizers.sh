# check-sanitizers.sh - everything under AddressSanitizer and UndefinedBehaviorSanitizer, and what is quick enough under valgrind,
# which also sees what was never set: sourced by run.sh, which has built $tmp/src with the sanitizers, kne.so with
# UndefinedBehaviorSanitizer alone (a server that is not built with AddressSanitizer hangs in its first call of libintl when that is
# loaded before it). A report ends its process, so that its test fails; here it is shown too. Leaks are looked for in the engine's
# tests; a server frees nothing at its end.
#
# KNE_SANITIZE: which of "engine server valgrind" (all). KNE_SANITIZE_TAP: the TAP tests of the server.
parts=${KNE_SANITIZE:-engine server valgrind}
tap=${KNE_SANITIZE_TAP:-t/002_worker.pl t/003_engine.pl t/006_locks.pl t/008_consolidate.pl t/030_export.pl t/062_fuzz.pl t/064_transactions.pl}
reports=$tmp/reports
as mkdir "$reports"
export UBSAN_OPTIONS=print_stacktrace=1 KNE_TORTURE_SECONDS=${KNE_TORTURE_SECONDS:-20}
options=abort_on_error=1:log_path=$reports/report
bad=0

# result NAME STATUS: one line, and what the sanitizers have said
result() {
    local said
    said=$(cat "$reports"/report.* 2>/dev/null || true)
    rm -f "$reports"/report.*
    if [ "$2" = 0 ] && [ -z "$said" ]; then
        echo "ok      $1"
    else
        bad=$((bad + 1))
        echo "FAILED  $1 ($2)"
        [ -z "$said" ] && tail -40 "$tmp/part.log" || echo "$said" | head -80
    fi
}

wants() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }

if wants engine; then
    say "engine tests under ASan and UBSan"
    as make -s -j"$(nproc)" -C "$tmp/src" -f src/engine.mk BUILD=build engine-tests
    for t in "$tmp"/src/test/test_*.c; do
        name=$(basename "$t" .c) status=0
        leaks=1; [ $name != test_eval ] || leaks=0 # the benchmarks' reader of suites, which keeps what it has read
        (as env -C "$tmp/src" ASAN_OPTIONS=detect_leaks=$leaks:$options build/$name) >"$tmp/part.log" 2>&1 || status=$?
        result "$name" $status
    done
fi

if wants server; then
    say "a server, its engine under ASan and UBSan, kne.so under UBSan"
    export ASAN_OPTIONS=detect_leaks=0:$options # which the launcher hands to the engine
    start_server
    for kind in REGRESS ISOLATION; do
        other=$([ $kind = REGRESS ] && echo ISOLATION || echo REGRESS) status=0
        as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck TAP_TESTS= $other= >"$tmp/part.log" 2>&1 || status=$?
        cat "$tmp/src/regression.diffs" "$tmp/src/output_iso/regression.diffs" >>"$tmp/part.log" 2>/dev/null || true
        result $kind $status
    done
    stop_server
    for t in $tap; do
        status=0
        as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck REGRESS= ISOLATION= PROVE_TESTS="$t" >"$tmp/part.log" 2>&1 || status=$?
        result "$t" $status
    done
fi

if wants valgrind; then
    say "engine tests under valgrind"
    as env -u ENGINE_EXTRA make -s -j"$(nproc)" -C "$tmp/src" -f src/engine.mk BUILD=build/plain ENGINE_EXTRA=-O1 engine-tests
    for name in ${KNE_VALGRIND:-test_delta test_eval test_model test_pool test_tokenizer test_export}; do
        leaks=full status=0; [ $name != test_eval ] || leaks=no
        (as env -C "$tmp/src" valgrind -q --error-exitcode=9 --leak-check=$leaks --suppressions=test/valgrind.supp --log-file="$reports/report.$name" build/plain/$name) >"$tmp/part.log" 2>&1 || status=$?
        [ -s "$reports/report.$name" ] || rm -f "$reports/report.$name"
        result "$name under valgrind" $status
    done
fi

[ $bad = 0 ] && echo "no findings" || { echo "$bad with findings"; exit 1; }
