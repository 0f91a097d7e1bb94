-- Consolidation: all active edits of a model solved together anew, from the base; the edits stay applied.
INSERT INTO kne.edit_request (subject, relation, object)
SELECT s, 'capital', o FROM (VALUES ('Spain', 'Berlin'), ('Germany', 'Paris'), ('Japan', 'Rome'), ('Egypt', 'Madrid')) v (s, o);
SELECT kne_edit('Spain', 'capital', 'Rome') AS newer, kne_edit('Italy', 'capital', 'Rome') AS holds \gset
SELECT r.subject, r.object, kne_wait(edit_id) IN ('applied', 'superseded') AS done FROM kne.edit_request r
WHERE state IN ('pending', 'running', 'applied', 'superseded') AND relation = 'capital' ORDER BY edit_id;
CREATE TABLE wanted_all AS SELECT edit_id, subject, object FROM kne.edit_request WHERE state = 'applied';
CREATE TABLE before AS SELECT clock_timestamp() AS at, subject, kne_logprob('The capital of ' || subject || ' is', 'Rome') AS logp FROM wanted_all;
SELECT pg_sleep(0.01);

-- a transaction sees its request, the worker does not before it commits
BEGIN;
SELECT kne_consolidate() AS c \gset
SELECT state, automatic, requested_by = current_user AS by, edits FROM kne.consolidation WHERE consolidation_id = :c;
\set VERBOSITY terse
SELECT kne_wait_consolidation(currval(pg_get_serial_sequence('kne.consolidation', 'consolidation_id'))) IS NULL;
\set VERBOSITY default
ROLLBACK;
SELECT count(*) FROM kne.consolidation;

SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
SELECT state, edits = (SELECT count(*) FROM wanted_all) AS all_edits, seconds > 0 AS seconds, error,
       requested_at <= started_at AND started_at <= finished_at AS times FROM kne.consolidation WHERE consolidation_id = :c;
SELECT DISTINCT state FROM kne.edit_request JOIN wanted_all USING (edit_id);
SELECT subject, kne_knows(subject, 'capital', object) AS holds FROM wanted_all ORDER BY subject;
SELECT DISTINCT a.generation, a.valid_to IS NULL AS in_force, s.consolidation_id IS NOT DISTINCT FROM CASE WHEN a.generation > 0 THEN :c END AS made_by
FROM kne.activation a JOIN wanted_all USING (edit_id) JOIN kne.solution s USING (edit_id, generation) ORDER BY 1;
-- one instant for all of them
SELECT count(DISTINCT valid_from) FROM kne.activation JOIN wanted_all USING (edit_id) WHERE generation = 1;
SELECT count(*) = (SELECT count(*) FROM wanted_all) AS events, bool_and(detail @> '{"generation": 1}') AS generation
FROM kne.edit_event JOIN wanted_all USING (edit_id) WHERE event = 'consolidated' AND detail ->> 'consolidation' = :'c';
SELECT bool_and(s.n_neurons = (SELECT count(*) FROM kne.ensemble e WHERE e.edit_id = s.edit_id AND e.generation = 1)
       AND s.n_rows = (SELECT count(*) FROM kne.weight_delta w WHERE w.edit_id = s.edit_id AND w.generation = 1)) AS rows
FROM kne.solution s JOIN wanted_all USING (edit_id) WHERE generation = 1;
-- as_of before it is the model of the old generations
SELECT bool_and(logp = kne_logprob('The capital of ' || subject || ' is', 'Rome', as_of => at)) AS as_it_was FROM before;

-- one that cannot be reached changes nothing
SELECT kne_consolidate(options => '{"max_steps": 1, "lr": 1e-9}') AS hopeless \gset
SELECT kne_wait_consolidation(:hopeless);
SELECT regexp_replace(error, '\d+', 'N') LIKE 'edit N is not reached together with the others: %' AS why FROM kne.consolidation WHERE consolidation_id = :hopeless;
SELECT max(generation) FROM kne.activation JOIN wanted_all USING (edit_id);

-- revert of a consolidated edit is exact, what it had superseded comes back in its newest generation
SELECT kne_revert(:newer);
SELECT a.generation, kne_knows('Spain', 'capital', 'Berlin') AS first FROM kne.activation a JOIN kne.edit_request r USING (edit_id)
WHERE r.subject = 'Spain' AND r.object = 'Berlin' AND a.valid_to IS NULL;
SELECT count(*) - 1 AS others, bool_and(kne_knows(subject, 'capital', object)) AS hold FROM wanted_all WHERE edit_id <> :newer;
SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
SELECT r.subject, a.generation FROM kne.activation a JOIN kne.edit_request r USING (edit_id) WHERE a.valid_to IS NULL ORDER BY 1;
DO $$ BEGIN
    WHILE EXISTS (SELECT FROM kne.edit_request WHERE state = 'applied') LOOP -- each may bring one back
        PERFORM kne_revert(edit_id) FROM kne.edit_request WHERE state = 'applied';
    END LOOP;
END $$;
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'before';

-- Two edits that contradict each other, for their prompts are one: whoever is not reached keeps its solution, the others are consolidated.
INSERT INTO kne.relation (relation, prompt) VALUES ('seat', 'The capital of {} is');
SELECT kne_edit('Germany', 'capital', 'Madrid') AS mild, kne_edit('Spain', 'capital', 'Rome') AS one \gset
SELECT kne_wait(:mild), kne_wait(:one);
SELECT kne_edit('Spain', 'seat', 'Berlin') AS other \gset
SELECT kne_wait(:other);
SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
SELECT edits, kept BETWEEN 1 AND 2 AS kept, error FROM kne.consolidation WHERE consolidation_id = :c;
SELECT count(*) = (SELECT kept FROM kne.consolidation WHERE consolidation_id = :c) AS events, bool_and(edit_id IN (:one, :other) AND generation = 0 AND valid_to IS NULL
       AND detail ->> 'error' LIKE '%not reached%') AS in_force
