/*
 * test_edit_ref.h - part of test_edit.c: the cache of reference facts and the
 * metric of the protected step. What the cache holds must never show in a result.
 */
#ifndef TEST_EDIT_REF_H
#define TEST_EDIT_REF_H

#include "kne_energy.h"
#include "kne_metric.h"
#include "kne_pack.h"
#include "kne_ref.h"
#include "test_edit_attrib.h"

enum { N_REF = 150 };

typedef struct ref_facts
{
    tiny_model   *t;
    int32_t       id[N_REF][16];
    kne_tokens    fact[N_REF];
    kne_ref      *ref[N_REF];
    kne_ref_cache *cache;
    int           passes;
} ref_facts;

static int
count_passes(void *ctx)
{
    ((ref_facts *) ctx)->passes++;
    return 0;
}

/* Facts of 6 to 15 tokens, so that they take several passes; number 9 is number 2 again. */
static void
ref_facts_init(ref_facts *r)
{
    kne_err err;

    memset(r, 0, sizeof *r);
    r->t = tiny_new(&tiny_specs[0], 31);
    for (int i = 0; i < N_REF; i++)
        r->fact[i] = random_fact(&r->t->m.arch, r->id[i], 6 + i % 10, 4 + i % 2,
                                 i == 9 ? 2 : (uint64_t) i + 1000);
    r->fact[9] = random_fact(&r->t->m.arch, r->id[9], r->fact[2].n, r->fact[2].n_prompt, 1002);
    ok(kne_ref_cache_new(&r->cache, &err), &err);
}

static void
ref_facts_free(ref_facts *r)
{
    kne_ref_cache_free(r->cache);
    tiny_free(r->t);
}

static kne_status
get_refs(ref_facts *r, int n, const kne_job_calls *calls, kne_err *err)
{
    return kne_refs(r->cache, &r->t->m, be, r->fact, n, r->ref, calls, err);
}

static bool
same_refs(const ref_facts *a, const ref_facts *b, int n, bool scores_too)
{
    const size_t len = (size_t) a->t->m.arch.n_layers * (size_t) a->t->m.arch.d_ff;

    for (int i = 0; i < n; i++)
        if (a->ref[i]->n_rows != b->ref[i]->n_rows || a->ref[i]->right != b->ref[i]->right ||
            memcmp(a->ref[i]->a, b->ref[i]->a, len * (size_t) a->ref[i]->n_rows * sizeof(float)) ||
            (scores_too && memcmp(a->ref[i]->score, b->ref[i]->score, len * sizeof(float))))
            return false;
    return true;
}

/* The activations of fact i, from a pass of its own. */
static bool
activations_are(ref_facts *r, int i)
{
    const kne_arch *a = &r->t->m.arch;
    const size_t    f = (size_t) a->d_ff;
    kne_pack        pack = {0};
    kne_arena       arena = {0};
    kne_work       *w = NULL;
    kne_err         err;
    bool            same = true;
    const kne_ref  *ref = r->ref[i];

    kne_pack_layout(&pack, &arena, 16, 1, 16);
    kne_arena_commit(&arena, &err);
    kne_pack_layout(&pack, &arena, 16, 1, 16);
    kne_pack_add(&pack, r->fact[i].id, r->fact[i].n, r->fact[i].n_prompt);
    if (!ok(kne_work_new(&r->t->m, (kne_work_shape) {16, 16, 0, true}, &w, &err), &err) ||
        !ok(kne_forward(&r->t->m, be, w, &pack.b, NULL, NULL, 0, &err), &err))
        return false;
    size_t skip = (size_t) (r->fact[i].n - 1 - ref->n_rows); /* the last rows are kept */
    for (int32_t l = 0; l < a->n_layers; l++)
        same &= !memcmp(ref->a + (size_t) l * (size_t) ref->n_rows * f, w->layer[l].a + skip * f,
                        (size_t) ref->n_rows * f * sizeof(float));
    bool right = true;
    for (int32_t o = 0; o < pack.b.n_out; o++)
        for (int32_t v = 0; v < a->vocab_size; v++)
            right &=
                w->logits[o * a->vocab_size + v] <= w->logits[o * a->vocab_size + pack.target[o]];
    same &= right == ref->right;
    kne_work_free(w);
    kne_arena_free(&arena);
    return same;
}

