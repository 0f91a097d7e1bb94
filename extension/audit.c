/*
 * audit.c - history that shows tampering, edits that can be done again, and named instants: the trigger of kne.edit_event, kne_redo, kne_tag.
 *
 * Each event carries a digest of itself and of the event of the same edit that it follows, so that none can be changed or taken out
 * unseen but by doing the whole chain anew. The digest has no key: it shows mistakes and hands in the wrong place, not an owner of the
 * database who means to deceive; for that keep copies of the newest digests elsewhere.
 */
#include "kne_sql.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(kne_event_before);
PG_FUNCTION_INFO_V1(kne_redo);
PG_FUNCTION_INFO_V1(kne_tag);

static Datum
as_bytea(const uint8 *data, size_t len)
{
    bytea *b = palloc(VARHDRSZ + len);

    SET_VARSIZE(b, VARHDRSZ + len);
    memcpy(VARDATA(b), data, len);
    return PointerGetDatum(b);
}

/* ---------------------------------------------------------------- events */

/* Fills in what the event follows, and the digest; a row that has one is history that a dump or a publisher brought. */
Datum
kne_event_before(PG_FUNCTION_ARGS)
{
    static KnePlan last = {
        "SELECT max(event_id) FROM kne.edit_event WHERE edit_id = $1", 1, {INT8OID}};
    static KnePlan digest = {
        "SELECT kne.event_digest((SELECT digest FROM kne.edit_event WHERE event_id = $1), $2, $3, $4, $5, $6, $7)",
        7,
        {INT8OID, INT8OID, INT8OID, TEXTOID, TIMESTAMPTZOID, NAMEOID, JSONBOID}};
    static const char *const columns[] = {"event_id", "edit_id", "event", "at", "by", "detail"};
    TriggerData *trig = (TriggerData *) fcinfo->context;
    TupleDesc desc;
    Datum values[7], fill[2];
    char nulls[8] = "       ";
    bool isnull, no[2] = {false, false};
    int attnum[2];
    HeapTuple row;

    if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trig->tg_event) || !TRIGGER_FIRED_FOR_ROW(trig->tg_event) ||
        !TRIGGER_FIRED_BY_INSERT(trig->tg_event))
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
                        errmsg("function \"event_before\" must be fired before a row is inserted")));
    desc = RelationGetDescr(trig->tg_relation);
    attnum[0] = SPI_fnumber(desc, "follows");
    attnum[1] = SPI_fnumber(desc, "digest");
    (void) heap_getattr(trig->tg_trigtuple, attnum[1], desc, &isnull);
    if (!isnull)
        return PointerGetDatum(trig->tg_trigtuple);
    for (int i = 0; i < 6; i++)
    {
        values[1 + i] = heap_getattr(trig->tg_trigtuple, SPI_fnumber(desc, columns[i]), desc, &isnull);
        nulls[1 + i] = isnull ? 'n' : ' ';
    }
    kne_spi_connect();
    kne_spi(&last, KNE_WRITE, &values[2], NULL);
    values[0] = fill[0] = kne_spi_datum(0, 1, &no[0]);
    nulls[0] = no[0] ? 'n' : ' ';
    kne_spi(&digest, KNE_WRITE, values, nulls);
    fill[1] = kne_spi_datum(0, 1, &no[1]);
    row = heap_modify_tuple_by_cols(trig->tg_trigtuple, desc, 2, attnum, fill, no);
    row = SPI_copytuple(row);
    kne_spi_finish();
    return PointerGetDatum(row);
}

/* ---------------------------------------------------------------- tags */

static Datum
tag_body(PG_FUNCTION_ARGS)
{
    static KnePlan insert = {"INSERT INTO kne.tag (model_id, name, at, by, note) VALUES ($1, $2, $3, $4::name, $5)",
                             5,
                             {INT4OID, TEXTOID, TIMESTAMPTZOID, TEXTOID, TEXTOID}};
    Datum values[5];
    KneModel *model;

    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("name of a tag must not be null")));
    model = kne_model_by_name(PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)));
    values[0] = Int32GetDatum(model->model_id);
    values[1] = PG_GETARG_DATUM(0);
    values[2] = TimestampTzGetDatum(kne_stamp_of(model->model_id));
    values[3] = CStringGetTextDatum(kne_caller());
    values[4] = PG_ARGISNULL(2) ? (Datum) 0 : PG_GETARG_DATUM(2);
    kne_spi_connect();
    kne_spi(&insert, KNE_WRITE, values, PG_ARGISNULL(2) ? "    n" : NULL);
    kne_spi_finish();
    return values[2];
}

/* What this transaction changed, and changes after this, is at the same instant, and nobody else's is. */
Datum
kne_tag(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, tag_body);
}

/* ---------------------------------------------------------------- doing an edit again */

static void
put_hex(StringInfo s, const uint8 *d)
{
    for (int i = 0; i < 32; i++)
        appendStringInfo(s, "%02x", d[i]);
}

