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
#define SCORE_BYTES ((size_t) 256 << 20) /* of the energies of one pass */

/* What depends on the known facts and the ridge alone: A and the metric of every layer. */
struct kne_energy_known
{
    uint64_t          key;
    kne_backend      *be;
    int32_t           n_rows;   /* R */
    double           *ridge_at; /* (L) r, of the host */
    kne_arena         run, dev;
    float            *a;        /* (L, R, f) */
    double           *m;        /* (L, R, R) of A A^T / R + r I */
    float            *gram;     /* (R, R) scratch */
    float            *minus;    /* (R) -1 / R */
    kne_metric_block *block;    /* (L) */
};

typedef struct energy_pass
{
    const kne_model               *m;
    kne_backend                   *be;
    const struct kne_energy_known *known; /* NULL: C = I */
    const kne_energy_of           *of;    /* (n_of) of this pass */
    kne_pack                       pack;
    kne_work                      *work;
    int32_t                        n_of, *row0; /* row0 (n_of + 1) */
    double                        *column;      /* (R, KNE_METRIC_COLUMNS) */
    /* of the device */
    int32_t                       *dev_row0, *index; /* index (n_of, n_top) */
    float                         *b, *x, *z, *k; /* (R, rows), (R, rows), (rows, f), (rows, rows) */
    float                         *score;         /* (n_of, L, f) */
    float                         *ones;          /* (rows) */
    uint64_t                      *keys;          /* (n_of, n_top) */
} energy_pass;

static kne_mat
rows_of_f32(const float *x, int64_t rows, int64_t cols)
{
    return (kne_mat) {.data = x, .type = KNE_F32, .rows = rows, .cols = cols, .ld = cols};
}

/* ---- known facts ---- */

void
kne_energy_known_free(struct kne_energy_known *k)
{
    if (!k)
        return;
    kne_device_free(&k->dev, k->be);
    kne_arena_free(&k->run);
    free(k);
}

/* out (R, f): R rows of layer l, evenly spread over the activations of all facts. Returns the sum of their squares. */
static double
gather_known(float *out, const kne_ref *const *ref, int32_t n_ref, int32_t l, int32_t f, int32_t R)
{
    const int64_t all = kne_metric_rows(ref, n_ref);
    int64_t       seen = 0;
    int32_t       at = 0;
    double        sum = 0;

    for (int32_t i = 0; i < n_ref; i++)
        for (int32_t t = 0; t < ref[i]->n_rows; t++, seen++)
            if (at < R && seen * R / all >= at)
                memcpy(out + (size_t) at++ * (size_t) f, ref[i]->a + ((size_t) l * (size_t) ref[i]->n_rows + (size_t) t) * (size_t) f,
                       (size_t) f * sizeof *out);
    for (size_t i = 0; i < (size_t) R * (size_t) f; i++)
        sum += (double) out[i] * out[i]; /* NOLINT(clang-analyzer-core.UndefinedBinaryOperatorResult): all R are set, there are not fewer rows */
    return sum;
}

static void
known_layout(struct kne_energy_known *k, size_t L, size_t R, size_t f)
{
    k->ridge_at = kne_arena_take(&k->run, L, sizeof *k->ridge_at);
    k->a = kne_arena_take(&k->dev, L * R, f * sizeof *k->a);
    k->m = kne_arena_take(&k->dev, L * R, R * sizeof *k->m);
    k->gram = kne_arena_take(&k->dev, R, R * sizeof *k->gram);
    k->minus = kne_arena_take(&k->dev, R, sizeof *k->minus);
    k->block = kne_arena_take(&k->dev, L, sizeof *k->block);
}

static kne_status
known_new(const kne_model *m, kne_backend *be, const kne_ref *const *ref, int32_t n_ref, double ridge, uint64_t key,
          struct kne_energy_known **out, kne_err *err)
{
    const int32_t            L = m->arch.n_layers, f = m->arch.d_ff;
    const int64_t            all = kne_metric_rows(ref, n_ref);
    const int32_t            R = all < KNE_ENERGY_ROWS ? (int32_t) all : KNE_ENERGY_ROWS;
    struct kne_energy_known *k = calloc(1, sizeof *k);
    float                   *rows = malloc((size_t) R * (size_t) f * sizeof *rows), minus[KNE_ENERGY_ROWS];
    kne_status               st = k && rows ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        known_layout(k, (size_t) L, (size_t) R, (size_t) f);
        if (turn == 0)
            st = kne_arena_commit(&k->run, err);
        if (turn == 0 && st == KNE_OK)
            st = kne_device_commit(&k->dev, k->be = be, err);
    }
    for (int32_t r = 0; r < R; r++)
        minus[r] = -1.0f / (float) R;
    if (st == KNE_OK)
        kne_device_put(be, k->minus, minus, (size_t) R * sizeof *minus);
    for (int32_t l = 0; l < L && st == KNE_OK; l++)
    {
        const kne_metric_block block = {.at = (int64_t) l * R * R, .n = R};
        float                 *a = k->a + (size_t) l * (size_t) R * (size_t) f;
        const kne_mat          w = rows_of_f32(a, R, f);
        const double           square = gather_known(rows, ref, n_ref, l, f, R);

        k->ridge_at[l] = square > 0 ? ridge * square / R / f : 1;
        kne_device_put(be, a, rows, (size_t) R * (size_t) f * sizeof *rows);
        kne_device_put(be, k->block + l, &block, sizeof block);
        be->linear(be->ctx, k->gram, R, a, f, &w, NULL, R, 0);
        be->factor(be->ctx, k->m, k->gram, k->block + l, 1, R, 1.0 / R, k->ridge_at[l]);
    }
    free(rows);
    if (st == KNE_OK)
        st = be->status(be->ctx, err);
    if (st != KNE_OK)
    {
        kne_energy_known_free(k);
        return st;
    }
    k->key = key;
    k->n_rows = R;
    *out = k;
    return KNE_OK;
}

