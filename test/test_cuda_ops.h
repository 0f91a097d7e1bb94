/*
 * test_cuda_ops.h - part of test_cuda.c: every op of the table, CPU against GPU.
 *
 * A case is written once: it takes buffers, which exist on both sides with the same random content, calls the op for
 * either side, and compares what it names as outputs. Outputs are NaN before the call unless the op adds to them.
 */
#ifndef TEST_CUDA_OPS_H
#define TEST_CUDA_OPS_H

enum { MAX_BUFFERS = 48 };

/* The same memory on both sides. */
typedef struct buffer
{
    void  *side[2]; /* CPU, GPU */
    size_t bytes;
} buffer;

static buffer buffers[MAX_BUFFERS];
static int    n_buffers;

static const buffer *
both(const void *content, size_t bytes)
{
    buffer *b = &buffers[n_buffers++];

    b->bytes = bytes;
    b->side[0] = malloc(bytes + 1);
    memcpy(b->side[0], content, bytes);
    b->side[1] = gpu->alloc(gpu->ctx, bytes);
    gpu->put(gpu->ctx, b->side[1], content, bytes);
    return b;
}

static const buffer *
numbers(int64_t n, double around, double scale)
{
    float        *x = malloc((size_t) n * sizeof *x + 1);
    const buffer *b;

    for (int64_t i = 0; i < n; i++)
        x[i] = (float) (around + scale * (tiny_uniform(&seed) + tiny_uniform(&seed)));
    b = both(x, (size_t) n * sizeof *x);
    free(x);
    return b;
}

static const buffer *
output(int64_t n) /* of 4-byte elements */
{
    uint32_t     *x = malloc((size_t) n * sizeof *x + 1);
    const buffer *b;

    for (int64_t i = 0; i < n; i++)
        x[i] = 0x7fc00001; /* NaN; as an integer, no index */
    b = both(x, (size_t) n * sizeof *x);
    free(x);
    return b;
}

/* n numbers below `below`; distinct and ascending where n < below allows it and distinct is asked for */
static const buffer *
indices(int64_t n, int64_t below, bool distinct)
{
    int32_t      *x = malloc((size_t) n * sizeof *x + 1);
    const buffer *b;

    for (int64_t i = 0; i < n; i++)
        x[i] = distinct ? (int32_t) (i * below / n) : (int32_t) (kne_random_next(&seed) % (uint64_t) below);
    b = both(x, (size_t) n * sizeof *x);
    free(x);
    return b;
}

/* A random matrix, its rows 16 bytes apart on both sides, as kne_model_bind lays them out. */
static void
weights(kne_mat *m, int64_t rows, int64_t cols, kne_dtype type, bool transposed)
{
    const int64_t e = (int64_t) kne_dtype_size(type), ld = (cols * e + 15) / 16 * 16 / e;
    char         *x = calloc((size_t) (rows * ld), (size_t) e);
    const buffer *b;

    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++)
        {
            float    v = (float) (tiny_uniform(&seed) + tiny_uniform(&seed));
            uint16_t h = type == KNE_F16 ? kne_f32_to_f16(v) : kne_f32_to_bf16(v);

            memcpy(x + (r * ld + c) * e, type == KNE_F32 ? (void *) &v : (void *) &h, (size_t) e);
        }
    b = both(x, (size_t) (rows * ld * e));
    free(x);
    for (int side = 0; side < 2; side++)
        m[side] = (kne_mat) {.data = b->side[side], .type = type, .transposed = transposed, .rows = rows, .cols = cols,
                             .ld = ld};
}

