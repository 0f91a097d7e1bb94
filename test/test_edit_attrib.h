/*
 * test_edit_attrib.h - part of test_edit.c: the quadrature, attribution against
 * finite differences and integrals of a forward pass in double, and the choice
 * of an ensemble.
 */
#ifndef TEST_EDIT_ATTRIB_H
#define TEST_EDIT_ATTRIB_H

#include "kne_attrib.h"
#include "kne_test.h"
#include "tiny_model.h"

enum { MAX_LF = 3 * 50, MAX_OBJECT = 4 };

static kne_backend *be;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

static void
test_quadrature(void)
{
    double node[64], weight[64], worst = 0, sum_worst = 0;
    bool   inside = true;

    for (int n = 1; n <= 64; n++)
    {
        double sum = 0;

        kne_quadrature_points(KNE_QUAD_GAUSS, n, node, weight);
        for (int i = 0; i < n; i++)
        {
            sum += weight[i];
            inside &= n == 1 || (node[i] > (i ? node[i - 1] : 0) && node[i] < 1 && weight[i] > 0);
            inside &= n == 1 || fabs(node[i] + node[n - 1 - i] - 1) < 1e-14;
        }
        sum_worst = fmax(sum_worst, fabs(sum - 1));
        for (int k = 0; k <= 2 * n - 1 && n > 1; k++) /* x^k has the integral 1 / (k + 1) */
        {
            double integral = 0;

            for (int i = 0; i < n; i++)
                integral += weight[i] * pow(node[i], k);
            worst = fmax(worst, fabs(integral * (k + 1) - 1));
        }
    }
    check(worst < 1e-12 && sum_worst < 1e-13 && inside,
          "Gauss-Legendre of n points is exact to degree 2n - 1, n to 64 (%.1e)", worst);
    kne_quadrature_points(KNE_QUAD_GAUSS, 2, node, weight);
    check(fabs(node[0] - (0.5 - 0.5 / sqrt(3))) < 1e-15 && fabs(weight[1] - 0.5) < 1e-15,
          "two points are 1/2 -+ 1/(2 sqrt 3)");
    kne_quadrature_points(KNE_QUAD_MIDPOINT, 4, node, weight);
    check(node[0] == 0.125 && node[3] == 0.875 && weight[2] == 0.25, "four midpoints");
    bool one = true;
    for (int rule = 0; rule < 2; rule++)
    {
        kne_quadrature_points((kne_quadrature) rule, 1, node, weight);
        one &= node[0] == 1 && weight[0] == 1;
    }
    check(one, "one point is alpha = 1 by either rule");
}

/* ---- attribution ---- */

/* Random ids: a prompt of n_prompt tokens and an object of the rest. */
static kne_tokens
random_fact(const kne_arch *a, int32_t *id, int32_t n, int32_t n_prompt, uint64_t seed)
{
    for (int32_t i = 0; i < n; i++)
        id[i] = (int32_t) (kne_random_next(&seed) % (uint64_t) a->vocab_size);
    return (kne_tokens) {id, n, n_prompt};
}

/* Score of object token j in double: log P or P. */
static double
ref_score(const tiny_model *t, const kne_tokens *fact, int32_t j, int kind,
          const float *const *alpha)
{
    const int32_t V = t->m.arch.vocab_size;
    double        logits[32 * 64], most = -1e300, sum = 0;

    ref_forward(t, logits, fact->id, j, alpha);
    const double *row = logits + (j - 1) * V;
    for (int32_t i = 0; i < V; i++)
        most = fmax(most, row[i]);
    for (int32_t i = 0; i < V; i++)
        sum += exp(row[i] - most);
    double logp = row[fact->id[j]] - most - log(sum);
    return kind == KNE_SCORE_P ? exp(logp) : logp;
}

