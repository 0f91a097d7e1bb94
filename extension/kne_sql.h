/*
 * kne_sql.h - what the files of the SQL surface share with each other (not with the processes' files):
 * prepared statements, checks of arguments, the caller's identity.
 */
#ifndef KNE_SQL_H
#define KNE_SQL_H

#include "kne_ext.h"

#include "executor/spi.h"
#include "fmgr.h"
#include "utils/jsonb.h"

#include "../src/kne_options.h"

#define KNE_MAX_ARGS 8

/* A statement, prepared on first use and kept for the life of the backend. */
typedef struct KnePlan
{
    const char *sql;
    int nargs;
    Oid types[KNE_MAX_ARGS];
    SPIPlanPtr plan;
} KnePlan;

/* How a statement looks at the database. */
typedef enum KneLook
{
    KNE_READ,  /* the active snapshot, as a STABLE function must */
    KNE_WRITE, /* a fresh snapshot (in READ COMMITTED), and writes */
    KNE_LATEST /* reads with a snapshot taken now, whatever the isolation level */
} KneLook;

/* Nested calls are fine; what SPI returns lives until kne_spi_finish. */
extern void kne_spi_connect(void);
extern void kne_spi_finish(void);
/* Run it and return how many rows there were. `nulls` as SPI takes it: ' ' or 'n' for each argument, or NULL.
 */
extern uint64 kne_spi(KnePlan *p, KneLook look, Datum *values, const char *nulls);
/* Columns (from 1) of row i of the last result. text: in `mcxt`, NULL when null. */
extern Datum kne_spi_datum(uint64 row, int col, bool *isnull);
extern int64 kne_spi_int8(uint64 row, int col);
extern int32 kne_spi_int4(uint64 row, int col);
extern bool kne_spi_bool(uint64 row, int col); /* false when null */
extern char *kne_spi_text(uint64 row, int col, MemoryContext mcxt);

/*
 * Run a function of kne as its owner, and remember who called it: kne_caller and kne_caller_id tell. For functions that
 * record or check their caller; they are not SECURITY DEFINER, because inside of that it is known only who the session is,
 * and somebody else's function that a superuser's ANALYZE runs is not the superuser.
 */
extern Datum kne_as_owner(FunctionCallInfo fcinfo, PGFunction body);
/* Who asked for what is being done: the caller of kne_as_owner; in other functions and in the worker the session's role. */
extern Oid kne_caller_id(void);
extern const char *kne_caller(void);

/*
 * An event by a user: like kne_event, with who and whence added to the detail. `key`: `value` too unless
 * value is NULL.
 */
extern void kne_event_user(int64 edit_id, const char *event, const char *key, const char *value);

/* The instant at which what this transaction changes of a model comes into force; takes the model's lock until the transaction ends. */
extern TimestampTz kne_stamp_of(int32 model_id);

/* Lock the rows of the facts of these edits, in order. */
extern void kne_lock_facts(const int64 *edit_id, int n);
/* Take edits out, as kne_revert_all; sorts the ids, returns how many there were. */
extern int kne_revert_edits(int64 *edit_id, int n, const char *reason);
/* Take a pending or running one back, as kne_cancel; false: it had finished. */
extern bool kne_cancel_edit(int64 edit_id);

/* ERROR unless text is there and not blank. */
extern void kne_check_text(const char *what, const char *value);
/*
 * The options given for a model (may be NULL) with those of the profiles under them; NULL when there are none of either. `fallback`:
 * the profile when they name none, if it exists; may be NULL. In the current context; *out: with the defaults.
 */
extern Jsonb *kne_options_resolve(Jsonb *given, int32 model_id, const char *fallback, kne_options *out);
/* The profile that options name; NULL: none. */
extern char *kne_options_profile(Jsonb *j);
/* Defaults, then the options of an object ("profile" aside); ERROR for what the table does not allow. NULL: the defaults. */
extern void kne_options_from_jsonb(Jsonb *j, kne_options *out);
/* ERROR unless the model has the layers that the options name. */
extern void kne_check_layers(const kne_options *options, const KneModel *model);
extern void kne_options_from_text(const char *json, kne_options *out);
/* The same of options that were checked by another version: what this one does not allow is passed by. */
extern void kne_options_known(const char *json, kne_options *out);

/* Would nobody ever run what is being queued? A WARNING, once a transaction. ERROR when kne is not preloaded. */
extern void kne_warn_if_idle(void);
/* kne_revert, without its identity. */
extern void kne_revert_edit(int64 edit_id, const char *reason);
pg_noreturn extern void kne_no_such_edit(int64 edit_id);
pg_noreturn extern void kne_no_such_consolidation(int64 consolidation_id);

/* This database's origin; in the current context. */
extern struct pg_uuid_t *kne_origin(void);

/* Argument n as an instant: NULL is now (KNE_NOW), else it must be finite and have been. */
extern TimestampTz kne_as_of_arg(FunctionCallInfo fcinfo, int n);

/* The view that a reading function answers from: kept between calls of one snapshot (view.c). */
extern KneView *kne_view_for_read(const char *model_name, TimestampTz as_of);

/* Have the engine write a view to a new folder, as kne_export; checks that the caller may. Returns its answer; *path: the real one. */
extern Datum kne_export_view(const KneView *view, const char *given, uint8 format, char **path);
/* A model's folder that the caller may load: its real path and its fingerprint. */
extern char *kne_model_folder(const char *path, char **fingerprint);
/* The base that a model should have, by its newest rebase. */
typedef struct KneBase
{
    TimestampTz at; /* earlier states cannot be had; DT_NOBEGIN: it was never rebased */
    char *fingerprint;
} KneBase;

extern KneBase kne_base_of(const KneModel *model);
/* ERROR while a subscription brings edits: "cannot `what`". */
extern void kne_check_subscriptions(const char *what);
/* SQL: is the edit of row r part of its model's base since a rebase (rebase.c), from which nothing is taken out? */
#define KNE_IN_BASE(r) "EXISTS (SELECT FROM kne.solution b WHERE b.edit_id = " r ".edit_id AND b.provenance ? 'rebase')"

/* The same from a function's arguments, NULL for the default model and for now. ERROR when kne is not preloaded. */
extern KneView *kne_view_args(FunctionCallInfo fcinfo, int model, int as_of);
/* Text that a model made, from a message: what the database's encoding cannot hold is replaced. */
extern Datum kne_model_text(kne_rbuf *r);

#endif
