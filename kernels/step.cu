/*
 * step.cu - the optimiser: gradients of an ensemble's rows, effective rows, the metric, the step. All edits of a batch at once.
 *
 * What has a metric keeps its inverse, in double, where the CPU keeps a Cholesky factor: a step then is a product, with as many
 * threads as it has results.
 */
#include "kne_cuda.h"

#define GROUP 4 /* rows that share what they read */

/* grad[row, c] = sum over t in [from, to) of left[t, col] right[t, c]; a block GROUP entries and blockDim columns */
static __global__ void
grad_rows_kernel(float *grad, const kne_grad_row *of, int64_t n_of, const float *left, int64_t f, const float *right, int64_t d)
{
    const int64_t c = (int64_t) blockIdx.y * blockDim.x + threadIdx.x, first = (int64_t) blockIdx.x * GROUP;
    const int     n = n_of - first < GROUP ? (int) (n_of - first) : GROUP;
    kne_grad_row  r[GROUP];
    float         sum[GROUP];
    bool          alike = true;

    if (c >= d)
        return;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
    {
        r[i] = of[first + (i < n ? i : 0)];
        alike = alike && r[i].from == r[0].from && r[i].to == r[0].to;
        sum[i] = 0;
    }
    if (alike)
        for (int64_t t = r[0].from; t < r[0].to; t++)
        {
            const float v = right[t * d + c];

#pragma unroll
            for (int i = 0; i < GROUP; i++)
                sum[i] += left[t * f + r[i].col] * v;
        }
    else
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            for (int64_t t = r[i].from; t < r[i].to; t++)
                sum[i] += left[t * f + r[i].col] * right[t * d + c];
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < n)
            grad[r[i].row * d + c] = sum[i];
}

static __device__ __forceinline__ float
round_to(float v, kne_dtype type)
{
    if (type == KNE_F32)
        return v;
    return type == KNE_BF16 ? __uint_as_float((uint32_t) kne_to_bf16(v) << 16) : __half2float(__float2half(v));
}

/* eff[n, d] = round(before + the deltas of the row, in order) (- base) */
static __global__ void
compose_kernel(float *eff, const float *base, const float *before, const float *delta, const int32_t *from, const int32_t *place,
               int64_t n, int64_t d, kne_dtype type)
{
    KNE_STRIDE(at, n * d)
    {
        const int64_t r = at / d, c = at % d;
        float         v = before[at];

        for (int32_t p = from[r]; delta && p < from[r + 1]; p++)
            v += delta[place[p] * d + c];
        v = round_to(v, type);
        eff[at] = base ? v - base[at] : v;
    }
}

/* ---- the metric ---- */

/* m[i, j] = sum over t of a[t, idx i] a[t, idx j]; blocks (block of the metric, elements of it) */
static __global__ void
gram_kernel(double *m, const float *a, int64_t ld, int64_t rows, const int32_t *idx, int32_t first, const kne_metric_block *block)
{
    const kne_metric_block b = block[blockIdx.x];
    const int64_t          n = b.n;

    for (int64_t at = (int64_t) blockIdx.y * blockDim.x + threadIdx.x; at < n * n; at += (int64_t) gridDim.y * blockDim.x)
    {
        const float *x = a + idx[b.row + at / n] - first, *y = a + idx[b.row + at % n] - first;
        double       sum = 0;

        for (int64_t t = 0; t < rows; t++)
            sum += (double) x[t * ld] * y[t * ld];
        m[b.at + at] = sum;
    }
}

/*
 * In place the inverse of scale m + ridge I, by sweeping every pivot (Goodnight, The American Statistician 33, 1979), which
 * keeps it symmetric; a positive matrix needs no search for pivots. One block a matrix, a warp a row.
 */
