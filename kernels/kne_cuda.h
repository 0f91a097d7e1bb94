/*
 * kne_cuda.h - what the CUDA backend's files share: its state, launching, and the device functions of
 * more than one kernel. Nobody outside kernels/ includes it.
 *
 * Conventions of every kernel here: rows and widths as in kne_backend.h, shapes in comments; a row's
 * result depends on that row alone and sums run in a fixed order (no atomics), so a run repeats bit for bit;
 * no fast-math intrinsics. The block size is the launch's, a multiple of 32.
 *
 * The files are also compiled for the host (KNE_EMUL, see test/cuda_emul.h): they keep to what it emulates.
 */
#ifndef KNE_CUDA_H
#define KNE_CUDA_H

extern "C" {
#include "kne_backend.h"
}

#ifdef KNE_EMUL
#include "cuda_emul.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define KNE_BLOCK 256
#define kne_launch(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define KNE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#include <math.h>

#define KNE_HEAD_MAX 512 /* widest head of attention */

typedef struct kne_lt kne_lt; /* products of the library (lt.cu) */
typedef struct kne_graphs kne_graphs; /* recorded sequences of ops (graph.cu) */

typedef struct kne_buffer
{
    void  *p;
    size_t size;
} kne_buffer;

/* What the last cast of activations was of, so that q, k and v cast their common input once. */
typedef struct kne_cast
{
    const float *x;
    int64_t      ldx, n, k;
    kne_dtype    type;
    bool         split;
} kne_cast;

typedef struct kne_cu
{
    kne_backend  be; /* be.ctx is this struct */
    char         name[160];
    int          device;
    cudaStream_t stream;
    kne_err      failed; /* code KNE_OK: nothing */
    bool         recording, broken; /* a graph; something came up that cannot be in one (graph.cu) */
    kne_graphs  *graphs;
    kne_lt      *lt;
    kne_buffer   cast, scale, sum, row; /* grown when a pass needs more; gemm.cu, gemm.cu, gemm.cu, attention.cu */
    kne_cast     last;
    bool         own_products; /* for tests: as if the library had none */
    bool         has_bf16;   /* the library has products of bfloat16: from compute capability 8.0 on */
    int64_t      split_rows; /* products of no more rows carry activations in two halves (gemm.cu) */
} kne_cu;

/* False: something failed before, ask for nothing more. Also makes the device current in this thread. */
bool kne_cu_ready(kne_cu *cu);
/* Records the failure; what names the call. */
void kne_cu_check(kne_cu *cu, cudaError_t rc, const char *what);
void kne_cu_fail(kne_cu *cu, kne_status code, const char *fmt, ...);
/* The buffer with room for so many bytes, contents lost when it grows; NULL after a recorded failure. */
void *kne_cu_reserve(kne_cu *cu, kne_buffer *b, size_t bytes);

#define KNE_LAUNCH(cu, kernel, grid, block, smem, ...)                        \
    do                                                                        \
    {                                                                         \
        if (kne_cu_ready(cu))                                                 \
        {                                                                     \
            (cu)->last.x = NULL;                                              \
            kne_launch(kernel, grid, block, smem, (cu)->stream, __VA_ARGS__); \
            kne_cu_check(cu, cudaGetLastError(), #kernel);                    \
        }                                                                     \
    } while (0)

/* Each file fills in its ops. */
void kne_cu_fill_gemm(kne_backend *be);
void kne_cu_fill_norm(kne_backend *be);
void kne_cu_fill_attention(kne_backend *be);
void kne_cu_fill_elem(kne_backend *be);
void kne_cu_fill_loss(kne_backend *be);
void kne_cu_fill_step(kne_backend *be);
void kne_cu_fill_select(kne_backend *be);
void kne_cu_fill_graph(kne_backend *be);

kne_graphs *kne_graphs_new(void); /* freed by free, once dropped; NULL: out of memory */
void        kne_cu_drop_graphs(kne_cu *cu);

/*
 * C[m, n] = op(A) op(B) + beta C, column-major as the library has it: op(A) [m, k], op(B) [k, n]. A and B of one
 * type, C float, sums in float, never TF32. Failures are recorded. False: the library has no such product.
 */
bool       kne_lt_matmul(kne_cu *cu, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                         const void *b, int64_t ldb, kne_dtype type, float *c, int64_t ldc, float beta);
kne_status kne_lt_new(kne_lt **out, kne_err *err);
void       kne_lt_free(kne_lt *lt);

/* ---- launch shapes ---- */

static inline unsigned
kne_blocks(int64_t n, int64_t per_block)
{
    int64_t b = (n + per_block - 1) / per_block;

    return (unsigned) (b < 1 ? 1 : b > (1 << 20) ? 1 << 20 : b); /* kernels stride over what is left */
}

/* Threads for a row of so many elements. */
static inline unsigned
kne_row_threads(int64_t width)
{
    unsigned t = 32;

    while (t < KNE_BLOCK && (int64_t) t * 4 < width)
        t *= 2;
    return t;
}

/* ---- device functions ---- */

#define KNE_STRIDE(i, n)                                                                    \
    for (int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x; i < (n);              \
         i += (int64_t) gridDim.x * blockDim.x)

static __device__ __forceinline__ float
kne_dev_load(const void *p, kne_dtype type, int64_t i)
{
    if (type == KNE_F32)
        return ((const float *) p)[i];
    if (type == KNE_BF16)
        return __uint_as_float((uint32_t) ((const uint16_t *) p)[i] << 16);
    return __half2float(((const __half *) p)[i]);
}

static __device__ __forceinline__ uint16_t
kne_to_bf16(float f)
{
    const uint32_t u = __float_as_uint(f);

    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t) (u >> 16 | 0x40);
    return (uint16_t) ((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

template <class T>
static __device__ __forceinline__ T
kne_warp_sum(T v)
{
    for (int o = 16; o > 0; o >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

static __device__ __forceinline__ float
kne_warp_max(float v)
{
    for (int o = 16; o > 0; o >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

/* The sum over the block, in every thread. */
template <class T>
static __device__ __forceinline__ T
kne_block_sum(T v)
{
    __shared__ T part[32];
    int warp = (int) threadIdx.x / 32, n_warps = (int) blockDim.x / 32;

    v = kne_warp_sum(v);
    __syncthreads(); /* part may still be read from the call before */
    if (threadIdx.x % 32 == 0)
        part[warp] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < n_warps; i++)
        v += part[i];
    return v;
}

#endif
