/*
 * launcher.c - one a server, connected to no database: starts workers where there is work, and keeps the engine up.
 *
 * It runs from the first consistent state on, so that a hot standby has an engine for its readers. Workers write, so
 * they start only when recovery is over.
 *
 * Who asks for a worker: a commit (module.c sets the slot's `wanted`), a time (`poll_at`: rows known to wait
 * for their back-off, prepared transactions), and the launcher itself, which visits each database once after it
 * started, after a promotion and when kne.enabled is switched on, because requests may be there from before. A visit is a worker that
 * leaves at once when the extension or the work is missing; two at a time, so that a server with many databases is not flooded.
 *
 * A worker that ends badly is started again after 1 s, 2 s, ... 60 s; its database may be gone, and then so is the slot.
 * Nothing here computes or waits for anything but its latch: interrupts are answered at once.
 */
#include "postgres.h"

#include <signal.h>

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_database.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/wait_event.h"

#include "kne_proc.h"

#define VISITS 2          /* at a time */
#define RECOVERY_MS 1000  /* how often a standby looks whether it was promoted */
#define BACKOFF_MAX 60    /* seconds */
#define INVALID_DATABASE (-2) /* datconnlimit of a DROP DATABASE that was interrupted */

static BackgroundWorkerHandle *handle[KNE_MAX_WORKERS]; /* of the workers that this launcher started */
static List                   *to_visit = NIL;          /* databases, in TopMemoryContext */
static bool                    visited = false;
static TimestampTz             register_after = 0; /* no process slot was free */
static int                     register_delay = 1;

/* ---- signals ---- */

static void
child_died(SIGNAL_ARGS)
{
    int save_errno = errno;

    (void) postgres_signal_arg;
    SetLatch(MyLatch);
    errno = save_errno;
}

/* An immediate shutdown, or a crash elsewhere: no time for callbacks, but leave no engine and no socket behind. */
static void
crash_exit(SIGNAL_ARGS)
{
    (void) postgres_signal_arg;
    kne_engine_kill_now();
    _exit(2);
}

static void
at_exit(int code, Datum arg)
{
    (void) code;
    (void) arg;
    kne_engine_stop();
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    if (kne_shared->launcher_pid == MyProcPid)
    {
        kne_shared->launcher_pid = 0;
        kne_shared->launcher_latch = NULL;
    }
    LWLockRelease(&kne_shared->lock);
}

/* ---- databases ---- */

/* All that take connections (only InvalidOid asked), or the one asked for when it is still there. */
static List *
databases(Oid only)
{
    List         *list = NIL;
    Relation      rel;
    TableScanDesc scan;
    HeapTuple     tuple;
    MemoryContext caller = CurrentMemoryContext;

    StartTransactionCommand();
    (void) GetTransactionSnapshot();
    rel = table_open(DatabaseRelationId, AccessShareLock);
    scan = table_beginscan_catalog(rel, 0, NULL);
    while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
    {
        Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);

        if (!database->datallowconn || database->datconnlimit == INVALID_DATABASE)
            continue;
        if (!OidIsValid(only) || database->oid == only)
        {
            MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

            list = lappend_oid(list, database->oid);
            MemoryContextSwitchTo(old);
        }
    }
    table_endscan(scan);
    table_close(rel, AccessShareLock);
    CommitTransactionCommand();
    MemoryContextSwitchTo(caller);
    return list;
}

static bool
database_exists(Oid dboid)
{
    List *list = databases(dboid);
    bool  exists = list != NIL;

    list_free(list);
    return exists;
}

/* ---- workers ---- */

static void
note(const char *text)
{
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    strlcpy(kne_proc->launcher_note, text, sizeof(kne_proc->launcher_note));
    LWLockRelease(&kne_shared->lock);
}

static bool
start_worker(int i, Oid dboid)
{
    BackgroundWorker worker;
    MemoryContext    old;
    bool             started;

    memset(&worker, 0, sizeof(worker));
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = BGW_NEVER_RESTART; /* the launcher knows better when and whether */
    worker.bgw_notify_pid = MyProcPid;
    worker.bgw_main_arg = ObjectIdGetDatum(dboid);
    strlcpy(worker.bgw_library_name, "kne", BGW_MAXLEN);
    strlcpy(worker.bgw_function_name, "kne_worker_main", BGW_MAXLEN);
    snprintf(worker.bgw_name, BGW_MAXLEN, "kne worker for database %u", dboid);
    strlcpy(worker.bgw_type, "kne worker", BGW_MAXLEN);

    old = MemoryContextSwitchTo(TopMemoryContext);
    started = RegisterDynamicBackgroundWorker(&worker, &handle[i]);
    MemoryContextSwitchTo(old);
    if (started)
    {
        if (register_delay > 1)
            note("");
        register_delay = 1;
        return true;
    }
    handle[i] = NULL;
    if (register_delay == 1)
    {
        ereport(WARNING,
                (errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
                 errmsg("kne could not start a worker: no background worker slot is free"),
                 errdetail("Edits wait until one is."),
                 errhint("Raise max_worker_processes.")));
        note("no background worker slot is free: raise max_worker_processes");
    }
    register_delay = Min(register_delay * 2, BACKOFF_MAX);
    register_after = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), register_delay * 1000L);
    return false;
}