/* A view with two edits in some value vectors and, where asked, keys. */
static kne_view *
some_view(const tiny_model *t, bool keys, uint64_t seed)
{
    const kne_arch *a = &t->m.arch;
    float           v[2][3][32];
    kne_delta      *delta[2] = {NULL, NULL};
    kne_view       *view = NULL;
    int64_t         id[2] = {3, 8};
    kne_err         err;

    for (int e = 0; e < 2; e++)
    {
        kne_delta_row row[8];
        int           n = 0;

        for (int32_t l = 0; l < a->n_layers; l += a->n_layers - 1)
        {
            for (int k = 0; k < 3; k++)
                for (int c = 0; c < a->d_model; c++)
                    v[l > 0][k][c] = (float) (0.2 * tiny_uniform(&seed));
            row[n++] = (kne_delta_row) {l, 5 + e, KNE_MATRIX_DOWN, a->d_model, v[l > 0][0]};
            if (keys && a->gated)
                row[n++] = (kne_delta_row) {l, 5 + e, KNE_MATRIX_GATE, a->d_model, v[l > 0][1]};
            if (keys)
                row[n++] = (kne_delta_row) {l, 5 + e, KNE_MATRIX_UP, a->d_model, v[l > 0][2]};
        }
        if (!ok(kne_delta_new(row, n, &delta[e], &err), &err))
            return NULL;
    }
    ok(kne_view_new(&t->m, be, 2, id, delta, &view, &err), &err);
    kne_delta_release(delta[0]);
    kne_delta_release(delta[1]);
    return view;
}

/* Put a view's rows into the model's doubles. */
static void
edit_doubles(tiny_model *t, const kne_view *v)
{
    const kne_arch *a = &t->m.arch;

    for (int32_t l = 0; l < a->n_layers; l++)
        for (int32_t i = 0; i < v->layer[l].n; i++)
        {
            const kne_overlay_layer *o = &v->layer[l];
            tiny_layer              *r = &t->layer[l];
            int32_t                  k = o->neuron[i];

            for (int32_t c = 0; c < a->d_model; c++)
            {
                if (o->value_diff)
                    r->down[c * a->d_ff + k] += o->value_diff[i * a->d_model + c];
                if (o->gate)
                    r->gate[k * a->d_model + c] = o->gate[i * a->d_model + c];
                if (o->up)
                    r->up[k * a->d_model + c] = o->up[i * a->d_model + c];
            }
        }
}

static void
scale_value(tiny_model *t, int32_t l, int32_t k, double by)
{
    for (int32_t c = 0; c < t->m.arch.d_model; c++)
        t->layer[l].down[c * t->m.arch.d_ff + k] *= by;
}

static float scores[MAX_OBJECT][MAX_LF];

static bool
attribute(const tiny_model *t, const kne_view *view, const kne_options *opt, const kne_tokens *fact,
          int32_t n, float *const *at)
{
    kne_err err;

    return ok(kne_attribute(&t->m, be, view, opt, fact, n, at, NULL, &err), &err);
}

/* The options of an attribution; layer_max resolved as a job does. */
static kne_options
options(const tiny_model *t, int points, int path, int quadrature, int score)
{
    kne_options o;

    kne_options_defaults(&o);
    o.points = points;
    o.path = path;
    o.quadrature = quadrature;
    o.score = score;
    o.layer_max = t->m.arch.n_layers - 1;
    return o;
}

/* <v, d score / d v> of every neuron and token against central differences in the scale of v. */
static void
test_identity(const tiny_spec *spec, int kind, int with_view)
{
    const int32_t  n = 9, n_prompt = 6;
    tiny_model    *t = tiny_new(spec, 101), *plain = tiny_new(spec, 101);
    const kne_arch *a = &t->m.arch;
    kne_view      *view = with_view ? some_view(t, with_view == 2, 7) : NULL;
    int32_t        id[16];
    kne_tokens     fact = random_fact(a, id, n, n_prompt, 19);
    kne_options    opt = options(t, 1, KNE_PATH_JOINT, KNE_QUAD_GAUSS, kind);
    float         *at[MAX_OBJECT] = {scores[0], scores[1], scores[2], scores[3]};
    double         worst = 0, size = 0;

    memset(scores, 0, sizeof scores);
    bool fine = attribute(plain, view, &opt, &fact, 1, at);
    if (view)
        edit_doubles(t, view);
    for (int32_t j = n_prompt; j < n; j++)
        for (int32_t l = 0; l < a->n_layers; l++)
            for (int32_t k = 0; k < a->d_ff; k += 4)
            {
                const double h = 1e-4;

                scale_value(t, l, k, 1 + h);
                double up = ref_score(t, &fact, j, kind, NULL);
                scale_value(t, l, k, (1 - h) / (1 + h));
                double down = ref_score(t, &fact, j, kind, NULL);
                scale_value(t, l, k, 1 / (1 - h));
                double want = (up - down) / (2 * h);

                worst = fmax(worst, fabs(want - scores[j - n_prompt][l * a->d_ff + k]));
                size = fmax(size, fabs(want));
            }
    check(fine && size > 0 && worst < 2e-4 * size,
          "%s: <v, d%s/dv> of three object tokens%s (%.1e of %.1e)", spec->name,
          kind == KNE_SCORE_P ? "P" : "log P",
          with_view == 2 ? ", edited keys" : with_view ? ", edited values" : "", worst, size);
    kne_view_free(view);
    tiny_free(plain);
    tiny_free(t);
}

