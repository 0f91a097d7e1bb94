/*
 * tiny_model.h - tiny random models of every block kind for tests, each with an
 * independent forward pass in double.
 *
 * The doubles are exactly the values of the file format, so that a difference
 * between engine and reference is the engine's rounding or its error. Tests may
 * change the doubles (finite differences); the model's own weights stay.
 */
#ifndef TINY_MODEL_H
#define TINY_MODEL_H

#include "kne_graph.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Which biases a model has. */
enum { TINY_QKV = 1, TINY_O = 2, TINY_UP = 4, TINY_DOWN = 8, TINY_FFN = 12, TINY_HEAD = 16 };

typedef struct tiny_spec
{
    const char *name;
    kne_arch    a;
    kne_dtype   type;
    int         bias;
} tiny_spec;

typedef struct tiny_layer
{
    double *n1w, *n1b, *n2w, *n2b, *qn, *kn;
    double *q, *k, *v, *o, *gate, *up, *down;       /* (out, in) each */
    double *qb, *kb, *vb, *ob, *gateb, *upb, *downb; /* NULL: none */
} tiny_layer;

typedef struct tiny_model
{
    kne_model  m;
    tiny_layer layer[8];
    double    *embed, *pos, *head, *headb, *fnw, *fnb;
    char      *pool;
    size_t     used;
    uint64_t   seed;
} tiny_model;

#define TINY_POOL (8u << 20)

static const tiny_spec tiny_specs[] = {
    {"llama",
     {.n_layers = 3, .d_model = 24, .n_heads = 4, .n_kv_heads = 2, .head_dim = 6, .d_ff = 37,
      .vocab_size = 61, .n_ctx = 24, .norm = KNE_RMSNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_ROPE_HALF, .rotary_dim = 6, .act = KNE_ACT_SILU, .gated = true,
      .qkv = KNE_QKV_SEPARATE, .tied_head = true},
     KNE_F32, 0},
    {"qwen2",
     {.n_layers = 3, .d_model = 20, .n_heads = 5, .n_kv_heads = 1, .head_dim = 4, .d_ff = 33,
      .vocab_size = 47, .n_ctx = 24, .norm = KNE_RMSNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_ROPE_HALF, .rotary_dim = 4, .act = KNE_ACT_SILU, .gated = true,
      .qkv = KNE_QKV_SEPARATE},
     KNE_BF16, TINY_QKV},
    {"qwen3",
     {.n_layers = 2, .d_model = 20, .n_heads = 4, .n_kv_heads = 2, .head_dim = 8, .d_ff = 35,
      .vocab_size = 53, .n_ctx = 24, .norm = KNE_RMSNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_ROPE_HALF, .rotary_dim = 8, .act = KNE_ACT_SILU, .gated = true,
      .qkv = KNE_QKV_SEPARATE, .qk_norm = true, .tied_head = true},
     KNE_F32, 0},
    {"gpt2",
     {.n_layers = 3, .d_model = 21, .n_heads = 3, .n_kv_heads = 3, .head_dim = 7, .d_ff = 50,
      .vocab_size = 59, .n_ctx = 24, .norm = KNE_LAYERNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_LEARNED, .act = KNE_ACT_GELU_TANH, .conv1d = true,
      .qkv = KNE_QKV_THIRDS, .tied_head = true},
     KNE_F32, TINY_QKV | TINY_O | TINY_FFN},
    {"gpt-j",
     {.n_layers = 3, .d_model = 24, .n_heads = 4, .n_kv_heads = 4, .head_dim = 6, .d_ff = 41,
      .vocab_size = 64, .n_ctx = 24, .norm = KNE_LAYERNORM,
      .block = KNE_BLOCK_PARALLEL_ONE_NORM, .position = KNE_POS_ROPE_INTERLEAVED,
      .rotary_dim = 4, .act = KNE_ACT_GELU_TANH, .qkv = KNE_QKV_SEPARATE},
     KNE_F16, TINY_FFN | TINY_HEAD},
    {"gpt-neox",
     {.n_layers = 3, .d_model = 24, .n_heads = 4, .n_kv_heads = 4, .head_dim = 6, .d_ff = 39,
      .vocab_size = 50, .n_ctx = 24, .norm = KNE_LAYERNORM,
      .block = KNE_BLOCK_PARALLEL_TWO_NORMS, .position = KNE_POS_ROPE_HALF, .rotary_dim = 2,
      .act = KNE_ACT_GELU_ERF, .qkv = KNE_QKV_PER_HEAD},
     KNE_BF16, TINY_QKV | TINY_O | TINY_FFN},
    {"gpt-neox, sequential",
     {.n_layers = 2, .d_model = 18, .n_heads = 3, .n_kv_heads = 3, .head_dim = 6, .d_ff = 29,
      .vocab_size = 43, .n_ctx = 24, .norm = KNE_LAYERNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_ROPE_HALF, .rotary_dim = 4, .act = KNE_ACT_GELU_ERF,
      .qkv = KNE_QKV_PER_HEAD},
     KNE_F32, TINY_QKV | TINY_O | TINY_FFN},
    {"fused thirds, grouped",
     {.n_layers = 3, .d_model = 22, .n_heads = 4, .n_kv_heads = 2, .head_dim = 6, .d_ff = 31,
      .vocab_size = 57, .n_ctx = 24, .norm = KNE_RMSNORM, .block = KNE_BLOCK_SEQUENTIAL,
      .position = KNE_POS_ROPE_HALF, .rotary_dim = 6, .act = KNE_ACT_SILU, .gated = true,
      .qkv = KNE_QKV_THIRDS},
     KNE_BF16, 0},
    {"gated with every bias",
     {.n_layers = 3, .d_model = 20, .n_heads = 2, .n_kv_heads = 2, .head_dim = 10, .d_ff = 27,
      .vocab_size = 45, .n_ctx = 24, .norm = KNE_RMSNORM,
      .block = KNE_BLOCK_PARALLEL_TWO_NORMS, .position = KNE_POS_ROPE_INTERLEAVED,
      .rotary_dim = 8, .act = KNE_ACT_GELU_TANH, .gated = true, .qkv = KNE_QKV_SEPARATE},
     KNE_F32, TINY_QKV | TINY_O | TINY_FFN | TINY_HEAD},
};
enum { TINY_N_SPEC = sizeof tiny_specs / sizeof *tiny_specs };

