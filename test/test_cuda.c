/*
 * test_cuda.c - the CUDA backend against the CPU: every op on fresh random inputs with poisoned outputs, and whole
 * edits on tiny models of every family.
 *
 * Built twice: as build/test_cuda with kernels/ compiled for the host (cuda_emul.h), which needs no GPU and is part of
 * `make test`; and as build/gpu_check, which runs kne_cuda.so on a real one (`make gpu-check`). Neither links
 * more than libc and libm: the tokenizer and the digest that edits need are small ones of this file.
 */
#include "kne_device.h"
#include "kne_test.h"
#include "tiny_model.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static kne_backend *cpu, *gpu;
static uint64_t     seed;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

#include "test_cuda_ops.h"
#include "test_cuda_edit.h"

#ifdef KNE_GPU_CHECK
#define replays()   0 /* nobody counts them on a GPU */
#define GPU_MISSING 77 /* no GPU here: not a failure, and not a pass */

/* Does the driver show one? Then whatever keeps kne from it is a failure. */
static bool
gpu_here(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    int (*init)(unsigned), (*count)(int *), n = 0;

    *(void **) &init = driver ? dlsym(driver, "cuInit") : NULL;
    *(void **) &count = driver ? dlsym(driver, "cuDeviceGetCount") : NULL;
    return init && count && init(0) == 0 && count(&n) == 0 && n > 0;
}

static kne_status
open_gpu(kne_err *err)
{
    char note[1];

    return kne_device_open("cuda", 0, &gpu, note, sizeof note, err);
}

/* A switch for tests in kne_cuda.so, which is loaded by now, from beside this program. */
static void *
switch_of(const char *name)
{
    char    path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - sizeof "kne_cuda.so");
    void   *lib, *at;

    path[n > 0 ? n : 0] = '\0';
    strcpy(strrchr(path, '/') + 1, "kne_cuda.so");
    lib = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    at = lib ? dlsym(lib, name) : NULL;
    check(at != NULL, "kne_cuda.so has its switch %s", name);
    return at;
}

static void
split_rows(kne_backend *be, int64_t rows)
{
    void (*set)(kne_backend *, int64_t);

    *(void **) &set = switch_of("kne_cuda_split_rows");
    if (set)
        set(be, rows);
}

static void
own_products(kne_backend *be, bool own)
{
    void (*set)(kne_backend *, bool);

    *(void **) &set = switch_of("kne_cuda_own_products");
    if (set)
        set(be, own);
}
#else
kne_status kne_cuda_backend_new(unsigned abi, int device, kne_backend **out, kne_err *err);
void       emul_fail_alloc(long n);
void       emul_lose_device(void);
void       emul_set_poison(bool on);
int        emul_allocated(void);
int        emul_refuse_graphs(bool refuse);
void       emul_old_chip(bool old);

void       kne_cuda_split_rows(kne_backend *be, int64_t rows);
void       kne_cuda_own_products(kne_backend *be, bool own);

#define split_rows kne_cuda_split_rows
#define replays()  emul_refuse_graphs(false)
#define own_products kne_cuda_own_products

static kne_status
open_gpu(kne_err *err)
{
    return kne_cuda_backend_new(KNE_BACKEND_ABI, -1, &gpu, err);
}

/* An op that does nothing. */
static void
no_norm(void *ctx, float *y, float *rstd, const float *x, const float *w, float eps, int64_t n, int64_t d)
{
}

/* A chip whose library has no product of bfloat16: ours does it, and an edit comes out the same. */
static void
test_old_chip(void)
{
    kne_backend *whole = gpu;
    kne_err      err;
    world       *w;

    emul_old_chip(true);
    if (check(open_gpu(&err) == KNE_OK, "a chip without bfloat16"))
    {
        test_products(1e-4);
        w = world_new(&tiny_specs[1], 17, gpu); /* bfloat16 */
        compare_jobs(w, "bfloat16", "without the library's", NULL, EDITS);
        world_free(w);
        gpu->close(gpu);
    }
    emul_old_chip(false);
    gpu = whole;
}

