/*
 * kne_work.c - the workspace of the graph's passes: one allocation of the device's memory, laid out
 * by a function that runs twice (count, then hand out; see kne_arena).
 *
 * Without keep every layer's kne_saved names the same buffers, and x_in and
 * x_mid are the residual stream itself, so the graph needs no second code path.
 */
#include "kne_graph_impl.h"

#include <stdlib.h>

static float *
floats(kne_arena *arena, int64_t rows, int64_t cols)
{
    return kne_arena_take(arena, (size_t) rows, (size_t) cols * sizeof(float));
}

static int32_t *
ints(kne_arena *arena, int64_t n)
{
    return kne_arena_take(arena, (size_t) n, sizeof(int32_t));
}

/* K and V of a layer; apart from the rest because a cache is kept layer by layer. */
static void
layout_kv(kne_arena *arena, const kne_arch *a, kne_saved *s, int64_t rows)
{
    s->k = floats(arena, rows, (int64_t) a->n_kv_heads * a->head_dim);
    s->v = floats(arena, rows, (int64_t) a->n_kv_heads * a->head_dim);
}

static void
layout_layer(kne_arena *arena, const kne_arch *a, kne_saved *s, int64_t n, float *x)
{
    int64_t d = a->d_model, f = a->d_ff, h = a->n_heads, hkv = a->n_kv_heads, hd = a->head_dim;
    bool    layernorm = a->norm == KNE_LAYERNORM;

    s->x_in = x ? x : floats(arena, n, d);
    s->h1 = floats(arena, n, d);
    s->mean1 = layernorm ? floats(arena, n, 1) : NULL;
    s->rstd1 = floats(arena, n, 1);
    s->q = floats(arena, n, h * hd);
    if (a->qk_norm)
    {
        s->q_raw = floats(arena, n, h * hd);
        s->k_raw = floats(arena, n, hkv * hd);
        s->q_rstd = floats(arena, n, h);
        s->k_rstd = floats(arena, n, hkv);
    }
    s->attn = floats(arena, n, h * hd);
    s->lse = floats(arena, n, h);
    if (a->block == KNE_BLOCK_SEQUENTIAL)
        s->x_mid = x ? x : floats(arena, n, d);
    if (a->block == KNE_BLOCK_PARALLEL_ONE_NORM)
    {
        s->h2 = s->h1;
        s->mean2 = s->mean1;
        s->rstd2 = s->rstd1;
    }
    else
    {
        s->h2 = floats(arena, n, d);
        s->mean2 = layernorm ? floats(arena, n, 1) : NULL;
        s->rstd2 = floats(arena, n, 1);
    }
    s->gate = a->gated ? floats(arena, n, f) : NULL;
    s->up = floats(arena, n, f);
    s->a = floats(arena, n, f);
}

static void
layout_backward(kne_arena *arena, const kne_arch *a, kne_work_impl *s, int64_t n, int64_t max_out)
{
    int64_t d = a->d_model, f = a->d_ff;
    int64_t k = (int64_t) a->n_heads * a->head_dim, kv = (int64_t) a->n_kv_heads * a->head_dim;

    s->dx = floats(arena, n, d);
    s->final_dx = floats(arena, max_out, d);
    s->dh2 = floats(arena, n, d);
    s->dh1 = a->block == KNE_BLOCK_PARALLEL_ONE_NORM ? s->dh2 : floats(arena, n, d);
    s->u = floats(arena, n, f);
    s->dgate = a->gated ? floats(arena, n, f) : NULL;
    s->dup = floats(arena, n, f);
    s->dattn = floats(arena, n, k);
    s->dq = floats(arena, n, k);
    s->dk = floats(arena, n, kv);
    s->dv = floats(arena, n, kv);
    if (a->qk_norm)
    {
        s->dq_raw = floats(arena, n, k);
        s->dk_raw = floats(arena, n, kv);
    }
}

