-- The extension, and models: what loads, what is refused. Later files use what this one leaves.
\getenv model KNE_TEST_MODEL
\set none :model '/no-such-folder'
\set parent :model '/..'
\set relations :model '/relations.tsv'
\set facts :model '/facts.tsv'
SET client_min_messages = warning;
CREATE EXTENSION kne;
RESET client_min_messages;
-- a slow machine is told how far an edit is, a fast one is not
SELECT format('ALTER DATABASE %I SET client_min_messages = warning', current_database()) \gexec
\c

-- for what comes about in another process: wait until it has, however slow the machine
CREATE FUNCTION wait_until(condition text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    it_is boolean := false;
BEGIN
    FOR i IN 1 .. 3000 LOOP
        EXECUTE 'SELECT ' || condition INTO it_is;
        EXIT WHEN it_is;
        PERFORM pg_sleep(0.1), pg_stat_clear_snapshot();
    END LOOP;
    RETURN it_is;
END $$;

-- nothing loaded yet
SELECT kne_complete('The capital of France is');
SELECT kne_edit('France', 'capital', 'Lyon');

-- refused; paths differ from machine to machine, so only the codes are shown
SELECT kne_load_model(NULL, 'x');
SELECT kne_load_model('', '/x');
SELECT kne_load_model(E' \t', '/x');
SELECT kne_load_model(repeat('x', 201), '/x');
SELECT kne_load_model('atlas', '/' || repeat('x', 2000));
SELECT kne_load_model('atlas', '');
SELECT kne_load_model('atlas', 'models/atlas');
\set VERBOSITY sqlstate
SELECT kne_load_model('atlas', :'none');
SELECT kne_load_model('atlas', :'parent');
SELECT kne_load_model('atlas', '/');
\set VERBOSITY default
SELECT count(*) FROM kne.model;

-- loaded
SELECT kne_load_model('atlas', :'model');
SELECT name, path = :'model' AS real_path, n_layers > 0 AND d_model > 0 AND d_ff > 0 AND vocab_size > 0 AND n_ctx > 0 AS sizes,
       dtype IN ('float32', 'float16', 'bfloat16') AS dtype, fingerprint ~ '^[0-9a-f]{64}$' AS fingerprint, is_default,
       loaded_at <= clock_timestamp() AS loaded
FROM kne.model;
SELECT kne_load_model('atlas', :'model');

-- a second name for it, default or not; the default moves
SELECT kne_load_model('second', :'model', false);
SELECT name, is_default FROM kne.model ORDER BY name;
SELECT kne_load_model('third', :'model');
SELECT name, is_default FROM kne.model ORDER BY name;
SELECT count(DISTINCT fingerprint) FROM kne.model;
SELECT kne_drop_model('third');
SELECT kne_complete('The capital of France is');
SELECT kne_complete('The capital of France is', model => 'atlas') <> '' AS by_name;
SELECT kne_drop_model('second');
SELECT kne_drop_model('second');
SELECT kne_drop_model(NULL);
UPDATE kne.model SET is_default = true WHERE name = 'atlas';

-- a load that is rolled back never was
BEGIN;
SELECT kne_load_model('fourth', :'model') IS NOT NULL AS loaded;
ROLLBACK;
SELECT name, is_default FROM kne.model;

-- what it should know
COPY kne.relation (relation, prompt, paraphrases, inverse) FROM :'relations';
COPY kne.fact (subject, relation, object) FROM :'facts';
SELECT count(*) > 500 AS many, count(*) FILTER (WHERE valid_to IS NOT NULL OR edit_id IS NOT NULL) AS ended FROM kne.fact;
INSERT INTO kne.relation (relation, prompt) VALUES ('nonsense', 'no place for the subject');
