/*
 * kne_store.c - models, deltas, views kept between requests (see kne_store.h).
 *
 * A view holds references on its deltas, so freeing such a delta's entry would
 * free no memory: entries of deltas that a kept view uses are off the list of
 * what can go (n_views counts them), and come back to it when the view goes.
 */
#include "kne_store.h"

#include "kne_device.h"

#include "kne_safetensors.h"

#include <stdlib.h>
#include <string.h>

#define KEEP_SECONDS    60.0          /* what a client sent to build a view with stays so long */
#define MAX_MODELS      16            /* open at once, but for those in use */
#define WORK_KEEP_BYTES (256u << 20)  /* a larger workspace is not kept */
#define REFUSE_SECONDS  2.0           /* a folder that was just refused is not read again at once */
#define EVICT_LOOKS     64            /* entries that cannot go, passed over before giving up */

/* What is common to deltas and views: a place in the order of use. */
typedef struct entry
{
    struct entry *newer, *older; /* in the list; both NULL and not s->newest: not listed */
    bool          listed, is_view;
    double        keep_until;
    size_t        bytes;
} entry;

typedef struct cached_delta
{
    entry      e;
    kne_delta *delta;
    int32_t    n_views;
    struct cached_delta *chain;
} cached_delta;

typedef struct kne_cached_view
{
    entry       e;
    kne_loaded *of;
    uint8_t     set[KNE_DIGEST_LEN];
    kne_view   *view; /* its refs: requests at work */
    struct kne_cached_view *next;
} cached_view;

struct kne_store
{
    kne_backend   *be;
    size_t         budget, used;
    entry         *newest, *oldest;
    cached_delta **bucket; /* (n_buckets), a power of two */
    size_t         n_buckets, n_deltas;
    kne_loaded    *models;
    bool           changed;
    /* The last folder that was refused, so that asking again and again costs little. */
    char          *refused_path;
    char           refused_fingerprint[65];
    double         refused_at;
    kne_err        refused;
};

/* ---- the order of use ---- */

static void
unlist(kne_store *s, entry *e)
{
    if (!e->listed)
        return;
    *(e->newer ? &e->newer->older : &s->newest) = e->older;
    *(e->older ? &e->older->newer : &s->oldest) = e->newer;
    e->newer = e->older = NULL;
    e->listed = false;
}

static void
touch(kne_store *s, entry *e)
{
    unlist(s, e);
    e->older = s->newest;
    *(s->newest ? &s->newest->newer : &s->oldest) = e;
    s->newest = e;
    e->listed = true;
}

/* ---- deltas ---- */

static cached_delta **
delta_slot(const kne_store *s, const uint8_t *digest)
{
    uint64_t       h;
    cached_delta **at;

    memcpy(&h, digest, sizeof h); /* a digest is its own hash */
    at = &s->bucket[h & (s->n_buckets - 1)];
    while (*at && memcmp((*at)->delta->digest, digest, KNE_DIGEST_LEN) != 0)
        at = &(*at)->chain;
    return at;
}

static void
drop_delta(kne_store *s, cached_delta *c)
{
    *delta_slot(s, c->delta->digest) = c->chain;
    unlist(s, &c->e);
    s->used -= c->e.bytes;
    s->n_deltas--;
    kne_delta_release(c->delta);
    free(c);
}

/* More buckets; without memory for them chains grow longer, that is all. */
static void
more_buckets(kne_store *s)
{
    size_t         n = 2 * s->n_buckets;
    cached_delta **old = s->bucket, **grown;

    if (s->n_deltas < s->n_buckets || !(grown = calloc(n, sizeof *grown)))
        return;
    s->bucket = grown;
    for (size_t i = 0; i < n / 2; i++)
        for (cached_delta *c = old[i], *next; c; c = next)
        {
            uint64_t h;

            next = c->chain;
            memcpy(&h, c->delta->digest, sizeof h);
            c->chain = grown[h & (n - 1)];
            grown[h & (n - 1)] = c;
        }
    s->n_buckets = n;
    free(old);
}

/* ---- views ---- */

static void
drop_view(kne_store *s, cached_view *v)
{
    cached_view **at = &v->of->views;

    while (*at != v)
        at = &(*at)->next;
    *at = v->next;
    v->of->n_views--;
    for (int32_t i = 0; i < v->view->n_edits; i++)
    {
        cached_delta *c = *delta_slot(s, v->view->delta[i]->digest);

        if (c && --c->n_views == 0)
            touch(s, &c->e);
    }
    unlist(s, &v->e);
    s->used -= v->e.bytes;
    s->changed = true;
    kne_view_free(v->view);
    free(v);
}

