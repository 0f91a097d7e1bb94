/*
 * read.c - the functions that ask a model: complete, logprob, next_tokens, knows, locate, tokenize,
 * detokenize.
 *
 * Each is a message to the engine that begins with the view of the caller's snapshot (view.c), so the answer
 * is of exactly the edits that the calling query sees. NULL in, NULL out, as with SQL's own functions.
 * Nothing here writes.
 */
#include "kne_sql.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(kne_complete);
PG_FUNCTION_INFO_V1(kne_logprob);
PG_FUNCTION_INFO_V1(kne_next_tokens);
PG_FUNCTION_INFO_V1(kne_knows);
PG_FUNCTION_INFO_V1(kne_knows_all);
PG_FUNCTION_INFO_V1(kne_locate);
PG_FUNCTION_INFO_V1(kne_tokenize);
PG_FUNCTION_INFO_V1(kne_detokenize);

/* ---------------------------------------------------------------- arguments */

static char *
text_arg(FunctionCallInfo fcinfo, int n)
{
    return PG_ARGISNULL(n) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(n));
}

TimestampTz
kne_as_of_arg(FunctionCallInfo fcinfo, int n)
{
    TimestampTz t;

    if (PG_ARGISNULL(n))
        return KNE_NOW;
    t = PG_GETARG_TIMESTAMPTZ(n);
    if (TIMESTAMP_NOT_FINITE(t))
        ereport(ERROR, (errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE), errmsg("as_of must be finite"),
                        errdetail("It is %s.", timestamptz_to_str(t)),
                        errhint("Leave it out, or pass NULL, for the present.")));
    if (t > GetCurrentTimestamp())
        ereport(ERROR,
                (errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE), errmsg("as_of must not be in the future"),
                 errdetail("It is %s.", timestamptz_to_str(t)),
                 errhint("Leave it out, or pass NULL, for the present.")));
    return t;
}

KneView *
kne_view_args(FunctionCallInfo fcinfo, int model, int as_of)
{
    kne_require_preload();
    return kne_view_for_read(text_arg(fcinfo, model), kne_as_of_arg(fcinfo, as_of));
}

/* The model alone, for what no edit changes. */
static KneView *
base_arg(FunctionCallInfo fcinfo, int model)
{
    KneView *view;

    kne_require_preload();
    view = kne_view_for_read(text_arg(fcinfo, model), KNE_NOW);
    return kne_view_base(view->model);
}

static void
body_begin(kne_wbuf *w, const KneView *view)
{
    kne_wbuf_init(w);
    kne_put_view(w, view);
}

/*
 * Text that a model made. Unlike a message it may hold what this database's encoding cannot: a byte of zero
 * (a byte-level vocabulary has a token for it), or a character that has no equivalent. One such token must
 * not cost the whole answer.
 */
Datum
kne_model_text(kne_rbuf *r)
{
    StringInfoData out;
    size_t n, at = 0;
    const char *s = kne_get_bytes(r, &n);
    Oid proc = InvalidOid;

    initStringInfo(&out);
    if (GetDatabaseEncoding() != PG_UTF8 && GetDatabaseEncoding() != PG_SQL_ASCII)
        proc = FindDefaultConversionProc(PG_UTF8, GetDatabaseEncoding());
    while (at < n)
    {
        int len = pg_encoding_verifymbchar(PG_UTF8, s + at, (int) Min(n - at, MAX_MULTIBYTE_CHAR_LEN));
        uint8 buf[MAX_MULTIBYTE_CHAR_LEN * MAX_CONVERSION_GROWTH + 1];

        if (len <= 0 || s[at] == '\0')
        {
            appendStringInfoString(&out, GetDatabaseEncoding() == PG_UTF8 ? "\xEF\xBF\xBD" : "?");
            len = 1;
        }
        else if (len == 1 || !OidIsValid(proc))
            appendBinaryStringInfo(&out, s + at, len);
        else if (pg_do_encoding_conversion_buf(proc, PG_UTF8, GetDatabaseEncoding(), (uint8 *) s + at, len,
                                               buf, sizeof buf, true) == len)
            appendStringInfoString(&out, (char *) buf);
        else
            appendStringInfoChar(&out, '?');
        at += len;
    }
    return PointerGetDatum(cstring_to_text_with_len(out.data, out.len));
}