/* d score / d alpha at one point of a path (layer -1: all layers), by central differences. */
static double
ref_slope(const tiny_model *t, const kne_tokens *fact, int32_t j, int kind, int32_t layer,
          double at)
{
    float        factor[32];
    const float *alpha[8] = {NULL};
    double       score[2], end[2];

    for (int side = 0; side < 2; side++)
    {
        for (int i = 0; i < 32; i++)
            factor[i] = (float) (at * (side ? 1.003 : 0.997));
        for (int32_t l = 0; l < t->m.arch.n_layers; l++)
            alpha[l] = layer < 0 || layer == l ? factor : NULL;
        end[side] = factor[0];
        score[side] = ref_score(t, fact, j, kind, alpha);
    }
    return (score[1] - score[0]) / (end[1] - end[0]);
}

/*
 * Summed over the neurons that a path scales, attribution is the path's integral of d score / d
 * alpha: with the same nodes that is exact, and with enough of them it is score(1) - score(0).
 */
static void
test_completeness(const tiny_spec *spec, int kind, bool with_view)
{
    const int32_t   n = 8, n_prompt = 6;
    tiny_model     *t = tiny_new(spec, 103), *plain = tiny_new(spec, 103);
    const kne_arch *a = &t->m.arch;
    const int32_t   f = a->d_ff;
    kne_view       *view = with_view ? some_view(t, true, 9) : NULL;
    int32_t         id[16];
    kne_tokens      fact = random_fact(a, id, n, n_prompt, 23);
    float          *at[MAX_OBJECT] = {scores[0], scores[1]};
    static const float zero[32];
    double          worst[2] = {0, 0}, node[64], weight[64];
    bool            fine = true;

    if (view)
        edit_doubles(t, view);
    for (int turn = 0; turn < 4; turn++)
    {
        int         path = turn % 2, points = turn < 2 ? 5 : 64, quadrature = with_view && turn < 2;
        kne_options opt = options(t, points, path, quadrature, kind);

        kne_quadrature_points((kne_quadrature) quadrature, points, node, weight);
        memset(scores, 0, sizeof scores);
        fine &= attribute(plain, view, &opt, &fact, 1, at);
        for (int32_t j = n_prompt; j < n; j++)
            for (int32_t l = 0; l < (path == KNE_PATH_LAYER ? a->n_layers : 1); l++)
            {
                const float *alpha[8] = {NULL};
                int32_t      scaled = path == KNE_PATH_LAYER ? l : -1;
                int32_t      from = scaled < 0 ? 0 : l * f,
                        to = scaled < 0 ? a->n_layers * f : (l + 1) * f;
                double       sum = 0, want = 0;

                for (int32_t k = from; k < to; k++)
                    sum += scores[j - n_prompt][k];
                for (int32_t k = from / f; k < to / f; k++)
                    alpha[k] = zero;
                if (turn < 2)
                    for (int q = 0; q < points; q++)
                        want += weight[q] * ref_slope(t, &fact, j, kind, scaled, node[q]);
                else
                    want = ref_score(t, &fact, j, kind, NULL) - ref_score(t, &fact, j, kind, alpha);
                worst[turn / 2] = fmax(worst[turn / 2], fabs(sum - want) / fmax(fabs(want), 0.02));
            }
    }
    check(fine && worst[0] < 2e-3, "%s: attribution of %s%s is the sum over its points (%.1e)",
          spec->name, kind == KNE_SCORE_P ? "P" : "log P", with_view ? " in a view" : "", worst[0]);
    check(fine && worst[1] < 5e-2, "%s: of many points, the change of %s from 0 to 1 (%.1e)",
          spec->name, kind == KNE_SCORE_P ? "P" : "log P", worst[1]);
    kne_view_free(view);
    tiny_free(plain);
    tiny_free(t);
}