static double
tiny_uniform(uint64_t *seed) /* (-1, 1) */
{
    return (double) (int64_t) kne_random_next(seed) * 0x1p-63;
}

static void *
tiny_take(tiny_model *t, size_t bytes)
{
    void *p = t->pool + t->used;

    t->used += (bytes + 15) & ~(size_t) 15;
    return t->used <= TINY_POOL ? p : NULL;
}

static double *
tiny_random(tiny_model *t, int64_t n, double around, double scale, kne_dtype type)
{
    double *w = tiny_take(t, (size_t) n * sizeof *w);

    for (int64_t i = 0; i < n; i++)
        w[i] = kne_round_to((float) (around + scale * tiny_uniform(&t->seed)), type);
    return w;
}

/* A vector's engine form: float. */
static const float *
tiny_vec(tiny_model *t, const double *w, int64_t n)
{
    float *v;

    if (!w)
        return NULL;
    v = tiny_take(t, (size_t) n * sizeof *v);
    for (int64_t i = 0; i < n; i++)
        v[i] = (float) w[i];
    return v;
}

/* Several [out_i, in] matrices as one tensor at an odd address; mat[i] is its view i. */
static void
tiny_store(tiny_model *t, kne_mat *const *mat, double *const *w, const int64_t *out, int n_mat,
           int64_t in, kne_dtype type, bool transposed)
{
    int64_t total = 0, at = 0, size = (int64_t) kne_dtype_size(type);

    for (int i = 0; i < n_mat; i++)
        total += out[i];
    char *data = (char *) tiny_take(t, (size_t) (total * in * size) + 1) + 1;

    for (int i = 0; i < n_mat; at += out[i++])
    {
        for (int64_t r = 0; r < out[i]; r++)
            for (int64_t c = 0; c < in; c++)
            {
                float    f = (float) w[i][r * in + c];
                uint16_t h = type == KNE_BF16 ? kne_f32_to_bf16(f) : kne_f32_to_f16(f);
                int64_t  e = transposed ? c * total + at + r : (at + r) * in + c;

                memcpy(data + e * size, type == KNE_F32 ? (void *) &f : (void *) &h, (size_t) size);
            }
        *mat[i] = (kne_mat) {
            .data = data + (transposed ? at : at * in) * size,
            .type = type, .transposed = transposed,
            .rows = transposed ? in : out[i], .cols = transposed ? out[i] : in,
            .ld = transposed ? total : in,
        };
    }
}