static void
test_cache(void)
{
    static ref_facts r, fresh;
    kne_job_calls    calls = {.ctx = &r, .yield = count_passes};
    kne_options      opt;
    kne_err          err;
    int32_t          pick[N_REF];
    bool             fine = true;

    ref_facts_init(&r);
    opt = options(r.t, 3, KNE_PATH_JOINT, KNE_QUAD_GAUSS, KNE_SCORE_P);
    for (int i = 0; i < N_REF; i++)
        pick[i] = i;
    fine = ok(get_refs(&r, N_REF, &calls, &err), &err);
    for (int i = 0; i < N_REF; i++)
        fine &= activations_are(&r, i);
    check(fine && r.passes > 1 && r.ref[9] == r.ref[2],
          "references are the activations of each fact on the base");
    kne_ref *before[N_REF];

    memcpy(before, r.ref, sizeof before);
    r.passes = 0;
    check(get_refs(&r, N_REF, &calls, &err) == KNE_OK && !memcmp(before, r.ref, sizeof before) &&
              r.passes == 0,
          "asked again nothing is computed");

    fine = ok(kne_ref_scores(&r.t->m, be, &opt, r.fact, r.ref, pick, N_REF, &calls, &err), &err);
    for (int i = 0; i < N_REF; i += 7) /* number 9 is number 2: not attributed twice */
    {
        int    at_fact = i == 7 ? 2 : i;
        float *at[16];

        memset(scores, 0, sizeof scores);
        for (int j = 0; j < 16; j++)
            at[j] = scores[0];
        fine &= attribute(r.t, NULL, &opt, &r.fact[at_fact], 1, at);
        for (int k = 0; k < r.t->m.arch.n_layers * r.t->m.arch.d_ff; k++)
            fine &= r.ref[at_fact]->score[k] == fabsf(scores[0][k]);
    }
    check(fine,
          "reference scores are |attribution| of each fact, one that is known twice included");
    r.passes = 0;
    opt.layer_min = 1; /* a range and the number of references are no part of a score */
    opt.reference = 7;
    check(kne_ref_scores(&r.t->m, be, &opt, r.fact, r.ref, pick, N_REF, &calls, &err) == KNE_OK &&
              r.passes == 0,
          "asked again, for other layers, no score is computed");
    float kept = r.ref[0]->score[0];

    for (int k = 0; k < 4; k++)
    {
        kne_options other = opt;

        *(k == 0   ? &other.points
          : k == 1 ? &other.path
          : k == 2 ? &other.quadrature
                   : &other.score) ^= 1;
        fine =
            kne_ref_scores(&r.t->m, be, &other, r.fact, r.ref, pick, 1, &calls, &err) == KNE_OK &&
            r.ref[0]->score[0] != kept;
        fine &= kne_ref_scores(&r.t->m, be, &opt, r.fact, r.ref, pick, 1, &calls, &err) == KNE_OK &&
                r.ref[0]->score[0] == kept;
        check(fine, "another option %d is another score", k);
    }

    /* stopped at every pass in turn, then asked in earnest */
    ref_facts_init(&fresh);
    opt.layer_min = 0;
    ok(get_refs(&fresh, N_REF, NULL, &err), &err);
    ok(kne_ref_scores(&fresh.t->m, be, &opt, fresh.fact, fresh.ref, pick, N_REF, NULL, &err), &err);
    ref_facts_free(&r);
    ref_facts_init(&r);
    int stops = 0;

    fine = true;
    for (int stop = 1;; stop++, stops++)
    {
        int           left = stop;
        kne_job_calls stopping = {.ctx = &left, .yield = stop_at};
        kne_status    st = get_refs(&r, N_REF - 3 * (stop - 1), &stopping, &err);

        if (st == KNE_OK)
            break;
        fine &= st == KNE_ERR_CANCELLED;
    }
    fine &= ok(get_refs(&r, N_REF, NULL, &err), &err);
    check(fine && stops > 0 && same_refs(&r, &fresh, N_REF, false),
          "stopped %d times, the references are those of a fresh cache", stops);
    for (stops = 0;; stops++)
    {
        int           left = 2;
        kne_job_calls stopping = {.ctx = &left, .yield = stop_at};
        int           n = 10 + 20 * stops < N_REF ? 10 + 20 * stops : N_REF;
        kne_status st = kne_ref_scores(&r.t->m, be, &opt, r.fact, r.ref, pick, n, &stopping, &err);

        fine &= st == KNE_OK || st == KNE_ERR_CANCELLED;
        if (n == N_REF)
            break;
    }
    fine &= ok(kne_ref_scores(&r.t->m, be, &opt, r.fact, r.ref, pick, N_REF, NULL, &err), &err);
    check(fine && same_refs(&r, &fresh, N_REF, true), "and so are the scores");
    ref_facts_free(&r);
    ref_facts_free(&fresh);
}

