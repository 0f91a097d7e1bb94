/* kne 0.1 to 0.2: what kne--0.2.sql has and kne--0.1.sql does not; t/022_upgrade.pl compares */
\echo Use "ALTER EXTENSION kne UPDATE TO '0.2'" to load this file. \quit

CREATE VIEW kne.stat_model AS
    SELECT m.name AS model, count(s.*) FILTER (WHERE s.in_force) AS solutions_in_force,
           coalesce(sum(s.delta_bytes) FILTER (WHERE s.in_force), 0)::bigint AS bytes_in_force,
           count(s.*) FILTER (WHERE NOT s.in_force) AS solutions_kept,
           coalesce(sum(s.delta_bytes) FILTER (WHERE NOT s.in_force), 0)::bigint AS bytes_kept
    FROM kne.model m LEFT JOIN kne.stat_size s ON s.model = m.name
    GROUP BY m.name;

COMMENT ON VIEW kne.stat_model IS 'Deltas of each model in bytes: in force, and kept for as_of and for edits that may come back.';
