/*
 * kne_proc.h - what the processes share beyond kne_ext.h: module.c, launcher.c, engine.c, client.c,
 * worker.c, worker_record.c and status.c. Nothing else includes it.
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
    bool        cancel;      /* a commit cancelled a request that may be running */
    bool        visit;       /* a look only: the worker leaves at once when there is nothing to do */
    bool        left;        /* the worker left in good order; else the launcher counts a failure */
    bool        waiting;     /* requests are known to wait there */
    int         failures;    /* workers that ended badly in a row */
    int         fault_delay; /* seconds of the last back-off after a fault that is not an edit's */
    TimestampTz prepared_at; /* since when prepared transactions may hold requests; 0: none */
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
/* As kne_wake_at_commit, and the worker looks at once whether an edit it has in hand was cancelled. */
extern void kne_signal_cancel(void);

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
/* From KneIdle only: ask the engine to stop an edit of the EDIT in hand (0: all of them). */
extern void kne_call_cancel(int64 edit_id);
/* An engine is there, or about to be: a call has a chance. */
extern bool kne_engine_up(void);
/* A non-blocking connection to the engine's socket, or -1 with errno. */
extern int  kne_engine_connect(void);
/* Append a whole HELLO frame. */
extern void kne_put_hello(kne_wbuf *w, uint32 id);

/* Text from outside that a message is to show: what is not valid in this database's encoding becomes '?'. In place. */
extern char *kne_safe_text(char *s);

/* ---- worker.c <-> worker_record.c ---- */
/* What is to be written about one edit of a batch. */
typedef enum KneVerdict
{
    KNE_DONE,    /* nothing left to write */
    KNE_APPLY,   /* it is solved, or held already */
    KNE_FAIL,    /* it failed for good or has one attempt less */
    KNE_REQUEUE  /* back to pending, through no fault of its own */
} KneVerdict;

typedef struct KneJob
{
    KneEditSpec spec;
    int32       attempts, deaths;
    KneVerdict  verdict;
    /* FAIL, REQUEUE */
    char       *error;     /* NULL: none */
    bool        charge;    /* attempts + 1; at kne.max_attempts it fails */
    bool        final;     /* FAIL: whatever attempts are left */
    bool        death;     /* deaths + 1 */
    double      delay;     /* seconds before it may run again */
    /* APPLY: where its part of the reply is */
    bool        holds;
    int32       steps;
    double      p_before, p_after, norm;
    char       *answer_before;
    uint8       digest[32];
    int32       n_ensemble, n_rows;
    kne_rbuf    ensemble, rows; /* past the count */
    bool        applied;  /* written */
} KneJob;

typedef struct KneBatch
{
    struct KneBatch *next;
    MemoryContext    mcxt;
    int32            model_id;
    char            *options; /* JSON text or NULL */
    int              n, open; /* open: verdicts not yet written */
    bool             claimed;
    KneJob          *job;
    TimestampTz      retry_at;
    int              busy;    /* rounds in which something was locked */
    char            *provenance, *device;
    char            *fingerprint;
    double           attribute_seconds, optimise_seconds;
    int              n_disturbed;
    KneKnown        *disturbed;
} KneBatch;

/* A short transaction as the extension's owner, SPI connected, snapshot set. Memory stays in the caller's context. */
extern void kne_begin(void);
extern void kne_commit(void);
/* After an error: out of the transaction, back in mcxt, identity restored. */
extern void kne_abort(MemoryContext mcxt);
/* SPI with a plan kept for each statement; sql must be a literal. nulls as in SPI_execute_plan. Returns rows. */
extern uint64 kne_sql(const char *sql, int nargs, const Oid *types, Datum *values, const char *nulls, long limit);

/* Write what can be written of a batch; open becomes 0 when all is. Never throws but for interrupts. */
extern void kne_record(KneBatch *batch);
/* Read an EDIT's answer into the verdicts. ERROR when it is malformed or not about this batch. */
extern void kne_read_outcomes(KneBatch *batch, kne_rbuf *reply, KneKnown *known, int n_known);

/* What this worker does now: pg_stat_activity and its slot. */
extern void kne_activity(const char *fmt,...) pg_attribute_printf(1, 2);

#endif
