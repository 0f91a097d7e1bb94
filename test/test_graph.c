/*
 * test_graph.c - the model graph on tiny random models of every block kind:
 * logits and gradients against an independent forward pass in double, and the
 * identities that editing rests on, bit for bit where the graph promises bits.
 */
#include "kne_graph_impl.h"
#include "kne_pack.h"
#include "kne_test.h"
#include "tiny_model.h"

enum { MAX_ROWS = 96, MAX_LAYERS = 3, MAX_F = 50, MAX_D = 24, MAX_V = 64, N_EDIT = 4 };

/* A packed batch and what the loss wants of it: coef * log p(target) summed over the out rows. */
typedef struct packed
{
    kne_batch b;
    kne_seq   seq[8];
    int32_t   id[MAX_ROWS], pos[MAX_ROWS], out[MAX_ROWS], target[MAX_ROWS];
    float     coef[MAX_ROWS];
} packed;

/* What the visitor saw of each layer. */
typedef struct seen
{
    bool  have[MAX_LAYERS];
    float h[MAX_LAYERS][MAX_ROWS * MAX_D], dy[MAX_LAYERS][MAX_ROWS * MAX_D];
    float a[MAX_LAYERS][MAX_ROWS * MAX_F], u[MAX_LAYERS][MAX_ROWS * MAX_F];
    float dgate[MAX_LAYERS][MAX_ROWS * MAX_F], dup[MAX_LAYERS][MAX_ROWS * MAX_F];
    const kne_arch *arch;
} seen;

/* An overlay of N_EDIT neurons in every layer but the second. */
typedef struct edits
{
    kne_overlay       ov;
    kne_overlay_layer layer[MAX_LAYERS];
    int32_t           neuron[MAX_LAYERS][N_EDIT];
    float             diff[MAX_LAYERS][N_EDIT * MAX_D];
    float             gate[MAX_LAYERS][N_EDIT * MAX_D], up[MAX_LAYERS][N_EDIT * MAX_D];
} edits;

static kne_backend *be;
static seen         seen1, seen2;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

/* Append a sequence of random ids; every step'th row from its first out row is an out row. */
static void
add_sequence(packed *p, const kne_arch *a, int32_t len, int32_t first_out, int32_t step,
             uint64_t *seed)
{
    int32_t q0 = p->b.n;

    p->seq[p->b.n_seq++] = (kne_seq) {.q0 = q0, .q_len = len, .kv0 = q0, .kv_len = len};
    for (int32_t i = 0; i < len; i++)
    {
        p->id[q0 + i] = (int32_t) (kne_random_next(seed) % (uint64_t) a->vocab_size);
        p->pos[q0 + i] = i;
        if (i >= first_out && (i - first_out) % step == 0)
        {
            p->target[p->b.n_out] = (int32_t) (kne_random_next(seed) % (uint64_t) a->vocab_size);
            p->coef[p->b.n_out] = (float) (1 + 0.5 * tiny_uniform(seed));
            p->out[p->b.n_out++] = q0 + i;
        }
    }
    p->b.n += len;
    p->b.id = p->id;
    p->b.pos = p->pos;
    p->b.seq = p->seq;
    p->b.out_row = p->out;
}

/* Sequence i of a batch as a batch of its own. */
static void
single(packed *p, const packed *all, int i)
{
    const kne_seq *q = &all->seq[i];

    *p = (packed) {0};
    for (int32_t r = 0; r < q->q_len; r++)
    {
        p->id[r] = all->id[q->q0 + r];
        p->pos[r] = r;
    }
    for (int32_t o = 0; o < all->b.n_out; o++)
        if (all->out[o] >= q->q0 && all->out[o] < q->q0 + q->q_len)
        {
            p->target[p->b.n_out] = all->target[o];
            p->coef[p->b.n_out] = all->coef[o];
            p->out[p->b.n_out++] = all->out[o] - q->q0;
        }
    p->seq[0] = (kne_seq) {.q_len = q->q_len, .kv_len = q->q_len};
    p->b = (kne_batch) {
        .n = q->q_len, .n_seq = 1, .n_out = p->b.n_out, .id = p->id, .pos = p->pos, .seq = p->seq,
        .out_row = p->out,
    };
}

static void
make_edits(edits *e, const tiny_model *t, double scale, uint64_t seed)
{
    const kne_arch *a = &t->m.arch;

    *e = (edits) {.ov.layer = e->layer};
    for (int32_t l = 0; l < a->n_layers; l++)
    {
        for (int32_t i = 0; i < N_EDIT; i++)
            e->neuron[l][i] = (a->d_ff - 1) * i / (N_EDIT - 1) - (i == 1 ? l : 0);
        for (int32_t i = 0; i < N_EDIT; i++)
            for (int32_t c = 0; c < a->d_model; c++)
            {
                int at = i * a->d_model + c, w = e->neuron[l][i] * a->d_model + c;

                e->diff[l][at] = (float) (scale * tiny_uniform(&seed));
                e->up[l][at] = (float) (t->layer[l].up[w] + scale * tiny_uniform(&seed));
                if (a->gated)
                    e->gate[l][at] = (float) (t->layer[l].gate[w] + scale * tiny_uniform(&seed));
            }
        if (l != 1)
            e->layer[l] = (kne_overlay_layer) {
                .n = N_EDIT, .neuron = e->neuron[l], .value_diff = e->diff[l],
                .gate = a->gated ? e->gate[l] : NULL, .up = e->up[l],
            };
    }
}

