# bench.sh - speed and quality, measured; sourced by run.sh with a private server to start. Markdown on stdout.

"$clone/bench/run_bench.sh"

# ---- through SQL ----
n=${KNE_BENCH_SQL_EDITS:-64}
start_server
sql() { as psql -X -q -A -t -v ON_ERROR_STOP=1 "$@"; }
sql -o /dev/null <<SQL
CREATE EXTENSION kne;
SELECT kne_load_model('atlas', '$tmp/models/atlas');
COPY kne.relation (relation, prompt, paraphrases, inverse) FROM '$tmp/models/atlas/relations.tsv';
COPY kne.fact (subject, relation, object) FROM '$tmp/models/atlas/facts.tsv';
-- counterfactual: the object of the next subject of the relation that has another; every subject once, in an order of its own
CREATE TABLE wanted AS
    SELECT row_number() OVER (ORDER BY md5(subject || relation)) AS n, subject, relation, object
    FROM (SELECT DISTINCT ON (f.subject) f.subject, f.relation, o.object
          FROM kne.fact f CROSS JOIN LATERAL (
              SELECT object FROM kne.fact g WHERE g.relation = f.relation AND g.object <> f.object
              ORDER BY md5(f.subject || g.subject) LIMIT 1) o
          ORDER BY f.subject, md5(f.relation || f.subject)) w;
SQL
# warm: the engine is up, the references of the known facts are there
sql -o /dev/null -c "SELECT kne_edit(subject, relation, object) FROM wanted WHERE n = 2 * $n + 1" \
    -c "SELECT kne_wait(edit_id) FROM kne.edit_request"

printf '\n## Through SQL: %s edits of atlas\n\n' "$n"
echo "| | edits/s | applied | failed | attribution s an edit | optimisation s an edit | rest s an edit | rows an edit | KiB an edit |"
echo "|---|---|---|---|---|---|---|---|---|"
seconds() { sql -c "SELECT extract(epoch FROM clock_timestamp())"; }
# report TITLE FROM_ID SECONDS
report() {
    sql -F ' | ' -c "
        WITH r AS (SELECT * FROM kne.edit_request WHERE edit_id > $2 AND state IN ('applied', 'failed')),
             s AS (SELECT coalesce(sum(attribute_seconds), 0) AS a, coalesce(sum(optimise_seconds), 0) AS o
                   FROM (SELECT attribute_seconds / batch AS attribute_seconds, optimise_seconds / batch AS optimise_seconds FROM (
                       SELECT attribute_seconds, optimise_seconds, greatest(1, jsonb_array_length(provenance->'batch')) AS batch
                       FROM kne.solution WHERE edit_id > $2) x) y),
             w AS (SELECT count(*) AS n, coalesce(sum(pg_column_size(d.*)), 0) AS bytes FROM kne.weight_delta d WHERE edit_id > $2),
             e AS (SELECT count(*) AS n, coalesce(sum(pg_column_size(d.*)), 0) AS bytes FROM kne.ensemble d WHERE edit_id > $2),
             c AS (SELECT count(*)::float8 AS n, count(*) FILTER (WHERE state = 'applied') AS good FROM r)
        SELECT '| $1', round((c.n / $3)::numeric, 2), c.good, c.n - c.good, round((s.a / c.n)::numeric, 3), round((s.o / c.n)::numeric, 3),
               round((($3 - s.a - s.o) / c.n)::numeric, 3), round(((w.n + e.n) / greatest(1, c.good))::numeric),
               round(((w.bytes + e.bytes) / greatest(1, c.good) / 1024)::numeric, 1) || ' |'
        FROM s, w, e, c"
}
last=$(sql -c "SELECT coalesce(max(edit_id), 0) FROM kne.edit_request") from=$(seconds)
sql -o /dev/null -c "INSERT INTO kne.edit_request (subject, relation, object) SELECT subject, relation, object FROM wanted WHERE n <= $n"
sql -o /dev/null -c "SELECT kne_wait(edit_id, '1 hour') FROM kne.edit_request WHERE edit_id > $last"
report "INSERT ... SELECT of $n" "$last" "$(sql -c "SELECT extract(epoch FROM clock_timestamp()) - $from")"
last=$(sql -c "SELECT coalesce(max(edit_id), 0) FROM kne.edit_request") from=$(seconds)
for i in $(seq 1 $n); do
    printf '%s\n' "SELECT kne_edit(subject, relation, object) AS id FROM wanted WHERE n = $n + $i \\gset" 'SELECT kne_wait(:id);'
done >"$tmp/one.sql"
chmod 644 "$tmp/one.sql"
sql -o /dev/null -f "$tmp/one.sql" 2>"$tmp/one.err" || { tail -3 "$tmp/one.err" >&2; }
report "one at a time, each waited for" "$last" "$(sql -c "SELECT extract(epoch FROM clock_timestamp()) - $from")"
stop_server