static void
layout(kne_work *w, kne_work_impl *s, const kne_model *m)
{
    const kne_arch *a = &m->arch;
    kne_arena      *arena = &w->arena;
    int64_t         n = w->max_n, d = a->d_model, k = (int64_t) a->n_heads * a->head_dim;
    bool            cached = s->max_kv > 0;
    kne_saved       one = {0};

    w->x = floats(arena, n, d);
    w->logits = floats(arena, w->max_out, a->vocab_size);
    w->dlogits = w->keep ? floats(arena, w->max_out, a->vocab_size) : NULL;
    w->target = ints(arena, w->max_out);
    w->best = ints(arena, w->max_out);
    w->coef = floats(arena, w->max_out, 1);
    w->logp = floats(arena, w->max_out, 1);
    w->kl = floats(arena, w->max_out, 1);
    s->id = ints(arena, n);
    s->pos = ints(arena, n);
    s->out_row = ints(arena, w->max_out);
    s->seq = kne_arena_take(arena, (size_t) n, sizeof *s->seq);

    if (!w->keep)
        layout_layer(arena, a, &one, n, w->x);
    if (!w->keep && !cached)
        layout_kv(arena, a, &one, n);
    for (int32_t l = 0; l < a->n_layers; l++)
    {
        kne_saved *at = &w->layer[l];

        *at = one;
        if (w->keep)
            layout_layer(arena, a, at, n, NULL);
        if (w->keep || cached)
            layout_kv(arena, a, at, cached ? s->max_kv : n);
    }

    if (w->max_place)
    {
        const int64_t kv = (int64_t) a->n_kv_heads * a->head_dim;

        s->row = ints(arena, w->max_place);
        s->from = ints(arena, n + 1);
        s->place = ints(arena, w->max_place);
        s->first = ints(arena, n);
        for (int i = 0; i < (w->keep ? WIDE_DV + 1 : WIDE_DO); i++)
            s->wide[i] = floats(arena, w->max_place, i == WIDE_K || i == WIDE_V || i == WIDE_DK || i == WIDE_DV ? kv : k);
        s->wide_lse = floats(arena, w->max_place, a->n_heads);
    }
    if (s->max_key)
    {
        s->key = ints(arena, s->max_key);
        s->wide[WIDE_K] = floats(arena, s->max_key, (int64_t) a->n_kv_heads * a->head_dim);
        s->wide[WIDE_V] = floats(arena, s->max_key, (int64_t) a->n_kv_heads * a->head_dim);
    }
    s->y = floats(arena, n, d);
    if (a->qkv == KNE_QKV_PER_HEAD)
    {
        s->qkv = floats(arena, n, 3 * k);
        for (int part = 0; part < 3; part++)
            s->split[part] = ints(arena, k);
    }
    s->ones = floats(arena, n, 1);
    s->edit = floats(arena, n, w->max_overlay);
    s->edit_bias = floats(arena, w->max_overlay, 1);
    s->final_x = floats(arena, w->max_out, d);
    s->final_h = floats(arena, w->max_out, d);
    s->final_mean = floats(arena, w->max_out, 1);
    s->final_rstd = floats(arena, w->max_out, 1);
    if (w->keep)
        layout_backward(arena, a, s, n, w->max_out);
}

/* The constants that live in a workspace; made in memory of the host for as long as it takes. */
static kne_status
fill(const kne_work *w, const kne_work_impl *s, const kne_arch *a, kne_err *err)
{
    const int32_t k = a->n_heads * a->head_dim, most = w->max_n > k ? w->max_n : k;
    union { float one; int32_t i; } *host = malloc((size_t) most * sizeof *host);

    if (!host)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t r = 0; r < w->max_n; r++)
        host[r].one = 1.0f;
    kne_device_put(s->device, s->ones, host, (size_t) w->max_n * sizeof *host);
    for (int32_t part = 0; part < 3 && a->qkv == KNE_QKV_PER_HEAD; part++)
    {
        for (int32_t i = 0; i < k; i++)
            host[i].i = (i / a->head_dim * 3 + part) * a->head_dim + i % a->head_dim;
        kne_device_put(s->device, s->split[part], host, (size_t) k * sizeof *host);
    }
    free(host);
    return KNE_OK;
}