/* sum (cpu - gpu)^2 / sum cpu^2; NaN never passes. integers: 0 if all are equal. */
static double
distance(const buffer *b, bool integers)
{
    char  *back = malloc(b->bytes + 1);
    double d = 0, size = 0;

    gpu->get(gpu->ctx, back, b->side[1], b->bytes);
    if (integers)
        d = memcmp(back, b->side[0], b->bytes) != 0;
    for (size_t i = 0; !integers && i < b->bytes / 4; i++)
    {
        double x = ((const float *) b->side[0])[i], y = ((const float *) back)[i];

        d += (x - y) * (x - y);
        size += x * x;
    }
    free(back);
    return integers ? d : size > 0 ? d / size : d;
}

static void
forget(void)
{
    while (n_buffers)
    {
        free(buffers[--n_buffers].side[0]);
        gpu->release(gpu->ctx, buffers[n_buffers].side[1]);
    }
}

static double worst; /* of the cases of one op */

static void
compare(const buffer *b)
{
    double d = distance(b, false);

    worst = d >= worst || d != d ? d : worst;
}

static void
compare_ints(const buffer *b)
{
    worst = distance(b, true) > 0 ? NAN : worst;
}

static void
verdict_of(const char *name, double limit, bool last)
{
    kne_err    err;
    kne_status st = gpu->status(gpu->ctx, &err);

    if (ok(st, &err))
        check(worst <= limit, "%s (NMSE %.1e)", name, worst);
    else
        check(false, "%s", name);
    worst = 0;
    if (last)
        forget();
}

static void
verdict(const char *name, double limit)
{
    verdict_of(name, limit, true);
}

#define EACH_SIDE for (int s = 0; s < 2; s++)
#define BE        (s ? gpu : cpu)
#define CALL(op, ...) EACH_SIDE BE->op(BE->ctx, __VA_ARGS__)
#define F(b)      ((float *) (b)->side[s])
#define I(b)      ((int32_t *) (b)->side[s])
#define OR_NULL(b) ((b) ? (float *) (b)->side[s] : NULL)

/* ---- products ---- */

static void
test_products(double limit16)
{
    static const int64_t rows[] = {1, 7, 33, 130};
    static const char *const names[] = {"float32", "float16", "bfloat16"};
    char    what[80];
    kne_mat w[2];

    for (int type = 0; type < 3; type++)
    {
        for (int i = 0; i < 16; i++)
        {
            const int64_t n = rows[i % 4], out = 24 + (int64_t) (kne_random_next(&seed) % 90),
                          in = 8 + (int64_t) (kne_random_next(&seed) % 120);
            const bool    turned = i & 4, more = i & 8;
            const int64_t ldx = more ? in + 5 : in, ldy = more ? out + 3 : out;
            const float   beta = more ? 1 : 0;
            const buffer *x = numbers(n * ldx, 0.1, 1), *y = more ? numbers(n * ldy, 0, 1) : output(n * ldy);
            const buffer *bias = i % 3 ? numbers(out, 0, 1) : NULL;

            weights(w, turned ? in : out, turned ? out : in, (kne_dtype) type, turned);
            CALL(linear, F(y), ldy, F(x), ldx, &w[s], OR_NULL(bias), n, beta);
            compare(y);
            const buffer *dy = numbers(n * ldy, 0, 1), *dx = more ? numbers(n * ldx, 0, 1) : output(n * ldx);

            CALL(linear_bwd, F(dx), ldx, F(dy), ldy, &w[s], n, beta);
            compare(dx);
            forget();
        }
        /* the same input twice and then changed: a kept cast must not outlive it */
        const buffer *x = numbers(6 * 40, 0, 1), *y = output(6 * 30), *z = output(6 * 30), *add = numbers(6 * 40, 0, 1);

        weights(w, 30, 40, (kne_dtype) type, false);
        CALL(linear, F(y), 30, F(x), 40, &w[s], NULL, 6, 0);
        CALL(add, F(x), F(add), 6 * 40);
        CALL(linear, F(z), 30, F(x), 40, &w[s], NULL, 6, 0);
        compare(y);
        compare(z);
        snprintf(what, sizeof what, "linear and linear_bwd, %s", names[type]);
        verdict(what, type == KNE_F32 ? 1e-7 : limit16);
    }
}