/* The reference's weights become the overlay's effective ones. */
static void
apply_edits(tiny_model *t, const edits *e)
{
    const kne_arch *a = &t->m.arch;

    for (int32_t l = 0; l < a->n_layers; l++)
        for (int32_t i = 0; i < e->layer[l].n; i++)
            for (int32_t c = 0; c < a->d_model; c++)
            {
                int at = i * a->d_model + c, k = e->neuron[l][i];

                t->layer[l].down[c * a->d_ff + k] += e->diff[l][at];
                t->layer[l].up[k * a->d_model + c] = e->up[l][at];
                if (a->gated)
                    t->layer[l].gate[k * a->d_model + c] = e->gate[l][at];
            }
}

static void
look(void *ctx, const kne_ffn_grad *g)
{
    seen  *s = ctx;
    size_t nd = (size_t) (g->n * s->arch->d_model) * sizeof(float);
    size_t nf = (size_t) (g->n * s->arch->d_ff) * sizeof(float);

    s->have[g->layer] = true;
    memcpy(s->h[g->layer], g->h, nd);
    memcpy(s->dy[g->layer], g->dy, nd);
    memcpy(s->a[g->layer], g->a, nf);
    memcpy(s->u[g->layer], g->u, nf);
    memcpy(s->dup[g->layer], g->dup, nf);
    if (g->dgate)
        memcpy(s->dgate[g->layer], g->dgate, nf);
}

static bool
run_forward(const tiny_model *t, kne_work *w, const packed *p, const kne_overlay *ov,
            const float *const *alpha, int first)
{
    kne_err err;

    return ok(kne_forward(&t->m, be, w, &p->b, ov, alpha, first, &err), &err);
}

/* logp of the out rows' targets, and the gradient of the loss in w->dlogits */
static void
run_loss(const tiny_model *t, kne_work *w, const packed *p, float *logp)
{
    int32_t best[MAX_ROWS];

    be->logprob(be->ctx, logp, best, w->dlogits, w->logits, p->target, p->coef, p->b.n_out,
                t->m.arch.vocab_size);
}

static bool
run_backward(const tiny_model *t, kne_work *w, const packed *p, const kne_overlay *ov,
             const float *const *alpha, int last, seen *s)
{
    kne_err err;

    memset(s, 0, sizeof *s);
    s->arch = &t->m.arch;
    return ok(kne_backward(&t->m, be, w, &p->b, ov, alpha, last, look, s, &err), &err);
}

static kne_work *
new_work(const tiny_model *t, bool keep)
{
    kne_work      *w;
    kne_err        err;
    kne_work_shape shape = {
        .max_n = MAX_ROWS, .max_out = MAX_ROWS, .max_overlay = N_EDIT, .keep = keep,
    };

    return ok(kne_work_new(&t->m, shape, &w, &err), &err) ? w : NULL;
}

static double
nmse(const float *x, const double *ref, int64_t n)
{
    double num = 0, den = 0;

    for (int64_t i = 0; i < n; i++)
    {
        num += (x[i] - ref[i]) * (x[i] - ref[i]);
        den += ref[i] * ref[i];
    }
    return num / (den + 1e-300);
}

static double
nmse_f(const float *x, const float *ref, int64_t n)
{
    double num = 0, den = 0;

    for (int64_t i = 0; i < n; i++)
    {
        num += ((double) x[i] - ref[i]) * ((double) x[i] - ref[i]);
        den += (double) ref[i] * ref[i];
    }
    return num / (den + 1e-300);
}

/* Logits of the out rows by the reference; alpha rows are those of the batch. */
static void
ref_logits(const tiny_model *t, const packed *p, const float *const *alpha, double *out)
{
    static double all[MAX_ROWS * MAX_V];
    int           v = t->m.arch.vocab_size;

    for (int i = 0, o = 0; i < p->b.n_seq; i++)
    {
        const kne_seq *q = &p->seq[i];
        const float   *mine[MAX_LAYERS] = {0};

        for (int l = 0; alpha && l < t->m.arch.n_layers; l++)
            mine[l] = alpha[l] ? alpha[l] + q->q0 : NULL;
        ref_forward(t, all, p->id + q->q0, q->q_len, mine);
        for (; o < p->b.n_out && p->out[o] < q->q0 + q->q_len; o++)
            memcpy(out + (int64_t) o * v, all + (int64_t) (p->out[o] - q->q0) * v,
                   (size_t) v * sizeof *out);
    }
}

