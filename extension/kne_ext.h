/*
 * kne_ext.h - what the files of kne.so share.
 *
 * Who does what: module.c (load, settings, shared memory), launcher.c (one a server, no database: starts
 * workers, supervises the engine), engine.c (spawn and reap kne-engine, launcher only), client.c (the socket to the engine),
 * worker.c (one a database, on demand: claims and records edits), view.c (which edits a snapshot sees),
 * known.c (facts for anchors, contrast, protection), request.c (edit, revert, cancel, retry, wait),
 * read.c (complete, logprob, ...), model.c (load and drop), export.c, track.c, audit.c, status.c.
 */
#ifndef KNE_EXT_H
#define KNE_EXT_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"

#include "kne_compat.h"
#include "../src/kne_protocol.h"
#include "../src/kne_wire.h"

/* ---- settings (module.c) ---- */
extern char *kne_model_dir;
extern char *kne_default_model; /* empty: by is_default */
extern char *kne_device;
extern int   kne_cpu_threads;
extern int   kne_batch_size;
extern int   kne_batch_bytes; /* kB */
extern int   kne_max_attempts;
extern bool  kne_enabled;
extern int   kne_idle_timeout; /* seconds */
extern bool   kne_autoconsolidate;
extern int    kne_autoconsolidate_threshold;
extern double kne_autoconsolidate_scale_factor;
extern int    kne_autoconsolidate_naptime; /* seconds */

/* ---- shared memory (module.c) ---- */
#define KNE_MAX_WORKERS 64
/* Below the data directory, every process's working directory, where base backups do not look. */
#define KNE_SOCKET "pg_stat_tmp/kne.sock"

typedef enum KneEngineState
{
    KNE_ENGINE_STOPPED,
    KNE_ENGINE_STARTING,
    KNE_ENGINE_RUNNING,
    KNE_ENGINE_BACKOFF, /* died; restarts at engine_retry_at */
    KNE_ENGINE_REFUSED  /* will not start as configured (exit code 3): see engine_note */
} KneEngineState;

/* One database that has, or had, work. Freed when its worker has left and nothing is known to wait. */
typedef struct KneWorkerSlot
{
    Oid         dboid;   /* InvalidOid: free */
    pid_t       pid;     /* 0: no worker */
    Latch      *latch;
    bool        wanted;  /* a commit asked for a worker */
    TimestampTz not_before; /* earliest start: back-off after a crash, next poll */
    /* what it is doing, for kne.stat_worker and kne.stat_progress */
    int32       model_id;
    int32       n_edits;
    uint32      phase, done, total, finished;
    float4      loss;
    int64       first_edit, consolidation; /* 0: a batch of edits */
    TimestampTz started_at, activity_at;
    char        activity[128];
} KneWorkerSlot;

typedef struct KneShared
{
    LWLock         lock; /* guards everything below */
    pid_t          launcher_pid;
    Latch         *launcher_latch;
    KneEngineState engine_state;
    pid_t          engine_pid;
    uint64         engine_starts;
    TimestampTz    engine_started_at, engine_retry_at;
    char           engine_note[256]; /* why it is not running */
    uint8          secret[KNE_SECRET_LEN];
    KneWorkerSlot  worker[KNE_MAX_WORKERS];
} KneShared;

extern KneShared *kne_shared; /* NULL when kne is not in shared_preload_libraries */

/* ERROR 55000 with the shared_preload_libraries hint when kne_shared is NULL, or what kne_require_version says. */
extern void kne_require_preload(void);

/* ERROR 55000 when the objects of this database are of a later version than this library (version.c). */
extern void kne_require_version(void);

/* Wake this database's worker when (and only if) the current transaction commits. */
extern void kne_wake_at_commit(void);

/* SQL arrays, in the current context (worker_sql.c). */
extern Datum kne_int8_array(const int64 *v, int n);
extern Datum kne_int4_array(const int32 *v, int n);
extern Datum kne_float4_array(const float4 *v, int n);

/* SQL, FROM and WHERE: subscriptions s of this database that bring edits of another server. */
#define KNE_SUBSCRIPTIONS \
    " FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_subscription_rel b ON b.srsubid = s.oid" \
    " WHERE s.subenabled AND b.srrelid = 'kne.activation'::pg_catalog.regclass"

/* ---- the engine's socket (client.c) ---- */
typedef struct KneReply
{
    uint16   type; /* KNE_MSG_OK, NEED_SET or NEED_DELTAS: an ERROR answer is thrown as ereport */
    kne_rbuf body; /* in the memory context current at the call */
} KneReply;

/* Called while waiting, for PROGRESS frames; may be NULL. */
typedef void (*KneProgress) (void *arg, kne_rbuf *body);

/*
 * Send one request (type, body) and wait for its answer on this process's connection, made on first
 * use and after the engine's restart. Interruptible at any time: on cancel or error in the wait the
 * connection is dropped, so a late answer can be no other request's. Waits up to a few seconds for
 * an engine that is just starting. ERROR 55000 with a hint when kne is not preloaded or no engine runs,
 * "engine died" as ERRCODE_CONNECTION_FAILURE (08006) when it dies during an EDIT or an INSPECT, or twice during a read.
 */
