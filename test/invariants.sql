/*
 * invariants.sql - what is true of kne's rows in every snapshot, whatever ran, died or was refused before it. One statement, so that
 * it is one snapshot; each row that it returns is a violation: (invariant, edit, detail). No row: all hold.
 *
 * With -v digests=1 the digests of events and of solutions are computed again from their rows (see src/kne_protocol.h), which takes a second
 * for each ten megabytes of deltas.
 */
SET jit = off;
\if :{?digests} \else \set digests 0 \endif
WITH request AS (
    SELECT r.*, r.origin = i.origin AND r.origin_database = (SELECT oid FROM pg_database WHERE datname = current_database()) AS own,
           (SELECT count(*) FROM kne.activation a WHERE a.edit_id = r.edit_id AND a.valid_to IS NULL) AS in_force,
           (SELECT count(*) FROM kne.fact f WHERE f.edit_id = r.edit_id AND f.valid_to IS NULL) AS facts,
           (SELECT count(*) FROM kne.fact f WHERE f.edit_id = r.edit_id AND f.valid_to IS NULL AND f.object = r.object
            AND f.subject = r.subject AND f.relation = r.relation AND f.model_id = r.model_id) AS its_facts,
           (SELECT count(*) FROM kne.solution s WHERE s.edit_id = r.edit_id AND s.generation = 0) AS solved,
           (SELECT count(*) FROM kne.edit_event e WHERE e.edit_id = r.edit_id AND e.event = 'applied') AS applied,
           (SELECT e.event FROM kne.edit_event e WHERE e.edit_id = r.edit_id
            AND e.event IN ('requested', 'started', 'adopted', 'applied', 'reinstated', 'superseded', 'reverted', 'failed', 'cancelled')
            ORDER BY e.event_id DESC LIMIT 1) AS last_event,
           (SELECT e.event FROM kne.edit_event e WHERE e.edit_id = r.edit_id ORDER BY e.event_id LIMIT 1) AS first_event,
           (SELECT count(*) FROM kne.edit_event e WHERE e.edit_id = r.edit_id AND e.event = 'started') AS started
    FROM kne.edit_request r CROSS JOIN kne.instance i
), le AS ( -- four bytes, the lowest first
    SELECT s.edit_id, s.generation, sha256(string_agg(
               decode(regexp_replace(encode(int4send(w.layer) || int4send(w.neuron), 'hex'), '(..)(..)(..)(..)', '\4\3\2\1', 'g'), 'hex')
               || CASE w.matrix WHEN 'down' THEN '\x00' WHEN 'gate' THEN '\x01' ELSE '\x02' END::bytea
               || decode(regexp_replace(encode(int4send(cardinality(w.delta))
                                               || (SELECT string_agg(float4send(x), ''::bytea ORDER BY i) FROM unnest(w.delta) WITH ORDINALITY u (x, i)), 'hex'),
                                        '(..)(..)(..)(..)', '\4\3\2\1', 'g'), 'hex'),
               ''::bytea ORDER BY w.layer, w.neuron, CASE w.matrix WHEN 'down' THEN 0 WHEN 'gate' THEN 1 ELSE 2 END)) AS digest
    FROM kne.solution s JOIN kne.weight_delta w USING (edit_id, generation)
    WHERE :digests = 1
    GROUP BY s.edit_id, s.generation
)
SELECT 'one applied edit a fact' AS invariant, min(edit_id) AS edit, count(*)::text AS detail
FROM kne.edit_request WHERE state = 'applied' GROUP BY model_id, subject, relation HAVING count(*) > 1
UNION ALL
SELECT 'applied is in force, once', edit_id, state || ' ' || in_force FROM request WHERE in_force <> (state = 'applied')::int
UNION ALL
SELECT 'what was applied is solved, and nothing else', edit_id, state FROM request
WHERE (solved = 1) <> (state IN ('applied', 'superseded', 'reverted'))
UNION ALL
SELECT 'applied once', edit_id, applied::text FROM request WHERE own AND applied <> solved
UNION ALL
SELECT 'an edit in force has its fact', edit_id, state || ' ' || its_facts || ' of ' || facts FROM request
WHERE its_facts <> (state = 'applied')::int OR facts <> its_facts
UNION ALL
SELECT 'no told fact beside an edit in force that ended it', r.edit_id, f.object
FROM kne.fact f JOIN kne.edit_request r USING (model_id, subject, relation) JOIN kne.activation a ON a.edit_id = r.edit_id AND a.valid_to IS NULL
WHERE r.state = 'applied' AND f.edit_id IS NULL AND f.valid_to IS NULL AND f.valid_from < a.valid_from
UNION ALL
SELECT 'a unit was applied as a whole or not at all', unit, count(*) FILTER (WHERE solved = 1) || ' of ' || count(*)
FROM request WHERE unit IS NOT NULL GROUP BY unit HAVING count(*) FILTER (WHERE solved = 1) NOT IN (0, count(*))
UNION ALL
SELECT 'a tag is of an instant that has been', NULL, t.name FROM kne.tag t WHERE NOT isfinite(t.at)
UNION ALL
SELECT 'history begins with the request', edit_id, first_event FROM request WHERE own AND first_event IS DISTINCT FROM 'requested'
UNION ALL
SELECT 'history ends with the state', edit_id, state || ' ' || coalesce(last_event, '-') FROM request
WHERE own AND NOT CASE state WHEN 'pending' THEN last_event IN ('requested', 'started', 'adopted')
                             WHEN 'running' THEN last_event = 'started'
                             WHEN 'applied' THEN last_event IN ('applied', 'reinstated')
                             ELSE last_event = state END