static void
test_matmul_tn(void)
{
    for (int i = 0; i < 6; i++)
    {
        const int64_t m = 1 + 13 * i, p = 20 + 11 * i, k = 1 + (int64_t) (kne_random_next(&seed) % 90), lda = m + i % 2,
                      ldb = p + i % 3;
        const buffer *a = numbers(k * lda, 0, 1), *b = numbers(k * ldb, 0, 1), *c = i % 2 ? numbers(m * p, 0, 1) : output(m * p);

        CALL(matmul_tn, F(c), p, F(a), lda, F(b), ldb, m, p, k, i % 2 ? 1.0f : 0.0f);
        compare(c);
        forget();
    }
    verdict("matmul_tn", 1e-7);
}

/* ---- norms ---- */

static void
test_norms(void)
{
    static const int64_t widths[] = {1, 6, 64, 67, 300, 1031};

    for (int i = 0; i < 6; i++)
    {
        const int64_t n = 1 + i * 3, d = widths[i];
        const buffer *x = numbers(n * d, 0.4, 1), *w = i == 3 ? NULL : numbers(d, 1, 0.5), *y = output(n * d),
                     *rstd = output(n), *dy = numbers(n * d, 0, 1), *dx = numbers(n * d, 0, 1);

        CALL(rmsnorm, F(y), F(rstd), F(x), OR_NULL(w), 1e-5f, n, d);
        CALL(rmsnorm_bwd, F(dx), F(dy), F(x), F(rstd), OR_NULL(w), n, d);
        compare(y);
        compare(rstd);
        compare(dx);
        forget();
    }
    verdict("rmsnorm, rmsnorm_bwd", 1e-7);
    for (int i = 1; i < 6; i++)
    {
        const int64_t n = 1 + i * 3, d = widths[i];
        const buffer *x = numbers(n * d, 0.4, 1), *w = i == 3 ? NULL : numbers(d, 1, 0.5), *b = i == 2 ? NULL : numbers(d, 0, 1),
                     *y = output(n * d), *mean = output(n), *rstd = output(n), *dy = numbers(n * d, 0, 1),
                     *dx = numbers(n * d, 0, 1);

        CALL(layernorm, F(y), F(mean), F(rstd), F(x), OR_NULL(w), OR_NULL(b), 1e-5f, n, d);
        CALL(layernorm_bwd, F(dx), F(dy), F(x), F(mean), F(rstd), OR_NULL(w), n, d);
        compare(y);
        compare(mean);
        compare(rstd);
        compare(dx);
        forget();
    }
    verdict("layernorm, layernorm_bwd", 1e-7);
}

/* ---- attention ---- */

static void
test_rope(void)
{
    for (int i = 0; i < 8; i++)
    {
        const int32_t heads = 1 + i, hd = 8 + 2 * i, rotary = i % 2 ? hd : hd / 2 & ~1;
        const int64_t n = 3 + i, ld = heads * hd + (i == 5 ? 4 : 0);
        const buffer *x = numbers(n * ld, 0, 1), *co = numbers(50 * (rotary / 2), 0, 0.7), *si = numbers(50 * (rotary / 2), 0, 0.7),
                     *pos = indices(n, 50, false);

        CALL(rope, F(x), ld, F(co), F(si), I(pos), n, heads, hd, rotary, i & 2, i & 4 ? -1.0f : 1.0f);
        compare(x);
        forget();
    }
    verdict("rope", 1e-7);
}

