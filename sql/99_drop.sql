-- A model goes with its edits only when told so; then nothing of it is left.
SELECT count(*) > 0 AS edits FROM kne.edit_request;
SELECT count(kne_revert(edit_id)) >= 0 AS reverted FROM kne.edit_request WHERE state = 'applied';
\set VERBOSITY terse
SELECT kne_drop_model('no such model');
\set VERBOSITY sqlstate
SELECT kne_drop_model('atlas');
\set VERBOSITY default
BEGIN;
SELECT kne_drop_model('atlas', force => true);
SELECT (SELECT count(*) FROM kne.edit_request) + (SELECT count(*) FROM kne.edit_event) + (SELECT count(*) FROM kne.solution)
     + (SELECT count(*) FROM kne.ensemble) + (SELECT count(*) FROM kne.weight_delta) + (SELECT count(*) FROM kne.activation)
     + (SELECT count(*) FROM kne.fact) + (SELECT count(*) FROM kne.model) AS left_over;
ROLLBACK;
SELECT kne_complete('The capital of France is', 4) LIKE ' Paris%' AS still_there;
SELECT kne_drop_model('atlas', force => true);
SELECT kne_complete('The capital of France is');
DROP EXTENSION kne CASCADE;
SELECT count(*) FROM pg_namespace WHERE nspname = 'kne';
-- it can come back, elsewhere
CREATE SCHEMA elsewhere;
CREATE EXTENSION kne SCHEMA elsewhere;
SELECT elsewhere.kne_complete('x');
DROP EXTENSION kne;
DROP SCHEMA elsewhere;