UNION ALL
SELECT 'what ran was started', edit_id, state FROM request WHERE own AND started = 0 AND state NOT IN ('pending', 'cancelled')
UNION ALL
SELECT 'finished when it is', edit_id, state FROM request WHERE (finished_at IS NULL) <> (state IN ('pending', 'running'))
UNION ALL
SELECT 'every neuron and row of a solution', s.edit_id, s.n_neurons || ' ' || s.n_rows
FROM kne.solution s
WHERE s.n_neurons <> (SELECT count(*) FROM kne.ensemble e WHERE (e.edit_id, e.generation) = (s.edit_id, s.generation))
OR s.n_rows <> (SELECT count(*) FROM kne.weight_delta w WHERE (w.edit_id, w.generation) = (s.edit_id, s.generation))
AND NOT EXISTS (SELECT FROM kne.rebase b WHERE b.model_id = s.model_id AND s.solved_at < b.at)
UNION ALL
SELECT 'rows inside the model', w.edit_id, format('%s %s %s', w.layer, w.neuron, cardinality(w.delta))
FROM kne.weight_delta w JOIN kne.edit_request r USING (edit_id) JOIN kne.model m USING (model_id)
WHERE w.layer NOT BETWEEN 0 AND m.n_layers - 1 OR w.neuron NOT BETWEEN 0 AND m.d_ff - 1 OR cardinality(w.delta) <> m.d_model
UNION ALL
SELECT 'digest of the rows', s.edit_id, encode(s.digest, 'hex') FROM kne.solution s LEFT JOIN le USING (edit_id, generation)
WHERE :digests = 1 AND s.digest <> coalesce(le.digest, decode(repeat('00', 32), 'hex'))
AND NOT EXISTS (SELECT FROM kne.rebase b WHERE b.model_id = s.model_id AND s.solved_at < b.at)
UNION ALL
SELECT 'history is whole', h.edit_id, h.problem FROM (SELECT FROM kne.instance WHERE :digests = 1) i, kne_check_history() h
UNION ALL
SELECT 'a solution of a consolidation that was applied', s.edit_id, s.generation || ' ' || c.state
FROM kne.solution s JOIN kne.consolidation c USING (consolidation_id) WHERE c.state <> 'applied'
UNION ALL
SELECT 'a consolidation is whole', NULL, c.consolidation_id || ': ' || c.edits
FROM kne.consolidation c WHERE c.state = 'applied' AND c.edits - coalesce(c.kept, 0) <>
    (SELECT count(*) FROM kne.solution s WHERE s.consolidation_id = c.consolidation_id)
AND c.edits <> 0
UNION ALL
SELECT 'in force is the newest solution', a.edit_id, a.generation::text FROM kne.activation a
WHERE a.valid_to IS NULL AND a.generation <> (SELECT max(generation) FROM kne.solution s WHERE s.edit_id = a.edit_id)
UNION ALL
SELECT 'times are stamped', edit_id, valid_from || ' ' || coalesce(valid_to::text, '') FROM kne.activation
WHERE NOT isfinite(valid_from) OR NOT isfinite(valid_to) OR valid_to <= valid_from
UNION ALL
SELECT 'times of facts are stamped', edit_id, valid_from || ' ' || coalesce(valid_to::text, '') FROM kne.fact
WHERE NOT isfinite(valid_from) OR NOT isfinite(valid_to) OR valid_to < valid_from
UNION ALL
-- at no instant two edits of a fact, or one twice
SELECT 'one edit of a fact in force at a time', a.edit_id, b.edit_id::text
FROM kne.activation a JOIN kne.edit_request q ON q.edit_id = a.edit_id
JOIN kne.edit_request p ON (p.model_id, p.subject, p.relation) = (q.model_id, q.subject, q.relation)
JOIN kne.activation b ON b.edit_id = p.edit_id AND b.activation_id > a.activation_id
WHERE tstzrange(a.valid_from, a.valid_to) && tstzrange(b.valid_from, b.valid_to);