static Datum
text_reply(KneReply *reply)
{
    Datum answer = kne_model_text(&reply->body);

    kne_reply_done(reply);
    return answer;
}

/* A count that must be n: of an answer to a message with n questions. */
static void
expect_count(KneReply *reply, uint32 n, size_t size)
{
    if (kne_get_count(&reply->body, size) != n)
        reply->body.bad = true;
}

/* ---------------------------------------------------------------- one value */

Datum
kne_complete(PG_FUNCTION_ARGS)
{
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    int32 max_tokens;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        PG_RETURN_NULL();
    max_tokens = PG_GETARG_INT32(1);
    if (max_tokens < 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("max_tokens must not be negative"),
                        errdetail("It is %d.", max_tokens)));
    view = kne_view_args(fcinfo, 2, 3);
    body_begin(&w, view);
    kne_put_text(&w, text_arg(fcinfo, 0));
    kne_put_i32(&w, max_tokens);
    kne_call_view(view, KNE_MSG_COMPLETE, &w, NULL, NULL, &reply);
    PG_RETURN_DATUM(text_reply(&reply));
}

Datum
kne_logprob(PG_FUNCTION_ARGS)
{
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    double logp;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        PG_RETURN_NULL();
    view = kne_view_args(fcinfo, 2, 3);
    body_begin(&w, view);
    kne_put_u32(&w, 1);
    kne_put_text(&w, text_arg(fcinfo, 0));
    kne_put_text(&w, text_arg(fcinfo, 1));
    kne_call_view(view, KNE_MSG_LOGPROB, &w, NULL, NULL, &reply);
    expect_count(&reply, 1, sizeof(double));
    logp = kne_get_f64(&reply.body);
    kne_reply_done(&reply);
    PG_RETURN_FLOAT8(logp);
}

Datum
kne_knows(PG_FUNCTION_ARGS)
{
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    bool right;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
        PG_RETURN_NULL();
    kne_check_text("subject", text_arg(fcinfo, 0));
    kne_check_text("relation", text_arg(fcinfo, 1));
    kne_check_text("object", text_arg(fcinfo, 2));
    view = kne_view_args(fcinfo, 3, 4);
    body_begin(&w, view);
    kne_put_u32(&w, 1);
    kne_put_text(&w, kne_prompt(text_arg(fcinfo, 0), text_arg(fcinfo, 1)));
    kne_put_text(&w, text_arg(fcinfo, 2));
    kne_call_view(view, KNE_MSG_KNOWS, &w, NULL, NULL, &reply);
    expect_count(&reply, 1, 1);
    right = kne_get_u8(&reply.body) != 0;
    kne_reply_done(&reply);
    PG_RETURN_BOOL(right);
}

/* Element i of an array of texts, NULL for null. */
typedef struct Texts
{
    Datum *value;
    bool *null;
    int n;
} Texts;

static Texts
texts_arg(FunctionCallInfo fcinfo, int arg)
{
    Texts t;

    deconstruct_array(PG_GETARG_ARRAYTYPE_P(arg), TEXTOID, -1, false, TYPALIGN_INT, &t.value, &t.null, &t.n);
    return t;
}

/*
 * kne_knows of many facts: some thousand in a message, which the engine answers in batched passes, between which it serves
 * others. A fact with a null in it is neither known nor unknown.
 */
