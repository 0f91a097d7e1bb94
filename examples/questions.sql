-- Questions about edits, in SQL. docs/questions.md has them with answers.

-- What did the model hold about France on a day, who had changed it, in which transaction?
SELECT f.relation, f.object, f.valid_from, f.valid_to, r.requested_by, e.detail ->> 'xid' AS transaction, e.detail ->> 'application_name' AS application
FROM kne.fact f
LEFT JOIN kne.edit_request r USING (edit_id)
LEFT JOIN kne.edit_event e ON e.edit_id = f.edit_id AND e.event = 'requested'
WHERE f.subject = 'France' AND f.valid_from <= :'day' AND (f.valid_to > :'day' OR f.valid_to IS NULL)
ORDER BY f.relation;

-- Which edits share neurons?
SELECT a.edit_id, b.edit_id AS other, count(*) AS shared, round(count(*) * 1.0 / least(sa.neurons, sb.neurons), 2) AS share
FROM kne.ensemble a
JOIN kne.ensemble b ON (a.layer, a.neuron) = (b.layer, b.neuron) AND a.edit_id < b.edit_id
JOIN kne.stat_size sa ON (sa.edit_id, sa.generation) = (a.edit_id, a.generation) AND sa.in_force
JOIN kne.stat_size sb ON (sb.edit_id, sb.generation) = (b.edit_id, b.generation) AND sb.in_force
GROUP BY a.edit_id, b.edit_id, sa.neurons, sb.neurons ORDER BY shared DESC, 1, 2 LIMIT 5;

-- Which layers carry a relation?
SELECT r.relation, n.layer, count(*) AS neurons, round(avg(n.score)::numeric, 2) AS score
FROM kne.ensemble n JOIN kne.edit_request r USING (edit_id) JOIN kne.stat_size s USING (edit_id, generation)
WHERE s.in_force GROUP BY r.relation, n.layer ORDER BY r.relation, n.layer;

-- Which edits in force does the model not answer any more?
SELECT r.edit_id, k.* FROM (SELECT array_agg(subject ORDER BY edit_id) AS s, array_agg(relation ORDER BY edit_id) AS r, array_agg(object ORDER BY edit_id) AS o
                            FROM kne.edit_request JOIN kne.model USING (model_id) WHERE is_default AND state = 'applied') a,
     kne_knows_all(a.s, a.r, a.o) k
JOIN kne.edit_request r ON (r.subject, r.relation, r.object) = (k.subject, k.relation, k.object) AND r.state = 'applied'
WHERE NOT k.knows ORDER BY 1;

-- What has each user cost?
SELECT requested_by, count(*) AS edits, count(*) FILTER (WHERE h.state = 'failed') AS failed, sum(h.steps) AS steps,
       sum(s.delta_bytes) AS bytes
FROM kne.edit_history h LEFT JOIN kne.stat_size s USING (edit_id, generation) GROUP BY requested_by ORDER BY requested_by;

-- How likely was the object before and after?
SELECT edit_id, subject, object, round(probability_before::numeric, 6) AS before, round(probability_after::numeric, 2) AS after
FROM kne.edit_history WHERE delta_rows > 0 ORDER BY edit_id;

-- Which neurons have edits of two users?
SELECT count(*) AS neurons_of_both FROM (
    SELECT n.layer, n.neuron FROM kne.ensemble n JOIN kne.edit_request r USING (edit_id)
    GROUP BY n.layer, n.neuron HAVING count(DISTINCT r.requested_by) > 1) both_users;

-- Which edits were never evaluated?
SELECT count(*) AS never_evaluated FROM kne.edit_request r WHERE r.state = 'applied'
AND NOT EXISTS (SELECT FROM kne.evaluation v WHERE v.edit_id = r.edit_id);

-- Everything of one user out again, and back to a named state: each one statement, one transaction.
BEGIN;
SELECT kne_revert_all(array_agg(edit_id), 'left the company') FROM kne.edit_request WHERE requested_by = 'bob' AND state IN ('applied', 'superseded');
ROLLBACK;
BEGIN;
SELECT kne_revert_all(array_agg(edit_id), 'back to v1') FROM kne_diff(kne_tag_time('v1')) WHERE change = 'added';
ROLLBACK;