char *
kne_what_was_asked(const KneView *view, const char *options, const int64 *edit_id, int n, const void *body, size_t len)
{
    static KnePlan last = {
        "SELECT to_json(greatest((SELECT max(valid_from) FROM kne.activation WHERE model_id = $1 AND valid_from < 'infinity'),"
        " (SELECT max(valid_to) FROM kne.activation WHERE model_id = $1 AND valid_to < 'infinity')))::text",
        1,
        {INT4OID}};
    Datum value = Int32GetDatum(view->model->model_id);
    StringInfoData s;
    uint8 digest[32];
    char *at;

    kne_spi_connect();
    kne_spi(&last, KNE_READ, &value, NULL);
    initStringInfo(&s); /* in SPI's context: copied below */
    at = kne_spi_text(0, 1, CurrentMemoryContext);
    appendStringInfo(&s, "{\"model_fingerprint\": \"%s\", \"set\": \"", view->model->fingerprint);
    put_hex(&s, view->set_digest);
    appendStringInfo(&s, "\", \"set_at\": %s, \"request\": \"", view->n && at ? at : "null");
    kne_sha256_of(body, len, digest);
    put_hex(&s, digest);
    appendStringInfoString(&s, "\", \"asked\": ");
    escape_json(&s, options ? options : "");
    appendStringInfoString(&s, ", \"batch\": [");
    for (int i = 0; i < n; i++)
        appendStringInfo(&s, "%s" INT64_FORMAT, i ? ", " : "", edit_id[i]);
    appendStringInfoString(&s, "]}");
    at = SPI_palloc(s.len + 1);
    memcpy(at, s.data, s.len + 1);
    kne_spi_finish();
    return at;
}

/* One solution that is to be done again, and all that was solved with it. */
typedef struct Redo
{
    KneModel *model;
    char *set, *request, *options;
    TimestampTz at; /* KNE_NOW: no edits */
    int n;
    KneEditSpec *edit;
    int64 *without;
    int n_without;
} Redo;

static void
read_redo(int64 edit_id, int32 generation, Redo *r)
{
    static KnePlan what = {
        "SELECT s.model_id, s.provenance ->> 'set', s.provenance ->> 'request', (s.provenance ->> 'set_at')::timestamptz, nullif(s.provenance ->> 'asked', ''),"
        " EXISTS (SELECT FROM kne.solution t WHERE t.edit_id = $1 AND t.generation = $2 AND t.provenance ->> 'model_fingerprint' <> m.fingerprint)"
        " FROM kne.solution s JOIN kne.model m ON m.model_id = s.model_id"
        " WHERE s.edit_id = $1 AND s.generation = $2",
        2,
        {INT8OID, INT4OID}};
    static KnePlan batch = {
        "SELECT q.edit_id, q.subject, q.relation, q.object FROM kne.solution s,"
        " jsonb_array_elements_text(s.provenance -> 'batch') WITH ORDINALITY b (id, place) JOIN kne.edit_request q ON q.edit_id = b.id::bigint"
        " WHERE s.edit_id = $1 AND s.generation = $2 ORDER BY place",
        2,
        {INT8OID, INT4OID}};
    static KnePlan same_facts = {
        "SELECT DISTINCT q.edit_id FROM kne.solution s, jsonb_array_elements_text(s.provenance -> 'batch') b"
        " JOIN kne.edit_request e ON e.edit_id = b::bigint JOIN kne.edit_request q ON q.model_id = e.model_id AND q.subject = e.subject"
        " AND q.relation = e.relation WHERE s.edit_id = $1 AND s.generation = $2",
        2,
        {INT8OID, INT4OID}};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum values[2], at;
    bool isnull;
    int32 model_id;

    values[0] = Int64GetDatum(edit_id);
    values[1] = Int32GetDatum(generation);
    kne_spi_connect();
    if (kne_spi(&what, KNE_READ, values, NULL) == 0)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
                        errmsg("edit " INT64_FORMAT " has no solution of generation %d", edit_id, generation),
                        errhint("SELECT edit_id, generation FROM kne.solution lists the solutions.")));
    model_id = kne_spi_int4(0, 1);
    r->set = kne_spi_text(0, 2, mcxt);
    r->request = kne_spi_text(0, 3, mcxt);
    at = kne_spi_datum(0, 4, &isnull);
    r->at = isnull ? KNE_NOW : DatumGetTimestampTz(at);
    r->options = kne_spi_text(0, 5, mcxt);
    if (kne_spi_bool(0, 6))
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("edit " INT64_FORMAT " was solved on another model", edit_id)));
    if (!r->set || !r->request)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("the provenance of edit " INT64_FORMAT " does not say what it was solved on", edit_id)));
    r->n = (int) kne_spi(&batch, KNE_READ, values, NULL);
    r->edit = MemoryContextAllocZero(mcxt, sizeof(KneEditSpec) * Max(r->n, 1));
    for (int i = 0; i < r->n; i++)
    {
        r->edit[i].edit_id = kne_spi_int8(i, 1);
        r->edit[i].subject = kne_spi_text(i, 2, mcxt);
        r->edit[i].relation = kne_spi_text(i, 3, mcxt);
        r->edit[i].object = kne_spi_text(i, 4, mcxt);
    }
    r->n_without = (int) kne_spi(&same_facts, KNE_READ, values, NULL);
    r->without = MemoryContextAlloc(mcxt, sizeof(int64) * Max(r->n_without, 1));
    for (int i = 0; i < r->n_without; i++)
        r->without[i] = kne_spi_int8(i, 1);
    kne_spi_finish();
    r->model = kne_model_by_id(model_id);
}

