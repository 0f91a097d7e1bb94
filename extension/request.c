/*
 * request.c - asking for edits and changing one's mind: edit, revert, cancel, retry, adopt, and the
 * triggers that make a plain INSERT into kne.edit_request the same thing as a call of kne_edit.
 *
 * Nothing here computes. A request is a row; the worker is woken when (and only if) the row commits. Revert
 * is a row change too, seen by this transaction at once and by others at commit.
 *
 * Locks. What changes the state of an edit locks the rows of its fact (model, subject, relation) FOR NO KEY
 * UPDATE in ascending edit_id: two sessions cannot decide about one fact at the same time, and foreign keys
 * (events, facts) do not wait for it. The worker locks its edit and the
 * one in force, and never waits for a user (worker_record.c).
 */
#include "kne_sql.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(kne_edit);
PG_FUNCTION_INFO_V1(kne_revert);
PG_FUNCTION_INFO_V1(kne_revert_all);
PG_FUNCTION_INFO_V1(kne_cancel);
PG_FUNCTION_INFO_V1(kne_retry);
PG_FUNCTION_INFO_V1(kne_adopt);
PG_FUNCTION_INFO_V1(kne_request_before);
PG_FUNCTION_INFO_V1(kne_request_after);
PG_FUNCTION_INFO_V1(kne_fact_before);

/* Subject and relation are in an index, which has room for a third of a page. */
#define MAX_KEY_BYTES 1000
#define MAX_OBJECT_BYTES 65536 /* a batch holds many */

static void
check_fact(const char *subject, const char *relation, const char *object)
{
    kne_check_text("subject", subject);
    kne_check_text("relation", relation);
    kne_check_text("object", object);
    Assert(subject != NULL && relation != NULL && object != NULL);
    if (strlen(subject) > MAX_KEY_BYTES || strlen(relation) > MAX_KEY_BYTES)
        ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
                        errmsg("%s is too long", strlen(subject) > MAX_KEY_BYTES ? "subject" : "relation"),
                        errdetail("Subject and relation have at most %d bytes each.", MAX_KEY_BYTES)));
    if (strlen(object) > MAX_OBJECT_BYTES)
        ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("object is too long"),
                        errdetail("It has at most %d bytes.", MAX_OBJECT_BYTES)));
}

/* Would nobody ever run it? Say so rather than let it wait. */
void
kne_warn_if_idle(void)
{
    static LocalTransactionId warned = InvalidLocalTransactionId;

    kne_require_preload();
    if (kne_enabled || warned == KNE_LXID)
        return;
    warned = KNE_LXID;
    ereport(WARNING, (errmsg("edits are queued but none runs: kne.enabled is off"),
                      errhint("Set kne.enabled = on and reload the configuration.")));
}

void
kne_no_such_edit(int64 edit_id)
{
    ereport(ERROR,
            (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("edit " INT64_FORMAT " does not exist", edit_id),
             errhint("SELECT edit_id FROM kne.edit_history lists the edits.")));
    pg_unreachable();
}

static int64
edit_id_arg(FunctionCallInfo fcinfo)
{
    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("edit_id must not be null")));
    return PG_GETARG_INT64(0);
}

/* ---------------------------------------------------------------- edit */

static Datum
edit_body(PG_FUNCTION_ARGS)
{
    static KnePlan insert = {"INSERT INTO kne.edit_request (model_id, subject, relation, object, options)"
                             " VALUES ($1, $2, $3, $4, $5) RETURNING edit_id",
                             5,
                             {INT4OID, TEXTOID, TEXTOID, TEXTOID, JSONBOID}};
    Datum values[5];
    kne_options options;
    KneModel *model;
    int64 edit_id;

    /*
     * The trigger checks too; here a mistake is reported without the context of a statement the user did not
     * write.
     */
    check_fact(PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0)),
               PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)),
               PG_ARGISNULL(2) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(2)));
    kne_options_from_jsonb(PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4), &options);
    kne_require_preload();
    model = kne_model_by_name(PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)));
    (void) kne_options_resolve(PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4), model->model_id, NULL, &options);
    kne_check_layers(&options, model);
    values[0] = Int32GetDatum(model->model_id);
    for (int i = 0; i < 3; i++)
        values[1 + i] = PG_GETARG_DATUM(i);
    values[4] = PG_ARGISNULL(4) ? (Datum) 0 : PG_GETARG_DATUM(4);
    kne_spi_connect();
    kne_spi(&insert, KNE_WRITE, values, PG_ARGISNULL(4) ? "    n" : NULL);
    edit_id = kne_spi_int8(0, 1);
    kne_spi_finish();
    PG_RETURN_INT64(edit_id);
}

