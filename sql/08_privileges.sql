-- Nothing is anybody's by default; EXECUTE on a function is all that it takes.
\getenv model KNE_TEST_MODEL
CREATE ROLE regress_kne_user;
CREATE ROLE regress_kne_other;
SELECT proname FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'kne' WHERE has_function_privilege('regress_kne_user', p.oid, 'EXECUTE');
SELECT relname FROM pg_class WHERE relnamespace = 'kne'::regnamespace AND relkind IN ('r', 'v')
AND has_any_column_privilege('regress_kne_user', oid, 'SELECT, INSERT, UPDATE');
SET ROLE regress_kne_user;
SELECT kne_edit('Chile', 'capital', 'Rome');
SELECT kne_complete('The capital of Chile is');
SELECT count(*) FROM kne.edit_request;
RESET ROLE;

-- every function is pinned to its search_path, every object says what it is for
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'kne'
WHERE proconfig IS DISTINCT FROM '{"search_path=pg_catalog, pg_temp"}' OR obj_description(p.oid, 'pg_proc') IS NULL;
SELECT oid::regclass FROM pg_class WHERE relnamespace = 'kne'::regnamespace AND relkind IN ('r', 'v') AND obj_description(oid, 'pg_class') IS NULL;

-- a role that may edit and read
GRANT EXECUTE ON FUNCTION kne_edit, kne_wait, kne_knows, kne_complete, kne_load_model, kne_locate TO regress_kne_user;
SET ROLE regress_kne_user;
SELECT kne_edit('Chile', 'capital', 'Rome') AS id \gset
SELECT kne_wait(:id);
SELECT kne_knows('Chile', 'capital', 'Rome');
SELECT count(*) > 0 AS located FROM kne_locate('Chile', 'capital', 'Paris');
SELECT kne_revert(:id);
-- a model folder: below kne.model_dir only
\set VERBOSITY terse
SELECT kne_load_model('outside', '/');
SELECT kne_load_model('outside', '/no/such/folder');
\set VERBOSITY default
RESET ROLE;
SELECT requested_by FROM kne.edit_request WHERE edit_id = :id;
SELECT by, detail ->> 'current_user' AS role, detail ->> 'session_user' = session_user AS session FROM kne.edit_event
WHERE edit_id = :id AND event = 'requested';
SELECT kne_revert(:id);

-- the batch form: these columns, and the trigger does the rest with the owner's rights
GRANT USAGE ON SCHEMA kne TO regress_kne_other;
GRANT INSERT (model_id, subject, relation, object, options) ON kne.edit_request TO regress_kne_other;
GRANT INSERT (model_id, subject, relation, object) ON kne.fact TO regress_kne_other;
SET ROLE regress_kne_other;
INSERT INTO kne.edit_request (subject, relation, object, state) VALUES ('Chile', 'capital', 'Rome', 'applied');
INSERT INTO kne.edit_request (subject, relation, object, requested_by) VALUES ('Chile', 'capital', 'Rome', 'postgres');
INSERT INTO kne.edit_request (edit_id, subject, relation, object) VALUES (1, 'Chile', 'capital', 'Rome');
INSERT INTO kne.fact (subject, relation, object, valid_from) VALUES ('Chile', 'capital', 'Santiago', '2000-01-01');
INSERT INTO kne.edit_request (subject, relation, object) VALUES ('Chile', 'capital', 'Paris');
INSERT INTO kne.fact (subject, relation, object) VALUES ('Atlantis', 'capital', 'Nowhere');
SELECT 1 FROM kne.edit_request;
UPDATE kne.edit_request SET state = 'applied';
DELETE FROM kne.edit_event;
RESET ROLE;
SELECT max(edit_id) AS id FROM kne.edit_request \gset
SELECT kne_wait(:id);
SELECT requested_by FROM kne.edit_request WHERE edit_id = :id;
SELECT event, by FROM kne.edit_event WHERE edit_id = :id AND event = 'requested';
SELECT kne_revert(:id);
DELETE FROM kne.fact WHERE subject = 'Atlantis';

-- who asks is the caller, not the session: in a function that runs with its owner's rights that is the owner
CREATE FUNCTION as_user(path text) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE id bigint;
BEGIN
    PERFORM kne_load_model('outside', path, false);
    RETURN 0;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'not below kne.model_dir';
    id := kne_edit('Chile', 'capital', 'Rome');
    INSERT INTO kne.edit_request (subject, relation, object) VALUES ('Chile', 'capital', 'Paris');
    RETURN id;
END $$;
GRANT USAGE ON SCHEMA kne TO regress_kne_user;
GRANT INSERT (subject, relation, object) ON kne.edit_request TO regress_kne_user;
ALTER FUNCTION as_user OWNER TO regress_kne_user;
BEGIN;
SELECT as_user('/') AS id \gset
SELECT object, requested_by, by, detail ->> 'current_user' AS role, detail ->> 'session_user' = session_user AS session
FROM kne.edit_request JOIN kne.edit_event USING (edit_id) WHERE edit_id >= :id ORDER BY edit_id;
SELECT kne_cancel(:id);
SELECT by = current_user AS me FROM kne.edit_event WHERE edit_id = :id AND event = 'cancelled';
-- an error in between leaves no trace of who it was
DO $$ BEGIN PERFORM kne_edit('', '', ''); EXCEPTION WHEN OTHERS THEN NULL; END $$;
SELECT kne_edit('Chile', 'capital', 'Rome') AS id \gset
SELECT requested_by = current_user AS me FROM kne.edit_request WHERE edit_id = :id;
ROLLBACK;
DROP FUNCTION as_user;

-- what a caller puts into pg_temp or its search_path changes nothing
SET ROLE regress_kne_user;
CREATE TEMP TABLE model (model_id int);
CREATE FUNCTION pg_temp.hash(text) RETURNS int LANGUAGE sql AS 'SELECT 1/0';
CREATE FUNCTION pg_temp.position(text, text) RETURNS int LANGUAGE sql AS 'SELECT 1/0';
SET search_path = pg_temp, public, pg_catalog;
SELECT kne_knows('Italy', 'capital', 'Rome');
RESET search_path;
RESET ROLE;

-- monitoring
GRANT pg_monitor TO regress_kne_other;
REVOKE USAGE ON SCHEMA kne FROM regress_kne_other;
SET ROLE regress_kne_other;
SELECT count(*) >= 0 AS workers FROM kne.stat_worker;
SELECT count(*) >= 0 AS batches FROM kne.stat_progress;
SELECT count(*) > 0 AS processes FROM kne_status();
SELECT count(*) AS health FROM kne.stat_health;
RESET ROLE;
DROP OWNED BY regress_kne_user, regress_kne_other;
DROP ROLE regress_kne_user, regress_kne_other;