static __global__ void __launch_bounds__(4 * KNE_BLOCK)
factor_kernel(double *m, const float *gram, const kne_metric_block *block, double scale, double ridge)
{
    const kne_metric_block b = block[blockIdx.x];
    const int64_t          n = b.n;
    const int64_t          lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    double                *x = m + b.at;

    for (int64_t at = threadIdx.x; at < n * n; at += blockDim.x)
        x[at] = scale * (gram ? (double) gram[at] : x[at]) + (at / n == at % n ? ridge : 0);
    __syncthreads();
    for (int64_t p = 0; p < n; p++)
    {
        const double *row = x + p * n;
        const double  by = 1 / fmax(row[p], 1e-300);

        for (int64_t i = warp; i < n; i += warps)
            for (int64_t j = lane; i != p && j < n; j += 32)
                if (j != p)
                    x[i * n + j] -= row[i] * row[j] * by;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
            if (i != p)
                x[p * n + i] = x[i * n + p] = row[i] * by;
        __syncthreads();
        if (threadIdx.x == 0)
            x[p * n + p] = -by;
        __syncthreads();
    }
    for (int64_t at = threadIdx.x; at < n * n; at += blockDim.x)
        x[at] = -x[at];
}

/* x = beta x + scale M^-1 g; blocks (block of the metric, columns, GROUP rows) */
static __global__ void
solve_kernel(float *x, float beta, float scale, const float *g, const double *inverse, const kne_metric_block *block,
             const kne_mover *mover, int64_t d)
{
    const kne_metric_block b = block[blockIdx.x];
    const int64_t          n = b.n, c = (int64_t) blockIdx.y * blockDim.x + threadIdx.x;

    if (c >= d || (mover && !mover[b.owner].moves))
        return;
    for (int64_t i0 = (int64_t) blockIdx.z * GROUP; i0 < n; i0 += (int64_t) gridDim.z * GROUP)
    {
        double sum[GROUP] = {0};

        for (int64_t j = 0; j < n; j++)
        {
            const double v = g[(b.row + j) * d + c];

#pragma unroll
            for (int i = 0; i < GROUP; i++)
                if (i0 + i < n)
                    sum[i] += inverse[b.at + (i0 + i) * n + j] * v;
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (i0 + i < n)
            {
                float *to = x + (b.row + i0 + i) * d + c;

                *to = beta == 0.0f ? scale * (float) sum[i] : beta * *to + scale * (float) sum[i];
            }
    }
}

/* ---- the step: N rows of d numbers; those of edits that do not move are left alone ---- */

static __global__ void
add_anchors_kernel(float *grad, const float *x, const int32_t *place, const int32_t *owner, const kne_mover *mover, int64_t n,
                   int64_t d)
{
    KNE_STRIDE(at, n * d)
    {
        const int64_t   r = at / d;
        const kne_mover e = mover[owner[r]];

        if (e.moves)
            grad[at] += e.anchor * x[place[r] * d + at % d];
    }
}

static __global__ void
momentum_kernel(float *mean, float beta, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n, int64_t d)
{
    KNE_STRIDE(at, n * d)
        if (mover[owner[at / d]].moves)
            mean[at] = beta * mean[at] + grad[at];
}

/* norm[r] = sum of x[r, :]^2, in double; one block a row */
static __global__ void
row_norms_kernel(double *norm, const float *x, int64_t d)
{
    double sum = 0;

    for (int64_t c = threadIdx.x; c < d; c += blockDim.x)
        sum += (double) x[blockIdx.x * d + c] * x[blockIdx.x * d + c];
    sum = kne_block_sum(sum);
    if (threadIdx.x == 0)
        norm[blockIdx.x] = sum;
}

/* delta -= rate mean / |mean of the edit|; norm [parts, n]; one block a row */
static __global__ void
step_kernel(float *delta, const float *mean, const double *norm, int32_t parts, const int32_t *owner, const kne_mover *mover,
            int64_t n, int64_t d)
{
    const kne_mover e = mover[owner[blockIdx.x]];
    double          sum = 0;
    float           scale;

    if (!e.moves)
        return; /* the whole block */
    for (int64_t i = threadIdx.x; i < (int64_t) parts * e.n; i += blockDim.x)
        sum += norm[i / e.n * n + e.row + i % e.n];
    sum = kne_block_sum(sum);
    scale = sum > 0 ? (float) (e.rate / sqrt(sum)) : 0;
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x)
        delta[blockIdx.x * d + c] -= scale * mean[blockIdx.x * d + c];
}

static __global__ void
adam_kernel(float *delta, float *mean, float *var, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n,
            int64_t d)
{
    KNE_STRIDE(at, n * d)
    {
        const kne_mover e = mover[owner[at / d]];
        const float     g = grad[at];

        if (!e.moves)
            continue;
        mean[at] = KNE_ADAM_B1 * mean[at] + (1 - KNE_ADAM_B1) * g;
        var[at] = KNE_ADAM_B2 * var[at] + (1 - KNE_ADAM_B2) * g * g;
        delta[at] -= e.rate * (mean[at] / e.c1) / (sqrtf(var[at] / e.c2) + 1e-8f);
    }
}

