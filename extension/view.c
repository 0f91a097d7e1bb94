/*
 * view.c - which edits a snapshot sees, and handing the engine what it lacks of them.
 *
 * A state of the model is its base plus a set of (edit, generation) pairs. "Now" is what the active snapshot
 * sees in kne.activation as not ended, so a transaction reads its own uncommitted changes and nobody else's.
 * An instant is the half-open interval test on the stamps; rows that this transaction has not committed carry
 * 'infinity' there, so no instant contains them. Pairs without rows (the fact held already) change no weight
 * and are left out.
 *
 * The engine knows sets and pairs by digest. What it does not hold it asks for, and gets from rows, which
 * never change once committed; so asking again can only be needed when the engine restarted or evicted in
 * between.
 */
#include "kne_sql.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "common/cryptohash.h"
#include "common/sha2.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

StaticAssertDecl(PG_SHA256_DIGEST_LENGTH == 32, "digests are SHA-256");

/* ---------------------------------------------------------------- the set */

void
kne_sha256_of(const void *data, size_t len, uint8 out[32])
{
    pg_cryptohash_ctx *ctx = pg_cryptohash_create(PG_SHA256);

    if (ctx == NULL)
        ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
    if (pg_cryptohash_init(ctx) < 0 || pg_cryptohash_update(ctx, data, len) < 0 || pg_cryptohash_final(ctx, out, 32) < 0)
        elog(ERROR, "could not compute SHA-256");
    pg_cryptohash_free(ctx);
}

/* SHA-256 over (i64 edit_id, digest) of each pair; zeros for none (kne_protocol.h). */
static void
digest_set(KneView *v)
{
    pg_cryptohash_ctx *ctx;

    memset(v->set_digest, 0, sizeof v->set_digest);
    if (v->n == 0)
        return;
    ctx = pg_cryptohash_create(PG_SHA256);
    if (ctx == NULL)
        ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
    if (pg_cryptohash_init(ctx) < 0)
        elog(ERROR, "could not initialize SHA-256");
    for (int i = 0; i < v->n; i++)
        if (pg_cryptohash_update(ctx, (const uint8 *) &v->edit_id[i], sizeof v->edit_id[i]) < 0 ||
            pg_cryptohash_update(ctx, v->digest[i], sizeof v->digest[i]) < 0)
            elog(ERROR, "could not compute SHA-256");
    if (pg_cryptohash_final(ctx, v->set_digest, sizeof v->set_digest) < 0)
        elog(ERROR, "could not finish SHA-256");
    pg_cryptohash_free(ctx);
}

/* The set is on the base of the newest rebase: a server that has rows of one elsewhere, and the folder of before, answers nothing. */
static KneView *
view_on_base(KneModel *model, TimestampTz as_of)
{
    KneBase base = kne_base_of(model);
    KneView *v;

    if (strcmp(base.fingerprint, model->fingerprint) != 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("model \"%s\" was rebased on another server, and has its earlier base here", model->name),
                        errdetail("Since %s its fingerprint is %s, here it is %s.", timestamptz_to_str(base.at), base.fingerprint, model->fingerprint),
                        errhint("Copy the folder that kne.rebase names from that server, then kne_move_model(name, path).")));
    if (as_of < base.at)
        ereport(ERROR, (errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE), errmsg("model \"%s\" was rebased after that", model->name),
                        errdetail("States before %s are not kept.", timestamptz_to_str(base.at)),
                        errhint("kne.rebase has the folder of its earlier base.")));
    v = palloc0(sizeof *v);
    v->model = model;
    return v;
}

KneView *
kne_view_base(KneModel *model)
{
    return view_on_base(model, KNE_NOW);
}