Datum
kne_edit(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, edit_body);
}

/* ---------------------------------------------------------------- triggers */

static TriggerData *
row_trigger(FunctionCallInfo fcinfo, bool before, const char *table)
{
    TriggerData *trig = (TriggerData *) fcinfo->context;

    if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_ROW(trig->tg_event) ||
        !TRIGGER_FIRED_BY_INSERT(trig->tg_event) || (bool) TRIGGER_FIRED_BEFORE(trig->tg_event) != before ||
        RelationGetNamespace(trig->tg_relation) != get_namespace_oid("kne", true) ||
        strcmp(RelationGetRelationName(trig->tg_relation), table) != 0)
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
                        errmsg("this trigger function is for rows being inserted into kne.%s", table)));
    return trig;
}

static bool
column_null(TriggerData *trig, const char *name)
{
    bool isnull;

    (void) SPI_getbinval(trig->tg_trigtuple, trig->tg_relation->rd_att,
                         SPI_fnumber(trig->tg_relation->rd_att, name), &isnull);
    return isnull;
}

static Datum
column(TriggerData *trig, const char *name)
{
    bool isnull;

    return SPI_getbinval(trig->tg_trigtuple, trig->tg_relation->rd_att,
                         SPI_fnumber(trig->tg_relation->rd_att, name), &isnull);
}

static char *
column_text(TriggerData *trig, const char *name)
{
    return SPI_getvalue(trig->tg_trigtuple, trig->tg_relation->rd_att,
                        SPI_fnumber(trig->tg_relation->rd_att, name));
}

/* The values that a BEFORE trigger adds to its row. */
typedef struct Fill
{
    int n;
    int attnum[5];
    Datum value[5];
    bool isnull[5];
} Fill;

static void
fill_in(TriggerData *trig, Fill *f, const char *name, Datum value)
{
    f->attnum[f->n] = SPI_fnumber(trig->tg_relation->rd_att, name);
    f->value[f->n] = value;
    f->isnull[f->n++] = false;
}

static void
fill_null(TriggerData *trig, Fill *f, const char *name, Datum value)
{
    if (column_null(trig, name))
        fill_in(trig, f, name, value);
}

static Datum
filled(TriggerData *trig, Fill *f)
{
    return PointerGetDatum(f->n ? heap_modify_tuple_by_cols(trig->tg_trigtuple, trig->tg_relation->rd_att,
                                                            f->n, f->attnum, f->value, f->isnull)
                                : trig->tg_trigtuple);
}

/* The model that a row names by id, or the default. ERROR when there is none. */
static KneModel *
model_of(TriggerData *trig)
{
    return column_null(trig, "model_id") ? kne_model_by_name(NULL)
                                         : kne_model_by_id(DatumGetInt32(column(trig, "model_id")));
}

/*
 * A row without an origin is a new request: it is checked, and gets what the user left out. A row that has
 * one is history that a dump brought here, and is taken as it is, whatever this version would say about it
 * today.
 */
static Datum
request_before_body(PG_FUNCTION_ARGS)
{
    TriggerData *trig = row_trigger(fcinfo, true, "edit_request");
    Fill fill = {0};
    NameData *by;

    if (column_null(trig, "origin"))
    {
        kne_options options;
        KneModel *model;
        Jsonb *given, *resolved;
        char *state = column_text(trig, "state");

        check_fact(column_text(trig, "subject"), column_text(trig, "relation"), column_text(trig, "object"));
        given = column_null(trig, "options") ? NULL : DatumGetJsonbP(column(trig, "options"));
        kne_options_from_jsonb(given, &options);
        if (state && strcmp(state, "pending") != 0)
            ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                            errmsg("a new request must be pending, not %s", state)));
        kne_require_preload();
        model = model_of(trig);
        resolved = kne_options_resolve(given, model->model_id, NULL, &options);
        kne_check_layers(&options, model);
        fill_null(trig, &fill, "model_id", Int32GetDatum(model->model_id));
        if (resolved)
            fill_in(trig, &fill, "options", JsonbPGetDatum(resolved));
    }
    by = palloc0(sizeof *by);
    namestrcpy(by, kne_caller());
    fill_null(trig, &fill, "requested_by", NameGetDatum(by));
    fill_null(trig, &fill, "origin", UUIDPGetDatum(kne_origin()));
    fill_null(trig, &fill, "origin_database", ObjectIdGetDatum(MyDatabaseId));
    return filled(trig, &fill);
}

