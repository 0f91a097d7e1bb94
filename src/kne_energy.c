/*
 * kne_energy.c - see kne_energy.h. With R rows A of known activations, C = A^T A / R + r I and
 *     C^-1 a = (a - A^T (A A^T / R + r I)^-1 A a / R) / r,
 * and since G = a^T dy over the T tokens of an edit, energy(k) = z_k^T (dy dy^T) a_k with z = C^-1 a^T.
 */
#include "kne_energy.h"
#include "kne_device.h"
#include "kne_metric.h"
#include "kne_pack.h"

#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 512

typedef struct energy_pass
{
    const kne_model         *m;
    kne_backend             *be;
    const kne_ref *const    *ref;
    int32_t                  n_ref, n_rows; /* R */
    double                   ridge;
    kne_pack                 pack;
    kne_work                *work;
    const kne_energy_of     *of; /* of the pass */
    int32_t                  n_of;
    const int32_t           *row0; /* (n_of + 1) their rows in the pass */
    double                 **chol; /* (L) each (R, R), made when first needed */
    double                  *ridge_at; /* (L) r */
    float                   *known, *known_t; /* (R, f), (f, R) */
    float                   *a, *a_t, *dy, *z, *b; /* (rows, f), (f, rows), (rows, d), (f, rows), (R, rows) */
    double                  *k, *column; /* (rows, rows), (R, KNE_METRIC_COLUMNS) */
    float                   *dev_known, *dev_known_t, *dev_a_t, *dev_z, *dev_b; /* the same on the device */
} energy_pass;

/* R rows of layer l, evenly spread over the activations of all facts, and their transpose. */
static void
gather_known(energy_pass *p, int32_t l)
{
    const int32_t f = p->m->arch.d_ff, R = p->n_rows;
    int64_t       all = 0, seen = 0;
    int32_t       at = 0;

    for (int32_t i = 0; i < p->n_ref; i++)
        all += p->ref[i]->n_rows;
    for (int32_t i = 0; i < p->n_ref; i++)
        for (int32_t t = 0; t < p->ref[i]->n_rows; t++, seen++)
            if (at < R && seen * R / all >= at)
                memcpy(p->known + (size_t) at++ * (size_t) f,
                       p->ref[i]->a + ((size_t) l * (size_t) p->ref[i]->n_rows + (size_t) t) * (size_t) f,
                       (size_t) f * sizeof(float));
    for (int32_t k = 0; k < f; k++)
        for (int32_t r = 0; r < R; r++)
            p->known_t[(size_t) k * (size_t) R + (size_t) r] = p->known[(size_t) r * (size_t) f + (size_t) k];
    kne_device_put(p->be, p->dev_known, p->known, (size_t) R * (size_t) f * sizeof(float));
    kne_device_put(p->be, p->dev_known_t, p->known_t, (size_t) R * (size_t) f * sizeof(float));
}

/* The factor of A A^T / R + r I. b is scratch: (R, R) fits. */
static void
factor(energy_pass *p, int32_t l)
{
    const int32_t R = p->n_rows, f = p->m->arch.d_ff;
    double       *c = p->chol[l], trace = 0;

    p->be->matmul_tn(p->be->ctx, p->dev_b, R, p->dev_known_t, R, p->dev_known_t, R, R, R, f, 0);
    p->be->get(p->be->ctx, p->b, p->dev_b, (size_t) R * (size_t) R * sizeof(float));
    for (int32_t i = 0; i < R; i++)
        trace += p->b[(size_t) i * (size_t) R + (size_t) i];
    p->ridge_at[l] = trace > 0 ? p->ridge * trace / R / f : 1;
    for (int32_t i = 0; i < R; i++)
    {
        for (int32_t j = 0; j <= i; j++)
            c[(size_t) i * (size_t) R + (size_t) j] = p->b[(size_t) i * (size_t) R + (size_t) j] / (double) R;
        c[(size_t) i * (size_t) R + (size_t) i] += p->ridge_at[l];
    }
    kne_metric_cholesky(c, R);
}

