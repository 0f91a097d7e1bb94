-- Options are checked when the edit is asked for, by the table that the engine reads them with.
\set VERBOSITY terse
SELECT kne_edit('Peru', 'capital', 'Rome', options => '[1]');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '"max_steps"');
SELECT kne_edit('Peru', 'capital', 'Rome', options => 'null');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_step": 5}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": "5"}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": 5.5}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": 0}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": null}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": [5]}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_steps": {"a": 5}}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"lr": 1e400}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"lr": -1}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"signed": 1}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"path": "sideways"}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"path": true}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"matrices": "left"}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"layer_min": 2, "layer_max": 1}');
\set VERBOSITY default
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"select": "best"}');
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"fraction": 2}');
-- a long name is shown cut between characters
\set VERBOSITY terse
SELECT kne_edit('Peru', 'capital', 'Rome', options => jsonb_build_object('a' || repeat(U&'\00e9', 50), 1));
SELECT kne_edit('Peru', 'capital', 'Rome', options => jsonb_build_object('path', 'a' || repeat(U&'\00e9', 50)));
\set VERBOSITY default
SELECT count(*) FROM kne.edit_request WHERE subject = 'Peru';

-- accepted, kept with the request, and obeyed
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_neurons": 300, "fraction": 0.5, "layer_min": 1, "probability": 0.6, "max_steps": 300, "seed": 7}') AS id \gset
SELECT kne_wait(:id);
SELECT options FROM kne.edit_request WHERE edit_id = :id;
SELECT count(*) = 300 AS capped, min(layer) >= 1 AS layers FROM kne.ensemble WHERE edit_id = :id;
SELECT kne_revert(:id);
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"matrices": "all", "step": "adam", "lr": 0.01}') AS id \gset
SELECT kne_wait(:id);
SELECT count(DISTINCT matrix) > 1 AS keys_too FROM kne.weight_delta WHERE edit_id = :id;
SELECT kne_revert(:id);
-- no such layer in this model
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"layer_min": 4000}');
INSERT INTO kne.edit_request (subject, relation, object, options) VALUES ('Peru', 'capital', 'Rome', '{"layer_max": 6}');
-- a prompt over the model's context
SELECT kne_edit('Peru', repeat('capital ', 120), repeat('Rome ', 3000)) AS id \gset
SELECT kne_wait(:id);
SELECT error <> '' AS says_why FROM kne.edit_request WHERE edit_id = :id;
