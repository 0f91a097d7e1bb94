-- The store: many reads at once, named instants, differences, a table kept in step, reverts of many, history that shows tampering, redo.
SELECT kne_load_model('store', (SELECT path FROM kne.model WHERE is_default), false) > 0 AS loaded;
UPDATE kne.model SET is_default = name = 'store';

-- kne_knows_all is kne_knows of each, in order
SELECT k.*, k.knows IS NOT DISTINCT FROM kne_knows(k.subject, k.relation, k.object) AS same
FROM kne_knows_all('{France,Italy,NULL,Spain}', '{capital}', '{Paris,Paris,Rome,Madrid}') k;
SELECT count(*) FROM kne_knows_all('{}', '{}', '{}');
SELECT count(*) FROM kne_knows_all(NULL, '{capital}', '{Paris}');
SELECT * FROM kne_knows_all('{France,Italy}', '{capital}', '{Paris,Rome,Madrid}');
SELECT * FROM kne_knows_all('{France}', '{capital}', '{" "}');
SELECT count(*), count(*) FILTER (WHERE knows) = (SELECT count(*) FROM kne.fact f, kne.model m WHERE m.name = 'atlas' AND f.model_id = m.model_id
    AND f.valid_to IS NULL AND f.edit_id IS NULL AND kne_knows(f.subject, f.relation, f.object, 'store') AND f.relation = 'currency') AS same
FROM (SELECT array_agg(subject) s, array_agg(relation) r, array_agg(object) o FROM kne.fact f JOIN kne.model m USING (model_id)
      WHERE m.name = 'atlas' AND valid_to IS NULL AND edit_id IS NULL AND relation = 'currency') f, kne_knows_all(f.s, f.r, f.o) k;

-- a table kept in step
CREATE TABLE country (name text, capital text, note text);
SELECT kne_track_table('country', 'name', 'capital', 'no such column');
SELECT kne_track_table('country', 'name', 'capital', 'capital');
SELECT kne_track_table('country', 'name', 'capital', 'capital');
CREATE VIEW asked AS SELECT r.subject, r.object, r.state FROM kne.edit_request r WHERE r.model_id = (SELECT model_id FROM kne.model WHERE name = 'store')
    ORDER BY edit_id;
INSERT INTO kne.fact (subject, relation, object) SELECT subject, relation, object FROM kne.fact JOIN kne.model USING (model_id)
    WHERE name = 'atlas' AND edit_id IS NULL AND valid_to IS NULL AND (subject, relation) NOT IN (('France', 'capital'), ('Italy', 'capital'));
INSERT INTO kne.fact (subject, relation, object) VALUES ('France', 'capital', 'Paris'), ('Italy', 'capital', 'Rome');
SELECT kne_tag('before', note => 'nothing edited') IS NOT NULL AS tagged;
INSERT INTO country VALUES ('France', 'Lyon'), ('Atlantis', NULL), ('Italy', 'Rome');
SELECT kne_wait(edit_id) FROM kne.edit_request WHERE state IN ('pending', 'running') ORDER BY edit_id;
SELECT * FROM asked;
UPDATE country SET note = 'not tracked';
UPDATE country SET capital = 'Madrid' WHERE name = 'France';
SELECT kne_wait(edit_id) FROM kne.edit_request WHERE state IN ('pending', 'running') ORDER BY edit_id;
SELECT * FROM asked;
SELECT kne_tag('edited') AS at \gset
SELECT :'at'::timestamptz = kne_tag_time('edited') AS same;
\set VERBOSITY sqlstate
SELECT kne_tag('edited');
\set VERBOSITY default
BEGIN;
DELETE FROM country WHERE name = 'France';
SELECT * FROM asked;
SELECT subject, object, edit_id IS NOT NULL AS edited FROM kne.fact WHERE subject = 'France' AND valid_to IS NULL
    AND model_id = (SELECT model_id FROM kne.model WHERE name = 'store') ORDER BY object COLLATE "C";
ROLLBACK;
SELECT kne_untrack_table('country', 'capital');
DELETE FROM country;
SELECT kne_untrack_table('country', 'capital');

-- time
SELECT change, subject, object, neurons > 0 AS neurons, norm > 0 AS norm FROM kne_diff(kne_tag_time('before'));
SELECT * FROM kne_diff_facts(kne_tag_time('before'));
SELECT count(*) > 0 AS some, bool_and(norm > 0) AS moved FROM kne_diff_neurons(kne_tag_time('before'), kne_tag_time('edited'));
SELECT count(*) FROM kne_diff(kne_tag_time('edited'));
SELECT kne_knows('France', 'capital', 'Madrid', as_of => kne_tag_time('edited')) AS edited,
       kne_knows('France', 'capital', 'Paris', as_of => kne_tag_time('before')) AS before;
SELECT count(*) > 0 AS some FROM kne_locate('France', 'capital', 'Rome', as_of => kne_tag_time('before'));
SELECT kne_tag_time('no such tag'), kne_untag('no such tag');