static bool
is_digest(const uint8 *d, const char *hex)
{
    StringInfoData s;

    initStringInfo(&s);
    put_hex(&s, d);
    return strcmp(s.data, hex) == 0;
}

/* Reads over n * (i32, i32, ...) of the answer: what the rows are their digest says. */
static void
skip_items(kne_rbuf *b, size_t fixed, size_t least)
{
    uint32 n = kne_get_count(b, least);

    for (uint32 i = 0; i < n && !b->bad; i++)
    {
        (void) kne_get(b, fixed);
        (void) kne_get(b, (size_t) kne_get_count(b, 4) * 4);
    }
}

/*
 * The whole batch is solved again, for its edits share every pass. Nothing is written. What it was solved on must be there: the set, and
 * known facts, prompts and paraphrases as they were then.
 */
Datum
kne_redo(PG_FUNCTION_ARGS)
{
    /* Edits that were consolidated together need not have the same generation. */
    static KnePlan stored = {
        "SELECT t.digest FROM kne.solution s JOIN kne.solution t ON t.consolidation_id IS NOT DISTINCT FROM s.consolidation_id"
        " AND (s.consolidation_id IS NOT NULL OR t.generation = s.generation)"
        " WHERE s.edit_id = $2 AND s.generation = $3 AND t.edit_id = $1",
        3,
        {INT8OID, INT8OID, INT4OID}};
    static const char *const outcomes[] = {"applied", "holds", "failed", "cancelled"}; /* enum kne_outcome */
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    int32 generation;
    uint8 digest[32];
    Redo r;
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    kne_rbuf *b = &reply.body;
    size_t after_view, len;
    uint32 n;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        return (Datum) 0;
    generation = PG_GETARG_INT32(1);
    kne_require_preload();
    read_redo(PG_GETARG_INT64(0), generation, &r);
    view = r.at == KNE_NOW ? kne_view_base(r.model) : kne_view_get(r.model, r.at, r.without, r.n_without);
    if (!is_digest(view->set_digest, r.set))
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("the edits that edit " INT64_FORMAT " was solved on are not there any more", PG_GETARG_INT64(0)),
                        errdetail("Rows of kne.activation or kne.solution were changed or deleted.")));
    kne_wbuf_init(&w);
    kne_put_view(&w, view);
    after_view = w.len;
    kne_put_edit_body(&w, r.model, r.options, r.n, r.edit);
    kne_sha256_of(w.p + after_view, w.len - after_view, digest);
    if (!is_digest(digest, r.request))
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("what protected other facts when edit " INT64_FORMAT " was solved has changed", PG_GETARG_INT64(0)),
                        errdetail("Facts in force, prompts or paraphrases are others now."),
                        errhint("Put them as they were in a transaction that is rolled back: revert later edits there, then call kne_redo.")));
    kne_call_view(view, KNE_MSG_EDIT, &w, NULL, NULL, &reply);
    (void) kne_get_bytes(b, &len); /* provenance */
    (void) kne_get(b, 16);
    n = kne_get_count(b, 1);
    for (uint32 i = 0; i < n && !b->bad; i++)
    {
        Datum values[4], key[3]; /* edit_id, outcome, same, digest */
        bool nulls[4] = {false}, isnull = true;
        uint8 outcome;
        const uint8 *made;

        key[0] = values[0] = Int64GetDatum(kne_get_i64(b));
        key[1] = PG_GETARG_DATUM(0);
        key[2] = Int32GetDatum(generation);
        outcome = kne_get_u8(b);
        values[1] = CStringGetTextDatum(outcome < lengthof(outcomes) ? outcomes[outcome] : "unknown");
        (void) kne_get_bytes(b, &len);      /* message */
        (void) kne_get(b, 4 + 8 + 8 + 8);   /* steps, probabilities, norm */
        (void) kne_get_bytes(b, &len);      /* answer before */
        skip_items(b, 4 + 4 + 4, 16);       /* ensemble */
        made = kne_get(b, 32);
        skip_items(b, 4 + 4 + 1, 13);       /* rows */
        if (b->bad)
            break;
        values[3] = as_bytea(made, 32);
        kne_spi_connect();
        if (kne_spi(&stored, KNE_READ, key, NULL) > 0)
        {
            bytea *was = DatumGetByteaPP(kne_spi_datum(0, 1, &isnull));

            values[2] = BoolGetDatum(!isnull && VARSIZE_ANY_EXHDR(was) == 32 && memcmp(VARDATA_ANY(was), made, 32) == 0);
        }
        kne_spi_finish();
        nulls[2] = isnull; /* it had failed then: there is nothing to compare */
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
    }
    (void) kne_get(b, (size_t) kne_get_count(b, 4) * 4); /* facts disturbed */
    kne_reply_done(&reply);
    return (Datum) 0;
}
