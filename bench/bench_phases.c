/*
 * bench_phases.c - where the time of an edit goes: every op of the backend is wrapped and timed from outside, and what an
 * edit does is told from the ops it calls. Arithmetic and traffic are counted as the op must do them at least once
 * (a product reads its weights once), and set beside what this machine reaches in the same run. Prints Markdown.
 *
 * bench_phases MODEL EDITS [--edits N] [--threads T] [--options JSON] [--together]
 * --together: the N edits as one batch; without it one after the other
 */
#include "bench_list.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

typedef enum part { BEFORE, ATTRIBUTE, ENERGY, ANCHORS, STEPS, AFTER, N_PARTS } part;
typedef enum kind { FORWARD, LOSS, BACKWARD, GRADIENT, SCORE, STEP, OTHER, N_KINDS } kind;

typedef struct sum
{
    double seconds, flop, bytes;
    long   calls;
} sum;

/* What one pass (from its embedding to the next) did: to which part it belongs shows only later. */
typedef struct pass
{
    sum    of[N_KINDS];
    double start, last; /* of its ops */
    bool   scored, ranked, learned;
} pass;

static kne_backend *inner, outer;
static pass        *passes;
static int          n_passes, cap_passes;
static edit_list    list;
static bool         cpu_time;

static void
die(const char *what, const kne_err *err)
{
    fprintf(stderr, "bench_phases: %s: %s. %s\n", what, err ? err->msg : "", err ? err->detail : "");
    exit(1);
}

