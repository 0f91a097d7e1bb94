/*
 * kne_store.h - what the engine keeps between requests: open models, deltas by
 * digest, views by (model, set digest). All of it can be dropped at any time
 * and rebuilt from the model's folder and the rows that readers send.
 *
 * Deltas and views share a byte budget; the least recently used go first.
 * What a request at work has pinned stays, and so does, for a minute, what a
 * client sent to build a view with: otherwise a set larger than the budget could
 * never be put together. One thread uses a store.
 */
#ifndef KNE_STORE_H
#define KNE_STORE_H

#include "kne_backend.h"
#include "kne_edit.h"

typedef struct kne_store kne_store;

/* An open model. */
typedef struct kne_loaded
{
    kne_model            *model;
    char                 *path;
    struct kne_ref_cache *ref_cache; /* for edits; made at the first */
    kne_work             *work;      /* for reads of one pass; grown by kne_store_work */
    /* the store's own */
    int32_t               pins;
    bool                  dead;      /* its files changed: not found, freed with the last pin */
    double                used_at;
    struct kne_cached_view *views;
    int32_t               n_views;
    struct kne_loaded    *next;
} kne_loaded;

kne_status kne_store_new(kne_backend *be, size_t budget, kne_store **out, kne_err *err);
void       kne_store_free(kne_store *s);

/*
 * The model of a folder, opened on first use, pinned. KNE_ERR_FORMAT when its
 * fingerprint is not the one asked for, or its files changed since it was opened.
 */
kne_status kne_store_open(kne_store *s, const char *path, const char *fingerprint, kne_loaded **out,
                          kne_err *err);
/* Open a folder afresh, whatever its fingerprint, and keep it; pinned. */
kne_status kne_store_inspect(kne_store *s, const char *path, kne_loaded **out, kne_err *err);
/* KNE_ERR_FORMAT when the files changed since the model was opened; it is then dropped. */
kne_status kne_store_recheck(kne_store *s, kne_loaded *l, kne_err *err);
void       kne_store_unpin(kne_store *s, kne_loaded *l, kne_view *view); /* view may be NULL */

/* *out NULL: the set is not here. Else pinned. The empty set (all zero) always is here. */
kne_status kne_store_view(kne_store *s, kne_loaded *l, const uint8_t set[KNE_DIGEST_LEN],
                          kne_view **out, kne_err *err);
/*
 * Build the view of a set, ascending by edit_id, and keep it. missing[i] tells the deltas that are
 * not here; with any, nothing is built and *n_missing says how many.
 */
kne_status kne_store_put_set(kne_store *s, kne_loaded *l, const uint8_t set[KNE_DIGEST_LEN],
                             int32_t n, const int64_t *edit_id,
                             const uint8_t (*digest)[KNE_DIGEST_LEN], uint8_t *missing,
                             int32_t *n_missing, kne_err *err);
/* Keeps a reference of its own; one that is there already is left as it is. */
kne_status kne_store_put_delta(kne_store *s, kne_delta *d, kne_err *err);

/* A workspace for one pass of n rows and one row of logits; valid until the model's next. */
kne_status kne_store_work(kne_loaded *l, const kne_view *view, int32_t n, kne_work **out,
                          kne_err *err);
void       kne_store_work_done(kne_loaded *l); /* gives back an unusually large one */

/* Idle: let go of models whose files changed or went away. True if any. */
bool       kne_store_tidy(kne_store *s);
bool       kne_store_changed(kne_store *s); /* the list below, since the last call */
/* n * (str path, str fingerprint, i64 weight bytes, u32 views); returns the mapped bytes of all. */
int64_t    kne_store_list(const kne_store *s, kne_wbuf *w);

#endif