/* A cache that is small enough to forget, against one that is asked once. */
static void
test_eviction(void)
{
    static ref_facts r, fresh;
    kne_err          err;
    bool             fine = true;
    uint64_t         seed = 9;

    ref_facts_init(&r);
    const size_t row = (size_t) r.t->m.arch.n_layers * (size_t) r.t->m.arch.d_ff * sizeof(float);
    static ref_facts all;

    all = r; /* the facts, before they are moved around */
    kne_ref_cache_limit(r.cache, 2 * 150 * 4 * row); /* four rows a fact when all are asked */
    for (int turn = 0; turn < 30 && fine; turn++)
    {
        int n = turn % 3 == 0 ? N_REF : 1 + (int) (kne_random_next(&seed) % 60);

        for (int i = 0; i < n; i++)
            r.fact[i] = all.fact[n == N_REF ? i : (int) (kne_random_next(&seed) % N_REF)];
        fine &= ok(get_refs(&r, n, NULL, &err), &err);
        ref_facts_init(&fresh);
        kne_ref_cache_limit(fresh.cache, 2 * 150 * 4 * row);
        memcpy(fresh.fact, r.fact, sizeof r.fact);
        fine &= ok(get_refs(&fresh, n, NULL, &err), &err) && same_refs(&r, &fresh, n, false);
        size_t bytes = 0;

        for (int i = 0; i < n; i++)
        {
            bytes += (size_t) r.ref[i]->n_rows * row;
            fine &= n < N_REF || r.ref[i]->n_rows == 4;
        }
        fine &= bytes <= 150 * 4 * row;
        ref_facts_free(&fresh);
    }
    check(fine, "a small cache gives what a fresh one gives, whatever it was asked before");
    kne_ref_cache_limit(r.cache, 1);
    memcpy(r.fact, all.fact, sizeof r.fact);
    fine = ok(get_refs(&r, N_REF, NULL, &err), &err);
    for (int i = 0; i < N_REF; i++)
        fine &= r.ref[i]->n_rows == 1 && activations_are(&r, i);
    check(fine, "with no room at all each fact keeps its last row");
    ref_facts_free(&r);
}

/* More facts than the first table has room for. */
static void
test_cache_growth(void)
{
    enum { N = 3000 };
    tiny_model    *t = tiny_new(&tiny_specs[2], 3);
    int32_t      (*id)[16] = calloc(N, sizeof *id);
    kne_tokens    *fact = calloc(N, sizeof *fact);
    kne_ref      **ref = calloc(N, sizeof *ref), **ref2 = calloc(N, sizeof *ref2);
    kne_ref_cache *c = NULL;
    kne_err        err;

    for (int i = 0; i < N; i++)
        fact[i] = random_fact(&t->m.arch, id[i], 3, 2, (uint64_t) i);
    ok(kne_ref_cache_new(&c, &err), &err);
    bool fine = ok(kne_refs(c, &t->m, be, fact, N, ref, NULL, &err), &err);
    fine &= ok(kne_refs(c, &t->m, be, fact, N, ref2, NULL, &err), &err);
    check(fine && !memcmp(ref, ref2, N * sizeof *ref), "%d facts are found again", N);
    kne_ref_cache_free(c);
    free(ref2);
    free(ref);
    free(fact);
    free(id);
    tiny_free(t);
}

