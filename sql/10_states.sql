-- Cancel, retry, adopt, and waiting when nothing runs. The queue is stopped for that.
ALTER SYSTEM SET kne.enabled = off;
SELECT pg_reload_conf();
SELECT wait_until($$NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'kne worker')$$) AS workers_left;
\c -
SHOW kne.enabled;
SELECT kne_edit('Canada', 'capital', 'Rome') AS a \gset
INSERT INTO kne.edit_request (subject, relation, object) VALUES ('Canada', 'capital', 'Paris'), ('Canada', 'currency', 'euro');
\set VERBOSITY terse
SELECT kne_wait(:a);
\set VERBOSITY default
SELECT object, state, attempts FROM kne.edit_request WHERE subject = 'Canada' ORDER BY edit_id;
-- what a monitor sees of that
SELECT what, ok, n, CASE what WHEN 'processes' THEN detail END AS detail FROM kne.stat_health ORDER BY what COLLATE "C";

-- what this transaction has locked the worker passes by
BEGIN;
SELECT state FROM kne.edit_request WHERE edit_id = :a FOR UPDATE;
SELECT kne_wait(:a);
ROLLBACK;

-- cancel: once
SELECT kne_cancel(:a), kne_cancel(:a);
SELECT kne_wait(:a);
BEGIN;
SELECT kne_cancel(edit_id) FROM kne.edit_request WHERE subject = 'Canada' AND object = 'euro';
ROLLBACK;
SELECT object, state, finished_at IS NOT NULL AS finished FROM kne.edit_request WHERE subject = 'Canada' ORDER BY edit_id;
SELECT event FROM kne.edit_event WHERE edit_id = :a ORDER BY event_id;

-- retry keeps the id
SELECT kne_retry(:a);
SELECT state, attempts, error, finished_at FROM kne.edit_request WHERE edit_id = :a;
\set VERBOSITY terse
SELECT kne_retry(:a);
\set VERBOSITY default
SELECT event FROM kne.edit_event WHERE edit_id = :a ORDER BY event_id;

-- a request of another origin waits until it is adopted
UPDATE kne.edit_request SET origin = gen_random_uuid() WHERE edit_id = :a;
\set VERBOSITY terse
SELECT kne_wait(:a);
\set VERBOSITY default
SELECT kne_adopt(), kne_adopt();
SELECT event FROM kne.edit_event WHERE edit_id = :a ORDER BY event_id;
-- rows that come with an origin are history: no event, and they are taken as they are
INSERT INTO kne.edit_request (edit_id, model_id, subject, relation, object, options, state, requested_by, origin, origin_database)
OVERRIDING SYSTEM VALUE
SELECT 2000000, model_id, 'Canada', 'capital', 'Lima', '{"an option of the past": 1}', 'failed', 'nobody', gen_random_uuid(), 1
FROM kne.model WHERE is_default;
SELECT requested_by, state, (SELECT count(*) FROM kne.edit_event WHERE edit_id = 2000000) AS events FROM kne.edit_request WHERE edit_id = 2000000;
DELETE FROM kne.edit_request WHERE edit_id = 2000000;

-- on again: what waited runs, the newer of the two Canadas wins
ALTER SYSTEM RESET kne.enabled;
SELECT pg_reload_conf();
\c -
SHOW kne.enabled;
SELECT relation, object, kne_wait(edit_id) IN ('applied', 'superseded') AS done FROM kne.edit_request WHERE subject = 'Canada' ORDER BY edit_id;
SELECT relation, object, state FROM kne.edit_request WHERE subject = 'Canada' ORDER BY edit_id;
SELECT wait_until('bool_and(ok) FROM kne.stat_health') AS well;
SELECT kne_knows('Canada', 'capital', 'Paris'), kne_knows('Canada', 'currency', 'euro');

-- retry where a newer edit holds
SELECT kne_edit('Canada', 'capital', 'Rome', options => '{"max_steps": 1, "lr": 1e-9}') AS hopeless \gset
SELECT kne_wait(:hopeless);
SELECT kne_edit('Canada', 'capital', 'Berlin') AS newer \gset
SELECT kne_wait(:newer);
\set VERBOSITY sqlstate
SELECT kne_retry(:hopeless);
\set VERBOSITY default
SELECT count(kne_revert(edit_id)) > 0 AS reverted FROM kne.edit_request WHERE subject = 'Canada' AND state = 'applied';

-- a timeout says how far it was
ALTER SYSTEM SET kne.batch_size = 1;
SELECT pg_reload_conf();
INSERT INTO kne.edit_request (subject, relation, object, options)
SELECT s, 'capital', 'Rome', '{"max_steps": 10000, "lr": 1e-9}' FROM unnest('{Nigeria,Argentina,India}'::text[]) s;
SELECT max(edit_id) AS last FROM kne.edit_request \gset
\set VERBOSITY sqlstate
SELECT kne_wait(:last, '1 millisecond');
\set VERBOSITY default
SELECT count(kne_cancel(edit_id)) FROM kne.edit_request WHERE subject IN ('Nigeria', 'Argentina', 'India');
SELECT count(*) FROM kne.edit_request WHERE state IN ('pending', 'running');
ALTER SYSTEM RESET kne.batch_size;
SELECT pg_reload_conf();
