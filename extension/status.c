/*
 * status.c - what the processes do: kne_status() for people, kne_stat_workers() for the views.
 *
 * Both read shared memory under its lock and format afterwards. Only the engine's row asks the engine, and only while it runs; an
 * engine that does not answer is itself worth a row, so that failure becomes the row's note.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h" /* get_database_name, from v18 on */
#include "utils/memutils.h"

#include "kne_proc.h"

#define PATIENCE_MS 2000 /* an engine that does not answer must not hide that it does not */

PG_FUNCTION_INFO_V1(kne_status);
PG_FUNCTION_INFO_V1(kne_stat_workers);

enum
{
    WORKER, PID, DATABASE, STATE, DEVICE, DEVICE_NOTE, MODELS, PRIVATE_BYTES, MAPPED_BYTES, ENGINE_VERSION, SINCE, NOTE,
    STATUS_COLUMNS
};

typedef struct Row
{
    Datum value[STATUS_COLUMNS];
    bool  isnull[STATUS_COLUMNS];
} Row;

static void
clear(Row *row)
{
    memset(row->value, 0, sizeof(row->value));
    memset(row->isnull, true, sizeof(row->isnull));
}

static void
set(Row *row, int column, Datum value)
{
    row->value[column] = value;
    row->isnull[column] = false;
}

static void
set_text(Row *row, int column, const char *text)
{
    if (text && text[0])
        set(row, column, CStringGetTextDatum(kne_safe_text(pstrdup(text))));
}

static void
set_time(Row *row, int column, TimestampTz t)
{
    if (t != 0)
        set(row, column, TimestampTzGetDatum(t));
}

static void
put(ReturnSetInfo *rsinfo, Row *row)
{
    tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, row->value, row->isnull);
}

static KneShared *
copy_shared(void)
{
    KneShared *copy = palloc(sizeof(KneProcShared));

    LWLockAcquire(&kne_shared->lock, LW_SHARED);
    memcpy(copy, kne_shared, sizeof(KneProcShared));
    LWLockRelease(&kne_shared->lock);
    return copy;
}

static char *
get_text(kne_rbuf *r)
{
    StringInfoData s;

    initStringInfo(&s);
    kne_get_text(r, &s);
    return s.data;
}

/* The engine's own word. */
static void
ask_engine(Row *row)
{
    KneReply    reply;
    kne_rbuf   *r = &reply.body;
    char       *device, *device_note, *work;
    int64       private_bytes, mapped_bytes;
    uint64      reads, edits;
    uint32      waiting, n, i;
    Datum      *models;
    StringInfoData note;

    kne_call(KNE_MSG_STATUS, NULL, NULL, NULL, &reply);
    (void) kne_get_u64(r); /* pid, known */
    device = get_text(r);
    device_note = get_text(r);
    private_bytes = kne_get_i64(r);
    mapped_bytes = kne_get_i64(r);
    (void) kne_get_f64(r); /* seconds up: `since` says it */
    waiting = kne_get_u32(r);
    n = kne_get_count(r, 20);
    models = palloc(sizeof(Datum) * Max(n, 1));
    for (i = 0; i < n; i++)
    {
        char *path = get_text(r);
        char *slash;

        while ((slash = strrchr(path, '/')) != NULL && slash[1] == '\0' && slash != path)
            *slash = '\0';
        pfree(get_text(r)); /* fingerprint */
        (void) kne_get_i64(r);
        (void) kne_get_u32(r);
        models[i] = CStringGetTextDatum(slash ? slash + 1 : path);
    }
    work = get_text(r);
    reads = kne_get_u64(r);
    edits = kne_get_u64(r);
    kne_reply_done(&reply);

    set_text(row, DEVICE, device);
    set_text(row, DEVICE_NOTE, device_note);
    set(row, MODELS, PointerGetDatum(construct_array(models, n, TEXTOID, -1, false, TYPALIGN_INT)));
    set(row, PRIVATE_BYTES, Int64GetDatum(private_bytes));
    set(row, MAPPED_BYTES, Int64GetDatum(mapped_bytes));
    set_text(row, ENGINE_VERSION, kne_engine_version());
    initStringInfo(&note);
    appendStringInfo(&note, "%s; %u waiting, " UINT64_FORMAT " reads and " UINT64_FORMAT " edits served",
                     work, waiting, reads, edits);
    set_text(row, NOTE, note.data);
}

