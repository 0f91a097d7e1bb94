/*
 * worker_record.c - writing down what became of a batch.
 *
 * Each edit is written in a transaction of its own, so that a batch is never lost to one row. Nothing here waits for a user:
 * rows are locked NOWAIT, the model's lock is tried, and lock_timeout bounds the rest. What is locked stays in memory as an
 * open verdict and is tried again.
 *
 * Invariant: a verdict is written only over a row that is still `running`. A row that a user cancelled, or that went with its
 * model, has been decided; the result is dropped.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "kne_proc.h"

#define CHUNK_FLOATS (1 << 20) /* most in one INSERT */
#define MAX_DISTURBED 100      /* events of one batch */
#define MAX_REPEAT_MS 1000     /* between two tries of what is locked */

double
kne_death_delay(int deaths)
{
    return Min(300.0, (double) (1 << Min(Max(deaths, 1) - 1, 9)));
}

/* ---------------------------------------------------------------- reading the answer */

static char *
get_text(kne_rbuf *r)
{
    StringInfoData s;

    initStringInfo(&s);
    kne_get_text(r, &s);
    return s.data;
}

static void
malformed(void)
{
    ereport(ERROR,
            (errcode(ERRCODE_PROTOCOL_VIOLATION),
             errmsg("the kne engine sent a malformed answer to a batch of edits")));
}

/* Skip items of i32, i32, a fixed part of `extra` bytes and n * f32. */
static void
skip_items(kne_rbuf *r, uint32 n, size_t extra)
{
    uint32 i;

    for (i = 0; i < n && !r->bad; i++)
    {
        kne_get(r, 8 + extra);
        kne_get(r, (size_t) kne_get_count(r, 4) * 4);
    }
}

static KneJob *
job_of(KneBatch *batch, int64 edit_id)
{
    int i;

    for (i = 0; i < batch->n; i++)
        if (batch->job[i].spec.edit_id == edit_id)
            return &batch->job[i];
    return NULL;
}

/* What the request said of the known facts: str options, n * (str prompt, str object, i64 edit_id). */
static void
read_disturbed(KneBatch *batch, kne_rbuf *r, const uint8 *known, size_t known_len)
{
    kne_rbuf k = {known, known_len, 0, false};
    uint32   n = kne_get_count(r, 4);
    uint32   n_known, i;
    size_t   skip;
    KneKnown *facts;

    batch->n_disturbed = 0; /* of a consolidation that goes on with fewer edits, what was there is of before */
    if (n == 0)
        return;
    (void) kne_get_bytes(&k, &skip);
    n_known = kne_get_count(&k, 16);
    facts = palloc0(sizeof(KneKnown) * Max(n_known, 1));
    for (i = 0; i < n_known; i++)
    {
        facts[i].prompt = get_text(&k);
        facts[i].object = get_text(&k);
        facts[i].edit_id = kne_get_i64(&k);
    }
    batch->disturbed = palloc0(sizeof(KneKnown) * Min(n, MAX_DISTURBED));
    for (i = 0; i < n; i++)
    {
        int32 at = kne_get_i32(r);

        if (r->bad || at < 0 || (uint32) at >= n_known)
            malformed();
        if (batch->n_disturbed < MAX_DISTURBED)
            batch->disturbed[batch->n_disturbed++] = facts[at];
    }
}

