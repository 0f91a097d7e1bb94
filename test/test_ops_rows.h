/*
 * test_ops_rows.h - ops whose result is one row for one row (part of
 * test_ops.c): a registry of cases, each run as float, as double, and against a
 * naive reference where it is a forward op.
 */
typedef struct shape
{
    int64_t        d;
    kne_act_kind   kind;
    bool           flag;      /* gated; interleaved; absent weights */
    int32_t        n_heads, rotary;
    const int32_t *index;     /* target or position of row 0 */
} shape;

typedef struct row_case
{
    const char *name;
    shape       s;
    int64_t     n;
    int         n_in, n_out;
    int64_t     in_w[MAX_ARRAYS];   /* elements a row; negative: one vector for all rows */
    int64_t     out_w[MAX_ARRAYS];
    unsigned    in_out;             /* bit i: output i is added into, or changed in place */
    void (*run)(kne_backend *be, const shape *s, float **in, float **out, int64_t n);
    void (*run_d)(const shape *s, double **in, double **out, int64_t n);
    void (*ref)(const shape *s, double **in, double **out, int64_t n); /* NULL: run_d is the reference */
    double      spread;             /* inputs are uniform in -spread .. spread */
} row_case;

#define ROW_OP(op, label, ...)                                                              \
    static void label##_f(kne_backend *be, const shape *s, float **in, float **out, int64_t n) \
    {                                                                                       \
        be->op(be->ctx, __VA_ARGS__);                                                       \
    }                                                                                       \
    static void label##_d(const shape *s, double **in, double **out, int64_t n)             \
    {                                                                                       \
        op(&dctx, __VA_ARGS__);                                                             \
    }

#define EPS      1e-5f
#define ROWS_MAX 256
static int32_t best_of_rows[ROWS_MAX];  /* of the last run */
static int32_t index_of_rows[ROWS_MAX]; /* targets or positions */

ROW_OP(rmsnorm, rmsnorm, out[0], out[1], in[0], s->flag ? NULL : in[1], EPS, n, s->d)
ROW_OP(rmsnorm_bwd, rmsnorm_bwd, out[0], in[0], in[1], in[2], s->flag ? NULL : in[3], n, s->d)
ROW_OP(layernorm, layernorm, out[0], out[1], out[2], in[0], s->flag ? NULL : in[1],
       s->flag ? NULL : in[2], EPS, n, s->d)
ROW_OP(layernorm_bwd, layernorm_bwd, out[0], in[0], in[1], in[2], in[3], s->flag ? NULL : in[4], n,
       s->d)
ROW_OP(act, act, out[0], s->flag ? in[0] : NULL, in[1], s->kind, n, s->d)
ROW_OP(act_bwd, act_bwd, s->flag ? out[0] : NULL, out[1], in[2], s->flag ? in[0] : NULL, in[1],
       s->kind, n, s->d)
ROW_OP(logprob, logprob, out[0], best_of_rows, out[1], in[0], s->index, in[1], n, s->d)
ROW_OP(kl, kl, out[0], out[1], in[0], in[1], in[2], n, s->d)
ROW_OP(log_softmax, log_softmax, out[0], in[0], n, s->d)
ROW_OP(rope, rope, out[0], s->n_heads * s->d + 3, in[0], in[1], s->index, n, s->n_heads, (int32_t) s->d,
       s->rotary, s->flag, 1)
ROW_OP(rope, rope_back, out[0], s->n_heads * s->d + 3, in[0], in[1], s->index, n, s->n_heads,
       (int32_t) s->d, s->rotary, s->flag, -1)
ROW_OP(scale_rows, scale_rows, out[0], in[0], n, s->d)

/* ---- naive references ---- */

static void
ref_rmsnorm(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
    {
        double ss = 0;

        for (int64_t i = 0; i < s->d; i++)
            ss += in[0][r * s->d + i] * in[0][r * s->d + i];
        out[1][r] = 1 / sqrt(ss / (double) s->d + EPS);
        for (int64_t i = 0; i < s->d; i++)
            out[0][r * s->d + i] = in[0][r * s->d + i] * out[1][r] * (s->flag ? 1 : in[1][i]);
    }
}