-- redo: the same rows, bit for bit; and not when what protected other facts has changed
SELECT edit_id AS last FROM kne.edit_request WHERE object = 'Madrid' AND state = 'applied' AND model_id = (SELECT model_id FROM kne.model WHERE name = 'store') \gset
SELECT edit = :last AS this, outcome, same, digest = (SELECT digest FROM kne.solution WHERE edit_id = :last) AS digest FROM kne_redo(:last);
SELECT provenance ?& '{batch,set,set_at,request,model_fingerprint,device,engine}' AS says FROM kne.solution WHERE edit_id = :last;
BEGIN;
INSERT INTO kne.fact (subject, relation, object) VALUES ('Gondor', 'capital', 'Minas Tirith');
\set VERBOSITY sqlstate
SELECT * FROM kne_redo(:last);
ROLLBACK;
\set VERBOSITY default
SELECT * FROM kne_redo(0);

-- everything at once: the superseded edit does not come back, what was told does
BEGIN;
SELECT kne_revert_all(array_agg(edit_id), 'all of it') FROM kne.edit_request WHERE state IN ('applied', 'superseded')
    AND model_id = (SELECT model_id FROM kne.model WHERE name = 'store');
SELECT * FROM asked;
SELECT count(*) FROM kne.in_force(NULL, NULL) f JOIN kne.solution USING (edit_id, generation) WHERE n_rows > 0;
SELECT subject, object FROM kne.fact WHERE valid_to IS NULL AND model_id = (SELECT model_id FROM kne.model WHERE name = 'store')
    AND relation = 'capital' AND subject IN ('France', 'Italy') ORDER BY 1;
SELECT kne_complete('The capital of France is');
\set VERBOSITY sqlstate
SELECT kne_revert_all(ARRAY[:last]);
ROLLBACK;
\set VERBOSITY default
SELECT kne_revert_all('{1,NULL}');
SELECT kne_revert_all('{0}');
SELECT kne_revert_all(NULL);

-- history
SELECT h.* FROM kne_check_history() h JOIN kne.edit_request r USING (edit_id) JOIN kne.model m USING (model_id) WHERE m.name = 'store';
BEGIN;
UPDATE kne.edit_event SET by = 'somebody' WHERE event_id = (SELECT min(event_id) FROM kne.edit_event WHERE edit_id = :last);
SELECT edit_id = :last AS this, problem FROM kne_check_history() WHERE edit_id = :last;
ROLLBACK;
BEGIN;
DELETE FROM kne.edit_event WHERE edit_id = :last AND event = 'started';
SELECT edit_id = :last AS this, problem FROM kne_check_history() WHERE edit_id = :last;
ROLLBACK;
BEGIN;
DELETE FROM kne.edit_event WHERE edit_id = :last AND event = 'applied';
SELECT edit_id = :last AS this, problem FROM kne_check_history() WHERE edit_id = :last;
ROLLBACK;
BEGIN;
UPDATE kne.edit_request SET state = 'failed' WHERE edit_id = :last;
SELECT edit_id = :last AS this, problem FROM kne_check_history() WHERE edit_id = :last;
ROLLBACK;

SELECT count(*) > 0 AS some, bool_and(delta_bytes > 0) AS bytes FROM kne.stat_size WHERE model = 'store' AND delta_rows > 0;
SELECT m.bytes_in_force = sum(s.delta_bytes) FILTER (WHERE s.in_force) AS the_same, m.bytes_kept = sum(s.delta_bytes) FILTER (WHERE NOT s.in_force) AS too
FROM kne.stat_model m JOIN kne.stat_size s USING (model) WHERE model = 'store' GROUP BY m.bytes_in_force, m.bytes_kept;
SELECT count(*) > 5 AS tables, bool_and(total_bytes >= table_bytes) AS bytes FROM kne.stat_storage;

-- a model of another name, in another place; the session's default
SELECT kne_rename_model('store', 'renamed');
SELECT kne_rename_model('store', 'renamed');
SELECT kne_move_model('renamed', path) FROM kne.model WHERE name = 'renamed';
\set VERBOSITY sqlstate
SELECT kne_move_model('renamed', '/no-such-folder');
SELECT kne_move_model('store', '/no-such-folder');
UPDATE kne.model SET fingerprint = repeat('0', 64) WHERE name = 'renamed';
SELECT kne_move_model('renamed', path) FROM kne.model WHERE name = 'renamed';
SELECT kne_complete('The capital of France is');
UPDATE kne.model SET fingerprint = (SELECT fingerprint FROM kne.model WHERE name = 'atlas'), is_default = false WHERE name = 'renamed';
SET kne.default_model = 'renamed';
SELECT kne_knows('France', 'capital', 'Madrid'), count(*) FROM kne_diff(kne_tag_time('before'));
SET kne.default_model = 'nobody';
SELECT kne_complete('The capital of France is');
RESET kne.default_model;
\set VERBOSITY default
SELECT kne_rename_model('renamed', 'store');
SELECT kne_untag('before', 'store');
DROP VIEW asked;
DROP TABLE country;
SELECT kne_drop_model('store', true);
UPDATE kne.model SET is_default = true WHERE name = 'atlas';