void
kne_read_outcomes(KneBatch *batch, KneReply *reply, const uint8 *known, size_t known_len)
{
    kne_rbuf *r = &reply->body;
    Oid       type = TEXTOID;
    Datum     value;
    uint32    n, i;
    int       k;

    for (k = 0; k < batch->n; k++)
        batch->job[k].verdict = KNE_DONE;
    batch->provenance = get_text(r);
    batch->attribute_seconds = kne_get_f64(r);
    batch->optimise_seconds = kne_get_f64(r);
    n = kne_get_count(r, 1);
    for (i = 0; i < n; i++)
    {
        int64       edit_id = kne_get_i64(r);
        uint8       outcome = kne_get_u8(r);
        KneJob     *job = job_of(batch, edit_id);
        const void *digest;
        char       *message;

        if (r->bad || !job || job->verdict != KNE_DONE)
            malformed();
        message = get_text(r);
        job->steps = kne_get_i32(r);
        job->p_before = kne_get_f64(r);
        job->p_after = kne_get_f64(r);
        job->norm = kne_get_f64(r);
        job->answer_before = get_text(r);
        job->n_ensemble = kne_get_count(r, 16);
        job->ensemble = *r;
        skip_items(r, job->n_ensemble, 4);
        digest = kne_get(r, sizeof(job->digest));
        if (digest)
            memcpy(job->digest, digest, sizeof(job->digest));
        job->n_rows = kne_get_count(r, 13);
        job->rows = *r;
        skip_items(r, job->n_rows, 1);
        if (r->bad)
            malformed();

        switch (outcome)
        {
            case KNE_OUTCOME_APPLIED:
                job->verdict = KNE_APPLY;
                break;
            case KNE_OUTCOME_HOLDS:
                job->verdict = KNE_APPLY;
                job->holds = true;
                break;
            case KNE_OUTCOME_FAILED:
                job->verdict = KNE_FAIL;
                job->final = true; /* the same computation would end the same way */
                job->error = message[0] ? message : "the edit does not reach its object";
                break;
            case KNE_OUTCOME_CANCELLED:
                /* The row says so already, unless the cancel was a mistake. */
                job->verdict = KNE_REQUEUE;
                break;
            default:
                malformed();
        }
    }
    read_disturbed(batch, r, known, known_len);
    kne_reply_done(reply);

    for (k = 0; k < batch->n; k++)
        if (batch->job[k].verdict == KNE_DONE)
            malformed();

    value = CStringGetTextDatum(batch->provenance);
    kne_sql("SELECT ($1::jsonb)->>'device', ($1::jsonb)->>'engine'", 1, &type, &value, NULL);
    batch->device = kne_sql_text(0, 1);
    batch->version = kne_sql_text(0, 2);
}

/* ---------------------------------------------------------------- rows of a solution */

static void
put_ensemble(const KneJob *job)
{
    static const char sql[] =
        "INSERT INTO kne.ensemble (edit_id, generation, layer, neuron, score, token_scores)"
        " SELECT $1, $8, ($2::int4[])[i], ($3::int4[])[i], ($4::float4[])[i],"
        " coalesce(($5::float4[])[(i - 1) * $6 + 1 : i * $6], '{}')"
        " FROM generate_series(1, $7) i";
    static const Oid types[] = {INT8OID, INT4ARRAYOID, INT4ARRAYOID, FLOAT4ARRAYOID, FLOAT4ARRAYOID, INT4OID, INT4OID, INT4OID};
    kne_rbuf r = job->ensemble;
    uint32   done = 0;

    while (done < job->n_ensemble)
    {
        uint32 left = job->n_ensemble - done, n = 0, width = 0, i;
        int32 *layer, *neuron;
        float *score, *scores = NULL;
        Datum  values[8];

        /* Rows of one width, as many as fit. */
        layer = palloc_extended(left * sizeof(int32), MCXT_ALLOC_HUGE);
        neuron = palloc_extended(left * sizeof(int32), MCXT_ALLOC_HUGE);
        score = palloc_extended(left * sizeof(float), MCXT_ALLOC_HUGE);
        for (i = 0; i < left; i++)
        {
            size_t      start = r.at;
            int32       l = kne_get_i32(&r), k = kne_get_i32(&r);
            float       s = kne_get_f32(&r);
            uint32      w = kne_get_count(&r, 4);
            const void *p = kne_get(&r, (size_t) w * 4);

            if (i == 0)
            {
                width = w;
                scores = palloc((size_t) Max(CHUNK_FLOATS, width) * sizeof(float));
            }
            if (w != width || (size_t) (i + 1) * width > (size_t) Max(CHUNK_FLOATS, width))
            {
                r.at = start;
                break;
            }
            layer[i] = l;
            neuron[i] = k;
            score[i] = s;
            if (w > 0)
                memcpy(scores + (size_t) i * width, p, (size_t) w * 4);
            n++;
        }
        values[0] = Int64GetDatum(job->spec.edit_id);
        values[1] = kne_int4_array(layer, n);
        values[2] = kne_int4_array(neuron, n);
        values[3] = kne_float4_array(score, n);
        values[4] = kne_float4_array(scores, n * width);
        values[5] = Int32GetDatum(width);
        values[6] = Int32GetDatum(n);
        values[7] = Int32GetDatum(job->generation);
        kne_sql(sql, 8, types, values, NULL);
        done += n;
    }
}