static void
ref_layernorm(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
    {
        const double *x = in[0] + r * s->d;
        double        m = 0, v = 0;

        for (int64_t i = 0; i < s->d; i++)
            m += x[i] / (double) s->d;
        for (int64_t i = 0; i < s->d; i++)
            v += (x[i] - m) * (x[i] - m) / (double) s->d;
        out[1][r] = m;
        out[2][r] = 1 / sqrt(v + EPS);
        for (int64_t i = 0; i < s->d; i++)
            out[0][r * s->d + i] = (x[i] - m) * out[2][r] * (s->flag ? 1 : in[1][i]) +
                                   (s->flag ? 0 : in[2][i]);
    }
}

static void
ref_act(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t i = 0; i < n * s->d; i++)
    {
        double x = s->flag ? in[0][i] : in[1][i], y;

        if (s->kind == KNE_ACT_SILU)
            y = x / (1 + exp(-x));
        else if (s->kind == KNE_ACT_GELU_ERF)
            y = 0.5 * x * erfc(-x / sqrt(2.0));
        else
            y = 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        out[0][i] = s->flag ? y * in[1][i] : y;
    }
}

static double
ref_lse(const double *x, int64_t n)
{
    double max = x[0], sum = 0;

    for (int64_t i = 0; i < n; i++)
        max = fmax(max, x[i]);
    for (int64_t i = 0; i < n; i++)
        sum += exp(x[i] - max);
    return max + log(sum);
}

static void
ref_logprob(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
    {
        const double *x = in[0] + r * s->d;
        double        lse = ref_lse(x, s->d);

        out[0][r] = x[s->index[r]] - lse;
        for (int64_t i = 0; i < s->d; i++)
            out[1][r * s->d + i] = in[1][r] * ((i == s->index[r]) - exp(x[i] - lse));
    }
}

static void
ref_kl(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
    {
        const double *x = in[0] + r * s->d, *ref = in[1] + r * s->d;
        double        lse = ref_lse(x, s->d);

        out[0][r] = 0;
        for (int64_t i = 0; i < s->d; i++)
        {
            out[0][r] += exp(ref[i]) * (ref[i] - (x[i] - lse));
            out[1][r * s->d + i] = in[2][r] * (exp(x[i] - lse) - exp(ref[i]));
        }
    }
}

static void
ref_log_softmax(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
    {
        double lse = ref_lse(in[0] + r * s->d, s->d);

        for (int64_t i = 0; i < s->d; i++)
            out[0][r * s->d + i] = in[0][r * s->d + i] - lse;
    }
}

/* As the original papers have it: a rotation of each pair. */
static void
ref_rope_sign(const shape *s, double **in, double **out, int64_t n, double sign)
{
    int64_t half = s->rotary / 2;

    for (int64_t r = 0; r < n; r++)
        for (int64_t h = 0; h < s->n_heads; h++)
            for (int64_t i = 0; i < half; i++)
            {
                double *x = out[0] + r * (s->n_heads * s->d + 3) + h * s->d;
                double *a = s->flag ? x + 2 * i : x + i, *b = s->flag ? a + 1 : a + half;
                double  c = in[0][s->index[r] * half + i], si = sign * in[1][s->index[r] * half + i];
                double  a0 = *a, b0 = *b;

                *a = a0 * c - b0 * si;
                *b = b0 * c + a0 * si;
            }
}

static void
ref_rope(const shape *s, double **in, double **out, int64_t n)
{
    ref_rope_sign(s, in, out, n, 1);
}

static void
ref_rope_back(const shape *s, double **in, double **out, int64_t n)
{
    ref_rope_sign(s, in, out, n, -1);
}

static void
ref_scale_rows(const shape *s, double **in, double **out, int64_t n)
{
    for (int64_t i = 0; i < n * s->d; i++)
        out[0][i] *= in[0][i / s->d];
}

/* ---- the registry ---- */

