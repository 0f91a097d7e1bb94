/*
 * kne_proc.h - what the processes share beyond kne_ext.h: module.c, launcher.c, engine.c, client.c,
 * worker*.c and status.c. Nothing else includes it.
 *
 * Invariant: KneProcShared begins with the KneShared that everybody sees, and both are guarded by its one lock,
 * which is held for a few instructions at a time and never across anything that can wait or fail.
 */
#ifndef KNE_PROC_H
#define KNE_PROC_H

#include "kne_ext.h"

#include "utils/elog.h"

/* The rest of a worker's slot. */
typedef struct KneSlotMore
{
    bool        visit;       /* a look only: the worker leaves at once when there is nothing to do */
    bool        left;        /* the worker left in good order; else the launcher counts a failure */
    bool        waiting;     /* requests are known to wait there */
    int         failures;    /* workers that ended badly in a row */
    int         fault_delay; /* seconds of the last back-off after a fault that is not an edit's */
    TimestampTz poll_at;     /* when to look again unasked; 0: never */
    char        note[256];   /* why its edits wait, for kne_status() */
} KneSlotMore;

typedef struct KneProcShared
{
    KneShared   pub; /* first: kne_shared points here */
    int         tranche;
    bool        revisit; /* a commit found no free slot: look at every database again */
    TimestampTz launcher_since;
    char        launcher_note[256];
    char        engine_says[256]; /* what the engine last wrote to its log */
    KneSlotMore more[KNE_MAX_WORKERS];
} KneProcShared;

#define kne_proc ((KneProcShared *) kne_shared)

/* ---- module.c ---- */
/* The slot of a database, made when there is none and create is set; -1: none. The lock is held. */
extern int kne_slot(Oid dboid, bool create);

/* ---- launcher.c, worker.c: entry points ---- */
extern PGDLLEXPORT void kne_launcher_main(Datum arg);
extern PGDLLEXPORT void kne_worker_main(Datum arg);

/* ---- engine.c: launcher only ---- */
/* Looks after the engine: reaps, restarts, reads its log, sees when it answers. Returns ms until the next look. */
extern long kne_engine_tick(void);
/* The settings changed or an operator asked for another try. */
extern void kne_engine_reconfigure(void);
/* Pipe to wait on for what the engine writes; PGINVALID_SOCKET: none. */
extern int  kne_engine_log_fd(void);
/* Stop it, within about two seconds, and take its socket away. */
extern void kne_engine_stop(void);
/* Only what a signal handler may do. */
extern void kne_engine_kill_now(void);

/* ---- client.c ---- */
/*
 * What a process does while kne_call waits: called at each wake-up of its latch and at least every
 * KNE_IDLE_MS. It may run short transactions, send cancels, or throw. NULL: nothing.
 */
#define KNE_IDLE_MS 200
typedef void (*KneIdle) (void *arg);
extern void kne_call_idle(KneIdle idle, void *arg);
/* From KneIdle only: ask the engine to stop an edit of the EDIT in hand (0: all of them). False: too early. */
extern bool kne_call_cancel(int64 edit_id);
/* Calls from now on give up after so many ms, with ERROR 55000; 0: never. To be put back by whoever sets it. */
extern void kne_call_patience(int ms);
/* An engine is there, or about to be: a call has a chance. */
extern bool kne_engine_up(void);
/* Of the engine that this process is, or was, connected to. */
extern const char *kne_engine_version(void);
/* A non-blocking connection to the engine's socket, or -1 with errno. */
extern int  kne_engine_connect(void);
/* Append a whole HELLO frame. */
extern void kne_put_hello(kne_wbuf *w, uint32 id);

/* ---- worker_sql.c: the worker's transactions and statements ---- */
extern void kne_worker_settings(void);
/* A short transaction as the extension's owner, SPI connected, snapshot set. Allocations go on in the caller's context. */
extern void kne_begin(void);
extern void kne_commit(void);
/* After an error: out of the transaction, allocations again in mcxt. */
extern void kne_abort(MemoryContext mcxt);
/* In a transaction: false when the extension is not there. Remembers its owner. */
extern bool kne_extension_present(void);
/* SPI with a plan kept for each statement; sql is a literal. nulls as SPI takes it. Returns the number of rows. */
extern uint64 kne_sql(const char *sql, int nargs, const Oid *types, Datum *values, const char *nulls);
/* Column (from 1) of a row of the last result; text in the current context, NULL for null. */
extern int64 kne_sql_int8(uint64 row, int col);
extern char *kne_sql_text(uint64 row, int col);
extern TimestampTz kne_sql_time(uint64 row, int col); /* 0: null */
/* {"key": value, ...} piece by piece. */
extern void kne_json_open(StringInfo s);
extern void kne_json_text(StringInfo s, const char *key, const char *value); /* left out when NULL */
extern void kne_json_number(StringInfo s, const char *key, double value);
extern void kne_json_int(StringInfo s, const char *key, int64 value);
extern char *kne_json_close(StringInfo s);

/* ---- worker.c ---- */
extern int kne_worker_slot;
#define KNE_SLOT (&kne_shared->worker[kne_worker_slot])
#define KNE_MORE (&kne_proc->more[kne_worker_slot])
/* The slot's activity. */
extern void kne_worker_show(const char *activity);
/* Reads the configuration again if it was told to. */
extern void kne_worker_reload(void);

