/*
 * test_ops.c - every op of the CPU's table, on every instruction set that this
 * machine has: against a naive reference in double; bit for bit the same in any
 * batch, for any number of threads; outputs poisoned with NaN where an op
 * overwrites. The op source is compiled here once more with kne_real = double:
 * its backward ops are held against 4-point finite differences of its forward
 * ops, and the float ops against it.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#define kne_real double
#include "kne_cpu_ops_impl.h"

#include "kne_test.h"

#include <stdlib.h>

enum { MAX_ARRAYS = 8 };
static const char *const isa_names[] = {"portable", "avx2", "avx512"};

static kne_backend *be1, *be2, *be3; /* 1, 2 and 3 threads */
static const char  *isa;
static kne_cpu      dctx;            /* for the ops in double: no pool */
static uint64_t     seed = 42;

static double
uniform(void)
{
    return (double) (kne_random_next(&seed) >> 11) / 9007199254740992.0 * 2 - 1;
}

static void *
need(size_t size)
{
    void *p = malloc(size ? size : 1);

    if (p == NULL)
    {
        printf("Bail out! out of memory\n");
        exit(1);
    }
    return p;
}

static float *
floats(int64_t n, float fill)
{
    float *p = need((size_t) n * sizeof(float));

    for (int64_t i = 0; i < n; i++)
        p[i] = fill;
    return p;
}

static float *
random_floats(int64_t n)
{
    float *p = need((size_t) n * sizeof(float));

    for (int64_t i = 0; i < n; i++)
        p[i] = (float) uniform();
    return p;
}

static double *
widened(const float *p, int64_t n)
{
    double *q = need((size_t) n * sizeof(double));

    for (int64_t i = 0; i < n; i++)
        q[i] = p[i];
    return q;
}

/* Mean squared error over mean square; infinity where one is NaN. */
static double
nmse(const float *got, const double *want, int64_t n)
{
    double num = 0, den = 0;

    for (int64_t i = 0; i < n; i++)
    {
        if (isnan(got[i]) || isnan(want[i]))
            return INFINITY;
        num += (got[i] - want[i]) * (got[i] - want[i]);
        den += want[i] * want[i];
    }
    return num == 0 ? 0 : num / den;
}

static bool
same_bits(const float *a, const float *b, int64_t n)
{
    return n == 0 || memcmp(a, b, (size_t) n * sizeof(float)) == 0;
}

/* ---- finite differences ---- */

/* The largest error of grad against 4-point differences of loss, over at most 40 of the n parameters. */
static double
gradient_error(double *param, int64_t n, const double *grad, double (*loss)(void *), void *arg)
{
    const double h = 1e-3;
    double       worst = 0;
    int64_t      step = n > 40 ? n / 40 : 1;

    for (int64_t i = 0; i < n; i += step)
    {
        double v = param[i], f[4], g, e;
        const double at[4] = {-2, -1, 1, 2};

        for (int j = 0; j < 4; j++)
        {
            param[i] = v + at[j] * h;
            f[j] = loss(arg);
        }
        param[i] = v;
        g = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h);
        e = fabs(g - grad[i]) / (1 + fabs(g));
        if (!(e <= worst))
            worst = e;
    }
    return worst;
}

/* ---- matrix products ---- */

typedef struct linear_case
{
    int64_t   n, in, out;
    kne_dtype type;
    bool      transposed;
    int       pad;  /* ld - cols; the gap is NaN */
    float     beta;
    bool      bias;
} linear_case;