static void
tiny_store1(tiny_model *t, kne_mat *mat, double *w, int64_t out, int64_t in, kne_dtype type,
            bool transposed)
{
    tiny_store(t, &mat, &w, &out, 1, in, type, transposed);
}

static void
tiny_init_layer(tiny_model *t, const tiny_spec *spec, tiny_layer *r, kne_layer *y)
{
    const kne_arch *a = &t->m.arch;
    int64_t         d = a->d_model, f = a->d_ff, hd = a->head_dim;
    int64_t         nq = a->n_heads * hd, nkv = a->n_kv_heads * hd;
    kne_dtype       type = spec->type;
    bool            ln = a->norm == KNE_LAYERNORM, one = a->block == KNE_BLOCK_PARALLEL_ONE_NORM;
    double          sd = 1.7 / sqrt((double) d), sf = 1.7 / sqrt((double) f);

#define TINY_BIAS(mask, n) (spec->bias & (mask) ? tiny_random(t, n, 0, 0.3, KNE_F32) : NULL)
    *r = (tiny_layer) {
        .n1w = tiny_random(t, d, 1, 0.4, KNE_F32),
        .n1b = ln ? tiny_random(t, d, 0, 0.3, KNE_F32) : NULL,
        .n2w = one ? NULL : tiny_random(t, d, 1, 0.4, KNE_F32),
        .n2b = ln && !one ? tiny_random(t, d, 0, 0.3, KNE_F32) : NULL,
        .qn = a->qk_norm ? tiny_random(t, hd, 1, 0.4, KNE_F32) : NULL,
        .kn = a->qk_norm ? tiny_random(t, hd, 1, 0.4, KNE_F32) : NULL,
        .q = tiny_random(t, nq * d, 0, 2 * sd, type), .k = tiny_random(t, nkv * d, 0, 2 * sd, type),
        .v = tiny_random(t, nkv * d, 0, sd, type), .o = tiny_random(t, d * nq, 0, sd, type),
        .gate = a->gated ? tiny_random(t, f * d, 0, 2 * sd, type) : NULL,
        .up = tiny_random(t, f * d, 0, sd, type), .down = tiny_random(t, d * f, 0, 2 * sf, type),
        .qb = TINY_BIAS(TINY_QKV, nq), .kb = TINY_BIAS(TINY_QKV, nkv),
        .vb = TINY_BIAS(TINY_QKV, nkv),
        .ob = TINY_BIAS(TINY_O, d), .gateb = a->gated ? TINY_BIAS(TINY_UP, f) : NULL,
        .upb = TINY_BIAS(TINY_UP, f), .downb = TINY_BIAS(TINY_DOWN, d),
    };
    y->norm1_w = tiny_vec(t, r->n1w, d);
    y->norm1_b = tiny_vec(t, r->n1b, d);
    y->norm2_w = tiny_vec(t, r->n2w, d);
    y->norm2_b = tiny_vec(t, r->n2b, d);
    y->q_norm = tiny_vec(t, r->qn, hd);
    y->k_norm = tiny_vec(t, r->kn, hd);
    y->q_b = tiny_vec(t, r->qb, nq);
    y->k_b = tiny_vec(t, r->kb, nkv);
    y->v_b = tiny_vec(t, r->vb, nkv);
    y->o_b = tiny_vec(t, r->ob, d);
    y->gate_b = tiny_vec(t, r->gateb, f);
    y->up_b = tiny_vec(t, r->upb, f);
    y->down_b = tiny_vec(t, r->downb, d);
    tiny_store1(t, &y->o, r->o, d, nq, type, a->conv1d);
    tiny_store1(t, &y->down, r->down, d, f, type, a->conv1d);

    if (a->qkv == KNE_QKV_PER_HEAD)
    {
        double *fused = tiny_take(t, (size_t) (3 * nq * d) * sizeof *fused);
        double *bias = r->qb ? tiny_take(t, (size_t) (3 * nq) * sizeof *bias) : NULL;
        double *part[3] = {r->q, r->k, r->v}, *part_b[3] = {r->qb, r->kb, r->vb};

        for (int64_t i = 0; i < nq; i++)
            for (int p = 0; p < 3; p++)
            {
                int64_t at = (i / hd * 3 + p) * hd + i % hd;

                memcpy(fused + at * d, part[p] + i * d, (size_t) d * sizeof *fused);
                if (bias)
                    bias[at] = part_b[p][i];
            }
        tiny_store1(t, &y->q, fused, 3 * nq, d, type, false);
        y->q_b = tiny_vec(t, bias, 3 * nq);
        y->k_b = y->v_b = NULL;
    }
    else if (a->qkv == KNE_QKV_THIRDS)
        tiny_store(t, (kne_mat *[]) {&y->q, &y->k, &y->v}, (double *[]) {r->q, r->k, r->v},
                   (int64_t[]) {nq, nkv, nkv}, 3, d, type, a->conv1d);
    else
    {
        tiny_store1(t, &y->q, r->q, nq, d, type, false);
        tiny_store1(t, &y->k, r->k, nkv, d, type, false);
        tiny_store1(t, &y->v, r->v, nkv, d, type, false);
    }
    if (a->gated && a->qkv == KNE_QKV_THIRDS) /* such a family fuses these, too */
        tiny_store(t, (kne_mat *[]) {&y->gate, &y->up}, (double *[]) {r->gate, r->up},
                   (int64_t[]) {f, f}, 2, d, type, false);
    else
    {
        if (a->gated)
            tiny_store1(t, &y->gate, r->gate, f, d, type, false);
        tiny_store1(t, &y->up, r->up, f, d, type, a->conv1d);
    }
}

