/*
 * wait.c - waiting for what the worker does: kne_wait for an edit, kne_wait_consolidation for a consolidation.
 *
 * Both look at a row again and again, each time with a snapshot of its own that is gone before they sleep, and hold
 * nothing in between. Who waits for longer than a second is told how far it is, less and less often. What would never
 * end is an error at once: a row that this transaction has written or locked, a request that nobody will run.
 */
#include "kne_sql.h"

#include "access/transam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define NOTICE_MS 1000      /* before the first notice, and before the second */
#define NOTICE_MAX_MS 15000 /* between two */

PG_FUNCTION_INFO_V1(kne_wait);
PG_FUNCTION_INFO_V1(kne_wait_consolidation);

/* What is waited for. The statement: state, xmin, of another origin, unprotected, xmax. */
typedef struct Awaited
{
    const char *what;
    KnePlan look;
} Awaited;

static Awaited edit = {
    "edit",
    {"SELECT r.state, r.xmin, r.origin <> i.origin OR r.origin_database <> $2,"
     " r.state = 'applied' AND EXISTS (SELECT FROM kne.solution s WHERE s.edit_id = r.edit_id"
     " AND s.n_rows > 0 AND s.provenance @> '{\"protected\": false}'), r.xmax"
     " FROM kne.edit_request r LEFT JOIN kne.instance i ON true WHERE r.edit_id = $1",
     2,
     {INT8OID, OIDOID}}};
static Awaited consolidation = {
    "consolidation",
    {"SELECT r.state, r.xmin, r.origin <> i.origin OR r.origin_database <> $2, false, r.xmax"
     " FROM kne.consolidation r LEFT JOIN kne.instance i ON true WHERE r.consolidation_id = $1",
     2,
     {INT8OID, OIDOID}}};

/* The row as the newest snapshot sees it. */
typedef struct Look
{
    char state[16];
    bool ours;    /* the row's version is this transaction's own */
    bool locked;  /* this transaction has locked the row */
    bool foreign; /* of another origin */
    bool unprotected;
} Look;

static bool
is_final(const char *state)
{
    return strcmp(state, "pending") != 0 && strcmp(state, "running") != 0;
}

static void
look_at(Awaited *a, int64 id, Look *out)
{
    Datum values[2];
    bool isnull;

    values[0] = Int64GetDatum(id);
    values[1] = ObjectIdGetDatum(MyDatabaseId);
    kne_spi_connect();
    if (kne_spi(&a->look, KNE_LATEST, values, NULL) == 0)
        a == &edit ? kne_no_such_edit(id) : kne_no_such_consolidation(id);
    strlcpy(out->state, kne_spi_text(0, 1, CurrentMemoryContext), sizeof out->state);
    out->ours = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(kne_spi_datum(0, 2, &isnull)));
    out->locked = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(kne_spi_datum(0, 5, &isnull)));
    out->foreign = kne_spi_bool(0, 3);
    out->unprotected = kne_spi_bool(0, 4);
    kne_spi_finish();
}

/* ERROR when waiting for this request would be for nothing. */
static void
check_will_run(const char *what, int64 id, const Look *look)
{
    char note[sizeof kne_shared->engine_note] = "";
    bool refused;

    if (look->ours)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("cannot wait for %s " INT64_FORMAT " in the transaction that requested it", what, id),
                        errdetail("It runs once its request is committed."),
                        errhint("COMMIT first, then wait.")));
    if (look->locked)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("cannot wait for %s " INT64_FORMAT " in a transaction that has locked it", what, id),
                        errdetail("The worker passes by what is locked."),
                        errhint("COMMIT first, then wait.")));
    kne_require_preload();
    if (RecoveryInProgress())
        ereport(ERROR,
                (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE), errmsg("no edit runs on a standby"),
                 errdetail("The state of %s " INT64_FORMAT " is %s.", what, id, look->state),
                 errhint("Wait for it on the primary.")));
    if (look->foreign)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("%s " INT64_FORMAT " was requested in another database", what, id),
                        errdetail("It is %s, and came here with a restored or copied database.", look->state),
                        errhint("kne_adopt() lets such requests run here.")));
    if (!kne_enabled)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("no edit runs: kne.enabled is off"),
                        errdetail("The state of %s " INT64_FORMAT " is %s.", what, id, look->state),
                        errhint("Set kne.enabled = on and reload the configuration.")));
    LWLockAcquire(&kne_shared->lock, LW_SHARED);
    refused = kne_shared->engine_state == KNE_ENGINE_REFUSED;
    if (refused)
        strlcpy(note, kne_shared->engine_note, sizeof note);
    LWLockRelease(&kne_shared->lock);
    if (refused)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("no edit runs: the engine does not start"),
                        errdetail("%s", note[0] ? kne_safe_text(note) : "See the server's log."),
                        errhint("Correct the settings kne.* and reload the configuration.")));
}