KneView *
kne_view_get(KneModel *model, TimestampTz as_of, const int64 *without, int n_without)
{
#define PAIRS                                                                       \
    "SELECT a.edit_id, a.generation, s.digest FROM kne.activation a"                \
    " JOIN kne.solution s ON s.edit_id = a.edit_id AND s.generation = a.generation" \
    " WHERE a.model_id = $1 AND s.n_rows > 0"
    static KnePlan now = {PAIRS " AND a.valid_to IS NULL ORDER BY a.edit_id", 1, {INT4OID}};
    static KnePlan then = {
        PAIRS " AND a.valid_from <= $2 AND (a.valid_to > $2 OR a.valid_to IS NULL) ORDER BY a.edit_id",
        2,
        {INT4OID, TIMESTAMPTZOID}};
    KneView *v = view_on_base(model, as_of);
    MemoryContext mcxt = CurrentMemoryContext;
    Datum values[2];
    uint64 rows;

    values[0] = Int32GetDatum(model->model_id);
    values[1] = TimestampTzGetDatum(as_of);
    kne_spi_connect();
    rows = kne_spi(as_of == KNE_NOW ? &now : &then, KNE_READ, values, NULL);
    if (rows > PG_INT32_MAX / sizeof v->digest[0])
        ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("too many active edits")));
    v->edit_id = MemoryContextAlloc(mcxt, sizeof v->edit_id[0] * Max(rows, 1));
    v->generation = MemoryContextAlloc(mcxt, sizeof v->generation[0] * Max(rows, 1));
    v->digest = MemoryContextAlloc(mcxt, sizeof v->digest[0] * Max(rows, 1));
    for (uint64 i = 0; i < rows; i++)
    {
        int64 edit_id = kne_spi_int8(i, 1);
        bool skip = false, isnull;
        bytea *digest;

        for (int k = 0; k < n_without && !skip; k++)
            skip = without[k] == edit_id;
        if (skip)
            continue;
        digest = DatumGetByteaPP(kne_spi_datum(i, 3, &isnull));
        if (isnull || VARSIZE_ANY_EXHDR(digest) != sizeof v->digest[0])
            elog(ERROR, "digest of edit " INT64_FORMAT " is not 32 bytes", edit_id);
        v->edit_id[v->n] = edit_id;
        v->generation[v->n] = kne_spi_int4(i, 2);
        memcpy(v->digest[v->n], VARDATA_ANY(digest), sizeof v->digest[0]);
        v->n++;
    }
    kne_spi_finish();
    digest_set(v);
    return v;
}

/* ---------------------------------------------------------------- kept for a snapshot */

/*
 * A query that calls a reading function for each of a million rows should look the set up once. Two snapshots
 * of one subtransaction see the same rows if these agree; SubTransactionIds are not reused within a
 * transaction, so what a rolled back savepoint saw is not taken for the present.
 */
typedef struct SnapshotKey
{
    LocalTransactionId lxid;
    SubTransactionId subid;
    CommandId curcid;
    TransactionId xmin, xmax;
    uint32 xcnt;
    int32 subxcnt;
    uint32 suboverflowed, recovery; /* no bool: without padding it can be compared whole */
} SnapshotKey;

static struct
{
    MemoryContext mcxt; /* holds all that is below; NULL: never used */
    SnapshotKey key;
    TransactionId *xip, *subxip;
    char *model_name; /* as asked for: NULL is the default model */
    TimestampTz as_of;
    KneView *view; /* NULL: nothing kept */
} kept;

static SnapshotKey
key_of(Snapshot s)
{
    SnapshotKey k;

    k.lxid = KNE_LXID;
    k.subid = GetCurrentSubTransactionId();
    k.curcid = s->curcid;
    k.xmin = s->xmin;
    k.xmax = s->xmax;
    k.xcnt = s->xcnt;
    k.subxcnt = s->subxcnt;
    k.suboverflowed = s->suboverflowed;
    k.recovery = s->takenDuringRecovery;
    return k;
}