static tiny_model *
tiny_new(const tiny_spec *spec, uint64_t seed)
{
    tiny_model *t = calloc(1, sizeof *t);
    kne_arch   *a = &t->m.arch;
    bool        ln = spec->a.norm == KNE_LAYERNORM;
    int64_t     d = spec->a.d_model, vocab = spec->a.vocab_size;

    t->pool = calloc(1, TINY_POOL);
    t->seed = seed;
    *a = spec->a;
    strcpy(a->family, "tiny");
    a->norm_eps = 1e-5f;
    a->rope_theta = 100;
    a->bos_id = a->eos_id = -1;
    t->m.dtype = spec->type;
    t->m.layer = tiny_take(t, (size_t) a->n_layers * sizeof *t->m.layer);
    for (int32_t l = 0; l < a->n_layers; l++)
        tiny_init_layer(t, spec, &t->layer[l], &t->m.layer[l]);

    t->embed = tiny_random(t, vocab * d, 0, 1, spec->type);
    t->head = t->embed;
    if (!a->tied_head)
        t->head = tiny_random(t, vocab * d, 0, 2 / sqrt((double) d), spec->type);
    t->headb = TINY_BIAS(TINY_HEAD, vocab);
    t->fnw = tiny_random(t, d, 1, 0.4, KNE_F32);
    t->fnb = ln ? tiny_random(t, d, 0, 0.3, KNE_F32) : NULL;
    tiny_store1(t, &t->m.embed, t->embed, vocab, d, spec->type, false);
    t->m.head = t->m.embed;
    if (!a->tied_head)
        tiny_store1(t, &t->m.head, t->head, vocab, d, spec->type, false);
    t->m.head_b = tiny_vec(t, t->headb, vocab);
    t->m.final_norm_w = tiny_vec(t, t->fnw, d);
    t->m.final_norm_b = tiny_vec(t, t->fnb, d);
    if (a->position == KNE_POS_LEARNED)
    {
        t->pos = tiny_random(t, a->n_ctx * d, 0, 0.5, spec->type);
        tiny_store1(t, &t->m.pos_embed, t->pos, a->n_ctx, d, spec->type, false);
    }
    else
    {
        int32_t half = a->rotary_dim / 2;
        float  *co = tiny_take(t, (size_t) (a->n_ctx * half) * sizeof *co);
        float  *si = tiny_take(t, (size_t) (a->n_ctx * half) * sizeof *si);

        for (int32_t p = 0; p < a->n_ctx; p++)
            for (int32_t i = 0; i < half; i++)
            {
                co[p * half + i] = (float) cos(p * pow(a->rope_theta, -2.0 * i / a->rotary_dim));
                si[p * half + i] = (float) sin(p * pow(a->rope_theta, -2.0 * i / a->rotary_dim));
            }
        t->m.rope_cos = co;
        t->m.rope_sin = si;
    }
#undef TINY_BIAS
    return t;
}