static void
put_deltas(const KneJob *job)
{
    static const char sql[] =
        "INSERT INTO kne.weight_delta (edit_id, generation, layer, neuron, matrix, delta)"
        " SELECT $1, $8, ($2::int4[])[i], ($3::int4[])[i],"
        " CASE ($4::int4[])[i] WHEN 0 THEN 'down' WHEN 1 THEN 'gate' ELSE 'up' END,"
        " ($5::float4[])[(i - 1) * $6 + 1 : i * $6]"
        " FROM generate_series(1, $7) i";
    static const Oid types[] = {INT8OID, INT4ARRAYOID, INT4ARRAYOID, INT4ARRAYOID, FLOAT4ARRAYOID, INT4OID, INT4OID, INT4OID};
    kne_rbuf r = job->rows;
    uint32   done = 0;

    while (done < job->n_rows)
    {
        uint32 left = job->n_rows - done, n = 0, width = 0, i;
        int32 *layer, *neuron, *matrix;
        float *deltas = NULL;
        Datum  values[8];

        layer = palloc_extended(left * sizeof(int32), MCXT_ALLOC_HUGE);
        neuron = palloc_extended(left * sizeof(int32), MCXT_ALLOC_HUGE);
        matrix = palloc_extended(left * sizeof(int32), MCXT_ALLOC_HUGE);
        for (i = 0; i < left; i++)
        {
            size_t      start = r.at;
            int32       l = kne_get_i32(&r), k = kne_get_i32(&r);
            uint8       m = kne_get_u8(&r);
            uint32      w = kne_get_count(&r, 4);
            const void *p = kne_get(&r, (size_t) w * 4);

            if (w == 0 || m > KNE_MATRIX_UP)
                malformed();
            if (i == 0)
            {
                width = w;
                deltas = palloc((size_t) Max(CHUNK_FLOATS, width) * sizeof(float));
            }
            if (w != width || (size_t) (i + 1) * width > (size_t) Max(CHUNK_FLOATS, width))
            {
                r.at = start;
                break;
            }
            layer[i] = l;
            neuron[i] = k;
            matrix[i] = m;
            memcpy(deltas + (size_t) i * width, p, (size_t) w * 4);
            n++;
        }
        values[0] = Int64GetDatum(job->spec.edit_id);
        values[1] = kne_int4_array(layer, n);
        values[2] = kne_int4_array(neuron, n);
        values[3] = kne_int4_array(matrix, n);
        values[4] = kne_float4_array(deltas, n * width);
        values[5] = Int32GetDatum(width);
        values[6] = Int32GetDatum(n);
        values[7] = Int32GetDatum(job->generation);
        kne_sql(sql, 8, types, values, NULL);
        done += n;
    }
}

void
kne_put_solution(const KneBatch *batch, const KneJob *job)
{
    static const char sql[] =
        "INSERT INTO kne.solution (edit_id, generation, model_id, digest, n_neurons, n_rows, norm, answer_before,"
        " p_before, p_after, steps, attribute_seconds, optimise_seconds, provenance, consolidation_id)"
        " VALUES ($1, $14, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13::jsonb || $16::jsonb, nullif($15, 0))";
    static const Oid types[] = {INT8OID, INT4OID, BYTEAOID, INT4OID, INT4OID, FLOAT8OID, TEXTOID, FLOAT8OID, FLOAT8OID,
        INT4OID, FLOAT8OID, FLOAT8OID, TEXTOID, INT4OID, INT8OID, TEXTOID};
    bytea *digest = palloc(VARHDRSZ + sizeof(job->digest));
    Datum  values[16];

    SET_VARSIZE(digest, VARHDRSZ + sizeof(job->digest));
    memcpy(VARDATA(digest), job->digest, sizeof(job->digest));
    values[0] = Int64GetDatum(job->spec.edit_id);
    values[1] = Int32GetDatum(batch->model_id);
    values[2] = PointerGetDatum(digest);
    values[3] = Int32GetDatum(job->n_ensemble);
    values[4] = Int32GetDatum(job->n_rows);
    values[5] = Float8GetDatum(job->norm);
    values[6] = CStringGetTextDatum(job->answer_before);
    values[7] = Float8GetDatum(job->p_before);
    values[8] = Float8GetDatum(job->p_after);
    values[9] = Int32GetDatum(job->steps);
    values[10] = Float8GetDatum(batch->attribute_seconds);
    values[11] = Float8GetDatum(batch->optimise_seconds);
    values[12] = CStringGetTextDatum(batch->provenance);
    values[13] = Int32GetDatum(job->generation);
    values[14] = Int64GetDatum(batch->consolidation);
    values[15] = CStringGetTextDatum(batch->again);
    kne_sql(sql, 16, types, values, NULL);
    put_ensemble(job);
    put_deltas(job);
}

