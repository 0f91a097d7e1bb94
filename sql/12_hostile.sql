-- A session in which every name that can be taken is taken: what kne does for it is the same.
-- A role that may create what it likes gets a function for each one of pg_catalog, an operator for each, and relations and types of
-- these names in its temporary schema; each function raises an error that says whose rights it had.
CREATE ROLE regress_kne_hostile;
GRANT EXECUTE ON FUNCTION kne_edit, kne_wait, kne_revert, kne_cancel, kne_retry, kne_complete, kne_logprob, kne_next_tokens, kne_knows,
    kne_locate, kne_tokenize, kne_detokenize, kne_load_model, kne_drop_model, kne_adopt, kne_status, kne.stat_workers TO regress_kne_hostile;
GRANT USAGE ON SCHEMA kne TO regress_kne_hostile;
GRANT INSERT (subject, relation, object) ON kne.edit_request TO regress_kne_hostile;
GRANT INSERT (subject, relation, object) ON kne.fact TO regress_kne_hostile;
CREATE SCHEMA hostile AUTHORIZATION regress_kne_hostile;
GRANT CREATE ON SCHEMA public TO regress_kne_hostile;
SET client_min_messages = warning;
SET SESSION AUTHORIZATION regress_kne_hostile;
DO $$
DECLARE
    f record;
    functions int := 0;
    operators int := 0;
BEGIN
    FOR f IN SELECT proname, pg_get_function_identity_arguments(oid) AS args, prorettype::regtype AS result, proretset
             FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION hostile.%I(%s) RETURNS %s %s LANGUAGE plpgsql AS $f$ BEGIN RAISE ''called by %%'', current_user; END $f$',
                           f.proname, f.args, CASE WHEN f.proretset THEN 'SETOF' ELSE '' END, f.result);
            functions := functions + 1;
        EXCEPTION WHEN OTHERS THEN NULL; -- of types that no plpgsql function has
        END;
    END LOOP;
    FOR f IN SELECT oprname, oprleft, oprright, oprresult FROM pg_operator WHERE oprnamespace = 'pg_catalog'::regnamespace LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION hostile.o%s(%s) RETURNS %s LANGUAGE plpgsql AS $f$ BEGIN RAISE ''called by %%'', current_user; END $f$',
                           operators, concat_ws(',', nullif(f.oprleft, 0)::regtype, f.oprright::regtype), f.oprresult::regtype);
            EXECUTE format('CREATE OPERATOR hostile.%s (FUNCTION = hostile.o%s, %s RIGHTARG = %s)', f.oprname, operators,
                           CASE WHEN f.oprleft <> 0 THEN 'LEFTARG = ' || f.oprleft::regtype || ',' ELSE '' END, f.oprright::regtype);
            operators := operators + 1;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    RAISE WARNING 'plenty of functions: %, of operators: %', functions > 2000, operators > 600;
    FOR f IN SELECT relname FROM pg_class WHERE relkind IN ('r', 'v') AND relnamespace IN ('kne'::regnamespace, 'pg_catalog'::regnamespace) LOOP
        EXECUTE format('CREATE TEMP TABLE %I (nothing int)', f.relname);
    END LOOP;
    FOR f IN SELECT unnest('{text,name,jsonb,int4,int8,float4,float8,bool,bytea,oid,uuid,regclass,timestamptz,interval,xid,numeric}'::text[]) AS t LOOP
        EXECUTE format('CREATE TYPE pg_temp.%I AS ENUM (%L)', f.t, 'nothing');
        EXECUTE format('CREATE DOMAIN hostile.%I AS pg_catalog.text CHECK (false)', f.t);
    END LOOP;
END $$;
SET search_path = hostile, pg_temp, public, pg_catalog;
-- it does what it should: a statement of the session itself runs into it
SELECT length('x'::pg_catalog.text);
-- settings that change how values are read and written
SET array_nulls = off;
SET transform_null_equals = on;
SET standard_conforming_strings = off;
SET escape_string_warning = off;
SET backslash_quote = on;
SET quote_all_identifiers = on;
SET bytea_output = escape;
SET extra_float_digits = -15;
SET DateStyle = 'German, DMY';
SET IntervalStyle = sql_standard;
SET TimeZone = 'Pacific/Chatham';
SET default_transaction_read_only = off;
SET enable_seqscan = off;
SET plan_cache_mode = force_generic_plan;
SET row_security = off;

\getenv model KNE_TEST_MODEL
\set VERBOSITY sqlstate
SELECT kne_edit('Kenya', 'capital', 'Rome') AS id \gset
SELECT kne_wait(:id);
SELECT kne_knows('Kenya', 'capital', 'Rome');
SELECT kne_complete('The capital of Kenya is', 1);
SELECT count FROM (SELECT pg_catalog.count(*) FROM kne_next_tokens('The capital of Kenya is', 3)) n (count);
SELECT pg_catalog.count(*) FROM kne_locate('Kenya', 'capital', 'Paris', options => '{"max_neurons": 2}');
SELECT kne_detokenize(kne_tokenize('Kenya'));
SELECT pg_catalog.float8lt(kne_logprob('The capital of Kenya is', 'Nairobi'), 0);
SELECT pg_catalog.count(*) FROM kne_status() s WHERE s.worker OPERATOR(pg_catalog.=) 'engine'::pg_catalog.text;
BEGIN;
SELECT kne_revert(:id, 'reason');
ROLLBACK;
INSERT INTO kne.edit_request (subject, relation, object) VALUES ('Kenya', 'capital', 'Madrid');
INSERT INTO kne.fact (subject, relation, object) VALUES ('Hostile', 'capital', 'Nowhere');
SELECT kne_adopt();
SELECT kne_load_model('hostile', '/');
SELECT kne_load_model('hostile', :'model', false) OPERATOR(pg_catalog.>) 0;
SELECT kne_drop_model('hostile');
\set VERBOSITY default
RESET SESSION AUTHORIZATION;
RESET ALL;

SELECT max(edit_id) AS last FROM kne.edit_request \gset
SELECT kne_wait(:last);
-- the rows are as always
SELECT edit_id = :last AS newer, object, state, requested_by FROM kne.edit_request WHERE edit_id IN (:id, :last) ORDER BY edit_id;
SELECT edit_id = :last AS newer, event, by FROM kne.edit_event WHERE edit_id IN (:id, :last) ORDER BY event_id;
SELECT kne_revert(:last);
SELECT kne_revert(:id);
DELETE FROM kne.fact WHERE subject = 'Hostile';
SET client_min_messages = warning;
DROP OWNED BY regress_kne_hostile CASCADE;
DROP ROLE regress_kne_hostile;
RESET client_min_messages;