/* Make room: the oldest that can go, until the budget holds or nothing more can. */
static void
evict(kne_store *s)
{
    double now = kne_now();
    int    looks = 0;

    for (entry *e = s->oldest, *newer; e && s->used > s->budget && looks < EVICT_LOOKS; e = newer)
    {
        newer = e->newer; /* NOLINT(clang-analyzer-unix.Malloc): what is dropped is out of the list that s->oldest begins */
        if (e->keep_until > now || (e->is_view && ((cached_view *) e)->view->refs > 0))
            looks++;
        else if (!e->is_view)
            drop_delta(s, (cached_delta *) e);
        else
        {
            drop_view(s, (cached_view *) e);
            newer = s->oldest; /* its deltas may go now; what was passed over is few */
        }
    }
}

/* ---- models ---- */

static void
free_model(kne_store *s, kne_loaded *l)
{
    while (l->views)
        drop_view(s, l->views); /* NOLINT(clang-analyzer-unix.Malloc): takes it out of the list */
    kne_ref_cache_free(l->ref_cache);
    kne_work_free(l->work);
    kne_model_close(l->model);
    free(l->path);
    free(l);
    s->changed = true;
}

/* No longer found; freed now, or with the last pin. */
static void
drop_model(kne_store *s, kne_loaded *l)
{
    for (kne_loaded **at = &s->models; *at; at = &(*at)->next)
        if (*at == l)
        {
            *at = l->next;
            break;
        }
    l->next = NULL;
    l->dead = true;
    s->changed = true;
    if (l->pins == 0)
        free_model(s, l);
}

static kne_loaded *
find_model(const kne_store *s, const char *path, const char *fingerprint)
{
    for (kne_loaded *l = s->models; l; l = l->next)
        if (strcmp(l->path, path) == 0 && strcmp(l->model->fingerprint, fingerprint) == 0)
            return l;
    return NULL;
}

/* At most `most` models, but for those at work. True if one went. */
static bool
limit_models(kne_store *s, int most)
{
    for (bool any = false;; any = true)
    {
        kne_loaded *oldest = NULL;
        int         n = 0;

        for (kne_loaded *l = s->models; l; l = l->next, n++)
            if (l->pins == 0 && (!oldest || l->used_at < oldest->used_at))
                oldest = l;
        if (n <= most || !oldest)
            return any;
        drop_model(s, oldest);
    }
}

