/*
 * rebase.c - kne_rebase: the edits in force become part of the model's base, and all deltas are dropped.
 *
 * The model as it is now is exported; that folder is the base from then on, under the same name and id. Each edit in force stays
 * applied, with a next solution without rows: the base holds it. So the rows say what they say of a fact that held already, and only
 * what needs the old base is refused: reverting such an edit, and states of before.
 *
 * Locks: the rows of all requests of the model, by id, as reverts take them; then the lock of its active set; then its row, which new
 * requests and facts refer to. Nothing of the model is claimed, recorded or reverted between the look and the commit.
 */
#include "kne_sql.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(kne_rebase);

KneBase
kne_base_of(const KneModel *model)
{
    static KnePlan newest = {"SELECT at, fingerprint FROM kne.rebase WHERE model_id = $1 ORDER BY at DESC LIMIT 1", 1, {INT4OID}};
    KneBase base = {DT_NOBEGIN, model->fingerprint};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum value = Int32GetDatum(model->model_id);
    bool isnull;

    if (!OidIsValid(get_relname_relid("rebase", get_namespace_oid("kne", true))))
        return base; /* objects of 0.1 */
    kne_spi_connect();
    if (kne_spi(&newest, KNE_READ, &value, NULL) > 0)
    {
        base.at = DatumGetTimestampTz(kne_spi_datum(0, 1, &isnull));
        base.fingerprint = kne_spi_text(0, 2, mcxt);
    }
    kne_spi_finish();
    return base;
}

/* The names that a query finds, NULL: none. */
static char *
names(KnePlan *look)
{
    MemoryContext mcxt = CurrentMemoryContext;
    char *found;

    kne_spi_connect();
    kne_spi(look, KNE_WRITE, NULL, NULL);
    found = kne_spi_text(0, 1, mcxt);
    kne_spi_finish();
    return found;
}

/* ERROR where edits of another server come in: what becomes of them is decided there. */
void
kne_check_subscriptions(const char *what)
{
    static KnePlan look = {"SELECT string_agg(DISTINCT s.subname, ', ')" KNE_SUBSCRIPTIONS};
    char *subscription = names(&look);

    if (subscription)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("cannot %s while subscription \"%s\" brings edits", what, subscription),
                        errdetail("What becomes of these is decided on the server that publishes them."),
                        errhint("Do it there, or ALTER SUBSCRIPTION ... DISABLE first, for good.")));
}

/* ERROR where other servers would not know of it: rows of kne.rebase must go wherever deltas go. */
static void
check_publications(void)
{
    static KnePlan look = {
        "SELECT string_agg(DISTINCT p.pubname, ', ') FROM pg_publication_tables p WHERE p.schemaname = 'kne' AND p.tablename = 'activation'"
        " AND NOT EXISTS (SELECT FROM pg_publication_tables r WHERE r.pubname = p.pubname AND r.schemaname = 'kne' AND r.tablename = 'rebase')"};
    char *publication = names(&look);

    if (publication)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("cannot rebase while publication \"%s\" has edits without kne.rebase", publication),
                        errdetail("Its subscribers would go on with the base of before."),
                        errhint("ALTER PUBLICATION ... ADD TABLE kne.rebase, and there ALTER SUBSCRIPTION ... REFRESH PUBLICATION.")));
}

static TimestampTz
lock_all(int32 model_id)
{
    static KnePlan requests = {"SELECT count(*) FROM (SELECT FROM kne.edit_request WHERE model_id = $1 ORDER BY edit_id FOR NO KEY UPDATE) r",
                               1, {INT4OID}};
    static KnePlan row = {"SELECT FROM kne.model WHERE model_id = $1 FOR UPDATE", 1, {INT4OID}};
    Datum value = Int32GetDatum(model_id);
    TimestampTz at;

    kne_spi_connect();
    kne_spi(&requests, KNE_WRITE, &value, NULL);
    at = kne_stamp_of(model_id);
    kne_spi(&row, KNE_WRITE, &value, NULL);
    kne_spi_finish();
    return at;
}

/* ERROR while anything is to be done for the model, and when no edit is in force. */
static void
check_idle(const KneModel *model)
{
    static KnePlan look = {
        "SELECT (SELECT count(*) FROM kne.edit_request WHERE model_id = $1 AND state IN ('pending', 'running')),"
        " (SELECT count(*) FROM kne.consolidation WHERE model_id = $1 AND state IN ('pending', 'running')),"
        " EXISTS (SELECT FROM kne.activation a JOIN kne.solution s USING (edit_id, generation)"
        " WHERE a.model_id = $1 AND a.valid_to IS NULL AND s.n_rows > 0)",
        1, {INT4OID}};
    Datum value = Int32GetDatum(model->model_id);
    int64 edits, consolidations;
    bool some;

    kne_spi_connect();
    kne_spi(&look, KNE_WRITE, &value, NULL);
    edits = kne_spi_int8(0, 1);
    consolidations = kne_spi_int8(0, 2);
    some = kne_spi_bool(0, 3);
    kne_spi_finish();
    if (edits + consolidations > 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_IN_USE), errmsg("cannot rebase model \"%s\" while work is pending", model->name),
                        errdetail("Unfinished are %lld edits and %lld consolidations.", (long long) edits, (long long) consolidations),
                        errhint("Wait for them, or cancel them.")));
    if (!some)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("model \"%s\" has no edits that a rebase would take into its base", model->name)));
}

