/*
 * cuda_emul.cc - see cuda_emul.h.
 */
#include "cuda_emul.h"
#include "../kernels/kne_cuda.h"

#include <cstdio>
#include <cstdlib>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

static int last_error;

/* For the engine as a process: what its environment asks for, `otherwise` if nothing. */
static long
asked(const char *name, long otherwise)
{
    const char *value = getenv(name);

    return value ? atol(value) : otherwise;
}

/* ---- graphs ---- */

struct emul_graph
{
    std::vector<std::function<void()>> work;
};
static emul_graph *recording;
static bool        broken, no_graphs;
static int         replays;

void
emul_queue(std::function<void()> work)
{
    static long left = asked("EMUL_LOSE_AFTER", -1);

    if (left >= 0 && left-- == 0)
        last_error = cudaErrorLaunchFailure;
    if (recording)
        recording->work.push_back(work);
    else
        work();
}

/* Is this a call that no recording survives? */
static bool
breaks()
{
    broken |= recording != nullptr;
    return recording != nullptr;
}

/* Graphs cannot be recorded from now on, or can; how many were launched. */
extern "C" int
emul_refuse_graphs(bool refuse)
{
    no_graphs = refuse;
    return replays;
}

cudaError_t
cudaStreamBeginCapture(cudaStream_t, int)
{
    if (no_graphs || recording)
        return cudaErrorStreamCaptureUnsupported;
    recording = new emul_graph;
    broken = false;
    return cudaSuccess;
}

cudaError_t
cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph)
{
    *graph = broken ? nullptr : recording;
    if (broken)
        delete recording;
    recording = nullptr;
    return broken ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t
cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    *exec = new emul_graph(*graph);
    return cudaSuccess;
}

cudaError_t
cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t)
{
    for (auto &work : exec->work)
        work();
    replays++;
    return cudaGetLastError();
}

cudaError_t
cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t
cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

/* ---- device memory: one reserved range, blocks in order of address ---- */

#define SPACE ((size_t) 1 << 30)

/* How much of it the device has. */
static size_t
memory()
{
    static const size_t bytes = (size_t) asked("EMUL_MEMORY_MIB", 1024) << 20;

    return bytes;
}
#define PAGE  ((size_t) 4096)

struct chunk
{
    size_t from, size;
};
static char    *space;
static chunk    chunks[4096];
static int      n_chunks, open_depth;
static bool     poison = true;
static long     fail_at = -1; /* which allocation fails, counted down */

static void
protect(int how)
{
    size_t top = n_chunks ? chunks[n_chunks - 1].from + chunks[n_chunks - 1].size : 0;

    if (top && mprotect(space, top, how) != 0)
    {
        perror("mprotect");
        abort();
    }
}