static const linear_case linear_cases[] = {
    {1, 192, 640, KNE_BF16, false, 0, 0, false},   {1, 640, 192, KNE_BF16, false, 0, 1, true},
    {7, 131, 88, KNE_BF16, false, 5, 0, true},     {7, 131, 88, KNE_F16, true, 3, 0.5f, true},
    {7, 131, 88, KNE_F32, false, 1, 1, false},     {33, 3, 3, KNE_F32, true, 0, 0, true},
    {2, 1, 1, KNE_BF16, false, 0, 0, false},       {3, 5, 1, KNE_BF16, true, 7, 1, false},
    {4, 17, 129, KNE_BF16, true, 0, 0, false},     {5, 64, 63, KNE_F16, false, 0, 0, false},
    {64, 640, 192, KNE_BF16, false, 0, 1, false},  {40, 640, 192, KNE_BF16, true, 0, 0, true},
    {130, 192, 515, KNE_BF16, false, 2, 0, false}, {200, 256, 688, KNE_F32, false, 0, 0, false},
    {61, 688, 256, KNE_BF16, true, 0, 1, false},   {12, 2048, 700, KNE_BF16, false, 0, 0, false},
    {25, 300, 1100, KNE_BF16, true, 0, 0, false},  {6, 0, 9, KNE_F32, false, 0, 0, true},
    {101, 2100, 70, KNE_BF16, false, 3, 0.5f, true}, {97, 1030, 33, KNE_F16, false, 0, 0, true},
    {1, 3000, 40, KNE_BF16, true, 0, 0, false},    {0, 8, 8, KNE_F32, false, 0, 0, false},
};

static kne_mat
make_mat(const linear_case *c, char **raw)
{
    kne_mat w = {.type = c->type, .transposed = c->transposed};
    size_t  size = kne_dtype_size(c->type), used;

    w.rows = c->transposed ? c->in : c->out;
    w.cols = c->transposed ? c->out : c->in;
    w.ld = w.cols + c->pad;
    /* the last row ends with its last element; the start is odd */
    used = w.rows ? (size_t) ((w.rows - 1) * w.ld + w.cols) * size : 0;
    *raw = need(used + 1);
    w.data = *raw + 1;
    for (int64_t r = 0; r < w.rows; r++)
        for (int64_t i = 0; i < (r + 1 < w.rows ? w.ld : w.cols); i++)
        {
            float    f = i < w.cols ? (float) uniform() : NAN;
            uint16_t h = c->type == KNE_F16 ? kne_f32_to_f16(f) : kne_f32_to_bf16(f);

            memcpy(*raw + 1 + (size_t) (r * w.ld + i) * size, c->type == KNE_F32 ? (void *) &f : &h, size);
        }
    return w;
}

/* One product in the table's terms: x is (n, k), y is (n, m), both with NaN between rows. */
typedef struct product
{
    bool        backward;
    kne_mat     w;
    const float *bias, *x, *y0;
    int64_t     n, k, m, ldx, ldy;
    float       beta;
} product;

static void
run_product(kne_backend *be, const product *p, float *y, int64_t r0, int64_t n)
{
    if (p->backward)
        be->linear_bwd(be->ctx, y, p->ldy, p->x + r0 * p->ldx, p->ldx, &p->w, n, p->beta);
    else
        be->linear(be->ctx, y, p->ldy, p->x + r0 * p->ldx, p->ldx, &p->w, p->bias, n, p->beta);
}

static float *
start_y(const product *p, int64_t r0, int64_t n)
{
    float *y = floats(n * p->ldy, NAN);

    for (int64_t i = 0; p->beta != 0 && i < n; i++)
        memcpy(y + i * p->ldy, p->y0 + (r0 + i) * p->ldy, (size_t) p->m * sizeof(float));
    return y;
}

static bool
product_is_invariant(const product *p, const float *y)
{
    static const int64_t chunks[] = {1, 2, 3, 5, 6, 7, 13, 61};
    bool same = true;

    for (size_t c = 0; c < sizeof(chunks) / sizeof(chunks[0]); c++)
        for (int64_t r = 0; r < p->n; r += chunks[c] * (p->n > 40 ? 3 : 1))
        {
            int64_t n = p->n - r < chunks[c] ? p->n - r : chunks[c];
            float  *z = start_y(p, r, n);

            run_product(be1, p, z, r, n);
            for (int64_t i = 0; i < n; i++)
                same &= same_bits(z + i * p->ldy, y + (r + i) * p->ldy, p->m);
            free(z);
        }
    return same;
}