/* With one thread its CPU time, which other processes disturb less. */
static double
now(void)
{
    struct timespec t;

    if (!cpu_time)
        return kne_now();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

static void
begin_pass(void)
{
    if (n_passes == cap_passes && !(passes = realloc(passes, (size_t) (cap_passes = 2 * cap_passes + 1024) * sizeof *passes)))
        die("out of memory", NULL);
    passes[n_passes++] = (pass) {.start = now()};
}

static void
count(kind k, double t0, double flop, double bytes)
{
    pass  *p = &passes[n_passes - 1];
    double at = now();

    p->of[k].seconds += at - t0;
    p->of[k].flop += flop;
    p->of[k].bytes += bytes;
    p->of[k].calls++;
    p->last = at;
}

static double
mat_bytes(const kne_mat *w)
{
    return w && w->data ? (double) (w->rows * w->cols) * (double) kne_dtype_size(w->type) : 0;
}

#define DO(kind_, flop_, bytes_, call)          \
    do                                          \
    {                                           \
        double t0_ = now();                 \
        inner->call;                            \
        count(kind_, t0_, flop_, 1.0 * bytes_); \
    } while (0)
#define F(n_, m_) (4.0 * (double) (n_) * (double) (m_)) /* bytes of n x m floats */

static void
linear(void *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const kne_mat *w, const float *bias, int64_t n, float beta)
{
    double wn = (double) (w->rows * w->cols);

    DO(FORWARD, 2 * (double) n * wn, (mat_bytes(w) + F(n, w->rows + w->cols)), linear(ctx, y, ldy, x, ldx, w, bias, n, beta));
}

static void
linear_bwd(void *ctx, float *dx, int64_t ldx, const float *dy, int64_t ldy, const kne_mat *w, int64_t n, float beta)
{
    double wn = (double) (w->rows * w->cols);

    DO(BACKWARD, 2 * (double) n * wn, (mat_bytes(w) + F(n, w->rows + w->cols)), linear_bwd(ctx, dx, ldx, dy, ldy, w, n, beta));
}

static void
matmul_tn(void *ctx, float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t m, int64_t p, int64_t k, float beta)
{
    DO(GRADIENT, 2.0 * (double) (m * p * k), (F(m, p) + F(k, m + p)), matmul_tn(ctx, c, ldc, a, lda, b, ldb, m, p, k, beta));
}

static void
embed(void *ctx, float *x, const kne_mat *tok, const kne_mat *pos_table, const int32_t *id, const int32_t *pos, int64_t n)
{
    begin_pass();
    DO(FORWARD, 0, 2 * F(n, tok->cols), embed(ctx, x, tok, pos_table, id, pos, n));
}

static void
rmsnorm(void *ctx, float *y, float *rstd, const float *x, const float *w, float eps, int64_t n, int64_t d)
{
    DO(FORWARD, 4.0 * (double) (n * d), 2 * F(n, d), rmsnorm(ctx, y, rstd, x, w, eps, n, d));
}

static void
rmsnorm_bwd(void *ctx, float *dx, const float *dy, const float *x, const float *rstd, const float *w, int64_t n, int64_t d)
{
    DO(BACKWARD, 8.0 * (double) (n * d), 4 * F(n, d), rmsnorm_bwd(ctx, dx, dy, x, rstd, w, n, d));
}

static void
layernorm(void *ctx, float *y, float *mean, float *rstd, const float *x, const float *w, const float *b, float eps, int64_t n, int64_t d)
{
    DO(FORWARD, 7.0 * (double) (n * d), 2 * F(n, d), layernorm(ctx, y, mean, rstd, x, w, b, eps, n, d));
}

static void
layernorm_bwd(void *ctx, float *dx, const float *dy, const float *x, const float *mean, const float *rstd, const float *w, int64_t n, int64_t d)
{
    DO(BACKWARD, 10.0 * (double) (n * d), 4 * F(n, d), layernorm_bwd(ctx, dx, dy, x, mean, rstd, w, n, d));
}

static void
rope(void *ctx, float *x, int64_t ldx, const float *cos, const float *sin, const int32_t *pos, int64_t n, int32_t n_heads,
     int32_t head_dim, int32_t rotary_dim, bool interleaved, float sign)
{
    DO(sign > 0 ? FORWARD : BACKWARD, 3.0 * (double) n * n_heads * rotary_dim, 2 * F(n, n_heads * rotary_dim),
       rope(ctx, x, ldx, cos, sin, pos, n, n_heads, head_dim, rotary_dim, interleaved, sign));
}

static void
attention_cost(const kne_attn_shape *s, double *flop, double *bytes)
{
    *flop = *bytes = 0;
    for (int32_t i = 0; i < s->n_seq; i++)
    {
        double q = s->seq[i].q_len, kv = s->seq[i].kv_len, pairs = q * (kv - q) + q * (q + 1) / 2;

        *flop += 4.0 * pairs * s->n_heads * s->head_dim;
        *bytes += F(2 * q, s->n_heads * s->head_dim) + F(2 * kv, s->n_kv_heads * s->head_dim);
    }
}

static void
attention(void *ctx, float *o, float *lse, const float *q, const float *k, const float *v, const kne_attn_shape *shape)
{
    double flop, bytes;

    attention_cost(shape, &flop, &bytes);
    DO(FORWARD, flop, bytes, attention(ctx, o, lse, q, k, v, shape));
}

static void
attention_bwd(void *ctx, float *dq, float *dk, float *dv, const float *do_, const float *o, const float *lse, const float *q,
              const float *k, const float *v, const kne_attn_shape *shape)
{
    double flop, bytes;

    attention_cost(shape, &flop, &bytes);
    DO(BACKWARD, 2.5 * flop, 2 * bytes, attention_bwd(ctx, dq, dk, dv, do_, o, lse, q, k, v, shape));
}

static void
act(void *ctx, float *a, const float *g, const float *u, kne_act_kind kind_, int64_t n, int64_t f)
{
    DO(FORWARD, 12.0 * (double) (n * f), (g ? 3 : 2) * F(n, f), act(ctx, a, g, u, kind_, n, f));
}

static void
act_bwd(void *ctx, float *dg, float *du, const float *da, const float *g, const float *u, kne_act_kind kind_, int64_t n, int64_t f)
{
    DO(BACKWARD, 18.0 * (double) (n * f), (g ? 5 : 3) * F(n, f), act_bwd(ctx, dg, du, da, g, u, kind_, n, f));
}

static void
add(void *ctx, float *y, const float *x, int64_t n)
{
    DO(FORWARD, (double) n, 3 * F(n, 1), add(ctx, y, x, n));
}

static void
scale_rows(void *ctx, float *y, const float *s, int64_t n, int64_t d)
{
    DO(FORWARD, (double) (n * d), 2 * F(n, d), scale_rows(ctx, y, s, n, d));
}

static void
logprob(void *ctx, float *logp, int32_t *best, float *dlogits, const float *logits, const int32_t *target, const float *coef, int64_t n, int64_t v)
{
    DO(LOSS, (dlogits ? 24.0 : 12.0) * (double) (n * v), (dlogits ? 2 : 1) * F(n, v), logprob(ctx, logp, best, dlogits, logits, target, coef, n, v));
}

static void
kl(void *ctx, float *k, float *dlogits, const float *logits, const float *ref_logp, const float *coef, int64_t n, int64_t v)
{
    DO(LOSS, 36.0 * (double) (n * v), 3 * F(n, v), kl(ctx, k, dlogits, logits, ref_logp, coef, n, v));
}

static void
log_softmax(void *ctx, float *logp, const float *logits, int64_t n, int64_t v)
{
    DO(LOSS, 12.0 * (double) (n * v), 2 * F(n, v), log_softmax(ctx, logp, logits, n, v));
}

/* A gather before a weight gradient is one of its costs; the overlay's belong to the pass. */
static void
gather_cols(void *ctx, float *y, const float *x, int64_t ldx, const int32_t *col, int64_t n, int64_t n_col)
{
    DO(OTHER, 0, 2 * F(n, n_col), gather_cols(ctx, y, x, ldx, col, n, n_col));
}

static void
scatter_cols(void *ctx, float *x, int64_t ldx, const float *y, const int32_t *col, int64_t n, int64_t n_col, bool add_)
{
    DO(OTHER, 0, 2 * F(n, n_col), scatter_cols(ctx, x, ldx, y, col, n, n_col, add_));
}

static void
score(void *ctx, float *s, const float *a, const float *u, const float *coef, int64_t n, int64_t f)
{
    passes[n_passes - 1].scored = true;
    DO(SCORE, 3.0 * (double) (n * f), (2 * F(n, f) + 2 * F(1, f)), score(ctx, s, a, u, coef, n, f));
}

/* A gradient's rows are one product an edit, of its rows in the pass and its neurons in a layer. */
static void
grad_rows(void *ctx, float *grad, const kne_grad_row *of_, int64_t n, const float *left, int64_t f, const float *right, int64_t d, float *scratch)
{
    double rows = 0;

    for (int64_t i = 0; i < n; i++)
        rows += of_[i].to - of_[i].from;
    passes[n_passes - 1].learned = true;
    DO(GRADIENT, 2.0 * rows * (double) d, F(n, d) + 4 * rows, grad_rows(ctx, grad, of_, n, left, f, right, d, scratch));
}

static void
energy(void *ctx, float *s, int64_t ld, const float *z, const float *a, const float *k, const int32_t *row0, int64_t n, int64_t rows, int64_t f, float scale)
{
    double pairs = 0;

    for (int64_t e = 0; e < n; e++)
        pairs += (double) (row0[e + 1] - row0[e]) * (row0[e + 1] - row0[e]);
    passes[n_passes - 1].ranked = true;
    DO(SCORE, 3 * pairs * (double) f, 2 * F(rows, f) + F(n, f), energy(ctx, s, ld, z, a, k, row0, n, rows, f, scale));
}

static void
top(void *ctx, int32_t *index, const float *s, int64_t ld, uint64_t *keys, int64_t rows, int64_t n_all, int64_t n)
{
    DO(SCORE, 0, F(rows, n_all), top(ctx, index, s, ld, keys, rows, n_all, n));
}

static void
factor(void *ctx, double *m, const float *gram, const kne_metric_block *block, int64_t n_block, int64_t max_n, double scale, double ridge)
{
    DO(OTHER, 0, 0, factor(ctx, m, gram, block, n_block, max_n, scale, ridge));
}

/* Two triangles, in double. */
static void
solve(void *ctx, float *x, float beta, float scale, float *g, const double *m, const kne_metric_block *block, int64_t n_block, int64_t max_n,
      const kne_mover *mover, int64_t d, double *scratch)
{
    double n2 = 0;

    for (int64_t b = 0; b < n_block; b++)
        n2 += mover && !mover[block[b].owner].moves ? 0 : (double) block[b].n * block[b].n;
    DO(STEP, 2 * n2 * (double) d, 8 * n2, solve(ctx, x, beta, scale, g, m, block, n_block, max_n, mover, d, scratch));
}

static void
adam(void *ctx, float *delta, float *mean, float *var, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n, int64_t d)
{
    DO(STEP, 12.0 * (double) (n * d), 7 * F(n, d), adam(ctx, delta, mean, var, grad, owner, mover, n, d));
}

static void
compose(void *ctx, float *eff, const float *base, const float *before, const float *delta, const int32_t *from, const int32_t *place,
        int64_t n, int64_t d, kne_dtype type)
{
    DO(STEP, 3.0 * (double) (n * d), 4 * F(n, d), compose(ctx, eff, base, before, delta, from, place, n, d, type));
}

static void
gather_neurons(void *ctx, float *out, const kne_mat *w, bool by_col, const int32_t *idx, int64_t n)
{
    DO(OTHER, 0, 2 * F(n, by_col ? w->rows : w->cols), gather_neurons(ctx, out, w, by_col, idx, n));
}

/* ---- what the machine reaches ---- */

typedef struct probe
{
    const float *data;
    size_t       n;
    double       seconds, result, lanes;
    pthread_barrier_t *gate;
    bool         memory;
} probe;

typedef float vec __attribute__((vector_size(64)));

/* Twelve chains of multiply-adds in registers of their own width: wider ones would be stored and loaded. */
#define CHAINS(name, lanes, attribute)                                          \
    attribute static __attribute__((noinline)) float name(int rounds)           \
    {                                                                           \
        typedef float v __attribute__((vector_size(4 * lanes)));                \
        v a[12], b = {0}, c = {0}, s = {0};                                     \
                                                                                \
        b += 0.999999f;                                                         \
        c += 1e-7f;                                                             \
        _Pragma("GCC unroll 12")                                                \
        for (int i = 0; i < 12; i++)                                            \
            a[i] = b + (float) i;                                               \
        for (int r = 0; r < rounds; r++)                                        \
        {                                                                       \
            _Pragma("GCC unroll 12")                                            \
            for (int i = 0; i < 12; i++)                                        \
                a[i] = a[i] * b + c;                                            \
        }                                                                       \
        _Pragma("GCC unroll 12")                                                \
        for (int i = 0; i < 12; i++)                                            \
            s += a[i];                                                          \
        return s[0] + s[3];                                                     \
    }
#if defined(__x86_64__)
CHAINS(chains_avx512, 16, __attribute__((target("avx512f"))))
CHAINS(chains_avx2, 8, __attribute__((target("avx2,fma"))))
#endif
CHAINS(chains_any, 4, )

/* *lanes: of a multiply-add. */
static float
multiply_add(int rounds, double *lanes)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    *lanes = 16;
    if (__builtin_cpu_supports("avx512f"))
        return chains_avx512(rounds);
    *lanes = 8;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return chains_avx2(rounds);
#endif
    *lanes = 4;
    return chains_any(rounds);
}