/* Many facts at once, alone, in another order, summed into one: the same bits. */
static void
test_batched(const tiny_spec *spec, int path, int kind)
{
    enum { N = 40 };
    tiny_model    *t = tiny_new(spec, 107);
    const size_t   len = (size_t) t->m.arch.n_layers * (size_t) t->m.arch.d_ff;
    kne_view      *view = some_view(t, true, 11);
    kne_options    opt = options(t, 3, path, KNE_QUAD_GAUSS, kind);
    static int32_t id[N][16];
    kne_tokens     fact[N], turned[N];
    float         *all = calloc(4 * N * len, sizeof *all), *one = calloc(len * 4, sizeof *one);
    float         *at[4 * N], *turned_at[4 * N];
    bool           same = true;
    int            k = 0, first[N + 1];

    for (int i = 0; i < N; i++)
    {
        fact[i] =
            random_fact(&t->m.arch, id[i], 3 + i % 11, i % 5 ? 2 : 2 + i % 11 / 4, (uint64_t) i);
        if (fact[i].n - fact[i].n_prompt > 4)
            fact[i].n_prompt = fact[i].n - 4;
        first[i] = k;
        k += fact[i].n - fact[i].n_prompt;
    }
    first[N] = k;
    for (int i = 0; i < k; i++)
        at[i] = all + (size_t) i * len;
    same &= attribute(t, view, &opt, fact, N, at);
    for (int i = 0; i < N; i++) /* one fact alone */
    {
        float *alone[4];

        memset(one, 0, 4 * len * sizeof *one);
        for (int j = 0; j < 4; j++)
            alone[j] = one + (size_t) j * len;
        same &= attribute(t, view, &opt, &fact[i], 1, alone);
        same &= !memcmp(one, at[first[i]], (size_t) (first[i + 1] - first[i]) * len * sizeof *one);
    }
    check(same, "%s: %d facts together give the bits of each alone", spec->name, N);

    float *other = calloc(4 * N * len, sizeof *other);
    k = 0;
    for (int i = 0; i < N; i++)
    {
        turned[i] = fact[N - 1 - i];
        for (int j = first[N - 1 - i]; j < first[N - i]; j++)
            turned_at[k++] = other + (size_t) j * len;
    }
    same = attribute(t, view, &opt, turned, N, turned_at);
    check(same && !memcmp(all, other, (size_t) k * len * sizeof *all),
          "%s: so they do in any order", spec->name);

    int32_t low = t->m.arch.n_layers - 1;
    opt.layer_min = low;
    memset(other, 0, 4 * N * len * sizeof *other);
    for (int i = 0; i < k; i++)
        turned_at[i] = other + (size_t) i * len;
    same = attribute(t, view, &opt, fact, N, turned_at);
    for (int i = 0; i < k; i++)
        for (size_t x = 0; x < len; x++)
            same &= other[(size_t) i * len + x] ==
                    (x / (size_t) t->m.arch.d_ff < (size_t) low ? 0 : all[(size_t) i * len + x]);
    check(same, "%s: a range of layers has the scores that they have among all", spec->name);
    free(all);
    free(one);
    free(other);
    kne_view_free(view);
    tiny_free(t);
}

static int
stop_at(void *ctx)
{
    return --*(int *) ctx <= 0;
}

static void
test_attribute_cancel(void)
{
    enum { N = 200 };
    tiny_model   *t = tiny_new(&tiny_specs[0], 5);
    int32_t       id[16];
    kne_tokens    fact[N];
    float        *at[N];
    kne_options   opt = options(t, 4, KNE_PATH_LAYER, KNE_QUAD_MIDPOINT, KNE_SCORE_LOGP);
    int           left = 3;
    kne_job_calls calls = {.ctx = &left, .yield = stop_at};
    kne_err       err;

    for (int i = 0; i < N; i++)
    {
        fact[i] = random_fact(&t->m.arch, id, 12, 11, 3);
        at[i] = scores[0];
    }
    check(kne_attribute(&t->m, be, NULL, &opt, fact, N, at, &calls, &err) == KNE_ERR_CANCELLED &&
          left == 0, "attribution stops between two passes");
    check(kne_attribute(&t->m, be, NULL, &opt, fact, 0, at, NULL, &err) == KNE_OK,
          "attribution of no facts is nothing");
    tiny_free(t);
}

/* ---- selection ---- */