/* A worker that this launcher started has ended. */
static void
worker_ended(int i)
{
    KneWorkerSlot *slot = &kne_shared->worker[i];
    KneSlotMore   *more = &kne_proc->more[i];
    Oid            dboid;
    bool           in_order, gone;

    pfree(handle[i]);
    handle[i] = NULL;
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    dboid = slot->dboid;
    in_order = !OidIsValid(dboid) || more->left || slot->pid != 0; /* another one, of an earlier launcher, is in it */
    LWLockRelease(&kne_shared->lock);
    if (in_order)
        return;

    gone = !database_exists(dboid);
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    if (gone)
        slot->dboid = InvalidOid;
    else
    {
        int delay = 1 << Min(more->failures, 6);

        more->failures++;
        more->visit = false;
        slot->wanted = true;
        slot->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), Min(delay, BACKOFF_MAX) * 1000L);
    }
    LWLockRelease(&kne_shared->lock);
}

static long
sooner(long wait, TimestampTz now, TimestampTz when)
{
    return when <= now ? 0 : Min(wait, TimestampDifferenceMilliseconds(now, when) + 1);
}

/* Give slots to databases that nobody has looked at yet. */
static void
next_visits(void)
{
    int i, underway = 0;

    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    if (kne_proc->revisit)
    {
        kne_proc->revisit = false;
        visited = false;
    }
    for (i = 0; i < KNE_MAX_WORKERS; i++)
        if (OidIsValid(kne_shared->worker[i].dboid) && kne_proc->more[i].visit)
            underway++;
    LWLockRelease(&kne_shared->lock);

    if (!visited)
    {
        visited = true;
        list_free(to_visit);
        to_visit = databases(InvalidOid);
    }
    while (to_visit != NIL && underway < VISITS)
    {
        bool full;

        LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
        i = kne_slot(linitial_oid(to_visit), true);
        full = i < 0;
        if (!full && kne_shared->worker[i].pid == 0 && !kne_shared->worker[i].wanted)
        {
            kne_shared->worker[i].wanted = true;
            kne_proc->more[i].visit = true;
            underway++;
        }
        LWLockRelease(&kne_shared->lock);
        if (full)
            break;
        to_visit = list_delete_first(to_visit);
    }
}

/* Start what is due; ms until something else is. */
static long
workers_tick(void)
{
    TimestampTz now = GetCurrentTimestamp();
    long        wait = 60000;
    int         i;

    for (i = 0; i < KNE_MAX_WORKERS; i++)
    {
        KneWorkerSlot *slot = &kne_shared->worker[i];
        KneSlotMore   *more = &kne_proc->more[i];
        TimestampTz    due;
        pid_t          pid;
        Oid            dboid;

        if (handle[i])
        {
            if (GetBackgroundWorkerPid(handle[i], &pid) == BGWH_STOPPED)
                worker_ended(i);
            else
                continue;
        }

        LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
        dboid = slot->dboid;
        due = 0;
        if (OidIsValid(dboid) && slot->pid == 0)
        {
            if (slot->wanted)
                due = Max(slot->not_before, 1);
            else if (more->poll_at != 0)
                due = Max(more->poll_at, 1);
            else
                slot->dboid = InvalidOid; /* nothing is known to wait */
        }
        if (due != 0 && due <= now && now >= register_after)
        {
            more->left = false;
            if (!slot->wanted)
                more->visit = true;
            more->poll_at = 0;
            slot->wanted = true; /* until the worker has attached */
        }
        LWLockRelease(&kne_shared->lock);

        if (due == 0)
            continue;
        if (due > now || now < register_after)
            wait = sooner(wait, now, Max(due, register_after));
        else if (!start_worker(i, dboid))
            wait = sooner(wait, now, register_after);
    }
    return wait;
}

void
kne_launcher_main(Datum arg)
{
    bool was_enabled;

    (void) arg;
    pqsignal(SIGHUP, SignalHandlerForConfigReload);
    pqsignal(SIGTERM, die);
    pqsignal(SIGQUIT, crash_exit);
    pqsignal(SIGCHLD, child_died);
    BackgroundWorkerUnblockSignals();

    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    kne_shared->launcher_pid = MyProcPid;
    kne_shared->launcher_latch = MyLatch;
    kne_shared->engine_state = KNE_ENGINE_STOPPED;
    kne_proc->launcher_since = GetCurrentTimestamp();
    kne_proc->launcher_note[0] = '\0';
    LWLockRelease(&kne_shared->lock);
    before_shmem_exit(at_exit, (Datum) 0);

    BackgroundWorkerInitializeConnection(NULL, NULL, 0);
    was_enabled = kne_enabled;

    for (;;)
    {
        long wait;
        int  rc;
        int  log_fd;

        CHECK_FOR_INTERRUPTS();
        if (ConfigReloadPending)
        {
            ConfigReloadPending = false;
            ProcessConfigFile(PGC_SIGHUP);
            kne_engine_reconfigure();
            if (kne_enabled && !was_enabled)
                visited = false;
            was_enabled = kne_enabled;
        }

        wait = kne_engine_tick();
        if (RecoveryInProgress())
            wait = Min(wait, RECOVERY_MS);
        else if (kne_enabled)
        {
            next_visits();
            wait = Min(wait, workers_tick());
        }

        log_fd = kne_engine_log_fd();
        rc = WaitLatchOrSocket(MyLatch,
                               WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH |
                               (log_fd >= 0 ? WL_SOCKET_READABLE : 0),
                               log_fd, wait, PG_WAIT_EXTENSION);
        if (rc & WL_LATCH_SET)
            ResetLatch(MyLatch);
    }
}
