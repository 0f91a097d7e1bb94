/*
 * worker_batch.c - one batch of edits: claim it, have the engine compute it, and judge what went wrong.
 *
 * Nothing is open in the database while the engine computes. Whoever waits for it looks, when a commit woke the worker, whether an
 * edit in hand was cancelled, and passes that on to the engine.
 *
 * What goes wrong is told apart by whose fault it is, see judge(): an edit's, the engine's, the model's, nobody's. The
 * outcome is a verdict for each edit in any case; worker_record.c writes it.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "kne_proc.h"

#define MAX_FAULTS 32 /* models that wait because of a fault of theirs */
#define FAULT_DELAY_MAX 300
#define MAX_PASSED 16 /* units of which something is locked, in one claim */
#define LOOK_MS 150 /* at least so long between two looks for cancelled edits */

typedef struct Fault
{
    int32       model_id;
    int         delay; /* seconds; the next will be twice that */
    TimestampTz until;
} Fault;

static Fault       fault[MAX_FAULTS];
static int         n_faults = 0;
static int         batch_limit = INT_MAX; /* smaller after a batch was too much for the engine */
static TimestampTz looked_at = 0;
static bool        look_again = false;

void
kne_batch_note(const char *note)
{
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    strlcpy(KNE_MORE->note, note, sizeof(KNE_MORE->note));
    LWLockRelease(&kne_shared->lock);
}

static void
show_batch(const KneBatch *batch, const char *what)
{
    char text[128];

    if (batch->consolidation)
        snprintf(text, sizeof(text), "kne: consolidation " INT64_FORMAT " of %d edits, %s", batch->consolidation, batch->n, what);
    else if (batch->n == 1)
        snprintf(text, sizeof(text), "kne: edit " INT64_FORMAT ", %s", batch->edit_id[0], what);
    else
        snprintf(text, sizeof(text), "kne: edit " INT64_FORMAT " and %d more, %s", batch->edit_id[0], batch->n - 1, what);
    pgstat_report_activity(STATE_RUNNING, text);
    kne_worker_show(text);
}

/* ---------------------------------------------------------------- faults of models */

static Fault *
fault_of(int32 model_id)
{
    int i;

    for (i = 0; i < n_faults; i++)
        if (fault[i].model_id == model_id)
            return &fault[i];
    return NULL;
}

/* When the first of the models that wait may be tried again; 0: none waits. */
TimestampTz
kne_batch_fault_over(void)
{
    TimestampTz now = GetCurrentTimestamp(), first = 0;
    int         i;

    for (i = 0; i < n_faults; i++)
        if (fault[i].until > now && (first == 0 || fault[i].until < first))
            first = fault[i].until;
    return first;
}

int
kne_batch_fault(int32 model_id)
{
    Fault *f = fault_of(model_id);

    if (!f)
    {
        if (n_faults == MAX_FAULTS)
            memmove(fault, fault + 1, sizeof(Fault) * --n_faults);
        f = &fault[n_faults++];
        f->model_id = model_id;
        f->delay = KNE_MORE->fault_delay; /* what an earlier worker came to */
    }
    f->delay = Min(Max(f->delay * 2, 1), FAULT_DELAY_MAX);
    f->until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), f->delay * 1000L);
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_MORE->fault_delay = f->delay;
    LWLockRelease(&kne_shared->lock);
    return f->delay;
}

static void
clear_fault(int32 model_id)
{
    Fault *f = fault_of(model_id);

    if (f)
        *f = fault[--n_faults];
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_MORE->failures = 0;
    KNE_MORE->fault_delay = 0;
    KNE_MORE->note[0] = '\0';
    LWLockRelease(&kne_shared->lock);
}

Datum
kne_batch_waiting_models(void)
{
    TimestampTz now = GetCurrentTimestamp();
    int32       model_id[MAX_FAULTS];
    int         i, n = 0;

    for (i = 0; i < n_faults; i++)
        if (fault[i].until > now)
            model_id[n++] = fault[i].model_id;
    return kne_int4_array(model_id, n);
}

/* ---------------------------------------------------------------- claim */