static void
test_product(const linear_case *c, bool backward)
{
    char    *raw;
    product  p = {.backward = backward, .w = make_mat(c, &raw), .n = c->n, .beta = c->beta};
    float   *x, *bias, *y0, *y[3];
    double  *want;
    kne_backend *be[3] = {be1, be2, be3};
    char     what[160];

    p.k = backward ? c->out : c->in;
    p.m = backward ? c->in : c->out;
    p.ldx = p.k + c->pad;
    p.ldy = p.m + c->pad;
    x = random_floats(c->n * p.ldx);
    for (int64_t r = 0; r < c->n; r++)
        for (int64_t i = p.k; i < p.ldx; i++)
            x[r * p.ldx + i] = NAN;
    y0 = random_floats(c->n * p.ldy);
    bias = c->bias ? random_floats(p.m) : NULL;
    p.x = x;
    p.y0 = y0;
    p.bias = bias;
    want = need((size_t) (c->n * p.m) * sizeof(double));
    for (int64_t r = 0; r < c->n; r++)
        for (int64_t o = 0; o < p.m; o++)
        {
            double sum = c->beta == 0 ? 0 : c->beta * (double) y0[r * p.ldy + o];
            bool   by_row = backward == c->transposed; /* o is a row of w as stored */

            for (int64_t k = 0; k < p.k; k++)
                sum += (double) x[r * p.ldx + k] *
                       kne_load(p.w.data, c->type, (size_t) (by_row ? o * p.w.ld + k : k * p.w.ld + o));
            want[r * p.m + o] = sum + (bias && !backward ? bias[o] : 0);
        }
    snprintf(what, sizeof(what), "%s: %s n %lld in %lld out %lld %s%s", isa,
             backward ? "linear_bwd" : "linear", (long long) c->n, (long long) c->in,
             (long long) c->out, kne_dtype_name(c->type), c->transposed ? " transposed" : "");
    for (int i = 0; i < 3; i++)
    {
        y[i] = start_y(&p, 0, c->n);
        run_product(be[i], &p, y[i], 0, c->n);
    }
    {
        float *dense = floats(c->n * p.m, 0);
        double e;

        for (int64_t r = 0; r < c->n; r++)
            memcpy(dense + r * p.m, y[0] + r * p.ldy, (size_t) p.m * sizeof(float));
        e = nmse(dense, want, c->n * p.m);
        check(e <= 1e-12, "%s is right (NMSE %.1e)", what, e);
        free(dense);
    }
    /* the gaps between rows stay what they were, so whole buffers may be compared */
    check(same_bits(y[0], y[1], c->n * p.ldy) && same_bits(y[0], y[2], c->n * p.ldy),
          "%s: 1, 2 and 3 threads give the same bits", what);
    check(product_is_invariant(&p, y[0]), "%s: any batch gives the same bits", what);
    for (int i = 0; i < 3; i++)
        free(y[i]);
    free(want);
    free(x);
    free(y0);
    free(bias);
    free(raw);
}