Datum
kne_request_before(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, request_before_body);
}

/* A pending request of this very database is new (a dump is restored into a database with another origin). */
static Datum
request_after_body(PG_FUNCTION_ARGS)
{
    TriggerData *trig = row_trigger(fcinfo, false, "edit_request");
    char *state = column_text(trig, "state");

    if (strcmp(state, "pending") == 0 && DatumGetObjectId(column(trig, "origin_database")) == MyDatabaseId &&
        memcmp(DatumGetUUIDP(column(trig, "origin")), kne_origin(), sizeof(pg_uuid_t)) == 0)
    {
        kne_event_user(DatumGetInt64(column(trig, "edit_id")), "requested", "reason", NULL);
        kne_warn_if_idle();
        kne_wake_at_commit();
    }
    return PointerGetDatum(NULL);
}

Datum
kne_request_after(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, request_after_body);
}

/*
 * Facts: what users tell begins now; what an edit made begins when its transaction commits (state.c). A row
 * that comes with its time is history.
 */
Datum
kne_fact_before(PG_FUNCTION_ARGS)
{
    TriggerData *trig = row_trigger(fcinfo, true, "fact");
    Fill fill = {0};

    if (column_null(trig, "valid_from"))
    {
        check_fact(column_text(trig, "subject"), column_text(trig, "relation"), column_text(trig, "object"));
        fill_null(trig, &fill, "model_id", Int32GetDatum(model_of(trig)->model_id));
        fill_null(trig, &fill, "valid_from",
                  TimestampTzGetDatum(column_null(trig, "edit_id") ? GetCurrentTimestamp() : DT_NOEND));
    }
    return filled(trig, &fill);
}

/* ---------------------------------------------------------------- one edit's row */

typedef struct Request
{
    int32 model_id;
    char *subject, *relation, *object, *state;
    bool in_base;
} Request;

/*
 * Lock the rows of the edit's fact, in order, and read the edit as it is then. ERROR when there is none. SPI
 * is connected.
 */
static void
lock_fact(int64 edit_id, Request *out)
{
    static KnePlan find = {
        "SELECT model_id, subject, relation FROM kne.edit_request WHERE edit_id = $1", 1, {INT8OID}};
    static KnePlan lock = {
        "SELECT edit_id FROM kne.edit_request WHERE model_id = $1 AND subject = $2 AND relation = $3"
        " ORDER BY edit_id FOR NO KEY UPDATE",
        3,
        {INT4OID, TEXTOID, TEXTOID}};
    static KnePlan read = {
        "SELECT model_id, subject, relation, object, state, " KNE_IN_BASE("r") " FROM kne.edit_request r WHERE edit_id = $1",
        1,
        {INT8OID}};
    Datum id = Int64GetDatum(edit_id), key[3];

    if (kne_spi(&find, KNE_WRITE, &id, NULL) == 0)
        kne_no_such_edit(edit_id);
    key[0] = Int32GetDatum(kne_spi_int4(0, 1));
    key[1] = CStringGetTextDatum(kne_spi_text(0, 2, CurrentMemoryContext));
    key[2] = CStringGetTextDatum(kne_spi_text(0, 3, CurrentMemoryContext));
    kne_spi(&lock, KNE_WRITE, key, NULL);
    if (kne_spi(&read, KNE_WRITE, &id, NULL) == 0)
        kne_no_such_edit(edit_id); /* its model was dropped while we waited */
    out->model_id = kne_spi_int4(0, 1);
    out->subject = kne_spi_text(0, 2, CurrentMemoryContext);
    out->relation = kne_spi_text(0, 3, CurrentMemoryContext);
    out->object = kne_spi_text(0, 4, CurrentMemoryContext);
    out->state = kne_spi_text(0, 5, CurrentMemoryContext);
    out->in_base = kne_spi_bool(0, 6);
}

