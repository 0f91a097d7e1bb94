/*
 * kne_cpu.c - the CPU's op table: choosing the instruction set, and splitting
 * matrix products into tasks.
 *
 * Tasks are blocks of outputs x rows; a sum is never split, so the number of
 * threads cannot change a bit (kne_gemm_impl.h has the other half of that).
 */
#include "kne_cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Below so many multiply-adds a product stays on the caller: a hand-off costs about a microsecond. */
#define SPLIT_MIN 300000.0
/* Rows below which a task is not split again: each part packs or widens W for itself. */
#define SPLIT_ROWS 32
/* k from which on a row's sum over lanes costs little beside its products, so that turning W pays later. */
#define TURN_LONG 512

typedef void (*gemm_kernel)(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1,
                            void *scratch);

typedef struct gemm_job
{
    const kne_gemm *g;
    kne_cpu        *cpu;
    gemm_kernel     kernel;
    int64_t         out, n;
    int64_t         o_unit, o_blocks, r_blocks; /* a grid of tasks */
} gemm_job;

static inline int64_t
min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* How many blocks of at most `size` n are. */
static inline int64_t
blocks_of(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

static void
gemm_task(void *arg, int64_t task, int thread)
{
    const gemm_job *j = arg;
    const int64_t   o = task / j->r_blocks, r = task % j->r_blocks, units = blocks_of(j->out, j->o_unit), pairs = blocks_of(j->n, 2);

    j->kernel(j->g, units * o / j->o_blocks * j->o_unit, min64(units * (o + 1) / j->o_blocks * j->o_unit, j->out),
              pairs * r / j->r_blocks * 2, min64(pairs * (r + 1) / j->r_blocks * 2, j->n), j->cpu->scratch + (size_t) thread * KNE_CPU_SCRATCH);
}

/*
 * o_unit, o_max, r_max: outputs come in multiples of o_unit, rows in pairs; the largest block of a task.
 * per_thread: tasks a thread where the shape allows, since threads may be uneven; all of nearly equal size.
 */
static void
gemm_run(kne_cpu *cpu, const kne_gemm *g, gemm_kernel kernel, int64_t out, int64_t n,
         int64_t o_unit, int64_t o_max, int64_t r_max, int64_t per_thread)
{
    gemm_job      job = {.g = g, .cpu = cpu, .kernel = kernel, .out = out, .n = n, .o_unit = o_unit};
    const int64_t threads = (double) out * (double) n * (double) g->k < SPLIT_MIN ? 1 : cpu->n_threads;

    if (n <= 0 || out <= 0)
        return;
    job.o_blocks = blocks_of(out, o_max);
    job.r_blocks = blocks_of(n, r_max);
    if (threads > 1)
    {
        const int64_t o_want = min64(blocks_of(threads * per_thread, job.r_blocks), blocks_of(out, o_unit));
        int64_t       tasks, more = 1;

        if (o_want > job.o_blocks)
            job.o_blocks = o_want;
        tasks = job.o_blocks * job.r_blocks;
        /* a few tasks that do not come out even: rows are split as well */
        while (tasks < threads * per_thread && tasks * more % threads)
            more++;
        if (n / (job.r_blocks * more) >= SPLIT_ROWS)
            job.r_blocks *= more;
    }
    if (threads > 1)
        kne_pool_run(cpu->pool, gemm_task, &job, job.o_blocks * job.r_blocks);
    else
        for (int64_t t = 0; t < job.o_blocks * job.r_blocks; t++)
            gemm_task(&job, t, 0);
}

static void
gemm_nt(kne_cpu *cpu, kne_gemm *g, int64_t out, int64_t n)
{
    /* rows of x of a block stay in half of a second-level cache while rows of W pass by */
    int64_t r_max = 512 * 1024 / (int64_t) sizeof(float) / (g->k > 0 ? g->k : 1);

    g->turn = n / (g->k < TURN_LONG ? 1 : 2) >= cpu->turn_min;
    if (g->turn) /* few blocks of rows, of equal size, since each turns W again */
    {
        int64_t blocks = blocks_of(n, 1024);

        gemm_run(cpu, g, cpu->gemm->nt, out, n, 64, out, blocks_of(n, blocks), 2);
    }
    else
        gemm_run(cpu, g, cpu->gemm->nt, out, n, 8, 64, r_max < 24 ? 24 : r_max, 4);
}

static void
gemm_nn(kne_cpu *cpu, const kne_gemm *g, int64_t out, int64_t n)
{
    /* wide blocks: W is read down its rows, and each row of a block is a page of memory of its own */
    gemm_run(cpu, g, cpu->gemm->nn, out, n, 64, out, n, 2);
}

static void
linear(void *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const kne_mat *w,
       const float *bias, int64_t n, float beta)
{
    kne_gemm g = {.y = y, .ldy = ldy, .x = x, .xs_row = ldx, .xs_k = 1, .w = w->data,
                  .type = w->type, .ldw = w->ld, .bias = bias, .beta = beta};

    g.k = w->transposed ? w->rows : w->cols;
    if (w->transposed)
        gemm_nn(ctx, &g, w->cols, n);
    else
        gemm_nt(ctx, &g, w->rows, n);
}

static void
linear_bwd(void *ctx, float *dx, int64_t ldx, const float *dy, int64_t ldy, const kne_mat *w,
           int64_t n, float beta)
{
    kne_gemm g = {.y = dx, .ldy = ldx, .x = dy, .xs_row = ldy, .xs_k = 1, .w = w->data,
                  .type = w->type, .ldw = w->ld, .beta = beta};

    g.k = w->transposed ? w->cols : w->rows;
    if (w->transposed)
        gemm_nt(ctx, &g, w->rows, n);
    else
        gemm_nn(ctx, &g, w->cols, n);
}

static void
matmul_tn(void *ctx, float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
          int64_t ldb, int64_t m, int64_t p, int64_t k, float beta)
{
    kne_gemm g = {.y = c, .ldy = ldc, .x = a, .xs_row = 1, .xs_k = lda, .w = (const char *) b,
                  .type = KNE_F32, .ldw = ldb, .beta = beta, .k = k};

    gemm_nn(ctx, &g, p, m);
}

/* ---- memory: the host's ---- */

static void *
cpu_alloc(void *ctx, size_t bytes)
{
    size_t size = bytes ? (bytes + 255) & ~(size_t) 255 : 256;
    void  *p = size >= bytes ? aligned_alloc(256, size) : NULL;

    return p ? memset(p, 0, size) : NULL;
}

static void
cpu_release(void *ctx, void *p)
{
    free(p);
}

static void
cpu_copy(void *ctx, void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static void
cpu_zero(void *ctx, void *to, size_t bytes)
{
    memset(to, 0, bytes);
}

static void
cpu_memory(void *ctx, size_t *free_bytes, size_t *total_bytes)
{
    long page = sysconf(_SC_PAGESIZE);

    *free_bytes = (size_t) (sysconf(_SC_AVPHYS_PAGES) * page);
    *total_bytes = (size_t) (sysconf(_SC_PHYS_PAGES) * page);
}

static kne_status
cpu_status(void *ctx, kne_err *err)
{
    return KNE_OK;
}

/* ---- instruction sets ---- */

typedef struct isa_row
{
    const char *name, *shown;
    bool (*here)(void);
    const kne_gemm_kernels *gemm;
    void (*fill)(kne_backend *be);
    int64_t turn_min; /* rows from which on it pays to turn W (long sums: twice as many) */
} isa_row;

static bool
isa_always(void)
{
    return true;
}

#if defined(__x86_64__)
static bool
isa_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static bool
isa_avx512(void)
{
    return isa_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

/* Best first. There is no avx512bf16 row: its products round activations to bfloat16 (docs/cpu.md). */
static const isa_row isa_table[] = {
#if defined(__x86_64__)
    {"avx512", "AVX-512", isa_avx512, &kne_gemm_avx512, kne_ops_fill_avx512, 96},
    {"avx2", "AVX2", isa_avx2, &kne_gemm_avx2, kne_ops_fill_avx2, 16},
#endif
    {"portable", "portable", isa_always, &kne_gemm_portable, kne_ops_fill_portable, INT64_MAX},
};

/* With AVX-512 turning W paid on Intel and cost a fifth on AMD (docs/cpu.md). */
static int64_t
turn_min(const isa_row *row)
{
#if defined(__x86_64__)
    if (row->gemm == &kne_gemm_avx512 && !__builtin_cpu_is("intel"))
        return INT64_MAX;
#endif
    return row->turn_min;
}

kne_status
kne_cpu_backend_new(int n_threads, const char *isa, kne_backend **out, kne_err *err)
{
    const isa_row *row = NULL;
    kne_cpu       *cpu;
    kne_status     st;
    size_t         size;

    *out = NULL;
    for (size_t i = 0; i < sizeof(isa_table) / sizeof(isa_table[0]) && row == NULL; i++)
        if (isa ? strcmp(isa, isa_table[i].name) == 0 : isa_table[i].here())
            row = &isa_table[i];
    if (row == NULL)
        return kne_error(err, KNE_ERR_UNSUPPORTED, "unknown instruction set \"%s\"", isa ? isa : "");
    if (!row->here())
        return kne_error(err, KNE_ERR_UNSUPPORTED, "this machine does not have %s", row->shown);

    cpu = calloc(1, sizeof(*cpu));
    if (cpu == NULL)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory for the CPU backend");
    st = kne_pool_new(n_threads, &cpu->pool, err);
    if (st != KNE_OK)
    {
        free(cpu);
        return st;
    }
    cpu->n_threads = kne_pool_size(cpu->pool);
    size = (size_t) cpu->n_threads * KNE_CPU_SCRATCH;
    cpu->scratch_raw = malloc(size + 64);
    if (cpu->scratch_raw == NULL)
    {
        kne_cpu_backend_free(&cpu->be);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory for the CPU backend");
    }
    cpu->scratch = (char *) (((uintptr_t) cpu->scratch_raw + 63) & ~(uintptr_t) 63);
    cpu->gemm = row->gemm;
    cpu->turn_min = turn_min(row);
    snprintf(cpu->name, sizeof(cpu->name), "cpu: %s, %d thread%s", row->shown, cpu->n_threads,
             cpu->n_threads == 1 ? "" : "s");
    cpu->be.name = cpu->name;
    cpu->be.ctx = cpu;
    cpu->be.host = true;
    cpu->be.alloc = cpu_alloc;
    cpu->be.release = cpu_release;
    cpu->be.put = cpu->be.get = cpu_copy;
    cpu->be.zero = cpu_zero;
    cpu->be.memory = cpu_memory;
    cpu->be.status = cpu_status;
    cpu->be.close = kne_cpu_backend_free;
    cpu->be.linear = linear;
    cpu->be.linear_bwd = linear_bwd;
    cpu->be.matmul_tn = matmul_tn;
    row->fill(&cpu->be);
    kne_cpu_fill_step(&cpu->be);
    *out = &cpu->be;
    return KNE_OK;
}

void
kne_cpu_backend_free(kne_backend *be)
{
    kne_cpu *cpu;

    if (be == NULL)
        return;
    cpu = be->ctx ? be->ctx : (kne_cpu *) (void *) be;
    kne_pool_free(cpu->pool);
    free(cpu->scratch_raw);
    free(cpu);
}
