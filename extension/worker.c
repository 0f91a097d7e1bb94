/*
 * worker.c - the editing worker: one a database, there when there is work.
 *
 * One round: repair what a dead worker left, write what could not be written before, claim a batch, have the engine
 * compute it, write the outcome (worker_record.c). Three kinds of short transactions, and none open while the engine
 * computes: a snapshot held for minutes would keep VACUUM from its work, a lock would stop a user.
 *
 * A batch is one model and one value of options, oldest first, at most one request a fact (an older one that is not
 * finished holds back the newer). It has a memory context of its own, kept until everything about it is written.
 *
 * What goes wrong is told apart by whose fault it is: an edit's (it fails, or has one attempt less), the engine's (its
 * batch goes back uncharged, waits longer each time, and after two deaths runs one edit at a time), the model's (its folder is
 * gone or changed: that model waits, 1 s to 5 min, the others go on), or nobody's (a switch was turned, a lock was held).
 *
 * The worker leaves after kne.idle_timeout, for while it is connected its database can be neither dropped nor used as a
 * template. It tells the launcher when to look again, if something is known to wait.
 */
#include "postgres.h"

#include "access/twophase.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "kne_proc.h"

#define MAX_HELD 8         /* batches with something locked; more are not claimed meanwhile */
#define POLL_MS 60000      /* a look at what waits for a reason that nobody tells when it is over */

int kne_worker_slot = -1;

static KneBatch     *held = NULL; /* claimed, and not all written */
static int           n_held = 0;
static bool          repaired = false;
static TimestampTz   repair_at = 0;
static long          stuck_ms = 1000; /* to the next look at what could not be claimed */
static MemoryContext loop_context;

/* ---------------------------------------------------------------- the slot */

static void
detach(int code, Datum arg)
{
    (void) code;
    (void) arg;
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_SLOT->pid = 0;
    KNE_SLOT->latch = NULL;
    KNE_SLOT->n_edits = 0;
    KNE_SLOT->activity[0] = '\0';
    KNE_MORE->visit = false;
    if (kne_shared->launcher_latch)
        SetLatch(kne_shared->launcher_latch);
    LWLockRelease(&kne_shared->lock);
}

/* False: another worker is in it. */
static bool
attach(Oid dboid, bool *visit)
{
    bool ok;

    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    kne_worker_slot = kne_slot(dboid, true);
    ok = kne_worker_slot >= 0 && KNE_SLOT->pid == 0;
    if (ok)
    {
        KNE_SLOT->pid = MyProcPid;
        KNE_SLOT->latch = MyLatch;
        KNE_SLOT->wanted = false;
        KNE_SLOT->started_at = KNE_SLOT->activity_at = GetCurrentTimestamp();
        KNE_SLOT->n_edits = 0;
        KNE_SLOT->activity[0] = '\0';
        KNE_MORE->left = false;
        *visit = KNE_MORE->visit;
    }
    LWLockRelease(&kne_shared->lock);
    if (ok)
        before_shmem_exit(detach, (Datum) 0);
    return ok;
}

/* Ends the process, unless a commit has asked for it meanwhile. */
static void
leave(TimestampTz poll_at)
{
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    if (KNE_SLOT->wanted && kne_enabled)
    {
        LWLockRelease(&kne_shared->lock);
        return;
    }
    KNE_SLOT->wanted = false;
    KNE_MORE->left = true;
    KNE_MORE->failures = 0;
    KNE_MORE->waiting = poll_at != 0;
    KNE_MORE->poll_at = poll_at;
    LWLockRelease(&kne_shared->lock);
    proc_exit(0);
}

void
kne_worker_show(const char *activity)
{
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    strlcpy(KNE_SLOT->activity, activity, sizeof(KNE_SLOT->activity));
    KNE_SLOT->activity_at = GetCurrentTimestamp();
    LWLockRelease(&kne_shared->lock);
}

