/*
 * kne_attrib.c - gradient attribution (see kne_attrib.h).
 *
 * Each (object token, point, scaled layer) is one sequence of a packed batch whose last row predicts the token: (alpha W) a =
 * alpha (W a), so a point is no more than a factor on the FFN's output rows. With y = alpha sum_k a_k v_k,
 * <v_k, d score / d (alpha v_k)> = sum over rows of a_k <v_k, dy> = sum over rows of a_k u_k, and
 * u = dy W_down is what backward computes anyway: attribution costs one multiply-add a neuron and row.
 */
#include "kne_attrib.h"
#include "kne_device.h"
#include "kne_pack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 512

void
kne_quadrature_points(kne_quadrature rule, int n, double *node, double *weight)
{
    for (int i = 0; i < n; i++)
    {
        if (n == 1 || rule == KNE_QUAD_MIDPOINT)
        {
            node[i] = n == 1 ? 1 : (i + 0.5) / n;
            weight[i] = 1.0 / n;
            continue;
        }
        /* Gauss-Legendre: Newton on P_n from the usual guess (Abramowitz and Stegun 25.4.29) */
        double x = cos(M_PI * (i + 0.75) / (n + 0.5)), slope = 1;
        for (int it = 0; it < 100; it++)
        {
            double p0 = 1, p1 = x;

            for (int k = 2; k <= n; k++)
            {
                double p2 = ((2 * k - 1) * x * p1 - (k - 1) * p0) / k;

                p0 = p1;
                p1 = p2;
            }
            slope = n * (x * p1 - p0) / (x * x - 1);
            double dx = p1 / slope;
            x -= dx;
            if (fabs(dx) < 1e-15)
                break;
        }
        node[i] = (1 - x) / 2; /* cos runs down from 1: nodes ascend */
        weight[i] = 1 / ((1 - x * x) * slope * slope);
    }
}

/* One sequence of a pass. */
typedef struct point
{
    float  *score;  /* (L, f) of the device: what it adds to */
    int32_t layer;  /* the one scaled, -1: all */
    float   alpha, weight;
} point;

typedef struct pass
{
    const kne_model *m;
    kne_backend     *be;
    kne_pack         pack;
    point           *point;   /* (max_seq) */
    float           *alpha, *weight; /* (L, max_n), (max_n) */
    float           *logp, *coef;
    /* of the device */
    float           *dev_alpha, *dev_weight;
    const float    **alpha_at; /* (L) into dev_alpha */
    kne_work        *work;
} pass;

static void
visit(void *ctx, const kne_ffn_grad *g)
{
    const pass   *p = ctx;
    const int32_t f = p->m->arch.d_ff;

    for (int32_t i = 0; i < p->pack.b.n_seq; i++)
    {
        const kne_seq *s = &p->pack.seq[i];
        const point   *pt = &p->point[i];

        if (pt->layer >= 0 && pt->layer != g->layer)
            continue;
        p->be->score(p->be->ctx, pt->score + (size_t) g->layer * f, g->a + (size_t) s->q0 * f, g->u + (size_t) s->q0 * f,
                     p->dev_weight + s->q0, s->q_len, f);
    }
}

/* Run what is packed; the last row of each sequence predicts its token. */
static kne_status
flush(pass *p, const kne_view *view, const kne_options *opt, kne_err *err)
{
    const int32_t      L = p->m->arch.n_layers, V = p->m->arch.vocab_size, n_out = p->pack.b.n_out;
    const kne_overlay *ov = view ? &view->overlay : NULL;
    const float *const *alpha = opt->points > 1 ? p->alpha_at : NULL;

    for (int32_t i = 0; i < p->pack.b.n_seq; i++)
    {
        const kne_seq *s = &p->pack.seq[i];
        const point   *pt = &p->point[i];

        for (int32_t r = s->q0; r < s->q0 + s->q_len; r++)
        {
            p->weight[r] = pt->weight;
            for (int32_t l = 0; alpha && l < L; l++)
                p->alpha[(size_t) l * p->pack.max_n + r] = pt->layer < 0 || pt->layer == l ? pt->alpha : 1;
        }
    }
    kne_device_put(p->be, p->dev_weight, p->weight, (size_t) p->pack.b.n * sizeof *p->weight);
    if (alpha)
        kne_device_put(p->be, p->dev_alpha, p->alpha, (size_t) L * (size_t) p->pack.max_n * sizeof *p->alpha);
    KNE_TRY(kne_forward(p->m, p->be, p->work, &p->pack.b, ov, alpha, 0, err));

    for (int32_t i = 0; i < n_out; i++)
        p->coef[i] = 1;
    if (opt->score == KNE_SCORE_P) /* dP = P d log P */
    {
        kne_work_logprob(p->be, p->work, 0, n_out, V, p->pack.target, NULL, p->logp, NULL);
        for (int32_t i = 0; i < n_out; i++)
            p->coef[i] = expf(p->logp[i]);
    }
    kne_work_logprob(p->be, p->work, 0, n_out, V, p->pack.target, p->coef, NULL, NULL);
    KNE_TRY(kne_backward(p->m, p->be, p->work, &p->pack.b, ov, alpha, opt->layer_min, visit, p, err));
    kne_pack_clear(&p->pack);
    return p->be->status(p->be->ctx, err);
}