KneView *
kne_view_for_read(const char *model_name, TimestampTz as_of)
{
    Snapshot s;
    SnapshotKey key;
    MemoryContext old;
    KneModel *model;
    KneView *view;

    if (!ActiveSnapshotSet())
        elog(ERROR, "a model cannot be read without a snapshot");
    model_name = kne_model_meant(model_name);
    s = GetActiveSnapshot();
    key = key_of(s);
    if (s->snapshot_type == SNAPSHOT_MVCC && kept.view && memcmp(&key, &kept.key, sizeof key) == 0 &&
        as_of == kept.as_of && (model_name == NULL) == (kept.model_name == NULL) &&
        (model_name == NULL || strcmp(model_name, kept.model_name) == 0) &&
        (s->xcnt == 0 || memcmp(s->xip, kept.xip, s->xcnt * sizeof(TransactionId)) == 0) &&
        (s->subxcnt <= 0 || memcmp(s->subxip, kept.subxip, s->subxcnt * sizeof(TransactionId)) == 0))
        return kept.view;

    kept.view = NULL;
    if (kept.mcxt == NULL)
        kept.mcxt = AllocSetContextCreate(TopMemoryContext, "kne view", ALLOCSET_SMALL_SIZES);
    MemoryContextReset(kept.mcxt);
    old = MemoryContextSwitchTo(kept.mcxt);
    model = kne_model_by_name(model_name);
    view = kne_view_get(model, as_of, NULL, 0);
    kept.key = key;
    kept.xip = palloc(Max(s->xcnt, 1) * sizeof(TransactionId));
    if (s->xcnt > 0)
        memcpy(kept.xip, s->xip, s->xcnt * sizeof(TransactionId));
    kept.subxip = palloc(Max(s->subxcnt, 1) * sizeof(TransactionId));
    if (s->subxcnt > 0)
        memcpy(kept.subxip, s->subxip, s->subxcnt * sizeof(TransactionId));
    kept.model_name = model_name ? pstrdup(model_name) : NULL;
    kept.as_of = as_of;
    MemoryContextSwitchTo(old);
    kept.view = view;
    return view;
}

/* ---------------------------------------------------------------- supplying the engine */

void
kne_put_view(kne_wbuf *w, const KneView *view)
{
    kne_put_str(w, view->model->path);
    kne_put_str(w, view->model->fingerprint);
    kne_put(w, view->set_digest, sizeof view->set_digest);
}

/* A place to read rows from: the caller's transaction, or a short one of our own where there is none. */
typedef struct Reading
{
    MemoryContext mcxt;
    bool own_transaction, own_snapshot;
} Reading;

static void
reading_begin(Reading *r)
{
    r->mcxt = CurrentMemoryContext;
    r->own_transaction = !IsTransactionState();
    if (r->own_transaction)
    {
        SetCurrentStatementStartTimestamp();
        StartTransactionCommand();
    }
    r->own_snapshot = !ActiveSnapshotSet();
    if (r->own_snapshot)
        PushActiveSnapshot(GetTransactionSnapshot());
    kne_spi_connect();
}

static void
reading_end(Reading *r)
{
    kne_spi_finish();
    if (r->own_snapshot)
        PopActiveSnapshot();
    if (r->own_transaction)
        CommitTransactionCommand();
    MemoryContextSwitchTo(r->mcxt);
}

/* Append the rows of a pair, as KNE_MSG_DELTA_PUT wants them. */
static void
put_rows(kne_wbuf *w, int64 edit_id, int32 generation)
{
    static KnePlan plan = {
        "SELECT layer, neuron, CASE matrix WHEN 'down' THEN 0 WHEN 'gate' THEN 1 ELSE 2 END, delta"
        " FROM kne.weight_delta WHERE edit_id = $1 AND generation = $2 ORDER BY 1, 2, 3",
        2,
        {INT8OID, INT4OID}};
    Datum values[2];
    uint64 rows;

    values[0] = Int64GetDatum(edit_id);
    values[1] = Int32GetDatum(generation);
    rows = kne_spi(&plan, KNE_READ, values, NULL);
    kne_put_u32(w, (uint32) rows);
    for (uint64 i = 0; i < rows; i++)
    {
        bool isnull;
        Datum d = kne_spi_datum(i, 4, &isnull);
        ArrayType *delta = DatumGetArrayTypeP(d);

        if (ARR_NDIM(delta) != 1 || ARR_HASNULL(delta) || ARR_ELEMTYPE(delta) != FLOAT4OID)
            ereport(ERROR,
                    (errcode(ERRCODE_DATA_CORRUPTED),
                     errmsg("kne.weight_delta of edit " INT64_FORMAT " has a malformed row", edit_id)));
        kne_put_i32(w, kne_spi_int4(i, 1));
        kne_put_i32(w, kne_spi_int4(i, 2));
        kne_put_u8(w, (uint8) kne_spi_int4(i, 3));
        kne_put_u32(w, (uint32) ARR_DIMS(delta)[0]);
        kne_put(w, (char *) delta + ARR_OVERHEAD_NONULLS(1), (size_t) ARR_DIMS(delta)[0] * sizeof(float4));
        if ((Pointer) delta != DatumGetPointer(d))
            pfree(delta);
    }
}

