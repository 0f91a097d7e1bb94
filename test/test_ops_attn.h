/*
 * test_ops_attn.h - attention (part of test_ops.c): against loops in double,
 * packed sequences against each alone, a cache against none.
 */
typedef struct attn_case
{
    int32_t n_heads, n_kv, hd, n_seq;
    int32_t len[6];
} attn_case;

static const attn_case attn_cases[] = {
    {4, 4, 48, 3, {5, 20, 1}}, {8, 2, 32, 2, {33, 17}}, {3, 1, 5, 4, {3, 1, 70, 2}},
    {2, 2, 128, 1, {300}},     {6, 3, 80, 2, {64, 65}}, {1, 1, 1, 2, {1, 2}},
    {2, 1, 24, 1, {530}},
};

typedef struct attn_data
{
    kne_seq        seq[6];
    kne_attn_shape sh;
    int64_t        n, wq, wkv;
    float         *q, *k, *v, *go;
} attn_data;

static attn_data
make_attention(const attn_case *c)
{
    attn_data a = {.wq = c->n_heads * c->hd, .wkv = c->n_kv * c->hd};

    for (int i = 0; i < c->n_seq; i++)
    {
        a.seq[i] = (kne_seq) {(int32_t) a.n, c->len[i], (int32_t) a.n, c->len[i]};
        a.n += c->len[i];
    }
    a.sh = (kne_attn_shape) {c->n_heads, c->n_kv, c->hd, c->n_seq, NULL, 1.7f / sqrtf((float) c->hd), (int32_t) a.n, 0};
    a.q = random_floats(a.n * a.wq);
    a.k = random_floats(a.n * a.wkv);
    a.v = random_floats(a.n * a.wkv);
    a.go = random_floats(a.n * a.wq);
    for (int64_t i = 0; i < a.n * a.wq; i++)
        a.q[i] *= 4;
    return a;
}

static void
ref_attention(const attn_data *a, double *o, double *lse)
{
    int32_t hd = a->sh.head_dim, group = a->sh.n_heads / a->sh.n_kv_heads;
    double *s = need((size_t) a->n * sizeof(double));

    for (int32_t b = 0; b < a->sh.n_seq; b++)
        for (int32_t h = 0; h < a->sh.n_heads; h++)
            for (int32_t i = 0; i < a->seq[b].q_len; i++)
            {
                int64_t r = a->seq[b].q0 + i;
                double  max = -INFINITY, sum = 0;

                for (int32_t j = 0; j <= i; j++)
                {
                    s[j] = 0;
                    for (int32_t e = 0; e < hd; e++)
                        s[j] += (double) a->q[r * a->wq + h * hd + e] *
                                a->k[(a->seq[b].q0 + j) * a->wkv + h / group * hd + e];
                    s[j] *= a->sh.scale;
                    max = fmax(max, s[j]);
                }
                for (int32_t j = 0; j <= i; j++)
                    sum += exp(s[j] - max);
                lse[r * a->sh.n_heads + h] = max + log(sum);
                for (int32_t e = 0; e < hd; e++)
                {
                    double x = 0;

                    for (int32_t j = 0; j <= i; j++)
                        x += exp(s[j] - max) / sum *
                             a->v[(a->seq[b].q0 + j) * a->wkv + h / group * hd + e];
                    o[r * a->wq + h * hd + e] = x;
                }
            }
    free(s);
}

/* What one run of forward and backward leaves. */
typedef struct attn_out
{
    float *o, *lse, *dq, *dk, *dv;
} attn_out;

static attn_out
run_attention(kne_backend *be, attn_data *a, bool one_by_one)
{
    attn_out       r = {floats(a->n * a->wq, NAN), floats(a->n * a->sh.n_heads, NAN),
                        floats(a->n * a->wq, NAN), floats(a->n * a->wkv, NAN),
                        floats(a->n * a->wkv, NAN)};
    kne_attn_shape sh = a->sh;

    sh.n_seq = one_by_one ? 1 : a->sh.n_seq;
    for (int32_t b = 0; b < a->sh.n_seq; b += sh.n_seq)
    {
        sh.seq = a->seq + b;
        be->attention(be->ctx, r.o, r.lse, a->q, a->k, a->v, &sh);
        be->attention_bwd(be->ctx, r.dq, r.dk, r.dv, a->go, r.o, r.lse, a->q, a->k, a->v, &sh);
    }
    return r;
}

static void
free_attn_out(attn_out r)
{
    free(r.o);
    free(r.lse);
    free(r.dq);
    free(r.dk);
    free(r.dv);
}

static void
free_attention(attn_data a)
{
    free(a.q);
    free(a.k);
    free(a.v);
    free(a.go);
}

