-- An edit and what follows from it: derived from rows, shown, applied together or not at all.
INSERT INTO kne.alias VALUES ('Chile', 'Republic of Chile'), ('City of Rome', 'Rome');
SELECT * FROM kne_consequences('Chile', 'capital', 'Rome');
SELECT * FROM kne_consequences('Republic of Chile', 'continent', 'Asia');
SELECT * FROM kne_consequences('nobody', 'knows', 'nothing');

SELECT kne_edit_unit('Chile', 'capital', 'Rome', options => '{"max_steps": 90}') AS u \gset
SELECT kne_wait(edit_id) FROM kne.edit_request WHERE unit = :u ORDER BY edit_id;
SELECT edit_id = unit AS first, subject, relation, object, state, kne_knows(subject, relation, object) AS holds FROM kne.edit_request WHERE unit = :u ORDER BY edit_id;
-- one batch, one transaction, one instant
SELECT count(DISTINCT a.valid_from) AS instants, count(DISTINCT r.xmin::text) AS transactions FROM kne.activation a JOIN kne.edit_request r USING (edit_id) WHERE unit = :u;
-- alone, or all of it
SELECT kne_revert(:u);
SELECT count(*) FILTER (WHERE state = 'applied') AS applied FROM kne.edit_request WHERE unit = :u;
SELECT kne_revert_unit(:u, 'over');
SELECT DISTINCT state FROM kne.edit_request WHERE unit = :u;
SELECT count(*) FROM kne.edit_event JOIN kne.edit_request USING (edit_id) WHERE unit = :u AND event = 'reverted';

-- what one cannot have none has: the alias is too much for the model's context
INSERT INTO kne.alias VALUES ('Peru', repeat('Peru ', 190));
SELECT kne_edit_unit('Peru', 'capital', 'Rome') AS u \gset
SELECT kne_wait(edit_id) FROM kne.edit_request WHERE unit = :u ORDER BY edit_id;
SELECT count(*) AS failed, count(*) FILTER (WHERE error ~ 'edit \d+ of its unit failed: ') AS because_of_another FROM kne.edit_request WHERE unit = :u AND state = 'failed';
SELECT count(*) AS kept FROM kne.solution JOIN kne.edit_request USING (edit_id) WHERE unit = :u;
SELECT kne_knows('Peru', 'capital', 'Rome');
-- retry of one is of all, and they fail as before
SELECT kne_retry(edit_id) FROM kne.edit_request WHERE unit = :u ORDER BY edit_id LIMIT 1;
SELECT DISTINCT kne_wait(edit_id) FROM kne.edit_request WHERE unit = :u;
SELECT count(*) FROM kne.edit_event JOIN kne.edit_request USING (edit_id) WHERE unit = :u AND event = 'requested';

-- cancel of one is of all; a unit waits for what is older of any of its facts
ALTER SYSTEM SET kne.enabled = off;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
SET client_min_messages = error;
SELECT kne_edit_unit('Chile', 'capital', 'Rome') AS u \gset
SELECT kne_cancel(max(edit_id)) FROM kne.edit_request WHERE unit = :u;
SELECT DISTINCT state FROM kne.edit_request WHERE unit = :u;
SELECT kne_edit('Rome', 'capital of', 'Spain') AS older \gset
SELECT kne_edit_unit('Chile', 'capital', 'Rome') AS u \gset
RESET client_min_messages;
ALTER SYSTEM RESET kne.enabled;
SELECT pg_reload_conf();
SELECT pg_sleep(1);
SELECT DISTINCT kne_wait(edit_id) FROM kne.edit_request WHERE unit = :u;
SELECT kne_wait(:older);
SELECT bool_and(u.started_at > o.finished_at) AS after FROM kne.edit_request u, kne.edit_request o WHERE u.unit = :u AND o.edit_id = :older;
SELECT kne_revert_unit(:u);
SELECT kne_revert(:older);
\set VERBOSITY terse
SELECT kne_revert_unit(-1);
SELECT kne_edit_unit('Chile', 'capital', '');
SELECT kne_edit_unit(NULL, 'capital', 'Rome');
-- two of one fact would wait for each other
INSERT INTO kne.relation (relation, prompt, inverse) VALUES ('neighbour', '{} borders', 'neighbour');
SELECT kne_edit_unit('Peru', 'neighbour', 'Peru');
INSERT INTO kne.alias VALUES ('Bolivia', 'Plurinational State of Bolivia');
SELECT kne_edit_unit('Bolivia', 'neighbour', 'Plurinational State of Bolivia');
DELETE FROM kne.relation WHERE relation = 'neighbour';
INSERT INTO kne.alias VALUES ('x', 'x');
\set VERBOSITY default
DELETE FROM kne.alias;