static void
supply_delta(const KneView *view, const uint8 *digest)
{
    Reading r;
    kne_wbuf w;
    KneReply reply;
    int i = 0;

    while (i < view->n && memcmp(view->digest[i], digest, 32) != 0)
        i++;
    if (i == view->n)
        ereport(ERROR, (errcode(ERRCODE_PROTOCOL_VIOLATION),
                        errmsg("the engine asks for an edit that is not in the set")));
    kne_wbuf_init(&w);
    kne_put(&w, digest, 32);
    reading_begin(&r);
    put_rows(&w, view->edit_id[i], view->generation[i]);
    reading_end(&r);
    kne_call(KNE_MSG_DELTA_PUT, &w, NULL, NULL, &reply);
    kne_reply_done(&reply);
}

static void
unexpected_answer(const KneReply *reply)
{
    ereport(ERROR, (errcode(ERRCODE_PROTOCOL_VIOLATION),
                    errmsg("unexpected answer %u of the engine", (unsigned) reply->type)));
}

static void
cannot_keep(const KneView *view)
{
    ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("the engine cannot keep the set of active edits"),
                    errdetail("Model \"%s\", %d edits; the engine forgot it again and again.",
                              view->model->name, view->n)));
}

/* Tell the engine what the set is made of, and the deltas that it lacks. */
static void
supply_set(const KneView *view)
{
    MemoryContext mcxt = AllocSetContextCreate(CurrentMemoryContext, "kne set", ALLOCSET_DEFAULT_SIZES);
    MemoryContext old = MemoryContextSwitchTo(mcxt);

    for (int round = 0; round < 4; round++)
    {
        kne_wbuf w;
        KneReply reply;
        uint32 n;

        kne_wbuf_init(&w);
        kne_put_view(&w, view);
        kne_put_u32(&w, (uint32) view->n);
        for (int i = 0; i < view->n; i++)
        {
            kne_put_i64(&w, view->edit_id[i]);
            kne_put(&w, view->digest[i], sizeof view->digest[i]);
        }
        kne_call(KNE_MSG_SET_PUT, &w, NULL, NULL, &reply);
        if (reply.type == KNE_MSG_OK)
        {
            kne_reply_done(&reply);
            MemoryContextSwitchTo(old);
            MemoryContextDelete(mcxt);
            return;
        }
        if (reply.type != KNE_MSG_NEED_DELTAS)
            unexpected_answer(&reply);
        n = kne_get_count(&reply.body, 32);
        for (uint32 i = 0; i < n; i++)
        {
            const uint8 *digest = kne_get(&reply.body, 32);
            MemoryContext one = AllocSetContextCreate(mcxt, "kne delta", ALLOCSET_DEFAULT_SIZES);

            MemoryContextSwitchTo(one);
            supply_delta(view, digest);
            MemoryContextSwitchTo(mcxt);
            MemoryContextDelete(one);
        }
        kne_reply_done(&reply);
    }
    cannot_keep(view);
}

void
kne_call_view(const KneView *view, uint16 type, const kne_wbuf *body, KneProgress progress, void *arg,
              KneReply *reply)
{
    for (int round = 0; round < 8; round++)
    {
        kne_call(type, body, progress, arg, reply);
        if (reply->type == KNE_MSG_OK)
            return;
        if (reply->type != KNE_MSG_NEED_SET)
            unexpected_answer(reply);
        supply_set(view);
    }
    cannot_keep(view);
}