static void
device_open(bool open)
{
    if (open ? open_depth++ == 0 : --open_depth == 0)
        if (poison)
            protect(open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void
emul_poison(bool on)
{
    if (poison != on)
        protect(on ? PROT_NONE : PROT_READ | PROT_WRITE);
    poison = on;
}

/* The n-th allocation from now on fails, once; -1: none. */
extern "C" void
emul_fail_alloc(long n)
{
    fail_at = n;
}

extern "C" void
emul_lose_device(void)
{
    last_error = cudaErrorLaunchFailure;
}

extern "C" void
emul_set_poison(bool on)
{
    emul_poison(on);
}

cudaError_t
cudaMalloc(void **p, size_t bytes)
{
    size_t at = 0, size = (bytes + PAGE - 1) / PAGE * PAGE + PAGE; /* a page between, for what runs over */
    int    i = 0;

    if (!space)
    {
        space = (char *) mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (space == MAP_FAILED)
            abort();
    }
    if (breaks())
        return cudaErrorStreamCaptureUnsupported;
    if (fail_at >= 0 && fail_at-- == 0)
        return last_error = cudaErrorMemoryAllocation;
    for (; i < n_chunks && chunks[i].from - at < size; i++)
        at = chunks[i].from + chunks[i].size;
    if (n_chunks == 4096 || at + size > memory())
        return last_error = cudaErrorMemoryAllocation;
    memmove(&chunks[i + 1], &chunks[i], (size_t) (n_chunks - i) * sizeof *chunks);
    chunks[i] = {at, size};
    n_chunks++;
    *p = space + at;
    mprotect(*p, size, PROT_READ | PROT_WRITE);
    memset(*p, 0xff, size); /* NaN: nobody may rely on what was there */
    if (poison && open_depth == 0)
        protect(PROT_NONE);
    return cudaSuccess;
}

cudaError_t
cudaFree(void *p)
{
    if (breaks())
        return cudaErrorStreamCaptureUnsupported;
    for (int i = 0; p && i < n_chunks; i++)
        if (space + chunks[i].from == p)
        {
            mprotect(p, chunks[i].size, PROT_NONE);
            memmove(&chunks[i], &chunks[i + 1], (size_t) (n_chunks - i - 1) * sizeof *chunks);
            n_chunks--;
            return cudaSuccess;
        }
    if (p)
    {
        fprintf(stderr, "cudaFree of what was not allocated\n");
        abort();
    }
    return cudaSuccess;
}

/* Blocks that are still allocated. */
extern "C" int
emul_allocated(void)
{
    return n_chunks;
}

static void
need_device(const void *p, size_t bytes, bool device)
{
    bool in = space && (const char *) p >= space && (const char *) p + bytes <= space + SPACE;

    if (in != device)
    {
        fprintf(stderr, "a copy between the wrong memories\n");
        abort();
    }
}

cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, cudaStream_t)
{
    need_device(to, bytes, kind == cudaMemcpyHostToDevice);
    need_device(from, bytes, kind == cudaMemcpyDeviceToHost);
    if (breaks()) /* from pageable memory */
        return cudaErrorStreamCaptureUnsupported;
    device_open(true);
    memcpy(to, from, bytes);
    device_open(false);
    return last_error;
}

cudaError_t
cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t)
{
    need_device(to, bytes, true);
    emul_queue([=] {
        device_open(true);
        memset(to, value, bytes);
        device_open(false);
    });
    return last_error;
}

cudaError_t
cudaStreamSynchronize(cudaStream_t)
{
    return breaks() ? cudaErrorStreamCaptureUnsupported : cudaGetLastError();
}

cudaError_t
cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = *free_bytes = memory();
    for (int i = 0; i < n_chunks; i++)
        *free_bytes -= chunks[i].size;
    return cudaSuccess;
}

cudaError_t
cudaGetDeviceCount(int *n)
{
    *n = 1;
    return cudaSuccess;
}

static bool old_chip;

/* A GPU opened from now on has no bfloat16, or has. */
extern "C" void
emul_old_chip(bool old)
{
    old_chip = old;
}

cudaError_t
cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    *p = {"emulated on the host", old_chip ? 7 : 8, old_chip ? 5 : 0, memory()};
    return cudaSuccess;
}

cudaError_t
cudaGetLastError()
{
    cudaError_t rc = last_error;

    if (rc == cudaErrorMemoryAllocation) /* others are for good */
        last_error = cudaSuccess;
    return rc;
}

const char *
cudaGetErrorString(cudaError_t rc)
{
    return rc == cudaErrorMemoryAllocation ? "out of memory" : rc == cudaSuccess ? "no error" : "unspecified launch failure";
}

/* ---- blocks as fibres ---- */

#define MAX_THREADS 256
#define STACK       ((size_t) 64 << 10)

struct fibre
{
#if defined(__x86_64__)
    void *sp;
#else
    ucontext_t context;
#endif
    char *stack;
    bool  done, waits, odd;
};
static fibre  fibres[MAX_THREADS], *running;
static int    n_fibres;
static char  *shared;
static size_t shared_size;
static const std::function<void()> *the_body;
static struct { int arrived, alive; char slot[2][32][16]; } warps[MAX_THREADS / 32];
static int block_arrived, block_alive;

