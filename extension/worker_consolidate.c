/*
 * worker_consolidate.c - consolidations: the second kind of batch of the editing worker.
 *
 * All active edits of a model are solved together anew, from the unedited base, and their new generation takes the place of the
 * old one in a single transaction. Claim, compute (worker_batch.c) and finish are as for edits. Edits that are not reached together
 * with the others keep the solution that they have: the others are solved again on top of those, until all that are left are reached.
 *
 * Invariant: what is written was computed from exactly the (edit, generation) pairs that it replaces. They are compared under the
 * model's lock, with the rows of the edits locked; if a revert came in between, the consolidation is abandoned.
 *
 * One that somebody asked for waits for the edits asked for before it, and goes before those asked for after it. An automatic one
 * runs when there is nothing else to do, and gives way to edits asked for meanwhile.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "kne_proc.h"

/* ---------------------------------------------------------------- claim */

/* The pairs in force become the batch's jobs. */
static void
take_pairs(KneBatch *batch)
{
    static const char sql[] =
        "SELECT a.edit_id, a.generation, (SELECT max(s.generation) FROM kne.solution s WHERE s.edit_id = a.edit_id) + 1,"
        " r.subject, r.relation, r.object FROM kne.activation a JOIN kne.edit_request r ON r.edit_id = a.edit_id"
        " WHERE a.model_id = $1 AND a.valid_to IS NULL ORDER BY a.edit_id";
    static const Oid type = INT4OID;
    Datum  value = Int32GetDatum(batch->model_id);
    uint64 i, n = kne_sql(sql, 1, &type, &value, NULL);

    batch->n = (int) n;
    batch->job = palloc0(sizeof(KneJob) * Max(n, 1));
    batch->edit_id = palloc(sizeof(int64) * Max(n, 1));
    for (i = 0; i < n; i++)
    {
        KneJob *job = &batch->job[i];

        batch->edit_id[i] = job->spec.edit_id = kne_sql_int8(i, 1);
        job->replaces = (int32) kne_sql_int8(i, 2);
        job->generation = (int32) kne_sql_int8(i, 3);
        job->spec.subject = kne_sql_text(i, 4);
        job->spec.relation = kne_sql_text(i, 5);
        job->spec.object = kne_sql_text(i, 6);
    }
}

KneBatch *
kne_consolidation_claim(bool automatic)
{
    static const char find[] =
        "SELECT r.consolidation_id, r.model_id, r.options::text, r.deaths FROM kne.consolidation r"
        " WHERE r.state = 'pending' AND r.automatic = $2 AND r.model_id <> ALL ($1) AND " KNE_OWN
        " AND (r.not_before IS NULL OR r.not_before <= clock_timestamp())"
        " AND NOT EXISTS (SELECT FROM kne.edit_request o WHERE o.model_id = r.model_id AND o.state IN ('pending', 'running')"
        " AND o.requested_at <= r.requested_at AND o.origin = r.origin AND o.origin_database = r.origin_database)"
        " ORDER BY r.consolidation_id LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED";
    static const char take[] =
        "UPDATE kne.consolidation SET state = CASE WHEN $2 = 0 THEN 'applied' ELSE 'running' END, edits = $2,"
        " started_at = clock_timestamp(), finished_at = CASE WHEN $2 = 0 THEN clock_timestamp() END, not_before = NULL,"
        " error = NULL WHERE consolidation_id = $1";
    static const Oid find_types[] = {INT4ARRAYOID, BOOLOID};
    static const Oid take_types[] = {INT8OID, INT4OID};
    MemoryContext caller = CurrentMemoryContext, mcxt;
    KneBatch     *batch;
    Datum         values[2];

    for (;;)
    {
        values[0] = kne_batch_waiting_models();
        values[1] = BoolGetDatum(automatic);
        if (kne_sql(find, 2, find_types, values, NULL) == 0)
            return NULL;
        mcxt = AllocSetContextCreate(caller, "kne consolidation", ALLOCSET_DEFAULT_SIZES);
        MemoryContextSwitchTo(mcxt);
        batch = palloc0(sizeof(KneBatch));
        batch->mcxt = mcxt;
        batch->consolidation = kne_sql_int8(0, 1);
        batch->automatic = automatic;
        batch->model_id = (int32) kne_sql_int8(0, 2);
        batch->options = kne_sql_text(0, 3);
        batch->whole.deaths = (int32) kne_sql_int8(0, 4);
        batch->whole.verdict = KNE_REQUEUE; /* should anything go wrong that nobody thought of */
        batch->whole.delay = 1;
        batch->open = 1;
        take_pairs(batch);
        MemoryContextSwitchTo(caller);
        values[0] = Int64GetDatum(batch->consolidation);
        values[1] = Int32GetDatum(batch->n);
        kne_sql(take, 2, take_types, values, NULL);
        if (batch->n > 0)
            return batch;
        MemoryContextDelete(mcxt); /* nothing is active: it is done */
    }
}