/* Open a folder and put it into the list, in place of another state of it; pinned. */
static kne_status
load(kne_store *s, const char *path, kne_loaded **out, kne_err *err)
{
    kne_loaded *l = calloc(1, sizeof *l), *same, *next;
    kne_status  st;

    if (!l || !(l->path = strdup(path)))
    {
        free(l);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    st = kne_model_open(path, &l->model, err);
    if (st != KNE_OK)
    {
        free(l->path);
        free(l);
        return st;
    }
    same = find_model(s, path, l->model->fingerprint);
    if (same && kne_tensors_unchanged(same->model->tensors, NULL))
    {
        free_model(s, l); /* the one that is open has views, and maybe an edit at work */
        l = same;
    }
    else
    {
        for (kne_loaded *old = s->models; old; old = next)
        {
            next = old->next;
            if (strcmp(old->path, path) == 0)
                drop_model(s, old);
        }
        st = kne_model_bind(l->model, s->be, err);
        if (st == KNE_ERR_NOMEM && limit_models(s, 0)) /* room on the device, where others stand idle */
            st = kne_model_bind(l->model, s->be, err);
        if (st != KNE_OK)
        {
            free_model(s, l);
            return st;
        }
        l->next = s->models;
        s->models = l;
    }
    l->pins++;
    l->used_at = kne_now();
    s->changed = true;
    limit_models(s, MAX_MODELS);
    *out = l;
    return KNE_OK;
}

kne_status
kne_store_recheck(kne_store *s, kne_loaded *l, kne_err *err)
{
    kne_err why;

    if (l->dead || !kne_tensors_unchanged(l->model->tensors, &why))
    {
        if (l->dead)
            kne_error(&why, KNE_ERR_FORMAT, "they were replaced");
        else
            drop_model(s, l);
        kne_error(err, KNE_ERR_FORMAT, "the files of model folder \"%s\" changed while in use",
                  l->path);
        kne_error_detail(err, "%s", why.msg);
        kne_error_hint(err, "Put the files back as they were, or load the changed model under a "
                            "new name with kne_load_model.");
        return KNE_ERR_FORMAT;
    }
    return KNE_OK;
}

kne_status
kne_store_open(kne_store *s, const char *path, const char *fingerprint, kne_loaded **out,
               kne_err *err)
{
    kne_loaded *l = find_model(s, path, fingerprint);
    double      now = kne_now();

    if (l && !kne_tensors_unchanged(l->model->tensors, NULL))
    {
        drop_model(s, l); /* what it is now is for the fingerprint to say */
        l = NULL;
    }
    if (l)
    {
        l->pins++;
        l->used_at = now;
        *out = l;
        return KNE_OK;
    }
    if (s->refused_path && now - s->refused_at < REFUSE_SECONDS &&
        strcmp(s->refused_path, path) == 0 && strcmp(s->refused_fingerprint, fingerprint) == 0)
    {
        *err = s->refused;
        return err->code;
    }
    KNE_TRY(load(s, path, &l, err));
    if (strcmp(l->model->fingerprint, fingerprint) == 0)
    {
        *out = l;
        return KNE_OK;
    }
    kne_error(err, KNE_ERR_FORMAT, "model folder \"%s\" is not the one that was loaded", path);
    kne_error_detail(err, "Its fingerprint is %s, not %s.", l->model->fingerprint, fingerprint);
    kne_error_hint(err, "The folder changed since kne_load_model. Put its files back as they "
                        "were, or load it under a new name.");
    kne_store_unpin(s, l, NULL);
    free(s->refused_path);
    s->refused_path = strdup(path);
    memcpy(s->refused_fingerprint, fingerprint, sizeof s->refused_fingerprint);
    s->refused_at = kne_now();
    s->refused = *err;
    return err->code;
}

kne_status
kne_store_inspect(kne_store *s, const char *path, kne_loaded **out, kne_err *err)
{
    return load(s, path, out, err);
}

void
kne_store_unpin(kne_store *s, kne_loaded *l, kne_view *view)
{
    if (view)
        view->refs--;
    if (!l)
        return;
    l->used_at = kne_now();
    if (--l->pins == 0 && l->dead)
        free_model(s, l);
}

/* ---- sets and deltas ---- */

static cached_view *
find_view(const kne_loaded *l, const uint8_t *set)
{
    cached_view *v = l->views;

    while (v && memcmp(v->set, set, KNE_DIGEST_LEN) != 0)
        v = v->next;
    return v;
}

static kne_status
build_view(kne_store *s, kne_loaded *l, const uint8_t *set, int32_t n, const int64_t *edit_id,
           kne_delta *const *delta, cached_view **out, kne_err *err)
{
    cached_view *v = calloc(1, sizeof *v);
    kne_status   st;

    if (!v)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    st = kne_view_new(l->model, s->be, n, edit_id, delta, &v->view, err);
    if (st != KNE_OK)
    {
        free(v);
        return st;
    }
    v->view->refs = 0;
    v->of = l;
    memcpy(v->set, set, KNE_DIGEST_LEN);
    v->next = l->views;
    l->views = v;
    l->n_views++;
    v->e.is_view = true;
    v->e.bytes = sizeof *v + v->view->bytes;
    v->e.keep_until = kne_now() + KEEP_SECONDS; /* until its first use: see kne_store_view */
    s->used += v->e.bytes;
    s->changed = true;
    touch(s, &v->e);
    for (int32_t i = 0; i < n; i++)
    {
        cached_delta *c = *delta_slot(s, delta[i]->digest);

        c->n_views++;
        c->e.keep_until = 0;
        unlist(s, &c->e);
    }
    evict(s);
    *out = v;
    return KNE_OK;
}

kne_status
kne_store_view(kne_store *s, kne_loaded *l, const uint8_t set[KNE_DIGEST_LEN], kne_view **out,
               kne_err *err)
{
    static const uint8_t none[KNE_DIGEST_LEN];
    cached_view *v = find_view(l, set);

    *out = NULL;
    if (!v && memcmp(set, none, KNE_DIGEST_LEN) == 0)
        KNE_TRY(build_view(s, l, set, 0, NULL, NULL, &v, err));
    if (!v)
        return KNE_OK;
    v->e.keep_until = 0;
    touch(s, &v->e);
    v->view->refs++;
    *out = v->view;
    return KNE_OK;
}

kne_status
kne_store_put_set(kne_store *s, kne_loaded *l, const uint8_t set[KNE_DIGEST_LEN], int32_t n,
                  const int64_t *edit_id, const uint8_t (*digest)[KNE_DIGEST_LEN], uint8_t *missing,
                  int32_t *n_missing, kne_err *err)
{
    uint8_t      is[KNE_DIGEST_LEN];
    kne_delta  **delta = NULL;
    cached_view *v;
    double       now = kne_now();
    kne_status   st;

    *n_missing = 0;
    for (int32_t i = 1; i < n; i++)
        if (edit_id[i] <= edit_id[i - 1])
            return kne_error(err, KNE_ERR_PROTOCOL,
                             "the edits of a set are not in ascending order");
    KNE_TRY(kne_set_digest(edit_id, digest, n, is, err));
    if (memcmp(is, set, KNE_DIGEST_LEN) != 0)
        return kne_error(err, KNE_ERR_PROTOCOL, "the digest of a set of %d edits does not match",
                         n);
    if ((v = find_view(l, set)))
    {
        v->e.keep_until = now + KEEP_SECONDS;
        touch(s, &v->e);
        return KNE_OK;
    }
    if (n && !(delta = malloc((size_t) n * sizeof *delta)))
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < n; i++)
    {
        cached_delta *c = *delta_slot(s, digest[i]);

        missing[i] = !c;
        *n_missing += !c;
        delta[i] = c ? c->delta : NULL;
        /* It must still be here when the missing ones have come. */
        if (c && c->n_views == 0)
        {
            c->e.keep_until = now + KEEP_SECONDS;
            touch(s, &c->e);
        }
    }
    st = *n_missing ? KNE_OK : build_view(s, l, set, n, edit_id, delta, &v, err);
    free(delta);
    return st;
}