static uint64_t
known_key(const kne_ref *const *ref, int32_t n_ref, double ridge)
{
    union { double d; uint64_t u; } bits = {.d = ridge};
    uint64_t h = bits.u;

    for (int32_t i = 0; i < n_ref; i++)
    {
        h ^= ref[i]->key + (uint64_t) ref[i]->n_rows;
        h = kne_random_next(&h);
    }
    return h ? h : 1;
}

/* ---- passes ---- */

static void
visit(void *ctx, const kne_ffn_grad *g)
{
    energy_pass                   *p = ctx;
    const struct kne_energy_known *known = p->known;
    kne_backend                   *be = p->be;
    const int64_t                  f = p->m->arch.d_ff, d = p->m->arch.d_model, T = g->n;
    const kne_mat                  a = rows_of_f32(g->a, T, f), dy = rows_of_f32(g->dy, T, d);
    const float                   *z = g->a;
    double                         scale = 1;

    for (int32_t e = 0; e < p->n_of; e++)
        if (p->of[e].attribution)
            be->score(be->ctx, p->of[e].attribution + g->layer * f, g->a + p->row0[e] * f, g->u + p->row0[e] * f, p->ones,
                      p->of[e].prompt[0].n - 1, f);
    if (known)
    {
        const int64_t R = known->n_rows;
        const float  *A = known->a + g->layer * R * f;

        be->linear(be->ctx, p->b, T, A, f, &a, NULL, R, 0);
        be->solve(be->ctx, p->x, 0, 1, p->b, known->m, known->block + g->layer, 1, R, NULL, T, p->column);
        be->scale_rows(be->ctx, p->x, known->minus, R, T);
        be->zero(be->ctx, p->z, (size_t) (T * f) * sizeof *p->z);
        be->add(be->ctx, p->z, g->a, T * f);
        be->matmul_tn(be->ctx, p->z, f, p->x, T, A, f, T, f, R, 1);
        z = p->z;
        scale = 1 / known->ridge_at[g->layer];
    }
    be->linear(be->ctx, p->k, T, g->dy, d, &dy, NULL, T, 0);
    be->energy(be->ctx, p->score + g->layer * f, p->m->arch.n_layers * f, z, g->a, p->k, p->dev_row0, p->n_of, T, f, (float) scale);
}