/* ---------------------------------------------------------------- while the engine computes */

void
kne_consolidation_look(KneBatch *batch)
{
    static const char sql[] =
        "SELECT coalesce((SELECT state = 'running' FROM kne.consolidation WHERE consolidation_id = $1), false)::int,"
        " (EXISTS (SELECT FROM kne.edit_request r WHERE r.state = 'pending' AND " KNE_OWN
        " AND (r.not_before IS NULL OR r.not_before <= clock_timestamp())))::int";
    static const Oid type = INT8OID;
    Datum value = Int64GetDatum(batch->consolidation);
    bool  wanted, edits;

    kne_begin();
    kne_sql(sql, 1, &type, &value, NULL);
    wanted = kne_sql_int8(0, 1) != 0;
    edits = kne_sql_int8(0, 2) != 0;
    kne_commit();
    if (wanted && batch->automatic && edits)
        batch->gave_way = true;
    if (!wanted || batch->gave_way)
        ereport(ERROR, (errcode(ERRCODE_QUERY_CANCELED), errmsg("the consolidation was stopped")));
}

/* Moves the jobs that failed behind the others. Returns how many go on: 0 too when nothing had to be solved for any of these. */
static int
keep_failed(KneBatch *batch)
{
    KneJob *failed = palloc(sizeof(KneJob) * batch->n);
    int     i, n = 0, n_failed = 0, solved = 0;

    for (i = 0; i < batch->n; i++)
        if (batch->job[i].verdict == KNE_FAIL)
            failed[n_failed++] = batch->job[i];
        else
        {
            solved += !batch->job[i].holds;
            batch->job[n++] = batch->job[i];
        }
    memcpy(batch->job + n, failed, sizeof(KneJob) * n_failed);
    for (i = 0; i < batch->n; i++)
        batch->edit_id[i] = batch->job[i].spec.edit_id;
    pfree(failed);
    return n_failed == 0 || solved > 0 ? n : 0;
}

bool
kne_consolidation_outcome(KneBatch *batch)
{
    KneJob *whole = &batch->whole;
    int     i, n;

    batch->open = 1;
    whole->verdict = KNE_APPLY;
    for (i = 0; i < batch->n; i++)
        if (batch->job[i].verdict == KNE_REQUEUE)
        {
            whole->verdict = KNE_REQUEUE;
            return false;
        }
    n = keep_failed(batch);
    if (n == 0)
    {
        whole->verdict = KNE_FAIL;
        whole->error = psprintf("edit " INT64_FORMAT " is not reached together with the others: %s",
                                batch->edit_id[batch->n - 1], batch->job[batch->n - 1].error);
        return false;
    }
    if (n == batch->n)
        return false;
    ereport(LOG, (errmsg("kne: consolidation " INT64_FORMAT ": %d of %d edits keep their solution", batch->consolidation,
                         batch->n - n + batch->n_kept, batch->n + batch->n_kept)));
    batch->n_kept += batch->n - n;
    batch->n = n;
    return true;
}

/* The engine did not answer. */
void
kne_consolidation_judge(KneBatch *batch, const ErrorData *e, const char *error)
{
    KneJob *whole = &batch->whole;

    whole->verdict = KNE_REQUEUE;
    whole->error = MemoryContextStrdup(batch->mcxt, error);
    whole->delay = 1;
    whole->death = false;
    switch (e->sqlerrcode)
    {
        case ERRCODE_CONNECTION_FAILURE: /* the engine died */
            whole->death = true;
            whole->delay = kne_death_delay(whole->deaths + 1);
            if (whole->deaths >= KNE_DEATHS_ALONE)
                whole->verdict = KNE_FAIL;
            break;

        case ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE: /* there is no engine */
            kne_batch_note(error);
            break;

        case ERRCODE_QUERY_CANCELED: /* given way, cancelled, kne.enabled, or somebody's pg_cancel_backend */
            whole->error = NULL;
            if (batch->gave_way)
            {
                whole->verdict = KNE_ABANDON;
                whole->error = "gave way to edits that were asked for meanwhile";
            }
            break;

        case ERRCODE_LOCK_NOT_AVAILABLE:
        case ERRCODE_T_R_DEADLOCK_DETECTED:
            whole->error = NULL;
            break;

        case ERRCODE_INVALID_BINARY_REPRESENTATION: /* the model */
        case ERRCODE_FEATURE_NOT_SUPPORTED:
        case ERRCODE_IO_ERROR:
            whole->delay = kne_batch_fault(batch->model_id);
            kne_batch_note(error);
            break;

        default:
            whole->verdict = KNE_FAIL;
            break;
    }
    if (e->sqlerrcode != ERRCODE_QUERY_CANCELED)
        ereport(LOG, (errmsg("kne: consolidation " INT64_FORMAT ": %s", batch->consolidation, error)));
}