static void
visit(void *ctx, const kne_ffn_grad *g)
{
    energy_pass  *p = ctx;
    const int32_t f = p->m->arch.d_ff, d = p->m->arch.d_model, T = g->n, R = p->n_rows;
    const size_t  wide = (size_t) f * (size_t) T * sizeof(float);
    float        *z = p->a_t;

    p->be->get(p->be->ctx, p->a, g->a, wide);
    p->be->get(p->be->ctx, p->dy, g->dy, (size_t) T * (size_t) d * sizeof(float));
    for (int32_t k = 0; k < f; k++)
        for (int32_t t = 0; t < T; t++)
            p->a_t[(size_t) k * (size_t) T + (size_t) t] = p->a[(size_t) t * (size_t) f + (size_t) k];
    if (R)
    {
        bool made = p->ridge_at[g->layer] > 0;

        gather_known(p, g->layer);
        if (!made)
            factor(p, g->layer);
        kne_device_put(p->be, p->dev_a_t, p->a_t, wide);
        p->be->matmul_tn(p->be->ctx, p->dev_b, T, p->dev_known_t, R, p->dev_a_t, T, R, T, f, 0);
        p->be->get(p->be->ctx, p->b, p->dev_b, (size_t) R * (size_t) T * sizeof(float));
        kne_metric_solve(p->chol[g->layer], R, p->b, p->b, T, p->column);
        kne_device_put(p->be, p->dev_b, p->b, (size_t) R * (size_t) T * sizeof(float));
        p->be->matmul_tn(p->be->ctx, p->dev_z, T, p->dev_known, f, p->dev_b, T, f, T, R, 0);
        p->be->get(p->be->ctx, p->z, p->dev_z, wide);
        z = p->z;
        for (size_t i = 0; i < (size_t) f * (size_t) T; i++)
            z[i] = (float) ((p->a_t[i] - (double) z[i] / R) / p->ridge_at[g->layer]);
    }
    for (int32_t e = 0; e < p->n_of; e++)
    {
        const int32_t r0 = p->row0[e], n = p->row0[e + 1] - r0;
        float        *score = p->of[e].score + (size_t) g->layer * (size_t) f;

        for (int32_t i = 0; i < n; i++)
            for (int32_t j = 0; j <= i; j++)
            {
                const float *x = p->dy + (size_t) (r0 + i) * (size_t) d, *y = p->dy + (size_t) (r0 + j) * (size_t) d;
                double       sum = 0;

                for (int32_t c = 0; c < d; c++)
                    sum += (double) x[c] * y[c];
                p->k[i * n + j] = p->k[j * n + i] = sum;
            }
        for (int32_t k = 0; k < f; k++)
        {
            const float *zk = z + (size_t) k * (size_t) T + (size_t) r0, *ak = p->a_t + (size_t) k * (size_t) T + (size_t) r0;
            double       sum = 0;

            for (int32_t i = 0; i < n; i++)
            {
                double row = 0;

                for (int32_t j = 0; j < n; j++)
                    row += p->k[i * n + j] * ak[j];
                sum += row * zk[i];
            }
            score[k] = (float) sum;
        }
    }
}

static kne_status
flush(energy_pass *p, const kne_view *view, float *coef, kne_err *err)
{
    const int32_t      n_out = p->pack.b.n_out, V = p->m->arch.vocab_size;
    const kne_overlay *ov = view ? &view->overlay : NULL;

    KNE_TRY(kne_forward(p->m, p->be, p->work, &p->pack.b, ov, NULL, 0, err));
    for (int32_t i = 0; i < n_out; i++)
        coef[i] = 1;
    kne_work_logprob(p->be, p->work, 0, n_out, V, p->pack.target, coef, NULL, NULL);
    KNE_TRY(kne_backward(p->m, p->be, p->work, &p->pack.b, ov, NULL, 0, visit, p, err));
    return p->be->status(p->be->ctx, err);
}

static int32_t
rows_of(const kne_energy_of *of)
{
    int32_t n = 0;

    for (int32_t i = 0; i < of->n_prompts; i++)
        n += of->prompt[i].n - 1;
    return n;
}