KneBatch *
kne_batch_claim(void)
{
/*
 * An older request of the fact that is not finished. OFFSET 0 keeps it a question asked row by row, of edit_request_unfinished: the planner
 * would finish an anti join before the LIMIT where it thinks that few are pending, as it does until statistics have seen
 * thousands just inserted. From the youngest down, for at the old end of a busy fact are index entries of what is finished.
 */
#define HELD_BACK(r) \
    "EXISTS (SELECT FROM kne.edit_request o WHERE o.model_id = " r ".model_id AND o.subject = " r ".subject" \
    " AND o.relation = " r ".relation AND o.edit_id < " r ".edit_id AND o.state IN ('pending', 'running')" \
    " AND o.origin = " r ".origin AND o.origin_database = " r ".origin_database" \
    " ORDER BY o.edit_id DESC OFFSET 0)"
/* A unit is ready when each of its edits is. */
#define READY \
    " FROM kne.edit_request r WHERE r.state = 'pending' AND " KNE_OWN \
    " AND (r.not_before IS NULL OR r.not_before <= clock_timestamp()) AND NOT " HELD_BACK("r") \
    " AND (r.unit IS NULL OR NOT EXISTS (SELECT FROM kne.edit_request u WHERE u.unit = r.unit" \
    " AND (u.state = 'running' OR u.state = 'pending' AND " HELD_BACK("u") ")))"
    /* The oldest of each model, for that is what there is an index for; of these the oldest. */
    static const char first[] =
        "SELECT q.edit_id, q.model_id, q.deaths, q.options, q.unit FROM kne.model m CROSS JOIN LATERAL"
        " (SELECT r.edit_id, r.model_id, r.deaths, r.options::text AS options, r.unit" READY
        " AND r.model_id = m.model_id AND (r.unit IS NULL OR r.unit <> ALL ($2))"
        " ORDER BY r.edit_id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) q"
        " WHERE m.model_id <> ALL ($1) ORDER BY q.edit_id LIMIT 1";
    static const char more[] =
        "SELECT r.edit_id, r.subject, r.relation, r.object, r.attempts, r.deaths" READY
        " AND r.model_id = $1 AND r.options IS NOT DISTINCT FROM $2::jsonb AND r.edit_id >= $3"
        " AND (r.deaths < $5 OR r.edit_id = $3 OR $6 > 0) AND coalesce(r.unit, 0) = $6"
        " ORDER BY r.edit_id LIMIT $4 FOR NO KEY UPDATE OF r SKIP LOCKED";
    static const char whole[] = "SELECT count(*) FROM kne.edit_request WHERE unit = $1 AND state = 'pending'";
    static const char take[] =
        "UPDATE kne.edit_request SET state = 'running', started_at = clock_timestamp(), finished_at = NULL,"
        " not_before = NULL WHERE edit_id = ANY ($1)";
    static const Oid first_types[] = {INT4ARRAYOID, INT8ARRAYOID};
    static const Oid more_types[] = {INT4OID, TEXTOID, INT8OID, INT8OID, INT4OID, INT8OID};
    static const Oid whole_types[] = {INT8OID};
    static const Oid take_types[] = {INT8ARRAYOID};
    MemoryContext caller = CurrentMemoryContext, mcxt;
    KneBatch     *batch;
    Datum         values[6];
    char          nulls[] = "      ";
    uint64        n, i;
    int64         oldest, unit, passed[MAX_PASSED];
    int32         model_id, deaths;
    int           n_passed = 0;
    char         *options;

again:
    values[0] = kne_batch_waiting_models();
    values[1] = kne_int8_array(passed, n_passed);
    if (kne_sql(first, 2, first_types, values, NULL) == 0)
        return NULL;
    oldest = kne_sql_int8(0, 1);
    model_id = (int32) kne_sql_int8(0, 2);
    deaths = (int32) kne_sql_int8(0, 3);
    options = kne_sql_text(0, 4);
    unit = kne_sql_int8(0, 5);

    values[0] = Int32GetDatum(model_id);
    values[1] = options ? CStringGetTextDatum(options) : (Datum) 0;
    nulls[1] = options ? ' ' : 'n';
    values[2] = Int64GetDatum(oldest);
    values[3] = Int64GetDatum(unit ? PG_INT32_MAX : deaths >= KNE_DEATHS_ALONE ? 1
                              : Min(Min(kne_batch_size, batch_limit), kne_batch_most(options, kne_model_by_id(model_id))));
    values[4] = Int32GetDatum(KNE_DEATHS_ALONE);
    values[5] = Int64GetDatum(unit);
    n = kne_sql(more, 6, more_types, values, nulls);
    if (unit)
    {
        values[0] = Int64GetDatum(unit);
        kne_sql(whole, 1, whole_types, values, NULL);
        if ((uint64) kne_sql_int8(0, 1) != n)
        {
            /* One of it is locked, so the unit is passed by. */
            if (n_passed == MAX_PASSED)
                return NULL;
            passed[n_passed++] = unit;
            goto again;
        }
        values[0] = Int32GetDatum(model_id);
        n = kne_sql(more, 6, more_types, values, nulls);
    }
    if (n == 0)
        return NULL;

    mcxt = AllocSetContextCreate(CurrentMemoryContext, "kne batch", ALLOCSET_DEFAULT_SIZES); /* until it is committed */
    MemoryContextSwitchTo(mcxt);
    batch = palloc0(sizeof(KneBatch));
    batch->mcxt = mcxt;
    batch->model_id = model_id;
    batch->options = options ? pstrdup(options) : NULL;
    batch->unit = unit;
    batch->n = batch->open = (int) n;
    batch->job = palloc0(sizeof(KneJob) * n);
    batch->edit_id = palloc(sizeof(int64) * n);
    for (i = 0; i < n; i++)
    {
        KneJob *job = &batch->job[i];

        batch->edit_id[i] = job->spec.edit_id = kne_sql_int8(i, 1);
        job->spec.subject = kne_sql_text(i, 2);
        job->spec.relation = kne_sql_text(i, 3);
        job->spec.object = kne_sql_text(i, 4);
        job->attempts = (int32) kne_sql_int8(i, 5);
        job->deaths = (int32) kne_sql_int8(i, 6);
        job->verdict = KNE_REQUEUE; /* should anything go wrong that nobody thought of */
        job->delay = 1;
    }
    MemoryContextSwitchTo(caller);

    values[0] = kne_int8_array(batch->edit_id, batch->n);
    kne_sql(take, 1, take_types, values, NULL);
    for (i = 0; i < n; i++)
        kne_event(batch->edit_id[i], "started", NULL);
    return batch;
}

