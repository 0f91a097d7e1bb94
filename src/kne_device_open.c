/*
 * kne_device_open.c - choosing the device. kne_cuda.so is loaded here and only here, and only once
 * libcuda.so.1 could be: a machine without a driver pays nothing for it.
 */
#include "kne_device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef kne_status (*cuda_new)(unsigned abi, int device, kne_backend **out, kne_err *err);

/* The folder of this program, with a slash at its end; "" if it cannot be told. */
static void
program_folder(char *out, size_t size)
{
    ssize_t n = readlink("/proc/self/exe", out, size - 1);
    char   *slash;

    out[n > 0 ? n : 0] = '\0';
    slash = strrchr(out, '/');
    out[slash ? slash + 1 - out : 0] = '\0';
}

static kne_status
open_cuda(int device, kne_backend **out, kne_err *err)
{
    char       path[4096];
    void      *lib;
    cuda_new   new_backend;

    if (!dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL))
        return kne_error(err, KNE_ERR_DEVICE, "there is no NVIDIA driver here (libcuda.so.1)");
    program_folder(path, sizeof path - sizeof "kne_cuda.so");
    memcpy(path + strlen(path), "kne_cuda.so", sizeof "kne_cuda.so");
    if (access(path, F_OK) != 0)
        return kne_error(err, KNE_ERR_DEVICE, "kne was built without its GPU backend (%s)", path);
    lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib)
        return kne_error(err, KNE_ERR_DEVICE, "the GPU backend cannot be loaded: %s", dlerror());
    *(void **) &new_backend = dlsym(lib, "kne_cuda_backend_new");
    if (!new_backend)
        return kne_error(err, KNE_ERR_DEVICE, "%s is not kne's GPU backend", path);
    return new_backend(KNE_BACKEND_ABI, device, out, err);
}

enum { ROWS = 9, IN = 96, OUT = 72 };

/* linear by weights of the type, rmsnorm of that, its gradient, log P of the first column; what comes out, in out. */
static void
sample_ops(kne_backend *be, kne_dtype type, const float *x, const void *w, float *out)
{
    const size_t n = ROWS * OUT;
    float       *dx = be->alloc(be->ctx, ROWS * IN * sizeof *dx), *y = be->alloc(be->ctx, 4 * n * sizeof *y);
    int32_t     *target = be->alloc(be->ctx, ROWS * sizeof *target);
    void        *dw = be->alloc(be->ctx, OUT * IN * sizeof(float));
    kne_mat      mat = {.data = dw, .type = type, .rows = OUT, .cols = IN, .ld = IN};

    if (dx && y && target && dw)
    {
        be->put(be->ctx, dx, x, ROWS * IN * sizeof *x);
        be->put(be->ctx, dw, w, OUT * IN * kne_dtype_size(type));
        be->linear(be->ctx, y, OUT, dx, IN, &mat, NULL, ROWS, 0);
        be->rmsnorm(be->ctx, y + n, y + 3 * n, y, NULL, 1e-5f, ROWS, OUT);
        be->rmsnorm_bwd(be->ctx, y + 2 * n, y + n, y, y + 3 * n, NULL, ROWS, OUT);
        be->logprob(be->ctx, y + 3 * n + ROWS, NULL, NULL, y, target, NULL, ROWS, OUT);
        be->get(be->ctx, out, y, 4 * n * sizeof *y);
    }
    for (int i = 0; i < 4; i++)
        if ((void *[]) {dx, y, target, dw}[i])
            be->release(be->ctx, (void *[]) {dx, y, target, dw}[i]);
}

kne_status
kne_device_self_test(kne_backend *be, kne_backend *cpu, kne_err *err)
{
    float    x[ROWS * IN], w[OUT * IN], out[2][4 * ROWS * OUT];
    uint16_t half[OUT * IN];
    uint64_t seed = 1;

    for (int i = 0; i < ROWS * IN; i++)
        x[i] = (float) (kne_random_next(&seed) >> 40) * 0x1p-23f - 1;
    for (int i = 0; i < OUT * IN; i++)
    {
        w[i] = (float) (kne_random_next(&seed) >> 40) * 0x1p-24f - 0.5f;
        half[i] = kne_f32_to_bf16(w[i]);
    }
    for (int type = 0; type < 2; type++)
    {
        double d = 0, size = 0;

        memset(out, 0, sizeof out);
        sample_ops(cpu, type ? KNE_BF16 : KNE_F32, x, type ? (void *) half : w, out[0]);
        sample_ops(be, type ? KNE_BF16 : KNE_F32, x, type ? (void *) half : w, out[1]);
        KNE_TRY(be->status(be->ctx, err));
        for (int i = 0; i < 4 * ROWS * OUT; i++)
        {
            d += ((double) out[0][i] - out[1][i]) * ((double) out[0][i] - out[1][i]);
            size += (double) out[0][i] * out[0][i];
        }
        if (!(d <= 1e-4 * size)) /* NaN never passes */
            return kne_error(err, KNE_ERR_DEVICE, "%s does not compute what the CPU does (%s)", be->name,
                             type ? "bfloat16" : "float32");
    }
    return KNE_OK;
}

/* A GPU that computes something else is none. */
static kne_status
try_out(kne_backend **be, kne_err *err)
{
    kne_backend *cpu;
    kne_status   st = kne_cpu_backend_new(1, NULL, &cpu, err);

    if (st == KNE_OK)
    {
        st = kne_device_self_test(*be, cpu, err);
        cpu->close(cpu);
    }
    if (st != KNE_OK)
    {
        (*be)->close(*be);
        *be = NULL;
    }
    return st;
}

kne_status
kne_device_open(const char *setting, int threads, kne_backend **out, char *note, size_t note_size, kne_err *err)
{
    const bool is_auto = strcmp(setting, "auto") == 0;
    kne_status st;
    int        device = -1, end = 0;

    *out = NULL;
    if (note_size)
        note[0] = '\0';
    if (sscanf(setting, "cuda:%3d%n", &device, &end) == 1 && (device < 0 || setting[end]))
        return kne_error(err, KNE_ERR_INVALID, "unknown device \"%s\"", setting);
    if (is_auto || end || strcmp(setting, "cuda") == 0)
    {
        st = open_cuda(device, out, err);
        if (st == KNE_OK)
            st = try_out(out, err);
        if (st == KNE_OK || !is_auto)
            return st;
        snprintf(note, note_size, "%s", err->msg);
    }
    else if (strcmp(setting, "cpu") != 0)
        return kne_error(err, KNE_ERR_INVALID, "unknown device \"%s\"", setting);
    return kne_cpu_backend_new(threads, NULL, out, err);
}
