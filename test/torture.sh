# torture.sh - the long versions of what `make test` does for less than a minute each, sourced by run.sh: kills for
# KNE_TORTURE_SECONDS (20 minutes), everybody at once for KNE_CONCURRENCY_SECONDS (10 minutes),
# and the leak test's ten parts. KNE_SEED repeats a run.
export KNE_TORTURE_SECONDS=${KNE_TORTURE_SECONDS:-1200} KNE_CONCURRENCY_SECONDS=${KNE_CONCURRENCY_SECONDS:-600} KNE_LEAK_PARTS=${KNE_LEAK_PARTS:-10}
say "kills for $KNE_TORTURE_SECONDS s, concurrency for $KNE_CONCURRENCY_SECONDS s"
as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck REGRESS= ISOLATION= PROVE_FLAGS=-v \
    PROVE_TESTS="t/060_torture.pl t/061_concurrency.pl t/065_leak.pl"