static void
test_attention(void)
{
    static const struct { int32_t heads, kv, hd, n_seq, len[4], cached; } cases[] = {
        {1, 1, 4, 1, {1}, 0},          {4, 2, 6, 3, {5, 1, 40}, 0}, {3, 3, 33, 2, {33, 31}, 0}, {8, 1, 64, 2, {70, 3}, 0},
        {4, 4, 10, 4, {2, 9, 64, 32}, 0}, {4, 2, 128, 1, {35}, 0},  {6, 2, 16, 1, {1}, 77},     {2, 2, 80, 1, {6}, 30},
    };

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    {
        const int32_t H = cases[i].heads, Hkv = cases[i].kv, hd = cases[i].hd;
        kne_seq       seq[4];
        int32_t       n = 0, n_kv = 0, longest = 0;

        for (int j = 0; j < cases[i].n_seq; j++)
        {
            const int32_t t = cases[i].len[j];

            seq[j] = (kne_seq) {n, t, n_kv, t + cases[i].cached};
            n += t;
            n_kv += t + cases[i].cached;
            longest = t > longest ? t : longest;
        }
        const buffer *where = both(seq, (size_t) cases[i].n_seq * sizeof *seq);
        const buffer *q = numbers(n * H * hd, 0, 1), *k = numbers(n_kv * Hkv * hd, 0, 1), *v = numbers(n_kv * Hkv * hd, 0.2, 1),
                     *o = output(n * H * hd), *lse = output(n * H), *go = numbers(n * H * hd, 0, 1);
        kne_attn_shape shape[2];

        EACH_SIDE shape[s] = (kne_attn_shape) {H, Hkv, hd, cases[i].n_seq, where->side[s], 1.3f / sqrtf((float) hd), n, longest};
        CALL(attention, F(o), F(lse), F(q), F(k), F(v), &shape[s]);
        compare(o);
        compare(lse);
        if (!cases[i].cached)
        {
            const buffer *dq = output(n * H * hd), *dk = output(n * Hkv * hd), *dv = output(n * Hkv * hd);

            CALL(attention_bwd, F(dq), F(dk), F(dv), F(go), F(o), F(lse), F(q), F(k), F(v), &shape[s]);
            compare(dq);
            compare(dk);
            compare(dv);
        }
        forget();
    }
    verdict("attention, attention_bwd", 1e-7);
}

/* ---- the rest ---- */