Datum
kne_knows_all(PG_FUNCTION_ARGS)
{
#define KNOWS_A_MESSAGE 2048
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    static const char *const names[] = {"subject", "relation", "object"};
    MemoryContext mcxt, old;
    Texts part[3];
    KneView *view;
    int n = 0;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
        return (Datum) 0;
    for (int k = 0; k < 3; k++)
    {
        part[k] = texts_arg(fcinfo, k);
        n = Max(n, part[k].n);
    }
    for (int k = 0; k < 3; k++)
        if (part[k].n != n && part[k].n != 1)
            ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR), errmsg("%ss has %d elements, the longest of the three %d", names[k], part[k].n, n),
                            errdetail("Arrays are of equal length, or have one element, which then is everybody's.")));
    view = kne_view_args(fcinfo, 3, 4);
    mcxt = AllocSetContextCreate(CurrentMemoryContext, "kne_knows_all", ALLOCSET_DEFAULT_SIZES);
    for (int from = 0; from < n; from += KNOWS_A_MESSAGE)
    {
        int to = Min(n, from + KNOWS_A_MESSAGE), asked = 0;
        kne_wbuf w;
        KneReply reply;

        CHECK_FOR_INTERRUPTS();
        old = MemoryContextSwitchTo(mcxt);
        kne_wbuf_init(&w);
        for (int pass = 0; pass < 2; pass++)
        {
            if (pass == 1)
            {
                kne_put_view(&w, view);
                kne_put_u32(&w, (uint32) asked);
            }
            for (int i = from; i < to; i++)
            {
                char *s[3];
                bool whole = true;

                for (int k = 0; k < 3; k++)
                {
                    int at = part[k].n == 1 ? 0 : i;

                    whole = whole && !part[k].null[at];
                    s[k] = whole ? TextDatumGetCString(part[k].value[at]) : NULL;
                }
                if (!whole)
                    continue;
                if (pass == 0)
                {
                    for (int k = 0; k < 3; k++)
                        kne_check_text(names[k], s[k]);
                    asked++;
                    continue;
                }
                kne_put_text(&w, kne_prompt(s[0], s[1]));
                kne_put_text(&w, s[2]);
            }
        }
        if (asked)
        {
            kne_call_view(view, KNE_MSG_KNOWS, &w, NULL, NULL, &reply);
            expect_count(&reply, (uint32) asked, 1);
        }
        for (int i = from; i < to; i++)
        {
            Datum values[4];
            bool nulls[4] = {false};

            for (int k = 0; k < 3; k++)
            {
                int at = part[k].n == 1 ? 0 : i;

                values[k] = part[k].value[at];
                nulls[k] = part[k].null[at];
            }
            nulls[3] = nulls[0] || nulls[1] || nulls[2];
            values[3] = BoolGetDatum(!nulls[3] && kne_get_u8(&reply.body) != 0);
            tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
        }
        if (asked)
            kne_reply_done(&reply);
        MemoryContextSwitchTo(old);
        MemoryContextReset(mcxt);
    }
    return (Datum) 0;
}

/* ---------------------------------------------------------------- tokens */

Datum
kne_tokenize(PG_FUNCTION_ARGS)
{
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    uint32 n;
    Datum *ids;

    if (PG_ARGISNULL(0))
        PG_RETURN_NULL();
    view = base_arg(fcinfo, 1);
    body_begin(&w, view);
    kne_put_text(&w, text_arg(fcinfo, 0));
    kne_call_view(view, KNE_MSG_TOKENIZE, &w, NULL, NULL, &reply);
    n = kne_get_count(&reply.body, sizeof(int32));
    ids = palloc(sizeof(Datum) * Max(n, 1));
    for (uint32 i = 0; i < n; i++)
        ids[i] = Int32GetDatum(kne_get_i32(&reply.body));
    kne_reply_done(&reply);
    PG_RETURN_ARRAYTYPE_P(construct_array(ids, (int) n, INT4OID, sizeof(int32), true, TYPALIGN_INT));
}

Datum
kne_detokenize(PG_FUNCTION_ARGS)
{
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    ArrayType *ids;
    int n;

    if (PG_ARGISNULL(0))
        PG_RETURN_NULL();
    ids = PG_GETARG_ARRAYTYPE_P(0);
    if (ARR_NDIM(ids) > 1)
        ereport(ERROR,
                (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR), errmsg("tokens must be an array of one dimension")));
    if (array_contains_nulls(ids))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("tokens must not contain nulls")));
    n = ArrayGetNItems(ARR_NDIM(ids), ARR_DIMS(ids));
    view = base_arg(fcinfo, 1);
    body_begin(&w, view);
    kne_put_u32(&w, (uint32) n);
    for (int i = 0; i < n; i++)
        kne_put_i32(&w, ((int32 *) ((char *) ids + ARR_OVERHEAD_NONULLS(1)))[i]);
    kne_call_view(view, KNE_MSG_DETOKENIZE, &w, NULL, NULL, &reply);
    PG_RETURN_DATUM(text_reply(&reply));
}

/* ---------------------------------------------------------------- sets of rows */