kne_status
kne_energy(const kne_model *m, kne_backend *be, const kne_view *view, const kne_ref *const *ref, int32_t n_ref,
           double ridge, const kne_energy_of *of, int32_t n, const kne_job_calls *calls, kne_err *err)
{
    const int32_t L = m->arch.n_layers, f = m->arch.d_ff, d = m->arch.d_model;
    energy_pass   p = {.m = m, .be = be, .ref = ref, .n_ref = n_ref, .ridge = ridge};
    kne_arena     arena = {0}, dev = {0};
    float        *coef = NULL;
    int32_t      *row0 = NULL, rows = 1, most = 1, total = 0;
    int64_t       all = 0;
    kne_status    st = KNE_OK;

    for (int32_t i = 0; i < n_ref; i++)
        all += ref[i]->n_rows;
    p.n_rows = all < KNE_ENERGY_ROWS ? (int32_t) all : KNE_ENERGY_ROWS;
    for (int32_t i = 0; i < n; i++)
    {
        most = rows_of(&of[i]) > most ? rows_of(&of[i]) : most;
        total += rows_of(&of[i]);
    }
    rows = most > PASS_ROWS ? most : total < PASS_ROWS ? total : PASS_ROWS;
    rows = rows > 0 ? rows : 1;
    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        size_t R = (size_t) p.n_rows, wide = (size_t) (rows > p.n_rows ? rows : p.n_rows);

        kne_pack_layout(&p.pack, &arena, rows, rows, rows);
        coef = kne_arena_take(&arena, (size_t) rows, sizeof *coef);
        row0 = kne_arena_take(&arena, (size_t) n + 1, sizeof *row0);
        p.chol = kne_arena_take(&arena, (size_t) L, sizeof *p.chol);
        p.ridge_at = kne_arena_take(&arena, (size_t) L, sizeof *p.ridge_at);
        for (int32_t l = 0; l < L; l++)
        {
            double *c = kne_arena_take(&arena, R * R, sizeof *c);

            if (p.chol)
                p.chol[l] = c;
        }
        p.known = kne_arena_take(&arena, R * (size_t) f, sizeof *p.known);
        p.known_t = kne_arena_take(&arena, R * (size_t) f, sizeof *p.known_t);
        p.a = kne_arena_take(&arena, (size_t) f * (size_t) rows, sizeof *p.a);
        p.dy = kne_arena_take(&arena, (size_t) d * (size_t) rows, sizeof *p.dy);
        p.a_t = kne_arena_take(&arena, (size_t) f * (size_t) rows, sizeof *p.a_t);
        p.z = kne_arena_take(&arena, (size_t) f * (size_t) rows, sizeof *p.z);
        p.b = kne_arena_take(&arena, R * wide, sizeof *p.b);
        p.k = kne_arena_take(&arena, (size_t) most * (size_t) most, sizeof *p.k);
        p.column = kne_arena_take(&arena, R * KNE_METRIC_COLUMNS, sizeof *p.column);
        p.dev_known = kne_arena_take(&dev, R * (size_t) f, sizeof *p.dev_known);
        p.dev_known_t = kne_arena_take(&dev, R * (size_t) f, sizeof *p.dev_known_t);
        p.dev_a_t = kne_arena_take(&dev, (size_t) f * (size_t) rows, sizeof *p.dev_a_t);
        p.dev_z = kne_arena_take(&dev, (size_t) f * (size_t) rows, sizeof *p.dev_z);
        p.dev_b = kne_arena_take(&dev, R * wide, sizeof *p.dev_b);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
        if (turn == 0 && st == KNE_OK)
            st = kne_device_commit(&dev, be, err);
    }
    if (st == KNE_OK)
        st = kne_work_new(m, (kne_work_shape) {rows, rows, view ? view->max_overlay : 0, true}, &p.work, err);
    p.row0 = row0;
    for (int32_t i = 0; i < n && st == KNE_OK; i += p.n_of)
    {
        kne_pack_clear(&p.pack);
        p.of = of + i;
        for (p.n_of = 0; i + p.n_of < n && p.pack.b.n + rows_of(&of[i + p.n_of]) <= rows; p.n_of++)
        {
            row0[p.n_of] = p.pack.b.n;
            for (int32_t k = 0; k < of[i + p.n_of].n_prompts; k++)
                kne_pack_add(&p.pack, of[i + p.n_of].prompt[k].id, of[i + p.n_of].prompt[k].n, of[i + p.n_of].prompt[k].n_prompt);
        }
        row0[p.n_of] = p.pack.b.n;
        if (calls && calls->yield && calls->yield(calls->ctx))
            st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
        else
            st = flush(&p, view, coef, err);
    }
    kne_work_free(p.work);
    kne_arena_free(&arena);
    kne_device_free(&dev, be);
    return st;
}
