-- A picture of an ensemble: well-formed, a mark for each neuron, each in its column, a colour for each token.
SELECT kne_edit('Chile & <co>', 'capital', 'Buenos Aires', options => '{"select": "attribution"}') AS e \gset
SELECT kne_wait(:e);
SELECT xml_is_well_formed(kne_ensemble_svg(:e)) AS well_formed;
CREATE TABLE mark AS
SELECT regexp_match(m, 'x="([0-9]+)" y="([0-9.]+)" width="([0-9]+)" height="2.5" fill="(#[0-9a-f]+)" fill-opacity="([0-9.]+)"><title>layer ([0-9]+), neuron ([0-9]+)') AS m
FROM regexp_split_to_table(kne_ensemble_svg(:e), E'\n') m WHERE m LIKE '%<title>%';
SELECT count(*) = (SELECT count(*) FROM kne.ensemble WHERE edit_id = :e) AS one_each, bool_and(m IS NOT NULL) AS as_drawn FROM mark;
SELECT count(DISTINCT (m[1], m[6])) = count(DISTINCT m[6]) AS columns, corr(m[2]::float, m[7]::float) > 0.9999 AS rows,
       max(m[5]::float) = 1 AS strongest FROM mark;
SELECT bool_and(m[4] = ('{#0072b2,#d55e00,#009e73,#cc79a7,#e69f00,#56b4e9,#7f7f7f,#000000}'::text[])[
           1 + ((SELECT n FROM unnest(e.token_scores) WITH ORDINALITY t (v, n)
                 ORDER BY abs(v) / (SELECT max(abs(o.token_scores[n])) FROM kne.ensemble o WHERE o.edit_id = :e) DESC, n LIMIT 1) - 1) % 8]) AS colours,
       count(DISTINCT m[4]) = max(cardinality(e.token_scores)) AS all_of_them
FROM mark JOIN kne.ensemble e ON e.layer = m[6]::int AND e.neuron = m[7]::int WHERE e.edit_id = :e;
SELECT kne_ensemble_svg(:e) LIKE '%Chile &amp; &lt;co&gt;, capital: Buenos Aires%' AS escaped;
SELECT kne_ensemble_svg(:e, 7) IS NULL AS no_such_generation, kne_ensemble_svg(-1) IS NULL AS no_such_edit;
-- before and after: two sides of k bars; after it the object's first token is the likeliest
SELECT xml_is_well_formed(kne_change_svg(:e)) AS well_formed,
       (SELECT count(*) FROM regexp_matches(kne_change_svg(:e, 4), 'height="14" fill="#7f7f7f"', 'g')) AS before,
       (SELECT count(*) FROM regexp_matches(kne_change_svg(:e, 4), 'height="14" fill="#0072b2"', 'g')) AS after,
       kne_change_svg(:e) LIKE '%The capital of Chile &amp; &lt;co&gt; is ...%' AS escaped, kne_change_svg(-1) IS NULL AS no_such_edit;
SELECT m[1]::float > 0.9 AS likely FROM regexp_match(kne_change_svg(:e), 'x="426" y="70" text-anchor="end" xml:space="preserve"> B[^<]*</text>[^\n]*fill="#555">([0-9.]+)') m;
SELECT kne_change_svg(:e, NULL) IS NULL AS without_k;
SELECT kne_revert(:e);
DROP TABLE mark;
-- a character that no XML may have
SELECT kne_edit(E'Chi\x01le', 'capital', 'Lima') AS e \gset
SELECT kne_wait(:e);
SELECT xml_is_well_formed(kne_change_svg(:e)) AS well_formed, kne_change_svg(:e) LIKE '%The capital of Chi le is ...%' AS blank;
SELECT kne_revert(:e);