Datum
kne_next_tokens(PG_FUNCTION_ARGS)
{
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    KneView *view;
    kne_wbuf w;
    KneReply reply;
    int32 k;
    uint32 n;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        return (Datum) 0;
    k = PG_GETARG_INT32(1);
    if (k < 1)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("k must be at least 1"),
                        errdetail("It is %d.", k)));
    view = kne_view_args(fcinfo, 2, 3);
    body_begin(&w, view);
    kne_put_text(&w, text_arg(fcinfo, 0));
    kne_put_i32(&w, k);
    kne_call_view(view, KNE_MSG_NEXT_TOKENS, &w, NULL, NULL, &reply);
    n = kne_get_count(&reply.body, 4 + 4 + 8);
    for (uint32 i = 0; i < n; i++)
    {
        Datum values[4]; /* rank, token, token_id, probability */
        bool nulls[4] = {false};

        values[0] = Int32GetDatum((int32) i + 1);
        values[2] = Int32GetDatum(kne_get_i32(&reply.body));
        values[1] = kne_model_text(&reply.body);
        values[3] = Float8GetDatum(kne_get_f64(&reply.body));
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
        pfree(DatumGetPointer(values[1]));
        CHECK_FOR_INTERRUPTS();
    }
    kne_reply_done(&reply);
    return (Datum) 0;
}

/*
 * The ensemble that an edit would move, found as the worker would find it: with the edit that it would
 * supersede left out, and with the same known facts.
 */
Datum
kne_locate(PG_FUNCTION_ARGS)
{
    static KnePlan superseded = {"SELECT edit_id FROM kne.edit_request WHERE model_id = $1 AND subject = $2"
                                 " AND relation = $3 AND state = 'applied'",
                                 3,
                                 {INT4OID, TEXTOID, TEXTOID}};
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    KneEditSpec edit = {0};
    KneModel *model;
    KneView *view;
    kne_options options;
    char *options_json = NULL;
    Jsonb *resolved;
    int64 without = 0;
    kne_wbuf w;
    KneReply reply;
    Datum key[3];
    uint32 n;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
        return (Datum) 0;
    edit.subject = text_arg(fcinfo, 0);
    edit.relation = text_arg(fcinfo, 1);
    edit.object = text_arg(fcinfo, 2);
    kne_check_text("subject", edit.subject);
    kne_check_text("relation", edit.relation);
    kne_check_text("object", edit.object);
    kne_options_from_jsonb(PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4), &options);
    kne_require_preload();
    model = kne_model_by_name(text_arg(fcinfo, 3));
    resolved = kne_options_resolve(PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4), model->model_id, NULL, &options);
    if (resolved)
        options_json = JsonbToCString(NULL, &resolved->root, VARSIZE(resolved));
    kne_check_layers(&options, model);

    kne_spi_connect();
    key[0] = Int32GetDatum(model->model_id);
    key[1] = CStringGetTextDatum(edit.subject);
    key[2] = CStringGetTextDatum(edit.relation);
    if (kne_spi(&superseded, KNE_READ, key, NULL) > 0)
        without = kne_spi_int8(0, 1);
    kne_spi_finish();

    view = kne_view_get(model, kne_as_of_arg(fcinfo, 5), &without, without ? 1 : 0);
    body_begin(&w, view);
    kne_put_edit_body(&w, model, options_json, 1, &edit);
    kne_call_view(view, KNE_MSG_LOCATE, &w, NULL, NULL, &reply);
    n = kne_get_count(&reply.body, 4 + 4 + 4 + 4);
    for (uint32 i = 0; i < n; i++)
    {
        Datum values[4]; /* layer, neuron, score, token_scores */
        bool nulls[4] = {false};
        Datum *token;
        uint32 n_tokens;

        values[0] = Int32GetDatum(kne_get_i32(&reply.body));
        values[1] = Int32GetDatum(kne_get_i32(&reply.body));
        values[2] = Float4GetDatum(kne_get_f32(&reply.body));
        n_tokens = kne_get_count(&reply.body, sizeof(float4));
        token = palloc(sizeof(Datum) * Max(n_tokens, 1));
        for (uint32 t = 0; t < n_tokens; t++)
            token[t] = Float4GetDatum(kne_get_f32(&reply.body));
        values[3] = PointerGetDatum(
            construct_array(token, (int) n_tokens, FLOAT4OID, sizeof(float4), true, TYPALIGN_INT));
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
        pfree(token);
        pfree(DatumGetPointer(values[3]));
        CHECK_FOR_INTERRUPTS();
    }
    kne_reply_done(&reply);
    return (Datum) 0;
}
