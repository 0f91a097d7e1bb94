/*
 * state.c - what the SQL surface and the worker both need to change an edit's state: prepared statements,
 * events, the lock of a model's active set and the stamps under it.
 *
 * Stamps. kne.activation says which edits were in force when, and as_of reads it. A clock reading inside a
 * transaction would not do: a transaction that reads the clock first may commit last, and then an as_of
 * between the two readings would show a state that never was. So rows are written with the provisional time
 * 'infinity', and a deferred trigger replaces it just before commit, under a lock that lasts until the
 * transaction has ended: stamps are in commit order, and greater than any earlier stamp of the model even
 * when the clock went backwards. All rows that one transaction changes of a model get the same stamp. Rows
 * that come with a time (a restored dump) keep it: only INSERTs of 'infinity' and UPDATEs that end a row
 * queue the trigger (see the WHEN clauses in kne--X.Y.sql), and the trigger's own updates are neither.
 */
#include "kne_sql.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(kne_stamp);

#define FACT_HINT "For example: 'France', 'capital', 'Paris'."
#define MAX_OPTION_BYTES 60 /* of a name or a word among the options */

/* ---------------------------------------------------------------- statements */

void
kne_spi_connect(void)
{
    int rc = SPI_connect();

    if (rc != SPI_OK_CONNECT)
        elog(ERROR, "SPI_connect: %s", SPI_result_code_string(rc));
}

void
kne_spi_finish(void)
{
    int rc = SPI_finish();

    if (rc != SPI_OK_FINISH)
        elog(ERROR, "SPI_finish: %s", SPI_result_code_string(rc));
}

uint64
kne_spi(KnePlan *p, KneLook look, Datum *values, const char *nulls)
{
    int rc;

    if (p->plan == NULL)
    {
        SPIPlanPtr plan = SPI_prepare(p->sql, p->nargs, p->types);

        if (plan == NULL)
            elog(ERROR, "SPI_prepare: %s: %s", SPI_result_code_string(SPI_result), p->sql);
        rc = SPI_keepplan(plan);
        if (rc != 0)
            elog(ERROR, "SPI_keepplan: %s", SPI_result_code_string(rc));
        p->plan = plan;
    }
    if (look == KNE_LATEST)
        rc = SPI_execute_snapshot(p->plan, values, nulls, GetLatestSnapshot(), InvalidSnapshot,
                                  true, true, 0);
    else
        rc = SPI_execute_plan(p->plan, values, nulls, look == KNE_READ, 0);
    if (rc < 0)
        elog(ERROR, "SPI: %s: %s", SPI_result_code_string(rc), p->sql);
    return SPI_processed;
}

Datum
kne_spi_datum(uint64 row, int col, bool *isnull)
{
    return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, isnull);
}

static Datum
not_null(uint64 row, int col)
{
    bool isnull;
    Datum d = kne_spi_datum(row, col, &isnull);

    if (isnull)
        elog(ERROR, "column %d of a kne table is null where it cannot be", col);
    return d;
}

int64
kne_spi_int8(uint64 row, int col)
{
    return DatumGetInt64(not_null(row, col));
}

int32
kne_spi_int4(uint64 row, int col)
{
    return DatumGetInt32(not_null(row, col));
}

bool
kne_spi_bool(uint64 row, int col)
{
    bool isnull;
    Datum d = kne_spi_datum(row, col, &isnull);

    return !isnull && DatumGetBool(d);
}

char *
kne_spi_text(uint64 row, int col, MemoryContext mcxt)
{
    char *s = SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col);

    return s ? MemoryContextStrdup(mcxt, s) : NULL;
}

/* ---------------------------------------------------------------- who */

static Oid asked_by = InvalidOid;

Oid
kne_caller_id(void)
{
    return OidIsValid(asked_by) ? asked_by : GetOuterUserId();
}

const char *
kne_caller(void)
{
    return GetUserNameFromId(kne_caller_id(), false);
}

static Oid
owner_of(Oid function)
{
    HeapTuple tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
    Oid owner;

    if (!HeapTupleIsValid(tuple))
        elog(ERROR, "cache lookup failed for function %u", function);
    owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
    ReleaseSysCache(tuple);
    return owner;
}