/* ---------------------------------------------------------------- finish */

static void
end_consolidation(int64 id, const char *state, const KneJob *whole, double seconds, int kept)
{
    static const char sql[] =
        "UPDATE kne.consolidation SET state = $2, error = $3, deaths = deaths + $4, kept = $7,"
        " seconds = CASE WHEN $2 = 'applied' THEN $5 END,"
        " finished_at = CASE WHEN $2 <> 'pending' THEN clock_timestamp() END,"
        " started_at = CASE WHEN $2 <> 'pending' THEN started_at END,"
        " not_before = CASE WHEN $2 = 'pending' AND $6 > 0 THEN clock_timestamp() + $6 * '1 second'::interval END"
        " WHERE consolidation_id = $1";
    static const Oid types[] = {INT8OID, TEXTOID, TEXTOID, INT4OID, FLOAT8OID, FLOAT8OID, INT4OID};
    Datum values[7];
    char  nulls[] = "       ";

    values[0] = Int64GetDatum(id);
    values[1] = CStringGetTextDatum(state);
    values[2] = whole->error ? CStringGetTextDatum(whole->error) : (Datum) 0;
    values[3] = Int32GetDatum(whole->death ? 1 : 0);
    values[4] = Float8GetDatum(seconds);
    values[5] = Float8GetDatum(whole->delay);
    values[6] = Int32GetDatum(kept);
    nulls[2] = whole->error ? ' ' : 'n';
    nulls[6] = whole->verdict == KNE_APPLY ? ' ' : 'n';
    kne_sql(sql, 7, types, values, nulls);
}

/* Locks the edits, as revert does, and compares: are the pairs in force those that the batch replaces? */
static bool
pairs_unchanged(const KneBatch *batch)
{
    static const char lock[] =
        "SELECT 1 FROM kne.edit_request WHERE edit_id = ANY ($1) ORDER BY edit_id FOR NO KEY UPDATE NOWAIT";
    static const char compare[] =
        "SELECT 1 FROM (SELECT edit_id, generation FROM kne.activation WHERE model_id = $3 AND valid_to IS NULL) a"
        " FULL JOIN unnest($1, $2) b (edit_id, generation) ON b.edit_id = a.edit_id AND b.generation = a.generation"
        " WHERE a.edit_id IS NULL OR b.edit_id IS NULL LIMIT 1";
    static const Oid types[] = {INT8ARRAYOID, INT4ARRAYOID, INT4OID};
    const int n = batch->n + batch->n_kept;
    int32    *generation = palloc(sizeof(int32) * n);
    Datum     values[3];
    int       i;

    for (i = 0; i < n; i++)
        generation[i] = batch->job[i].replaces;
    values[0] = kne_int8_array(batch->edit_id, n);
    values[1] = kne_int4_array(generation, n);
    values[2] = Int32GetDatum(batch->model_id);
    kne_sql(lock, 1, types, values, NULL);
    return kne_sql(compare, 3, types, values, NULL) == 0;
}

