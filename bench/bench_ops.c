/*
 * bench_ops.c - the CPU's ops timed, matrix products against OpenBLAS in the
 * same run (where libopenblas.so.0 is installed; its weights are converted to
 * float beforehand, ours are read in the file's format). Rounds alternate and
 * the best of each counts, since machines are shared: read the ratios. With one
 * thread (-t 1) its CPU time is taken, which other processes disturb less.
 *
 * usage: bench_ops [-t threads] [-i isa] [-r rounds] [-m milliseconds a sample] [filter]
 */
#include "kne_backend.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef void (*sgemm_fn)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                         int lda, const float *b, int ldb, float beta, float *c, int ldc);

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef enum product_kind { FORWARD, BACKWARD, TN } product_kind;

typedef struct product_case
{
    product_kind kind;
    int          n, in, out; /* TN: c[in, out], n the length of the sums */
    kne_dtype    type;
    bool         transposed;
} product_case;

static const product_case products[] = {
    /* decoding */
    {FORWARD, 1, 192, 640, KNE_BF16, false},    {FORWARD, 1, 640, 192, KNE_BF16, false},
    {FORWARD, 1, 192, 4096, KNE_BF16, false},   {FORWARD, 1, 768, 3072, KNE_BF16, true},
    {FORWARD, 1, 4096, 11008, KNE_BF16, false},
    /* edits on small models */
    {FORWARD, 20, 192, 192, KNE_BF16, false},   {FORWARD, 20, 192, 640, KNE_BF16, false},
    {BACKWARD, 20, 192, 640, KNE_BF16, false},  {FORWARD, 20, 640, 192, KNE_BF16, false},
    {BACKWARD, 20, 640, 192, KNE_BF16, false},  {FORWARD, 60, 256, 688, KNE_BF16, false},
    {BACKWARD, 60, 256, 688, KNE_BF16, false},  {FORWARD, 60, 688, 256, KNE_F32, false},
    {FORWARD, 200, 192, 640, KNE_BF16, false},  {BACKWARD, 200, 192, 640, KNE_BF16, false},
    {FORWARD, 200, 256, 688, KNE_BF16, false},  {BACKWARD, 200, 256, 688, KNE_BF16, false},
    {FORWARD, 20, 192, 2048, KNE_BF16, false},  {BACKWARD, 20, 192, 2048, KNE_BF16, false},
    {FORWARD, 20, 256, 4096, KNE_BF16, false},  {BACKWARD, 20, 256, 4096, KNE_BF16, false},
    {FORWARD, 640, 192, 640, KNE_BF16, false},  {BACKWARD, 640, 192, 640, KNE_BF16, false},
    {FORWARD, 640, 768, 3072, KNE_BF16, true},  {BACKWARD, 640, 768, 3072, KNE_BF16, true},
    {TN, 60, 12, 256, KNE_F32, false},          {TN, 32, 110, 4096, KNE_F32, false},
    {TN, 640, 88, 192, KNE_F32, false},
    /* a model of seven thousand million parameters */
    {FORWARD, 32, 4096, 11008, KNE_BF16, false}, {BACKWARD, 32, 4096, 11008, KNE_BF16, false},
    {FORWARD, 32, 11008, 4096, KNE_BF16, false}, {BACKWARD, 32, 11008, 4096, KNE_BF16, false},
    {FORWARD, 32, 4096, 11008, KNE_F16, false},  {BACKWARD, 32, 4096, 11008, KNE_F16, false},
    {BACKWARD, 1, 4096, 11008, KNE_BF16, false},
    {FORWARD, 8, 4096, 11008, KNE_BF16, false},  {BACKWARD, 8, 4096, 11008, KNE_BF16, false},
    {FORWARD, 256, 4096, 4096, KNE_BF16, false}, {BACKWARD, 256, 4096, 4096, KNE_BF16, false},
};

static kne_backend *be;
static sgemm_fn     sgemm;
static int          rounds = 5;
static double       sample = 0.004;
static const char  *filter = "";
static bool         cpu_time;

