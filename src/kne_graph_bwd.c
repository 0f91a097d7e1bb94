/*
 * kne_graph_bwd.c - the backward pass: gradients of the activations only, from
 * w->dlogits down to the FFN of last_layer, where it stops.
 *
 * No weight has a gradient here; the visitor forms those it wants from what it
 * is shown of each FFN. Mirrors kne_graph.c step by step.
 */
#include "kne_graph_impl.h"

/* dx += the norm's input gradient */
static void
norm_bwd(const kne_pass *p, float *dx, const float *dy, const float *x, const float *mean,
         const float *rstd, const float *w, int64_t n)
{
    const kne_arch *a = &p->m->arch;

    if (a->norm == KNE_RMSNORM)
        p->be->rmsnorm_bwd(p->be->ctx, dx, dy, x, rstd, w, n, a->d_model);
    else
        p->be->layernorm_bwd(p->be->ctx, dx, dy, x, mean, rstd, w, n, a->d_model);
}

static void
linear_bwd(const kne_pass *p, float *dx, const float *dy, const kne_mat *w, int64_t n_in,
           int64_t n_out, float beta)
{
    p->be->linear_bwd(p->be->ctx, dx, n_in, dy, n_out, w, p->b->n, beta);
}

/* Rows without a loss start from a zero gradient. */
static void
head_bwd(const kne_pass *p)
{
    const kne_model     *m = p->m;
    const kne_work_impl *s = p->s;
    const kne_batch     *b = p->b;
    int64_t              d = m->arch.d_model;

    kne_graph_zero(p, s->dx, b->n * d);
    if (b->n_out == 0)
        return;
    p->be->linear_bwd(p->be->ctx, s->final_h, d, p->w->dlogits, m->arch.vocab_size, &m->head,
                      b->n_out, 0.0f);
    kne_graph_zero(p, s->final_dx, b->n_out * d);
    norm_bwd(p, s->final_dx, s->final_h, s->final_x, s->final_mean, s->final_rstd, m->final_norm_w,
             b->n_out);
    p->be->scatter_rows(p->be->ctx, s->dx, s->final_dx, s->out_row, b->n_out, d);
}

/*
 * Route the gradient of edited keys through their effective rows; *beta tells
 * whether dh holds anything yet. Their columns of dy are zero afterwards, so that
 * the base's rows add nothing.
 */
static void
edited_keys_bwd(const kne_pass *p, const kne_overlay_layer *e, float *dh, float *dy,
                const float *key, float *beta)
{
    int64_t n = p->b->n, d = p->m->arch.d_model, f = p->m->arch.d_ff;
    kne_mat rows = kne_graph_rows(key, e->n, d, false);

    p->be->gather_cols(p->be->ctx, p->s->edit, dy, f, e->neuron, n, e->n);
    linear_bwd(p, dh, p->s->edit, &rows, d, e->n, *beta);
    *beta = 1.0f;
    kne_graph_zero(p, p->s->edit, n * e->n);
    p->be->scatter_cols(p->be->ctx, dy, f, p->s->edit, e->neuron, n, e->n, false);
}

