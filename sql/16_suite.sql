-- Published benchmarks as rows: requests and probes.
BEGIN;
SELECT count(*) AS before FROM kne.edit_request \gset
CREATE TABLE loaded AS SELECT id, row_number() OVER () AS n FROM kne_load_suite($$[
 {"case_id": 0, "requested_rewrite": {"prompt": "The mother tongue of {} is", "relation_id": "P103", "target_new": {"str": "English", "id": "Q1860"},
  "target_true": {"str": "French", "id": "Q150"}, "subject": "Danielle Darrieux"}, "paraphrase_prompts": ["Danielle Darrieux, a native"],
  "neighborhood_prompts": ["The native language of Montesquieu is", "The native language of Raymond Barre is"], "attribute_prompts": ["x"]},
 {"case_id": 1, "prompt": "The mother tongue of Leon Blum is", "target_new": "Dutch", "subject": "Leon Blum", "ground_truth": "French",
  "rephrase_prompt": "Leon Blum speaks", "locality_prompt": "Michel Rocard is a native speaker of", "locality_ground_truth": "French"},
 {"subject": "UniFirst", "src": "What is the product made by UniFirst?", "pred": "x", "rephrase": "What will be the product of UniFirst?",
  "alt": "unmanned aircraft", "answers": ["uniform"], "loc": "nq question: who played him", "loc_ans": "Walter Sobchak", "cond": "x"},
 {"subject": "Leo Arons", "prompt": "The place of death of Leo Arons is", "target_new": "Berlin", "ground_truth": ["Halle", "Halle (Saale)"],
  "portability": {"Logical_Generalization": [{"prompt": "Is Leo Arons still alive?", "ground_truth": [["no", "incorrect"]]}], "Reasoning": []},
  "locality": {"Relation_Specificity": [{"prompt": "The father of Leo Arons is", "ground_truth": [["Albert", "A."]]}, {"prompt": "no answer", "ground_truth": []}]}},
 {"prompt": "Who is the king?", "target_new": "Kong", "subject": "not in the prompt"},
 {"subject": "Peru", "relation": "capital", "object": "Rome", "kind": "locality", "prompt": "The capital of Egypt is", "answer": "Cairo"},
 {"subject": "Peru", "relation": "capital", "object": "Rome", "kind": "paraphrase", "prompt": "Peru has the capital", "answer": "Rome", "versus": "Lima"},
 {"subject": "Cuba", "relation": "capital", "object": "Rome", "kind": null, "prompt": null, "answer": null}
]$$, options => '{"max_steps": 60}') id;
SELECT l.n, r.subject, r.relation, r.object, r.options, r.requested_by = current_user AS by FROM loaded l JOIN kne.edit_request r ON r.edit_id = l.id ORDER BY n;
SELECT l.n, p.kind, p.prompt, p.answer, p.versus FROM loaded l JOIN kne.probe p ON p.edit_id = l.id ORDER BY probe_id;
SELECT relation, prompt FROM kne.relation WHERE relation LIKE '%{}%' ORDER BY relation COLLATE "C";
SELECT count(*) FROM kne.edit_event e JOIN loaded ON id = edit_id WHERE event = 'requested';
-- some of it, and TSV by COPY
SELECT count(*) FROM kne_load_suite('[{"subject": "A", "relation": "b", "object": "c"}, {"subject": "B", "relation": "b", "object": "c"},
    {"subject": "C", "relation": "b", "object": "c"}]', first => 2, records => 1);
SELECT subject FROM kne.edit_request ORDER BY edit_id DESC LIMIT 1;
CREATE TEMP TABLE tsv (subject text, relation text, object text, kind text, prompt text, answer text, versus text);
COPY tsv FROM stdin;
Chile	capital	Rome	paraphrase	Chile has the capital	Rome	Santiago
Chile	capital	Rome	locality	The capital of Egypt is	Cairo	\N
\.
SELECT count(*) AS edits FROM kne_load_suite((SELECT jsonb_agg(to_jsonb(tsv)) FROM tsv));
SELECT kind, answer, versus FROM kne.probe JOIN kne.edit_request USING (edit_id) WHERE subject = 'Chile' AND edit_id > (SELECT max(id) FROM loaded) ORDER BY probe_id;
ROLLBACK;
SELECT count(*) = :before AS nothing_left FROM kne.edit_request;
-- from its request to its figures
SELECT kne_load_suite('[{"subject": "Chile", "prompt": "The capital of Chile is", "target_new": "Rome", "ground_truth": "Santiago",
    "rephrase_prompt": "The capital city of Chile is", "locality_prompt": "The capital of Egypt is", "locality_ground_truth": "Cairo"}]') AS e \gset
SELECT kne_wait(:e);
SELECT metric, value, probes FROM kne_evaluate(:e) WHERE metric IN ('edit_success', 'es', 'generality', 'locality') ORDER BY 1;
SELECT kne_revert(:e);
DELETE FROM kne.relation WHERE relation LIKE '%{}%';
\set VERBOSITY terse
SELECT kne_load_suite('{"subject": "Chile"}');
SELECT kne_load_suite('[{"subject": "Chile", "prompt": "The capital of Chile is"}]');
SELECT kne_load_suite('[]', first => 0);
SELECT kne_load_suite('[]', 'no such model');
SELECT kne_load_suite('[]', options => '{"speed": 1}');
\set VERBOSITY default
