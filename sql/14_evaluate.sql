-- Evaluations: the figures of an edit's probes, checked against what single questions answer.
SELECT kne_edit('France', 'capital', 'Rome') AS e \gset
SELECT kne_wait(:e);
INSERT INTO kne.probe (edit_id, kind, prompt, answer, versus) VALUES
    (:e, 'edit', 'not asked', 'Rome', 'Paris'),
    (:e, 'paraphrase', 'The capital of the country France is', 'Rome', 'Paris'),
    (:e, 'paraphrase', 'Surely, the capital of France is', 'Rome', 'Paris'),
    (:e, 'portability', 'The capital of the country whose currency is the yen is', 'Tokyo', NULL),
    (:e, 'locality', 'The capital of Germany is', 'Berlin', 'Rome'),
    (:e, 'locality', 'The capital of Egypt is', 'Cairo', 'Rome');
CREATE TABLE figures AS SELECT * FROM kne_evaluate(:e);
SELECT metric, probes FROM figures;
CREATE FUNCTION figure(m text) RETURNS double precision LANGUAGE sql AS 'SELECT value FROM figures WHERE metric = m';
SELECT figure('edit_success') AS success, figure('edit_success_exact') = kne_knows('France', 'capital', 'Rome')::int AS exact,
       figure('edit_success_generated') = (kne_complete('The capital of France is', 8) LIKE ' Rome%')::int AS generated;
SELECT figure('es') = (kne_logprob('The capital of France is', 'Rome') > kne_logprob('The capital of France is', 'Paris'))::int AS es,
       figure('ps') = avg((kne_logprob(prompt, answer) > kne_logprob(prompt, versus))::int) FILTER (WHERE kind = 'paraphrase') AS ps,
       figure('ns') = avg((kne_logprob(prompt, answer) > kne_logprob(prompt, versus))::int) FILTER (WHERE kind = 'locality') AS ns,
       round((3 / (1 / figure('es') + 1 / figure('ps') + 1 / figure('ns')) - figure('s'))::numeric, 9) AS s
FROM kne.probe WHERE edit_id = :e;
-- paraphrases: the rows, and those of the relation that did not train; an answer of one token is right when it is the likeliest
SELECT figure('generality_exact') = avg((SELECT n.token = (SELECT token FROM kne_next_tokens('The capital of France is', 1)) FROM kne_next_tokens(p, 1) n)::int) AS generality
FROM (SELECT prompt FROM kne.probe WHERE edit_id = :e AND kind = 'paraphrase' UNION
      SELECT replace(p, '{}', 'France') FROM kne.relation, unnest(paraphrases) WITH ORDINALITY u (p, n)
      WHERE relation = 'capital' AND n > (SELECT (provenance #>> '{options,phrasings}')::int FROM kne.solution WHERE edit_id = :e)) q (p);
SELECT bool_and(value BETWEEN 0 AND 1) AS shares FROM figures WHERE metric <> 'fluency';
SELECT value > 0 AS fluency FROM figures WHERE metric = 'fluency';
-- the same again, and kept both times
SELECT count(*) AS differ FROM kne_evaluate(:e) e JOIN figures f USING (metric) WHERE e.value <> f.value OR e.probes <> f.probes;
SELECT count(*) = 2 * (SELECT count(*) FROM figures) AS kept, count(DISTINCT evaluated_at) AS times FROM kne.evaluation WHERE edit_id = :e;
-- the caller's snapshot decides: without the edit nothing is a success, and everything is local
BEGIN;
SELECT kne_revert(:e);
SELECT metric, value FROM kne_evaluate(:e) WHERE metric IN ('edit_success_exact', 'es', 'locality', 'locality_exact', 'ns') ORDER BY 1;
ROLLBACK;
-- where nothing may be written it only answers
BEGIN READ ONLY;
SELECT count(*) = (SELECT count(*) FROM figures) AS figures FROM kne_evaluate(:e);
COMMIT;
SELECT count(*) = 2 * (SELECT count(*) FROM figures) AS kept FROM kne.evaluation WHERE edit_id = :e;
SELECT * FROM kne_evaluate(NULL);
\set VERBOSITY terse
SELECT * FROM kne_evaluate(-1);
INSERT INTO kne.probe (edit_id, kind, prompt, answer) VALUES (:e, 'rumour', 'x', 'y');
\set VERBOSITY default

-- health: perplexity over texts
SELECT kne_health() IS NULL AS nothing_to_read;
INSERT INTO kne.health_text (text) VALUES ('The capital of Germany is Berlin.'), ('The currency of Japan is the yen.'), ('x');
SELECT kne_health() AS now, kne_health(as_of => (SELECT min(valid_from) - interval '1 us' FROM kne.activation)) AS before \gset
SELECT :now > 1 AS now, abs(:now / :before - 1) < 0.5 AS not_far;
SELECT abs(ln(:now) + sum(logp) / sum(n)) < 1e-6 AS is_perplexity FROM (
    SELECT kne_logprob('', text) AS logp, cardinality(kne_tokenize(text)) - 1 AS n FROM kne.health_text) t;
-- the guard: an edit that does more damage than it may fails, whatever runs beside it
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"max_damage": 1000}') AS harmless \gset
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"max_damage": 0.5}') AS harmful \gset
SELECT kne_wait(:harmless), kne_wait(:harmful);
SELECT error LIKE 'perplexity over the health texts would rise from % to %, by a factor of %: max_damage is 0.5' AS why FROM kne.edit_request WHERE edit_id = :harmful;
SELECT count(*) AS kept FROM kne.solution WHERE edit_id = :harmful;
SELECT kne_revert(:harmless);
DELETE FROM kne.health_text;
SELECT kne_edit('Chile', 'capital', 'Rome', options => '{"max_damage": 1.05}') AS blind \gset
SELECT kne_wait(:blind);
SELECT error FROM kne.edit_request WHERE edit_id = :blind;
SELECT kne_revert(:e);
DROP TABLE figures;
DROP FUNCTION figure;
-- a whole number with a fraction of nothing is a whole number
BEGIN;
SELECT kne_edit('Peru', 'capital', 'Rome', options => '{"phrasings": 1.0}') AS e \gset
SELECT value, probes FROM kne_evaluate(:e) WHERE metric = 'edit_success_exact';
ROLLBACK;