/* ---------------------------------------------------------------- compute */

static void
progress(void *arg, kne_rbuf *body)
{
    static const char *const names[] = {"load", "attribute", "optimise", "check"};
    KneBatch *batch = arg;
    uint32    phase = kne_get_u32(body);
    uint32    done = kne_get_u32(body);
    uint32    total = kne_get_u32(body);
    float     loss = kne_get_f32(body);
    uint32    finished = kne_get_u32(body);
    char      what[80];

    if (body->bad)
        return;
    snprintf(what, sizeof(what), "%s step %u of %u", phase < lengthof(names) ? names[phase] : "work", done, total);
    show_batch(batch, what);
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_SLOT->phase = phase;
    KNE_SLOT->done = done;
    KNE_SLOT->total = total;
    KNE_SLOT->loss = loss;
    KNE_SLOT->finished = finished;
    LWLockRelease(&kne_shared->lock);
}

/*
 * A commit may have cancelled edits of the batch: look, and tell the engine. False: it cannot be told yet. When none is left
 * that anybody waits for, hang up: then the engine stops at once, whatever it is at, and not only between two steps of an edit.
 */
static bool
look_for_cancelled(KneBatch *batch)
{
    static const char sql[] =
        "SELECT e FROM pg_catalog.unnest($1) e WHERE NOT EXISTS"
        " (SELECT FROM kne.edit_request r WHERE r.edit_id = e AND r.state = 'running')";
    static const Oid type = INT8ARRAYOID;
    Datum   value;
    uint64  n, i;
    int64  *gone;
    bool    all_told = true;

    kne_begin();
    value = kne_int8_array(batch->edit_id, batch->n);
    n = kne_sql(sql, 1, &type, &value, NULL);
    gone = palloc(sizeof(int64) * Max(n, 1));
    for (i = 0; i < n; i++)
        gone[i] = kne_sql_int8(i, 1);
    kne_commit();
    if (n == batch->n)
        ereport(ERROR, (errcode(ERRCODE_QUERY_CANCELED), errmsg("every edit of the batch was cancelled")));
    for (i = 0; i < n; i++)
    {
        int k;

        for (k = 0; k < batch->n; k++)
            if (batch->edit_id[k] == gone[i] && !batch->job[k].told)
                all_told &= batch->job[k].told = kne_call_cancel(gone[i]);
    }
    return all_told;
}