void
kne_worker_reload(void)
{
    if (!ConfigReloadPending)
        return;
    ConfigReloadPending = false;
    ProcessConfigFile(PGC_SIGHUP);
}

/* ---------------------------------------------------------------- what waits */

/* In a transaction: the time of the next look, 0 for none. */
static TimestampTz
next_look(void)
{
    static const char pending[] =
        "SELECT min(r.not_before) FILTER (WHERE r.not_before > clock_timestamp()),"
        " min(r.requested_at) FILTER (WHERE r.not_before IS NULL OR r.not_before <= clock_timestamp())"
        " FROM kne.edit_request r WHERE r.state = 'pending' AND " KNE_OWN;
    /* Prepared transactions that have written requests; the youngest. */
    static const char prepared[] =
        "SELECT max(p.prepared) FROM pg_catalog.pg_prepared_xacts p WHERE p.database = pg_catalog.current_database()"
        " AND EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid IS NULL AND l.locktype = 'relation'"
        " AND l.relation IN ('kne.edit_request'::pg_catalog.regclass, 'kne.consolidation'::pg_catalog.regclass) AND l.mode = 'RowExclusiveLock')";
    TimestampTz now = GetCurrentTimestamp();
    TimestampTz stuck_until = TimestampTzPlusMilliseconds(now, stuck_ms);
    TimestampTz next, since;

    kne_sql(pending, 0, NULL, NULL, NULL);
    next = kne_sql_time(0, 1);
    if (kne_sql_time(0, 2) != 0)
        next = next == 0 ? stuck_until : Min(next, stuck_until);
    since = kne_consolidation_next(stuck_until);
    if (since != 0)
        next = next == 0 ? since : Min(next, since);
    if (next == stuck_until)
    {
        /* Due and not claimed: it is locked, its model has a fault, the engine is away. */
        stuck_ms = Min(stuck_ms * 2, POLL_MS);
        since = kne_batch_fault_over();
        if (since != 0)
            next = Min(next, since);
    }
    if (max_prepared_xacts > 0)
    {
        kne_sql(prepared, 0, NULL, NULL, NULL);
        since = kne_sql_time(0, 1);
        if (since != 0)
        {
            /* Nobody tells when it commits. A look after as long again as it has been prepared. */
            long age = TimestampDifferenceMilliseconds(since, now);

            since = TimestampTzPlusMilliseconds(now, Min(Max(age, 1000), POLL_MS));
            next = next == 0 ? since : Min(next, since);
        }
    }
    return next;
}

/* ---------------------------------------------------------------- the loop */

static void
write_held(void)
{
    KneBatch  **at = &held;
    TimestampTz now = GetCurrentTimestamp();

    while (*at)
    {
        KneBatch *batch = *at;

        if (batch->open > 0 && batch->retry_at <= now)
            kne_record(batch);
        if (batch->open == 0)
        {
            *at = batch->next;
            n_held--;
            MemoryContextDelete(batch->mcxt);
        }
        else
            at = &batch->next;
    }
}

static void
repair(void)
{
    KneBatch *b;
    int64    *id, *consolidation;
    int       n = 0, n_consolidations = 0, i;

    if (repaired || GetCurrentTimestamp() < repair_at)
        return;
    for (b = held; b; b = b->next)
        n += b->n;
    id = palloc(sizeof(int64) * Max(n, 1));
    consolidation = palloc(sizeof(int64) * (n_held + 1));
    for (n = 0, b = held; b; b = b->next)
    {
        for (i = 0; i < b->n; i++)
            id[n++] = b->edit_id[i];
        if (b->consolidation)
            consolidation[n_consolidations++] = b->consolidation;
    }
    kne_begin();
    repaired = kne_repair_orphans(id, n);
    repaired &= kne_repair_consolidations(consolidation, n_consolidations);
    kne_commit();
    repair_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 1000);
}

