# shell.sh - a psql with the bundled model loaded, on a private server that goes away with it: sourced by run.sh.

start_server
as psql -X -q -v ON_ERROR_STOP=1 -o /dev/null <<SQL
CREATE EXTENSION kne;
SELECT kne_load_model('atlas', '$tmp/models/atlas');
COPY kne.relation (relation, prompt, paraphrases, inverse) FROM '$tmp/models/atlas/relations.tsv';
COPY kne.fact (subject, relation, object) FROM '$tmp/models/atlas/facts.tsv';
SQL
status=0
as psql -X || status=$?
stop_server
exit $status