static bool
same_attention(const attn_data *a, const attn_out *x, const attn_out *y)
{
    return same_bits(x->o, y->o, a->n * a->wq) && same_bits(x->lse, y->lse, a->n * a->sh.n_heads) &&
           same_bits(x->dq, y->dq, a->n * a->wq) && same_bits(x->dk, y->dk, a->n * a->wkv) &&
           same_bits(x->dv, y->dv, a->n * a->wkv);
}

/* The last rows of each sequence, their keys from a longer buffer: bits of the whole run. */
static bool
cache_is_invariant(attn_data *a, const attn_out *whole)
{
    bool same = true;

    for (int32_t b = 0; b < a->sh.n_seq; b++)
        for (int32_t q = 1; q <= 3 && q <= a->seq[b].q_len; q++)
        {
            int32_t        row = a->seq[b].q0 + a->seq[b].q_len - q;
            kne_seq        seq = {0, q, a->seq[b].kv0, a->seq[b].kv_len};
            kne_attn_shape sh = a->sh;
            float         *o = floats(q * a->wq, NAN);

            sh.n_seq = 1;
            sh.seq = &seq;
            be2->attention(be2->ctx, o, NULL, a->q + row * a->wq, a->k, a->v, &sh);
            same &= same_bits(o, whole->o + row * a->wq, q * a->wq);
            free(o);
        }
    return same;
}

static void
test_attention_case(const attn_case *c)
{
    attn_data a = make_attention(c);
    attn_out  r1, r2, r3, alone;
    double   *o = need((size_t) (a.n * a.wq) * 8), *lse = need((size_t) (a.n * c->n_heads) * 8), e[5];
    double   *dq = need((size_t) (a.n * a.wq) * 8), *dk = need((size_t) (a.n * a.wkv) * 8);
    double   *dv = need((size_t) (a.n * a.wkv) * 8);
    double   *q = widened(a.q, a.n * a.wq), *k = widened(a.k, a.n * a.wkv);
    double   *v = widened(a.v, a.n * a.wkv), *go = widened(a.go, a.n * a.wq);
    char      what[100];

    a.sh.seq = a.seq;
    snprintf(what, sizeof(what), "%s: attention %d/%d heads of %d, %d sequences, %lld rows", isa,
             c->n_heads, c->n_kv, c->hd, c->n_seq, (long long) a.n);
    r1 = run_attention(be1, &a, false);
    r2 = run_attention(be2, &a, false);
    r3 = run_attention(be3, &a, false);
    alone = run_attention(be1, &a, true);
    ref_attention(&a, o, lse);
    attention_bwd(&dctx, dq, dk, dv, go, o, lse, q, k, v, &a.sh);
    e[0] = nmse(r1.o, o, a.n * a.wq);
    e[1] = nmse(r1.lse, lse, a.n * c->n_heads);
    e[2] = nmse(r1.dq, dq, a.n * a.wq);
    e[3] = nmse(r1.dk, dk, a.n * a.wkv);
    e[4] = nmse(r1.dv, dv, a.n * a.wkv);
    check(e[0] <= 1e-12 && e[1] <= 1e-12, "%s is right (NMSE %.1e, lse %.1e)", what, e[0], e[1]);
    /* with one key only, dq and dk are differences of equals */
    check((e[2] <= 1e-11 && e[3] <= 1e-11 && e[4] <= 1e-11) || c->hd == 1,
          "%s: backward is right (NMSE %.1e, %.1e, %.1e)", what, e[2], e[3], e[4]);
    check(same_attention(&a, &r1, &r2) && same_attention(&a, &r1, &r3), "%s: any number of threads", what);
    check(same_attention(&a, &r1, &alone), "%s: packed is as each alone", what);
    check(cache_is_invariant(&a, &r1), "%s: with a cache as without", what);
    free_attn_out(r1);
    free_attn_out(r2);
    free_attn_out(r3);
    free_attn_out(alone);
    free(o);
    free(lse);
    free(dq);
    free(dk);
    free(dv);
    free(q);
    free(k);
    free(v);
    free(go);
    free_attention(a);
}

/* The longest sequence that is meant to work, one head. */
static void
test_attention_long(void)
{
    attn_case c = {1, 1, 16, 1, {4096}};
    attn_data a = make_attention(&c);
    attn_out  r;
    double   *o = need((size_t) (a.n * a.wq) * 8), *lse = need((size_t) a.n * 8);

    a.sh.seq = a.seq;
    r = run_attention(be2, &a, false);
    ref_attention(&a, o, lse);
    check(nmse(r.o, o, a.n * a.wq) <= 1e-12 && nmse(r.lse, lse, a.n) <= 1e-12,
          "%s: attention over 4096 rows", isa);
    free_attn_out(r);
    free(o);
    free(lse);
    free_attention(a);
}

static void
test_attention_ops(void)
{
    for (size_t c = 0; c < sizeof(attn_cases) / sizeof(attn_cases[0]); c++)
        test_attention_case(&attn_cases[c]);
    if (strcmp(isa, "portable") != 0)
        test_attention_long();
}
