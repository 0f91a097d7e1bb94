-- Revert, and the edit that a newer one had superseded. France is in Rome since 03_edit.
SELECT max(edit_id) AS first FROM kne.edit_request WHERE subject = 'France' AND state = 'applied' \gset
SELECT kne_edit('France', 'capital', 'Berlin') AS second \gset
SELECT kne_wait(:second);
SELECT edit_id = :second AS newer, state FROM kne.edit_request WHERE subject = 'France' ORDER BY edit_id;
SELECT kne_complete('The capital of France is', 4) AS berlin;

-- only an applied edit can be reverted
SELECT kne_revert(:first);
SELECT kne_revert(-1);
SELECT kne_revert(NULL);

-- seen by the transaction itself at once, by nobody when it is rolled back
BEGIN;
SELECT kne_revert(:second, 'was wrong');
SELECT kne_complete('The capital of France is', 4) AS rome;
SAVEPOINT s;
SELECT kne_revert(:first);
SELECT kne_complete('The capital of France is', 4) AS paris;
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'before';
ROLLBACK TO s;
SELECT kne_complete('The capital of France is', 4) AS rome;
-- its own times are not set before it commits
SELECT count(*) FROM kne.activation WHERE valid_from = 'infinity' OR valid_to = 'infinity';
ROLLBACK;
SELECT kne_complete('The capital of France is', 4) AS berlin;

-- reinstated, bit for bit
SELECT kne_revert(:second, 'was wrong');
SELECT kne_complete('The capital of France is', 4) AS rome;
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'after';
SELECT edit_id = :second AS newer, state FROM kne.edit_request WHERE subject = 'France' ORDER BY edit_id;
SELECT edit_id = :second AS newer, event, detail ->> 'reason' AS reason, (detail ->> 'reverted_edit')::bigint = :second AS reverted
FROM kne.edit_event WHERE edit_id IN (:first, :second) AND event ~ '^(superseded|rev|rein)' ORDER BY event_id;
SELECT kne_revert(:second);

-- and the first
SELECT kne_revert(:first);
SELECT kne_complete('The capital of France is', 4) AS paris;
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'before';
-- the fact that it had ended is back; what was and when stays
SELECT object, edit_id IS NOT NULL AS by_edit, valid_to IS NULL AS in_force, valid_from <= coalesce(valid_to, now()) AS times
FROM kne.fact WHERE subject = 'France' AND relation = 'capital' ORDER BY fact_id;
SELECT edit_id = :second AS newer, valid_to IS NULL AS in_force, valid_from < valid_to AS times
FROM kne.activation WHERE edit_id IN (:first, :second) ORDER BY activation_id;
-- rows of an edit outlive its revert
SELECT count(*) > 0 AS kept FROM kne.weight_delta WHERE edit_id = :first;

-- stamps: in order, one a transaction and model, also when constraints are immediate
SELECT count(*) FROM kne.activation WHERE 'infinity' IN (valid_from, valid_to);
SELECT count(*) FROM kne.fact WHERE 'infinity' IN (valid_from, valid_to);
SELECT max(edit_id) AS holds FROM kne.edit_request WHERE subject = 'Italy' AND state = 'applied' \gset
BEGIN;
SET CONSTRAINTS ALL IMMEDIATE;
SELECT kne_revert(:holds);
SELECT isfinite(valid_to) AS stamped FROM kne.activation WHERE edit_id = :holds;
SELECT mode, granted FROM pg_locks WHERE locktype = 'object' AND classid = 'kne.model'::regclass;
ROLLBACK;
SELECT state FROM kne.edit_request WHERE edit_id = :holds;