/* While the engine computes. */
static void
while_computing(void *arg)
{
    KneBatch   *batch = arg;
    TimestampTz now;
    bool        look;

    kne_worker_reload();
    if (!kne_enabled)
        ereport(ERROR, (errcode(ERRCODE_QUERY_CANCELED), errmsg("kne.enabled was switched off")));
    now = GetCurrentTimestamp();
    if (!TimestampDifferenceExceeds(looked_at, now, LOOK_MS))
        return; /* `wanted` stays, the next wake-up is not far */
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    look = KNE_SLOT->wanted;
    KNE_SLOT->wanted = false; /* new requests are looked for after the batch in any case */
    LWLockRelease(&kne_shared->lock);
    if (!look && !look_again)
        return;
    looked_at = now;
    if (batch->consolidation)
        kne_consolidation_look(batch);
    else
        look_again = !look_for_cancelled(batch);
}

/* The model that the batch starts from: without the edits that it would supersede, or without those to consolidate. */
static KneView *
view_before(KneBatch *batch)
{
    static const char same_facts[] =
        "SELECT r.edit_id FROM kne.edit_request r, kne.edit_request b WHERE b.edit_id = ANY ($1) AND r.state = 'applied'"
        " AND r.model_id = b.model_id AND r.subject = b.subject AND r.relation = b.relation";
    static const Oid type = INT8ARRAYOID;
    Datum   value;
    uint64  n, i;
    int64  *without;

    if (batch->consolidation)
        return kne_view_get(kne_model_by_id(batch->model_id), KNE_NOW, batch->edit_id, batch->n);
    value = kne_int8_array(batch->edit_id, batch->n);
    n = kne_sql(same_facts, 1, &type, &value, NULL);
    without = palloc(sizeof(int64) * Max(n, 1));
    for (i = 0; i < n; i++)
        without[i] = kne_sql_int8(i, 1);
    return kne_view_get(kne_model_by_id(batch->model_id), KNE_NOW, without, (int) n);
}

/* True: once more, with what is left of a consolidation. */
static bool
compute(KneBatch *batch)
{
    KneEditSpec *spec = palloc(sizeof(KneEditSpec) * batch->n);
    KneView     *view;
    kne_wbuf     w;
    KneReply     reply;
    size_t       after_view;
    int          k;

    kne_begin();
    view = view_before(batch);
    for (k = 0; k < batch->n; k++)
        spec[k] = batch->job[k].spec;
    kne_wbuf_init(&w);
    kne_put_view(&w, view);
    after_view = w.len;
    kne_put_edit_body(&w, view->model, batch->options, batch->n, spec);
    batch->again = kne_what_was_asked(view, batch->options, batch->edit_id, batch->n, w.p + after_view, w.len - after_view);
    kne_commit();

    look_again = batch->consolidation != 0; /* it may have been cancelled before it was at work */
    kne_call_idle(while_computing, batch);
    kne_call_view(view, KNE_MSG_EDIT, &w, progress, batch, &reply);
    kne_call_idle(NULL, NULL);

    kne_begin();
    kne_read_outcomes(batch, &reply, w.p + after_view, w.len - after_view);
    kne_commit();
    return batch->consolidation && kne_consolidation_outcome(batch);
}

/* ---------------------------------------------------------------- a batch that did not come back */

static void
every_job(KneBatch *batch, KneVerdict verdict, const char *error, double delay)
{
    int i;

    for (i = 0; i < batch->n; i++)
    {
        KneJob *job = &batch->job[i];

        job->verdict = verdict;
        job->error = error ? MemoryContextStrdup(batch->mcxt, error) : NULL;
        job->delay = delay;
        job->final = job->death = false;
    }
    batch->open = batch->n;
}