#define NORM_CASES(d_, n_, absent)                                                              \
    {"rmsnorm", {.d = d_, .flag = absent}, n_, 2, 2, {d_, -d_}, {d_, 1}, 0, rmsnorm_f,          \
     rmsnorm_d, ref_rmsnorm, 2},                                                                \
    {"rmsnorm_bwd", {.d = d_, .flag = absent}, n_, 4, 1, {d_, d_, 1, -d_}, {d_}, 1,             \
     rmsnorm_bwd_f, rmsnorm_bwd_d, NULL, 2},                                                    \
    {"layernorm", {.d = d_, .flag = absent}, n_, 3, 3, {d_, -d_, -d_}, {d_, 1, 1}, 0,           \
     layernorm_f, layernorm_d, ref_layernorm, 2},                                               \
    {"layernorm_bwd", {.d = d_, .flag = absent}, n_, 5, 1, {d_, d_, 1, 1, -d_}, {d_}, 1,        \
     layernorm_bwd_f, layernorm_bwd_d, NULL, 2}

#define ACT_CASES(d_, n_, kind_, gated, spread)                                                 \
    {"act", {.d = d_, .kind = kind_, .flag = gated}, n_, 2, 1, {d_, d_}, {d_}, 0, act_f, act_d, \
     ref_act, spread},                                                                          \
    {"act_bwd", {.d = d_, .kind = kind_, .flag = gated}, n_, 3, 2, {d_, d_, d_},                \
     {gated ? d_ : 0, d_}, 0, act_bwd_f, act_bwd_d, NULL, spread}

#define LOSS_CASES(v_, n_, spread)                                                              \
    {"logprob", {.d = v_}, n_, 2, 2, {v_, 1}, {1, v_}, 0, logprob_f, logprob_d, ref_logprob,    \
     spread},                                                                                   \
    {"kl", {.d = v_}, n_, 3, 2, {v_, v_, 1}, {1, v_}, 0, kl_f, kl_d, ref_kl, spread},           \
    {"log_softmax", {.d = v_}, n_, 1, 1, {v_}, {v_}, 0, log_softmax_f, log_softmax_d,           \
     ref_log_softmax, spread}

#define ROPE_CASES(hd, rot, heads, n_, inter)                                                   \
    {"rope", {.d = hd, .flag = inter, .n_heads = heads, .rotary = rot}, n_, 2, 1,               \
     {-64 * (rot / 2), -64 * (rot / 2)}, {heads * hd + 3}, 1, rope_f, rope_d, ref_rope, 1},     \
    {"rope backward", {.d = hd, .flag = inter, .n_heads = heads, .rotary = rot}, n_, 2, 1,      \
     {-64 * (rot / 2), -64 * (rot / 2)}, {heads * hd + 3}, 1, rope_back_f, rope_back_d,         \
     ref_rope_back, 1}

static const row_case row_cases[] = {
    NORM_CASES(192, 40, false),
    NORM_CASES(131, 3, false),
    NORM_CASES(1, 2, false),
    NORM_CASES(1500, 70, true),
    ACT_CASES(640, 90, KNE_ACT_SILU, true, 5),
    ACT_CASES(88, 3, KNE_ACT_SILU, false, 20),
    ACT_CASES(131, 200, KNE_ACT_GELU_ERF, false, 4),
    ACT_CASES(33, 2, KNE_ACT_GELU_ERF, true, 10),
    ACT_CASES(333, 150, KNE_ACT_GELU_TANH, false, 4),
    ACT_CASES(3, 5, KNE_ACT_GELU_TANH, true, 10),
    LOSS_CASES(131, 50, 3),
    LOSS_CASES(2048, 20, 10),
    LOSS_CASES(50257, 3, 30),
    LOSS_CASES(1, 1, 1),
    ROPE_CASES(64, 64, 3, 60, false),
    ROPE_CASES(40, 24, 2, 7, false),
    ROPE_CASES(40, 24, 2, 7, true),
    ROPE_CASES(6, 2, 1, 1, true),
    {"scale_rows", {.d = 77}, 200, 1, 1, {1}, {77}, 1, scale_rows_f, scale_rows_d, ref_scale_rows, 1},
};