static void
tiny_free(tiny_model *t)
{
    free(t->pool);
    free(t);
}

/* ---- the reference: plain loops in double, one sequence at a time ---- */

static void
ref_norm(double *y, const double *x, const double *w, const double *b, bool rms, double eps, int d)
{
    double mean = 0, var = 0;

    for (int i = 0; i < d && !rms; i++)
        mean += x[i] / d;
    for (int i = 0; i < d; i++)
        var += (x[i] - mean) * (x[i] - mean) / d;
    for (int i = 0; i < d; i++)
        y[i] = (x[i] - mean) / sqrt(var + eps) * w[i] + (b ? b[i] : 0);
}

static void
ref_linear(double *y, const double *x, const double *w, const double *b, int out, int in)
{
    for (int o = 0; o < out; o++)
    {
        y[o] = b ? b[o] : 0;
        for (int i = 0; i < in; i++)
            y[o] += w[o * in + i] * x[i];
    }
}

static void
ref_rope(const kne_model *m, double *x, int pos)
{
    int half = m->arch.rotary_dim / 2;

    if (m->arch.position == KNE_POS_LEARNED)
        return;
    for (int i = 0; i < half; i++)
    {
        bool    inter = m->arch.position == KNE_POS_ROPE_INTERLEAVED;
        double *p = inter ? x + 2 * i : x + i, *q = inter ? x + 2 * i + 1 : x + half + i;
        double  c = m->rope_cos[pos * half + i], s = m->rope_sin[pos * half + i];
        double  a = *p * c - *q * s, b = *q * c + *p * s;

        *p = a;
        *q = b;
    }
}