Datum
kne_as_owner(FunctionCallInfo fcinfo, PGFunction body)
{
    Oid owner = owner_of(fcinfo->flinfo->fn_oid), before = asked_by, user;
    int sec_context;
    Datum result;

    GetUserIdAndSecContext(&user, &sec_context);
    PG_TRY();
    {
        /* A trigger of kne under a function of kne: the function's caller asked for it. */
        if (!OidIsValid(asked_by))
            asked_by = user;
        SetUserIdAndSecContext(owner, sec_context | SECURITY_LOCAL_USERID_CHANGE);
        result = body(fcinfo);
    }
    PG_FINALLY();
    {
        asked_by = before;
        SetUserIdAndSecContext(user, sec_context);
    }
    PG_END_TRY();
    return result;
}

pg_uuid_t *
kne_origin(void)
{
    static KnePlan plan = {"SELECT origin FROM kne.instance"};
    /* A batch asks once a row; within a transaction and an installation the answer stays. */
    static LocalTransactionId known_in = InvalidLocalTransactionId;
    static Oid known_of = InvalidOid;
    static pg_uuid_t known;
    Oid schema = get_namespace_oid("kne", false);
    pg_uuid_t *out = palloc(sizeof *out);

    if (known_in == InvalidLocalTransactionId || known_in != KNE_LXID || known_of != schema)
    {
        kne_spi_connect();
        if (kne_spi(&plan, KNE_READ, NULL, NULL) != 1)
            ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED), errmsg("kne.instance has lost its row"),
                            errhint("INSERT INTO kne.instance (database) SELECT oid FROM pg_database"
                                    " WHERE datname = current_database() makes this a new origin.")));
        known = *DatumGetUUIDP(not_null(0, 1));
        kne_spi_finish();
        known_in = KNE_LXID;
        known_of = schema;
    }
    *out = known;
    return out;
}

/* ---------------------------------------------------------------- events */

void
kne_event(int64 edit_id, const char *event, const char *detail_json)
{
    static KnePlan plan = {
        "INSERT INTO kne.edit_event (edit_id, event, by, detail) VALUES ($1, $2, $3::name, $4::jsonb)",
        4,
        {INT8OID, TEXTOID, TEXTOID, TEXTOID}};
    Datum values[4];

    values[0] = Int64GetDatum(edit_id);
    values[1] = CStringGetTextDatum(event);
    values[2] = CStringGetTextDatum(kne_caller());
    values[3] = detail_json ? CStringGetTextDatum(detail_json) : (Datum) 0;
    kne_spi_connect();
    kne_spi(&plan, KNE_WRITE, values, detail_json ? NULL : "   n");
    kne_spi_finish();
}

void
kne_event_user(int64 edit_id, const char *event, const char *key, const char *value)
{
    static KnePlan plan = {
        "INSERT INTO kne.edit_event (edit_id, event, by, detail) VALUES ($1, $2, $3::name, jsonb_strip_nulls("
        "jsonb_build_object('session_user', session_user, 'current_user', $3, 'application_name',"
        " nullif(current_setting('application_name'), ''), 'client', host(inet_client_addr()),"
        " 'xid', pg_current_xact_id()::text, $4, $5)))",
        5,
        {INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}};
    Datum values[5];

    values[0] = Int64GetDatum(edit_id);
    values[1] = CStringGetTextDatum(event);
    values[2] = CStringGetTextDatum(kne_caller());
    values[3] = CStringGetTextDatum(key);
    values[4] = value ? CStringGetTextDatum(value) : (Datum) 0;
    kne_spi_connect();
    kne_spi(&plan, KNE_WRITE, values, value ? NULL : "    n");
    kne_spi_finish();
}

/* ---------------------------------------------------------------- the model's lock */

/*
 * A heavyweight lock on (class kne.model, object model_id): users have no statement that takes it, it waits
 * and is found in deadlocks like any other, is shown in pg_locks, and lasts until the transaction ends.
 */
static LockAcquireResult
acquire(int32 model_id, bool wait)
{
    LOCKTAG tag;
    Oid class_id = get_relname_relid("model", get_namespace_oid("kne", false));

    if (!OidIsValid(class_id))
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE), errmsg("relation \"kne.model\" does not exist")));
    SET_LOCKTAG_OBJECT(tag, MyDatabaseId, class_id, (Oid) model_id, 0);
    return LockAcquire(&tag, ExclusiveLock, false, !wait);
}

bool
kne_lock_model(int32 model_id, bool wait)
{
    return acquire(model_id, wait) != LOCKACQUIRE_NOT_AVAIL;
}