/* ---- the metric ---- */

/* x = M^-1 g by Gaussian elimination with row exchanges. */
static void
gauss(double *m, double *x, int n, int d)
{
    for (int c = 0; c < n; c++)
    {
        int p = c;

        for (int r = c + 1; r < n; r++)
            if (fabs(m[r * n + c]) > fabs(m[p * n + c]))
                p = r;
        for (int k = 0; k < n && p != c; k++)
        {
            double s = m[p * n + k];

            m[p * n + k] = m[c * n + k];
            m[c * n + k] = s;
        }
        for (int k = 0; k < d && p != c; k++)
        {
            double s = x[p * d + k];

            x[p * d + k] = x[c * d + k];
            x[c * d + k] = s;
        }
        for (int r = 0; r < n; r++)
        {
            double by = r == c ? 0 : m[r * n + c] / m[c * n + c];

            for (int k = 0; k < n; k++)
                m[r * n + k] -= by * m[c * n + k];
            for (int k = 0; k < d; k++)
                x[r * d + k] -= by * x[c * d + k];
        }
    }
    for (int r = 0; r < n; r++)
        for (int k = 0; k < d; k++)
            x[r * d + k] /= m[r * n + r];
}

/* Of M as the optimiser makes it, from activations: what be->solve wants. */
static void
metric_factor(double *m, const kne_ref *const *ref, int32_t n_ref, int32_t layer, int32_t f, const int32_t *neuron, int32_t n,
              double ridge, double mean)
{
    const int64_t          rows = kne_metric_rows(ref, n_ref);
    const kne_metric_block block = {.n = n};
    float                 *a = malloc((size_t) (rows * n) * sizeof *a + 1);
    int32_t                idx[64];

    for (int32_t i = 0; i < n; i++)
        idx[i] = i + 3;
    kne_metric_gather(a, ref, n_ref, layer, f, neuron, n);
    be->gram(be->ctx, m, a, n, rows, idx, 3, &block, 1, n);
    be->factor(be->ctx, m, NULL, &block, 1, n, rows ? 1.0 / (double) rows : 0, mean > 0 ? ridge * mean : 1);
    free(a);
}

