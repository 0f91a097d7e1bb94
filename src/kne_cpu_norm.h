/*
 * kne_cpu_norm.h - RMSNorm and LayerNorm (part of kne_cpu_ops_impl.h).
 * Statistics: lanes of kne_real over blocks of 512, block sums in double.
 */
#define SUM_BLOCK 512

/* sum over i of f(i), f a vector expression in i that is 0 where its loads were filled. */
#define BLOCK_SUM(result, n, expr)                                       \
    do                                                                   \
    {                                                                    \
        double sum_ = 0;                                                 \
        for (int64_t b_ = 0; b_ < (n); b_ += SUM_BLOCK)                  \
        {                                                                \
            int64_t e_ = (n) - b_ < SUM_BLOCK ? (n) - b_ : SUM_BLOCK;    \
            vr      acc_ = vr_set1(0);                                   \
            FOR_VECTORS(j_, e_)                                          \
            {                                                            \
                int64_t i = b_ + j_;                                     \
                acc_ += (expr);                                          \
            }                                                            \
            sum_ += (double) vr_sum(acc_);                               \
        }                                                                \
        (result) = sum_;                                                 \
    } while (0)

/* a weight vector that may be absent */
#define WEIGHT(w, i, absent) ((w) != NULL ? LOAD((w) + (i), 0) : vr_set1(absent))

OP_ARGS(rmsnorm, kne_real *y; kne_real *rstd; const kne_real *x; const kne_real *w; double eps;
        int64_t d;)

static void
rmsnorm_rows(const rmsnorm_args *a, int64_t r0, int64_t r1, char *scratch)
{
    int64_t d = a->d;

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->x + r * d;
        kne_real       *y = a->y + r * d, s;
        double          ss;

        BLOCK_SUM(ss, d, LOAD(x + i, 0) * LOAD(x + i, 0));
        s = (kne_real) (1.0 / sqrt(ss / (double) d + a->eps));
        if (a->rstd)
            a->rstd[r] = s;
        FOR_VECTORS(i, d)
            STORE(y + i, LOAD(x + i, 0) * s * WEIGHT(a->w, i, 1));
    }
}
OP_TASK(rmsnorm)

static void
rmsnorm(void *ctx, kne_real *y, kne_real *rstd, const kne_real *x, const kne_real *w, float eps,
        int64_t n, int64_t d)
{
    SPLIT(rmsnorm, n, 10 + 0.15 * (double) d, 1, y, rstd, x, w, eps, d);
}

OP_ARGS(rmsnorm_bwd, kne_real *dx; const kne_real *dy; const kne_real *x; const kne_real *rstd;
        const kne_real *w; int64_t d;)

/* dx += rstd (w dy) - x rstd^3 / d sum(w dy x) */
static void
rmsnorm_bwd_rows(const rmsnorm_bwd_args *a, int64_t r0, int64_t r1, char *scratch)
{
    int64_t d = a->d;

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->x + r * d, *dy = a->dy + r * d;
        kne_real       *dx = a->dx + r * d, s = a->rstd[r], c;
        double          dot;

        BLOCK_SUM(dot, d, LOAD(dy + i, 0) * WEIGHT(a->w, i, 1) * LOAD(x + i, 0));
        c = (kne_real) (dot * s * s * s / (double) d);
        FOR_VECTORS(i, d)
        {
            vr g = LOAD(dy + i, 0) * WEIGHT(a->w, i, 1);

            STORE(dx + i, LOAD(dx + i, 0) + (g * s - LOAD(x + i, 0) * c));
        }
    }
}
OP_TASK(rmsnorm_bwd)

static void
rmsnorm_bwd(void *ctx, kne_real *dx, const kne_real *dy, const kne_real *x, const kne_real *rstd,
            const kne_real *w, int64_t n, int64_t d)
{
    SPLIT(rmsnorm_bwd, n, 10 + 0.25 * (double) d, 1, dx, dy, x, rstd, w, d);
}

OP_ARGS(layernorm, kne_real *y; kne_real *mean; kne_real *rstd; const kne_real *x;
        const kne_real *w; const kne_real *b; double eps; int64_t d;)

static void
layernorm_rows(const layernorm_args *a, int64_t r0, int64_t r1, char *scratch)
{
    int64_t d = a->d;

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->x + r * d;
        kne_real       *y = a->y + r * d, m, s;
        double          sum;

        BLOCK_SUM(sum, d, LOAD(x + i, 0));
        m = (kne_real) (sum / (double) d);
        BLOCK_SUM(sum, d, (LOAD(x + i, m) - m) * (LOAD(x + i, m) - m));
        s = (kne_real) (1.0 / sqrt(sum / (double) d + a->eps));
        if (a->mean)
            a->mean[r] = m;
        if (a->rstd)
            a->rstd[r] = s;
        FOR_VECTORS(i, d)
            STORE(y + i, (LOAD(x + i, 0) - m) * s * WEIGHT(a->w, i, 1) + WEIGHT(a->b, i, 0));
    }
}
OP_TASK(layernorm)

static void
layernorm(void *ctx, kne_real *y, kne_real *mean, kne_real *rstd, const kne_real *x,
          const kne_real *w, const kne_real *b, float eps, int64_t n, int64_t d)
{
    SPLIT(layernorm, n, 15 + 0.25 * (double) d, 1, y, mean, rstd, x, w, b, eps, d);
}

OP_ARGS(layernorm_bwd, kne_real *dx; const kne_real *dy; const kne_real *x; const kne_real *mean;
        const kne_real *rstd; const kne_real *w; int64_t d;)

/* g = w dy, h = (x - mean) rstd: dx += rstd (g - mean(g) - h mean(g h)) */
static void
layernorm_bwd_rows(const layernorm_bwd_args *a, int64_t r0, int64_t r1, char *scratch)
{
    int64_t d = a->d;

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->x + r * d, *dy = a->dy + r * d;
        kne_real       *dx = a->dx + r * d, m = a->mean[r], s = a->rstd[r], mg, mgh;
        double          sum, dot;

        BLOCK_SUM(sum, d, LOAD(dy + i, 0) * WEIGHT(a->w, i, 1));
        BLOCK_SUM(dot, d, LOAD(dy + i, 0) * WEIGHT(a->w, i, 1) * ((LOAD(x + i, m) - m) * s));
        mg = (kne_real) (sum / (double) d);
        mgh = (kne_real) (dot / (double) d);
        FOR_VECTORS(i, d)
        {
            vr g = LOAD(dy + i, 0) * WEIGHT(a->w, i, 1);
            vr h = (LOAD(x + i, 0) - m) * s;

            STORE(dx + i, LOAD(dx + i, 0) + (g - mg - h * mgh) * s);
        }
    }
}
OP_TASK(layernorm_bwd)

static void
layernorm_bwd(void *ctx, kne_real *dx, const kne_real *dy, const kne_real *x, const kne_real *mean,
              const kne_real *rstd, const kne_real *w, int64_t n, int64_t d)
{
    SPLIT(layernorm_bwd, n, 15 + 0.35 * (double) d, 1, dx, dy, x, mean, rstd, w, d);
}