/* The rows of many facts, in the order in which those of one are locked: two who want some of the same wait, and do not deadlock. */
void
kne_lock_facts(const int64 *edit_id, int n)
{
    static KnePlan lock = {
        "SELECT count(*) FROM (SELECT FROM kne.edit_request r WHERE (r.model_id, r.subject, r.relation) IN"
        " (SELECT e.model_id, e.subject, e.relation FROM kne.edit_request e WHERE e.edit_id = ANY ($1))"
        " ORDER BY r.edit_id FOR NO KEY UPDATE OF r) l",
        1,
        {INT8ARRAYOID}};
    Datum value = kne_int8_array(edit_id, n);

    kne_spi_connect();
    kne_spi(&lock, KNE_WRITE, &value, NULL);
    kne_spi_finish();
    pfree(DatumGetPointer(value));
}

/* ---------------------------------------------------------------- revert */

/* Put the newest superseded edit of the fact back in force; false when there is none. */
static bool
reinstate(const Request *r, int64 reverted)
{
    static KnePlan newest = {
        "SELECT q.edit_id, q.object, (SELECT max(generation) FROM kne.solution s WHERE s.edit_id = q.edit_id)"
        " FROM kne.edit_request q WHERE q.model_id = $1 AND q.subject = $2 AND q.relation = $3"
        " AND q.state = 'superseded' ORDER BY q.edit_id DESC LIMIT 1",
        3,
        {INT4OID, TEXTOID, TEXTOID}};
    static KnePlan apply = {"UPDATE kne.edit_request SET state = 'applied' WHERE edit_id = $1", 1, {INT8OID}};
    static KnePlan activate = {
        "INSERT INTO kne.activation (model_id, edit_id, generation) VALUES ($1, $2, $3)",
        3,
        {INT4OID, INT8OID, INT4OID}};
    static KnePlan fact = {
        "INSERT INTO kne.fact (model_id, subject, relation, object, edit_id) VALUES ($1, $2, $3, $4, $5)",
        5,
        {INT4OID, TEXTOID, TEXTOID, TEXTOID, INT8OID}};
    Datum values[5];
    char *object;
    Datum edit_id, generation;
    bool isnull;

    values[0] = Int32GetDatum(r->model_id);
    values[1] = CStringGetTextDatum(r->subject);
    values[2] = CStringGetTextDatum(r->relation);
    if (kne_spi(&newest, KNE_WRITE, values, NULL) == 0)
        return false;
    edit_id = Int64GetDatum(kne_spi_int8(0, 1));
    object = kne_spi_text(0, 2, CurrentMemoryContext);
    generation = kne_spi_datum(0, 3, &isnull);
    if (isnull)
        ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
                        errmsg("superseded edit " INT64_FORMAT " has no solution", DatumGetInt64(edit_id))));

    values[3] = CStringGetTextDatum(object);
    values[4] = edit_id;
    kne_spi(&fact, KNE_WRITE, values, NULL);
    values[1] = edit_id;
    values[2] = generation;
    kne_spi(&activate, KNE_WRITE, values, NULL);
    kne_spi(&apply, KNE_WRITE, &edit_id, NULL);
    kne_event_user(DatumGetInt64(edit_id), "reinstated", "reverted_edit", psprintf(INT64_FORMAT, reverted));
    return true;
}

static void
check_not_in_base(int64 edit_id, const Request *r)
{
    if (r->in_base)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("edit " INT64_FORMAT " is part of its model's base and cannot be reverted", edit_id),
                        errdetail("The model was rebased when the edit was in force."),
                        errhint("kne_edit asks for another object; kne.rebase has the folder of the earlier base.")));
}

