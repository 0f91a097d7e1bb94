/*
 * loss.cu - log-softmax, the log-probability of a target with its gradient, KL divergence. One block a row of
 * logits, which passes over it two or three times; a row is at most some hundred kilobytes and stays in the cache.
 */
#include "kne_cuda.h"

typedef struct top
{
    float   max;
    int32_t at;
} top;

/* The better of two: larger, or of equals the one that comes first. */
static __device__ __forceinline__ top
better(top a, top b)
{
    return b.max > a.max || (b.max == a.max && b.at < a.at) ? b : a;
}

/* The largest element of the block's row and its lowest index, in every thread; NaN is never the largest, {-inf, 0} if none is. */
static __device__ top
row_top(const float *x, int64_t v)
{
    __shared__ top part[32];
    top            t = {-INFINITY, 0x7fffffff};

    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
        if (x[i] > t.max || (x[i] == t.max && (int32_t) i < t.at))
        {
            t.max = x[i];
            t.at = (int32_t) i;
        }
    for (int o = 16; o > 0; o >>= 1)
    {
        top other;

        other.max = __shfl_xor_sync(0xffffffffu, t.max, o);
        other.at = __shfl_xor_sync(0xffffffffu, t.at, o);
        t = better(t, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = t;
    __syncthreads();
    t = part[0];
    for (int i = 1; i < (int) blockDim.x / 32; i++)
        t = better(t, part[i]);
    if (t.at == 0x7fffffff)
        t.at = 0;
    return t;
}

/* Sum of exp(x - max) over the block's row, in every thread. */
static __device__ float
row_exp_sum(const float *x, float max, int64_t v)
{
    float sum = 0;

    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
        sum += expf(x[i] - max);
    return kne_block_sum(sum);
}

static __device__ __forceinline__ float
finite_max(float max)
{
    return max == -INFINITY ? 0.0f : max;
}

/* logp, best, dlogits and coef may be NULL. logits, dlogits [n, v] */
static __global__ void
logprob_kernel(float *logp, int32_t *best, float *dlogits, const float *logits, const int32_t *target,
               const float *coef, int64_t v)
{
    const int64_t r = blockIdx.x;
    const float  *x = logits + r * v;
    const top     t = row_top(x, v);
    const float   max = finite_max(t.max), sum = row_exp_sum(x, max, v);

    if (threadIdx.x == 0)
    {
        if (best)
            best[r] = t.at;
        if (logp)
            logp[r] = (float) ((double) x[target[r]] - (double) max - log((double) sum));
    }
    if (!dlogits)
        return;
    const float c = coef[r], scale = -c / sum;

    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
        dlogits[r * v + i] = expf(x[i] - max) * scale + (i == target[r] ? c : 0.0f);
}

/* kl and dlogits may be NULL. ref [n, v]: log-probabilities */
static __global__ void
kl_kernel(float *kl, float *dlogits, const float *logits, const float *ref, const float *coef, int64_t v)
{
    const int64_t r = blockIdx.x;
    const float  *x = logits + r * v, *q = ref + r * v;
    const float   max = finite_max(row_top(x, v).max), sum = row_exp_sum(x, max, v), log_sum = logf(sum);
    const float   c = dlogits ? coef[r] : 0;
    float         total = 0;

    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
    {
        const float p = expf(q[i]);

        if (p > 0) /* 0 log 0 = 0 */
            total += p * (q[i] - (x[i] - max - log_sum));
        if (dlogits)
            dlogits[r * v + i] = (expf(x[i] - max) / sum - p) * c;
    }
    total = kne_block_sum(total);
    if (kl && threadIdx.x == 0)
        kl[r] = total;
}

/* logp may be logits: each thread reads its elements last where it writes them */
static __global__ void
log_softmax_kernel(float *logp, const float *logits, int64_t v)
{
    const int64_t r = blockIdx.x;
    const float  *x = logits + r * v;
    const float   max = finite_max(row_top(x, v).max), log_sum = logf(row_exp_sum(x, max, v));

    for (int64_t i = threadIdx.x; i < v; i += blockDim.x)
        logp[r * v + i] = x[i] - max - log_sum;
}

static void
logprob(void *ctx, float *logp, int32_t *best, float *dlogits, const float *logits, const int32_t *target,
        const float *coef, int64_t n, int64_t v)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, logprob_kernel, (unsigned) n, KNE_BLOCK, 0, logp, best, dlogits, logits, target,
                   coef, v);
}

static void
kl(void *ctx, float *kl_out, float *dlogits, const float *logits, const float *ref_logp, const float *coef, int64_t n,
   int64_t v)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, kl_kernel, (unsigned) n, KNE_BLOCK, 0, kl_out, dlogits, logits, ref_logp, coef, v);
}

static void
log_softmax(void *ctx, float *logp, const float *logits, int64_t n, int64_t v)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, log_softmax_kernel, (unsigned) n, KNE_BLOCK, 0, logp, logits, v);
}

void
kne_cu_fill_loss(kne_backend *be)
{
    be->logprob = logprob;
    be->kl = kl;
    be->log_softmax = log_softmax;
}