static void
test_matmul_tn(int64_t m, int64_t p, int64_t k, float beta)
{
    int64_t lda = m + 3, ldb = p + 1, ldc = p + 2;
    float  *a = random_floats(k * lda), *b = random_floats(k * ldb), *c0 = random_floats(m * ldc);
    float  *c[3], *z = floats(m * ldc, NAN);
    double *want = need((size_t) (m * p) * sizeof(double)), e;
    float  *dense = floats(m * p, 0);
    bool    same = true;
    kne_backend *be[3] = {be1, be2, be3};

    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < p; j++)
        {
            double sum = beta * (double) c0[i * ldc + j];

            for (int64_t r = 0; r < k; r++)
                sum += (double) a[r * lda + i] * b[r * ldb + j];
            want[i * p + j] = sum;
        }
    for (int t = 0; t < 3; t++)
    {
        c[t] = floats(m * ldc, NAN);
        if (beta != 0)
            memcpy(c[t], c0, (size_t) (m * ldc) * sizeof(float));
        be[t]->matmul_tn(be[t]->ctx, c[t], ldc, a, lda, b, ldb, m, p, k, beta);
    }
    for (int64_t i = 0; i < m; i++)
    {
        memcpy(dense + i * p, c[0] + i * ldc, (size_t) p * sizeof(float));
        /* each row of the result alone */
        memcpy(z, beta != 0 ? c0 + i * ldc : z, (size_t) p * sizeof(float));
        be1->matmul_tn(be1->ctx, z, ldc, a + i, lda, b, ldb, 1, p, k, beta);
        same &= same_bits(z, c[0] + i * ldc, p);
    }
    e = nmse(dense, want, m * p);
    check(e <= 1e-12, "%s: matmul_tn %lld x %lld, k %lld is right (NMSE %.1e)", isa, (long long) m,
          (long long) p, (long long) k, e);
    check(same && same_bits(c[0], c[1], m * ldc) && same_bits(c[0], c[2], m * ldc),
          "%s: matmul_tn %lld x %lld: rows alone and threads give the same bits", isa, (long long) m,
          (long long) p);
    for (int t = 0; t < 3; t++)
        free(c[t]);
    free(a);
    free(b);
    free(c0);
    free(z);
    free(want);
    free(dense);
}

#include "test_ops_rows.h"
#include "test_ops_attn.h"
#include "test_ops_elem.h"

static kne_backend *
backend(int threads)
{
    kne_backend *be = NULL;
    kne_err      err;

    if (kne_cpu_backend_new(threads, isa, &be, &err) != KNE_OK && err.code != KNE_ERR_UNSUPPORTED)
        check(0, "backend: %s", err.msg);
    return be;
}

int
main(void)
{
    kne_err      err;
    kne_backend *be;

    dctx.n_threads = 1;
    dctx.scratch = need(KNE_CPU_SCRATCH);
    check(kne_cpu_backend_new(1, "no such", &be, &err) == KNE_ERR_UNSUPPORTED && be == NULL,
          "an unknown instruction set is refused: %s", err.msg);
    check(kne_cpu_backend_new(0, NULL, &be, &err) == KNE_OK, "the default table: %s", be ? be->name : "");
    kne_cpu_backend_free(be);
    for (size_t i = 0; i < sizeof(isa_names) / sizeof(isa_names[0]); i++)
    {
        isa = isa_names[i];
        be1 = backend(1);
        be2 = backend(2);
        be3 = backend(3);
        if (be1 == NULL)
        {
            skip(isa, "not on this machine");
            continue;
        }
        { /* three threads take the other way with many rows */
            kne_cpu *cpu = be3->ctx;

            cpu->turn_min = cpu->turn_min == 96 ? INT64_MAX : 96;
        }
        for (size_t c = 0; c < sizeof(linear_cases) / sizeof(linear_cases[0]); c++)
        {
            test_product(&linear_cases[c], false);
            test_product(&linear_cases[c], true);
        }
        test_matmul_tn(88, 192, 37, 0);
        test_matmul_tn(3, 5, 640, 1);
        test_matmul_tn(70, 700, 200, 0.5f);
        test_matmul_tn(1, 1, 1, 0);
        test_row_ops();
        test_attention_ops();
        test_element_ops();
        kne_cpu_backend_free(be1);
        kne_cpu_backend_free(be2);
        kne_cpu_backend_free(be3);
    }
    test_gradients();
    free(dctx.scratch);
    return kne_test_done();
}
