/*
 * kne_graph.c - the forward pass of every family, written once over the op
 * table; the descriptor (kne_arch) says which steps apply.
 *
 * Invariant: the order of operations does not depend on keep, on the cache or
 * on which sequences share the batch, so all of these give the same bits.
 */
#include "kne_graph_impl.h"

kne_status
kne_graph_check(const kne_pass *p, kne_err *err)
{
    const kne_batch *b = p->b;
    const kne_work  *w = p->w;
    int32_t          n = b->n_place ? b->n_place : b->n;
    int32_t          max_kv = b->n_place ? w->max_place : b->n_key ? b->n_key : p->s->max_kv ? p->s->max_kv : w->max_n;

    if (b->n < 1 || b->n > w->max_n || b->n_out < 0 || b->n_out > w->max_out || b->n_seq < 0 ||
        b->n_seq > w->max_n)
        return kne_error(err, KNE_ERR_INTERNAL,
                         "batch of %d rows, %d sequences, %d out, in a workspace for %d and %d",
                         b->n, b->n_seq, b->n_out, w->max_n, w->max_out);
    if (b->n_place > w->max_place || (b->n_place && (!p->be->fold_rows || p->past)))
        return kne_error(err, KNE_ERR_INTERNAL, "a batch that shares rows, in a workspace for %d places", w->max_place);
    if (b->n_key > p->s->max_key || (b->n_key && (b->n_place || p->past + b->n > p->s->max_kv)))
        return kne_error(err, KNE_ERR_INTERNAL, "a batch that picks %d keys behind %d rows, in a workspace for %d and %d", b->n_key,
                         p->past, p->s->max_key, p->s->max_kv);
    for (int32_t i = 0; i < b->n_seq; i++)
    {
        const kne_seq *q = &b->seq[i];

        if (q->q0 < 0 || q->q_len < 0 || q->q_len > n - q->q0 || q->kv0 < 0 ||
            q->kv_len < q->q_len || q->kv_len > max_kv - q->kv0)
            return kne_error(err, KNE_ERR_INTERNAL, "sequence %d is outside the batch", i);
    }
    for (int32_t i = 0; i < b->n_out; i++)
        if (b->out_row[i] < 0 || b->out_row[i] >= b->n)
            return kne_error(err, KNE_ERR_INTERNAL, "out row %d is outside the batch",
                             b->out_row[i]);
    for (int32_t l = 0; p->ov && l < p->m->arch.n_layers; l++)
        if (p->ov->layer[l].n > w->max_overlay)
            return kne_error(err, KNE_ERR_INTERNAL,
                             "%d edited neurons in layer %d, workspace for %d",
                             p->ov->layer[l].n, l, w->max_overlay);
    return KNE_OK;
}

static void
norm(const kne_pass *p, float *y, float *mean, float *rstd, const float *x, const float *w,
     const float *b, int64_t n)
{
    const kne_arch *a = &p->m->arch;

    if (a->norm == KNE_RMSNORM)
        p->be->rmsnorm(p->be->ctx, y, rstd, x, w, a->norm_eps, n, a->d_model);
    else
        p->be->layernorm(p->be->ctx, y, mean, rstd, x, w, b, a->norm_eps, n, a->d_model);
}

static void
linear(const kne_pass *p, float *y, const float *x, const kne_mat *w, const float *bias,
       int64_t n_out, int64_t n_in)
{
    p->be->linear(p->be->ctx, y, n_out, x, n_in, w, bias, p->b->n, 0.0f);
}

/* q, k (before their norms, where there are any) and v of the batch's rows. */
static void
project(const kne_pass *p, const kne_layer *t, const float *h, float *q, float *k, float *v)
{
    const kne_arch *a = &p->m->arch;
    int64_t         d = a->d_model, n = p->b->n;
    int64_t         nq = (int64_t) a->n_heads * a->head_dim;
    int64_t         nkv = (int64_t) a->n_kv_heads * a->head_dim;
    float          *part[3] = {q, k, v};

    if (a->qkv != KNE_QKV_PER_HEAD)
    {
        linear(p, q, h, &t->q, t->q_b, nq, d);
        linear(p, k, h, &t->k, t->k_b, nkv, d);
        linear(p, v, h, &t->v, t->v_b, nkv, d);
        return;
    }
    linear(p, p->s->qkv, h, &t->q, t->q_b, 3 * nq, d);
    for (int i = 0; i < 3; i++)
        p->be->gather_cols(p->be->ctx, part[i], p->s->qkv, 3 * nq, p->s->split[i], n, nq);
}

static void
rope(const kne_pass *p, float *x, int32_t n_heads)
{
    const kne_model *m = p->m;
    const kne_arch  *a = &m->arch;

    if (a->position != KNE_POS_LEARNED)
        p->be->rope(p->be->ctx, x, (int64_t) n_heads * a->head_dim, m->rope_cos, m->rope_sin,
                    p->s->pos, p->b->n, n_heads, a->head_dim, a->rotary_dim,
                    a->position == KNE_POS_ROPE_INTERLEAVED, 1.0f);
}