/* ---------------------------------------------------------------- one edit */

/*
 * Lock the edit, and the edit of its fact that is in force. False: it is not running any more. ERROR 55P03 when somebody holds one of them.
 * That is enough against whoever changes what is in force of the fact (request.c), for he locks all its rows. Not this one if it was committed
 * after he looked: then he holds the row that is in force, or has just committed, and what is in force is looked at again for that.
 */
static bool
lock_fact(int64 edit_id, int64 *applied)
{
#define IN_FORCE \
    "SELECT r.edit_id FROM kne.edit_request r WHERE (r.model_id, r.subject, r.relation) =" \
    " (SELECT b.model_id, b.subject, b.relation FROM kne.edit_request b WHERE b.edit_id = $1) AND r.state = 'applied'"
    static const char lock[] = "SELECT state FROM kne.edit_request WHERE edit_id = $1 FOR NO KEY UPDATE NOWAIT";
    static const char lock_in_force[] = IN_FORCE " FOR NO KEY UPDATE OF r NOWAIT";
    static const char look[] = IN_FORCE;
    static const Oid type = INT8OID;
    Datum id = Int64GetDatum(edit_id);

    if (kne_sql(lock, 1, &type, &id, NULL) == 0 || strcmp(kne_sql_text(0, 1), "running") != 0)
        return false;
    *applied = kne_sql(lock_in_force, 1, &type, &id, NULL) > 0 ? kne_sql_int8(0, 1) : 0;
    if ((kne_sql(look, 1, &type, &id, NULL) > 0 ? kne_sql_int8(0, 1) : 0) != *applied)
        ereport(ERROR, (errcode(ERRCODE_LOCK_NOT_AVAILABLE), errmsg("the edit in force has just changed")));
    return true;
}

static void
end_job(const KneJob *job, const char *state, bool charge, const char *error)
{
    static const char sql[] =
        "UPDATE kne.edit_request SET state = $2, attempts = attempts + $3, deaths = deaths + $4,"
        " error = CASE WHEN $2 = 'applied' THEN NULL ELSE coalesce($5, error) END,"
        " finished_at = CASE WHEN $2 = 'pending' THEN NULL ELSE clock_timestamp() END,"
        " started_at = CASE WHEN $2 = 'pending' THEN NULL ELSE started_at END,"
        " not_before = CASE WHEN $2 = 'pending' AND $6 > 0 THEN clock_timestamp() + $6 * '1 second'::interval END"
        " WHERE edit_id = $1";
    static const Oid types[] = {INT8OID, TEXTOID, INT4OID, INT4OID, TEXTOID, FLOAT8OID};
    Datum values[6];
    char  nulls[] = "      ";

    values[0] = Int64GetDatum(job->spec.edit_id);
    values[1] = CStringGetTextDatum(state);
    values[2] = Int32GetDatum(charge ? 1 : 0);
    values[3] = Int32GetDatum(job->death ? 1 : 0);
    values[4] = error ? CStringGetTextDatum(error) : (Datum) 0;
    nulls[4] = error ? ' ' : 'n';
    values[5] = Float8GetDatum(job->delay);
    kne_sql(sql, 6, types, values, nulls);
}

static void
fail_job(const KneJob *job)
{
    StringInfoData detail;
    bool           final = job->final || job->attempts + 1 >= kne_max_attempts;

    end_job(job, final ? "failed" : "pending", true, job->error);
    if (!final)
        return;
    kne_json_open(&detail);
    kne_json_text(&detail, "error", job->error);
    kne_json_int(&detail, "attempts", job->attempts + 1);
    kne_event(job->spec.edit_id, "failed", kne_json_close(&detail));
    ereport(LOG, (errmsg("kne: edit " INT64_FORMAT " failed: %s", job->spec.edit_id, job->error)));
}