/* dx, the gradient at the FFN's output, -> dh2, that at its input; the visitor in between. */
static void
ffn_bwd(const kne_pass *p, int32_t l, kne_ffn_visitor visit, void *visit_ctx, bool want_dh)
{
    const kne_arch          *a = &p->m->arch;
    const kne_layer         *t = &p->m->layer[l];
    const kne_saved         *v = &p->w->layer[l];
    const kne_work_impl     *s = p->s;
    const kne_overlay_layer *e = kne_graph_edits(p, l);
    const float             *alpha = kne_graph_alpha(p, l);
    int64_t                  n = p->b->n, d = a->d_model, f = a->d_ff;
    float                    beta = 0.0f;

    linear_bwd(p, s->u, s->dx, &t->down, f, d, 0.0f);
    if (e && e->value_diff)
    {
        kne_mat rows = kne_graph_rows(e->value_diff, e->n, d, true);

        linear_bwd(p, s->edit, s->dx, &rows, e->n, d, 0.0f);
        p->be->scatter_cols(p->be->ctx, s->u, f, s->edit, e->neuron, n, e->n, true);
    }
    /* The activation's backward is linear in da = alpha u, so the factor can follow it. */
    p->be->act_bwd(p->be->ctx, s->dgate, s->dup, s->u, v->gate, v->up, a->act, n, f);
    if (alpha && a->gated)
        p->be->scale_rows(p->be->ctx, s->dgate, alpha, n, f);
    if (alpha)
        p->be->scale_rows(p->be->ctx, s->dup, alpha, n, f);

    if (visit)
    {
        kne_ffn_grad g = {
            .layer = l, .n = p->b->n, .h = v->h2, .a = v->a, .dy = s->dx, .u = s->u,
            .dgate = s->dgate, .dup = s->dup,
        };

        visit(visit_ctx, &g);
    }
    if (!want_dh)
        return;
    if (e && e->gate && a->gated)
        edited_keys_bwd(p, e, s->dh2, s->dgate, e->gate, &beta);
    if (e && e->up)
        edited_keys_bwd(p, e, s->dh2, s->dup, e->up, &beta);
    if (a->gated)
    {
        linear_bwd(p, s->dh2, s->dgate, &t->gate, d, f, beta);
        beta = 1.0f;
    }
    linear_bwd(p, s->dh2, s->dup, &t->up, d, f, beta);
}

/* Back through RoPE and the norm over heads; returns where the gradient before both is. */
static float *
head_norm_bwd(const kne_pass *p, float *dx, float *dx_raw, const float *raw, const float *rstd,
              const float *norm_w, int32_t n_heads)
{
    const kne_model *m = p->m;
    const kne_arch  *a = &m->arch;
    int64_t          n = p->b->n;

    if (a->position != KNE_POS_LEARNED)
        p->be->rope(p->be->ctx, dx, (int64_t) n_heads * a->head_dim, m->rope_cos, m->rope_sin,
                    p->s->pos, n, n_heads, a->head_dim, a->rotary_dim,
                    a->position == KNE_POS_ROPE_INTERLEAVED, -1.0f);
    if (!a->qk_norm)
        return dx;
    kne_graph_zero(p, dx_raw, n * n_heads * a->head_dim);
    p->be->rmsnorm_bwd(p->be->ctx, dx_raw, dx, raw, rstd, norm_w, n * n_heads, a->head_dim);
    return dx_raw;
}

/* A row's output was used once: its gradient goes in at its first place. What comes out at all its places is summed. */
static void
shared_attention_bwd(const kne_pass *p, const kne_saved *v, const kne_attn_shape *shape)
{
    const kne_arch      *a = &p->m->arch;
    const kne_work_impl *s = p->s;
    kne_backend         *be = p->be;
    float *const        *wide = s->wide;
    int64_t              n = p->b->n, nq = (int64_t) a->n_heads * a->head_dim, nkv = (int64_t) a->n_kv_heads * a->head_dim;

    kne_graph_widen(p, wide[WIDE_Q], v->q, nq);
    kne_graph_widen(p, wide[WIDE_K], v->k, nkv);
    kne_graph_widen(p, wide[WIDE_V], v->v, nkv);
    kne_graph_widen(p, wide[WIDE_O], v->attn, nq);
    kne_graph_widen(p, s->wide_lse, v->lse, a->n_heads);
    kne_graph_zero(p, wide[WIDE_DO], p->b->n_place * nq);
    be->scatter_rows(be->ctx, wide[WIDE_DO], s->dattn, s->first, n, nq);
    be->attention_bwd(be->ctx, wide[WIDE_DQ], wide[WIDE_DK], wide[WIDE_DV], wide[WIDE_DO], wide[WIDE_O], s->wide_lse,
                      wide[WIDE_Q], wide[WIDE_K], wide[WIDE_V], shape);
    be->fold_rows(be->ctx, s->dq, wide[WIDE_DQ], s->from, s->place, n, nq);
    be->fold_rows(be->ctx, s->dk, wide[WIDE_DK], s->from, s->place, n, nkv);
    be->fold_rows(be->ctx, s->dv, wide[WIDE_DV], s->from, s->place, n, nkv);
}