static void
replace_pairs(KneBatch *batch)
{
    /* The provisional end and start; the trigger kne.stamp sets the time at commit. */
    static const char end[] =
        "UPDATE kne.activation SET valid_to = 'infinity' WHERE edit_id = ANY ($1) AND valid_to IS NULL";
    static const char start[] =
        "INSERT INTO kne.activation (model_id, edit_id, generation) SELECT $3, e, g FROM unnest($1, $2) u (e, g)";
    static const Oid types[] = {INT8ARRAYOID, INT4ARRAYOID, INT4OID};
    int32 *generation = palloc(sizeof(int32) * batch->n);
    Datum  values[3];
    int    i;

    for (i = 0; i < batch->n; i++)
    {
        KneJob        *job = &batch->job[i];
        MemoryContext  scratch = AllocSetContextCreate(CurrentMemoryContext, "kne solution", ALLOCSET_DEFAULT_SIZES);
        MemoryContext  old = MemoryContextSwitchTo(scratch);
        StringInfoData detail;

        CHECK_FOR_INTERRUPTS();
        kne_put_solution(batch, job);
        kne_json_open(&detail);
        kne_json_int(&detail, "consolidation", batch->consolidation);
        kne_json_int(&detail, "generation", job->generation);
        if (job->holds)
            kne_json_text(&detail, "note", "the base answers so already");
        kne_json_int(&detail, "batch", batch->n);
        kne_json_int(&detail, "steps", job->steps);
        kne_json_int(&detail, "neurons", job->n_ensemble);
        kne_event(job->spec.edit_id, "consolidated", kne_json_close(&detail));
        MemoryContextSwitchTo(old);
        MemoryContextDelete(scratch);
        generation[i] = job->generation;
    }
    values[0] = kne_int8_array(batch->edit_id, batch->n);
    values[1] = kne_int4_array(generation, batch->n);
    values[2] = Int32GetDatum(batch->model_id);
    kne_sql(end, 1, types, values, NULL);
    kne_sql(start, 3, types, values, NULL);
}

/* What the history says of the edits that have no new generation. */
static void
note_kept(const KneBatch *batch)
{
    int i;

    for (i = batch->n; i < batch->n + batch->n_kept; i++)
    {
        const KneJob  *job = &batch->job[i];
        StringInfoData detail;

        kne_json_open(&detail);
        kne_json_int(&detail, "consolidation", batch->consolidation);
        kne_json_int(&detail, "generation", job->replaces);
        kne_json_text(&detail, "error", job->error);
        kne_event(job->spec.edit_id, "kept", kne_json_close(&detail));
    }
}

/* In a transaction. False: something is locked. */
static bool
write_consolidation(KneBatch *batch)
{
    static const char lock[] = "SELECT state FROM kne.consolidation WHERE consolidation_id = $1 FOR NO KEY UPDATE NOWAIT";
    static const Oid  type = INT8OID;
    KneJob *whole = &batch->whole;
    Datum   id = Int64GetDatum(batch->consolidation);

    if (whole->verdict == KNE_APPLY && !kne_lock_model(batch->model_id, false))
        return false;
    if (kne_sql(lock, 1, &type, &id, NULL) == 0 || strcmp(kne_sql_text(0, 1), "running") != 0)
    {
        whole->verdict = KNE_DONE; /* cancelled, or gone with its model */
        return true;
    }
    if (whole->verdict == KNE_APPLY && !pairs_unchanged(batch))
    {
        whole->verdict = KNE_ABANDON;
        whole->error = "the set of active edits changed meanwhile";
    }
    if (whole->verdict == KNE_APPLY)
    {
        replace_pairs(batch);
        note_kept(batch);
    }
    end_consolidation(batch->consolidation,
                      whole->verdict == KNE_APPLY ? "applied" : whole->verdict == KNE_FAIL ? "failed"
                      : whole->verdict == KNE_ABANDON ? "abandoned" : "pending",
                      whole, batch->attribute_seconds + batch->optimise_seconds, batch->n_kept);
    return true;
}

void
kne_consolidation_record(KneBatch *batch)
{
    MemoryContext caller = MemoryContextSwitchTo(batch->mcxt);
    MemoryContext scratch = AllocSetContextCreate(batch->mcxt, "kne record", ALLOCSET_DEFAULT_SIZES);
    KneJob       *whole = &batch->whole;
    volatile bool done = false;
    int           i;

    MemoryContextSwitchTo(scratch);
    PG_TRY();
    {
        bool written;

        kne_begin();
        written = write_consolidation(batch);
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
        if (e->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE && e->sqlerrcode != ERRCODE_T_R_DEADLOCK_DETECTED &&
            e->sqlerrcode != ERRCODE_QUERY_CANCELED)
        {
            ereport(LOG, (errmsg("kne could not record consolidation " INT64_FORMAT ": %s", batch->consolidation, e->message)));
            if (whole->verdict == KNE_APPLY)
            {
                whole->verdict = KNE_FAIL;
                whole->error = MemoryContextStrdup(batch->mcxt, psprintf("could not be recorded: %s", e->message));
            }
        }
    }
    PG_END_TRY();
    MemoryContextSwitchTo(caller);
    MemoryContextDelete(scratch);
    batch->open = done ? 0 : 1;
    for (i = 0; i < batch->n && done; i++)
        batch->job[i].applied = whole->verdict == KNE_APPLY;
}

