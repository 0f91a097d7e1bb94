/*
 * kne_ref.c - the cache of reference facts (see kne_ref.h): an open-addressed
 * table of pointers by 64-bit key, swept of what the last job did not use when it grows over its budget.
 */
#include "kne_ref.h"
#include "kne_device.h"
#include "kne_pack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BUDGET ((size_t) 512 << 20) /* bytes of activations and scores */
#define PASS_ROWS 512
#define SCORE_BYTES ((size_t) 64 << 20) /* of the scores on the device at a time */

struct kne_ref_cache
{
    kne_ref **slot; /* (cap), NULL: free */
    size_t    cap, n;
    size_t    budget; /* bytes */
    uint64_t  job;
    struct kne_energy_known *energy;
};

static uint64_t
mix(uint64_t h, uint64_t v)
{
    h ^= v;
    return kne_random_next(&h);
}

static uint64_t
fact_key(const kne_tokens *t)
{
    uint64_t h = mix((uint64_t) t->n, (uint64_t) t->n_prompt);

    for (int32_t i = 0; i < t->n; i++)
        h = mix(h, (uint64_t) t->id[i]);
    return h;
}

kne_status
kne_ref_cache_new(struct kne_ref_cache **out, kne_err *err)
{
    kne_ref_cache *c = calloc(1, sizeof *c);

    if (c)
        c->slot = calloc(c->cap = 1024, sizeof *c->slot);
    if (!c || !c->slot)
    {
        free(c);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    c->budget = BUDGET;
    *out = c;
    return KNE_OK;
}

void
kne_ref_cache_limit(struct kne_ref_cache *c, size_t bytes)
{
    c->budget = bytes;
}

static void
ref_free(kne_ref *r)
{
    free(r->a);
    free(r->square);
    free(r->score);
    free(r);
}

static void
forget_all(kne_ref_cache *c)
{
    for (size_t i = 0; i < c->cap; i++)
        if (c->slot[i])
        {
            ref_free(c->slot[i]);
            c->slot[i] = NULL;
        }
    c->n = 0;
}

void
kne_ref_cache_free(struct kne_ref_cache *c)
{
    if (!c)
        return;
    forget_all(c);
    kne_energy_known_free(c->energy);
    free(c->slot);
    free(c);
}

struct kne_energy_known **
kne_ref_cache_energy(kne_ref_cache *c)
{
    return &c->energy;
}

/* How many rows are kept is part of the key, so that an answer does not depend on what was asked before. */
static kne_ref **
find(kne_ref_cache *c, uint64_t key, int32_t n_rows)
{
    size_t i = key & (c->cap - 1);

    while (c->slot[i] && (c->slot[i]->key != key || c->slot[i]->n_rows != n_rows))
        i = (i + 1) & (c->cap - 1);
    return &c->slot[i];
}

/* Move the entries used since job `oldest` into a table of cap slots; free the others. */
static kne_status
rebuild(kne_ref_cache *c, size_t cap, uint64_t oldest, kne_err *err)
{
    kne_ref **old = c->slot, **slot = calloc(cap + 1, sizeof *slot);
    size_t    n = c->cap;

    if (!slot)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    c->slot = slot;
    c->cap = cap;
    c->n = 0;
    for (size_t i = 0; i < n; i++)
    {
        if (!old[i])
            continue;
        if (old[i]->used < oldest)
            ref_free(old[i]);
        else
        {
            *find(c, old[i]->key, old[i]->n_rows) = old[i];
            c->n++;
        }
    }
    free(old);
    return KNE_OK;
}

static size_t
bytes_in_use(const kne_ref_cache *c, int32_t L, int32_t f)
{
    size_t b = 0;

    for (size_t i = 0; i < c->cap; i++)
        if (c->slot[i])
            b += ((size_t) c->slot[i]->n_rows + (c->slot[i]->score != NULL)) * (size_t) L * (size_t) f * sizeof(float);
    return b;
}

static int32_t
rows_kept(const kne_tokens *t, int32_t max_rows)
{
    return t->n - 1 < max_rows ? t->n - 1 : max_rows;
}

/* Forward what is packed (facts[from..]) and keep each one's activations. */
static kne_status
take_pass(const kne_model *m, kne_backend *be, kne_work *w, kne_pack *pack, kne_ref **fresh, int32_t *n_fresh,
          float *logp, int32_t *best, kne_err *err)
{
    const int32_t L = m->arch.n_layers, f = m->arch.d_ff;
    int32_t       o = 0;

    KNE_TRY(kne_forward(m, be, w, &pack->b, NULL, NULL, 0, err));
    kne_work_logprob(be, w, 0, pack->b.n_out, m->arch.vocab_size, pack->target, NULL, logp, best);
    for (int32_t i = 0; i < *n_fresh; i++)
    {
        const kne_seq *s = &pack->seq[i];
        kne_ref       *r = fresh[i];
        int32_t        skip = s->q_len - r->n_rows;

        for (int32_t l = 0; l < L; l++)
            be->get(be->ctx, r->a + (size_t) l * (size_t) r->n_rows * (size_t) f,
                    w->layer[l].a + (size_t) (s->q0 + skip) * (size_t) f, (size_t) r->n_rows * (size_t) f * sizeof(float));
        r->right = true;
        for (int32_t l = 0; l < L; l++)
        {
            const float *a = r->a + (size_t) l * (size_t) r->n_rows * (size_t) f;

            r->square[l] = 0;
            for (size_t k = 0; k < (size_t) r->n_rows * (size_t) f; k++)
                r->square[l] += (double) a[k] * a[k];
        }
        for (; o < pack->b.n_out && pack->out_row[o] < s->q0 + s->q_len; o++)
            r->right &= best[o] == pack->target[o];
    }
    KNE_TRY(be->status(be->ctx, err));
    *n_fresh = 0;
    kne_pack_clear(pack);
    return KNE_OK;
}

kne_status
kne_refs(kne_ref_cache *c, const kne_model *m, kne_backend *be, const kne_tokens *fact, int32_t n, kne_ref **ref,
         const kne_job_calls *calls, kne_err *err)
{
    const int32_t L = m->arch.n_layers, f = m->arch.d_ff;
    const size_t  row_bytes = (size_t) L * (size_t) f * sizeof(float);
    int32_t       max_rows, rows = 1, n_fresh = 0, missing = 0;
    kne_arena     arena = {0};
    kne_pack      pack = {0};
    kne_work     *w = NULL;
    kne_ref     **fresh = NULL;
    float        *logp = NULL;
    int32_t      *best = NULL;
    size_t        per_fact = c->budget / 2 / row_bytes / (size_t) (n ? n : 1);
    kne_status    st = KNE_OK;

    max_rows = per_fact < 1 ? 1 : per_fact > 1 << 20 ? 1 << 20 : (int32_t) per_fact;
    c->job++;
    for (int32_t i = 0; i < n; i++)
    {
        kne_ref *r = *find(c, fact_key(&fact[i]), rows_kept(&fact[i], max_rows));

        if (r)
            r->used = c->job;
        else
        {
            missing++;
            rows = fact[i].n > rows ? fact[i].n : rows;
        }
    }
    if (missing && bytes_in_use(c, L, f) > c->budget / 2)
        KNE_TRY(rebuild(c, c->cap, c->job, err));
    while ((c->n + (size_t) missing) * 2 > c->cap)
        KNE_TRY(rebuild(c, c->cap * 2, 0, err));

    rows = rows > kne_pass_rows(m, PASS_ROWS) ? rows : kne_pass_rows(m, PASS_ROWS);
    for (int turn = 0; turn < 2 && st == KNE_OK && missing; turn++)
    {
        kne_pack_layout(&pack, &arena, rows, rows, rows);
        fresh = kne_arena_take(&arena, (size_t) rows, sizeof *fresh);
        logp = kne_arena_take(&arena, (size_t) rows, sizeof *logp);
        best = kne_arena_take(&arena, (size_t) rows, sizeof *best);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
    }
    if (st == KNE_OK && missing)
        st = kne_work_new(m, (kne_work_shape) {rows, rows, 0, true}, &w, err);

    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        kne_ref **at = find(c, fact_key(&fact[i]), rows_kept(&fact[i], max_rows));

        if (!*at)
        {
            kne_ref *r = calloc(1, sizeof *r);

            if (r)
            {
                r->key = fact_key(&fact[i]);
                r->used = c->job;
                r->n_rows = rows_kept(&fact[i], max_rows);
                r->a = malloc((size_t) r->n_rows * row_bytes + 1);
                r->square = malloc((size_t) L * sizeof *r->square);
            }
            if (!r || !r->a || !r->square)
            {
                if (r)
                    ref_free(r);
                st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
                break;
            }
            if (!kne_pack_fits(&pack, fact[i].n, fact[i].n_prompt))
            {
                if (calls && calls->yield && calls->yield(calls->ctx))
                    st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
                else
                    st = take_pass(m, be, w, &pack, fresh, &n_fresh, logp, best, err);
            }
            if (st != KNE_OK)
            {
                ref_free(r);
                break;
            }
            *at = r;
            c->n++;
            fresh[n_fresh++] = r; /* NOLINT(clang-analyzer-core.NullDereference): it was missing, so there is room */
            kne_pack_add(&pack, fact[i].id, fact[i].n, fact[i].n_prompt);
        }
        ref[i] = *at;
    }
    if (st == KNE_OK && n_fresh)
        st = take_pass(m, be, w, &pack, fresh, &n_fresh, logp, best, err);
    /* entries that a failure left without content must not be found again */
    for (int32_t i = 0; i < n_fresh; i++)
        fresh[i]->used = 0; /* NOLINT(clang-analyzer-core.NullDereference): as above */
    if (n_fresh && rebuild(c, c->cap, 1, NULL) != KNE_OK)
        forget_all(c);
    kne_work_free(w);
    kne_arena_free(&arena);
    return st;
}

