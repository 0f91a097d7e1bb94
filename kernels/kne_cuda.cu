/*
 * kne_cuda.cu - the CUDA backend's table: device, memory, failures. kne-engine loads it at run time
 * (src/kne_device_open.c) and finds nothing but the functions at the end.
 *
 * All work goes to one stream, in order. A failure is kept until status asks for it; what is asked for in between
 * does nothing. Plain allocations; the buffers of products grow with the first pass of a size and then stay.
 */
#include "kne_cuda.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static __thread const kne_cu *current; /* whose device this thread has set */

void
kne_cu_fail(kne_cu *cu, kne_status code, const char *fmt, ...)
{
    va_list ap;

    if (cu->recording) /* what is wrong shows again when the ops are done */
    {
        cu->broken = true;
        return;
    }
    if (cu->failed.code != KNE_OK)
        return;
    memset(&cu->failed, 0, sizeof cu->failed);
    cu->failed.code = code;
    va_start(ap, fmt);
    vsnprintf(cu->failed.msg, sizeof cu->failed.msg, fmt, ap);
    va_end(ap);
}

void
kne_cu_check(kne_cu *cu, cudaError_t rc, const char *what)
{
    if (rc == cudaSuccess)
        return;
    if (rc == cudaErrorMemoryAllocation)
        kne_cu_fail(cu, KNE_ERR_NOMEM, "out of device memory (%s)", what);
    else
        kne_cu_fail(cu, KNE_ERR_DEVICE, "the GPU failed in %s: %s", what, cudaGetErrorString(rc));
}

bool
kne_cu_ready(kne_cu *cu)
{
    if (cu->failed.code != KNE_OK || (cu->recording && cu->broken))
        return false;
    if (current != cu)
    {
        kne_cu_check(cu, cudaSetDevice(cu->device), "cudaSetDevice");
        current = cu;
    }
    return cu->failed.code == KNE_OK;
}

/* True, and the recording is over: no such thing can be in one. */
static bool
outside_record(kne_cu *cu)
{
    cu->broken = cu->recording;
    return cu->broken;
}

void *
kne_cu_reserve(kne_cu *cu, kne_buffer *b, size_t bytes)
{
    if (!kne_cu_ready(cu))
        return NULL;
    if (bytes <= b->size)
        return b->p;
    cu->last.x = NULL;
    if (outside_record(cu))
        return NULL;
    kne_cu_drop_graphs(cu);
    if (b->p)
        kne_cu_check(cu, cudaFree(b->p), "cudaFree"); /* waits for what uses it */
    b->p = NULL;
    b->size = 0;
    bytes = (bytes + bytes / 4 + 4095) & ~(size_t) 4095;
    cudaError_t rc = cudaMalloc(&b->p, bytes);

    if (rc != cudaSuccess)
    {
        cudaGetLastError(); /* not a launch's */
        b->p = NULL;
    }
    kne_cu_check(cu, rc, "a product's buffer");
    b->size = b->p ? bytes : 0;
    return b->p;
}

/* ---- memory ---- */

static void *
cu_alloc(void *ctx, size_t bytes)
{
    kne_cu *cu = (kne_cu *) ctx;
    void   *p = NULL;

    if (!kne_cu_ready(cu) || outside_record(cu))
        return NULL;
    cu->last.x = NULL; /* the address may be that of another's */
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess)
    {
        cudaGetLastError(); /* the caller says it; nothing is broken */
        return NULL;
    }
    kne_cu_check(cu, cudaMemsetAsync(p, 0, bytes, cu->stream), "cudaMemsetAsync");
    return p;
}

static void
cu_release(void *ctx, void *p)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (current != cu)
        cudaSetDevice(cu->device);
    current = cu;
    kne_cu_drop_graphs(cu);
    cudaFree(p);
}

static void
cu_put(void *ctx, void *to, const void *from_host, size_t bytes)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (bytes == 0 || !kne_cu_ready(cu) || outside_record(cu))
        return;
    cu->last.x = NULL;
    /* from pageable memory: staged before it returns */
    kne_cu_check(cu, cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, cu->stream), "a copy to it");
}

static void
cu_get(void *ctx, void *to_host, const void *from, size_t bytes)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (outside_record(cu))
        return;
    if (bytes && kne_cu_ready(cu))
        kne_cu_check(cu, cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, cu->stream), "a copy from it");
    if (kne_cu_ready(cu))
        kne_cu_check(cu, cudaStreamSynchronize(cu->stream), "a pass");
    if (cu->failed.code != KNE_OK)
        memset(to_host, 0, bytes); /* never what happened to lie there */
}

static void
cu_zero(void *ctx, void *to, size_t bytes)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (bytes == 0 || !kne_cu_ready(cu))
        return;
    cu->last.x = NULL;
    kne_cu_check(cu, cudaMemsetAsync(to, 0, bytes, cu->stream), "cudaMemsetAsync");
}

static void
cu_memory(void *ctx, size_t *free_bytes, size_t *total_bytes)
{
    kne_cu *cu = (kne_cu *) ctx;

    *free_bytes = *total_bytes = 0;
    if (kne_cu_ready(cu))
        kne_cu_check(cu, cudaMemGetInfo(free_bytes, total_bytes), "cudaMemGetInfo");
}

