/*
 * module.c - loading: settings, shared memory, the launcher's registration, and the wake-up at commit.
 *
 * kne.so is loaded in two ways. By shared_preload_libraries it reserves shared memory and registers the
 * launcher; in any other way (LOAD, first call of a function) there are settings only, kne_shared stays NULL and
 * everything that needs a process says how to enable it.
 *
 * A request must wake the worker when it becomes visible, not before: kne_wake_at_commit only takes a note,
 * and the transaction callback, registered once, acts on it at commit. A transaction that is prepared
 * instead commits in a session that knows nothing of the note, so its database is looked at from time to time until
 * it holds no prepared transaction. An aborted subtransaction may leave the note behind: a look for nothing.
 */
#include "postgres.h"

#include <limits.h>

#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/guc.h"

#include "kne_proc.h"

PG_MODULE_MAGIC;

char *kne_model_dir = NULL;
char *kne_default_model = NULL;
char *kne_device = NULL;
int   kne_cpu_threads = 0;
int   kne_batch_size = 64;
int   kne_batch_bytes = 256 * 1024;
int   kne_max_attempts = 3;
bool  kne_enabled = true;
int   kne_idle_timeout = 30;
bool   kne_autoconsolidate = false;
int    kne_autoconsolidate_threshold = 50;
double kne_autoconsolidate_scale_factor = 0.2;
int    kne_autoconsolidate_naptime = 60;

KneShared *kne_shared = NULL;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

static bool wake_at_commit = false;

extern PGDLLEXPORT void _PG_init(void);

/* auto, cpu, cuda or cuda:N */
static bool
check_device(char **newval, void **extra, GucSource source)
{
    const char *s = *newval;
    size_t      n;

    (void) extra;
    (void) source;
    if (strcmp(s, "auto") == 0 || strcmp(s, "cpu") == 0 || strcmp(s, "cuda") == 0)
        return true;
    if (strncmp(s, "cuda:", 5) == 0)
    {
        n = strspn(s + 5, "0123456789");
        if (n > 0 && n <= 3 && s[5 + n] == '\0')
            return true;
    }
    GUC_check_errdetail("Valid values are \"auto\", \"cpu\", \"cuda\" and \"cuda:N\".");
    return false;
}