static void
supersede(int64 old, int64 by)
{
    static const Oid type = INT8OID;
    Datum            id = Int64GetDatum(old);
    StringInfoData   detail;

    kne_sql("UPDATE kne.edit_request SET state = 'superseded' WHERE edit_id = $1", 1, &type, &id, NULL);
    /* The provisional end; the trigger kne.stamp sets the time at commit. */
    kne_sql("UPDATE kne.activation SET valid_to = 'infinity' WHERE edit_id = $1 AND valid_to IS NULL", 1, &type, &id, NULL);
    kne_json_open(&detail);
    kne_json_int(&detail, "superseded_by", by);
    kne_event(old, "superseded", kne_json_close(&detail));
}

static void
apply_job(KneBatch *batch, KneJob *job, int64 applied)
{
    static const char activate[] = "INSERT INTO kne.activation (model_id, edit_id, generation) VALUES ($1, $2, 0)";
    static const char end_facts[] =
        "UPDATE kne.fact f SET valid_to = 'infinity' FROM kne.edit_request r WHERE r.edit_id = $2 AND f.model_id = $1"
        " AND f.subject = r.subject AND f.relation = r.relation AND f.valid_to IS NULL";
    static const char new_fact[] =
        "INSERT INTO kne.fact (model_id, subject, relation, object, edit_id)"
        " SELECT r.model_id, r.subject, r.relation, r.object, r.edit_id FROM kne.edit_request r"
        " WHERE r.model_id = $1 AND r.edit_id = $2";
    static const Oid types[] = {INT4OID, INT8OID};
    Datum            values[2];
    StringInfoData   detail;

    if (applied != 0)
        supersede(applied, job->spec.edit_id);
    kne_put_solution(batch, job);
    values[0] = Int32GetDatum(batch->model_id);
    values[1] = Int64GetDatum(job->spec.edit_id);
    kne_sql(activate, 2, types, values, NULL);
    kne_sql(end_facts, 2, types, values, NULL);
    kne_sql(new_fact, 2, types, values, NULL);
    end_job(job, "applied", false, NULL);

    kne_json_open(&detail);
    if (job->holds)
        kne_json_text(&detail, "note", "the model answered so already");
    kne_json_text(&detail, "device", batch->device);
    kne_json_text(&detail, "engine", batch->version);
    kne_json_int(&detail, "batch", batch->n);
    kne_json_int(&detail, "steps", job->steps);
    kne_json_int(&detail, "neurons", job->n_ensemble);
    kne_json_number(&detail, "seconds", batch->attribute_seconds + batch->optimise_seconds);
    if (applied != 0)
        kne_json_int(&detail, "supersedes", applied);
    kne_event(job->spec.edit_id, "applied", kne_json_close(&detail));
}

/* In a transaction. False: something is locked. */
static bool
write_job(KneBatch *batch, KneJob *job)
{
    int64 applied;

    if (job->verdict == KNE_APPLY && !kne_lock_model(batch->model_id, false))
        return false;
    if (!lock_fact(job->spec.edit_id, &applied))
        return true; /* cancelled, or gone with its model */
    if (job->verdict == KNE_APPLY && applied > job->spec.edit_id)
    {
        /* It was queued again while the newer one was on its way. */
        job->verdict = KNE_FAIL;
        job->final = true;
        job->error = MemoryContextStrdup(batch->mcxt,
                                         psprintf("edit " INT64_FORMAT ", which is newer, is applied to the same fact", applied));
        if (batch->unit)
            return false; /* with those of its unit, in the next round */
    }
    switch (job->verdict)
    {
        case KNE_APPLY:
            apply_job(batch, job, applied);
            job->applied = true;
            break;
        case KNE_FAIL:
            fail_job(job);
            break;
        case KNE_REQUEUE:
            end_job(job, "pending", false, job->error);
            break;
        case KNE_DONE:
        case KNE_ABANDON:
            break;
    }
    return true;
}