static double
ref_logp(const double *logits, int v, int target)
{
    double sum = 0;

    for (int i = 0; i < v; i++)
        sum += exp(logits[i] - logits[target]);
    return -log(sum);
}

static double
ref_loss(const tiny_model *t, const packed *p, const float *const *alpha)
{
    static double logits[MAX_ROWS * MAX_V];
    double        loss = 0;
    int           v = t->m.arch.vocab_size;

    ref_logits(t, p, alpha, logits);
    for (int o = 0; o < p->b.n_out; o++)
        loss += p->coef[o] * ref_logp(logits + (int64_t) o * v, v, p->target[o]);
    return loss;
}

/* d loss / d (w + x dir) at x = 0, to fourth order */
static double
directional(const tiny_model *t, const packed *p, const float *const *alpha, double *w,
            const double *dir, int64_t n)
{
    const double at[4] = {1, -1, 2, -2}, weight[4] = {8, -8, -1, 1}, eps = 2e-4;
    double       sum = 0, *base = malloc((size_t) n * sizeof *base);

    memcpy(base, w, (size_t) n * sizeof *base);
    for (int k = 0; k < 4; k++)
    {
        for (int64_t i = 0; i < n; i++)
            w[i] = base[i] + at[k] * eps * dir[i];
        sum += weight[k] * ref_loss(t, p, alpha);
    }
    memcpy(w, base, (size_t) n * sizeof *base);
    free(base);
    return sum / (12 * eps);
}

/*
 * The gradient of one FFN matrix, from what the visitor saw, against finite
 * differences along random directions: over the whole matrix and within the
 * edited neurons. Returns the largest error relative to the gradient's norm.
 */
static double
gradient_error(const tiny_model *t, const packed *p, const float *const *alpha, const seen *s,
               int l, int which, const kne_overlay_layer *only, uint64_t *seed)
{
    const kne_arch   *a = &t->m.arch;
    const tiny_layer *r = &t->layer[l];
    int               d = a->d_model, f = a->d_ff;
    double           *w = which == 0 ? r->down : which == 1 ? r->up : r->gate;
    static double     grad[MAX_D * MAX_F], dir[MAX_D * MAX_F];
    double            worst = 0, norm = 0;

    memset(grad, 0, sizeof grad);
    for (int row = 0; row < p->b.n; row++)
        for (int k = 0; k < f; k++)
            for (int c = 0; c < d; c++)
            {
                double al = alpha && alpha[l] ? alpha[l][row] : 1;

                if (which == 0)
                    grad[c * f + k] += al * s->a[l][row * f + k] * s->dy[l][row * d + c];
                else
                    grad[k * d + c] += (which == 1 ? s->dup : s->dgate)[l][row * f + k] *
                                       s->h[l][row * d + c];
            }
    for (int trial = 0; trial < 3; trial++)
    {
        double mine = 0, fd;

        norm = 0;
        for (int k = 0; k < f; k++)
        {
            bool in = !only || trial == 0;

            for (int i = 0; only && i < only->n; i++)
                in |= only->neuron[i] == k;
            for (int c = 0; c < d; c++)
            {
                int at = which == 0 ? c * f + k : k * d + c;

                dir[at] = in ? tiny_uniform(seed) : 0;
                mine += dir[at] * grad[at];
                norm += in ? grad[at] * grad[at] : 0;
            }
        }
        fd = directional(t, p, alpha, w, dir, (int64_t) d * f);
        worst = fmax(worst, fabs(fd - mine) / (sqrt(norm) + 1e-12));
    }
    return worst;
}