/* h1 -> attn. New rows of K and V are made where the cache wants them. */
static void
attention(const kne_pass *p, const kne_layer *t, const kne_saved *s)
{
    const kne_arch *a = &p->m->arch;
    kne_attn_shape  shape = kne_graph_attn_shape(p);
    int64_t         n = p->b->n, nkv = (int64_t) a->n_kv_heads * a->head_dim;
    float          *k = s->k + p->past * nkv, *v = s->v + p->past * nkv;

    project(p, t, s->h1, a->qk_norm ? s->q_raw : s->q, a->qk_norm ? s->k_raw : k, v);
    if (a->qk_norm)
    {
        p->be->rmsnorm(p->be->ctx, s->q, s->q_rstd, s->q_raw, t->q_norm, a->norm_eps,
                       n * a->n_heads, a->head_dim);
        p->be->rmsnorm(p->be->ctx, k, s->k_rstd, s->k_raw, t->k_norm, a->norm_eps,
                       n * a->n_kv_heads, a->head_dim);
    }
    rope(p, s->q, a->n_heads);
    rope(p, k, a->n_kv_heads);
    float *const *wide = p->s->wide;

    if (p->b->n_key)
    {
        p->be->gather_rows(p->be->ctx, wide[WIDE_K], s->k, p->s->key, p->b->n_key, nkv);
        p->be->gather_rows(p->be->ctx, wide[WIDE_V], s->v, p->s->key, p->b->n_key, nkv);
        p->be->attention(p->be->ctx, s->attn, NULL, s->q, wide[WIDE_K], wide[WIDE_V], &shape);
        return;
    }
    if (!p->b->n_place)
    {
        p->be->attention(p->be->ctx, s->attn, p->w->keep ? s->lse : NULL, s->q, s->k, s->v, &shape);
        return;
    }
    int64_t nq = (int64_t) a->n_heads * a->head_dim;

    kne_graph_widen(p, wide[WIDE_Q], s->q, nq);
    kne_graph_widen(p, wide[WIDE_K], s->k, nkv);
    kne_graph_widen(p, wide[WIDE_V], s->v, nkv);
    p->be->attention(p->be->ctx, wide[WIDE_O], p->s->wide_lse, wide[WIDE_Q], wide[WIDE_K], wide[WIDE_V], &shape);
    /* all places of a row come to the same */
    p->be->gather_rows(p->be->ctx, s->attn, wide[WIDE_O], p->s->first, n, nq);
    p->be->gather_rows(p->be->ctx, s->lse, p->s->wide_lse, p->s->first, n, a->n_heads);
}

/* Results of edited keys replace the base's; the bias, which no edit moves, is added as there. */
static void
replace_keys(const kne_pass *p, const kne_overlay_layer *e, float *y, const float *h,
             const float *key, const float *bias)
{
    int64_t n = p->b->n, d = p->m->arch.d_model, f = p->m->arch.d_ff;
    kne_mat rows = kne_graph_rows(key, e->n, d, false);

    if (bias)
        p->be->gather_cols(p->be->ctx, p->s->edit_bias, bias, f, e->neuron, 1, e->n);
    linear(p, p->s->edit, h, &rows, bias ? p->s->edit_bias : NULL, e->n, d);
    p->be->scatter_cols(p->be->ctx, y, f, p->s->edit, e->neuron, n, e->n, false);
}

/* y = alpha * (W_down a + a_S value_diff) + b */
static void
ffn(const kne_pass *p, int32_t l, const kne_saved *s, float *y)
{
    const kne_arch          *a = &p->m->arch;
    const kne_layer         *t = &p->m->layer[l];
    const kne_overlay_layer *e = kne_graph_edits(p, l);
    const float             *alpha = kne_graph_alpha(p, l);
    int64_t                  n = p->b->n, d = a->d_model, f = a->d_ff;

    if (a->gated)
        linear(p, s->gate, s->h2, &t->gate, t->gate_b, f, d);
    linear(p, s->up, s->h2, &t->up, t->up_b, f, d);
    if (e && e->gate && a->gated)
        replace_keys(p, e, s->gate, s->h2, e->gate, t->gate_b);
    if (e && e->up)
        replace_keys(p, e, s->up, s->h2, e->up, t->up_b);
    p->be->act(p->be->ctx, s->a, s->gate, s->up, a->act, n, f);

    linear(p, y, s->a, &t->down, alpha ? NULL : t->down_b, d, f);
    if (e && e->value_diff)
    {
        kne_mat rows = kne_graph_rows(e->value_diff, e->n, d, true);

        p->be->gather_cols(p->be->ctx, p->s->edit, s->a, f, e->neuron, n, e->n);
        p->be->linear(p->be->ctx, y, d, p->s->edit, e->n, &rows, NULL, n, 1.0f);
    }
    if (!alpha)
        return;
    p->be->scale_rows(p->be->ctx, y, alpha, n, d);
    if (t->down_b) /* as a product with ones, because the bias comes after the factor */
    {
        kne_mat column = kne_graph_rows(t->down_b, d, 1, false);

        p->be->linear(p->be->ctx, y, d, p->s->ones, 1, &column, NULL, n, 1.0f);
    }
}

