-- Bad input: a clear error, and nothing half done.
SELECT count(*) AS before FROM kne.edit_request \gset
SELECT kne_edit(NULL, 'capital', 'Rome');
SELECT kne_edit('France', NULL, 'Rome');
SELECT kne_edit('France', 'capital', NULL);
SELECT kne_edit('', 'capital', 'Rome');
SELECT kne_edit('France', '', 'Rome');
SELECT kne_edit('France', 'capital', E' \t\n');
SELECT kne_edit('France', 'capital', 'Rome', 'no such model');
SELECT kne_edit(repeat('F', 1001), 'capital', 'Rome');
-- the same for the batch form
INSERT INTO kne.edit_request (subject, relation, object) VALUES ('France', 'capital', 'Rome'), ('Spain', NULL, 'Rome');
INSERT INTO kne.edit_request (subject, relation, object) VALUES ('France', 'capital', '');
INSERT INTO kne.edit_request (subject, relation, object, model_id) VALUES ('France', 'capital', 'Rome', -1);
INSERT INTO kne.edit_request (subject, relation, object, state) VALUES ('France', 'capital', 'Rome', 'applied');
INSERT INTO kne.edit_request (subject, relation, object, options) VALUES ('France', 'capital', 'Rome', '{"steps": 3}');
INSERT INTO kne.fact (subject, relation, object) VALUES ('France', 'capital', ' ');
INSERT INTO kne.fact (subject, relation, object, model_id) VALUES ('France', 'capital', 'Rome', -1);
SELECT count(*) - :before AS left_behind FROM kne.edit_request;

-- ids that do not exist, or are NULL
SELECT kne_wait(-1);
SELECT kne_revert(-1);
SELECT kne_cancel(-1);
SELECT kne_retry(-1);
SELECT kne_wait(NULL);
SELECT kne_wait(1, NULL);
SELECT kne_wait(1, '-1 second');
SELECT kne_cancel(NULL);
SELECT kne_retry(NULL);

-- waiting for what cannot come
BEGIN;
INSERT INTO kne.edit_request (edit_id, subject, relation, object) OVERRIDING SYSTEM VALUE VALUES (1000000, 'France', 'capital', 'Rome');
SELECT kne_wait(1000000);
ROLLBACK;
BEGIN;
INSERT INTO kne.edit_request (edit_id, subject, relation, object) OVERRIDING SYSTEM VALUE VALUES (1000000, 'France', 'capital', 'Rome');
SAVEPOINT s;
SELECT kne_cancel(1000000);
SELECT kne_wait(1000000); -- cancelled here: final
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT kne_wait(1);
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT kne_wait(1);
ROLLBACK;

-- instants that have not been
SELECT kne_complete('x', as_of => 'infinity');
SELECT kne_complete('x', as_of => '-infinity');
\set VERBOSITY terse
SELECT kne_complete('x', as_of => now() + interval '1 hour');
SELECT kne_knows('France', 'capital', 'Paris', as_of => now() + interval '1 hour');
SELECT * FROM kne_next_tokens('x', as_of => 'infinity');
SELECT kne_logprob('x', 'y', as_of => 'infinity');
\set VERBOSITY default

-- wrong states
SELECT min(edit_id) AS reverted FROM kne.edit_request WHERE state = 'reverted' \gset
SELECT kne_cancel(:reverted);
\set VERBOSITY sqlstate
SELECT kne_retry(:reverted);
SELECT kne_revert(:reverted);
\set VERBOSITY default

-- trigger functions are nothing else
SELECT kne.stamp();
CREATE TEMP TABLE t (a int);
CREATE TRIGGER t AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION kne.request_before();
INSERT INTO t VALUES (1);
CREATE TRIGGER u AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION kne.request_after();
DROP TRIGGER t ON t;
INSERT INTO t VALUES (1);
DROP TABLE t;

-- a model with edits stays
\set VERBOSITY terse
SELECT kne_drop_model('atlas');
\set VERBOSITY default
SELECT count(*) FROM kne.model;