/* Logits and all FFN gradients of one model; with = overlay and per-row factors on. */
static void
test_gradients(const tiny_spec *spec, bool with)
{
    tiny_model   *t = tiny_new(spec, 11);
    kne_work     *w = new_work(t, true);
    packed        p = {0};
    edits         e;
    uint64_t      seed = 5;
    static float  factor[MAX_LAYERS][MAX_ROWS];
    const float  *alpha_l[MAX_LAYERS] = {factor[0], NULL, factor[2]};
    static double expect[MAX_ROWS * MAX_V];
    float         logp[MAX_ROWS];
    double        worst = 0;
    const char   *how = with ? "overlay and alpha" : "plain";

    add_sequence(&p, &t->m.arch, 7, 3, 2, &seed);
    add_sequence(&p, &t->m.arch, 1, 0, 1, &seed);
    add_sequence(&p, &t->m.arch, 6, 4, 1, &seed);
    for (int i = 0; i < MAX_LAYERS * MAX_ROWS; i++)
        factor[i / MAX_ROWS][i % MAX_ROWS] = (float) (0.8 + 0.5 * tiny_uniform(&seed));
    make_edits(&e, t, 0.4, 99);
    if (with)
        apply_edits(t, &e);
    const kne_overlay  *ov = with ? &e.ov : NULL;
    const float *const *alpha = with ? alpha_l : NULL;

    if (!w || !run_forward(t, w, &p, ov, alpha, 0))
    {
        check(0, "%s, %s: forward", spec->name, how);
        goto out;
    }
    ref_logits(t, &p, alpha, expect);
    double err = nmse(w->logits, expect, (int64_t) p.b.n_out * t->m.arch.vocab_size);

    check(err <= 1e-10, "%s, %s: logits agree with double (NMSE %.1e)", spec->name, how, err);
    run_loss(t, w, &p, logp);
    if (!run_backward(t, w, &p, ov, alpha, 0, &seen1))
        goto out;
    for (int l = 0; l < t->m.arch.n_layers; l++)
        for (int which = 0; which < 2 + t->m.arch.gated; which++)
        {
            const kne_overlay_layer *only = with ? &e.layer[l] : NULL;
            double x = gradient_error(t, &p, alpha, &seen1, l, which, only, &seed);

            if (x > 2e-5)
                printf("# layer %d matrix %d: %g\n", l, which, x);
            worst = fmax(worst, x);
        }
    check(worst <= 2e-5, "%s, %s: gradients of values and keys agree with differences (%.1e)",
          spec->name, how, worst);
out:
    kne_work_free(w);
    tiny_free(t);
}

/* KNE.md section 2: <v, dP/dv> = sum over positions of a_k u_k. */
static void
test_identity(const tiny_spec *spec)
{
    tiny_model *t = tiny_new(spec, 21);
    kne_work   *w = new_work(t, true);
    packed      p = {0};
    uint64_t    seed = 8;
    float       logp[1];
    double      worst = 0, size = 0;
    int         d = t->m.arch.d_model, f = t->m.arch.d_ff;

    add_sequence(&p, &t->m.arch, 8, 7, 1, &seed);
    p.coef[0] = 1;
    if (!w || !run_forward(t, w, &p, NULL, NULL, 0))
        goto out;
    run_loss(t, w, &p, logp);
    p.coef[0] = expf(logp[0]); /* P dlog P = dP */
    run_loss(t, w, &p, logp);
    run_backward(t, w, &p, NULL, NULL, 0, &seen1);
    for (int l = 0; l < t->m.arch.n_layers; l++)
        for (int k = 0; k < f; k++)
            for (int r = 0; r < p.b.n; r++)
                size += fabs((double) seen1.a[l][r * f + k] * seen1.u[l][r * f + k]);
    size /= t->m.arch.n_layers * f;
    p.coef[0] = 1;
    for (int l = 0; l < t->m.arch.n_layers; l++)
        for (int k = l; k < f; k += 5)
        {
            static double dir[MAX_D * MAX_F];
            double        sum = 0, fd;

            memset(dir, 0, sizeof dir);
            for (int c = 0; c < d; c++)
                dir[c * f + k] = t->layer[l].down[c * f + k];
            for (int r = 0; r < p.b.n; r++)
                sum += (double) seen1.a[l][r * f + k] * seen1.u[l][r * f + k];
            fd = directional(t, &p, NULL, t->layer[l].down, dir, (int64_t) d * f) * exp(logp[0]);
            worst = fmax(worst, fabs(fd - sum) / size);
        }
out:
    check(size > 0 && worst <= 1e-4, "%s: <v, dP/dv> = sum of a u (%.1e)", spec->name, worst);
    kne_work_free(w);
    tiny_free(t);
}

/*
 * Summed over all neurons, attribution along the joint path is P(1) - P(0).
 * Two Gauss points a cell: at 128 points the rule's own error is out of sight.
 */
