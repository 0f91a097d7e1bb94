/*
 * kne_cpu.h - what the CPU backend's own files share; nobody else includes it.
 *
 * Each instruction set has one table of matrix kernels (kne_gemm*.c, from
 * kne_gemm_impl.h) and one of the other ops (kne_cpu_ops*.c, from
 * kne_cpu_ops_impl.h); kne_cpu.c chooses and splits the work into tasks.
 */
#ifndef KNE_CPU_H
#define KNE_CPU_H

#include "kne_backend.h"
#include "kne_pool.h"

/* Scratch of one thread: a fixed size, so no op ever allocates. */
#define KNE_CPU_SCRATCH ((size_t) 3328 * 1024)

/*
 * One product y[n, out] = beta y + x[n, k] op(W) (+ bias).
 * x[r, i] is x[r * xs_row + i * xs_k]; nt wants xs_k = 1.
 */
typedef struct kne_gemm
{
    float       *y;
    int64_t      ldy;
    const float *x;
    int64_t      xs_row, xs_k;
    const char  *w;
    kne_dtype    type;
    int64_t      ldw; /* elements */
    const float *bias;
    float        beta;
    int64_t      k;
    bool         turn; /* nt: W is turned into panels; a matter of speed alone */
} kne_gemm;

typedef struct kne_gemm_kernels
{
    /* W [out, k]: dot products along k. Computes rows [r0, r1) x outputs [o0, o1). */
    void (*nt)(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1, void *scratch);
    /* W [k, out]: sums of rows of W. */
    void (*nn)(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1, void *scratch);
} kne_gemm_kernels;

typedef struct kne_cpu
{
    kne_backend             be; /* be.ctx is this struct */
    kne_pool               *pool;
    int                     n_threads;
    const kne_gemm_kernels *gemm;
    int64_t                 turn_min; /* rows from which on kernel nt turns W; of long sums twice as many */
    char                   *scratch; /* n_threads x KNE_CPU_SCRATCH */
    void                   *scratch_raw;
    char                    name[64];
} kne_cpu;

extern const kne_gemm_kernels kne_gemm_portable;
void kne_ops_fill_portable(kne_backend *be);
void kne_cpu_fill_step(kne_backend *be); /* of any instruction set */
#if defined(__x86_64__)
extern const kne_gemm_kernels kne_gemm_avx2, kne_gemm_avx512;
void kne_ops_fill_avx2(kne_backend *be);
void kne_ops_fill_avx512(kne_backend *be);
#endif

#endif