/* dx, the gradient at attention's output, -> dh1 = beta dh1 + that at its input. */
static void
attention_bwd(const kne_pass *p, int32_t l, float beta)
{
    const kne_arch      *a = &p->m->arch;
    const kne_layer     *t = &p->m->layer[l];
    const kne_saved     *v = &p->w->layer[l];
    const kne_work_impl *s = p->s;
    kne_attn_shape       shape = kne_graph_attn_shape(p);
    int64_t              n = p->b->n, d = a->d_model;
    int64_t              nq = (int64_t) a->n_heads * a->head_dim;
    int64_t              nkv = (int64_t) a->n_kv_heads * a->head_dim;

    linear_bwd(p, s->dattn, s->dx, &t->o, nq, d, 0.0f);
    if (p->b->n_place)
        shared_attention_bwd(p, v, &shape);
    else
        p->be->attention_bwd(p->be->ctx, s->dq, s->dk, s->dv, s->dattn, v->attn, v->lse, v->q, v->k, v->v, &shape);
    float *dq = head_norm_bwd(p, s->dq, s->dq_raw, v->q_raw, v->q_rstd, t->q_norm, a->n_heads);
    float *dk = head_norm_bwd(p, s->dk, s->dk_raw, v->k_raw, v->k_rstd, t->k_norm, a->n_kv_heads);

    if (a->qkv != KNE_QKV_PER_HEAD)
    {
        linear_bwd(p, s->dh1, dq, &t->q, d, nq, beta);
        linear_bwd(p, s->dh1, dk, &t->k, d, nkv, 1.0f);
        linear_bwd(p, s->dh1, s->dv, &t->v, d, nkv, 1.0f);
        return;
    }
    const float *part[3] = {dq, dk, s->dv};

    for (int i = 0; i < 3; i++)
        p->be->scatter_cols(p->be->ctx, s->qkv, 3 * nq, part[i], s->split[i], n, nq, false);
    linear_bwd(p, s->dh1, s->qkv, &t->q, d, 3 * nq, beta);
}

kne_status
kne_backward(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
             const kne_overlay *ov, const float *const *alpha, int32_t last_layer,
             kne_ffn_visitor visit, void *visit_ctx, kne_err *err)
{
    kne_work_impl *s = w->impl;
    kne_pass       p = {.m = m, .be = be, .w = w, .s = s, .b = b, .ov = ov, .alpha = alpha};
    kne_block_kind block = m->arch.block;
    int64_t        n = b->n;

    if (!w->keep)
        return kne_error(err, KNE_ERR_INTERNAL,
                         "a backward pass needs a workspace that keeps layers");
    KNE_TRY(kne_graph_check(&p, err));
    if (last_layer < 0 || last_layer >= m->arch.n_layers)
        return kne_error(err, KNE_ERR_INTERNAL, "cannot stop at layer %d", last_layer);

    head_bwd(&p);
    for (int32_t l = m->arch.n_layers - 1; l >= last_layer; l--)
    {
        const kne_layer *t = &m->layer[l];
        const kne_saved *v = &w->layer[l];

        ffn_bwd(&p, l, visit, visit_ctx, l > last_layer);
        if (l == last_layer)
            break;
        /* In a parallel block both branches start from dx as it came: add to it after both. */
        if (block == KNE_BLOCK_SEQUENTIAL)
            norm_bwd(&p, s->dx, s->dh2, v->x_mid, v->mean2, v->rstd2, t->norm2_w, n);
        attention_bwd(&p, l, block == KNE_BLOCK_PARALLEL_ONE_NORM ? 1.0f : 0.0f);
        if (block == KNE_BLOCK_PARALLEL_TWO_NORMS)
            norm_bwd(&p, s->dx, s->dh2, v->x_in, v->mean2, v->rstd2, t->norm2_w, n);
        norm_bwd(&p, s->dx, s->dh1, v->x_in, v->mean1, v->rstd1, t->norm1_w, n);
    }
    return be->status(be->ctx, err);
}