void
kne_revert_edit(int64 edit_id, const char *reason)
{
    static KnePlan end_pair = {
        "UPDATE kne.activation SET valid_to = 'infinity' WHERE edit_id = $1 AND valid_to IS NULL",
        1,
        {INT8OID}};
    static KnePlan end_fact = {
        "UPDATE kne.fact SET valid_to = 'infinity' WHERE edit_id = $1 AND valid_to IS NULL", 1, {INT8OID}};
    static KnePlan set_state = {
        "UPDATE kne.edit_request SET state = 'reverted' WHERE edit_id = $1", 1, {INT8OID}};
    /* What was told last of the fact before an edit of it ended that: it has the stamp of the edit's coming into force. */
    static KnePlan give_back = {
        "INSERT INTO kne.fact (model_id, subject, relation, object, valid_from)"
        " SELECT DISTINCT f.model_id, f.subject, f.relation, f.object, 'infinity'::timestamptz"
        " FROM kne.fact f WHERE f.model_id = $2 AND f.subject = $3 AND f.relation = $4 AND f.edit_id IS NULL AND f.valid_to ="
        " (SELECT max(t.valid_to) FROM kne.fact t WHERE t.model_id = $2 AND t.subject = $3 AND t.relation = $4"
        " AND t.edit_id IS NULL AND t.valid_to IN (SELECT a.valid_from FROM kne.edit_request q"
        " JOIN kne.activation a ON a.edit_id = q.edit_id WHERE q.model_id = $2 AND q.subject = $3 AND q.relation = $4))"
        " AND $1 IS NOT NULL"
        " AND NOT EXISTS (SELECT FROM kne.fact t WHERE t.model_id = $2 AND t.subject = $3 AND t.relation = $4"
        " AND t.object = f.object AND t.valid_to IS NULL)",
        4,
        {INT8OID, INT4OID, TEXTOID, TEXTOID}};
    Request r;
    Datum values[4];

    kne_spi_connect();
    lock_fact(edit_id, &r);
    if (strcmp(r.state, "applied") != 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("edit " INT64_FORMAT " is not applied, so it cannot be reverted", edit_id),
                        errdetail("Its state is %s.", r.state),
                        strcmp(r.state, "pending") == 0 || strcmp(r.state, "running") == 0
                            ? errhint("kne_cancel takes back a request that has not finished.")
                            : 0));
    check_not_in_base(edit_id, &r);
    values[0] = Int64GetDatum(edit_id);
    kne_spi(&end_pair, KNE_WRITE, values, NULL);
    kne_spi(&end_fact, KNE_WRITE, values, NULL);
    kne_spi(&set_state, KNE_WRITE, values, NULL);
    kne_event_user(edit_id, "reverted", "reason", reason);
    if (!reinstate(&r, edit_id))
    {
        values[1] = Int32GetDatum(r.model_id);
        values[2] = CStringGetTextDatum(r.subject);
        values[3] = CStringGetTextDatum(r.relation);
        kne_spi(&give_back, KNE_WRITE, values, NULL);
    }
    kne_spi_finish();
}

static Datum
revert_body(PG_FUNCTION_ARGS)
{
    kne_revert_edit(edit_id_arg(fcinfo), PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)));
    PG_RETURN_VOID();
}

Datum
kne_revert(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, revert_body);
}

static int
id_order(const void *a, const void *b)
{
    int64 x = *(const int64 *) a, y = *(const int64 *) b;

    return (x > y) - (x < y);
}

/*
 * Many at once. Superseded edits go first, so that none of them comes back when its successor goes: what is reinstated is only
 * what was not named.
 */
int
kne_revert_edits(int64 *edit_id, int n, const char *reason)
{
    static KnePlan set_state = {
        "UPDATE kne.edit_request SET state = 'reverted' WHERE edit_id = $1", 1, {INT8OID}};
    MemoryContext one = AllocSetContextCreate(CurrentMemoryContext, "kne_revert_edits", ALLOCSET_DEFAULT_SIZES);
    int unique = 0;

    qsort(edit_id, n, sizeof(int64), id_order);
    for (int i = 0; i < n; i++)
        if (i == 0 || edit_id[i] != edit_id[i - 1])
            edit_id[unique++] = edit_id[i];
    kne_lock_facts(edit_id, unique);
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < unique; i++)
        {
            Request r;
            Datum id = Int64GetDatum(edit_id[i]);
            MemoryContext old = MemoryContextSwitchTo(one);

            CHECK_FOR_INTERRUPTS();
            kne_spi_connect();
            lock_fact(edit_id[i], &r);
            if (pass == 0 && strcmp(r.state, "superseded") == 0)
            {
                check_not_in_base(edit_id[i], &r);
                kne_spi(&set_state, KNE_WRITE, &id, NULL);
                kne_event_user(edit_id[i], "reverted", "reason", reason);
            }
            else if (pass == 0 && strcmp(r.state, "applied") != 0)
                ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                                errmsg("edit " INT64_FORMAT " is neither applied nor superseded, so it cannot be reverted", edit_id[i]),
                                errdetail("Its state is %s.", r.state)));
            else if (pass == 1 && strcmp(r.state, "applied") == 0)
                kne_revert_edit(edit_id[i], reason);
            kne_spi_finish();
            MemoryContextSwitchTo(old);
            MemoryContextReset(one);
        }
    MemoryContextDelete(one);
    return unique;
}