static uint64_t
options_key(const kne_options *o)
{
    return mix(mix(mix(mix(1, (uint64_t) o->points), (uint64_t) o->path), (uint64_t) o->quadrature), (uint64_t) o->score);
}

/* The scores of n facts, chunk of them at a time: who[i]->score = |sum over the tokens of fact[i]|. */
static kne_status
score_facts(const kne_model *m, kne_backend *be, const kne_options *opt, const kne_tokens *fact, kne_ref *const *who, int32_t n,
            const kne_job_calls *calls, kne_err *err)
{
    const size_t len = (size_t) m->arch.n_layers * (size_t) m->arch.d_ff, bytes = len * sizeof(float);
    const size_t most = SCORE_BYTES / bytes > 16 ? SCORE_BYTES / bytes : 16, chunk = most < (size_t) n ? most : (size_t) n;
    kne_arena    dev = {0};
    float       *there = NULL, **score = NULL;
    kne_status   st = KNE_OK;

    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        there = kne_arena_take(&dev, chunk, bytes);
        if (turn == 0)
            st = kne_device_commit(&dev, be, err);
    }
    for (int32_t from = 0, to = 0; from < n && st == KNE_OK; from = to)
    {
        size_t tokens = 0, k = 0;

        for (; to < n && (size_t) (to - from) < chunk; to++)
            tokens += (size_t) (fact[to].n - fact[to].n_prompt);
        free(score);
        score = malloc((tokens + 1) * sizeof *score);
        if (!score)
            st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
        else if (from > 0 && calls && calls->yield && calls->yield(calls->ctx))
            st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
        if (st != KNE_OK)
            break;
        for (int32_t i = from; i < to; i++)
            for (int32_t j = fact[i].n_prompt; j < fact[i].n; j++)
                score[k++] = there + (size_t) (i - from) * len;
        be->zero(be->ctx, there, (size_t) (to - from) * bytes);
        st = kne_attribute(m, be, NULL, opt, fact + from, to - from, score, calls, err);
        for (int32_t i = from; i < to && st == KNE_OK; i++)
        {
            be->get(be->ctx, who[i]->score, there + (size_t) (i - from) * len, bytes);
            for (size_t c = 0; c < len; c++)
                who[i]->score[c] = fabsf(who[i]->score[c]);
        }
        if (st == KNE_OK)
            st = be->status(be->ctx, err);
    }
    free(score);
    kne_device_free(&dev, be);
    return st;
}