static void
run_rows(kne_backend *be, const row_case *c, float **in, float **out, int64_t r0, int64_t n)
{
    float *ri[MAX_ARRAYS], *ro[MAX_ARRAYS];
    shape  s = c->s;

    for (int i = 0; i < c->n_in; i++)
        ri[i] = in[i] + (c->in_w[i] > 0 ? r0 * c->in_w[i] : 0);
    for (int i = 0; i < c->n_out; i++)
        ro[i] = out[i] + r0 * c->out_w[i];
    s.index = index_of_rows + r0;
    c->run(be, &s, ri, ro, n);
}

static void
start_out(const row_case *c, float **out, float **first)
{
    for (int i = 0; i < c->n_out; i++)
    {
        int64_t size = c->n * c->out_w[i];

        out[i] = floats(size, NAN);
        if (c->in_out >> i & 1)
            memcpy(out[i], first[i], (size_t) size * sizeof(float));
    }
}

static void
test_row_case(const row_case *c)
{
    float  *in[MAX_ARRAYS], *first[MAX_ARRAYS], *out[4][MAX_ARRAYS];
    double *din[MAX_ARRAYS], *dout[MAX_ARRAYS], *rout[MAX_ARRAYS], worst = 0, ref_worst = 0;
    bool    threads = true, batch = true;
    kne_backend *be[3] = {be1, be2, be3};
    shape   s = c->s;

    for (int i = 0; i < c->n_in; i++)
    {
        int64_t size = c->in_w[i] < 0 ? -c->in_w[i] : c->n * c->in_w[i];

        in[i] = random_floats(size);
        for (int64_t j = 0; j < size; j++)
            in[i][j] *= (float) c->spread;
        din[i] = widened(in[i], size);
    }
    for (int i = 0; i < c->n_out; i++)
        first[i] = random_floats(c->n * c->out_w[i]);
    for (int64_t r = 0; r < c->n; r++)
        index_of_rows[r] = (int32_t) (kne_random_next(&seed) % (uint64_t) (s.rotary ? 64 : s.d));
    s.index = index_of_rows;
    for (int t = 0; t < 3; t++)
    {
        start_out(c, out[t], first);
        run_rows(be[t], c, in, out[t], 0, c->n);
    }
    start_out(c, out[3], first);
    for (int64_t r = 0, n; r < c->n; r += n)
    {
        n = 1 + r % 5 < c->n - r ? 1 + r % 5 : c->n - r;
        run_rows(be1, c, in, out[3], r, n);
    }
    for (int i = 0; i < c->n_out; i++)
    {
        int64_t size = c->n * c->out_w[i];
        float  *start = c->in_out >> i & 1 ? first[i] : out[0][i];

        dout[i] = widened(start, size);
        rout[i] = widened(start, size);
        threads &= same_bits(out[0][i], out[1][i], size) && same_bits(out[0][i], out[2][i], size);
        batch &= same_bits(out[0][i], out[3][i], size);
    }
    c->run_d(&s, din, dout, c->n);
    if (c->ref)
        c->ref(&s, din, rout, c->n);
    for (int i = 0; i < c->n_out; i++)
    {
        int64_t size = c->n * c->out_w[i];
        double *want = c->ref ? rout[i] : dout[i], e = nmse(out[0][i], want, size), d = 0;

        worst = e > worst ? e : worst;
        for (int64_t j = 0; j < size; j++)
            d = fmax(d, fabs(dout[i][j] - want[j]) / (1 + fabs(want[j])));
        ref_worst = fmax(d, ref_worst);
    }
    check(worst <= 1e-12 && ref_worst < 1e-10,
          "%s: %s n %lld d %lld is right (NMSE %.1e; in double %.1e)", isa, c->name, (long long) c->n,
          (long long) s.d, worst, ref_worst);
    check(threads && batch, "%s: %s n %lld d %lld: threads and batches give the same bits", isa,
          c->name, (long long) c->n, (long long) s.d);
    for (int i = 0; i < c->n_in; i++)
    {
        free(in[i]);
        free(din[i]);
    }
    for (int i = 0; i < c->n_out; i++)
    {
        for (int t = 0; t < 4; t++)
            free(out[t][i]);
        free(first[i]);
        free(dout[i]);
        free(rout[i]);
    }
}