static double
ref_act(double x, kne_act_kind kind)
{
    if (kind == KNE_ACT_SILU)
        return x / (1 + exp(-x));
    if (kind == KNE_ACT_GELU_ERF)
        return 0.5 * x * (1 + erf(x * M_SQRT1_2));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

/* One row through q, k, v, their norms and RoPE. */
static void
ref_qkv(const tiny_model *t, const tiny_layer *r, double *q, double *k, double *v, const double *h,
        int pos)
{
    const kne_arch *a = &t->m.arch;
    int             d = a->d_model, hd = a->head_dim;

    ref_linear(q, h, r->q, r->qb, a->n_heads * hd, d);
    ref_linear(k, h, r->k, r->kb, a->n_kv_heads * hd, d);
    ref_linear(v, h, r->v, r->vb, a->n_kv_heads * hd, d);
    for (int i = 0; i < a->n_heads + a->n_kv_heads; i++)
    {
        bool    is_q = i < a->n_heads;
        double *x = is_q ? q + i * hd : k + (i - a->n_heads) * hd;

        if (a->qk_norm)
            ref_norm(x, x, is_q ? r->qn : r->kn, NULL, true, a->norm_eps, hd);
        ref_rope(&t->m, x, pos);
    }
}

static void
ref_ffn(const tiny_model *t, const tiny_layer *r, double *y, const double *h, double alpha)
{
    const kne_arch *a = &t->m.arch;
    int             d = a->d_model, f = a->d_ff;
    double          gate[64], up[64];

    ref_linear(up, h, r->up, r->upb, f, d);
    if (a->gated)
        ref_linear(gate, h, r->gate, r->gateb, f, d);
    for (int i = 0; i < f; i++)
        up[i] = a->gated ? ref_act(gate[i], a->act) * up[i] : ref_act(up[i], a->act);
    ref_linear(y, up, r->down, NULL, d, f);
    for (int i = 0; i < d; i++)
        y[i] = alpha * y[i] + (r->downb ? r->downb[i] : 0);
}

/* logits (n, V) of one sequence; alpha: NULL, or as kne_forward's with this sequence's rows. */
static __attribute__((unused)) void
ref_forward(const tiny_model *t, double *logits, const int32_t *id, int n,
            const float *const *alpha)
{
    const kne_arch *a = &t->m.arch;
    int             d = a->d_model, hd = a->head_dim, nq = a->n_heads * hd;
    bool            rms = a->norm == KNE_RMSNORM;
    double          x[32][32], h1[32][32], h2[32][32], q[32][32], k[32][32], v[32][32];
    double          att[32], y[32];

    for (int i = 0; i < n; i++)
        for (int c = 0; c < d; c++)
            x[i][c] = t->embed[id[i] * d + c] + (t->pos ? t->pos[i * d + c] : 0);
    for (int l = 0; l < a->n_layers; l++)
    {
        const tiny_layer *r = &t->layer[l];

        for (int i = 0; i < n; i++)
        {
            ref_norm(h1[i], x[i], r->n1w, r->n1b, rms, a->norm_eps, d);
            if (a->block == KNE_BLOCK_PARALLEL_TWO_NORMS)
                ref_norm(h2[i], x[i], r->n2w, r->n2b, rms, a->norm_eps, d);
            if (a->block == KNE_BLOCK_PARALLEL_ONE_NORM)
                memcpy(h2[i], h1[i], sizeof h1[i]);
            ref_qkv(t, r, q[i], k[i], v[i], h1[i], i);
        }
        for (int i = 0; i < n; i++)
        {
            memset(att, 0, sizeof att);
            for (int h = 0; h < a->n_heads; h++)
            {
                int    at = h / (a->n_heads / a->n_kv_heads) * hd;
                double s[32], sum = 0;

                for (int j = 0; j <= i; j++)
                {
                    s[j] = 0;
                    for (int c = 0; c < hd; c++)
                        s[j] += q[i][h * hd + c] * k[j][at + c];
                    sum += s[j] = exp(s[j] / sqrt((double) hd));
                }
                for (int j = 0; j <= i; j++)
                    for (int c = 0; c < hd; c++)
                        att[h * hd + c] += s[j] / sum * v[j][at + c];
            }
            ref_linear(y, att, r->o, r->ob, d, nq);
            for (int c = 0; c < d; c++)
                x[i][c] += y[c];
            if (a->block == KNE_BLOCK_SEQUENTIAL)
                ref_norm(h2[i], x[i], r->n2w, r->n2b, rms, a->norm_eps, d);
            ref_ffn(t, r, y, h2[i], alpha && alpha[l] ? alpha[l][i] : 1);
            for (int c = 0; c < d; c++)
                x[i][c] += y[c];
        }
    }
    for (int i = 0; i < n; i++)
    {
        ref_norm(y, x[i], t->fnw, t->fnb, rms, a->norm_eps, d);
        ref_linear(logits + i * a->vocab_size, y, t->head, t->headb, a->vocab_size, d);
    }
}

#endif
