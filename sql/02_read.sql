-- Reading functions: answers, NULLs, limits.
SELECT kne_complete('The capital of France is', 4) LIKE ' Paris%' AS paris;
SELECT kne_complete('The capital of France is', 0) = '' AS nothing;
SELECT kne_knows('France', 'capital', 'Paris') AS yes, kne_knows('France', 'capital', 'Rome') AS no;
SELECT exp(kne_logprob('The capital of France is', ' Paris')) > 0.5 AS likely,
       kne_logprob('The capital of France is', ' Paris') > kne_logprob('The capital of France is', ' Rome') AS likelier,
       kne_logprob('The capital of France is', ' Rome') < 0 AS a_logarithm;

SELECT rank, trim(token) AS token, probability > 0.5 AS likely FROM kne_next_tokens('The capital of France is', 1);
SELECT count(*), min(rank), max(rank), bool_and(probability BETWEEN 0 AND 1) AS probabilities, count(DISTINCT token_id) AS ids
FROM kne_next_tokens('The capital of France is');
SELECT bool_and(probability <= before) AS descending
FROM (SELECT probability, lag(probability, 1, 1.0) OVER (ORDER BY rank) AS before
      FROM kne_next_tokens('The capital of France is', 50)) t;
-- the whole vocabulary, tokens that are no text included
SELECT count(*) > 100 AS all_of_it, abs(sum(probability) - 1) < 1e-3 AS adds_up
FROM kne_next_tokens('The capital of France is', 1000000);
-- the two agree
SELECT abs(ln(t.probability) - kne_logprob('The capital of France is', ' Paris')) < 1e-3 AS agree
FROM kne_next_tokens('The capital of France is', 1) t;

SELECT array_length(kne_tokenize('The capital of France is'), 1) > 3 AS tokens,
       kne_detokenize(kne_tokenize('The capital of France is')) LIKE '%The capital of France is' AS and_back,
       kne_detokenize('{}') = '' AS empty;

-- the same answer whatever else is asked in the statement
SELECT count(DISTINCT kne_complete('The capital of France is', 4)) FROM generate_series(1, 5);

-- NULL in, NULL out
SELECT kne_complete(NULL) IS NULL AND kne_complete('x', NULL) IS NULL AND kne_logprob(NULL, 'x') IS NULL
   AND kne_logprob('x', NULL) IS NULL AND kne_knows(NULL, 'capital', 'Paris') IS NULL AND kne_knows('France', NULL, 'Paris') IS NULL
   AND kne_knows('France', 'capital', NULL) IS NULL AND kne_tokenize(NULL) IS NULL AND kne_detokenize(NULL) IS NULL AS nulls;
SELECT count(*) FROM kne_next_tokens(NULL);
SELECT count(*) FROM kne_locate(NULL, 'capital', 'Paris');

-- where an edit would go: highest score first, within the model
SELECT count(*) > 0 AS some, bool_and(layer BETWEEN 0 AND m.n_layers - 1 AND neuron BETWEEN 0 AND m.d_ff - 1) AS inside,
       bool_and(array_length(token_scores, 1) > 0) AS token_scores, count(DISTINCT (layer, neuron)) = count(*) AS distinct
FROM kne_locate('France', 'capital', 'Lyon'), kne.model m WHERE m.is_default;
SELECT bool_and(score <= before) AS descending
FROM (SELECT score, lag(score, 1, 'infinity') OVER (ORDER BY n) AS before
      FROM kne_locate('France', 'capital', 'Lyon') WITH ORDINALITY l (layer, neuron, score, token_scores, n)) t;
SELECT count(*), count(DISTINCT layer) FROM kne_locate('France', 'capital', 'Lyon', options => '{"max_neurons": 5, "layer_min": 1, "layer_max": 1}');
-- locating edits nothing
SELECT count(*) FROM kne.edit_request;

-- what is refused
SELECT kne_complete('The capital of France is', -1);
SELECT kne_complete('The capital of France is', model => 'no such model');
SELECT * FROM kne_next_tokens('The capital of France is', 0);
SELECT kne_knows('', 'capital', 'Paris');
SELECT kne_detokenize('{1,NULL}');
SELECT kne_detokenize('{{1,2},{3,4}}');
SELECT kne_locate('France', 'capital', 'Lyon', options => '{"layer_min": 3, "layer_max": 2}');
SELECT kne_locate('France', 'capital', 'Lyon', options => '{"nonsense": 3}');
\set VERBOSITY sqlstate
SELECT kne_detokenize('{-1}');
SELECT kne_detokenize('{99999999}');
SELECT kne_complete(repeat('The capital of France is ', 3000));
SELECT kne_logprob(repeat('The capital of France is ', 3000), 'Paris');
SELECT kne_logprob('The capital of France is', '');
SELECT kne_locate('France', 'capital', 'Lyon', options => '{"layer_min": 4000}');
\set VERBOSITY default

-- how they are declared
SELECT proname, provolatile, proparallel, prosecdef, procost, proconfig FROM pg_proc
WHERE proname ~ '^kne_(complete|logprob|next_tokens|knows|locate|tokenize|detokenize)$' ORDER BY proname;