extern void kne_call(uint16 type, const kne_wbuf *body, KneProgress progress, void *arg, KneReply *reply);
extern void kne_wbuf_init(kne_wbuf *w); /* palloc'ed in the current context; out of memory is an ERROR */
extern void kne_get_text(kne_rbuf *r, StringInfo out); /* append a str; ERROR when bad */
extern void kne_reply_done(const KneReply *reply); /* ERROR 08P01 unless the whole body was read and well-formed */
/* Text from outside that a message is to show: what is not valid in this database's encoding becomes '?'. In place. */
extern char *kne_safe_text(char *s);
/* SQLSTATE of a kne_status, the one place that maps them. */
extern int  kne_sqlstate(uint32 status);

/* ---- models (model.c) ---- */
typedef struct KneModel
{
    int32 model_id;
    char *name, *path, *fingerprint;
    int32 n_layers, d_model, d_ff, n_ctx;
    bool  gated;
} KneModel;

/* The name that is meant: kne.default_model for NULL, if it is set. */
extern const char *kne_model_meant(const char *name);
/* By name, or the default for NULL. ERROR 42704 (undefined_object) when there is none. SPI must be connected. */
extern KneModel *kne_model_by_name(const char *name);
extern KneModel *kne_model_by_id(int32 model_id);

/* ---- views (view.c) ---- */
/* as_of of "now": what the active snapshot sees. */
#define KNE_NOW DT_NOEND

typedef struct KneView
{
    KneModel *model;
    int32     n;
    int64    *edit_id;                      /* ascending */
    int32    *generation;
    uint8   (*digest)[32];
    uint8     set_digest[32];
} KneView;

/* The pairs in force, less those of `without` (n_without edit ids). SPI connected, active snapshot set. */
extern KneView *kne_view_get(KneModel *model, TimestampTz as_of, const int64 *without, int n_without);
/* The model without its edits, for what does not depend on them. In the current context. */
extern KneView *kne_view_base(KneModel *model);
extern void kne_sha256_of(const void *data, size_t len, uint8 out[32]);
/*
 * JSON, in the current context: the batch that an EDIT was asked for with, the set it was solved on and the last instant of it, and the
 * digest of the rest of the request (options, known facts, prompts). What kne_redo needs, kept with the solution. Same snapshot as the view.
 */
extern char *kne_what_was_asked(const KneView *view, const char *options, const int64 *edit_id, int n, const void *body, size_t len);
/* Begin a request body with the view. */
extern void kne_put_view(kne_wbuf *w, const KneView *view);
/* kne_call with the NEED_SET / NEED_DELTAS answers served from rows. Does its own SPI reads in the active
 * snapshot; where there is none (the worker, between transactions) it opens short transactions of its own. */
extern void kne_call_view(const KneView *view, uint16 type, const kne_wbuf *body, KneProgress progress,
                          void *arg, KneReply *reply);

/* ---- facts that protect (known.c) ---- */
typedef struct KneKnown
{
    char *prompt, *object, *subject, *relation;
    int64 edit_id;
} KneKnown;

/* Template of a relation filled with the subject; without a row in kne.relation "subject relation". */
extern char *kne_prompt(const char *subject, const char *relation);
/* The relation's paraphrases filled, at most max. */
extern int kne_paraphrases(const char *subject, const char *relation, int max, char ***out);
/*
 * The known facts sent with a batch: facts in force of the batch's relations and subjects first, then
 * a seeded sample of the others up to `most`, facts made by edits among them; without those of the (subject, relation) pairs being
 * edited. Fewer than 64: kne.general_fact fills up. Order is deterministic for equal rows and seed.
 */
extern int kne_known_facts(KneModel *model, int n_edits, char **subject, char **relation, int most,
                           uint64 seed, KneKnown **out);
/* Indices into known of the anchors of one edit, nearest first: same relation, same subject, edited earlier; at most `most`. */
extern int kne_anchors(const KneKnown *known, int n_known, const char *subject, const char *relation,
                       int most, uint64 seed, int32 **out);
/* Append the options, known facts and edits part of an EDIT/LOCATE body (kne_protocol.h). One edit of the batch: */
typedef struct KneEditSpec
{
    int64 edit_id;
    char *subject, *relation, *object;
} KneEditSpec;
extern void kne_put_edit_body(kne_wbuf *w, KneModel *model, const char *options_json, int n_edits,
                              const KneEditSpec *edit);

/* What the profiles alone make of a model's options, as JSON text; NULL: no more than the defaults. See kne_options_resolve. (profile.c) */
extern char *kne_options_resolved(int32 model_id, const char *fallback);

/* Text in the server's encoding, sent as UTF-8. */
extern void kne_put_text(kne_wbuf *w, const char *s);
/* Append the texts of kne.health_text: n * str; returns n. */
extern int kne_put_health_texts(kne_wbuf *w);
/* How many edits with these options (JSON text or NULL) may be solved together for their rows to stay within kne.batch_bytes; at least 1. */
extern int kne_batch_most(const char *options_json, const KneModel *model);

/* ---- states of edits (state.c): all SPI, in the caller's transaction ---- */
extern void kne_event(int64 edit_id, const char *event, const char *detail_json);

/* Lock of a model's active set: taken by the stamp trigger until commit. */
extern bool kne_lock_model(int32 model_id, bool wait);

#endif