static void
test_elements(void)
{
    const int64_t n = 9, f = 77;

    for (int kind = 0; kind < 6; kind++)
    {
        const kne_act_kind act = (kne_act_kind) (kind % 3);
        const buffer      *g = kind < 3 ? numbers(n * f, 0, 3) : NULL, *u = numbers(n * f, 0, 3), *a = output(n * f),
                     *da = numbers(n * f, 0, 1), *dg = output(n * f), *du = output(n * f);

        CALL(act, F(a), OR_NULL(g), F(u), act, n, f);
        CALL(act_bwd, g ? F(dg) : NULL, F(du), F(da), OR_NULL(g), F(u), act, n, f);
        compare(a);
        compare(du);
        if (g)
            compare(dg);
        forget();
    }
    verdict("act, act_bwd", 1e-7);

    const buffer *x = numbers(n * f, 0, 1), *y = numbers(n * f, 0, 1), *by = numbers(n, 0, 1);

    CALL(add, F(y), F(x), n * f);
    compare(y);
    CALL(scale_rows, F(y), F(by), n, f);
    compare(y);
    verdict("add, scale_rows", 1e-12);

    for (int type = 0; type < 3; type++)
    {
        kne_mat       tok[2], table[2], none[2] = {{0}};
        const buffer *id = indices(n, 40, false), *pos = indices(n, 20, false), *e = output(n * f), *e2 = output(n * f),
                     *col = indices(13, 40, true), *rows = output(13 * f), *cols = output(13 * 40), *few = indices(13, f, true);

        weights(tok, 40, f, (kne_dtype) type, false);
        weights(table, 20, f, (kne_dtype) type, false);
        CALL(embed, F(e), &tok[s], &table[s], I(id), I(pos), n);
        CALL(embed, F(e2), &tok[s], type ? &none[s] : NULL, I(id), I(pos), n);
        CALL(gather_neurons, F(rows), &tok[s], false, I(col), 13);
        CALL(gather_neurons, F(cols), &tok[s], true, I(few), 13);
        compare(e);
        compare(e2);
        compare(rows);
        compare(cols);
        forget();
    }
    verdict("embed, gather_neurons", 1e-14);

    const buffer *from = numbers(n * f, 0, 1), *col = indices(12, f, true), *some = output(n * 12), *to = numbers(n * f, 0, 1),
                 *more = numbers(n * f, 0, 1), *row = indices(5, n, true), *picked = output(5 * f);

    CALL(gather_cols, F(some), F(from), f, I(col), n, 12);
    CALL(scatter_cols, F(to), f, F(some), I(col), n, 12, false);
    CALL(scatter_cols, F(more), f, F(some), I(col), n, 12, true);
    CALL(gather_rows, F(picked), F(from), I(row), 5, f);
    CALL(scatter_rows, F(more), F(picked), I(row), 5, f);
    compare(some);
    compare(to);
    compare(more);
    compare(picked);
    verdict("gather and scatter of columns and rows", 1e-14);

    const int32_t begin[] = {0, 1, 4, 6, 12}, at[] = {3, 0, 5, 8, 1, 2, 4, 6, 7, 3, 0, 8};
    const buffer *wide = numbers(n * f, 0, 1), *ranges = both(begin, sizeof begin), *places = both(at, sizeof at), *folded = output(4 * f);

    CALL(fold_rows, F(folded), F(wide), I(ranges), I(places), 4, f);
    compare(folded);
    verdict("fold_rows", 1e-12);

    const buffer *sum = numbers(f, 0, 1), *a = numbers(n * f, 0, 1), *u = numbers(n * f, 0, 1), *coef = numbers(n, 0, 1);

    CALL(score, F(sum), F(a), F(u), F(coef), n, f);
    compare(sum);
    verdict("score", 1e-7);
}

static void
test_losses(void)
{
    static const int64_t vocab[] = {3, 61, 1000, 5003};

    for (int i = 0; i < 4; i++)
    {
        const int64_t n = 5, v = vocab[i];
        const buffer *logits = numbers(n * v, 0, 4), *target = indices(n, v, false), *coef = numbers(n, 0, 1), *best = output(n),
                     *logp = output(n), *d = output(n * v), *only = output(n), *ref = output(n * v), *kl = output(n),
                     *dkl = output(n * v), *other = numbers(n * v, 0, 4);

        /* two of one row are the largest: the first counts; and one row has an entry that cannot be */
        EACH_SIDE
        {
            const float big = 30, never = -INFINITY;

            BE->put(BE->ctx, F(logits) + v + v / 2, &big, sizeof big);
            BE->put(BE->ctx, F(logits) + v + v - 1, &big, sizeof big);
            BE->put(BE->ctx, F(other) + 2 * v + v / 3, &never, sizeof never);
        }
        CALL(logprob, F(logp), I(best), F(d), F(logits), I(target), F(coef), n, v);
        CALL(logprob, F(only), NULL, NULL, F(logits), I(target), NULL, n, v);
        CALL(log_softmax, F(ref), F(other), n, v);
        CALL(kl, F(kl), F(dkl), F(logits), F(ref), F(coef), n, v);
        compare(logp);
        compare(only);
        compare_ints(best);
        compare(d);
        compare(kl);
        compare(dkl);
        CALL(log_softmax, F(logits), F(logits), n, v);
        compare(logits);
        forget();
    }
    verdict("logprob, kl, log_softmax", 1e-7);
}

