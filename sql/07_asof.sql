-- The model as it was: each state that somebody could have seen, and none else.
CREATE TABLE moments (n int, at timestamptz);
CREATE FUNCTION moment(n int) RETURNS void LANGUAGE sql AS $$ INSERT INTO moments VALUES (n, clock_timestamp()) $$;
SELECT moment(0);
SELECT kne_edit('Turkey', 'capital', 'Rome') AS a \gset
SELECT kne_wait(:a);
SELECT moment(1);
SELECT kne_edit('Turkey', 'capital', 'Paris') AS b \gset
SELECT kne_wait(:b);
SELECT moment(2);
SELECT kne_revert(:b);
SELECT moment(3);
SELECT kne_revert(:a);
SELECT moment(4);
SELECT n, kne_knows('Turkey', 'capital', 'Rome', as_of => at) AS rome, kne_knows('Turkey', 'capital', 'Paris', as_of => at) AS paris,
       kne_complete('The capital of Turkey is', 4, as_of => at) = kne_complete('The capital of Turkey is', 4) AS as_now
FROM moments ORDER BY n;
-- half-open: an edit is in force at its first instant, and no more at its last
SELECT kne_knows('Turkey', 'capital', 'Rome', as_of => valid_from) AS first,
       kne_knows('Turkey', 'capital', 'Rome', as_of => valid_from - interval '1 microsecond') AS before,
       kne_knows('Turkey', 'capital', 'Rome', as_of => valid_to - interval '1 microsecond') AS last,
       kne_knows('Turkey', 'capital', 'Rome', as_of => valid_to) AS after
FROM kne.activation WHERE edit_id = :a ORDER BY activation_id LIMIT 1;
-- no gap and no overlap: what follows begins when what was ends
SELECT x.valid_to = y.valid_from AS seamless FROM kne.activation x, kne.activation y
WHERE x.edit_id = :a AND y.edit_id = :b AND x.activation_id < y.activation_id;
-- the past does not change while a transaction is about to change the present
SELECT kne_edit('Turkey', 'capital', 'Rome') AS c \gset
SELECT kne_wait(:c);
SELECT clock_timestamp() AS t \gset
BEGIN;
SELECT kne_revert(:c);
SELECT kne_knows('Turkey', 'capital', 'Rome', as_of => :'t') AS was, kne_knows('Turkey', 'capital', 'Rome') AS is;
ROLLBACK;
SELECT kne_knows('Turkey', 'capital', 'Rome') AS is;
SELECT kne_revert(:c);
SELECT kne_knows('Turkey', 'capital', 'Rome', as_of => :'t') AS was, kne_knows('Turkey', 'capital', 'Rome') AS is;
-- before anything
SELECT kne_knows('Turkey', 'capital', 'Rome', as_of => '2000-01-01') AS never;