/* ---------------------------------------------------------------- stamps */

typedef struct Stamp
{
    int32 model_id;
    TimestampTz at;
} Stamp;

/* The stamp of this transaction for a model: the first caller of the transaction takes the lock and the time.
 */
TimestampTz
kne_stamp_of(int32 model_id)
{
    static KnePlan last = {
        "SELECT greatest((SELECT max(valid_from) FROM kne.activation WHERE model_id = $1"
        " AND valid_from < 'infinity'),"
        " (SELECT max(valid_to) FROM kne.activation WHERE model_id = $1 AND valid_to < 'infinity'),"
        " (SELECT max(at) FROM kne.tag WHERE model_id = $1))",
        1,
        {INT4OID}};
    static LocalTransactionId stamps_of = InvalidLocalTransactionId;
    static List *stamps; /* of Stamp, in TopTransactionContext */
    LockAcquireResult got = acquire(model_id, true);
    Stamp *stamp = NULL;
    MemoryContext old;
    ListCell *lc;
    Datum value = Int32GetDatum(model_id);
    bool isnull;
    Datum d;

    if (stamps_of != KNE_LXID)
    {
        stamps = NIL; /* its memory went with its transaction */
        stamps_of = KNE_LXID;
    }
    foreach (lc, stamps)
        if (((Stamp *) lfirst(lc))->model_id == model_id)
            stamp = (Stamp *) lfirst(lc);

    /* A stamp is good as long as the lock has been held: a savepoint that was rolled back let go of both. */
    if (stamp && got == LOCKACQUIRE_ALREADY_HELD)
        return stamp->at;
    if (!stamp)
    {
        old = MemoryContextSwitchTo(TopTransactionContext);
        stamp = palloc(sizeof *stamp);
        stamp->model_id = model_id;
        stamps = lappend(stamps, stamp);
        MemoryContextSwitchTo(old);
    }

    /* The transaction that held the lock before has committed, but this one's snapshot may be older. */
    kne_spi_connect();
    kne_spi(&last, KNE_LATEST, &value, NULL);
    d = kne_spi_datum(0, 1, &isnull);
    stamp->at = GetCurrentTimestamp();
    if (!isnull && DatumGetTimestampTz(d) >= stamp->at)
        stamp->at = DatumGetTimestampTz(d) + 1;
    kne_spi_finish();
    return stamp->at;
}

/* Deferred trigger of kne.activation and kne.fact; see the head of this file. */
Datum
kne_stamp(PG_FUNCTION_ARGS)
{
    static KnePlan plans[2][2] = {
        {{"UPDATE kne.activation SET valid_from = $2 WHERE activation_id = $1 AND valid_from = 'infinity'",
          2,
          {INT8OID, TIMESTAMPTZOID}},
         {"UPDATE kne.activation SET valid_to = $2 WHERE activation_id = $1 AND valid_to IS NOT NULL",
          2,
          {INT8OID, TIMESTAMPTZOID}}},
        {{"UPDATE kne.fact SET valid_from = $2 WHERE fact_id = $1 AND valid_from = 'infinity'",
          2,
          {INT8OID, TIMESTAMPTZOID}},
         {"UPDATE kne.fact SET valid_to = $2 WHERE fact_id = $1 AND valid_to IS NOT NULL",
          2,
          {INT8OID, TIMESTAMPTZOID}}}};
    TriggerData *trig = (TriggerData *) fcinfo->context;
    TupleDesc desc;
    Datum values[2];
    Datum model_id;
    bool ends, is_fact, isnull;

    if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trig->tg_event) ||
        !TRIGGER_FIRED_FOR_ROW(trig->tg_event))
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
                        errmsg("function \"stamp\" must be fired after a row changed")));
    ends = TRIGGER_FIRED_BY_UPDATE(trig->tg_event);
    is_fact = strcmp(RelationGetRelationName(trig->tg_relation), "fact") == 0;
    desc = RelationGetDescr(trig->tg_relation);

    values[0] = SPI_getbinval(trig->tg_trigtuple, desc,
                              SPI_fnumber(desc, is_fact ? "fact_id" : "activation_id"), &isnull);
    model_id = SPI_getbinval(trig->tg_trigtuple, desc, SPI_fnumber(desc, "model_id"), &isnull);
    values[1] = TimestampTzGetDatum(kne_stamp_of(DatumGetInt32(model_id)));
    kne_spi_connect();
    kne_spi(&plans[is_fact][ends], KNE_WRITE, values, NULL);
    kne_spi_finish();
    return PointerGetDatum(NULL);
}