/* Two edits of three layers: rows, blocks and movers that leave nothing regular. */
static void
test_optimiser(void)
{
    enum { N = 40, D = 75, F = 31, T = 23, ROWS = 50, UNION = 21, WIDE = 29 };
    static const int32_t block_n[] = {1, 9, 5, 14, 11}, owners[] = {0, 0, 1, 1, 2};
    kne_metric_block     blocks[5];
    kne_grad_row         list[N];
    int32_t              owner[N], idx[N], from[UNION + 1] = {0}, place[N];
    const kne_mover      movers[] = {{0, 10, 1, 0.3f, 0.7f, 0.1f, 0.001f}, {10, 19, 0, 9, 9, 9, 9}, {29, 11, 1, 2, -0.2f, 0.5f, 0.01f}};
    int64_t              at = 0;

    for (int i = 0, row = 0; i < 5; row += block_n[i], at += block_n[i] * block_n[i], i++)
    {
        blocks[i] = (kne_metric_block) {at, row, block_n[i], owners[i]};
        for (int r = row; r < row + block_n[i]; r++)
            owner[r] = owners[i];
    }
    for (int i = 0; i < N; i++)
    {
        list[i] = (kne_grad_row) {i, (i * 7) % F, owner[i] * 6, owner[i] * 6 + 4 + 3 * owner[i]};
        idx[i] = 100 + (i * 11) % WIDE;
        place[i] = (i * 13) % N;
        from[1 + i * i % UNION]++;
    }
    for (int i = 0; i < UNION; i++)
        from[i + 1] += from[i];
    const buffer *left = numbers(T * F, 0, 1), *right = numbers(T * D, 0, 1), *grad = output(N * D), *scratch = output(T * N),
                 *entries = both(list, sizeof list), *own = both(owner, sizeof owner), *move = both(movers, sizeof movers),
                 *at_place = both(place, sizeof place), *anchors = numbers(N * D, 0, 1), *mean = numbers(N * D, 0, 1),
                 *block = both(blocks, sizeof blocks), *index = both(idx, sizeof idx), *a = numbers(ROWS * WIDE, 0, 1),
                 *m = output(at * 2), *column = output(2 * 14 * 32), *norm = output(4 * N), *delta = numbers(N * D, 0, 1),
                 *var = numbers(N * D, 1, 0.1), *one = numbers(13 * 13, 0, 0.02), *other = numbers(N * D, 0, 1);

    CALL(grad_rows, F(grad), (const kne_grad_row *) entries->side[s], N, F(left), F, F(right), D, F(scratch));
    compare(grad);
    CALL(add_anchors, F(grad), F(anchors), I(at_place), I(own), (const kne_mover *) move->side[s], N, D);
    compare(grad);
    CALL(momentum, F(mean), 0.4f, F(grad), I(own), (const kne_mover *) move->side[s], N, D);
    compare(mean);
    verdict_of("grad_rows, add_anchors, momentum", 1e-12, false);

#define BLOCKS  ((const kne_metric_block *) block->side[s])
#define DOUBLES(b) ((double *) (b)->side[s])
    CALL(gram, DOUBLES(m), F(a), WIDE, ROWS, I(index), 100, BLOCKS, 5, 14);
    CALL(factor, DOUBLES(m), NULL, BLOCKS, 5, 14, 1.0 / ROWS, 0.01);
    CALL(solve, F(mean), 0.5f, 2, F(grad), DOUBLES(m), BLOCKS, 5, 14, (const kne_mover *) move->side[s], D, DOUBLES(column));
    compare(mean);
    CALL(row_norms, DOUBLES(norm), F(mean), N, D);
    CALL(row_norms, DOUBLES(norm) + N, F(anchors), N, D);
    CALL(step, F(delta), F(mean), DOUBLES(norm), 2, I(own), (const kne_mover *) move->side[s], N, D);
    compare(delta);
    CALL(adam, F(delta), F(mean), F(var), F(anchors), I(own), (const kne_mover *) move->side[s], N, D);
    compare(delta);
    compare(var);
    /* one matrix as float, on its own */
    EACH_SIDE
    {
        kne_metric_block b = {0, 3, 13, 0};

        for (int i = 0; i < 13; i++)
        {
            const float high = 2;

            BE->put(BE->ctx, F(one) + i * 14, &high, sizeof high);
            for (int j = 0; j < i; j++) /* symmetric */
            {
                float low;

                BE->get(BE->ctx, &low, F(one) + i * 13 + j, sizeof low);
                BE->put(BE->ctx, F(one) + j * 13 + i, &low, sizeof low);
            }
        }
        BE->put(BE->ctx, block->side[s], &b, sizeof b);
    }
    CALL(factor, DOUBLES(m), F(one), BLOCKS, 1, 13, 0.5, 0.1);
    CALL(solve, F(mean), 0, -1, F(other), DOUBLES(m), BLOCKS, 1, 13, NULL, D, DOUBLES(column));
    compare(mean);
    verdict_of("gram, factor, solve, row_norms, step, adam", 1e-9, false);
#undef BLOCKS
#undef DOUBLES

    for (int type = 0; type < 3; type++)
    {
        const buffer *eff = output(UNION * D), *keys = output(UNION * D), *base = numbers(UNION * D, 0, 1), *ranges = both(from, sizeof from);

        CALL(compose, F(eff), F(base), F(base), F(delta), I(ranges), I(at_place), UNION, D, (kne_dtype) type);
        CALL(compose, F(keys), NULL, F(base), NULL, I(ranges), I(at_place), UNION, D, (kne_dtype) type);
        /* the same to rounding: delta is */
        worst = fmax(worst, distance(eff, false) > 1e-4);
        compare(keys);
    }
    verdict("compose", 1e-12);
}