/* Of a unit: what one cannot have none has. */
static void
settle_unit(KneBatch *batch)
{
    const KneJob *worst = NULL;
    char         *error;
    int           i;

    for (i = 0; i < batch->n; i++)
    {
        const KneJob *job = &batch->job[i];

        if ((job->verdict == KNE_FAIL && (!worst || worst->verdict != KNE_FAIL)) || (job->verdict == KNE_REQUEUE && !worst))
            worst = job;
    }
    if (!worst)
        return;
    error = worst->error;
    if (worst->verdict == KNE_FAIL)
        error = psprintf("edit " INT64_FORMAT " of its unit failed: %s", worst->spec.edit_id, error);
    for (i = 0; i < batch->n; i++)
    {
        KneJob *job = &batch->job[i];

        if (job->verdict == worst->verdict)
            continue;
        job->verdict = worst->verdict;
        job->error = error;
        job->final = worst->final;
        job->delay = worst->delay;
    }
}

/* Record one verdict, or those of a unit, in a transaction of their own. True: nothing is left to write. */
static bool
record_jobs(KneBatch *batch, KneJob *job, int n)
{
    MemoryContext caller = CurrentMemoryContext;
    MemoryContext scratch = AllocSetContextCreate(caller, "kne record", ALLOCSET_DEFAULT_SIZES);
    volatile bool done = false;
    int           i;

    MemoryContextSwitchTo(scratch);
    PG_TRY();
    {
        bool written = true;

        kne_begin();
        for (i = 0; i < n && written; i++)
            written = write_job(batch, &job[i]);
        if (written)
            kne_commit();
        else
            kne_abort(scratch);
        done = written;
    }
    PG_CATCH();
    {
        ErrorData *e;

        MemoryContextSwitchTo(scratch);
        e = CopyErrorData();
        FlushErrorState();
        kne_abort(scratch);
        for (i = 0; i < n; i++)
            job[i].applied = false;
        if (e->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE || e->sqlerrcode == ERRCODE_T_R_DEADLOCK_DETECTED ||
            e->sqlerrcode == ERRCODE_QUERY_CANCELED)
            ; /* again, later */
        else
        {
            int class = ERRCODE_TO_CATEGORY(e->sqlerrcode);

            ereport(LOG,
                    (errmsg("kne could not record edit " INT64_FORMAT ": %s", job->spec.edit_id, e->message),
                     e->detail ? errdetail_internal("%s", e->detail) : 0));
            for (i = 0; i < n; i++)
            {
                if (job[i].verdict != KNE_APPLY)
                    continue;
                /* A full disk may have room again; anything else will not go away by itself. */
                bool resources = class == ERRCODE_INSUFFICIENT_RESOURCES || class == ERRCODE_OPERATOR_INTERVENTION;

                job[i].verdict = resources ? KNE_REQUEUE : KNE_FAIL;
                job[i].final = !resources;
                job[i].delay = 30;
                job[i].error = MemoryContextStrdup(batch->mcxt, psprintf("could not be recorded: %s", e->message));
            }
        }
    }
    PG_END_TRY();
    MemoryContextSwitchTo(caller);
    MemoryContextDelete(scratch);
    return done;
}

/* ---------------------------------------------------------------- disturbed facts */

/* Facts that held before the batch and no longer do: an event on the edit that made the fact, or on the edit that broke it. */
static void
write_disturbed(const KneBatch *batch)
{
    int64          first = 0;
    StringInfoData by;
    int            i;

    initStringInfo(&by);
    for (i = 0; i < batch->n; i++)
        if (batch->job[i].applied)
        {
            if (first == 0)
                first = batch->job[i].spec.edit_id;
            appendStringInfo(&by, "%s" INT64_FORMAT, by.len > 0 ? "," : "", batch->job[i].spec.edit_id);
        }
    if (first == 0)
        return;
    for (i = 0; i < batch->n_disturbed; i++)
    {
        const KneKnown *k = &batch->disturbed[i];
        StringInfoData  detail;

        kne_json_open(&detail);
        kne_json_text(&detail, "prompt", k->prompt);
        kne_json_text(&detail, "object", k->object);
        if (batch->consolidation)
            kne_json_int(&detail, "consolidation", batch->consolidation);
        else
            appendStringInfo(&detail, ", \"by\": [%s]", by.data);
        kne_event(k->edit_id != 0 ? k->edit_id : first, "disturbed", kne_json_close(&detail));
    }
}