#if defined(__x86_64__)
static void *main_sp;
extern "C" void emul_switch(void **save, void *to);
__asm__(".text\n.globl emul_switch\n.hidden emul_switch\nemul_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
static void to_main() { emul_switch(&running->sp, main_sp); }
static void to_fibre(fibre *f) { emul_switch(&main_sp, f->sp); }
#else
static ucontext_t main_context;
static void to_main() { swapcontext(&running->context, &main_context); }
static void to_fibre(fibre *f) { swapcontext(&main_context, &f->context); }
#endif

static void
release_if_all(bool warp, int w)
{
    int from = warp ? w * 32 : 0, to = warp ? w * 32 + 32 : n_fibres;
    int &arrived = warp ? warps[w].arrived : block_arrived, alive = warp ? warps[w].alive : block_alive;

    if (arrived == 0 || arrived < alive)
        return;
    arrived = 0;
    for (int i = from; i < to && i < n_fibres; i++)
        fibres[i].waits = false;
}

static void
fibre_main()
{
    (*the_body)();
    running->done = true;
    int w = (int) (running - fibres) / 32;
    warps[w].alive--;
    block_alive--;
    release_if_all(true, w);
    release_if_all(false, 0);
    to_main();
    abort();
}

static void
fibre_start(fibre *f)
{
    if (!f->stack)
        f->stack = (char *) malloc(STACK);
    f->done = f->waits = f->odd = false;
#if defined(__x86_64__)
    void **sp = (void **) ((uintptr_t) (f->stack + STACK - 64) & ~(uintptr_t) 15);

    *--sp = NULL; /* the return address of fibre_main, whose stack is aligned as after a call */
    *--sp = (void *) fibre_main;
    for (int i = 0; i < 6; i++)
        *--sp = NULL;
    f->sp = sp;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = NULL;
    makecontext(&f->context, fibre_main, 0);
#endif
}

void
emul_barrier(bool warp)
{
    int w = (int) (running - fibres) / 32;

    running->waits = true;
    if (warp)
        warps[w].arrived++;
    else
        block_arrived++;
    release_if_all(warp, w);
    if (running->waits)
        to_main();
}

void
emul_exchange(const void *mine, void *theirs, size_t size, int lane)
{
    auto &slot = warps[(running - fibres) / 32].slot[running->odd]; /* two, so that one barrier is enough */

    running->odd = !running->odd;
    memcpy(slot[threadIdx.x % 32], mine, size);
    emul_barrier(true);
    memcpy(theirs, slot[lane & 31], size);
}

void *
emul_shared()
{
    return shared;
}

static void
run_block()
{
    memset(shared, 0xff, shared_size);
    block_arrived = 0;
    block_alive = n_fibres;
    for (int w = 0; w * 32 < n_fibres; w++)
    {
        warps[w].arrived = 0;
        warps[w].alive = 32;
    }
    for (int i = 0; i < n_fibres; i++)
        fibre_start(&fibres[i]);
    for (int left = n_fibres; left > 0;)
    {
        bool moved = false;

        for (int i = 0; i < n_fibres; i++)
        {
            if (fibres[i].done || fibres[i].waits)
                continue;
            running = &fibres[i];
            threadIdx.x = (unsigned) i;
            to_fibre(running);
            moved = true;
            left -= running->done;
        }
        if (!moved)
        {
            fprintf(stderr, "a barrier that not all threads of the block reach\n");
            abort();
        }
    }
}

void
emul_launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &body)
{
    if (block.x % 32 || block.x > MAX_THREADS || block.y != 1 || block.z != 1 || smem > (48 << 10) || !grid.x ||
        !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
    {
        fprintf(stderr, "a launch that a GPU would refuse\n");
        abort();
    }
    if (smem > shared_size)
        shared = (char *) realloc(shared, shared_size = smem);
    the_body = &body;
    gridDim = grid;
    blockDim = block;
    n_fibres = (int) block.x;
    device_open(true);
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                run_block();
    device_open(false);
}

/* ---- the library's products ---- */

kne_status
kne_lt_new(kne_lt **out, kne_err *)
{
    *out = NULL;
    return KNE_OK;
}

void
kne_lt_free(kne_lt *)
{
}

bool
kne_lt_matmul(kne_cu *cu, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
              const void *b, int64_t ldb, kne_dtype type, float *c, int64_t ldc, float beta)
{
    if (!kne_cu_ready(cu))
        return true;
    if (type == KNE_BF16 && !cu->has_bf16)
    {
        fprintf(stderr, "a product of bfloat16, which such a chip has not\n");
        abort();
    }
    emul_queue([=] {
        device_open(true);
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++)
            {
                double sum = 0;

                for (int64_t p = 0; p < k; p++)
                    sum += (double) kne_dev_load(a, type, ta ? i * lda + p : p * lda + i) *
                           (double) kne_dev_load(b, type, tb ? p * ldb + j : j * ldb + p);
                c[j * ldc + i] = (float) (sum + (beta == 0 ? 0 : (double) beta * (double) c[j * ldc + i]));
            }
        device_open(false);
    });
    return true;
}