static void
test_completeness(const tiny_spec *spec)
{
    enum { LEN = 5, ROUNDS = 16, POINTS = 8 * ROUNDS };
    tiny_model   *t = tiny_new(spec, 31);
    kne_arch     *a = &t->m.arch;
    kne_work     *w = new_work(t, true);
    packed        one = {0}, p = {0};
    static float  factor[MAX_ROWS];
    const float  *alpha[MAX_LAYERS] = {factor, factor, factor};
    float         logp[MAX_ROWS];
    double        sum = 0, p0, p1;
    uint64_t      seed = 9;

    add_sequence(&one, a, LEN, LEN - 1, 1, &seed);
    one.coef[0] = 1;
    memset(factor, 0, sizeof factor);
    p0 = exp(ref_loss(t, &one, alpha));
    p1 = exp(ref_loss(t, &one, NULL));
    for (int i = 0; i < 8; i++) /* eight times the same sequence */
    {
        seed = 9;
        add_sequence(&p, a, LEN, LEN - 1, 1, &seed);
    }
    for (int round = 0; w && round < ROUNDS; round++)
    {
        for (int i = 0; i < p.b.n; i++)
        {
            int point = round * 8 + i / LEN;

            factor[i] = (float) ((point / 2 + 0.5 + (point % 2 - 0.5) / sqrt(3)) / (POINTS / 2));
        }
        run_forward(t, w, &p, NULL, alpha, 0);
        run_loss(t, w, &p, logp);
        for (int i = 0; i < p.b.n_out; i++)
            p.coef[i] = expf(logp[i]); /* P dlog P = dP */
        run_loss(t, w, &p, logp);
        run_backward(t, w, &p, NULL, alpha, 0, &seen1);
        for (int l = 0; l < a->n_layers; l++)
            for (int i = 0; i < p.b.n * a->d_ff; i++)
                sum += (double) seen1.a[l][i] * seen1.u[l][i] / POINTS;
    }
    check(fabs(sum - (p1 - p0)) <= 1e-4 * fmax(p0, p1),
          "%s: attribution is complete: %.8f, P(1) - P(0) = %.8f", spec->name, sum, p1 - p0);
    kne_work_free(w);
    tiny_free(t);
}

/* Everything that must not change a bit. */
static void
test_bits(const tiny_spec *spec)
{
    tiny_model   *t = tiny_new(spec, 41);
    kne_arch     *a = &t->m.arch;
    kne_work     *w = new_work(t, true), *lean = new_work(t, false);
    packed        p = {0}, one;
    edits         e, zero;
    uint64_t      seed = 13;
    static float  base[MAX_ROWS * MAX_V], edited[MAX_ROWS * MAX_V], ones[MAX_ROWS];
    const float  *alpha[MAX_LAYERS] = {ones, ones, ones};
    float         logp[MAX_ROWS];
    bool          same = true;

    for (int i = 0; i < MAX_ROWS; i++)
        ones[i] = 1;
    add_sequence(&p, a, 9, 2, 3, &seed);
    add_sequence(&p, a, 3, 2, 1, &seed);
    add_sequence(&p, a, 17, 5, 1, &seed);
    add_sequence(&p, a, 1, 0, 1, &seed);
    size_t size = (size_t) (p.b.n_out * a->vocab_size) * sizeof(float);

    run_forward(t, w, &p, NULL, NULL, 0);
    memcpy(base, w->logits, size);
    run_forward(t, lean, &p, NULL, NULL, 0);
    check(!memcmp(base, lean->logits, size), "%s: keeping layers changes no bit", spec->name);

    make_edits(&zero, t, 0, 1);
    for (int l = 0; l < a->n_layers; l++)
        zero.layer[l].gate = zero.layer[l].up = NULL;
    run_forward(t, lean, &p, &zero.ov, NULL, 0);
    check(!memcmp(base, lean->logits, size), "%s: a zero delta changes no bit", spec->name);
    make_edits(&zero, t, 0, 1);
    run_forward(t, lean, &p, &zero.ov, NULL, 0);
    double err = nmse_f(lean->logits, base, p.b.n_out * a->vocab_size);
    check(err <= 1e-12, "%s: keys equal to the base's change nothing (NMSE %.1e)", spec->name, err);
    run_forward(t, lean, &p, NULL, alpha, 0);
    err = nmse_f(lean->logits, base, p.b.n_out * a->vocab_size);
    check(err <= 1e-12, "%s: alpha of 1 changes nothing (NMSE %.1e)", spec->name, err);

    make_edits(&e, t, 0.4, 7);
    run_forward(t, w, &p, &e.ov, NULL, 0);
    memcpy(edited, w->logits, size);
    check(memcmp(base, edited, size), "%s: an overlay changes logits", spec->name);
    run_forward(t, w, &p, NULL, NULL, 0);
    check(!memcmp(base, w->logits, size), "%s: applied and removed, bit for bit", spec->name);

    /* frozen prefix: edits from the last layer on, starting there */
    int last = a->n_layers - 1;

    for (int l = 0; l < last; l++)
        e.layer[l].n = 0;
    run_forward(t, lean, &p, &e.ov, NULL, 0);
    run_forward(t, w, &p, NULL, NULL, 0);
    run_forward(t, w, &p, &e.ov, NULL, last);
    check(!memcmp(lean->logits, w->logits, size), "%s: a frozen prefix changes no bit", spec->name);

    run_loss(t, w, &p, logp);
    run_backward(t, w, &p, &e.ov, NULL, 0, &seen1);
    run_backward(t, w, &p, &e.ov, NULL, last, &seen2);
    size_t nf = (size_t) (p.b.n * a->d_ff) * sizeof(float);
    size_t nd = (size_t) (p.b.n * a->d_model) * sizeof(float);

    check(seen1.have[0] && !seen2.have[last - 1] && !memcmp(seen1.u[last], seen2.u[last], nf) &&
          !memcmp(seen1.dup[last], seen2.dup[last], nf) &&
          !memcmp(seen1.dy[last], seen2.dy[last], nd),
          "%s: stopping early changes no bit", spec->name);

    /* a batch against its sequences one by one, forward and backward */
    make_edits(&e, t, 0.4, 7);
    run_forward(t, w, &p, &e.ov, NULL, 0);
    memcpy(edited, w->logits, size);
    run_loss(t, w, &p, logp);
    run_backward(t, w, &p, &e.ov, NULL, 0, &seen1);
    for (int i = 0, o = 0; i < p.b.n_seq; i++)
    {
        single(&one, &p, i);
        run_forward(t, w, &one, &e.ov, NULL, 0);
        same &= !memcmp(edited + o * a->vocab_size, w->logits,
                        (size_t) (one.b.n_out * a->vocab_size) * sizeof(float));
        run_loss(t, w, &one, logp);
        run_backward(t, w, &one, &e.ov, NULL, 0, &seen2);
        for (int l = 0; l < a->n_layers; l++)
            same &= !memcmp(seen1.u[l] + p.seq[i].q0 * a->d_ff, seen2.u[l],
                            (size_t) (one.b.n * a->d_ff) * sizeof(float)) &&
                    !memcmp(seen1.dup[l] + p.seq[i].q0 * a->d_ff, seen2.dup[l],
                            (size_t) (one.b.n * a->d_ff) * sizeof(float));
        o += one.b.n_out;
    }
    check(same, "%s: a batch gives what its sequences give alone, bit for bit", spec->name);
    kne_work_free(w);
    kne_work_free(lean);
    tiny_free(t);
}