/* Memory that runs out fails what needed it and nothing else; a lost device stays lost. */
static void
test_failures(void)
{
    kne_backend broken = *gpu;
    world      *w = world_new(&tiny_specs[0], 7, gpu);
    kne_backend *wrong = NULL;
    kne_edit_result *r = NULL;
    kne_err     err;
    int         before = emul_allocated(), failed = 0, tries = 0;
    bool        clean = true;
    kne_edit_job job = job_of(w, gpu, 1);

    for (bool through = false; !through && tries < 200; tries++)
    {
        emul_fail_alloc(tries);
        kne_status st = kne_edit_run(&job, &r, &err);

        emul_fail_alloc(-1);
        through = st == KNE_OK;
        clean &= through || (st == KNE_ERR_NOMEM && emul_allocated() <= before + 4);
        failed += !through;
        kne_edit_result_free(r);
        r = NULL;
    }
    check(failed > 5 && tries < 200 && clean, "device memory that runs out at any of %d allocations fails the job alone",
          failed);
    check(kne_cuda_backend_new(KNE_BACKEND_ABI + 1, -1, &wrong, &err) == KNE_ERR_UNSUPPORTED && !wrong,
          "a table of another version is refused");
    check(kne_cuda_backend_new(KNE_BACKEND_ABI, 1, &wrong, &err) == KNE_ERR_DEVICE && strstr(err.msg, "no GPU 1"),
          "a GPU that is not there is refused (%s)", err.msg);
    broken.rmsnorm = no_norm;
    check(kne_device_self_test(gpu, cpu, &err) == KNE_OK && kne_device_self_test(&broken, cpu, &err) == KNE_ERR_DEVICE,
          "a device that computes something else is refused (%s)", err.msg);
    emul_lose_device();
    kne_status first = kne_edit_run(&job, &r, &err), second = kne_edit_run(&job, &r, &err);

    check(first == KNE_ERR_DEVICE && second == KNE_ERR_DEVICE && !r, "a lost device fails all that follows (%s)", err.msg);
    world_free(w);
}
#endif

/* Steps done from a record are the steps, bit for bit; and where nothing can be recorded, they are done all the same. */
static void
test_graphs(void)
{
    kne_backend      plain = *gpu;
    world           *w = world_new(&tiny_specs[0], 11, gpu);
    kne_edit_job     job = job_of(w, gpu, 1);
    kne_edit_result *r[3] = {NULL, NULL, NULL};
    kne_err          err;
    bool             same = true;
    int              recorded = replays();

    plain.begin = NULL;
    plain.end = NULL;
    for (int i = 0; i < 3 && same; i++)
    {
#ifndef KNE_GPU_CHECK
        emul_refuse_graphs(i == 1);
#endif
        job.backend = i ? gpu : &plain;
        same &= ok(kne_edit_run(&job, &r[i], &err), &err);
        same = same && r[i]->edit[0].steps == r[0]->edit[0].steps && r[i]->edit[0].p_after == r[0]->edit[0].p_after &&
               r[i]->edit[0].norm == r[0]->edit[0].norm;
    }
    recorded = replays() - recorded;
#ifndef KNE_GPU_CHECK
    same &= recorded > 2;
#endif
    check(same, "an edit of %d steps with %d passes from a record is the same, bit for bit", r[0] ? r[0]->edit[0].steps : 0, recorded);
    for (int i = 0; i < 3; i++)
        kne_edit_result_free(r[i]);
    world_free(w);
}

int
main(int argc, char **argv)
{
    kne_err err;

    seed = argc > 1 ? strtoull(argv[1], NULL, 10) : (uint64_t) time(NULL);
    printf("# seed %llu\n", (unsigned long long) seed);
    if (open_gpu(&err) != KNE_OK)
    {
#ifdef KNE_GPU_CHECK
        if (gpu_here())
        {
            check(false, "the GPU is used (%s)", err.msg);
            return kne_test_done();
        }
        printf("# %s\n1..0 # SKIP no GPU: nothing was checked\n", err.msg);
        return GPU_MISSING;
#else
        printf("# %s\nBail out!\n", err.msg);
        return 1;
#endif
    }
    if (!ok(kne_cpu_backend_new(2, NULL, &cpu, &err), &err))
        return 1;
    printf("# %s against %s\n", gpu->name, cpu->name);
    split_rows(gpu, 0); /* activations in one 16-bit half: what large passes do */
    test_products(1e-4);
    own_products(gpu, true); /* what is done where the library has no product */
    test_products(1e-7);
    test_matmul_tn();
    own_products(gpu, false);
    split_rows(gpu, 1 << 30);
    test_ops();
    test_edits(argc > 2 ? 1 : TINY_N_SPEC); /* "one": for the sanitizer, which is slow */
    test_graphs();
#ifndef KNE_GPU_CHECK
    test_old_chip();
    test_failures();
#endif
    gpu->close(gpu);
    cpu->close(cpu);
    return kne_test_done();
}
