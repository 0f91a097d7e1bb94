/*
 * gemm.cu - matrix products: activations in float against weights in their file's format.
 *
 * The matrix units take both operands in one 16-bit format, so activations are cast on the way. One cast costs three
 * digits. Where there are few rows a product waits for the weights and arithmetic is free: there activations go as two
 * halves, x = hi + lo, stacked into one product of twice the rows, which is as good as float. Products in float
 * stay in float (no TF32).
 *
 * fp16 weights: a row is first scaled by a power of two so that nothing overflows; bfloat16 has float's range.
 */
#include "kne_cuda.h"

/* hi[n, kp] (and lo, unless NULL) of x[n, k] */
static __global__ void
cast_bf16_kernel(uint16_t *hi, uint16_t *lo, const float *x, int64_t ldx, int64_t n, int64_t k, int64_t kp)
{
    KNE_STRIDE(at, n * k)
    {
        const int64_t  r = at / k, i = at % k;
        const float    v = x[r * ldx + i];
        const uint16_t h = kne_to_bf16(v);

        hi[r * kp + i] = h;
        if (lo)
            lo[r * kp + i] = kne_to_bf16(v - __uint_as_float((uint32_t) h << 16));
    }
}

/* scale[r] = the power of two that brings row r of x within 2048; a block a row */
static __global__ void
row_scale_kernel(float *scale, const float *x, int64_t ldx, int64_t k)
{
    __shared__ float part[32];
    float            max = 0;
    int              e = 0;

    for (int64_t i = threadIdx.x; i < k; i += blockDim.x)
        max = fmaxf(max, fabsf(x[blockIdx.x * ldx + i]));
    max = kne_warp_max(max);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = max;
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    for (int i = 1; i < (int) blockDim.x / 32; i++)
        max = fmaxf(max, part[i]);
    if (max > 0 && max < INFINITY)
        frexpf(max, &e);
    else
        e = 11;
    scale[blockIdx.x] = ldexpf(1.0f, e - 11 < -120 ? -120 : e - 11);
}

static __global__ void
cast_f16_kernel(__half *hi, __half *lo, const float *x, const float *scale, int64_t ldx, int64_t n, int64_t k,
                int64_t kp)
{
    KNE_STRIDE(at, n * k)
    {
        const int64_t r = at / k, i = at % k;
        const float   v = x[r * ldx + i] / scale[r];
        const __half  h = __float2half(v);

        hi[r * kp + i] = h;
        if (lo)
            lo[r * kp + i] = __float2half(v - __half2float(h));
    }
}

/* y = beta y + scale (hi + lo) + bias; lo, scale and bias may be NULL. y [n, out], hi and lo [n, out] */
static __global__ void
combine_kernel(float *y, int64_t ldy, const float *hi, const float *lo, const float *scale, const float *bias,
               int64_t n, int64_t out, float beta)
{
    KNE_STRIDE(at, n * out)
    {
        const int64_t r = at / out, c = at % out;
        float        *to = y + r * ldy + c, v = hi[at];

        if (lo)
            v += lo[at];
        if (scale)
            v *= scale[r];
        if (bias)
            v += bias[c];
        *to = beta == 0.0f ? v : beta * *to + v;
    }
}

/* y = beta y + bias */
static __global__ void
bias_kernel(float *y, int64_t ldy, const float *bias, int64_t n, int64_t out, float beta)
{
    KNE_STRIDE(at, n * out)
    {
        float *to = y + at / out * ldy + at % out;

        *to = beta == 0.0f ? bias[at % out] : beta * *to + bias[at % out];
    }
}