__attribute__((target_clones("avx512f", "avx2", "default"), noinline)) static float
read_all(const float *p, size_t n)
{
    vec s[8] = {{0}};

    for (size_t i = 0; i + 128 <= n; i += 128)
        for (int k = 0; k < 8; k++)
            s[k] += *(const vec *) (p + i + 16 * k);
    for (int k = 1; k < 8; k++)
        s[0] += s[k];
    return s[0][0] + s[0][9];
}

static void *
run_probe(void *arg)
{
    probe *p = arg;

    pthread_barrier_wait(p->gate);
    double t0 = now();
    p->result = p->memory ? read_all(p->data, p->n) : multiply_add(4 << 20, &p->lanes);
    p->seconds = now() - t0;
    return NULL;
}

/* The best of some rounds of all threads together: GFLOP/s, GB/s. */
static void
machine(int threads, double *gflops, double *gbytes)
{
    size_t            n = (size_t) 64 << 20; /* floats: 256 MB, more than caches hold */
    float            *data = aligned_alloc(4096, n * sizeof *data);
    pthread_t         t[256];
    probe             p[256];
    pthread_barrier_t gate;

    if (!data || threads > 256)
        die("out of memory", NULL);
    for (size_t i = 0; i < n; i++)
        data[i] = 1;
    pthread_barrier_init(&gate, NULL, (unsigned) threads);
    *gflops = *gbytes = 0;
    for (int round = 0; round < 10; round++)
    {
        double longest = 0, all;

        for (int i = 0; i < threads; i++)
        {
            size_t share = n / (size_t) threads & ~(size_t) 127;

            p[i] = (probe) {.data = data + share * (size_t) i, .n = share, .gate = &gate, .memory = round % 2};
            pthread_create(&t[i], NULL, run_probe, &p[i]);
        }
        for (int i = 0; i < threads; i++)
        {
            pthread_join(t[i], NULL);
            longest = p[i].seconds > longest ? p[i].seconds : longest;
        }
        all = round % 2 ? (double) n * 4 / longest / 1e9 : threads * (4.0 * (1 << 20) * 12 * p[0].lanes * 2) / longest / 1e9;
        if (round % 2)
            *gbytes = all > *gbytes ? all : *gbytes;
        else
            *gflops = all > *gflops ? all : *gflops;
    }
    pthread_barrier_destroy(&gate);
    free(data);
}