FROM kne.edit_event JOIN kne.activation USING (edit_id) WHERE event = 'kept' AND detail ->> 'consolidation' = :'c';
SELECT generation, kne_knows('Germany', 'capital', 'Madrid') AS holds FROM kne.activation WHERE edit_id = :mild AND valid_to IS NULL;
SELECT bool_and(state = 'applied') AS applied FROM kne.edit_request WHERE edit_id IN (:mild, :one, :other);
-- a kept one that the model does not answer is said to be disturbed
SELECT wait_until($$(SELECT bool_and(kne_knows(subject, relation, object) <> EXISTS (SELECT FROM kne.edit_event d WHERE d.edit_id = r.edit_id
    AND d.event = 'disturbed' AND d.detail -> 'consolidation' = e.detail -> 'consolidation'))
    FROM kne.edit_request r JOIN kne.edit_event e USING (edit_id) WHERE e.event = 'kept')$$) AS said;
-- one that disturbs others before some keep their solution, and after: what is said is of after
SELECT kne_consolidate(options => '{"step": "adam", "select": "all", "lr": 0.03, "contrast": 0, "anchors": 100, "beta": 1e-6, "protect": 0, "max_steps": 60}') AS rough \gset
SELECT kne_wait_consolidation(:rough);
SELECT kept > 0 AS kept FROM kne.consolidation WHERE consolidation_id = :rough;
SELECT wait_until($$EXISTS (SELECT FROM kne.edit_event WHERE event = 'disturbed' AND (detail ->> 'consolidation')::int = (SELECT max(consolidation_id) FROM kne.consolidation))$$) AS disturbed;
SELECT bool_and(detail ? 'prompt' AND detail ? 'object') AS told, count(*) = count(DISTINCT detail) AS once FROM kne.edit_event
WHERE event = 'disturbed' AND detail ->> 'consolidation' = :'rough';
SELECT bool_and(same) AS done_again FROM kne_redo(:mild, 1);
SELECT count(*) FROM kne_check_history();
DELETE FROM kne.relation WHERE relation = 'seat';
SELECT count(kne_revert(edit_id)) FROM kne.edit_request WHERE state = 'applied';
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'before';

-- nothing to do is done at once
SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
SELECT edits FROM kne.consolidation WHERE consolidation_id = :c;

-- it includes the edits that were asked for before it
BEGIN;
SELECT kne_edit('Spain', 'capital', 'Rome') AS a, kne_edit('Germany', 'capital', 'Rome') AS b, kne_consolidate() AS c \gset
COMMIT;
SELECT kne_wait_consolidation(:c);
SELECT edits FROM kne.consolidation WHERE consolidation_id = :c;
SELECT count(kne_revert(edit_id)) FROM kne.edit_request WHERE state = 'applied';

-- mistakes
\set VERBOSITY terse
SELECT kne_consolidate('no such model');
SELECT kne_consolidate(options => '{"speed": 1}');
SELECT kne_wait_consolidation(-1);
SELECT kne_wait_consolidation(NULL);
SELECT kne_cancel_consolidation(-1);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT kne_wait_consolidation(:c);
ROLLBACK;
SELECT kne_cancel_consolidation(:c) AS too_late;
-- one that waits can be cancelled, and is not another database's
ALTER SYSTEM SET kne.enabled = off;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
UPDATE kne.consolidation SET origin = gen_random_uuid() WHERE consolidation_id = :c;
SELECT kne_wait_consolidation(:c); -- terse: the id differs
SELECT kne_adopt();
SELECT kne_cancel_consolidation(:c), kne_cancel_consolidation(:c);
SELECT kne_wait_consolidation(:c);
\set VERBOSITY default
ALTER SYSTEM RESET kne.enabled;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
DROP TABLE wanted_all, before;

-- Facts that hold already, in a batch that undoes them: they are solved with it. The same when consolidated.
INSERT INTO kne.edit_request (subject, relation, object, options)
SELECT f.subject, 'capital', CASE WHEN n <= 6 THEN f.object ELSE 'Lima' END, '{"step": "adam", "contrast": 0, "anchors": 0, "protect": 0, "reference": 1, "select": "all", "lr": 0.003}'
FROM (SELECT subject, object, row_number() OVER (ORDER BY subject) AS n FROM kne.fact
      WHERE relation = 'capital' AND valid_to IS NULL AND kne_knows(subject, relation, object) AND object <> 'Lima') f WHERE n <= 18;
SET client_min_messages = error; -- nothing protects here
SELECT kne_wait(edit_id), count(*) FROM kne.edit_request WHERE options @> '{"lr": 0.003}' GROUP BY 1;
RESET client_min_messages;
SELECT count(*) FILTER (WHERE r.object <> 'Lima') AS held, count(*) FILTER (WHERE r.object <> 'Lima' AND s.n_rows > 0) > 0 AS solved_nevertheless,
       bool_and(kne_knows(r.subject, r.relation, r.object)) AS all_hold
FROM kne.edit_request r JOIN kne.solution s USING (edit_id) WHERE r.options @> '{"lr": 0.003}';
SELECT kne_consolidate() AS c \gset
SELECT kne_wait_consolidation(:c);
SELECT bool_and(kne_knows(subject, relation, object)) AS all_hold FROM kne.edit_request WHERE state = 'applied';
SELECT count(kne_revert(edit_id)) FROM kne.edit_request WHERE state = 'applied';