/* ---- what random numbers do not show ---- */

static void
test_loss_corners(void)
{
    enum { V = 37 };
    float   x[3 * V], logp[3], kl[3], g[3 * V], ref[3 * V], coef[3] = {1, 2, 0};
    int32_t best[3], target[3] = {5, 0, V - 1};
    bool    fine = true;

    for (int i = 0; i < 3 * V; i++)
        x[i] = ref[i] = -INFINITY;
    x[5] = 90;                                     /* the only token possible */
    x[V] = x[V + 20] = 1e30f;                      /* two equals, far from the rest */
    x[2 * V + 36] = -1e-3f;
    x[2 * V + 1] = x[2 * V + 7] = 0;               /* the lowest id of equals */
    be1->logprob(be1->ctx, logp, best, g, x, target, coef, 3, V);
    check(best[0] == 5 && best[1] == 0 && best[2] == 1, "%s: logprob: the lowest id of equals is best", isa);
    for (int i = 0; i < V; i++)
        fine &= g[i] == 0 && g[2 * V + i] == 0;
    check(fine && logp[0] == 0 && fabsf(logp[1] + 0.6931472f) < 1e-6f && g[V] == 1 && g[V + 20] == -1,
          "%s: logprob: impossible tokens and huge logits", isa);
    ref[5] = 0;
    ref[V] = ref[V + 20] = logf(0.5f);
    ref[2 * V + 36] = 0;
    be1->kl(be1->ctx, kl, g, x, ref, coef, 3, V);
    check(kl[0] == 0 && fabsf(kl[1]) < 1e-6f && kl[2] > 1.0f && kl[2] < 1.2f && g[5] == 0,
          "%s: kl: 0 log 0 counts nothing", isa);
    be1->logprob(be1->ctx, logp, NULL, NULL, x, target, NULL, 1, V);
    be1->logprob(be1->ctx, NULL, best, NULL, x, NULL, NULL, 3, V);
    check(logp[0] == 0 && best[2] == 1, "%s: logprob: results that are not wanted", isa);
    x[0] = NAN;
    be1->logprob(be1->ctx, logp, best, NULL, x, target, coef, 1, V);
    check(isnan(logp[0]), "%s: logprob: NaN shows", isa);
}

/* exp by way of log_softmax's inverse is too blunt: silu(x) / x = 1 / (1 + exp(-x)) shows exp's error. */
static void
test_act_range(void)
{
    enum { N = 20001 };
    float *x = floats(N, 0), *y = floats(N, 0);
    double worst[3] = {0};
    static const kne_act_kind kinds[] = {KNE_ACT_SILU, KNE_ACT_GELU_ERF, KNE_ACT_GELU_TANH};

    for (int k = 0; k < 3; k++)
    {
        for (int i = 0; i < N; i++)
            x[i] = (float) (i - N / 2) * 0.008f;
        be1->act(be1->ctx, y, NULL, x, kinds[k], 1, N);
        for (int i = 0; i < N; i++)
        {
            double v = x[i], want, e;

            if (k == 0)
                want = v / (1 + exp(-v));
            else if (k == 1)
                want = 0.5 * v * erfc(-v / sqrt(2.0));
            else
                want = 0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
            /* in units of the float spacing at the input: what the product that follows sees */
            e = fabs(y[i] - want) / (fabs(v) * 1.1920929e-7 + 1e-40);
            worst[k] = fmax(worst[k], e);
        }
    }
    check(worst[0] < 2 && worst[1] < 2 && worst[2] < 2,
          "%s: act from -80 to 80: silu %.2f, gelu %.2f, gelu_tanh %.2f ulp of x", isa, worst[0],
          worst[1], worst[2]);
    free(x);
    free(y);
}

static void
test_row_ops(void)
{
    for (size_t c = 0; c < sizeof(row_cases) / sizeof(row_cases[0]); c++)
        test_row_case(&row_cases[c]);
    test_loss_corners();
    test_act_range();
}