static void *
need(size_t size)
{
    void *p = NULL;

    if (posix_memalign(&p, 4096, size ? size : 1) != 0)
    {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return p;
}

static float *
random_floats(size_t n)
{
    static uint64_t seed = 1;
    float          *p = need(n * sizeof(float));

    for (size_t i = 0; i < n; i++)
        p[i] = (float) (kne_random_next(&seed) >> 40) / 16777216.0f - 0.5f;
    return p;
}

static double
seconds(void)
{
    struct timespec t;

    if (!cpu_time)
        return kne_now();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

/* Seconds of one call, from as many as fill a sample. */
static double
time_calls(void (*call)(void *), void *arg)
{
    double start = seconds(), now;
    int    calls = 0;

    do
    {
        call(arg);
        calls++;
        now = seconds();
    } while (now - start < sample);
    return (now - start) / calls;
}

/* The best of alternating rounds; b may be NULL. */
static void
time_pair(void (*a)(void *), void (*b)(void *), void *arg, double *ta, double *tb)
{
    *ta = *tb = INFINITY;
    for (int r = 0; r < rounds; r++)
    {
        *ta = fmin(*ta, time_calls(a, arg));
        if (b)
            *tb = fmin(*tb, time_calls(b, arg));
    }
}

/* ---- matrix products ---- */

typedef struct product
{
    const product_case *c;
    kne_mat w;
    float  *x, *y, *wf;
    int     k, m; /* x is (n, k), y is (n, m) */
} product;

static void
ours(void *arg)
{
    product *p = arg;

    if (p->c->kind == TN)
        be->matmul_tn(be->ctx, p->y, p->m, p->x, p->c->in, p->wf, p->m, p->c->in, p->m, p->c->n, 0);
    else if (p->c->kind == FORWARD)
        be->linear(be->ctx, p->y, p->m, p->x, p->k, &p->w, NULL, p->c->n, 0);
    else
        be->linear_bwd(be->ctx, p->y, p->m, p->x, p->k, &p->w, p->c->n, 0);
}

static void
theirs(void *arg)
{
    product *p = arg;
    bool     by_row = (p->c->kind == FORWARD) != p->c->transposed;

    if (p->c->kind == TN)
        sgemm(ROW_MAJOR, TRANS, NO_TRANS, p->c->in, p->m, p->c->n, 1, p->x, p->c->in, p->wf, p->m, 0,
              p->y, p->m);
    else
        sgemm(ROW_MAJOR, NO_TRANS, by_row ? TRANS : NO_TRANS, p->c->n, p->m, p->k, 1, p->x, p->k,
              p->wf, (int) p->w.ld, 0, p->y, p->m);
}

static void
bench_product(const product_case *c)
{
    product  p = {.c = c};
    size_t   size = (size_t) c->in * (size_t) c->out;
    uint16_t *w16;
    double   t, tb, flop, bytes;
    char     what[100];

    snprintf(what, sizeof(what), "%s n %d in %d out %d %s%s",
             c->kind == TN ? "matmul_tn" : c->kind == FORWARD ? "linear" : "linear_bwd", c->n, c->in,
             c->out, kne_dtype_name(c->type), c->transposed ? " transposed" : "");
    if (strstr(what, filter) == NULL)
        return;
    if (c->kind == TN)
        size = (size_t) c->n * (size_t) c->out;
    p.k = c->kind == BACKWARD ? c->out : c->in;
    p.m = c->kind == BACKWARD ? c->in : c->out;
    p.x = random_floats((size_t) c->n * (size_t) p.k);
    p.y = random_floats((size_t) (c->kind == TN ? c->in : c->n) * (size_t) p.m);
    p.wf = random_floats(size);
    w16 = need(size * 2);
    for (size_t i = 0; i < size; i++)
        w16[i] = c->type == KNE_F16 ? kne_f32_to_f16(p.wf[i]) : kne_f32_to_bf16(p.wf[i]);
    p.w = (kne_mat) {.data = c->type == KNE_F32 ? (void *) p.wf : w16, .type = c->type,
                     .transposed = c->transposed};
    p.w.rows = c->transposed ? c->in : c->out;
    p.w.cols = c->transposed ? c->out : c->in;
    p.w.ld = p.w.cols;
    time_pair(ours, sgemm ? theirs : NULL, &p, &t, &tb);
    flop = 2.0 * c->n * c->in * c->out;
    bytes = (double) size * (c->kind == TN ? 4 : (double) kne_dtype_size(c->type));
    printf("%-48s %9.1f us %7.1f GFLOP/s %6.1f GB/s", what, t * 1e6, flop / t * 1e-9, bytes / t * 1e-9);
    if (sgemm)
        printf("  OpenBLAS %9.1f us %7.1f GFLOP/s  ratio %5.2f", tb * 1e6, flop / tb * 1e-9, tb / t);
    putchar('\n');
    fflush(stdout);
    free(p.x);
    free(p.y);
    free(p.wf);
    free(w16);
}

/* ---- the other ops: enough to see what a step spends on them ---- */

enum { N = 200, D = 256, F = 688, V = 4096, H = 8, HD = 32 };

typedef struct rows
{
    float         *a, *b, *c, *d, *e, *w, *row;
    int32_t        index[N];
    kne_seq        seq[8];
    kne_attn_shape shape;
} rows;

#define OP(name, call)                                                            \
    static void name(void *arg)                                                   \
    {                                                                             \
        rows *x = arg;                                                            \
                                                                                  \
        call;                                                                     \
    }
OP(op_rmsnorm, be->rmsnorm(be->ctx, x->a, x->row, x->b, x->w, 1e-5f, N, D))
OP(op_rmsnorm_bwd, be->rmsnorm_bwd(be->ctx, x->a, x->b, x->c, x->row, x->w, N, D))
OP(op_layernorm, be->layernorm(be->ctx, x->a, x->row, x->row + N, x->b, x->w, x->w, 1e-5f, N, D))
OP(op_silu, be->act(be->ctx, x->a, x->b, x->c, KNE_ACT_SILU, N, F))
OP(op_silu_bwd, be->act_bwd(be->ctx, x->a, x->b, x->c, x->d, x->e, KNE_ACT_SILU, N, F))
OP(op_gelu, be->act(be->ctx, x->a, NULL, x->c, KNE_ACT_GELU_ERF, N, F))
OP(op_gelu_tanh, be->act(be->ctx, x->a, NULL, x->c, KNE_ACT_GELU_TANH, N, F))
OP(op_add, be->add(be->ctx, x->a, x->b, N *D))
OP(op_logprob, be->logprob(be->ctx, x->row, x->index, x->a, x->b, x->index, x->w, 20, V))
OP(op_kl, be->kl(be->ctx, x->row, x->a, x->b, x->c, x->w, 20, V))
OP(op_attention, be->attention(be->ctx, x->a, x->row, x->b, x->c, x->d, &x->shape))
OP(op_attention_bwd, be->attention_bwd(be->ctx, x->a, x->a + N * D, x->a + 2 * N * D, x->b, x->c, x->row,
                                       x->d, x->e, x->d, &x->shape))
OP(op_score, be->score(be->ctx, x->w, x->b, x->c, x->row, N, F))
OP(op_tiny, be->add(be->ctx, x->a, x->b, 16))

static void
bench_rows(void)
{
    static const struct
    {
        const char *name;
        void (*call)(void *);
        double elements;
    } ops[] = {
        {"call of nearly nothing", op_tiny, 16},
        {"rmsnorm 200 x 256", op_rmsnorm, N * D},
        {"rmsnorm_bwd 200 x 256", op_rmsnorm_bwd, N * D},
        {"layernorm 200 x 256", op_layernorm, N * D},
        {"act silu gated 200 x 688", op_silu, N * F},
        {"act_bwd silu gated 200 x 688", op_silu_bwd, N * F},
        {"act gelu 200 x 688", op_gelu, N * F},
        {"act gelu_tanh 200 x 688", op_gelu_tanh, N * F},
        {"add 200 x 256", op_add, N * D},
        {"logprob with gradient 20 x 4096", op_logprob, 20 * V},
        {"kl with gradient 20 x 4096", op_kl, 20 * V},
        {"attention 8 x 25 rows, 8 heads of 32", op_attention, 8.0 * 25 * 26 / 2 * H * HD * 2},
        {"attention_bwd 8 x 25 rows, 8 heads of 32", op_attention_bwd, 8.0 * 25 * 26 / 2 * H * HD * 5},
        {"score 200 x 688", op_score, N * F},
    };
    rows x;

    x.a = random_floats(N * V);
    x.b = random_floats(N * V);
    x.c = random_floats(N * V);
    x.d = random_floats(N * V);
    x.e = random_floats(N * V);
    x.w = random_floats(V);
    x.row = random_floats(N * V);
    for (int i = 0; i < N; i++)
        x.index[i] = i;
    for (int i = 0; i < 8; i++)
        x.seq[i] = (kne_seq) {i * 25, 25, i * 25, 25};
    x.shape = (kne_attn_shape) {H, H, HD, 8, x.seq, 0.17f, 200, 25};
    for (size_t i = 0; i < sizeof(ops) / sizeof(ops[0]); i++)
    {
        double t, none;

        if (strstr(ops[i].name, filter) == NULL)
            continue;
        time_pair(ops[i].call, NULL, &x, &t, &none);
        printf("%-48s %9.2f us %7.3f ns an element or multiply-add\n", ops[i].name, t * 1e6,
               t * 1e9 / ops[i].elements);
    }
    free(x.a);
    free(x.b);
    free(x.c);
    free(x.d);
    free(x.e);
    free(x.w);
    free(x.row);
}

int
main(int argc, char **argv)
{
    int         threads = 0, opt;
    const char *isa = NULL;
    kne_err     err;
    void       *blas;

    while ((opt = getopt(argc, argv, "t:i:r:m:")) != -1)
        switch (opt)
        {
            case 't': threads = atoi(optarg); break;
            case 'i': isa = optarg; break;
            case 'r': rounds = atoi(optarg); break;
            case 'm': sample = atof(optarg) * 1e-3; break;
            default: return 2;
        }
    if (optind < argc)
        filter = argv[optind];
    if (kne_cpu_backend_new(threads, isa, &be, &err) != KNE_OK)
    {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    if (threads)
    {
        char n[16];

        snprintf(n, sizeof(n), "%d", threads);
        setenv("OPENBLAS_NUM_THREADS", n, 0);
    }
    cpu_time = threads == 1;
    blas = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (blas)
    {
        char *(*config)(void) = (char *(*) (void) ) dlsym(blas, "openblas_get_config");

        sgemm = (sgemm_fn) dlsym(blas, "cblas_sgemm");
        printf("%s; %s\n", be->name, config ? config() : "OpenBLAS");
    }
    else
        printf("%s; no OpenBLAS\n", be->name);
    for (size_t i = 0; i < sizeof(products) / sizeof(products[0]); i++)
        bench_product(&products[i]);
    bench_rows();
    kne_cpu_backend_free(be);
    return 0;
}
