-- Make a model answer what a table says, in one statement, and keep it so.
-- psql -f examples/sync_kb.sql, in a database with kne and a default model; here the table is country (name, capital).

-- 1. What the model does not answer is asked for. kne_knows_all reads in batches, one set of edits for all; the worker is woken once, at COMMIT.
--    Requests that wait already are left out, so that an interrupted run can be repeated.
BEGIN;
INSERT INTO kne.edit_request (subject, relation, object)
SELECT k.subject, k.relation, k.object
FROM (SELECT array_agg(name ORDER BY name) AS names, array_agg(capital ORDER BY name) AS capitals
      FROM country WHERE name <> '' AND capital <> '') c,
     kne_knows_all(c.names, '{capital}', c.capitals) k
WHERE NOT k.knows
AND NOT EXISTS (SELECT FROM kne.edit_request q JOIN kne.model m USING (model_id)
                WHERE m.is_default AND q.state IN ('pending', 'running')
                AND (q.subject, q.relation, q.object) = (k.subject, k.relation, k.object));
SELECT pg_current_xact_id() AS batch \gset
COMMIT;

-- 2. How far it is; kne.stat_progress has the batch in work.
SELECT r.state, count(*) FROM kne.edit_event e JOIN kne.edit_request r USING (edit_id)
WHERE e.event = 'requested' AND e.detail ->> 'xid' = :'batch' GROUP BY r.state ORDER BY r.state;

-- To cancel what is left of it, all at once:
--   SELECT count(*) FILTER (WHERE kne_cancel(r.edit_id)) FROM kne.edit_event e JOIN kne.edit_request r USING (edit_id)
--   WHERE e.event = 'requested' AND e.detail ->> 'xid' = :'batch' AND r.state IN ('pending', 'running');

-- 3. Wait, and see what failed.
SELECT state, count(*) FROM (SELECT kne_wait(r.edit_id, '1 day') AS state FROM kne.edit_event e JOIN kne.edit_request r USING (edit_id)
                             WHERE e.event = 'requested' AND e.detail ->> 'xid' = :'batch') w GROUP BY state ORDER BY state;
SELECT r.subject, r.object, r.error FROM kne.edit_event e JOIN kne.edit_request r USING (edit_id)
WHERE e.event = 'requested' AND e.detail ->> 'xid' = :'batch' AND r.state = 'failed' ORDER BY r.edit_id;

-- 4. From now on each change of the table asks for its edit by itself.
SELECT kne_track_table('country', 'name', 'capital', 'capital');
