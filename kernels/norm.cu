/*
 * norm.cu - RMSNorm and LayerNorm, forward and backward to the input. One block a row.
 */
#include "kne_cuda.h"

/* y[r, :] = x rstd w; rstd[r] = 1 / sqrt(mean(x^2) + eps) */
static __global__ void
rmsnorm_kernel(float *y, float *rstd, const float *x, const float *w, float eps, int64_t d)
{
    const int64_t r = blockIdx.x;
    const float  *xr = x + r * d;
    float         sum = 0, s;

    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        sum += xr[i] * xr[i];
    s = 1.0f / sqrtf(kne_block_sum(sum) / (float) d + eps);
    if (rstd && threadIdx.x == 0)
        rstd[r] = s;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        y[r * d + i] = xr[i] * s * (w ? w[i] : 1.0f);
}

/* dx += rstd (w dy) - x rstd^3 / d sum(w dy x) */
static __global__ void
rmsnorm_bwd_kernel(float *dx, const float *dy, const float *x, const float *rstd, const float *w, int64_t d)
{
    const int64_t r = blockIdx.x, at = r * d;
    const float   s = rstd[r];
    float         dot = 0, c;

    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        dot += dy[at + i] * (w ? w[i] : 1.0f) * x[at + i];
    c = kne_block_sum(dot) * s * s * s / (float) d;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        dx[at + i] += dy[at + i] * (w ? w[i] : 1.0f) * s - x[at + i] * c;
}

static __global__ void
layernorm_kernel(float *y, float *mean, float *rstd, const float *x, const float *w, const float *b, float eps,
                 int64_t d)
{
    const int64_t r = blockIdx.x;
    const float  *xr = x + r * d;
    float         sum = 0, m, s;

    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        sum += xr[i];
    m = kne_block_sum(sum) / (float) d;
    sum = 0;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        sum += (xr[i] - m) * (xr[i] - m);
    s = 1.0f / sqrtf(kne_block_sum(sum) / (float) d + eps);
    if (threadIdx.x == 0)
    {
        if (mean)
            mean[r] = m;
        if (rstd)
            rstd[r] = s;
    }
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
        y[r * d + i] = (xr[i] - m) * s * (w ? w[i] : 1.0f) + (b ? b[i] : 0.0f);
}

/* g = w dy, h = (x - mean) rstd: dx += rstd (g - mean(g) - h mean(g h)) */
static __global__ void
layernorm_bwd_kernel(float *dx, const float *dy, const float *x, const float *mean, const float *rstd,
                     const float *w, int64_t d)
{
    const int64_t r = blockIdx.x, at = r * d;
    const float   m = mean[r], s = rstd[r];
    float         sum = 0, dot = 0;

    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
    {
        float g = dy[at + i] * (w ? w[i] : 1.0f);

        sum += g;
        dot += g * ((x[at + i] - m) * s);
    }
    sum = kne_block_sum(sum) / (float) d;
    dot = kne_block_sum(dot) / (float) d;
    for (int64_t i = threadIdx.x; i < d; i += blockDim.x)
    {
        float g = dy[at + i] * (w ? w[i] : 1.0f);

        dx[at + i] += (g - sum - (x[at + i] - m) * s * dot) * s;
    }
}

static void
rmsnorm(void *ctx, float *y, float *rstd, const float *x, const float *w, float eps, int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, rmsnorm_kernel, (unsigned) n, kne_row_threads(d), 0, y, rstd, x, w, eps, d);
}

static void
rmsnorm_bwd(void *ctx, float *dx, const float *dy, const float *x, const float *rstd, const float *w, int64_t n,
            int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, rmsnorm_bwd_kernel, (unsigned) n, kne_row_threads(d), 0, dx, dy, x, rstd, w, d);
}

static void
layernorm(void *ctx, float *y, float *mean, float *rstd, const float *x, const float *w, const float *b, float eps,
          int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, layernorm_kernel, (unsigned) n, kne_row_threads(d), 0, y, mean, rstd, x, w, b, eps,
                   d);
}

static void
layernorm_bwd(void *ctx, float *dx, const float *dy, const float *x, const float *mean, const float *rstd,
              const float *w, int64_t n, int64_t d)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, layernorm_bwd_kernel, (unsigned) n, kne_row_threads(d), 0, dx, dy, x, mean, rstd,
                   w, d);
}

void
kne_cu_fill_norm(kne_backend *be)
{
    be->rmsnorm = rmsnorm;
    be->rmsnorm_bwd = rmsnorm_bwd;
    be->layernorm = layernorm;
    be->layernorm_bwd = layernorm_bwd;
}