static void
test_metric(void)
{
    enum { MAX = 37, D = 6 };
    static ref_facts r;
    static double    m[MAX * MAX], chol[MAX * MAX], want[MAX * D], scratch[MAX * KNE_METRIC_COLUMNS];
    static float     g[MAX * D], x[MAX * D];
    kne_err          err;
    uint64_t         seed = 1;
    double           worst = 0, worst_mean = 0;

    ref_facts_init(&r);
    ok(get_refs(&r, N_REF, NULL, &err), &err);
    const kne_ref *const *ref = (const kne_ref *const *) r.ref;
    const int32_t         f = r.t->m.arch.d_ff;

    for (int turn = 0; turn < 24; turn++)
    {
        int32_t neuron[MAX], n = turn == 0 ? f : 0, layer = turn % 3,
                             n_ref = turn % 4 == 3 ? 2 : N_REF;
        double  ridge = turn % 5 == 0 ? 1e-4 : 0.01, mean = 0, rows = 0;

        for (int32_t k = 0; k < f; k++)
        {
            if (turn == 0)
                neuron[k] = k;
            else if (kne_random_next(&seed) % 4 == 0)
                neuron[n++] = k;
        }
        memset(m, 0, sizeof m);
        for (int i = 0; i < n_ref; i++)
            for (int t = 0; t < ref[i]->n_rows; t++, rows++)
            {
                const float *a = ref[i]->a + (layer * ref[i]->n_rows + t) * f;

                for (int k = 0; k < f; k++)
                    mean += (double) a[k] * a[k];
                for (int p = 0; p < n; p++)
                    for (int q = 0; q < n; q++)
                        m[p * n + q] += (double) a[neuron[p]] * a[neuron[q]];
            }
        mean /= rows * f;
        for (int p = 0; p < n * n; p++)
            m[p] = m[p] / rows + (p / n == p % n ? ridge * mean : 0);
        for (int p = 0; p < n * D; p++)
            want[p] = g[p] = (float) tiny_uniform(&seed);
        gauss(m, want, n, D);

        double got_mean = kne_metric_mean(ref, n_ref, layer, f);

        worst_mean = fmax(worst_mean, fabs(got_mean / mean - 1));
        metric_factor(chol, ref, n_ref, layer, f, neuron, n, ridge, got_mean);
        kne_metric_solve(chol, n, g, x, D, scratch);
        double size = 0, off = 0;

        for (int p = 0; p < n * D; p++)
        {
            size = fmax(size, fabs(want[p]));
            off = fmax(off, fabs(want[p] - x[p]));
        }
        worst = fmax(worst, off / size);
        kne_metric_solve(chol, n, g, g, D, scratch); /* in place, as the step does */
        if (memcmp(g, x, (size_t) (n * D) * sizeof *g))
            worst = 1;
    }
    check(worst < 1e-6 && worst_mean < 1e-12, "M^-1 g is that of plain elimination (%.1e)", worst);

    int32_t two[2] = {3, 9};

    for (int p = 0; p < 2 * D; p++)
        g[p] = (float) p;
    check(kne_metric_mean(NULL, 0, 0, f) == 0, "no facts have the mean 0");
    metric_factor(chol, NULL, 0, 0, f, two, 2, 0.01, 0);
    kne_metric_solve(chol, 2, g, x, D, scratch);
    check(!memcmp(g, x, 2 * D * sizeof *g), "without facts M is I");
    ref_facts_free(&r);
}

static float gradient[3 * 37 * 24];

/* G of every layer (L, f, d), from a pass of its own over two prompts. */
static void
keep_gradient(void *ctx, const kne_ffn_grad *g)
{
    const tiny_model *t = ((ref_facts *) ctx)->t;
    const int         f = t->m.arch.d_ff, d = t->m.arch.d_model;

    for (int k = 0; k < f; k++)
        for (int c = 0; c < d; c++)
        {
            double sum = 0;

            for (int r = 0; r < g->n; r++)
                sum += (double) g->a[r * f + k] * g->dy[r * d + c];
            gradient[(g->layer * f + k) * d + c] = (float) sum;
        }
}