static void
engine_row(Row *row, const KneShared *shared)
{
    static const char *const states[] = {"stopped", "starting", "running", "waiting to restart", "refused"};
    MemoryContext caller = CurrentMemoryContext;

    clear(row);
    set_text(row, WORKER, "engine");
    set_text(row, STATE, states[shared->engine_state]);
    set_text(row, NOTE, shared->engine_note);
    if (shared->engine_pid != 0)
    {
        set(row, PID, Int32GetDatum(shared->engine_pid));
        set_time(row, SINCE, shared->engine_started_at);
    }
    else
        set_text(row, DEVICE_NOTE, shared->engine_state == KNE_ENGINE_REFUSED ? shared->engine_note : NULL);
    if (shared->engine_state != KNE_ENGINE_RUNNING)
        return;
    PG_TRY();
    {
        kne_call_patience(PATIENCE_MS);
        ask_engine(row);
        kne_call_patience(0);
    }
    PG_CATCH();
    {
        ErrorData *e;

        kne_call_patience(0);
        MemoryContextSwitchTo(caller);
        e = CopyErrorData();
        /* Nothing to roll back after a failed call, but an interrupt is not ours to swallow. */
        if (e->sqlerrcode == ERRCODE_QUERY_CANCELED ||
            ERRCODE_TO_CATEGORY(e->sqlerrcode) == ERRCODE_OPERATOR_INTERVENTION ||
            ERRCODE_TO_CATEGORY(e->sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK) /* a standby's conflict with recovery */
            PG_RE_THROW();
        FlushErrorState();
        set_text(row, NOTE, e->message);
    }
    PG_END_TRY();
}

Datum
kne_status(PG_FUNCTION_ARGS)
{
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    KneShared     *shared;
    KneProcShared *proc;
    Row            row;
    int            i;

    InitMaterializedSRF(fcinfo, 0);
    if (!kne_shared)
    {
        clear(&row);
        set_text(&row, WORKER, "none");
        set_text(&row, STATE, "not loaded");
        set_text(&row, NOTE, "kne is not loaded at server start: set shared_preload_libraries = 'kne' and restart the server");
        put(rsinfo, &row);
        return (Datum) 0;
    }
    shared = copy_shared();
    proc = (KneProcShared *) shared;

    engine_row(&row, shared);
    put(rsinfo, &row);

    clear(&row);
    set_text(&row, WORKER, "launcher");
    if (shared->launcher_pid != 0)
    {
        set(&row, PID, Int32GetDatum(shared->launcher_pid));
        set_time(&row, SINCE, proc->launcher_since);
    }
    set_text(&row, STATE, shared->launcher_pid == 0 ? "not running" : kne_enabled ? "running" : "kne.enabled is off");
    set_text(&row, NOTE, proc->launcher_note);
    put(rsinfo, &row);

    for (i = 0; i < KNE_MAX_WORKERS; i++)
    {
        KneWorkerSlot *slot = &shared->worker[i];
        KneSlotMore   *more = &proc->more[i];
        char          *database;

        if (!OidIsValid(slot->dboid))
            continue;
        database = get_database_name(slot->dboid);
        clear(&row);
        set_text(&row, WORKER, "editing worker");
        if (database)
            set(&row, DATABASE, DirectFunctionCall1(namein, CStringGetDatum(database)));
        if (slot->pid != 0)
        {
            set(&row, PID, Int32GetDatum(slot->pid));
            set_text(&row, STATE, slot->activity[0] ? slot->activity : "idle");
            set_time(&row, SINCE, slot->activity_at);
        }
        else
            set_text(&row, STATE, slot->wanted ? "to be started" : "asleep");
        set_text(&row, NOTE, more->note[0] ? more->note
                 : more->failures > 0 ? psprintf("%d workers in a row ended badly", more->failures)
                 : more->waiting ? "requests wait" : NULL);
        put(rsinfo, &row);
    }
    return (Datum) 0;
}

Datum
kne_stat_workers(PG_FUNCTION_ARGS)
{
    static const char *const phases[] = {"load", "attribute", "optimise", "check"};
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    KneShared     *shared;
    int            i;

    InitMaterializedSRF(fcinfo, 0);
    if (!kne_shared)
        return (Datum) 0;
    shared = copy_shared();
    for (i = 0; i < KNE_MAX_WORKERS; i++)
    {
        KneWorkerSlot *slot = &shared->worker[i];
        Datum          value[13] = {0};
        bool           isnull[13] = {false};
        bool           busy = slot->n_edits > 0;

        if (!OidIsValid(slot->dboid) || slot->pid == 0)
            continue;
        value[0] = ObjectIdGetDatum(slot->dboid);
        value[1] = Int32GetDatum(slot->pid);
        value[2] = Int32GetDatum(slot->model_id);
        value[3] = Int64GetDatum(slot->first_edit);
        value[4] = Int32GetDatum(slot->n_edits);
        value[5] = CStringGetTextDatum(slot->phase < lengthof(phases) ? phases[slot->phase] : "work");
        value[6] = Int32GetDatum(slot->done);
        value[7] = Int32GetDatum(slot->total);
        value[8] = Float4GetDatum(slot->loss);
        value[9] = Int32GetDatum(slot->finished);
        value[10] = TimestampTzGetDatum(slot->started_at);
        value[11] = CStringGetTextDatum(slot->activity);
        value[12] = Int64GetDatum(slot->consolidation);
        isnull[12] = !busy || slot->consolidation == 0;
        if (!busy)
            isnull[2] = isnull[3] = isnull[5] = isnull[6] = isnull[7] = isnull[8] = isnull[9] = true;
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, value, isnull);
    }
    return (Datum) 0;
}
