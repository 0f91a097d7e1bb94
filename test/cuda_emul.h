/*
 * cuda_emul.h - CUDA on the host, as far as kernels/ uses it, so that every kernel and the backend around it run in
 * the tests of a machine without a GPU.
 *
 * A block's threads are fibres of one system thread, switched at barriers and shuffles; blocks run one after another.
 * Device memory is unreadable and unwritable outside of kernels and copies: host code that follows a device
 * pointer ends the program. A barrier that not all threads reach ends it too. Not emulated: speed,
 * races between warps that happen to run in order, and the library's products (a plain loop in double). What a graph cannot hold
 * breaks its recording, as on a GPU.
 */
#ifndef CUDA_EMUL_H
#define CUDA_EMUL_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

extern "C" {
#include "kne_base.h"
}

#define KNE_BLOCK 64 /* two warps: enough to go wrong */
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define KNE_DYNAMIC_SHARED(type, name) type *name = (type *) emul_shared()
#define kne_launch(kernel, grid, block, smem, stream, ...) emul_go(kernel, grid, block, smem, __VA_ARGS__)

struct dim3
{
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void  emul_launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &body);
void  emul_queue(std::function<void()> work); /* now, or into the graph that is recorded */
void *emul_shared();
void  emul_barrier(bool warp);
void  emul_exchange(const void *mine, void *theirs, size_t size, int lane); /* of the warp */
void  emul_poison(bool on); /* off: device memory stays open, which is quicker */

/* The arguments are taken now, whenever the kernel runs. */
template <class... P, class... A> void
emul_go(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A... args)
{
    std::tuple<P...> kept(args...);

    emul_queue([=] { emul_launch(grid, block, smem, [=] { std::apply(kernel, kept); }); });
}

static inline void __syncthreads() { emul_barrier(false); }
static inline void __syncwarp() { emul_barrier(true); }

template <class T> T
__shfl_sync(unsigned, T v, int lane)
{
    T r;

    emul_exchange(&v, &r, sizeof v, lane);
    return r;
}

template <class T> T
__shfl_xor_sync(unsigned mask, T v, int x)
{
    return __shfl_sync(mask, v, (int) (threadIdx.x % 32) ^ x);
}

static inline float
__uint_as_float(uint32_t u)
{
    float f;

    memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t
__float_as_uint(float f)
{
    uint32_t u;

    memcpy(&u, &f, 4);
    return u;
}

struct __half
{
    uint16_t bits;
};
static inline float __half2float(__half h) { return kne_f16_to_f32(h.bits); }
static inline __half __float2half(float f) { return {kne_f32_to_f16(f)}; }

/* ---- the runtime's functions that kne_cuda.cu calls ---- */

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorLaunchFailure = 719, cudaErrorStreamCaptureUnsupported = 900 };
enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaStreamNonBlocking = 1 };
typedef struct emul_stream *cudaStream_t;
struct cudaDeviceProp
{
    char   name[256];
    int    major, minor;
    size_t totalGlobalMem;
};

cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaFree(void *p);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, cudaStream_t s);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t s);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t rc);
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, int) { *s = nullptr; return cudaSuccess; }
static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t);

/* ---- graphs ---- */

typedef struct emul_graph *cudaGraph_t;
typedef struct emul_graph *cudaGraphExec_t;
enum { cudaStreamCaptureModeThreadLocal = 1 };

cudaError_t cudaStreamBeginCapture(cudaStream_t s, int mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

#endif
