/*
 * gemm.cu - matrix products: activations in float against weights in their file's format.
 *
 * The matrix units take both operands in one 16-bit format, so activations are cast on the way. One cast costs three
 * digits. Where there are few rows a product waits for the weights and arithmetic is free: there activations go as two
 * halves, x = hi + lo, stacked into one product of twice the rows, which is as good as float. Products in float
 * stay in float (no TF32).
 *
 * fp16 weights: a row is first scaled by a power of two so that nothing overflows; bfloat16 has float's range.
 *
 * What the library has no product for (bfloat16 before compute capability 8.0; an odd shape, perhaps) goes through a kernel of our
 * own, which takes activations as they are: as good as float, several times slower.
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

#define TILE_M  64
#define TILE_N  32
#define TILE_K  16
#define THREADS 256

/*
 * C[m, n] = beta C + op(A) op(B) + bias of m, column-major as the library's; A of any type, B and C float. A block TILE_M x TILE_N of C,
 * a thread 4 x 2 of them, 16 apart.
 */
static __global__ void __launch_bounds__(THREADS)
matmul_kernel(float *c, int64_t ldc, const void *a, int64_t lda, bool ta, kne_dtype type, const float *b, int64_t ldb, bool tb,
              const float *bias, int64_t m, int64_t n, int64_t k, float beta)
{
    __shared__ float as[TILE_K][TILE_M + 1], bs[TILE_K][TILE_N + 1];
    const int        t = (int) threadIdx.x, x = t % 16, y = t / 16;
    const int64_t    i0 = (int64_t) blockIdx.x * TILE_M;

    for (int64_t j0 = (int64_t) blockIdx.y * TILE_N; j0 < n; j0 += (int64_t) gridDim.y * TILE_N)
    {
        float sum[4][2] = {{0}};

        for (int64_t p0 = 0; p0 < k; p0 += TILE_K)
        {
            /* neighbours read neighbours, whichever way the matrix lies */
            for (int q = t; q < TILE_M * TILE_K; q += THREADS)
            {
                const int i = ta ? q / TILE_K : q % TILE_M, p = ta ? q % TILE_K : q / TILE_M;

                as[p][i] = i0 + i < m && p0 + p < k
                               ? kne_dev_load(a, type, ta ? (i0 + i) * lda + p0 + p : (p0 + p) * lda + i0 + i) : 0.0f;
            }
            for (int q = t; q < TILE_N * TILE_K; q += THREADS)
            {
                const int j = tb ? q % TILE_N : q / TILE_K, p = tb ? q / TILE_N : q % TILE_K;

                bs[p][j] = j0 + j < n && p0 + p < k ? b[tb ? (p0 + p) * ldb + j0 + j : (j0 + j) * ldb + p0 + p] : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int p = 0; p < TILE_K; p++)
#pragma unroll
                for (int u = 0; u < 4; u++)
                {
                    sum[u][0] += as[p][x + 16 * u] * bs[p][y];
                    sum[u][1] += as[p][x + 16 * u] * bs[p][y + 16];
                }
            __syncthreads();
        }
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int v = 0; v < 2; v++)
            {
                const int64_t i = i0 + x + 16 * u, j = j0 + y + 16 * v;

                if (i >= m || j >= n)
                    continue;
                float *to = c + j * ldc + i, r = sum[u][v] + (bias ? bias[i] : 0.0f);

                *to = beta == 0.0f ? r : beta * *to + r;
            }
    }
}

/* False: there is none. */
static bool
library_matmul(kne_cu *cu, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, const void *b, int64_t ldb,
               kne_dtype type, float *c, int64_t ldc, float beta)
{
    return !cu->own_products && kne_lt_matmul(cu, ta, tb, m, n, k, a, lda, b, ldb, type, c, ldc, beta);
}

static void
own_matmul(kne_cu *cu, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda, kne_dtype type,
           const float *b, int64_t ldb, float *c, int64_t ldc, const float *bias, float beta)
{
    const int64_t rows = (n + TILE_N - 1) / TILE_N;
    dim3          grid((unsigned) ((m + TILE_M - 1) / TILE_M), (unsigned) (rows < 65535 ? rows : 65535));

    KNE_LAUNCH(cu, matmul_kernel, grid, THREADS, 0, c, ldc, a, lda, ta, type, b, ldb, tb, bias, m, n, k, beta);
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
    bool          done_by_library;

    if (n <= 0 || out <= 0 || !kne_cu_ready(cu))
        return;
    if (w->type == KNE_BF16 && !cu->has_bf16)
    {
        own_matmul(cu, by_rows, false, out, n, k, w->data, w->ld, w->type, x, ldx, y, ldy, bias, beta);
        return;
    }
    if (w->type != KNE_F32 && !cast(cu, x, ldx, n, k, kp, w->type, split))
        return;
    const kne_cast done = cu->last;

    if (w->type != KNE_F32 && (split || w->type == KNE_F16))
    {
        const int64_t rows = split ? 2 * n : n;
        float        *sum = (float *) kne_cu_reserve(cu, &cu->sum, (size_t) (rows * out) * sizeof(float));

        done_by_library = library_matmul(cu, by_rows, false, out, rows, k, w->data, w->ld, cu->cast.p, kp, w->type, sum, out, 0.0f);
        if (done_by_library)
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
            bias = NULL;
        }
        done_by_library = library_matmul(cu, by_rows, false, out, n, k, w->data, w->ld, w->type == KNE_F32 ? x : cu->cast.p,
                      w->type == KNE_F32 ? ldx : kp, w->type, y, ldy, beta);
    }
    if (!done_by_library)
        own_matmul(cu, by_rows, false, out, n, k, w->data, w->ld, w->type, x, ldx, y, ldy, bias, beta);
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
    if (!library_matmul(cu, false, true, p, m, k, b, ldb, a, lda, KNE_F32, c, ldc, beta))
        own_matmul(cu, false, true, p, m, k, b, ldb, KNE_F32, a, lda, c, ldc, NULL, beta);
}

void
kne_cu_fill_gemm(kne_backend *be)
{
    be->linear = linear;
    be->linear_bwd = linear_bwd;
    be->matmul_tn = matmul_tn;
}
