/*
 * select.cu - which neurons: the contrast of attribution, the energy of a step in each, and the largest of a row of scores.
 */
#include "kne_cuda.h"

/* y[k] = |sum over r of x[r, k]| / (mean[k] + floor): a thread a column, rows in order */
static __global__ void
contrast_kernel(float *y, const float *x, int64_t ld, int64_t rows, int64_t n, const float *mean, float floor, bool keep_sign)
{
    KNE_STRIDE(k, n)
    {
        float sum = 0;

        for (int64_t r = 0; r < rows; r++)
            sum += x[r * ld + k];
        if (!keep_sign)
            sum = fabsf(sum);
        y[k] = mean ? sum / (mean[k] + floor) : sum;
    }
}

/* score[e, c] = scale sum over rows i, j of e of z[i, c] k[i, j] a[j, c]; blocks (columns, e) */
static __global__ void
energy_kernel(float *score, int64_t ld, const float *z, const float *a, const float *k, const int32_t *row0, int64_t rows,
              int64_t f, float scale)
{
    const int64_t from = row0[blockIdx.y], to = row0[blockIdx.y + 1];

    KNE_STRIDE(c, f)
    {
        float sum = 0;

        for (int64_t i = from; i < to; i++)
        {
            float row = 0;

            for (int64_t j = from; j < to; j++)
                row += k[i * rows + j] * a[j * f + c];
            sum += row * z[i * f + c];
        }
        score[blockIdx.y * ld + c] = scale * sum;
    }
}

/* A number that orders as the score does, NaN below all, and of equal scores the first column above. No two are equal. */
static __device__ __forceinline__ uint64_t
key_of(float score, int64_t column)
{
    uint32_t u = score == 0.0f ? 0 : __float_as_uint(score); /* -0 is 0 */

    u = score != score ? 0 : u >> 31 ? ~u : u | 0x80000000u;
    return (uint64_t) u << 32 | (uint32_t) ~(uint32_t) column;
}

#define DIGITS 16

/*
 * One block a row: the n-th largest key is found four bits at a time, by counting; what is not below it is written down, each
 * thread its own share; and each of these goes where its rank says. keys [rows, n]
 */
static __global__ void __launch_bounds__(4 * KNE_BLOCK)
top_kernel(int32_t *index, const float *score, int64_t ld, uint64_t *keys, int64_t n_all, int64_t n)
{
    __shared__ int64_t count[DIGITS], start[1024];
    const float   *x = score + blockIdx.x * ld;
    const int64_t  share = (n_all + blockDim.x - 1) / blockDim.x, from = threadIdx.x * share,
                   to = from + share < n_all ? from + share : n_all;
    uint64_t       limit = 0;
    int64_t        left = n, mine = 0; /* left: how many of those that agree with limit so far are wanted */

    for (int shift = 60; shift >= 0; shift -= 4)
    {
        int32_t of[DIGITS] = {0};

        for (int64_t i = threadIdx.x; i < n_all; i += blockDim.x)
        {
            const uint64_t key = key_of(x[i], i);
            const int      digit = (int) (key >> shift & (DIGITS - 1));

            if (shift == 60 || key >> (shift + 4) == limit >> (shift + 4))
#pragma unroll
                for (int k = 0; k < DIGITS; k++)
                    of[k] += digit == k;
        }
#pragma unroll
        for (int k = 0; k < DIGITS; k++)
        {
            const int32_t all = kne_block_sum(of[k]);

            if (threadIdx.x == 0)
                count[k] = all;
        }
        __syncthreads();
        int digit = DIGITS - 1;

        for (; digit > 0 && count[digit] < left; digit--)
            left -= count[digit];
        limit |= (uint64_t) digit << shift;
        __syncthreads();
    }
    for (int64_t i = from; i < to; i++)
        mine += key_of(x[i], i) >= limit;
    start[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == 0)
    {
        int64_t sum = 0;

        for (unsigned t = 0; t < blockDim.x; t++)
        {
            const int64_t k = start[t];

            start[t] = sum;
            sum += k;
        }
    }
    __syncthreads();
    uint64_t *list = keys + blockIdx.x * n;
    int64_t   at = start[threadIdx.x];

    for (int64_t i = from; i < to; i++)
        if (key_of(x[i], i) >= limit)
            list[at++] = key_of(x[i], i);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    {
        const uint64_t key = list[i];
        int64_t        rank = 0;

        for (int64_t j = 0; j < n; j++)
            rank += list[j] > key;
        index[blockIdx.x * n + rank] = (int32_t) ~(uint32_t) key;
    }
}

static void
contrast(void *ctx, float *y, const float *x, int64_t ld, int64_t rows, int64_t n, const float *mean, float floor, bool keep_sign)
{
    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, contrast_kernel, kne_blocks(n, KNE_BLOCK), KNE_BLOCK, 0, y, x, ld, rows, n, mean, floor,
                   keep_sign);
}

static void
energy(void *ctx, float *score, int64_t ld, const float *z, const float *a, const float *k, const int32_t *row0, int64_t n,
       int64_t rows, int64_t f, float scale)
{
    dim3 grid(kne_blocks(f, KNE_BLOCK), (unsigned) n);

    if (n > 0)
        KNE_LAUNCH((kne_cu *) ctx, energy_kernel, grid, KNE_BLOCK, 0, score, ld, z, a, k, row0, rows, f, scale);
}

static void
top(void *ctx, int32_t *index, const float *score, int64_t ld, uint64_t *keys, int64_t rows, int64_t n_all, int64_t n)
{
    if (rows > 0 && n > 0)
        KNE_LAUNCH((kne_cu *) ctx, top_kernel, (unsigned) rows, 4 * KNE_BLOCK, 0, index, score, ld, keys, n_all, n);
}

void
kne_cu_fill_select(kne_backend *be)
{
    be->contrast = contrast;
    be->energy = energy;
    be->top = top;
}