/* Its state, and what the worker of this database is at. */
static void
tell(const char *what, int64 id, const char *state)
{
    char at[sizeof kne_shared->worker[0].activity] = "";

    LWLockAcquire(&kne_shared->lock, LW_SHARED);
    for (int i = 0; i < KNE_MAX_WORKERS; i++)
        if (kne_shared->worker[i].dboid == MyDatabaseId && kne_shared->worker[i].pid != 0)
            strlcpy(at, kne_shared->worker[i].activity, sizeof at);
    LWLockRelease(&kne_shared->lock);
    ereport(NOTICE, (errmsg("%s " INT64_FORMAT " is %s; at work: %s", what, id, state,
                            strncmp(at, "kne: ", 5) == 0 ? at + 5 : "nothing")));
}

/* When the wait ends; DT_NOEND for one longer than any server lives. */
static TimestampTz
deadline(const Interval *timeout)
{
    double usec = (double) timeout->time + (timeout->day + timeout->month * 30.0) * USECS_PER_DAY;

    if (usec < 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("timeout must not be negative"),
                        errhint("0 looks once, without waiting.")));
    return usec > 1e16 ? DT_NOEND : GetCurrentTimestamp() + (int64) usec;
}

static text *
wait_for(FunctionCallInfo fcinfo, Awaited *a)
{
    MemoryContext mcxt = AllocSetContextCreate(CurrentMemoryContext, "kne_wait", ALLOCSET_SMALL_SIZES);
    MemoryContext old;
    TimestampTz until, tell_at;
    int64 id;
    long nap = 10, silence = NOTICE_MS;
    Look look;
    char told[sizeof look.state] = "";

    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("%s_id must not be null", a->what)));
    id = PG_GETARG_INT64(0);
    if (PG_ARGISNULL(1))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("timeout must not be null"),
                        errhint("Leave it out for its default.")));
    /* The rest of the transaction would not see what was waited for. */
    if (IsolationUsesXactSnapshot())
        ereport(ERROR,
                (errcode(ERRCODE_INVALID_TRANSACTION_STATE),
                 errmsg("cannot wait for an edit in a transaction of this isolation level"),
                 errdetail("Its snapshot was taken before the edit finishes, so it would not see the edit."),
                 errhint("Wait in READ COMMITTED, or outside of a transaction.")));
    until = deadline(PG_GETARG_INTERVAL_P(1));
    tell_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), NOTICE_MS);

    for (;;)
    {
        TimestampTz now;

        old = MemoryContextSwitchTo(mcxt);
        look_at(a, id, &look);
        MemoryContextSwitchTo(old);
        MemoryContextReset(mcxt);
        if (is_final(look.state))
            break;
        check_will_run(a->what, id, &look);

        now = GetCurrentTimestamp();
        if (now >= until)
            ereport(ERROR, (errcode(ERRCODE_LOCK_NOT_AVAILABLE),
                            errmsg("timeout while waiting for %s " INT64_FORMAT, a->what, id),
                            errdetail("Its state is %s.", look.state),
                            errhint("It goes on, and may be waited for again. kne.stat_progress shows the work.")));
        if (now >= tell_at || (told[0] && strcmp(told, look.state) != 0))
        {
            tell(a->what, id, look.state);
            strlcpy(told, look.state, sizeof told);
            tell_at = TimestampTzPlusMilliseconds(now, silence);
            silence = Min(silence * 2, NOTICE_MAX_MS);
        }
        if (until != DT_NOEND)
            nap = Max(1, Min(nap, (until - now + 999) / 1000));
        (void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, nap, PG_WAIT_EXTENSION);
        ResetLatch(MyLatch);
        CHECK_FOR_INTERRUPTS();
        nap = Min(nap * 3 / 2, 250);
    }
    if (look.unprotected)
        ereport(WARNING,
                (errmsg("edit " INT64_FORMAT " was applied without protecting other facts", id),
                 errdetail("Too few facts that the model answers are known to protect any."),
                 errhint("INSERT what the model should know INTO kne.fact (subject, relation, object).")));
    MemoryContextDelete(mcxt);
    return cstring_to_text(look.state);
}

Datum
kne_wait(PG_FUNCTION_ARGS)
{
    PG_RETURN_TEXT_P(wait_for(fcinfo, &edit));
}

Datum
kne_wait_consolidation(PG_FUNCTION_ARGS)
{
    PG_RETURN_TEXT_P(wait_for(fcinfo, &consolidation));
}
