/*
 * kne_cpu_loss.h - log-softmax, target log-probability, KL divergence (part of
 * kne_cpu_ops_impl.h). Sums: lanes over blocks of 512, blocks added in double.
 * dlogits holds intermediates: it must not be the logits.
 */

/* The largest element; its lowest index in *best. NaN is never the largest. */
INLINE kne_real
row_max(const kne_real *x, int64_t n, int32_t *best)
{
    kne_real max = -INFINITY;
    int64_t  block = 0; /* the first with the largest */

    for (int64_t b = 0; b < n; b += SUM_BLOCK)
    {
        int64_t  e = n - b < SUM_BLOCK ? n - b : SUM_BLOCK;
        vr       m = vr_set1(-INFINITY);
        kne_real here;

        FOR_VECTORS(i, e)
            m = vr_max(LOAD(x + b + i, -INFINITY), m);
        here = vr_max_lane(m);
        if (here > max)
        {
            max = here;
            block = b;
        }
    }
    if (best)
    {
        *best = 0;
        for (int64_t i = block; i < n && i < block + SUM_BLOCK; i++)
            if (x[i] == max)
            {
                *best = (int32_t) i;
                break;
            }
    }
    return max;
}

/* log softmax(x)[i] = (x[i] - max) - log(sum): kept apart, since max + log(sum) would round. */
typedef struct row_sum
{
    kne_real max; /* 0 where all are -infinity */
    double   sum; /* of exp(x - max) */
} row_sum;

/* exps (or NULL): where to leave exp(x - max). */
INLINE row_sum
row_exp_sum(const kne_real *x, int64_t n, int32_t *best, kne_real *exps)
{
    row_sum s = {.max = row_max(x, n, best)};

    if (s.max == -INFINITY)
        s.max = 0;
    for (int64_t b = 0; b < n; b += SUM_BLOCK)
    {
        int64_t e = n - b < SUM_BLOCK ? n - b : SUM_BLOCK;
        vr      acc = vr_set1(0);

        FOR_VECTORS(i, e)
        {
            /* filled lanes give 0 */
            vr v = vr_exp(LOAD(x + b + i, -INFINITY) - s.max);

            acc += v;
            if (exps)
                STORE(exps + b + i, v);
        }
        s.sum += (double) vr_sum(acc);
    }
    return s;
}

OP_ARGS(logprob, kne_real *logp; int32_t *best; kne_real *dlogits; const kne_real *logits;
        const int32_t *target; const kne_real *coef; int64_t v;)

static void
logprob_rows(const logprob_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->logits + r * a->v;
        kne_real       *g = a->dlogits ? a->dlogits + r * a->v : NULL;
        row_sum         s = row_exp_sum(x, a->v, a->best ? &a->best[r] : NULL, g);

        if (a->logp)
            a->logp[r] = (kne_real) ((double) x[a->target[r]] - (double) s.max - log(s.sum));
        if (g)
        {
            kne_real c = a->coef[r], scale = (kne_real) (-(double) c / s.sum);

            FOR_VECTORS(i, a->v)
                STORE(g + i, LOAD(g + i, 0) * scale);
            g[a->target[r]] += c;
        }
    }
}
OP_TASK(logprob)

static void
logprob(void *ctx, kne_real *logp, int32_t *best, kne_real *dlogits, const kne_real *logits,
        const int32_t *target, const kne_real *coef, int64_t n, int64_t v)
{
    SPLIT(logprob, n, 30 + (dlogits ? 0.9 : 0.5) * (double) v, 1, logp, best, dlogits, logits,
          target, coef, v);
}

OP_ARGS(kl, kne_real *kl; kne_real *dlogits; const kne_real *logits; const kne_real *ref;
        const kne_real *coef; int64_t v;)

static void
kl_rows(const kl_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->logits + r * a->v, *ref = a->ref + r * a->v;
        kne_real       *g = a->dlogits ? a->dlogits + r * a->v : NULL, c = g ? a->coef[r] : 0;
        row_sum         s = row_exp_sum(x, a->v, NULL, g);
        kne_real        log_sum = (kne_real) log(s.sum), scale = (kne_real) (1 / s.sum);
        double          sum = 0;

        for (int64_t b = 0; b < a->v; b += SUM_BLOCK)
        {
            int64_t e = a->v - b < SUM_BLOCK ? a->v - b : SUM_BLOCK;
            vr      acc = vr_set1(0), zero = acc;

            FOR_VECTORS(i, e)
            {
                vr q = LOAD(ref + b + i, -INFINITY), p = vr_exp(q);
                vr term = p * (q - (LOAD(x + b + i, 0) - s.max - log_sum));

                acc += vr_select(p > zero, term, zero); /* 0 log 0 = 0 */
                if (g)
                    STORE(g + b + i, (LOAD(g + b + i, 0) * scale - p) * c);
            }
            sum += (double) vr_sum(acc);
        }
        if (a->kl)
            a->kl[r] = (kne_real) sum;
    }
}
OP_TASK(kl)

static void
kl(void *ctx, kne_real *kl_out, kne_real *dlogits, const kne_real *logits, const kne_real *ref_logp,
   const kne_real *coef, int64_t n, int64_t v)
{
    SPLIT(kl, n, 30 + 1.5 * (double) v, 1, kl_out, dlogits, logits, ref_logp, coef, v);
}

OP_ARGS(log_softmax, kne_real *logp; const kne_real *logits; int64_t v;)

static void
log_softmax_rows(const log_softmax_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *x = a->logits + r * a->v;
        kne_real       *y = a->logp + r * a->v;
        row_sum         s = row_exp_sum(x, a->v, NULL, NULL);
        kne_real        log_sum = (kne_real) log(s.sum);

        FOR_VECTORS(i, a->v)
            STORE(y + i, LOAD(x + i, 0) - s.max - log_sum);
    }
}
OP_TASK(log_softmax)

static void
log_softmax(void *ctx, kne_real *logp, const kne_real *logits, int64_t n, int64_t v)
{
    SPLIT(log_softmax, n, 30 + 0.6 * (double) v, 1, logp, logits, v);
}