static void
grad_rows(void *ctx, float *grad, const kne_grad_row *of, int64_t n_of, const float *left, int64_t f, const float *right,
          int64_t d, float *scratch)
{
    dim3 grid((unsigned) ((n_of + GROUP - 1) / GROUP), kne_blocks(d, KNE_BLOCK));

    if (n_of > 0)
        KNE_LAUNCH((kne_cu *) ctx, grad_rows_kernel, grid, KNE_BLOCK, 0, grad, of, n_of, left, f, right, d);
}

static void
compose(void *ctx, float *eff, const float *base, const float *before, const float *delta, const int32_t *from,
        const int32_t *place, int64_t n, int64_t d, kne_dtype type)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, compose_kernel, kne_blocks(n * d, KNE_BLOCK), KNE_BLOCK, 0, eff, base, before, delta, from,
                   place, n, d, type);
}

static void
gram(void *ctx, double *m, const float *a, int64_t ld, int64_t rows, const int32_t *idx, int32_t first,
     const kne_metric_block *block, int64_t n_block, int64_t max_n)
{
    const unsigned parts = kne_blocks(max_n * max_n, KNE_BLOCK);
    dim3           grid((unsigned) n_block, parts < 1024 ? parts : 1024);

    if (n_block > 0)
        KNE_LAUNCH((kne_cu *) ctx, gram_kernel, grid, KNE_BLOCK, 0, m, a, ld, rows, idx, first, block);
}

static void
factor(void *ctx, double *m, const float *gram_of, const kne_metric_block *block, int64_t n_block, int64_t max_n, double scale,
       double ridge)
{
    if (n_block > 0)
        KNE_LAUNCH((kne_cu *) ctx, factor_kernel, (unsigned) n_block, 4 * KNE_BLOCK, 0, m, gram_of, block, scale, ridge);
}

static void
solve(void *ctx, float *x, float beta, float scale, float *g, const double *m, const kne_metric_block *block, int64_t n_block,
      int64_t max_n, const kne_mover *mover, int64_t d, double *scratch)
{
    const unsigned rows = kne_blocks(max_n, GROUP);
    dim3           grid((unsigned) n_block, kne_blocks(d, KNE_BLOCK), rows < 1024 ? rows : 1024);

    if (n_block > 0)
        KNE_LAUNCH((kne_cu *) ctx, solve_kernel, grid, KNE_BLOCK, 0, x, beta, scale, g, m, block, mover, d);
}

static void
add_anchors(void *ctx, float *grad, const float *x, const int32_t *place, const int32_t *owner, const kne_mover *mover, int64_t n,
            int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, add_anchors_kernel, kne_blocks(n * d, KNE_BLOCK), KNE_BLOCK, 0, grad, x, place, owner, mover,
                   n, d);
}

static void
momentum(void *ctx, float *mean, float beta, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, momentum_kernel, kne_blocks(n * d, KNE_BLOCK), KNE_BLOCK, 0, mean, beta, grad, owner, mover, n,
                   d);
}

static void
row_norms(void *ctx, double *norm, const float *x, int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, row_norms_kernel, (unsigned) n, kne_row_threads(d), 0, norm, x, d);
}

static void
step(void *ctx, float *delta, const float *mean, const double *norm, int32_t parts, const int32_t *owner, const kne_mover *mover,
     int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, step_kernel, (unsigned) n, kne_row_threads(d), 0, delta, mean, norm, parts, owner, mover, n, d);
}

static void
adam(void *ctx, float *delta, float *mean, float *var, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n,
     int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, adam_kernel, kne_blocks(n * d, KNE_BLOCK), KNE_BLOCK, 0, delta, mean, var, grad, owner, mover, n,
                   d);
}

void
kne_cu_fill_step(kne_backend *be)
{
    be->grad_rows = grad_rows;
    be->compose = compose;
    be->gram = gram;
    be->factor = factor;
    be->solve = solve;
    be->add_anchors = add_anchors;
    be->momentum = momentum;
    be->row_norms = row_norms;
    be->step = step;
    be->adam = adam;
}
