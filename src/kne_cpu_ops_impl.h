/*
 * kne_cpu_ops_impl.h - all ops but the matrix products, written once over a
 * vector of KNE_LANES kne_reals (the compiler's vector extension), compiled for
 * each instruction set, and once more by the test with kne_real = double, so
 * that gradients can be checked against finite differences to 1e-8.
 *
 * Contract: a row's arithmetic is a function of that row alone; what is split
 * into tasks are rows, sequences or columns, never a sum. Sums run over fixed
 * lanes and fixed blocks; block sums are added up in double.
 */
#include "kne_cpu.h"

#include <math.h>
#include <string.h>

#ifndef kne_real
#define kne_real float
#define KNE_REAL_IS_FLOAT 1
#endif
#if !defined(KNE_REAL_IS_FLOAT)
#define KNE_LANES 2
#elif defined(__AVX512F__)
#define KNE_LANES 16
#elif defined(__AVX2__)
#define KNE_LANES 8
#else
#define KNE_LANES 4
#endif

#ifdef KNE_REAL_IS_FLOAT
#include "kne_vec.h"
#endif

typedef kne_real vr __attribute__((vector_size(KNE_LANES * sizeof(kne_real))));
#ifdef KNE_REAL_IS_FLOAT
typedef int32_t vi __attribute__((vector_size(KNE_LANES * 4)));
#else
typedef int64_t vi __attribute__((vector_size(KNE_LANES * 8)));
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define LANES  KNE_LANES

INLINE vr
vr_set1(kne_real a)
{
    return a - (vr) {0}; /* keeps -0 */
}
INLINE vr
vr_load(const kne_real *p)
{
    vr v;

    memcpy(&v, p, sizeof(v));
    return v;
}
INLINE void
vr_store(kne_real *p, vr v)
{
    memcpy(p, &v, sizeof(v));
}
/* The first n < LANES, the rest `fill`. */
INLINE vr
vr_load_part(const kne_real *p, int64_t n, kne_real fill)
{
    vr v = vr_set1(fill);

#if KNE_LANES == 16
    v = (vr) _mm512_mask_loadu_ps((__m512) v, (__mmask16) ((1u << n) - 1), p);
#elif KNE_LANES == 8
    __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32((int) n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));

    v = (vr) _mm256_blendv_ps((__m256) v, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
#else
    for (int i = 0; i < LANES; i++)
        if (i < n)
            v[i] = p[i];
#endif
    return v;
}
INLINE void
vr_store_part(kne_real *p, vr v, int64_t n)
{
#if KNE_LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16) ((1u << n) - 1), (__m512) v);
#elif KNE_LANES == 8
    __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32((int) n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));

    _mm256_maskstore_ps(p, m, (__m256) v);
#else
    for (int i = 0; i < LANES; i++)
        if (i < n)
            p[i] = v[i];
#endif
}
/* mask ? a : b, the mask as comparisons give it */
INLINE vr
vr_select(vi mask, vr a, vr b)
{
    return (vr) ((mask & (vi) a) | (~mask & (vi) b));
}
INLINE vr
vr_min(vr a, vr b) /* b where one is NaN */
{
#if KNE_LANES == 16
    return (vr) _mm512_min_ps((__m512) a, (__m512) b);
#elif KNE_LANES == 8
    return (vr) _mm256_min_ps((__m256) a, (__m256) b);
#else
    return vr_select(a < b, a, b);
#endif
}
INLINE vr
vr_max(vr a, vr b) /* b where one is NaN */
{
#if KNE_LANES == 16
    return (vr) _mm512_max_ps((__m512) a, (__m512) b);
#elif KNE_LANES == 8
    return (vr) _mm256_max_ps((__m256) a, (__m256) b);
#else
    return vr_select(a > b, a, b);
#endif
}
/* out[i] = the sum of the lanes of the i-th vector */
INLINE void
vr_sum4(kne_real *out, vr a, vr b, vr c, vr d)
{
#ifdef KNE_REAL_IS_FLOAT
    v4 s = vf_sum4((vf) a, (vf) b, (vf) c, (vf) d);

    memcpy(out, &s, sizeof(s));
#else
    out[0] = a[0] + a[1];
    out[1] = b[0] + b[1];
    out[2] = c[0] + c[1];
    out[3] = d[0] + d[1];
#endif
}
INLINE kne_real
vr_sum(vr v)
{
    kne_real s[4];

    vr_sum4(s, v, v, v, v);
    return s[0];
}
INLINE kne_real
vr_max_lane(vr v)
{
    kne_real s[LANES], max;

    vr_store(s, v);
    max = s[0];
    for (int i = 1; i < LANES; i++)
        max = s[i] > max ? s[i] : max;
    return max;
}

/* Runs BODY(load, store) over i = 0, LANES, ... with a partial last step: `left` elements from i. */
#define FOR_VECTORS(i, n) for (int64_t i = 0, left = (n); left > 0; i += LANES, left -= LANES)
#define LOAD(p, fill)     (left >= LANES ? vr_load(p) : vr_load_part(p, left, fill))
#define STORE(p, v)       (left >= LANES ? vr_store(p, v) : vr_store_part(p, v, left))

/* ---- exp, to about 1 ulp; 0 and infinity where float ends, subnormals kept, NaN stays ---- */