static void
judge(KneBatch *batch, const ErrorData *e)
{
    char *error = e->detail ? psprintf("%s (%s)", e->message, e->detail) : e->message;
    int   i;

    if (batch->consolidation)
    {
        kne_consolidation_judge(batch, e, error);
        return;
    }
    switch (e->sqlerrcode)
    {
        case ERRCODE_CONNECTION_FAILURE: /* the engine died */
            every_job(batch, KNE_REQUEUE, error, 0);
            for (i = 0; i < batch->n; i++)
            {
                KneJob *job = &batch->job[i];

                job->death = true;
                job->delay = kne_death_delay(job->deaths + 1);
                if ((batch->n == 1 || batch->unit) && job->deaths >= KNE_DEATHS_ALONE)
                    job->verdict = KNE_FAIL; /* it was alone, again */
            }
            break;

        case ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE: /* there is no engine */
            every_job(batch, KNE_REQUEUE, error, 1);
            kne_batch_note(error);
            break;

        case ERRCODE_QUERY_CANCELED: /* kne.enabled, all were cancelled, or somebody's pg_cancel_backend */
            every_job(batch, KNE_REQUEUE, NULL, kne_enabled ? 1 : 0);
            break;

        case ERRCODE_LOCK_NOT_AVAILABLE:
        case ERRCODE_T_R_DEADLOCK_DETECTED:
            every_job(batch, KNE_REQUEUE, NULL, 1);
            break;

        case ERRCODE_INVALID_BINARY_REPRESENTATION: /* the model */
        case ERRCODE_FEATURE_NOT_SUPPORTED:
        case ERRCODE_IO_ERROR:
            every_job(batch, KNE_REQUEUE, error, kne_batch_fault(batch->model_id));
            kne_batch_note(error);
            break;

        case ERRCODE_INVALID_PARAMETER_VALUE: /* the options, which they share */
            every_job(batch, KNE_FAIL, error, 0);
            for (i = 0; i < batch->n; i++)
                batch->job[i].final = true;
            break;

        default:
            if (batch->n > 1 && !batch->unit)
            {
                /* Too much at once, or one of them is to blame: find out with less. */
                bool size = e->sqlerrcode == ERRCODE_OUT_OF_MEMORY || e->sqlerrcode == ERRCODE_PROGRAM_LIMIT_EXCEEDED;

                batch_limit = size ? batch->n / 2 : 1;
                every_job(batch, KNE_REQUEUE, error, 0);
                break;
            }
            every_job(batch, KNE_FAIL, error, 5.0 * (1 << Min(batch->job[0].attempts, 6)));
            for (i = 0; i < batch->n; i++)
                batch->job[i].final = e->sqlerrcode != ERRCODE_OUT_OF_MEMORY && e->sqlerrcode != ERRCODE_SYSTEM_ERROR;
            break;
    }
    if (e->sqlerrcode != ERRCODE_QUERY_CANCELED)
        ereport(LOG,
                (errmsg("kne: edit " INT64_FORMAT "%s: %s", batch->edit_id[0],
                        batch->n > 1 ? " and others of its batch" : "", error)));
}

void
kne_batch_run(KneBatch *batch)
{
    MemoryContext caller = CurrentMemoryContext;

    show_batch(batch, "start");
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_SLOT->model_id = batch->model_id;
    KNE_SLOT->first_edit = batch->edit_id[0];
    KNE_SLOT->consolidation = batch->consolidation;
    KNE_SLOT->n_edits = batch->n;
    KNE_SLOT->phase = KNE_SLOT->done = KNE_SLOT->total = KNE_SLOT->finished = 0;
    KNE_SLOT->loss = 0;
    KNE_SLOT->started_at = GetCurrentTimestamp();
    LWLockRelease(&kne_shared->lock);

    MemoryContextSwitchTo(batch->mcxt);
    PG_TRY();
    {
        while (compute(batch))
            ;
        clear_fault(batch->model_id);
        if (batch_limit < kne_batch_size && !batch->consolidation)
            batch_limit *= 2;
    }
    PG_CATCH();
    {
        ErrorData *e;

        MemoryContextSwitchTo(batch->mcxt);
        e = CopyErrorData();
        FlushErrorState();
        kne_call_idle(NULL, NULL);
        kne_abort(batch->mcxt);
        judge(batch, e);
    }
    PG_END_TRY();
    MemoryContextSwitchTo(caller);

    show_batch(batch, "record");
    kne_record(batch);
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_SLOT->n_edits = 0;
    LWLockRelease(&kne_shared->lock);
}
