-- Who may do what with every object of the extension. The expected output is the matrix: an object without a line in it, or a right
-- that nobody meant, is a difference. docs/security.md explains the roles, and has these GRANTs word for word.
BEGIN;
CREATE ROLE kne_reader;
CREATE ROLE kne_editor IN ROLE kne_reader;
CREATE ROLE kne_owner IN ROLE kne_editor;
GRANT EXECUTE ON FUNCTION kne_complete, kne_logprob, kne_next_tokens, kne_knows, kne_knows_all, kne_tag_time, kne_tokenize, kne_detokenize TO kne_reader;
GRANT USAGE ON SCHEMA kne TO kne_editor;
GRANT EXECUTE ON FUNCTION kne_edit, kne_wait, kne_revert, kne_revert_all, kne_cancel, kne_retry, kne_locate TO kne_editor;
GRANT INSERT (model_id, subject, relation, object, options) ON kne.edit_request TO kne_editor;
GRANT INSERT (model_id, subject, relation, object) ON kne.fact TO kne_editor;
GRANT SELECT ON kne.model, kne.relation, kne.fact, kne.edit_request, kne.edit_event, kne.edit_history TO kne_editor;
GRANT EXECUTE ON FUNCTION kne_load_model, kne_drop_model, kne_tag, kne_untag, kne_redo, kne_check_history, kne_adopt, kne_status, kne.stat_workers TO kne_owner;
GRANT EXECUTE ON FUNCTION kne_evaluate, kne_consequences, kne_edit_unit, kne_revert_unit, kne_ensemble_svg, kne_change_svg TO kne_editor;
GRANT INSERT (edit_id, kind, prompt, answer, versus) ON kne.probe TO kne_editor;
GRANT SELECT ON kne.probe, kne.evaluation, kne.alias, kne.profile TO kne_editor;
GRANT EXECUTE ON FUNCTION kne_consolidate, kne_wait_consolidation, kne_cancel_consolidation, kne_health, kne_load_suite TO kne_owner;
GRANT INSERT, UPDATE, DELETE ON kne.alias, kne.profile, kne.health_text TO kne_owner;
GRANT SELECT ON ALL TABLES IN SCHEMA kne TO kne_owner;
GRANT INSERT, UPDATE, DELETE ON kne.relation, kne.general_fact TO kne_owner;
GRANT UPDATE (is_default) ON kne.model TO kne_owner;

CREATE TEMP VIEW own AS
    SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'kne'
    WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND d.classid <> 'pg_type'::regclass -- row types, since 17
    UNION SELECT 'pg_class'::regclass, oid FROM pg_class WHERE relnamespace = 'kne'::regnamespace AND relkind = 'S';
-- a right on columns names them, unless it is one on the whole table
CREATE FUNCTION pg_temp.rights(who text, class oid, object oid) RETURNS text LANGUAGE sql AS $$
    SELECT coalesce(string_agg(right_to, ', ' ORDER BY right_to), '') FROM (
        SELECT 'EXECUTE' AS right_to WHERE class = 'pg_proc'::regclass AND has_function_privilege(who, object, 'EXECUTE')
        UNION ALL
        SELECT p FROM unnest('{USAGE,CREATE}'::text[]) p
        WHERE class = 'pg_namespace'::regclass AND has_schema_privilege(who, object, p)
        UNION ALL
        SELECT p FROM pg_class c, unnest('{USAGE,SELECT,UPDATE}'::text[]) p
        WHERE class = 'pg_class'::regclass AND c.oid = object AND relkind = 'S' AND has_sequence_privilege(who, object, p)
        UNION ALL
        SELECT p FROM pg_class c, unnest('{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) p
        WHERE class = 'pg_class'::regclass AND c.oid = object AND relkind <> 'S' AND has_table_privilege(who, object, p)
        UNION ALL
        SELECT p || ' (' || string_agg(attname, ', ' ORDER BY attnum) || ')'
        FROM pg_attribute a, unnest('{SELECT,INSERT,UPDATE,REFERENCES}'::text[]) p
        WHERE class = 'pg_class'::regclass AND attrelid = object AND attnum > 0 AND NOT attisdropped
        AND (SELECT relkind FROM pg_class WHERE oid = object) <> 'S'
        AND NOT has_table_privilege(who, object, p) AND has_column_privilege(who, object, attnum, p)
        GROUP BY p) r $$;
\pset format unaligned
SELECT (type || ' ' || replace(identity, 'public.', '')) COLLATE "C" AS object, pg_temp.rights('public', classid, objid) AS public,
       pg_temp.rights('pg_monitor', classid, objid) AS monitor, pg_temp.rights('kne_reader', classid, objid) AS reader,
       pg_temp.rights('kne_editor', classid, objid) AS editor, pg_temp.rights('kne_owner', classid, objid) AS owner
FROM own, pg_identify_object(classid, objid, 0) ORDER BY 1;
\pset format aligned

-- what a definer's function or a view lends its caller is named here; every other function checks its caller, or reads
SELECT p.oid::regprocedure FROM own JOIN pg_proc p ON classid = 'pg_proc'::regclass AND objid = p.oid
WHERE prosecdef ORDER BY p.oid::regprocedure::text COLLATE "C";
-- everything belongs to the one who created the extension
SELECT count(*) FROM own JOIN pg_class c ON classid = 'pg_class'::regclass AND objid = c.oid WHERE relowner <> current_user::regrole;

-- an editor forges nothing
\set VERBOSITY sqlstate
\set ON_ERROR_ROLLBACK on
SET ROLE kne_editor;
INSERT INTO kne.edit_request (subject, relation, object, state) VALUES ('Chile', 'capital', 'Rome', 'applied');
INSERT INTO kne.edit_request (subject, relation, object, requested_by) VALUES ('Chile', 'capital', 'Rome', 'somebody');
INSERT INTO kne.edit_request (subject, relation, object, origin) VALUES ('Chile', 'capital', 'Rome', gen_random_uuid());
INSERT INTO kne.fact (subject, relation, object, edit_id) VALUES ('Chile', 'capital', 'Rome', 1);
UPDATE kne.edit_request SET state = 'applied';
UPDATE kne.fact SET valid_to = now();
INSERT INTO kne.edit_event (edit_id, event, by) VALUES (1, 'applied', 'somebody');
INSERT INTO kne.activation (model_id, edit_id, generation) VALUES (1, 1, 0);
INSERT INTO kne.weight_delta VALUES (1, 0, 0, 0, 'down', '{1}');
SELECT nextval('kne.edit_request_edit_id_seq');
CREATE TRIGGER t AFTER INSERT ON kne.edit_request EXECUTE FUNCTION pg_catalog.suppress_redundant_updates_trigger();
LOCK TABLE kne.edit_request;
SELECT kne_load_model('x', '/etc');
-- nor a reader; it does not even see the schema
SET ROLE kne_reader;
SELECT count(*) FROM kne.fact;
SELECT kne_edit('Chile', 'capital', 'Rome');
ROLLBACK;
\set VERBOSITY default