kne_status
kne_ref_scores(const kne_model *m, kne_backend *be, const kne_options *opt, const kne_tokens *fact,
               kne_ref *const *ref, const int32_t *pick, int32_t n_pick, const kne_job_calls *calls, kne_err *err)
{
    const size_t   len = (size_t) m->arch.n_layers * (size_t) m->arch.d_ff;
    const uint64_t key = options_key(opt);
    kne_options    all = *opt; /* scores of every layer, whatever range this edit has */
    kne_tokens    *todo = malloc(((size_t) n_pick + 1) * sizeof *todo);
    kne_ref      **who = malloc(((size_t) n_pick + 1) * sizeof *who);
    int32_t        n = 0;
    kne_status     st = todo && who ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    all.layer_min = 0;
    all.layer_max = -1;
    for (int32_t i = 0; i < n_pick && st == KNE_OK; i++)
    {
        kne_ref *r = ref[pick[i]];

        if (r->score && r->score_key == key) /* or picked twice: the same fact may be known twice */
            continue;
        if (!r->score && !(r->score = malloc(len * sizeof(float))))
            st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
        else
        {
            r->score_key = key;
            todo[n] = fact[pick[i]];
            who[n++] = r;
        }
    }
    if (st == KNE_OK && n)
        st = score_facts(m, be, &all, todo, who, n, calls, err);
    for (int32_t i = 0; i < n && st != KNE_OK; i++) /* half a score must not be found again */
    {
        free(who[i]->score);
        who[i]->score = NULL;
    }
    free(todo);
    free(who);
    return st;
}