/* Sequences that share rows against the same ones that do not: logits in bits, gradients of the rows they share summed. */
static void
test_shared(const tiny_spec *spec)
{
    static const int32_t fact[5][8] = {
        {3, 1, 4, 1, 5, 9, 2, 6}, {3, 1, 4, 8, 5, 9, 2}, {3, 1, 4, 1, 5, 7, 2}, {2, 1, 4, 1}, {3, 1, 4, 1, 5, 9, 2},
    };
    static const int32_t len[5] = {8, 7, 7, 4, 7}, prompt[5] = {6, 5, 6, 2, 5};
    static float         logits[20 * MAX_V], sum[MAX_ROWS * MAX_F];
    tiny_model          *t = tiny_new(spec, 41);
    const kne_arch      *a = &t->m.arch;
    kne_work            *w = NULL;
    kne_pack             pack[2] = {0};
    kne_arena            arena = {0};
    edits                e;
    kne_err              err;
    seen                *saw[2] = {&seen1, &seen2};
    bool                 fine = true;

    for (int turn = 0; turn < 2; turn++)
    {
        kne_pack_layout(&pack[0], &arena, 40, 6, 20);
        kne_pack_layout_shared(&pack[1], &arena, 40, 6, 20, 40);
        if (turn == 0)
            fine &= ok(kne_arena_commit(&arena, &err), &err);
    }
    fine = fine && ok(kne_work_new_shared(&t->m, (kne_work_shape) {40, 20, N_EDIT, true}, 40, &w, &err), &err);
    make_edits(&e, t, 0.4, 7);
    for (int which = 0; which < 2 && fine; which++)
    {
        for (int i = 0; i < 5; i++)
        {
            if (i == 4) /* what it has in common with the first is another group's */
                kne_pack_group(&pack[which]);
            kne_pack_add(&pack[which], fact[i], len[i], prompt[i]);
        }
        kne_pack_share(&pack[which]);
        fine &= ok(kne_forward(&t->m, be, w, &pack[which].b, &e.ov, NULL, 0, &err), &err);
        if (which == 0)
            memcpy(logits, w->logits, (size_t) (pack[0].b.n_out * a->vocab_size) * sizeof(float));
        else
            fine &= !memcmp(logits, w->logits, (size_t) (pack[1].b.n_out * a->vocab_size) * sizeof(float));
        for (int i = 0; i < pack[which].b.n_out * a->vocab_size; i++)
            w->dlogits[i] = 0.01f * (float) (i % 17 - 8);
        memset(saw[which], 0, sizeof *saw[which]);
        saw[which]->arch = a;
        fine &= ok(kne_backward(&t->m, be, w, &pack[which].b, &e.ov, NULL, 0, look, saw[which], &err), &err);
    }
    check(fine && pack[0].b.n == 28 && pack[0].b.n_place == 0 && pack[1].b.n == 20 && pack[1].b.n_place == 28 &&
          !memcmp(pack[0].target, pack[1].target, (size_t) pack[0].b.n_out * sizeof(int32_t)),
          "%s: rows in common are there once, and no logit changes a bit", spec->name);
    for (int32_t l = 0; l < a->n_layers && fine; l++)
    {
        memset(sum, 0, sizeof sum);
        for (int i = 0; i < 28; i++)
            for (int32_t k = 0; k < a->d_ff; k++)
                sum[pack[1].row[i] * a->d_ff + k] += seen1.dup[l][i * a->d_ff + k];
        double far = nmse_f(seen2.dup[l], sum, 20 * a->d_ff);

        check(seen2.have[l] && far <= 1e-11, "%s: gradients of layer %d come together in shared rows (NMSE %.1e)",
              spec->name, l, far);
    }
    kne_work_free(w);
    kne_arena_free(&arena);
    tiny_free(t);
}