static void
define_settings(void)
{
    DefineCustomBoolVariable("kne.autoconsolidate",
                             "Consolidates models in the background.",
                             "Off by default: unlike vacuuming, it may change what a model answers elsewhere.",
                             &kne_autoconsolidate, false,
                             PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.autoconsolidate_naptime",
                            "Least time between two automatic consolidations of a model.",
                            NULL,
                            &kne_autoconsolidate_naptime, 60, 0, INT_MAX / 1000,
                            PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
    DefineCustomRealVariable("kne.autoconsolidate_scale_factor",
                             "Share of a model's active edits added to the threshold.",
                             NULL,
                             &kne_autoconsolidate_scale_factor, 0.2, 0, 100,
                             PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.autoconsolidate_threshold",
                            "Edits applied or facts disturbed since the last consolidation before the next.",
                            NULL,
                            &kne_autoconsolidate_threshold, 50, 0, INT_MAX,
                            PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.batch_bytes",
                            "Most that the rows of a batch of edits may come to.",
                            "What an edit may come to is known from its options and the model; one edit always runs.",
                            &kne_batch_bytes, 256 * 1024, 64, INT_MAX,
                            PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.batch_size",
                            "Most edits that are solved together.",
                            "Edits of one batch share every pass over the model.",
                            &kne_batch_size, 64, 1, 1024,
                            PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.cpu_threads",
                            "Threads of the engine on the CPU.",
                            "0 means one for each core. A change restarts the engine.",
                            &kne_cpu_threads, 0, 0, 1024,
                            PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomStringVariable("kne.device",
                               "What the engine computes on: auto, cpu, cuda or cuda:N.",
                               "\"auto\" takes a GPU when there is one, \"cuda\" never falls back. "
                               "A change restarts the engine.",
                               &kne_device, "auto",
                               PGC_SIGHUP, 0, check_device, NULL, NULL);
    DefineCustomBoolVariable("kne.enabled",
                             "Runs the edits that are queued.",
                             "When off, edits wait and workers leave; reading functions go on.",
                             &kne_enabled, true,
                             PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.idle_timeout",
                            "Time after which a worker without work leaves its database.",
                            "While it is connected the database cannot be dropped or used as a template.",
                            &kne_idle_timeout, 30, 0, INT_MAX / 1000,
                            PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
    DefineCustomIntVariable("kne.max_attempts",
                            "Failures of an edit itself after which it is not tried again.",
                            NULL,
                            &kne_max_attempts, 3, 1, 100,
                            PGC_SIGHUP, 0, NULL, NULL, NULL);
    DefineCustomStringVariable("kne.model_dir",
                               "Folder below which models may be loaded from.",
                               "Members of pg_read_server_files may load from any folder.",
                               &kne_model_dir, "",
                               PGC_SUSET, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
    DefineCustomStringVariable("kne.default_model",
                               "Name of the model that is meant where none is named.",
                               "Empty: the one with is_default in kne.model.",
                               &kne_default_model, "",
                               PGC_USERSET, 0, NULL, NULL, NULL);
    MarkGUCPrefixReserved("kne");
}

static void
shmem_request(void)
{
    if (prev_shmem_request_hook)
        prev_shmem_request_hook();
    RequestAddinShmemSpace(MAXALIGN(sizeof(KneProcShared)));
}

static void
shmem_startup(void)
{
    bool found;

    if (prev_shmem_startup_hook)
        prev_shmem_startup_hook();

    LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
    kne_shared = ShmemInitStruct("kne", sizeof(KneProcShared), &found);
    if (!found)
    {
        memset(kne_shared, 0, sizeof(KneProcShared));
        kne_proc->tranche = LWLockNewTrancheId();
        LWLockInitialize(&kne_shared->lock, kne_proc->tranche);
        if (!pg_strong_random(kne_shared->secret, KNE_SECRET_LEN))
            ereport(FATAL,
                    (errcode(ERRCODE_INTERNAL_ERROR),
                     errmsg("kne could not make the secret of its engine's socket")));
    }
    LWLockRelease(AddinShmemInitLock);
    LWLockRegisterTranche(kne_proc->tranche, "kne");
}

void
kne_require_preload(void)
{
    if (!kne_shared)
        ereport(ERROR,
                (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                 errmsg("kne is not loaded at server start"),
                 errdetail("Its launcher, workers and engine run only then."),
                 errhint("Set shared_preload_libraries = 'kne' in postgresql.conf and restart the server.")));
    kne_require_version();
}

int
kne_slot(Oid dboid, bool create)
{
    int i, unused = -1;

    for (i = 0; i < KNE_MAX_WORKERS; i++)
    {
        if (kne_shared->worker[i].dboid == dboid)
            return i;
        if (unused < 0 && !OidIsValid(kne_shared->worker[i].dboid))
            unused = i;
    }
    if (!create || unused < 0)
        return -1;
    memset(&kne_shared->worker[unused], 0, sizeof(KneWorkerSlot));
    memset(&kne_proc->more[unused], 0, sizeof(KneSlotMore));
    kne_shared->worker[unused].dboid = dboid;
    return unused;
}

void
kne_wake_at_commit(void)
{
    wake_at_commit = true;
}

/* Runs with interrupts held, after the transaction is over: it must not fail. */
static void
wake_worker(bool prepared)
{
    Latch *latch = NULL;
    int    i;

    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    i = kne_slot(MyDatabaseId, true);
    if (i < 0)
    {
        kne_proc->revisit = true;
        latch = kne_shared->launcher_latch;
    }
    else
    {
        KneWorkerSlot *slot = &kne_shared->worker[i];
        KneSlotMore   *more = &kne_proc->more[i];

        if (prepared)
        {
            /* Nobody tells when it commits: look soon, and again. */
            more->poll_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), 1000);
        }
        else
            slot->wanted = true;
        latch = slot->pid != 0 ? slot->latch : kne_shared->launcher_latch; /* an idle worker sees what is prepared */
    }
    if (latch)
        SetLatch(latch);
    LWLockRelease(&kne_shared->lock);
    ereport(DEBUG1, (errmsg_internal("kne: a worker is woken")));
}

static void
xact_callback(XactEvent event, void *arg)
{
    (void) arg;
    if (!wake_at_commit)
        return;
    switch (event)
    {
        case XACT_EVENT_COMMIT:
        case XACT_EVENT_PREPARE:
            wake_at_commit = false;
            wake_worker(event == XACT_EVENT_PREPARE);
            break;
        case XACT_EVENT_ABORT:
            wake_at_commit = false;
            break;
        default:
            break;
    }
}

void
_PG_init(void)
{
    BackgroundWorker worker;

    if (IsBinaryUpgrade)
        return;

    define_settings();

    if (!process_shared_preload_libraries_in_progress)
        return;

    prev_shmem_request_hook = shmem_request_hook;
    shmem_request_hook = shmem_request;
    prev_shmem_startup_hook = shmem_startup_hook;
    shmem_startup_hook = shmem_startup;
    RegisterXactCallback(xact_callback, NULL);

    memset(&worker, 0, sizeof(worker));
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_ConsistentState; /* a standby needs the engine too */
    worker.bgw_restart_time = 1;
    strlcpy(worker.bgw_library_name, "kne", BGW_MAXLEN);
    strlcpy(worker.bgw_function_name, "kne_launcher_main", BGW_MAXLEN);
    strlcpy(worker.bgw_name, "kne launcher", BGW_MAXLEN);
    strlcpy(worker.bgw_type, "kne launcher", BGW_MAXLEN);
    RegisterBackgroundWorker(&worker);
}