static Datum
revert_all_body(PG_FUNCTION_ARGS)
{
    char *reason = PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1));
    ArrayType *ids;
    int64 *edit_id;
    int n;

    if (PG_ARGISNULL(0))
        PG_RETURN_INT64(0); /* array_agg over no rows */
    ids = PG_GETARG_ARRAYTYPE_P(0);
    if (array_contains_nulls(ids))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("edit_ids must not contain nulls")));
    n = ArrayGetNItems(ARR_NDIM(ids), ARR_DIMS(ids));
    edit_id = palloc(sizeof(int64) * Max(n, 1));
    memcpy(edit_id, ARR_DATA_PTR(ids), sizeof(int64) * n);
    PG_RETURN_INT64(kne_revert_edits(edit_id, n, reason));
}

Datum
kne_revert_all(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, revert_all_body);
}

/* ---------------------------------------------------------------- cancel, retry, adopt */

/* The edit_ids of the last result. */
static int64 *
rows_of(uint64 n, uint64 *out)
{
    int64 *id = palloc(sizeof *id * Max(n, 1));

    for (uint64 i = 0; i < n; i++)
        id[i] = kne_spi_int8(i, 1);
    *out = n;
    return id;
}

bool
kne_cancel_edit(int64 edit_id)
{
#define CANCEL "UPDATE kne.edit_request SET state = 'cancelled', finished_at = clock_timestamp() WHERE state IN ('pending', 'running') AND "
    static KnePlan unit_of = {"SELECT unit FROM kne.edit_request WHERE edit_id = $1", 1, {INT8OID}};
    /* In the order in which a revert or a retry of the unit takes them: two who want the same unit wait, and do not deadlock. */
    static KnePlan lock = {"SELECT edit_id FROM kne.edit_request WHERE unit = $1 ORDER BY edit_id FOR NO KEY UPDATE", 1, {INT8OID}};
    /* Two statements, for plans that are good whatever is known of the table, into which thousands may just have been inserted. */
    static KnePlan whole = {CANCEL "unit = $1 RETURNING edit_id", 1, {INT8OID}};
    static KnePlan alone = {CANCEL "edit_id = $1 RETURNING edit_id", 1, {INT8OID}};
    Datum value = Int64GetDatum(edit_id), unit;
    bool no_unit;
    int64 *ids;
    uint64 n;

    kne_spi_connect();
    if (kne_spi(&unit_of, KNE_WRITE, &value, NULL) == 0)
        kne_no_such_edit(edit_id);
    unit = kne_spi_datum(0, 1, &no_unit);
    if (!no_unit)
        kne_spi(&lock, KNE_WRITE, &unit, NULL);
    ids = rows_of(no_unit ? kne_spi(&alone, KNE_WRITE, &value, NULL) : kne_spi(&whole, KNE_WRITE, &unit, NULL), &n);
    for (uint64 i = 0; i < n; i++)
        kne_event_user(ids[i], "cancelled", "reason", NULL);
    if (n > 0)
        kne_wake_at_commit(); /* the worker tells the engine to stop, and finds the row no longer running */
    kne_spi_finish();
    return n > 0;
}

static Datum
cancel_body(PG_FUNCTION_ARGS)
{
    PG_RETURN_BOOL(kne_cancel_edit(edit_id_arg(fcinfo)));
}

Datum
kne_cancel(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, cancel_body);
}