static int
argmax(const float *x, int n)
{
    int best = 0;

    for (int i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    return best;
}

static int
stop_at_third(void *ctx)
{
    return ++*(int *) ctx == 3;
}

/* Decoding with the cache against passes over the whole sequence. */
static void
test_generate(const tiny_spec *spec)
{
    tiny_model *t = tiny_new(spec, 51);
    kne_arch   *a = &t->m.arch;
    kne_work   *w = new_work(t, false), *cached = NULL;
    packed      p = {0}, row;
    edits       e;
    kne_ids     out = {0};
    kne_err     err;
    uint64_t    seed = 17;
    double      worst = 0;
    bool        same = true;
    int32_t     n_prompt = 5;

    make_edits(&e, t, 0.3, 3);
    add_sequence(&p, a, n_prompt, n_prompt - 1, 1, &seed);
    same = ok(kne_generate(&t->m, be, &e.ov, p.id, n_prompt, INT32_MAX, NULL, NULL, &out, &err),
              &err);
    check(same && out.n == a->n_ctx - n_prompt + 1, "%s: generation fills the context: %d ids",
          spec->name, out.n);

    kne_work_shape shape = {.max_n = n_prompt, .max_out = 1, .max_overlay = N_EDIT};

    same &= ok(kne_work_new_cached(&t->m, shape, a->n_ctx, 0, &cached, &err), &err);
    for (int32_t i = 0; same && i < out.n; i++)
    {
        /* one more row over the cache, and all rows anew */
        int32_t past = i ? p.b.n - 1 : 0;

        row = p;
        if (i)
        {
            row.id[0] = p.id[past];
            row.pos[0] = past;
        }
        row.b.n = p.b.n - past;
        row.seq[0] = (kne_seq) {.q_len = row.b.n, .kv_len = p.b.n};
        row.out[0] = row.b.n - 1;
        row.b.id = row.id;
        row.b.pos = row.pos;
        row.b.seq = row.seq;
        row.b.out_row = row.out;
        same &= ok(kne_forward_cached(&t->m, be, cached, &row.b, &e.ov, NULL, 0, past, &err), &err);
        same &= run_forward(t, w, &p, &e.ov, NULL, 0);
        worst = fmax(worst, nmse_f(cached->logits, w->logits, a->vocab_size));
        same &= argmax(w->logits, a->vocab_size) == out.id[i];
        if (p.b.n == a->n_ctx)
            break;
        p.id[p.b.n] = out.id[i];
        p.pos[p.b.n] = p.b.n;
        p.out[0] = p.b.n++;
        p.seq[0].q_len = p.seq[0].kv_len = p.b.n;
    }
    check(same && worst <= 1e-10, "%s: decoding with the cache = whole passes (NMSE %.1e)",
          spec->name, worst);

    /* stops and refusals */
    kne_ids part = {0};
    int32_t first = 0, calls = 0;

    a->eos_id = out.id[4];
    while (out.id[first] != a->eos_id)
        first++;
    kne_generate(&t->m, be, &e.ov, p.id, n_prompt, 20, NULL, NULL, &part, &err);
    check(part.n == first && !memcmp(part.id, out.id, (size_t) first * sizeof *out.id),
          "%s: the end-of-text id ends it and is left out", spec->name);
    a->eos_id = -1;
    part.n = 0;
    check(kne_generate(&t->m, be, &e.ov, p.id, n_prompt, 20, stop_at_third, &calls, &part, &err) ==
          KNE_ERR_CANCELLED && part.n == 2, "%s: cancelled between tokens", spec->name);
    kne_status st = kne_generate(&t->m, be, NULL, p.id, a->n_ctx + 1, 1, NULL, NULL, &part, &err);

    check(st == KNE_ERR_LIMIT && err.detail[0], "%s: a prompt over the context is refused",
          spec->name);
    part.n = 0;
    check(kne_generate(&t->m, be, NULL, p.id, a->n_ctx, 9, NULL, NULL, &part, &err) == KNE_OK &&
          part.n == 1, "%s: a prompt that fills the context gives one id", spec->name);
    check(kne_generate(&t->m, be, NULL, p.id, 0, 1, NULL, NULL, &part, &err) == KNE_ERR_INVALID,
          "%s: an empty prompt is refused", spec->name);
    p.id[0] = a->vocab_size;
    check(kne_generate(&t->m, be, NULL, p.id, 1, 1, NULL, NULL, &part, &err) == KNE_ERR_INVALID,
          "%s: an unknown id is refused", spec->name);
    kne_ids_free(&part);
    kne_ids_free(&out);
    kne_work_free(cached);
    kne_work_free(w);
    tiny_free(t);
}

/* Sizes that do not fit are refused, not run. */
static void
test_refusals(void)
{
    tiny_model    *t = tiny_new(&tiny_specs[0], 61);
    kne_work      *w = NULL, *lean = new_work(t, false);
    kne_work_shape shape = {.max_n = 8, .max_out = 1, .max_overlay = 2, .keep = true};
    kne_err        err;
    packed         p = {0}, q;
    edits          e;
    uint64_t       seed = 1;

    kne_work_new(&t->m, shape, &w, &err);
    make_edits(&e, t, 0.1, 1);
    add_sequence(&p, &t->m.arch, 8, 7, 1, &seed);
    check(kne_forward(&t->m, be, w, &p.b, &e.ov, NULL, 0, &err) == KNE_ERR_INTERNAL,
          "an overlay over the workspace is refused");
    check(kne_forward(&t->m, be, w, &p.b, NULL, NULL, 3, &err) == KNE_ERR_INTERNAL &&
          kne_forward(&t->m, be, w, &p.b, NULL, NULL, -1, &err) == KNE_ERR_INTERNAL &&
          kne_forward(&t->m, be, lean, &p.b, NULL, NULL, 1, &err) == KNE_ERR_INTERNAL,
          "a first layer that is not there is refused");
    check(kne_backward(&t->m, be, w, &p.b, NULL, NULL, 3, NULL, NULL, &err) == KNE_ERR_INTERNAL &&
          kne_backward(&t->m, be, lean, &p.b, NULL, NULL, 0, NULL, NULL, &err) == KNE_ERR_INTERNAL,
          "a backward pass that cannot be is refused");
    q = p;
    q.seq[0].kv_len = 9;
    q.b.seq = q.seq;
    check(kne_forward(&t->m, be, w, &q.b, NULL, NULL, 0, &err) == KNE_ERR_INTERNAL,
          "a sequence over the batch is refused");
    q.b = p.b;
    q.b.out_row = q.out;
    q.out[0] = 8;
    check(kne_forward(&t->m, be, w, &q.b, NULL, NULL, 0, &err) == KNE_ERR_INTERNAL,
          "an out row over the batch is refused");
    add_sequence(&p, &t->m.arch, 1, 0, 1, &seed);
    check(kne_forward(&t->m, be, w, &p.b, NULL, NULL, 0, &err) == KNE_ERR_INTERNAL,
          "a batch over the workspace is refused");

    kne_work *none, *cached = NULL;
    int32_t   key[3] = {0, 1, 2};

    kne_work_new_cached(&t->m, (kne_work_shape) {.max_n = 1, .max_out = 1}, 4, 3, &cached, &err);
    q = (packed) {0};
    add_sequence(&q, &t->m.arch, 1, 0, 1, &seed);
    q.b.key = key;
    q.b.n_key = q.seq[0].kv_len = 3;
    check(kne_forward_cached(&t->m, be, cached, &q.b, NULL, NULL, 0, 2, &err) == KNE_OK &&
          kne_forward_cached(&t->m, be, cached, &q.b, NULL, NULL, 0, 4, &err) == KNE_ERR_INTERNAL,
          "keys from a cache, and rows over it refused");
    q.b.n_key = 2;
    check(kne_forward_cached(&t->m, be, cached, &q.b, NULL, NULL, 0, 2, &err) == KNE_ERR_INTERNAL,
          "a sequence over its keys is refused");
    q.b.n_key = 4;
    check(kne_forward_cached(&t->m, be, cached, &q.b, NULL, NULL, 0, 2, &err) == KNE_ERR_INTERNAL,
          "keys over the workspace are refused");
    kne_work_free(cached);
    check(kne_work_new(&t->m, (kne_work_shape) {0}, &none, &err) == KNE_ERR_INTERNAL && !none,
          "a workspace without rows is refused");
    kne_work_free(lean);
    kne_work_free(w);
    tiny_free(t);
}

int
main(void)
{
    kne_err err;

    if (!ok(kne_cpu_backend_new(2, NULL, &be, &err), &err))
        return 1;
    for (int i = 0; i < TINY_N_SPEC; i++)
    {
        test_gradients(&tiny_specs[i], false);
        test_gradients(&tiny_specs[i], true);
        test_identity(&tiny_specs[i]);
        test_completeness(&tiny_specs[i]);
        test_bits(&tiny_specs[i]);
        test_shared(&tiny_specs[i]);
        test_generate(&tiny_specs[i]);
    }
    test_refusals();
    kne_cpu_backend_free(be);
    return kne_test_done();
}