static kne_status
work_new(const kne_model *m, kne_work_shape shape, int32_t max_kv, int32_t max_key, int32_t max_place, kne_work **out, kne_err *err)
{
    struct { kne_work w; kne_work_impl s; kne_saved layer[]; } *both;
    kne_status st;

    *out = NULL;
    if (shape.max_n < 1 || shape.max_out < 0 || shape.max_overlay < 0 || max_place < 0 || max_kv < 0 || max_key < 0 ||
        (shape.keep && max_kv > 0))
        return kne_error(err, KNE_ERR_INTERNAL, "impossible workspace: %d rows, %d out, %d edited",
                         shape.max_n, shape.max_out, shape.max_overlay);
    both = calloc(1, sizeof *both + (size_t) m->arch.n_layers * sizeof *both->layer);
    if (!both)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    both->w = (kne_work) {
        .max_n = shape.max_n, .max_out = shape.max_out, .max_overlay = shape.max_overlay,
        .max_place = max_place, .keep = shape.keep, .impl = &both->s, .layer = both->layer,
    };
    both->s.max_kv = max_kv;
    both->s.max_key = max_key;
    both->s.device = m->device;
    layout(&both->w, &both->s, m);
    st = kne_device_commit(&both->w.arena, m->device, err);
    if (st == KNE_OK)
    {
        layout(&both->w, &both->s, m);
        st = fill(&both->w, &both->s, &m->arch, err);
    }
    if (st != KNE_OK)
    {
        kne_work_free(&both->w);
        return st;
    }
    *out = &both->w;
    return KNE_OK;
}

int32_t
kne_pass_rows(const kne_model *m, int32_t most)
{
    const kne_arch *a = &m->arch;
    const double    k = (double) a->n_heads * a->head_dim, kv = (double) a->n_kv_heads * a->head_dim;
    const double    row = sizeof(float) * a->n_layers * (4.0 * a->d_model + 2 * k + 2 * kv + (a->gated ? 3.0 : 2.0) * a->d_ff);
    const double    rows = KNE_PASS_BYTES / row;

    if (!m->device || m->device->host || rows > most)
        return most;
    return rows < 64 ? 64 : (int32_t) rows;
}

kne_status
kne_work_new(const kne_model *m, kne_work_shape shape, kne_work **out, kne_err *err)
{
    return work_new(m, shape, 0, 0, 0, out, err);
}

kne_status
kne_work_new_cached(const kne_model *m, kne_work_shape shape, int32_t max_kv, int32_t max_key, kne_work **out, kne_err *err)
{
    return work_new(m, shape, max_kv, max_key, 0, out, err);
}

kne_status
kne_work_new_shared(const kne_model *m, kne_work_shape shape, int32_t max_place, kne_work **out, kne_err *err)
{
    return work_new(m, shape, 0, 0, max_place, out, err);
}

void
kne_work_free(kne_work *w)
{
    if (!w)
        return;
    kne_device_free(&w->arena, ((kne_work_impl *) w->impl)->device);
    free(w); /* the first member of what kne_work_new_cached allocated */
}

void
kne_work_logprob(kne_backend *be, kne_work *w, int32_t from, int32_t n, int32_t v, const int32_t *target,
                 const float *coef, float *logp, int32_t *best)
{
    const size_t at = (size_t) from * (size_t) v;

    kne_device_put(be, w->target + from, target, (size_t) n * sizeof *target);
    if (coef)
        kne_device_put(be, w->coef + from, coef, (size_t) n * sizeof *coef);
    be->logprob(be->ctx, w->logp + from, w->best + from, coef ? w->dlogits + at : NULL, w->logits + at,
                w->target + from, w->coef + from, n, v);
    if (logp)
        be->get(be->ctx, logp, w->logp + from, (size_t) n * sizeof *logp);
    if (best)
        be->get(be->ctx, best, w->best + from, (size_t) n * sizeof *best);
}
