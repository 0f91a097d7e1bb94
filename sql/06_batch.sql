-- INSERT ... SELECT is the batch form, and the same as that many calls of kne_edit.
CREATE TABLE wanted (subject text, object text);
INSERT INTO wanted VALUES ('Spain', 'Berlin'), ('Germany', 'Paris'), ('Japan', 'Rome'), ('Egypt', 'Madrid');
BEGIN;
INSERT INTO kne.edit_request (subject, relation, object) SELECT subject, 'capital', object FROM wanted ORDER BY subject;
SELECT count(*) FROM kne.edit_request r JOIN wanted USING (subject) WHERE r.object = wanted.object AND r.state = 'pending';
ROLLBACK;
INSERT INTO kne.edit_request (subject, relation, object) SELECT subject, 'capital', object FROM wanted ORDER BY subject;
SELECT subject, kne_wait(edit_id) FROM kne.edit_request r JOIN wanted w USING (subject, object) ORDER BY edit_id;
SELECT subject, kne_knows(subject, 'capital', object) AS holds FROM wanted ORDER BY subject;
SELECT h.subject, h.state, h.neurons > 0 AS neurons, h.model, h.requested_by = current_user AS by
FROM kne.edit_history h JOIN wanted USING (subject, object) ORDER BY edit_id;
SELECT event, count(*) FROM kne.edit_event e JOIN kne.edit_request r USING (edit_id) JOIN wanted USING (subject, object)
WHERE event IN ('requested', 'applied') GROUP BY event ORDER BY event;

-- each can be reverted alone, and the others still hold
SELECT kne_revert(edit_id) FROM kne.edit_request JOIN wanted USING (subject, object) WHERE subject = 'Japan';
SELECT subject, kne_knows(subject, 'capital', object) AS holds FROM wanted ORDER BY subject;
-- one transaction, all of them, one stamp
BEGIN;
SELECT count(kne_revert(edit_id)) FROM kne.edit_request JOIN wanted USING (subject, object) WHERE state = 'applied';
SELECT count(*) FILTER (WHERE kne_knows(subject, 'capital', object)) AS holds FROM wanted;
COMMIT;
SELECT count(DISTINCT valid_to) AS stamps, count(*) AS pairs FROM kne.activation
WHERE valid_to = (SELECT max(valid_to) FROM kne.activation);
SELECT bool_and(a.logp = kne_logprob(a.prompt, ' Paris')) AS bit_for_bit FROM answers a WHERE at = 'before';