void
kne_consolidation_look_after(KneBatch *batch)
{
    KneKnown *disturbed;
    KneView  *view;
    KneReply  reply;
    kne_wbuf  w;
    int       i, k, n = batch->n_disturbed;

    if (batch->whole.verdict != KNE_APPLY)
        return;
    disturbed = palloc0(sizeof(KneKnown) * (n + batch->n_kept));
    kne_begin();
    view = kne_view_get(kne_model_by_id(batch->model_id), KNE_NOW, NULL, 0);
    kne_wbuf_init(&w);
    kne_put_view(&w, view);
    kne_put_u32(&w, (uint32) batch->n_kept);
    for (i = 0; i < batch->n_kept; i++)
    {
        const KneJob *job = &batch->job[batch->n + i];

        disturbed[n + i].edit_id = job->spec.edit_id;
        disturbed[n + i].object = job->spec.object;
        disturbed[n + i].prompt = kne_prompt(job->spec.subject, job->spec.relation);
        kne_put_text(&w, disturbed[n + i].prompt);
        kne_put_text(&w, job->spec.object);
    }
    kne_commit();
    if (n > 0)
        memcpy(disturbed, batch->disturbed, sizeof(KneKnown) * n);
    kne_call_view(view, KNE_MSG_KNOWS, &w, NULL, NULL, &reply);
    if (kne_get_count(&reply.body, 1) != (uint32) batch->n_kept)
        ereport(ERROR, (errcode(ERRCODE_PROTOCOL_VIOLATION), errmsg("the kne engine sent a malformed answer")));
    for (i = 0; i < batch->n_kept; i++)
    {
        const bool holds = kne_get_u8(&reply.body) != 0;

        for (k = 0; k < batch->n_disturbed && disturbed[k].edit_id != batch->job[batch->n + i].spec.edit_id; k++)
            ;
        if (!holds && k == batch->n_disturbed)
            disturbed[n++] = disturbed[batch->n_disturbed + i];
    }
    kne_reply_done(&reply);
    batch->disturbed = disturbed;
    batch->n_disturbed = n;
}

/* As kne_repair_orphans: what is running when the worker starts runs nowhere. */
bool
kne_repair_consolidations(const int64 *in_hand, int n_in_hand)
{
    static const char lock[] =
        "SELECT r.consolidation_id, r.deaths FROM kne.consolidation r WHERE r.state = 'running'"
        " AND r.consolidation_id <> ALL ($1) AND " KNE_OWN " FOR NO KEY UPDATE SKIP LOCKED";
    static const char left[] =
        "SELECT count(*) FROM kne.consolidation r WHERE r.state = 'running'"
        " AND r.consolidation_id <> ALL ($1) AND " KNE_OWN;
    static const Oid type = INT8ARRAYOID;
    Datum   mine = kne_int8_array(in_hand, n_in_hand);
    uint64  i, n = kne_sql(lock, 1, &type, &mine, NULL);
    int64  *id = palloc(sizeof(int64) * Max(n, 1));
    KneJob *whole = palloc0(sizeof(KneJob) * Max(n, 1));

    for (i = 0; i < n; i++)
    {
        id[i] = kne_sql_int8(i, 1);
        whole[i].deaths = (int32) kne_sql_int8(i, 2);
    }
    for (i = 0; i < n; i++)
    {
        whole[i].death = true;
        whole[i].error = "the worker or the server died while it ran";
        whole[i].delay = kne_death_delay(whole[i].deaths + 1);
        end_consolidation(id[i], whole[i].deaths >= KNE_DEATHS_ALONE ? "failed" : "pending", &whole[i], 0, 0);
    }
    kne_sql(left, 1, &type, &mine, NULL);
    return kne_sql_int8(0, 1) == 0;
}

/* ---------------------------------------------------------------- in the background */

/*
 * For each model: how much has happened since its edits were last consolidated, when an automatic one may run next (naptime after the
 * last that ended, however it ended), and whether anything happened since; none where a subscription brings edits. $1 threshold, $2 scale factor, $3 naptime.
 */