/* ---- */

static void
row(const char *name, sum s, double total, int edits, double gflops, double gbytes)
{
    if (s.seconds <= 0)
        return;
    printf("| %s | %.2f | %.1f | %.1f | %.0f | %.1f | %.0f |\n", name, 1e3 * s.seconds / edits, 100 * s.seconds / total,
           s.flop / s.seconds / 1e9, 100 * s.flop / s.seconds / 1e9 / gflops, s.bytes / s.seconds / 1e9,
           100 * s.bytes / s.seconds / 1e9 / gbytes);
}

static void
add_to(sum *a, const sum *b)
{
    a->seconds += b->seconds;
    a->flop += b->flop;
    a->bytes += b->bytes;
    a->calls += b->calls;
}

int
main(int argc, char **argv)
{
    int          n_edits = 8, threads = 0;
    bool         together = false;
    const char  *json = "";
    kne_err      err;
    kne_options  opt;
    kne_model   *model;
    kne_view    *view;
    kne_edit_result *res;
    struct kne_ref_cache *cache;
    double       gflops, gbytes, total = 0, between = 0, rest = 0;
    sum          of[N_PARTS][N_KINDS] = {0};
    long         steps = 0, n_pass[N_PARTS] = {0};

    if (argc < 3)
        return fprintf(stderr, "usage: bench_phases MODEL EDITS [--edits N] [--threads T] [--options JSON] [--together]\n"), 2;
    for (int i = 3; i < argc; i++)
    {
        if (!strcmp(argv[i], "--together"))
            together = true;
        else if (i + 1 < argc && !strcmp(argv[i], "--edits"))
            n_edits = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--threads"))
            threads = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--options"))
            json = argv[++i];
        else
            return fprintf(stderr, "bench_phases: what is %s?\n", argv[i]), 2;
    }
    if (threads <= 0)
        threads = (int) sysconf(_SC_NPROCESSORS_ONLN);
    cpu_time = threads == 1;
    machine(threads, &gflops, &gbytes);
    if (!list_read(argv[2], &list))
        die("cannot read the edits", NULL);
    if (kne_cpu_backend_new(threads, NULL, &inner, &err) != KNE_OK || kne_model_open(argv[1], &model, &err) != KNE_OK ||
        kne_options_parse(&opt, json, strlen(json), &err) != KNE_OK || kne_ref_cache_new(&cache, &err) != KNE_OK)
        die("start", &err);
    outer = *inner;
#define WRAP(op) outer.op = op
    WRAP(linear), WRAP(linear_bwd), WRAP(matmul_tn), WRAP(embed), WRAP(rmsnorm), WRAP(rmsnorm_bwd), WRAP(layernorm),
        WRAP(layernorm_bwd), WRAP(rope), WRAP(attention), WRAP(attention_bwd), WRAP(act), WRAP(act_bwd), WRAP(add),
        WRAP(scale_rows), WRAP(logprob), WRAP(kl), WRAP(log_softmax), WRAP(gather_cols), WRAP(scatter_cols), WRAP(score),
        WRAP(gather_neurons), WRAP(grad_rows), WRAP(energy), WRAP(top), WRAP(factor), WRAP(solve), WRAP(adam), WRAP(compose);
    begin_pass();
    if (kne_view_new(model, &outer, 0, NULL, NULL, &view, &err) != KNE_OK)
        die("view", &err);
    n_edits = n_edits < list.n ? n_edits : list.n;

    /* one that is not counted: it fills what is kept from job to job */
    for (int i = -1; i < (together ? 1 : n_edits); i++)
    {
        int          n = together && i >= 0 ? n_edits : 1;
        kne_edit_job job = {.model = model, .backend = &outer, .view = view, .options = opt, .n_known = list.n_known, .known = list.known,
                            .n_edits = n, .edit = &list.edit[i < 0 ? 0 : i], .cache = cache};
        double       t0 = now(), t1;
        part         at = BEFORE;
        int          last_learned = -1;

        n_passes = 0;
        begin_pass(); /* for ops before the first embedding */
        if (kne_edit_run(&job, &res, &err) != KNE_OK)
            die("edit", &err);
        t1 = now();
        if (i < 0)
        {
            kne_edit_result_free(res);
            continue;
        }
        for (int k = 0; k < n; k++)
            steps += res->edit[k].steps;
        kne_edit_result_free(res);
        for (int p = 0; p < n_passes; p++)
            if (passes[p].learned)
                last_learned = p;
        for (int p = 0; p < n_passes; p++)
        {
            double from = p ? passes[p].start : t0, to = p + 1 < n_passes ? passes[p + 1].start : t1, ops = 0;

            at = passes[p].ranked ? ENERGY : passes[p].scored ? ATTRIBUTE : passes[p].learned ? STEPS
                 : last_learned >= 0 && p > last_learned ? AFTER : at == ENERGY || at == ATTRIBUTE || at == ANCHORS ? ANCHORS : at;
            n_pass[at]++;
            for (int k = 0; k < N_KINDS; k++)
            {
                add_to(&of[at][k], &passes[p].of[k]);
                ops += passes[p].of[k].seconds;
            }
            total += to - from;
            if (at == STEPS)
                between += to - from - ops;
            else
                rest += to - from - ops;
        }
    }

    printf("%s, %s weights, %s, %d edits %s, %.1f steps an edit; this machine now: %.0f GFLOP/s, %.1f GB/s "
           "(reading)%s.\n\n", argv[1],
           kne_model_dtype_name(model), inner->name, n_edits, together ? "together" : "one at a time", (double) steps / n_edits,
           gflops, gbytes, cpu_time ? "; CPU time" : "");
    printf("| phase | ms an edit | %% of time | GFLOP/s | %% of peak | GB/s | %% of bandwidth |\n|---|---|---|---|---|---|---|\n");
    sum s = {0};
    for (int k = 0; k < N_KINDS; k++)
        add_to(&s, &of[BEFORE][k]);
    row("before: answer, what holds, references", s, total, n_edits, gflops, gbytes);
    row("attribution: forward", of[ATTRIBUTE][FORWARD], total, n_edits, gflops, gbytes);
    row("attribution: backward", of[ATTRIBUTE][BACKWARD], total, n_edits, gflops, gbytes);
    s = of[ATTRIBUTE][SCORE];
    add_to(&s, &of[ATTRIBUTE][LOSS]);
    add_to(&s, &of[ATTRIBUTE][OTHER]);
    row("attribution: log-probability, scores", s, total, n_edits, gflops, gbytes);
    row("energy: forward, known facts", of[ENERGY][FORWARD], total, n_edits, gflops, gbytes);
    row("energy: backward", of[ENERGY][BACKWARD], total, n_edits, gflops, gbytes);
    s = (sum) {0};
    for (int k = 0; k < N_KINDS; k++)
        if (k != FORWARD && k != BACKWARD)
            add_to(&s, &of[ENERGY][k]);
    row("energy: solving, scores, the highest", s, total, n_edits, gflops, gbytes);
    s = (sum) {0};
    for (int k = 0; k < N_KINDS; k++)
        add_to(&s, &of[ANCHORS][k]);
    row("anchors' reference", s, total, n_edits, gflops, gbytes);
    row("steps: forward", of[STEPS][FORWARD], total, n_edits, gflops, gbytes);
    row("steps: losses", of[STEPS][LOSS], total, n_edits, gflops, gbytes);
    row("steps: backward", of[STEPS][BACKWARD], total, n_edits, gflops, gbytes);
    row("steps: weight gradients", of[STEPS][GRADIENT], total, n_edits, gflops, gbytes);
    row("steps: gather and scatter", of[STEPS][OTHER], total, n_edits, gflops, gbytes);
    row("steps: metric or Adam, effective rows", of[STEPS][STEP], total, n_edits, gflops, gbytes);
    printf("| steps: the rest of the optimiser | %.2f | %.1f | | | | |\n", 1e3 * between / n_edits, 100 * between / total);
    s = (sum) {0};
    for (int k = 0; k < N_KINDS; k++)
        add_to(&s, &of[AFTER][k]);
    row("check in the new view", s, total, n_edits, gflops, gbytes);
    printf("| outside of ops: tokens, selection, memory | %.2f | %.1f | | | | |\n", 1e3 * rest / n_edits, 100 * rest / total);
    printf("| all | %.2f | 100 | | | | |\n", 1e3 * total / n_edits);
    return 0;
}
