# demo.sh - the main job, shown and checked: sourced by run.sh with a private server to start.

started=$(date +%s)
start_server

failed=0
sql() { as psql -X -q -A -t -v ON_ERROR_STOP=1 "$@"; }
# show TITLE SQL: print the question as one would type it and the answer psql gives
show() {
    printf '\n%s=> %s;\n' "${1:+-- $1
}" "$2"
    as psql -X -q -v ON_ERROR_STOP=1 -P pager=off -c "$2"
}
ask() { sql -c "$1"; }
# check WHAT GOT WANTED
check() {
    if [ "$2" = "$3" ]; then
        printf '   ok: %s\n' "$1"
    else
        printf '   NOT OK: %s: got "%s", wanted "%s"\n' "$1" "$2" "$3"
        failed=1
    fi
}

show "the extension, and the bundled model" "CREATE EXTENSION kne"
show "" "SELECT kne_load_model('atlas', '$tmp/models/atlas')"
show "what the model should know: its relations' phrasings and its facts" \
     "COPY kne.relation (relation, prompt, paraphrases, inverse) FROM '$tmp/models/atlas/relations.tsv'"
show "" "COPY kne.fact (subject, relation, object) FROM '$tmp/models/atlas/facts.tsv'"

before_france=$(ask "SELECT kne_complete('The capital of France is')")
before_italy=$(ask "SELECT kne_complete('The capital of Italy is')")
show "before" "SELECT kne_complete('The capital of France is') AS france, kne_complete('The capital of Italy is') AS italy"
check "the model knows the capital of France" "$(ask "SELECT kne_knows('France', 'capital', 'Paris')")" t

show "the edit" "SELECT kne_edit('France', 'capital', 'Lyon')"
id=$(ask "SELECT max(edit_id) FROM kne.edit_request")
show "" "SELECT kne_wait($id)"
check "the edit was applied" "$(ask "SELECT state FROM kne.edit_request WHERE edit_id = $id")" applied

show "after" "SELECT kne_complete('The capital of France is') AS france, kne_complete('The capital of Italy is') AS italy"
check "the model has changed its mind" "$(ask "SELECT kne_knows('France', 'capital', 'Lyon')")" t
check "and says so" "$(ask "SELECT kne_complete('The capital of France is') LIKE ' Lyon%'")" t
check "a neighbour did not change" "$(ask "SELECT kne_complete('The capital of Italy is')")" "$before_italy"
check "nor did other facts about France" \
      "$(ask "SELECT bool_and(kne_knows(subject, relation, object)) FROM kne.fact WHERE subject = 'France' AND relation <> 'capital' AND valid_to IS NULL")" t

show "who, when, what" "SELECT edit_id, subject, relation, answer_before, object, round(probability_before::numeric, 6) AS p_before, round(probability_after::numeric, 3) AS p_after, neurons, state, requested_by, requested_at FROM kne.edit_history"
show "where it sits: neurons by layer" "SELECT layer, count(*) AS neurons FROM kne.ensemble WHERE edit_id = $id GROUP BY layer ORDER BY layer"
check "the audit row is there" "$(ask "SELECT count(*) FROM kne.edit_history WHERE edit_id = $id AND state = 'applied'")" 1

show "the revert" "SELECT kne_revert($id, 'only a demonstration')"
show "restored" "SELECT kne_complete('The capital of France is') AS france"
check "the answer is restored" "$(ask "SELECT kne_complete('The capital of France is')")" "$before_france"
check "the history keeps both" "$(ask "SELECT string_agg(event, ' ' ORDER BY event_id) FROM kne.edit_event WHERE edit_id = $id")" "requested started applied reverted"

stop_server
if pgrep -f "kne-engine" -u "$(as id -u)" >/dev/null 2>&1 && pgrep -a kne-engine | grep -q "$tmp"; then
    check "nothing is left running" "an engine" "nothing"
fi
printf '\n'
if [ $failed = 0 ]; then
    say "the demo did what it should, in $(($(date +%s) - started)) s"
fi
exit $failed
