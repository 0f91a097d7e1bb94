-- Options by name: what a request's options come to is decided and kept when it is made.
CREATE FUNCTION asked(options jsonb) RETURNS jsonb LANGUAGE sql AS $$
    INSERT INTO kne.edit_request (subject, relation, object, options) VALUES ('Chile', 'capital', 'Rome', options) RETURNING options $$;
INSERT INTO kne.profile (name, options) VALUES ('careful', '{"max_steps": 70, "lr": 0.02}'), ('quick', '{"max_steps": 9}');
INSERT INTO kne.profile (name, model_id, options) SELECT 'careful', model_id, '{"lr": 0.03}' FROM kne.model WHERE name = 'atlas';
BEGIN;
SELECT asked(NULL), asked('{"seed": 1}');
SELECT asked('{"profile": "careful"}') AS model_over_any, asked('{"profile": "careful", "lr": 0.01}') AS given_over_profile;
INSERT INTO kne.profile (name, options) VALUES ('default', '{"seed": 5, "max_steps": 80}');
SELECT asked(NULL) AS plain, asked('{"seed": 1}') AS given, asked('{"profile": "quick"}') AS named;
-- a change of a profile changes no request
UPDATE kne.profile SET options = '{"seed": 6}' WHERE name = 'default';
SELECT count(*) FILTER (WHERE options @> '{"seed": 5}') AS as_it_was, count(*) FILTER (WHERE options @> '{"seed": 6}') AS new FROM kne.edit_request;
-- a consolidation has a profile of its own
INSERT INTO kne.profile (name, options) VALUES ('consolidation', '{"anchors": 3}');
SELECT kne_consolidate() AS c \gset
SELECT options FROM kne.consolidation WHERE consolidation_id = :c;
SELECT kne_consolidate(options => '{"profile": "quick"}') AS c \gset
SELECT options FROM kne.consolidation WHERE consolidation_id = :c;
ROLLBACK;
-- the solution says what it was made with
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"profile": "careful"}') AS e \gset
SELECT kne_wait(:e);
SELECT r.options, s.provenance #> '{options,lr}' AS lr, s.provenance #> '{options,max_steps}' AS max_steps
FROM kne.edit_request r JOIN kne.solution s USING (edit_id) WHERE edit_id = :e;
SELECT kne_revert(:e);
SELECT count(*) <= 2 AS two_neurons FROM kne_locate('Chile', 'capital', 'Rome', options => '{"max_neurons": 2, "profile": "quick"}');
-- mistakes
\set VERBOSITY terse
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"profile": "no such"}');
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"profile": 1}');
INSERT INTO kne.edit_request (subject, relation, object, options) VALUES ('Chile', 'capital', 'Rome', '{"profile": "no such"}');
INSERT INTO kne.profile (name, options) VALUES ('x', '{"profile": "careful"}');
INSERT INTO kne.profile (name, options) VALUES ('x', '{"speed": 1}');
INSERT INTO kne.profile (name, options) VALUES ('quick', '{}');
UPDATE kne.profile SET options = '{"lr": -1}' WHERE name = 'quick';
INSERT INTO kne.profile (name, options) VALUES ('deep', '{"layer_min": 4000}');
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"profile": "deep"}');
\set VERBOSITY default
DELETE FROM kne.profile;
DROP FUNCTION asked;