/* ---------------------------------------------------------------- checks of arguments */

void
kne_check_text(const char *what, const char *text)
{
    if (text == NULL)
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s must not be null", what),
                        errdetail("A fact has a subject, a relation and an object."), errhint(FACT_HINT)));
    if (text[strspn(text, " \t\r\n\v\f")] == '\0')
        ereport(
            ERROR,
            (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s must not be empty", what),
             errdetail("A fact has a subject, a relation and an object, each with a visible character."),
             errhint(FACT_HINT)));
}

pg_noreturn static void
throw_err(const kne_err *err)
{
    ereport(ERROR,
            (errcode(kne_sqlstate(err->code)), errmsg("%s", err->msg),
             err->detail[0] ? errdetail("%s", err->detail) : 0,
             errhint("%s", err->hint[0] ? err->hint : "Leave the option out for its default.")));
    pg_unreachable();
}

/*
 * A string of JSON, as long as an option's name or value may be and somewhat longer, so that an error message shows it in
 * whole: one cut in the midst of a character would be no text.
 */
static char *
clipped(const JsonbValue *v)
{
    return pnstrdup(v->val.string.val, pg_mbcliplen(v->val.string.val, v->val.string.len, MAX_OPTION_BYTES));
}

/* `strict`: ERROR for what the table does not allow; else it is passed by. */
static void
options_of(Jsonb *j, bool strict, kne_options *out)
{
    JsonbIterator *it;
    JsonbIteratorToken token;
    JsonbValue v;
    kne_err err = {0};

    kne_options_defaults(out);
    if (j == NULL)
        return;
    if (!JB_ROOT_IS_OBJECT(j) && !strict)
        return;
    if (!JB_ROOT_IS_OBJECT(j))
        ereport(ERROR,
                (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("edit options must be a JSON object"),
                 errdetail("Its keys are names of options."), errhint("For example: '{\"max_steps\": 50}'.")));
    it = JsonbIteratorInit(&j->root);
    while ((token = JsonbIteratorNext(&it, &v, true)) != WJB_DONE)
    {
        char *name, *string = NULL;
        double number = 0;
        kne_json_kind kind = KNE_JSON_OTHER;

        if (token != WJB_KEY)
            continue;
        name = clipped(&v);
        JsonbIteratorNext(&it, &v, true);
        if (v.type == jbvNumeric)
        {
            kind = KNE_JSON_NUMBER;
            /* By text: 1e400 is then out of the option's range, not of the type's. */
            number = strtod(DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(v.val.numeric))),
                            NULL);
        }
        else if (v.type == jbvString)
        {
            kind = KNE_JSON_STRING;
            string = clipped(&v);
        }
        else if (v.type == jbvBool)
        {
            kind = KNE_JSON_BOOL;
            number = v.val.boolean ? 1 : 0;
        }
        if (strcmp(name, "profile") == 0)
        {
            if (kind != KNE_JSON_STRING && strict)
                ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("edit option \"profile\" must be a string"),
                                errdetail("It names a row of kne.profile.")));
            continue;
        }
        if (kne_option_set(out, name, kind, number, string, &err) != KNE_OK && strict)
            throw_err(&err);
    }
    if (strict && kne_options_check(out, &err) != KNE_OK)
        throw_err(&err);
}

void
kne_options_from_jsonb(Jsonb *j, kne_options *out)
{
    options_of(j, true, out);
}

char *
kne_options_profile(Jsonb *j)
{
    JsonbValue *v = j ? getKeyJsonValueFromContainer(&j->root, "profile", strlen("profile"), NULL) : NULL;

    return v && v->type == jbvString ? pnstrdup(v->val.string.val, v->val.string.len) : NULL;
}

static Jsonb *
jsonb_of(const char *json)
{
    return json && json[0] ? DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json))) : NULL;
}

void
kne_options_from_text(const char *json, kne_options *out)
{
    options_of(jsonb_of(json), true, out);
}

void
kne_options_known(const char *json, kne_options *out)
{
    options_of(jsonb_of(json), false, out);
}

void
kne_put_text(kne_wbuf *w, const char *s)
{
    char *utf8 = pg_server_to_any(s, strlen(s), PG_UTF8);

    kne_put_str(w, utf8);
    if (utf8 != s)
        pfree(utf8);
}
