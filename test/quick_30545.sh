export KNE_SHARED=/work/shared
case TAP in
TAP) as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck REGRESS= ISOLATION= PROVE_FLAGS=-v PROVE_TESTS="t/020_dump.pl t/008_consolidate.pl" ;;
*) start_server
   other=$([ TAP = REGRESS ] && echo ISOLATION || echo REGRESS)
   st=0
   as make -s -C "$tmp/src" PG_CONFIG="$pg/bin/pg_config" installcheck TAP_TESTS= $other= TAP="t/020_dump.pl t/008_consolidate.pl" || st=$?
   cat "$tmp/src/regression.diffs" "$tmp/src/output_iso/regression.diffs" 2>/dev/null || true
   [ $st = 0 ] || tail -30 "$tmp/server.log"
   [ ! -d "$tmp/src/results" ] || { rm -rf /tmp/results.$(basename "$clone"); cp -r "$tmp/src/results" /tmp/results.$(basename "$clone"); }
   exit $st ;;
esac