/* The plain way: repeated search for the best of what is left. */
static void
slow_top(const float *score, int32_t from, int32_t to, int32_t n, int32_t *index)
{
    bool *taken = calloc((size_t) to + 1, 1);

    for (int32_t i = 0; i < n; i++)
    {
        int32_t best = -1;

        for (int32_t k = from; k < to; k++)
            if (!taken[k] && (best < 0 || score[k] > score[best] ||
                              (isnan(score[best]) && !isnan(score[k]))))
                best = k;
        taken[best] = true;
        index[i] = best;
    }
    free(taken);
}

static void
test_select(void)
{
    enum { L = 4, F = 53 };
    float    score[L * F];
    int32_t  got[L * F], want[L * F];
    uint64_t seed = 5, keys[L * F];
    bool     same = true;

    for (int turn = 0; turn < 60; turn++)
    {
        for (int i = 0; i < L * F; i++)
        {
            uint64_t r = kne_random_next(&seed);

            /* coarse, so that there are ties; NaN and infinities among them */
            score[i] = turn % 3 == 0 ? (float) (r % 5) : turn % 3 == 1 ? (float) (r >> 40) : 0;
            if (turn % 4 == 1 && r % 7 == 0)
                score[i] = NAN;
            if (turn % 4 == 2 && r % 9 == 0)
                score[i] = r % 2 ? INFINITY : -INFINITY;
        }
        int32_t lo = turn % L, hi = lo + (turn / L) % (L - lo);
        int32_t all = (hi - lo + 1) * F;
        int32_t n[4] = {1, all, all / 3, all - 1};

        for (int k = 0; k < 4; k++)
        {
            be->top(be->ctx, got, score + lo * F, L * F, keys, 1, all, n[k]);
            slow_top(score, lo * F, (hi + 1) * F, n[k], want);
            for (int i = 0; i < n[k]; i++)
                same &= got[i] + lo * F == want[i];
        }
    }
    check(same, "the top n: ties to the lower neuron, NaN last, one to all, every range of layers");
    for (int i = 0; i < L * F; i++)
        score[i] = NAN;
    be->top(be->ctx, got, score + F, L * F, keys, 1, 2 * F, 3);
    check(got[0] == 0 && got[1] == 1 && got[2] == 2, "NaN alone: the first neurons of the range");
}

static void
test_ensemble_size(void)
{
    kne_arch    a = {.n_layers = 32, .d_ff = 11008, .d_model = 4096, .gated = true};
    kne_options o;

    kne_options_defaults(&o);
    check(kne_ensemble_size(&a, &o) == 256, "4 MiB by default are 256 neurons of width 4096");
    o.matrices = KNE_MATRICES_ALL;
    check(kne_ensemble_size(&a, &o) == 85, "or 85 with their keys");
    o.max_bytes = 1024;
    check(kne_ensemble_size(&a, &o) == 1, "and one at least");
    kne_options_defaults(&o);
    o.max_bytes = 1 << 30;
    o.fraction = 0.02;
    o.max_neurons = 1 << 24;
    check(kne_ensemble_size(&a, &o) == 7045, "2 %% of 32 x 11008 neurons are 7045");
    o.max_neurons = 4096;
    check(kne_ensemble_size(&a, &o) == 4096, "but a cap is a cap");
    o.fraction = 1;
    o.max_neurons = 1 << 24;
    o.layer_min = o.layer_max = 31;
    check(kne_ensemble_size(&a, &o) == 11008, "no more than the layers have");
    o.layer_max = -1;
    check(kne_ensemble_size(&a, &o) == 11008, "-1 is the last layer");
    o.fraction = 1e-6;
    check(kne_ensemble_size(&a, &o) == 1, "at least one");
    o.select = KNE_SELECT_ALL;
    o.layer_min = 0;
    o.max_neurons = 5;
    check(kne_ensemble_size(&a, &o) == 32 * 11008, "all are all");
}

static void
test_attribution(void)
{
    test_quadrature();
    for (int i = 0; i < TINY_N_SPEC; i++)
    {
        test_identity(&tiny_specs[i], KNE_SCORE_LOGP, 0);
        test_identity(&tiny_specs[i], KNE_SCORE_P, i % 2 + 1);
        test_completeness(&tiny_specs[i], KNE_SCORE_P, i % 2);
        test_completeness(&tiny_specs[i], KNE_SCORE_LOGP, !(i % 2));
        test_batched(&tiny_specs[i], i % 2, i / 2 % 2);
    }
    test_attribute_cancel();
    test_select();
    test_ensemble_size();
}

#endif