static void
retry_one(int64 edit_id)
{
    static KnePlan newer = {
        "SELECT edit_id FROM kne.edit_request WHERE model_id = $2 AND subject = $3 AND relation = $4"
        " AND state = 'applied' AND edit_id > $1",
        4,
        {INT8OID, INT4OID, TEXTOID, TEXTOID}};
    /* Who asks for it here wants it run here, wherever it was asked for first. */
    static KnePlan again = {
        "UPDATE kne.edit_request SET state = 'pending', attempts = 0, deaths = 0, not_before = NULL,"
        " error = NULL, started_at = NULL, finished_at = NULL, origin = $2, origin_database = $3"
        " WHERE edit_id = $1",
        3,
        {INT8OID, UUIDOID, OIDOID}};
    Request r;
    Datum values[4];

    kne_spi_connect();
    lock_fact(edit_id, &r);
    if (strcmp(r.state, "failed") != 0 && strcmp(r.state, "cancelled") != 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("edit " INT64_FORMAT " has neither failed nor been cancelled", edit_id),
                        errdetail("Its state is %s.", r.state)));
    values[0] = Int64GetDatum(edit_id);
    values[1] = Int32GetDatum(r.model_id);
    values[2] = CStringGetTextDatum(r.subject);
    values[3] = CStringGetTextDatum(r.relation);
    if (kne_spi(&newer, KNE_WRITE, values, NULL) > 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("a newer edit of that fact is applied"),
                        errdetail("Edit " INT64_FORMAT " is in force for (%s, %s).", kne_spi_int8(0, 1),
                                  r.subject, r.relation),
                        errhint("Ask anew with kne_edit, or revert the newer edit first.")));
    values[1] = UUIDPGetDatum(kne_origin());
    values[2] = ObjectIdGetDatum(MyDatabaseId);
    kne_spi(&again, KNE_WRITE, values, NULL);
    kne_event_user(edit_id, "requested", "retry_after", r.state);
    kne_spi_finish();
}

static Datum
retry_body(PG_FUNCTION_ARGS)
{
    static KnePlan unit = {"SELECT edit_id FROM (SELECT $1 UNION SELECT m.edit_id FROM kne.edit_request m JOIN kne.edit_request e"
                           " ON m.unit = e.unit WHERE e.edit_id = $1) u (edit_id) ORDER BY 1",
                           1,
                           {INT8OID}};
    int64 edit_id = edit_id_arg(fcinfo), *ids;
    Datum value = Int64GetDatum(edit_id);
    uint64 n;

    kne_spi_connect();
    ids = rows_of(kne_spi(&unit, KNE_WRITE, &value, NULL), &n);
    kne_lock_facts(ids, (int) n);
    for (uint64 i = 0; i < n; i++)
        retry_one(ids[i]);
    kne_spi_finish();
    kne_warn_if_idle();
    kne_wake_at_commit();
    PG_RETURN_VOID();
}

Datum
kne_retry(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, retry_body);
}

static Datum
adopt_body(PG_FUNCTION_ARGS)
{
    static KnePlan adopt = {
        "UPDATE kne.edit_request SET origin = $1, origin_database = $2, state = 'pending', not_before = NULL"
        " WHERE state IN ('pending', 'running') AND (origin <> $1 OR origin_database <> $2)"
        " RETURNING edit_id",
        2,
        {UUIDOID, OIDOID}};
    static KnePlan adopt_consolidation = {
        "UPDATE kne.consolidation SET origin = $1, origin_database = $2, state = 'pending', not_before = NULL"
        " WHERE state IN ('pending', 'running') AND (origin <> $1 OR origin_database <> $2)",
        2,
        {UUIDOID, OIDOID}};
    Datum values[2];
    uint64 n, consolidations;
    int64 *edit_id;

    values[0] = UUIDPGetDatum(kne_origin());
    values[1] = ObjectIdGetDatum(MyDatabaseId);
    kne_spi_connect();
    consolidations = kne_spi(&adopt_consolidation, KNE_WRITE, values, NULL);
    n = kne_spi(&adopt, KNE_WRITE, values, NULL);
    edit_id = palloc(sizeof *edit_id * Max(n, 1));
    for (uint64 i = 0; i < n; i++)
        edit_id[i] = kne_spi_int8(i, 1);
    for (uint64 i = 0; i < n; i++)
        kne_event_user(edit_id[i], "adopted", "reason", NULL);
    kne_spi_finish();
    n += consolidations;
    if (n > 0)
    {
        kne_warn_if_idle();
        kne_wake_at_commit();
    }
    PG_RETURN_INT64((int64) n);
}

Datum
kne_adopt(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, adopt_body);
}