static void
write_rows(const KneModel *before, const char *path, const KneBase *after)
{
    static KnePlan archive = {
        "INSERT INTO kne.rebase (model_id, at, by, edits, delta_rows, path_before, fingerprint_before, path, fingerprint)"
        " SELECT $1, $2, $3::name, (SELECT count(*) FROM kne.activation WHERE model_id = $1 AND valid_to IS NULL),"
        " (SELECT count(*) FROM kne.weight_delta JOIN kne.solution s USING (edit_id, generation) WHERE s.model_id = $1), $4, $5, $6, $7"
        " RETURNING rebase_id",
        7, {INT4OID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}};
    static KnePlan next = {
        "WITH ended AS (UPDATE kne.activation SET valid_to = 'infinity' WHERE model_id = $1 AND valid_to IS NULL RETURNING edit_id, generation),"
        " made AS (INSERT INTO kne.solution (edit_id, generation, model_id, digest, n_neurons, n_rows, norm, answer_before, p_before, p_after,"
        " steps, attribute_seconds, optimise_seconds, provenance)"
        " SELECT s.edit_id, s.generation + 1, s.model_id, decode(repeat('00', 32), 'hex'), 0, 0, 0, s.answer_before, s.p_before, s.p_after,"
        " 0, 0, 0, jsonb_build_object('rebase', $2, 'options', s.provenance -> 'options') FROM ended JOIN kne.solution s USING (edit_id, generation) RETURNING edit_id, generation)"
        " INSERT INTO kne.activation (model_id, edit_id, generation) SELECT $1, edit_id, generation FROM made RETURNING edit_id",
        2, {INT4OID, INT8OID}};
    static KnePlan drop = {"DELETE FROM kne.weight_delta d USING kne.solution s WHERE s.model_id = $1 AND d.edit_id = s.edit_id"
                           " AND d.generation = s.generation",
                           1, {INT4OID}};
    static KnePlan move = {"UPDATE kne.model SET path = $2, fingerprint = $3 WHERE model_id = $1", 3, {INT4OID, TEXTOID, TEXTOID}};
    Datum values[7];
    int64 rebase_id, *edit_id;
    uint64 n;

    kne_spi_connect();
    values[0] = Int32GetDatum(before->model_id);
    values[1] = TimestampTzGetDatum(after->at);
    values[2] = CStringGetTextDatum(kne_caller());
    values[3] = CStringGetTextDatum(before->path);
    values[4] = CStringGetTextDatum(before->fingerprint);
    values[5] = CStringGetTextDatum(path);
    values[6] = CStringGetTextDatum(after->fingerprint);
    kne_spi(&archive, KNE_WRITE, values, NULL);
    rebase_id = kne_spi_int8(0, 1);
    values[1] = Int64GetDatum(rebase_id);
    n = kne_spi(&next, KNE_WRITE, values, NULL);
    edit_id = palloc(sizeof *edit_id * Max(n, 1));
    for (uint64 i = 0; i < n; i++)
        edit_id[i] = kne_spi_int8(i, 1);
    for (uint64 i = 0; i < n; i++)
        kne_event_user(edit_id[i], "rebased", "rebase", psprintf(INT64_FORMAT, rebase_id));
    kne_spi(&drop, KNE_WRITE, values, NULL);
    values[1] = CStringGetTextDatum(path);
    values[2] = CStringGetTextDatum(after->fingerprint);
    kne_spi(&move, KNE_WRITE, values, NULL);
    kne_spi_finish();
}

static Datum
rebase_body(PG_FUNCTION_ARGS)
{
    KneModel *model;
    KneBase after;
    KneView *view;
    Datum report;
    char *path;

    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("path of a rebase must not be null")));
    if (IsolationUsesXactSnapshot())
        ereport(ERROR, (errcode(ERRCODE_INVALID_TRANSACTION_STATE), errmsg("cannot rebase in a transaction of this isolation level"),
                        errhint("READ COMMITTED sees what others have committed.")));
    if (!has_privs_of_role(kne_caller_id(), ROLE_PG_READ_SERVER_FILES))
        ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("permission denied to make a folder of the server a model's base"),
                        errdetail("Only members of pg_read_server_files and pg_write_server_files rebase models.")));
    kne_require_preload();
    model = kne_model_by_name(PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)));
    check_publications();
    kne_check_subscriptions("rebase");
    after.at = lock_all(model->model_id);

    PushActiveSnapshot(GetLatestSnapshot()); /* what was committed while the locks were waited for */
    model = kne_model_by_id(model->model_id);
    check_idle(model);
    view = kne_view_get(model, KNE_NOW, NULL, 0);
    report = kne_export_view(view, text_to_cstring(PG_GETARG_TEXT_PP(0)), KNE_EXPORT_HUGGINGFACE, &path);
    PopActiveSnapshot();

    path = kne_model_folder(path, &after.fingerprint);
    write_rows(model, path, &after);
    return report;
}

Datum
kne_rebase(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, rebase_body);
}
