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
    strcat(path, "kne_cuda.so");
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
        if (st == KNE_OK || !is_auto)
            return st;
        snprintf(note, note_size, "%s", err->msg);
    }
    else if (strcmp(setting, "cpu") != 0)
        return kne_error(err, KNE_ERR_INVALID, "unknown device \"%s\"", setting);
    return kne_cpu_backend_new(threads, NULL, out, err);
}