INLINE vr
vr_exp(vr x)
{
#ifdef KNE_REAL_IS_FLOAT
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vr          c, t, n, r, p;

    c = vr_min(vr_set1(89.0f), vr_max(vr_set1(-104.0f), x));
    t = c * 1.44269504f + magic;
    n = t - magic;
    r = c - n * 0.693145752f; /* ln 2 in two parts */
    r = r - n * 1.42860677e-6f;
    /* Taylor terms up to r^7/7!: |r| <= 0.347, so the rest is below 1e-8 */
    p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r;
    p = p + 1.0f;
#if KNE_LANES == 16
    return (vr) _mm512_scalef_ps((__m512) p, (__m512) n);
#else
    {
        /* times 2^n in two steps, for n beyond the exponents of normal numbers */
        vi k = (vi) t - 0x4B400000, k1 = k >> 1;

        return p * (vr) ((k1 + 127) << 23) * (vr) ((k - k1 + 127) << 23);
    }
#endif
#else
    for (int i = 0; i < LANES; i++)
        x[i] = exp(x[i]);
    return x;
#endif
}

/* erf, to about 1 ulp: x times a polynomial in x^2, and beyond 0.95 1 - exp(polynomial). */
INLINE vr
vr_erf(vr x)
{
#ifdef KNE_REAL_IS_FLOAT
    /* fitted at Chebyshev nodes of [0, 0.95^2] and [0.93, 4]; relative error 7e-10, of erfc 2e-9 */
    static const float near[] = {8.20416969e-05f, -0.000810291556f, 0.00519748723f, -0.0268579591f,
                                 0.112836695f, -0.37612632f, 1.12837917f};
    static const float far[] = {1.6434872e-06f, -4.61780001e-05f, 0.000597761069f, -0.00476374947f,
                                0.0264318143f, -0.110096494f, -0.631811636f, -1.13023979f,
                                0.0003211113f};
    vi sign = (vi) x & (vi) vr_set1(-0.0f);
    vr t = (vr) ((vi) x ^ sign), s = x * x, p = vr_set1(near[0]), q = vr_set1(far[0]);
    vr u = vr_min(vr_set1(4.0f), t);

    for (int i = 1; i < 7; i++)
        p = p * s + near[i];
    for (int i = 1; i < 9; i++)
        q = q * u + far[i];
    q = 1.0f - vr_exp(q);
    return vr_select(t < 0.94f, p * x, (vr) ((vi) q | sign));
#else
    for (int i = 0; i < LANES; i++)
        x[i] = erf(x[i]);
    return x;
#endif
}

/* ---- tasks ---- */

/* Below so much work (in units of about a nanosecond) one thread is quicker than two. */
#define TASK_MIN 8000

/* How many rows a task takes: enough work each, a few tasks a thread, in multiples of `unit`. */
INLINE int64_t
rows_per_task(const kne_cpu *cpu, int64_t n, double cost_per_row, int64_t unit)
{
    int64_t rows;

    if (cpu->n_threads == 1 || (double) n * cost_per_row < 2 * TASK_MIN)
        return n > 0 ? n : 1;
    rows = (n + cpu->n_threads * 4 - 1) / (cpu->n_threads * 4);
    if ((double) rows * cost_per_row < TASK_MIN)
        rows = (int64_t) (TASK_MIN / cost_per_row) + 1;
    return (rows + unit - 1) / unit * unit;
}

/*
 * An op is a struct of its arguments and a function for rows [r0, r1).
 * SPLIT runs it over all rows, in tasks.
 */
#define OP_ARGS(name, ...)      \
    typedef struct name##_args  \
    {                           \
        kne_cpu *cpu;           \
        int64_t  total, rows;   \
        __VA_ARGS__             \
    } name##_args;

#define OP_TASK(name)                                                                   \
    static void name##_task(void *arg, int64_t task, int thread)                        \
    {                                                                                   \
        const name##_args *a = arg;                                                     \
        int64_t            r0 = task * a->rows;                                         \
        int64_t            r1 = r0 + a->rows < a->total ? r0 + a->rows : a->total;      \
                                                                                        \
        name##_rows(a, r0, r1, a->cpu->scratch + (size_t) thread * KNE_CPU_SCRATCH);    \
    }

#define SPLIT(name, n, cost_per_row, unit, ...)                                         \
    do                                                                                  \
    {                                                                                   \
        kne_cpu    *cpu_ = ctx;                                                         \
        int64_t     n_ = (n), rows_ = rows_per_task(cpu_, n_, (cost_per_row), (unit));  \
        name##_args a_ = {cpu_, n_, rows_, __VA_ARGS__};                                \
                                                                                        \
        if (n_ > 0)                                                                     \
            kne_pool_run(cpu_->pool, name##_task, &a_, (n_ + rows_ - 1) / rows_);       \
    } while (0)

#include "kne_cpu_norm.h"
#include "kne_cpu_attn.h"
#include "kne_cpu_loss.h"
#include "kne_cpu_elem.h"

#ifdef KNE_OPS_FILL
void
KNE_OPS_FILL(kne_backend *be)
{
    be->embed = embed;
    be->rmsnorm = rmsnorm;
    be->rmsnorm_bwd = rmsnorm_bwd;
    be->layernorm = layernorm;
    be->layernorm_bwd = layernorm_bwd;
    be->rope = rope;
    be->attention = attention;
    be->attention_bwd = attention_bwd;
    be->act = act;
    be->act_bwd = act_bwd;
    be->add = add;
    be->scale_rows = scale_rows;
    be->logprob = logprob;
    be->kl = kl;
    be->log_softmax = log_softmax;
    be->gather_cols = gather_cols;
    be->scatter_cols = scatter_cols;
    be->gather_rows = pick;
    be->scatter_rows = spread;
    be->fold_rows = fold;
    be->score = score;
    be->gather_neurons = gather_neurons;
}
#endif