static kne_status
flush(energy_pass *p, const kne_view *view, const kne_energy_top *want, float *coef, kne_err *err)
{
    const kne_energy_of *of = p->of;
    const int32_t      n_out = p->pack.b.n_out, V = p->m->arch.vocab_size;
    const int64_t      f = p->m->arch.d_ff, len = p->m->arch.n_layers * f;
    const kne_overlay *ov = view ? &view->overlay : NULL;
    kne_backend       *be = p->be;

    kne_device_put(be, p->dev_row0, p->row0, ((size_t) p->n_of + 1) * sizeof *p->row0);
    KNE_TRY(kne_forward(p->m, be, p->work, &p->pack.b, ov, NULL, 0, err));
    kne_work_logprob(be, p->work, 0, n_out, V, p->pack.target, coef, NULL, NULL);
    KNE_TRY(kne_backward(p->m, be, p->work, &p->pack.b, ov, NULL, want ? want->layer_min : 0, visit, p, err));
    for (int32_t e = 0; e < p->n_of && !want; e++)
        be->get(be->ctx, of[e].score, p->score + e * len, (size_t) len * sizeof *p->score);
    if (want)
        be->top(be->ctx, p->index, p->score + want->layer_min * f, len, p->keys, p->n_of,
                (want->layer_max - want->layer_min + 1) * f, want->n);
    for (int32_t e = 0; e < p->n_of && want; e++)
    {
        be->get(be->ctx, of[e].top, p->index + (int64_t) e * want->n, (size_t) want->n * sizeof *p->index);
        for (int32_t i = 0; i < want->n; i++)
            of[e].top[i] += want->layer_min * (int32_t) f;
    }
    return be->status(be->ctx, err);
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
kne_energy(const kne_model *m, kne_backend *be, const kne_view *view, struct kne_energy_known **kept, const kne_ref *const *ref,
           int32_t n_ref, double ridge, const kne_energy_of *of, int32_t n, const kne_energy_top *want, const kne_job_calls *calls,
           kne_err *err)
{
    const size_t             L = (size_t) m->arch.n_layers, f = (size_t) m->arch.d_ff;
    energy_pass              p = {.m = m, .be = be};
    struct kne_energy_known *known = kept ? *kept : NULL;
    const bool               some = kne_metric_rows(ref, n_ref) > 0;
    const uint64_t           key = known_key(ref, n_ref, ridge);
    kne_arena                arena = {0}, dev = {0};
    float                   *coef = NULL;
    int32_t                  rows = 1, most = 1, total = 0, facts;
    kne_status               st = KNE_OK;

    for (int32_t i = 0; i < n; i++)
    {
        most = rows_of(&of[i]) > most ? rows_of(&of[i]) : most;
        total += rows_of(&of[i]);
    }
    rows = kne_pass_rows(m, PASS_ROWS);
    rows = most > rows ? most : total < rows ? total : rows;
    rows = rows > 0 ? rows : 1;
    facts = SCORE_BYTES / (L * f * sizeof(float)) < 16 ? 16 : (int32_t) (SCORE_BYTES / (L * f * sizeof(float)));
    facts = facts < n ? facts : n;
    if (some && !(known && known->key == key))
    {
        if (kept) /* its place on the device first */
        {
            kne_energy_known_free(known);
            *kept = NULL;
        }
        KNE_TRY(known_new(m, be, ref, n_ref, ridge, key, &known, err));
        if (kept)
            *kept = known;
    }
    p.known = some ? known : NULL;
    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        const size_t R = p.known ? (size_t) p.known->n_rows : 0, T = (size_t) rows, n_top = want ? (size_t) want->n : 0;

        kne_pack_layout(&p.pack, &arena, rows, rows, rows);
        coef = kne_arena_take(&arena, T, sizeof *coef);
        p.row0 = kne_arena_take(&arena, (size_t) facts + 1, sizeof *p.row0);
        p.column = be->host ? kne_arena_take(&arena, R * KNE_METRIC_COLUMNS, sizeof *p.column) : NULL;
        p.dev_row0 = kne_arena_take(&dev, (size_t) facts + 1, sizeof *p.dev_row0);
        p.index = kne_arena_take(&dev, (size_t) facts, n_top * sizeof *p.index);
        p.keys = kne_arena_take(&dev, (size_t) facts, n_top * sizeof *p.keys);
        p.b = kne_arena_take(&dev, R * T, sizeof *p.b);
        p.x = kne_arena_take(&dev, R * T, sizeof *p.x);
        p.z = kne_arena_take(&dev, R ? T * f : 0, sizeof *p.z);
        p.k = kne_arena_take(&dev, T * T, sizeof *p.k);
        p.score = kne_arena_take(&dev, (size_t) facts * L, f * sizeof *p.score);
        p.ones = kne_arena_take(&dev, T, sizeof *p.ones);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
        if (turn == 0 && st == KNE_OK)
            st = kne_device_commit(&dev, be, err);
    }
    if (st == KNE_OK)
        st = kne_work_new(m, (kne_work_shape) {rows, rows, view ? view->max_overlay : 0, true}, &p.work, err);
    for (int32_t i = 0; i < rows && st == KNE_OK; i++)
        coef[i] = 1;
    if (st == KNE_OK)
        kne_device_put(be, p.ones, coef, (size_t) rows * sizeof *coef);
    for (int32_t i = 0; i < n && st == KNE_OK; i += p.n_of)
    {
        kne_pack_clear(&p.pack);
        p.of = of + i;
        for (p.n_of = 0; i + p.n_of < n && p.n_of < facts && p.pack.b.n + rows_of(&of[i + p.n_of]) <= rows; p.n_of++)
        {
            p.row0[p.n_of] = p.pack.b.n;
            for (int32_t k = 0; k < of[i + p.n_of].n_prompts; k++)
                kne_pack_add(&p.pack, of[i + p.n_of].prompt[k].id, of[i + p.n_of].prompt[k].n, of[i + p.n_of].prompt[k].n_prompt);
        }
        p.row0[p.n_of] = p.pack.b.n;
        if (i && calls && calls->progress)
            calls->progress(calls->ctx, KNE_PHASE_ATTRIBUTE, i, n, 0, 0);
        if (calls && calls->yield && calls->yield(calls->ctx))
            st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
        else
            st = flush(&p, view, want, coef, err);
    }
    kne_work_free(p.work);
    kne_arena_free(&arena);
    kne_device_free(&dev, be);
    if (!kept)
        kne_energy_known_free(known);
    return st;
}