static kne_status
cu_status(void *ctx, kne_err *err)
{
    kne_cu    *cu = (kne_cu *) ctx;
    kne_status st = cu->failed.code;

    if (st == KNE_OK)
        return KNE_OK;
    if (err)
        *err = cu->failed;
    if (st != KNE_ERR_DEVICE)
        cu->failed.code = KNE_OK;
    return st;
}

/* ---- open and close ---- */

static kne_status
refuse(kne_err *err, kne_status code, const char *fmt, ...)
{
    va_list ap;

    if (err)
    {
        memset(err, 0, sizeof *err);
        err->code = code;
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
    }
    return code;
}

static void
cu_close(kne_backend *be)
{
    kne_cu *cu;

    if (!be)
        return;
    cu = (kne_cu *) be->ctx;
    cudaSetDevice(cu->device);
    if (cu->graphs)
        kne_cu_drop_graphs(cu);
    free(cu->graphs);
    cudaFree(cu->cast.p);
    cudaFree(cu->scale.p);
    cudaFree(cu->sum.p);
    cudaFree(cu->row.p);
    kne_lt_free(cu->lt);
    if (cu->stream)
        cudaStreamDestroy(cu->stream);
    if (current == cu)
        current = NULL;
    free(cu);
}

/* device -1: the first. abi: KNE_BACKEND_ABI of the caller. */
extern "C" __attribute__((visibility("default"))) kne_status
kne_cuda_backend_new(unsigned abi, int device, kne_backend **out, kne_err *err)
{
    struct cudaDeviceProp prop;
    kne_cu               *cu;
    kne_backend          *be;
    int                   n = 0;
    cudaError_t           rc;
    kne_status            st;

    *out = NULL;
    if (abi != KNE_BACKEND_ABI)
        return refuse(err, KNE_ERR_UNSUPPORTED, "kne_cuda.so is of another version than kne-engine");
    rc = cudaGetDeviceCount(&n);
    if (rc != cudaSuccess)
        return refuse(err, KNE_ERR_DEVICE, "no usable GPU: %s", cudaGetErrorString(rc));
    if (n < 1 || device >= n)
        return refuse(err, KNE_ERR_DEVICE, "there is no GPU %d: this machine shows %d", device < 0 ? 0 : device, n);
    device = device < 0 ? 0 : device;
    rc = cudaGetDeviceProperties(&prop, device);
    if (rc == cudaSuccess)
        rc = cudaSetDevice(device);
    if (rc != cudaSuccess)
        return refuse(err, KNE_ERR_DEVICE, "GPU %d cannot be used: %s", device, cudaGetErrorString(rc));
    if (prop.major * 10 + prop.minor < 75)
        return refuse(err, KNE_ERR_UNSUPPORTED, "GPU %d (%s) has compute capability %d.%d; 7.5 or newer is needed",
                      device, prop.name, prop.major, prop.minor);
    cu = (kne_cu *) calloc(1, sizeof *cu);
    if (cu && !(cu->graphs = kne_graphs_new()))
    {
        free(cu);
        cu = NULL;
    }
    if (!cu)
        return refuse(err, KNE_ERR_NOMEM, "out of memory");
    cu->device = device;
    cu->has_bf16 = prop.major >= 8;
    cu->split_rows = 96;
    snprintf(cu->name, sizeof cu->name, "cuda:%d: %.80s (sm_%d%d), %.1f GiB", device, prop.name, prop.major,
             prop.minor, (double) prop.totalGlobalMem / (1 << 30));
    be = &cu->be;
    be->name = cu->name;
    be->ctx = cu;
    be->alloc = cu_alloc;
    be->release = cu_release;
    be->put = cu_put;
    be->get = cu_get;
    be->zero = cu_zero;
    be->memory = cu_memory;
    be->status = cu_status;
    be->close = cu_close;
    kne_cu_fill_gemm(be);
    kne_cu_fill_norm(be);
    kne_cu_fill_attention(be);
    kne_cu_fill_elem(be);
    kne_cu_fill_loss(be);
    kne_cu_fill_step(be);
    kne_cu_fill_select(be);
    kne_cu_fill_graph(be);
    rc = cudaStreamCreateWithFlags(&cu->stream, cudaStreamNonBlocking);
    st = rc == cudaSuccess ? kne_lt_new(&cu->lt, err)
                           : refuse(err, KNE_ERR_DEVICE, "GPU %d cannot be used: %s", device, cudaGetErrorString(rc));
    if (st != KNE_OK)
    {
        cu_close(be);
        return st;
    }
    *out = be;
    return KNE_OK;
}

/* For tests: products by our own kernel, as where the library has none; or not. */
extern "C" __attribute__((visibility("default"))) void
kne_cuda_own_products(kne_backend *be, bool own)
{
    ((kne_cu *) be->ctx)->own_products = own;
}

/* For tests and measurements: products of at most so many rows carry activations in two halves (gemm.cu). */
extern "C" __attribute__((visibility("default"))) void
kne_cuda_split_rows(kne_backend *be, int64_t rows)
{
    ((kne_cu *) be->ctx)->split_rows = rows;
}