static void
record_disturbed(KneBatch *batch)
{
    MemoryContext caller = CurrentMemoryContext;

    PG_TRY();
    {
        if (batch->n_kept > 0)
            kne_consolidation_look_after(batch);
        kne_begin();
        write_disturbed(batch);
        kne_commit();
    }
    PG_CATCH();
    {
        ErrorData *e;

        MemoryContextSwitchTo(caller);
        e = CopyErrorData();
        FlushErrorState();
        kne_abort(caller);
        ereport(LOG, (errmsg("kne could not record %d disturbed facts: %s", batch->n_disturbed, e->message)));
        FreeErrorData(e);
    }
    PG_END_TRY();
}

/* ---------------------------------------------------------------- all of it */

void
kne_record(KneBatch *batch)
{
    MemoryContext old = MemoryContextSwitchTo(batch->mcxt);
    int           i, k, n;

    if (batch->unit)
        settle_unit(batch);
    for (i = 0; i < batch->n && !batch->consolidation; i += n)
    {
        KneJob *job = &batch->job[i];

        n = batch->unit ? batch->n : 1;
        if (job->verdict == KNE_DONE)
            continue;
        CHECK_FOR_INTERRUPTS();
        if (record_jobs(batch, job, n))
            for (k = 0; k < n; k++)
                job[k].verdict = KNE_DONE;
    }
    if (batch->consolidation)
        kne_consolidation_record(batch);
    else
        for (batch->open = i = 0; i < batch->n; i++)
            batch->open += batch->job[i].verdict != KNE_DONE;
    if (batch->open > 0)
    {
        long wait = Min(100L << Min(batch->rounds, 4), MAX_REPEAT_MS);

        batch->rounds++;
        batch->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), wait);
    }
    else if (batch->n_disturbed > 0 || batch->n_kept > 0)
    {
        record_disturbed(batch);
        batch->n_disturbed = 0;
    }
    MemoryContextSwitchTo(old);
}

/*
 * A worker is the only one of its database, so what is `running` when it starts runs nowhere: the worker or the server
 * died. Nobody is charged, unless it ran alone because it had been under too many deaths before.
 */
bool
kne_repair_orphans(const int64 *in_hand, int n_in_hand)
{
    static const char count[] =
        "SELECT count(*) FROM kne.edit_request r WHERE r.state = 'running' AND r.edit_id <> ALL ($1) AND " KNE_OWN;
    static const char lock[] =
        "SELECT r.edit_id, r.attempts, r.deaths FROM kne.edit_request r"
        " WHERE r.state = 'running' AND r.edit_id <> ALL ($1) AND " KNE_OWN
        " ORDER BY r.edit_id FOR NO KEY UPDATE SKIP LOCKED";
    static const Oid type = INT8ARRAYOID;
    Datum   mine = kne_int8_array(in_hand, n_in_hand);
    uint64  n, i, total;
    KneJob *job;

    kne_sql(count, 1, &type, &mine, NULL);
    total = kne_sql_int8(0, 1);
    if (total == 0)
        return true;
    n = kne_sql(lock, 1, &type, &mine, NULL);
    job = palloc0(sizeof(KneJob) * Max(n, 1));
    for (i = 0; i < n; i++)
    {
        job[i].spec.edit_id = kne_sql_int8(i, 1);
        job[i].attempts = (int32) kne_sql_int8(i, 2);
        job[i].deaths = (int32) kne_sql_int8(i, 3);
    }
    for (i = 0; i < n; i++)
    {
        job[i].death = true;
        job[i].delay = kne_death_delay(job[i].deaths + 1);
        job[i].error = "the worker or the server died while it ran";
        if (total == 1 && job[i].deaths >= KNE_DEATHS_ALONE)
            fail_job(&job[i]);
        else
            end_job(&job[i], "pending", false, job[i].error);
    }
    if (n > 0)
        ereport(LOG,
                (errmsg_plural("kne found " UINT64_FORMAT " edit whose worker had died, and queued it again",
                               "kne found " UINT64_FORMAT " edits whose worker had died, and queued them again",
                               (unsigned long) n, n)));
    return n == total;
}