/* ---- worker_batch.c, worker_record.c and worker_consolidate.c ---- */
/* What is to be written about one edit of a batch. */
typedef enum KneVerdict
{
    KNE_DONE,   /* nothing left to write */
    KNE_APPLY,  /* it is solved, or held already */
    KNE_FAIL,   /* it failed: for good, or by one attempt */
    KNE_REQUEUE, /* back to pending, through no fault of its own */
    KNE_ABANDON  /* of a consolidation: what it was about has changed */
} KneVerdict;

typedef struct KneJob
{
    KneEditSpec spec;
    int32       generation, replaces; /* of its solution: 0, unless it is consolidated; then that in force too */
    int32       attempts, deaths;
    bool        told; /* the engine was asked to stop it */
    KneVerdict  verdict;
    /* FAIL, REQUEUE */
    char       *error; /* NULL: none */
    bool        final; /* FAIL: however many attempts are left */
    bool        death; /* an engine died under it */
    double      delay; /* seconds before it may run again */
    /* APPLY: its part of the answer */
    bool        holds, applied;
    int32       steps;
    double      p_before, p_after, norm;
    char       *answer_before;
    uint8       digest[32];
    uint32      n_ensemble, n_rows;
    kne_rbuf    ensemble, rows; /* each at its first item */
} KneJob;

typedef struct KneBatch
{
    struct KneBatch *next;
    MemoryContext    mcxt;
    int32            model_id;
    char            *options; /* JSON text or NULL */
    int              n, open; /* open: how many verdicts are not written yet */
    KneJob          *job;
    int64           *edit_id;
    int              n_kept; /* of a consolidation: jobs behind the n, which keep the solution they have */
    int64            unit;          /* its edits are applied together or not at all; 0: each by itself */
    int64            consolidation; /* 0: a batch of edits */
    bool             automatic, gave_way;
    KneJob           whole; /* of a consolidation: its one verdict, with error, death and delay */
    TimestampTz      retry_at;
    int              rounds; /* of writing that left something open */
    char            *again; /* JSON: kne_what_was_asked */
    char            *provenance, *device, *version;
    double           attribute_seconds, optimise_seconds;
    int              n_disturbed;
    KneKnown        *disturbed;
} KneBatch;

/* In a transaction, which must commit: the next batch, in a child of the current context; NULL when nothing is to do now. */
extern KneBatch *kne_batch_claim(void);
/* Compute a batch and write what can be written. */
extern void kne_batch_run(KneBatch *batch);
/* When the first of the models that wait for a fault of theirs may be tried again; 0: none does. */
extern TimestampTz kne_batch_fault_over(void);
/* Read an EDIT's answer into verdicts. In a transaction; ERROR when it is malformed or not about this batch. */
extern void kne_read_outcomes(KneBatch *batch, KneReply *reply, const uint8 *known, size_t known_len);
/* Write what can be written of a batch, each edit in a transaction of its own. Throws only on an interrupt. */
extern void kne_record(KneBatch *batch);
/* In a transaction: requests that run, and not here, go back to pending. False: some are locked, try again. */
extern bool kne_repair_orphans(const int64 *in_hand, int n_in_hand);
/* In a statement about kne.edit_request r: the request is this database's own to run (see kne.instance). */
#define KNE_OWN "r.origin = (SELECT origin FROM kne.instance) AND r.origin_database = " \
    "(SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
/* One solution of a batch: its rows of kne.solution, kne.ensemble and kne.weight_delta. In a transaction. */
extern void kne_put_solution(const KneBatch *batch, const KneJob *job);
/* A fault of the model: it waits. Returns for how many seconds. */
extern int kne_batch_fault(int32 model_id);
/* The models that wait, as int4[]. */
extern Datum kne_batch_waiting_models(void);
/* Why the database's edits wait, for kne_status(). */
extern void kne_batch_note(const char *note);
/* Seconds before an edit runs again after the engine died under it for the n-th time. */
extern double kne_death_delay(int deaths);

/* ---- worker_consolidate.c ---- */
/* As kne_batch_claim, for those that somebody asked for or for automatic ones. */
extern KneBatch *kne_consolidation_claim(bool automatic);
/* ERROR 57014 when it is cancelled, or gives way. Opens a transaction. */
extern void kne_consolidation_look(KneBatch *batch);
/* True: some edits keep what they have, and the others are to be solved again on top of that. */
extern bool kne_consolidation_outcome(KneBatch *batch);
extern void kne_consolidation_judge(KneBatch *batch, const ErrorData *e, const char *error);
extern void kne_consolidation_record(KneBatch *batch);
/* Of the edits that keep their solution, those that the model no longer answers join the disturbed facts. Opens a transaction. */
extern void kne_consolidation_look_after(KneBatch *batch);
extern bool kne_repair_consolidations(const int64 *in_hand, int n_in_hand);
/* In a transaction: queue what kne.autoconsolidate calls for. */
extern void kne_autoconsolidate_queue(void);
/* In a transaction: when to look for consolidations again, 0 for never; stuck_until: for one that is due and was not claimed. */
extern TimestampTz kne_consolidation_next(TimestampTz stuck_until);

/* Edits under which something died so often run alone, and are charged if it happens again. */
#define KNE_DEATHS_ALONE 2

#endif