#define DUE \
    "SELECT m.model_id, last_try + $3 * '1 second'::interval AS not_before FROM kne.model m," \
    " LATERAL (SELECT max(c.finished_at) FILTER (WHERE c.state = 'applied') AS last, max(c.finished_at)" \
    "  FILTER (WHERE c.automatic) AS last_try FROM kne.consolidation c WHERE c.model_id = m.model_id) c," \
    " LATERAL (SELECT count(*) AS n, count(*) FILTER (WHERE f) AS fresh," \
    "  max(a.valid_from) FILTER (WHERE f) AS at FROM kne.activation a JOIN kne.solution s" \
    "  ON s.edit_id = a.edit_id AND s.generation = a.generation," \
    "  LATERAL (SELECT s.consolidation_id IS NULL AND NOT s.provenance ? 'rebase') f (f) WHERE a.model_id = m.model_id AND a.valid_to IS NULL) a," \
    " LATERAL (SELECT count(*) AS n, max(e.at) AS at FROM kne.edit_event e JOIN kne.edit_request r ON r.edit_id = e.edit_id" \
    "  WHERE r.model_id = m.model_id AND e.event = 'disturbed' AND (e.detail ? 'consolidation') IS NOT TRUE" \
    "  AND e.at > coalesce(c.last, '-infinity')) d" \
    " WHERE greatest(a.fresh, d.n) > $1 + $2 * a.n AND a.n > 0" \
    " AND (last_try IS NULL OR greatest(a.at, d.at) > last_try)" \
    " AND NOT EXISTS (SELECT FROM kne.consolidation c WHERE c.model_id = m.model_id AND c.state IN ('pending', 'running'))" \
    " AND NOT EXISTS (SELECT" KNE_SUBSCRIPTIONS ")"

static const Oid due_types[] = {INT4OID, FLOAT8OID, INT4OID};

static void
due_values(Datum *values)
{
    values[0] = Int32GetDatum(kne_autoconsolidate_threshold);
    values[1] = Float8GetDatum(kne_autoconsolidate_scale_factor);
    values[2] = Int32GetDatum(kne_autoconsolidate_naptime);
}

void
kne_autoconsolidate_queue(void)
{
    static const char find[] =
        "SELECT model_id FROM (" DUE ") q WHERE q.not_before IS NULL OR q.not_before <= clock_timestamp()";
    static const char queue[] =
        "INSERT INTO kne.consolidation (model_id, options, automatic, requested_by, origin, origin_database)"
        " SELECT $1, $2::jsonb, true, current_user, i.origin,"
        " (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) FROM kne.instance i";
    static const Oid types[] = {INT4OID, TEXTOID};
    Datum  values[3];
    uint64 i, n;
    int32 *model_id;

    if (!kne_autoconsolidate)
        return;
    due_values(values);
    n = kne_sql(find, 3, due_types, values, NULL);
    model_id = palloc(sizeof(int32) * Max(n, 1));
    for (i = 0; i < n; i++)
        model_id[i] = (int32) kne_sql_int8(i, 1);
    for (i = 0; i < n; i++)
    {
        char *options = kne_options_resolved(model_id[i], "consolidation");

        values[0] = Int32GetDatum(model_id[i]);
        values[1] = options ? CStringGetTextDatum(options) : (Datum) 0;
        kne_sql(queue, 2, types, values, options ? NULL : " n");
    }
}

TimestampTz
kne_consolidation_next(TimestampTz stuck_until)
{
    static const char pending[] =
        "SELECT min(r.not_before) FILTER (WHERE r.not_before > clock_timestamp()),"
        " min(r.requested_at) FILTER (WHERE r.not_before IS NULL OR r.not_before <= clock_timestamp())"
        " FROM kne.consolidation r WHERE r.state = 'pending' AND " KNE_OWN;
    static const char due[] = "SELECT min(coalesce(not_before, clock_timestamp())) FROM (" DUE ") q";
    TimestampTz next, t;
    Datum       values[3];

    kne_sql(pending, 0, NULL, NULL, NULL);
    next = kne_sql_time(0, 1);
    if (kne_sql_time(0, 2) != 0)
        next = next == 0 ? stuck_until : Min(next, stuck_until);
    if (kne_autoconsolidate)
    {
        due_values(values);
        kne_sql(due, 3, due_types, values, NULL);
        t = kne_sql_time(0, 1);
        if (t != 0)
        {
            t = Max(t, TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 100));
            next = next == 0 ? t : Min(next, t);
        }
    }
    return next;
}