/* Cast x[n, k] into cu->cast, [2n or n, kp], unless it was the last cast and nothing ran since. */
static bool
cast(kne_cu *cu, const float *x, int64_t ldx, int64_t n, int64_t k, int64_t kp, kne_dtype type, bool split)
{
    const kne_cast want = {x, ldx, n, k, type, split};
    uint16_t      *hi, *lo;

    if (cu->last.x == x && cu->last.ldx == ldx && cu->last.n == n && cu->last.k == k && cu->last.type == type &&
        cu->last.split == split)
        return true;
    hi = (uint16_t *) kne_cu_reserve(cu, &cu->cast, (size_t) ((split ? 2 : 1) * n * kp) * 2);
    lo = split ? hi + n * kp : NULL;
    if (type == KNE_BF16)
        KNE_LAUNCH(cu, cast_bf16_kernel, kne_blocks(n * k, KNE_BLOCK), KNE_BLOCK, 0, hi, lo, x, ldx, n, k, kp);
    else
    {
        float *scale = (float *) kne_cu_reserve(cu, &cu->scale, (size_t) n * sizeof(float));

        KNE_LAUNCH(cu, row_scale_kernel, (unsigned) n, kne_row_threads(k), 0, scale, x, ldx, k);
        KNE_LAUNCH(cu, cast_f16_kernel, kne_blocks(n * k, KNE_BLOCK), KNE_BLOCK, 0, (__half *) hi, (__half *) lo, x,
                   scale, ldx, n, k, kp);
    }
    cu->last = want;
    return kne_cu_ready(cu);
}

/* y[n, out] = beta y + x[n, k] op(W) (+ bias): W's rows are the outputs, or its columns. */
static void
product(kne_cu *cu, float *y, int64_t ldy, const float *x, int64_t ldx, const kne_mat *w, bool by_rows,
        const float *bias, int64_t n, float beta)
{
    const int64_t out = by_rows ? w->rows : w->cols, k = by_rows ? w->cols : w->rows;
    const int64_t kp = (k + 7) / 8 * 8; /* 16 bytes */
    const bool    split = n <= cu->split_rows;

    if (n <= 0 || out <= 0 || !kne_cu_ready(cu))
        return;
    if (w->type != KNE_F32 && !cast(cu, x, ldx, n, k, kp, w->type, split))
        return;
    const kne_cast done = cu->last;

    if (w->type != KNE_F32 && (split || w->type == KNE_F16))
    {
        const int64_t rows = split ? 2 * n : n;
        float        *sum = (float *) kne_cu_reserve(cu, &cu->sum, (size_t) (rows * out) * sizeof(float));

        kne_lt_matmul(cu, by_rows, false, out, rows, k, w->data, w->ld, cu->cast.p, kp, w->type, sum, out, 0.0f);
        KNE_LAUNCH(cu, combine_kernel, kne_blocks(n * out, KNE_BLOCK), KNE_BLOCK, 0, y, ldy, sum,
                   split ? sum + n * out : (float *) NULL, w->type == KNE_F16 ? (float *) cu->scale.p : (float *) NULL,
                   bias, n, out, beta);
    }
    else
    {
        if (bias)
        {
            KNE_LAUNCH(cu, bias_kernel, kne_blocks(n * out, KNE_BLOCK), KNE_BLOCK, 0, y, ldy, bias, n, out, beta);
            beta = 1.0f;
        }
        kne_lt_matmul(cu, by_rows, false, out, n, k, w->data, w->ld, w->type == KNE_F32 ? x : cu->cast.p,
                      w->type == KNE_F32 ? ldx : kp, w->type, y, ldy, beta);
    }
    /* the cast stands as long as what it was made of does */
    cu->last = done;
    if (w->type == KNE_F32 || (y < x + n * ldx && x < y + n * ldy))
        cu->last.x = NULL;
}

static void
linear(void *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const kne_mat *w, const float *bias, int64_t n,
       float beta)
{
    product((kne_cu *) ctx, y, ldy, x, ldx, w, !w->transposed, bias, n, beta);
}

static void
linear_bwd(void *ctx, float *dx, int64_t ldx, const float *dy, int64_t ldy, const kne_mat *w, int64_t n, float beta)
{
    product((kne_cu *) ctx, dx, ldx, dy, ldy, w, w->transposed, NULL, n, beta);
}

static void
matmul_tn(void *ctx, float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t m,
          int64_t p, int64_t k, float beta)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (m <= 0 || p <= 0 || !kne_cu_ready(cu))
        return;
    cu->last.x = NULL;
    kne_lt_matmul(cu, false, true, p, m, k, b, ldb, a, lda, KNE_F32, c, ldc, beta);
}

void
kne_cu_fill_gemm(kne_backend *be)
{
    be->linear = linear;
    be->linear_bwd = linear_bwd;
    be->matmul_tn = matmul_tn;
}