/* Where a branch that joins the stream is computed: in dst, unless dst holds the stream already. */
static float *
branch(const kne_pass *p, float *dst, const float *src)
{
    return dst == src ? p->s->y : dst;
}

/* dst = src + branch; a sum of two has one rounding whatever the order, so both forms agree. */
static void
join(const kne_pass *p, float *dst, const float *src)
{
    p->be->add(p->be->ctx, dst, dst == src ? p->s->y : src,
               (int64_t) p->b->n * p->m->arch.d_model);
}

static void
layer_forward(const kne_pass *p, int32_t l)
{
    const kne_arch  *a = &p->m->arch;
    const kne_layer *t = &p->m->layer[l];
    const kne_saved *s = &p->w->layer[l];
    int64_t          n = p->b->n, d = a->d_model;
    bool             last = l + 1 == a->n_layers;
    float           *x_out = p->w->keep && !last ? p->w->layer[l + 1].x_in : p->w->x;
    float           *x_mid = a->block == KNE_BLOCK_SEQUENTIAL ? s->x_mid : x_out;

    norm(p, s->h1, s->mean1, s->rstd1, s->x_in, t->norm1_w, t->norm1_b, n);
    if (a->block == KNE_BLOCK_PARALLEL_TWO_NORMS)
        norm(p, s->h2, s->mean2, s->rstd2, s->x_in, t->norm2_w, t->norm2_b, n);

    attention(p, t, s);
    linear(p, branch(p, x_mid, s->x_in), s->attn, &t->o, t->o_b, d,
           (int64_t) a->n_heads * a->head_dim);
    join(p, x_mid, s->x_in);

    if (a->block == KNE_BLOCK_SEQUENTIAL)
        norm(p, s->h2, s->mean2, s->rstd2, x_mid, t->norm2_w, t->norm2_b, n);
    ffn(p, l, s, branch(p, x_out, x_mid));
    join(p, x_out, x_mid);
}

static void
head_forward(const kne_pass *p)
{
    const kne_model     *m = p->m;
    const kne_work_impl *s = p->s;
    const kne_batch     *b = p->b;
    int64_t              d = m->arch.d_model;

    if (b->n_out == 0)
        return;
    p->be->gather_rows(p->be->ctx, s->final_x, p->w->x, s->out_row, b->n_out, d);
    norm(p, s->final_h, s->final_mean, s->final_rstd, s->final_x, m->final_norm_w, m->final_norm_b,
         b->n_out);
    p->be->linear(p->be->ctx, p->w->logits, m->arch.vocab_size, s->final_h, d, &m->head, m->head_b,
                  b->n_out, 0.0f);
}

static void
put_batch(kne_backend *be, const kne_work_impl *s, const kne_batch *b)
{
    kne_device_put(be, s->id, b->id, (size_t) b->n * sizeof *b->id);
    kne_device_put(be, s->pos, b->pos, (size_t) b->n * sizeof *b->pos);
    kne_device_put(be, s->seq, b->seq, (size_t) b->n_seq * sizeof *b->seq);
    kne_device_put(be, s->out_row, b->out_row, (size_t) b->n_out * sizeof *b->out_row);
    kne_device_put(be, s->key, b->key, (size_t) b->n_key * sizeof *b->key);
    if (!b->n_place)
        return;
    kne_device_put(be, s->row, b->row, (size_t) b->n_place * sizeof *b->row);
    kne_device_put(be, s->from, b->from, ((size_t) b->n + 1) * sizeof *b->from);
    kne_device_put(be, s->place, b->place, (size_t) b->n_place * sizeof *b->place);
    kne_device_put(be, s->first, b->first, (size_t) b->n * sizeof *b->first);
}

void
kne_batch_put(kne_backend *be, kne_work *w, kne_batch *b)
{
    put_batch(be, w->impl, b);
    b->there = true;
}

kne_status
kne_forward_cached(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
                   const kne_overlay *ov, const float *const *alpha, int32_t first_layer,
                   int32_t past, kne_err *err)
{
    kne_pass p = {
        .m = m, .be = be, .w = w, .s = w->impl, .b = b, .ov = ov, .alpha = alpha, .past = past,
    };

    KNE_TRY(kne_graph_check(&p, err));
    if (first_layer < 0 || first_layer >= m->arch.n_layers || (first_layer > 0 && !w->keep))
        return kne_error(err, KNE_ERR_INTERNAL, "cannot start at layer %d", first_layer);
    if (!b->there)
        put_batch(be, p.s, b);
    if (first_layer == 0)
        be->embed(be->ctx, w->layer[0].x_in, &m->embed, m->pos_embed.data ? &m->pos_embed : NULL,
                  p.s->id, p.s->pos, b->n);
    for (int32_t l = first_layer; l < m->arch.n_layers; l++)
        layer_forward(&p, l);
    head_forward(&p);
    return be->status(be->ctx, err);
}

kne_status
kne_forward(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
            const kne_overlay *ov, const float *const *alpha, int32_t first_layer, kne_err *err)
{
    return kne_forward_cached(m, be, w, b, ov, alpha, first_layer, 0, err);
}