kne_status
kne_attribute(const kne_model *m, kne_backend *be, const kne_view *view, const kne_options *opt,
              const kne_tokens *fact, int32_t n_facts, float *const *score, const kne_job_calls *calls,
              kne_err *err)
{
    const int32_t L = m->arch.n_layers;
    const bool    by_layer = opt->path == KNE_PATH_LAYER && opt->points > 1;
    /* one layer at a time: those whose scores are wanted */
    const int32_t low = by_layer ? opt->layer_min : -1;
    const int32_t last = opt->layer_max >= 0 && opt->layer_max < L ? opt->layer_max : L - 1;
    const int32_t high = by_layer ? last : -1;
    const int     turns = opt->points * (high - low + 1);
    double        node[64], weight[64];
    pass          p = {.m = m, .be = be};
    kne_arena     arena = {0}, dev = {0};
    int64_t       total = 0, done = 0;
    const int32_t most = kne_pass_rows(m, PASS_ROWS);
    int32_t       rows = 1, k = 0;
    kne_status    st = KNE_OK;

    kne_quadrature_points((kne_quadrature) opt->quadrature, opt->points, node, weight);
    for (int32_t i = 0; i < n_facts; i++)
    {
        int32_t s = fact[i].n - fact[i].n_prompt;

        rows = fact[i].n > rows ? fact[i].n : rows;
        total += (int64_t) s * turns;
    }
    if (total == 0)
        return KNE_OK;
    /* no more than is needed, no more than one pass should take */
    int64_t need = total * rows;
    rows = rows > most ? rows : need < most ? (int32_t) need : most;

    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        kne_pack_layout(&p.pack, &arena, rows, rows, rows);
        p.point = kne_arena_take(&arena, (size_t) rows, sizeof *p.point);
        p.alpha = kne_arena_take(&arena, (size_t) L * (size_t) rows, sizeof *p.alpha);
        p.alpha_at = kne_arena_take(&arena, (size_t) L, sizeof *p.alpha_at);
        p.weight = kne_arena_take(&arena, (size_t) rows, sizeof *p.weight);
        p.dev_alpha = kne_arena_take(&dev, (size_t) L * (size_t) rows, sizeof *p.dev_alpha);
        p.dev_weight = kne_arena_take(&dev, (size_t) rows, sizeof *p.dev_weight);
        p.logp = kne_arena_take(&arena, (size_t) rows, sizeof *p.logp);
        p.coef = kne_arena_take(&arena, (size_t) rows, sizeof *p.coef);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
        if (turn == 0 && st == KNE_OK)
            st = kne_device_commit(&dev, be, err);
    }
    if (st == KNE_OK)
        st = kne_work_new(m, (kne_work_shape) {rows, rows, view ? view->max_overlay : 0, true}, &p.work, err);
    for (int32_t l = 0; l < L && st == KNE_OK; l++)
        p.alpha_at[l] = p.dev_alpha + (size_t) l * (size_t) rows;

    for (int32_t i = 0; i < n_facts && st == KNE_OK; i++)
        for (int32_t j = fact[i].n_prompt; j < fact[i].n && st == KNE_OK; j++, k++)
            for (int32_t pt = 0; pt < turns && st == KNE_OK; pt++)
            {
                const int q = pt % opt->points;

                if (!kne_pack_fits(&p.pack, j + 1, j))
                {
                    if (calls && calls->progress)
                        calls->progress(calls->ctx, KNE_PHASE_ATTRIBUTE, (int) done, (int) total, 0, 0);
                    if (calls && calls->yield && calls->yield(calls->ctx))
                        st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
                    else
                        st = flush(&p, view, opt, err);
                    if (st != KNE_OK)
                        break;
                }
                p.point[p.pack.b.n_seq] = (point) {score[k], low + pt / opt->points,
                                                   (float) node[q], (float) weight[q]};
                kne_pack_add(&p.pack, fact[i].id, j + 1, j);
                done++;
            }
    if (st == KNE_OK && p.pack.b.n_seq)
        st = flush(&p, view, opt, err);
    kne_work_free(p.work);
    kne_device_free(&dev, be);
    kne_arena_free(&arena);
    return st;
}

int32_t
kne_ensemble_size(const kne_arch *arch, const kne_options *opt)
{
    return kne_options_neurons(opt, arch->n_layers, arch->d_model, arch->d_ff, arch->gated);
}