static void
test_energy(void)
{
    static ref_facts r;
    enum { F = 37, D = 24, FACTS = 20 };
    static double chol[F * F], scratch[F * KNE_METRIC_COLUMNS];
    static float  x[F * D], energy[3][3 * F], alone[3 * F];
    int32_t       all[F];
    kne_arena     arena = {0};
    kne_pack      pack = {0};
    kne_work     *w = NULL;
    kne_err       err;
    float         logp[32], coef[32];
    double        worst = 0;
    const kne_ref *ref[FACTS];

    ref_facts_init(&r);
    ok(get_refs(&r, FACTS, NULL, &err), &err);
    for (int i = 0; i < FACTS; i++)
        ref[i] = r.ref[i];
    for (int k = 0; k < F; k++)
        all[k] = k;
    /* edit 0 has prompts 30 and 31, the others one each */
    kne_energy_of of[3] = {{r.fact + 30, 2, energy[0], NULL, NULL},
                           {r.fact + 40, 1, energy[1], NULL, NULL},
                           {r.fact + 50, 1, energy[2], NULL, NULL}};

    check(ok(kne_energy(&r.t->m, be, NULL, NULL, ref, FACTS, 0.01, of, 3, NULL, NULL, &err), &err), "energy is computed");
    for (int turn = 0; turn < 2; turn++)
    {
        kne_pack_layout(&pack, &arena, 32, 2, 32);
        if (turn == 0)
            kne_arena_commit(&arena, &err);
    }
    for (int i = 30; i < 32; i++)
        kne_pack_add(&pack, r.fact[i].id, r.fact[i].n, r.fact[i].n_prompt);
    ok(kne_work_new(&r.t->m, (kne_work_shape) {32, 32, 0, true}, &w, &err), &err);
    ok(kne_forward(&r.t->m, be, w, &pack.b, NULL, NULL, 0, &err), &err);
    for (int i = 0; i < 32; i++)
        coef[i] = 1;
    be->logprob(be->ctx, logp, NULL, w->dlogits, w->logits, pack.target, coef, pack.b.n_out, r.t->m.arch.vocab_size);
    ok(kne_backward(&r.t->m, be, w, &pack.b, NULL, NULL, 0, keep_gradient, &r, &err), &err);
    for (int l = 0; l < 3; l++)
    {
        double top = 0;

        metric_factor(chol, ref, FACTS, l, F, all, F, 0.01, kne_metric_mean(ref, FACTS, l, F));
        kne_metric_solve(chol, F, &gradient[l * F * D], x, D, scratch);
        for (int turn = 0; turn < 2; turn++)
            for (int k = 0; k < F; k++)
            {
                double sum = 0;

                for (int c = 0; c < D; c++)
                    sum += (double) x[k * D + c] * gradient[(l * F + k) * D + c];
                if (turn == 0)
                    top = fmax(top, fabs(sum));
                else
                    worst = fmax(worst, fabs(energy[0][l * F + k] - sum) / top);
            }
    }
    check(worst < 1e-3, "energy is <(G C^-1)[:, k], G[:, k]> over the whole layer (off by %.1e of the largest)", worst);
    of[2].score = alone;
    ok(kne_energy(&r.t->m, be, NULL, NULL, ref, FACTS, 0.01, of + 2, 1, NULL, NULL, &err), &err);
    check(!memcmp(alone, energy[2], sizeof alone), "and an edit's own, whatever it runs with");

    /* the attribution of the first prompt's first token, on the way */
    static float two[2][3 * F], as[2][3 * F];
    float       *at[2] = {as[0], as[1]};
    kne_tokens   first[3] = {r.fact[30], r.fact[40], r.fact[31]};
    kne_options  opt;

    for (int i = 0; i < 3; i++)
        first[i].n = first[i].n_prompt + 1;
    const kne_tokens prompts[2] = {first[0], first[2]};
    kne_energy_of    both[2] = {{prompts, 2, energy[0], NULL, two[0]}, {first + 1, 1, energy[1], NULL, two[1]}};

    kne_options_defaults(&opt);
    ok(kne_energy(&r.t->m, be, NULL, NULL, ref, FACTS, 0.01, both, 2, NULL, NULL, &err), &err);
    ok(kne_attribute(&r.t->m, be, NULL, &opt, first, 2, at, NULL, &err), &err);
    check(!memcmp(two, as, sizeof as) && as[0][0] != 0 && as[1][3 * F - 1] != 0, "and the attribution of its first prompt, bit for bit");
    r.passes = 0;
    kne_job_calls calls = {.ctx = &r, .yield = count_passes};
    ok(kne_energy(&r.t->m, be, NULL, NULL, NULL, 0, 0.01, of, 1, NULL, &calls, &err), &err);
    worst = 0;
    for (int k = 0; k < 3 * F; k++)
    {
        double sum = 0;

        for (int c = 0; c < D; c++)
            sum += (double) gradient[k * D + c] * gradient[k * D + c];
        worst = fmax(worst, fabs(energy[0][k] - sum) / fmax(sum, 1e-6));
    }
    check(worst < 1e-3 && r.passes == 1, "without facts it is that of the gradient (off by %.1e)", worst);
    kne_work_free(w);
    kne_arena_free(&arena);
    ref_facts_free(&r);
}

static void
test_references(void)
{
    test_cache();
    test_eviction();
    test_cache_growth();
    test_metric();
    test_energy();
}

#endif