static void
test_selection(void)
{
    enum { ROWS = 3, ALL = 1500, LD = 1511, F = 140, T = 19 };
    static const int32_t begin[] = {0, 4, 5, 19};
    static const int64_t wanted[] = {1, 37, 700, ALL};

    for (int i = 0; i < 8; i++)
    {
        const int64_t n = wanted[i % 4];
        const buffer *score = numbers(ROWS * LD, 0, 1), *index = output(ROWS * n), *keys = output(2 * ROWS * n);

        if (i >= 4) /* ties, zeros of both signs, numbers that are none */
            EACH_SIDE
                for (int k = 0; k < ROWS * LD; k += 2)
                {
                    const float coarse[] = {0, -0.0f, 1, -1, NAN, INFINITY, -INFINITY, 0.5f};

                    BE->put(BE->ctx, F(score) + k, &coarse[k / 2 * 7 % 8], sizeof(float));
                }
        CALL(top, I(index), F(score), LD, (uint64_t *) keys->side[s], ROWS, ALL, n);
        compare_ints(index);
        forget();
    }
    verdict("top", 0);

    for (int i = 0; i < 8; i++)
    {
        const int64_t rows = 1 + i % 3;
        const buffer *x = numbers(rows * LD, 0, 1), *y = output(ALL), *mean = i & 1 ? numbers(ALL, 3, 1) : NULL;

        CALL(contrast, F(y), F(x), LD, rows, ALL, OR_NULL(mean), 0.1f, i & 2);
        compare(y);
        forget();
    }
    verdict("contrast", 1e-12);

    const buffer *z = numbers(T * F, 0, 1), *a = numbers(T * F, 0, 1), *k = numbers(T * T, 0, 1), *row0 = both(begin, sizeof begin),
                 *score = numbers(3 * (F + 9), 0, 1);

    CALL(energy, F(score), F + 9, F(z), F(a), F(k), I(row0), 3, T, F, 0.3f);
    compare(score);
    verdict("energy", 1e-7);
}

static void
test_ops(void)
{
    test_products(1e-7);
    test_matmul_tn();
    test_norms();
    test_rope();
    test_attention();
    test_elements();
    test_losses();
    test_optimiser();
    test_selection();
}

#undef EACH_SIDE
#undef BE
#undef CALL
#undef F
#undef I
#undef OR_NULL

#endif