kne_status
kne_store_put_delta(kne_store *s, kne_delta *d, kne_err *err)
{
    cached_delta *c = *delta_slot(s, d->digest);

    if (!c)
    {
        c = calloc(1, sizeof *c);
        if (!c)
            return kne_error(err, KNE_ERR_NOMEM, "out of memory");
        more_buckets(s);
        c->delta = d;
        d->refs++;
        c->e.bytes = sizeof *c + d->bytes;
        s->used += c->e.bytes;
        s->n_deltas++;
        *delta_slot(s, d->digest) = c;
    }
    if (c->n_views == 0)
    {
        c->e.keep_until = kne_now() + KEEP_SECONDS;
        touch(s, &c->e);
    }
    evict(s);
    return KNE_OK;
}

/* ---- workspace ---- */

kne_status
kne_store_work(kne_loaded *l, const kne_view *view, int32_t n, kne_work **out, kne_err *err)
{
    kne_work_shape shape = {.max_n = n, .max_out = 1, .max_overlay = view->max_overlay};

    if (l->work && (l->work->max_n < n || l->work->max_overlay < view->max_overlay))
    {
        /* Grow generously, so that prompts of rising length do not reallocate each time. */
        shape.max_n = n > l->work->max_n ? n + n / 2 : l->work->max_n;
        if (shape.max_n > l->model->arch.n_ctx)
            shape.max_n = l->model->arch.n_ctx;
        if (shape.max_overlay < l->work->max_overlay)
            shape.max_overlay = l->work->max_overlay;
        kne_work_free(l->work);
        l->work = NULL;
    }
    if (!l->work)
        KNE_TRY(kne_work_new(l->model, shape, &l->work, err));
    *out = l->work;
    return KNE_OK;
}

void
kne_store_work_done(kne_loaded *l)
{
    if (l->work && l->work->arena.size > WORK_KEEP_BYTES)
    {
        kne_work_free(l->work);
        l->work = NULL;
    }
}

/* ---- beginning, end, upkeep ---- */

kne_status
kne_store_new(kne_backend *be, size_t budget, kne_store **out, kne_err *err)
{
    kne_store *s = calloc(1, sizeof *s);

    if (s)
    {
        s->n_buckets = 256;
        s->bucket = calloc(s->n_buckets, sizeof *s->bucket);
    }
    if (!s || !s->bucket)
    {
        free(s);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    s->be = be;
    s->budget = budget;
    s->changed = true;
    *out = s;
    return KNE_OK;
}

void
kne_store_free(kne_store *s)
{
    if (!s)
        return;
    while (s->models)
        drop_model(s, s->models);
    for (size_t i = 0; i < s->n_buckets; i++)
        while (s->bucket[i])
            drop_delta(s, s->bucket[i]); /* NOLINT(clang-analyzer-unix.Malloc): takes it out of the bucket */
    free(s->bucket);
    free(s->refused_path);
    free(s);
}

bool
kne_store_tidy(kne_store *s)
{
    bool any = false;

    for (kne_loaded *l = s->models, *next; l; l = next)
    {
        next = l->next;
        if (l->pins == 0 && !kne_tensors_unchanged(l->model->tensors, NULL))
        {
            drop_model(s, l);
            any = true;
        }
    }
    evict(s);
    return any;
}

bool
kne_store_changed(kne_store *s)
{
    bool changed = s->changed;

    s->changed = false;
    return changed;
}

int64_t
kne_store_list(const kne_store *s, kne_wbuf *w)
{
    int64_t  mapped = 0;
    uint32_t n = 0;

    for (const kne_loaded *l = s->models; l; l = l->next)
        n++;
    kne_put_u32(w, n);
    for (const kne_loaded *l = s->models; l; l = l->next)
    {
        kne_put_str(w, l->path);
        kne_put_str(w, l->model->fingerprint);
        kne_put_i64(w, l->model->weight_bytes);
        kne_put_u32(w, (uint32_t) l->n_views);
        mapped += l->model->weight_bytes;
    }
    return mapped;
}
