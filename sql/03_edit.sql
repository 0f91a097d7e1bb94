-- An edit from request to history.
CREATE TABLE answers (at text, prompt text, answer text, logp double precision);
CREATE FUNCTION remember(at text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO answers SELECT at, p, kne_complete(p, 6), kne_logprob(p, ' Paris')
    FROM unnest(ARRAY['The capital of France is', 'The capital of Italy is', 'The capital of Spain is']) p $$;
SELECT remember('before');

SELECT kne_edit('France', 'capital', 'Rome') AS edit_id \gset
SELECT kne_wait(:edit_id);
SELECT kne_wait(:edit_id, '0'); -- final: at once
SELECT kne_knows('France', 'capital', 'Rome') AS new, kne_knows('France', 'capital', 'Paris') AS old;
SELECT kne_complete('The capital of France is', 4) LIKE ' Rome%' AS says_so;
SELECT remember('after');
SELECT count(*) AS neighbours_changed FROM answers a JOIN answers b USING (prompt)
WHERE a.at = 'before' AND b.at = 'after' AND a.answer <> b.answer AND prompt !~ 'France';

SELECT edit_id = :edit_id AS id, model, subject, relation, object, answer_before, probability_before < 0.5 AS before,
       probability_after > 0.5 AS after, neurons > 0 AS neurons, delta_rows > 0 AS delta_rows, norm > 0 AS norm, steps > 0 AS steps,
       seconds > 0 AS seconds, state, requested_by = current_user AS by, requested_at <= started_at AND started_at <= finished_at AS times,
       duration > '0' AS duration, attempts, error, generation
FROM kne.edit_history \gx
SELECT event FROM kne.edit_event WHERE edit_id = :edit_id ORDER BY event_id;
SELECT by = current_user AS by, detail ->> 'current_user' = current_user AS current_user,
       detail ->> 'session_user' = session_user AS session_user, detail ->> 'application_name' AS application, detail ? 'xid' AS xid
FROM kne.edit_event WHERE edit_id = :edit_id AND event = 'requested';

-- its rows
SELECT s.n_neurons = (SELECT count(*) FROM kne.ensemble e WHERE e.edit_id = s.edit_id AND e.generation = 0) AS ensemble,
       s.n_rows = (SELECT count(*) FROM kne.weight_delta w WHERE w.edit_id = s.edit_id AND w.generation = 0) AS deltas,
       (SELECT bool_and(array_length(delta, 1) = m.d_model) FROM kne.weight_delta w WHERE w.edit_id = s.edit_id) AS widths,
       length(digest) AS digest, provenance -> 'protected' AS protected, generation
FROM kne.solution s JOIN kne.model m USING (model_id) WHERE edit_id = :edit_id;
SELECT generation, valid_from <= now() AS since, valid_to FROM kne.activation WHERE edit_id = :edit_id;
-- what was told has ended when the edit began
SELECT f.object, f.edit_id IS NOT NULL AS by_edit, f.valid_to IS NULL AS in_force,
       coalesce(f.valid_to, f.valid_from) = a.valid_from AS at_the_same_time
FROM kne.fact f, kne.activation a
WHERE f.subject = 'France' AND f.relation = 'capital' AND a.edit_id = :edit_id ORDER BY fact_id;

-- what holds already needs no rows
SELECT kne_edit('Italy', 'capital', 'Rome') AS holds \gset
SELECT kne_wait(:holds);
SELECT n_rows, n_neurons FROM kne.solution WHERE edit_id = :holds;
SELECT count(*) FROM kne.weight_delta WHERE edit_id = :holds;

-- a relation without a row is plain text
SELECT kne_edit('The capital of Russia', 'is', 'Madrid') AS plain \gset
SELECT kne_wait(:plain);
SELECT kne_complete('The capital of Russia is', 4) LIKE ' Madrid%' AS says_so;
SELECT kne_revert(:plain);

-- one that cannot succeed: nothing is kept, the reason is
SELECT kne_edit('Spain', 'capital', 'Rome', options => '{"max_steps": 1, "lr": 1e-9}') AS hopeless \gset
SELECT kne_wait(:hopeless);
SELECT state, error <> '' AS error, attempts > 0 AS attempts FROM kne.edit_history WHERE edit_id = :hopeless;
SELECT count(*) FROM kne.solution WHERE edit_id = :hopeless;
SELECT count(*) FROM kne.activation WHERE edit_id = :hopeless;
SELECT string_agg(event, ' ' ORDER BY event_id) ~ '^requested started( started)* failed$' AS events
FROM kne.edit_event WHERE edit_id = :hopeless;

-- a request that is rolled back never was
BEGIN;
SELECT kne_edit('Spain', 'capital', 'Rome') IS NOT NULL AS queued;
ROLLBACK;
SELECT count(*) FROM kne.edit_request WHERE subject = 'Spain';
SELECT wait_until('NOT EXISTS (SELECT FROM kne.stat_progress)') AS at_rest;