/* One round. True: there was work. Else *next is when to look again, 0 for never. */
static bool
one_round(TimestampTz *next)
{
    KneBatch   *batch = NULL;
    KneBatch   *b;
    bool        present;

    kne_begin();
    present = kne_extension_present();
    kne_commit();
    if (!present)
    {
        LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
        KNE_SLOT->wanted = false;
        LWLockRelease(&kne_shared->lock);
        leave(0);
    }

    repair();
    write_held();

    if (kne_enabled && kne_engine_up() && n_held < MAX_HELD)
    {
        kne_begin();
        batch = kne_consolidation_claim(false);
        if (!batch)
            batch = kne_batch_claim();
        if (!batch)
        {
            kne_autoconsolidate_queue();
            batch = kne_consolidation_claim(true);
        }
        kne_commit();
        if (batch)
            MemoryContextSetParent(batch->mcxt, TopMemoryContext);
    }
    if (batch)
    {
        /* Linked first: should anything be thrown, its verdicts are not lost. */
        batch->next = held;
        held = batch;
        n_held++;
        stuck_ms = 1000;
        kne_batch_run(batch);
        write_held();
        return true;
    }

    kne_begin();
    *next = next_look();
    kne_commit();
    for (b = held; b; b = b->next)
        *next = *next == 0 ? b->retry_at : Min(*next, b->retry_at);
    if (!repaired)
        *next = *next == 0 ? repair_at : Min(*next, repair_at);
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    KNE_MORE->waiting = *next != 0;
    LWLockRelease(&kne_shared->lock);
    return false;
}

/* As one_round; an error is logged, and the next try comes later each time. */
static bool
guarded_round(TimestampTz *next)
{
    static int    errors = 0;
    volatile bool worked = false;

    PG_TRY();
    {
        worked = one_round(next);
        errors = 0;
    }
    PG_CATCH();
    {
        MemoryContextSwitchTo(loop_context);
        EmitErrorReport();
        FlushErrorState();
        kne_abort(loop_context);
        *next = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 1000L << Min(errors, 6));
        errors++;
    }
    PG_END_TRY();
    return worked;
}

void
kne_worker_main(Datum arg)
{
    Oid         dboid = DatumGetObjectId(arg);
    bool        visit = false;
    TimestampTz idle_since, leave_at, next, now;

    pqsignal(SIGHUP, SignalHandlerForConfigReload);
    pqsignal(SIGTERM, die);
    BackgroundWorkerUnblockSignals();

    if (!attach(dboid, &visit))
        proc_exit(0);
    BackgroundWorkerInitializeConnectionByOid(dboid, InvalidOid, 0);
    kne_worker_settings();
    loop_context = AllocSetContextCreate(TopMemoryContext, "kne worker", ALLOCSET_DEFAULT_SIZES);
    idle_since = GetCurrentTimestamp();

    for (;;)
    {
        long wait;

        CHECK_FOR_INTERRUPTS();
        kne_worker_reload();
        ResetLatch(MyLatch);
        MemoryContextReset(loop_context);
        MemoryContextSwitchTo(loop_context);
        LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
        KNE_SLOT->wanted = false; /* before the look: who commits after it sets it again */
        LWLockRelease(&kne_shared->lock);

        next = 0;
        if (guarded_round(&next))
        {
            visit = false;
            idle_since = GetCurrentTimestamp();
            continue;
        }

        pgstat_report_activity(STATE_IDLE, NULL);
        kne_worker_show("");
        now = GetCurrentTimestamp();
        leave_at = TimestampTzPlusMilliseconds(idle_since, kne_idle_timeout * 1000L);
        if (!held && (visit || !kne_enabled || leave_at <= now))
            leave(next);
        wait = TimestampDifferenceMilliseconds(now, Max(leave_at, now)) + 1;
        if (held)
            wait = POLL_MS;
        if (next != 0)
            wait = Min(wait, TimestampDifferenceMilliseconds(now, Max(next, now)) + 1);
        pgstat_report_stat(true);
        (void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, wait, PG_WAIT_EXTENSION);
    }
}
