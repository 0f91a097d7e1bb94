/*
 * elem.cu - activations, sums, embeddings, gathers and scatters, attribution scores: a thread an element,
 * striding over what is left.
 */
#include "kne_cuda.h"

/* *y = act(x), *dy = act'(x) */
static __device__ __forceinline__ void
act_value(float x, kne_act_kind kind, float *y, float *dy)
{
    if (kind == KNE_ACT_SILU)
    {
        const float s = 1.0f / (1.0f + expf(-x));

        *y = x * s;
        *dy = s + *y * (1.0f - s);
    }
    else if (kind == KNE_ACT_GELU_TANH)
    {
        /* 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
        const float c = 0.797884560802865f, b = 0.044715f;
        const float s = 1.0f / (1.0f + expf(-2.0f * c * (x + b * x * x * x)));

        *y = x * s;
        *dy = s + *y * (1.0f - s) * (2.0f * c * (1.0f + 3.0f * b * x * x));
    }
    else
    {
        const float s = 0.5f + 0.5f * erff(x * 0.707106781186547f);

        *y = x * s;
        *dy = s + x * expf(-0.5f * x * x) * 0.398942280401433f;
    }
}

/* a = act(g) u, or act(u) where g is NULL; n elements */
static __global__ void
act_kernel(float *a, const float *g, const float *u, kne_act_kind kind, int64_t n)
{
    KNE_STRIDE(i, n)
    {
        float y, dy;

        act_value(g ? g[i] : u[i], kind, &y, &dy);
        a[i] = g ? y * u[i] : y;
    }
}

static __global__ void
act_bwd_kernel(float *dg, float *du, const float *da, const float *g, const float *u, kne_act_kind kind, int64_t n)
{
    KNE_STRIDE(i, n)
    {
        float y, dy;

        act_value(g ? g[i] : u[i], kind, &y, &dy);
        if (g)
            dg[i] = da[i] * u[i] * dy;
        du[i] = da[i] * (g ? y : dy);
    }
}

static __global__ void
add_kernel(float *y, const float *x, int64_t n)
{
    KNE_STRIDE(i, n)
        y[i] += x[i];
}

static __global__ void
scale_rows_kernel(float *y, const float *s, int64_t n, int64_t d)
{
    KNE_STRIDE(i, n * d)
        y[i] *= s[i / d];
}

/* x[n, d] = tok[id, :] (+ pos_table[pos, :]) */
static __global__ void
embed_kernel(float *x, kne_mat tok, kne_mat pos_table, const int32_t *id, const int32_t *pos, int64_t n)
{
    const int64_t d = tok.cols;

    KNE_STRIDE(at, n * d)
    {
        const int64_t r = at / d, i = at % d;
        float         v = kne_dev_load(tok.data, tok.type, id[r] * tok.ld + i);

        if (pos_table.data)
            v += kne_dev_load(pos_table.data, pos_table.type, pos[r] * pos_table.ld + i);
        x[at] = v;
    }
}

/* y[n, n_col] = x[:, col] */
static __global__ void
gather_cols_kernel(float *y, const float *x, int64_t ldx, const int32_t *col, int64_t n, int64_t n_col)
{
    KNE_STRIDE(at, n * n_col)
        y[at] = x[at / n_col * ldx + col[at % n_col]];
}

static __global__ void
scatter_cols_kernel(float *x, int64_t ldx, const float *y, const int32_t *col, int64_t n, int64_t n_col, bool add)
{
    KNE_STRIDE(at, n * n_col)
    {
        float *to = x + at / n_col * ldx + col[at % n_col];

        *to = add ? *to + y[at] : y[at];
    }
}

static __global__ void
gather_rows_kernel(float *y, const float *x, const int32_t *row, int64_t n, int64_t d)
{
    KNE_STRIDE(at, n * d)
        y[at] = x[row[at / d] * d + at % d];
}

static __global__ void
scatter_rows_kernel(float *x, const float *y, const int32_t *row, int64_t n, int64_t d)
{
    KNE_STRIDE(at, n * d)
        x[row[at / d] * d + at % d] += y[at];
}

/* y[n, d]: row r is the sum of wide's rows place[from[r] .. from[r + 1]), in that order */
static __global__ void
fold_rows_kernel(float *y, const float *wide, const int32_t *from, const int32_t *place, int64_t n, int64_t d)
{
    KNE_STRIDE(at, n * d)
    {
        const int64_t r = at / d, i = at % d;
        float         sum = 0;

        for (int32_t p = from[r]; p < from[r + 1]; p++)
            sum += wide[place[p] * d + i];
        y[at] = sum;
    }
}

/* score[c] += sum over r of coef[r] a[r, c] u[r, c]: a thread a column, rows in order */
static __global__ void
score_kernel(float *score, const float *a, const float *u, const float *coef, int64_t n, int64_t f)
{
    KNE_STRIDE(c, f)
    {
        float sum = 0;

        for (int64_t r = 0; r < n; r++)
            sum += coef[r] * a[r * f + c] * u[r * f + c];
        score[c] += sum;
    }
}

/* out[n_idx, len]: rows idx of w, or its columns */
static __global__ void
gather_neurons_kernel(float *out, kne_mat w, bool by_col, const int32_t *idx, int64_t n_idx)
{
    const int64_t len = by_col ? w.rows : w.cols;

    KNE_STRIDE(at, n_idx * len)
    {
        const int64_t k = idx[at / len], i = at % len;

        out[at] = kne_dev_load(w.data, w.type, by_col ? i * w.ld + k : k * w.ld + i);
    }
}

/* One thread an element of n. */
#define ELEMENTS(kernel, n, ...)                                                                    \
    do                                                                                              \
    {                                                                                               \
        if ((n) > 0)                                                                                \
            KNE_LAUNCH((kne_cu *) ctx, kernel, kne_blocks(n, KNE_BLOCK), KNE_BLOCK, 0, __VA_ARGS__); \
    } while (0)

static void
act(void *ctx, float *a, const float *g, const float *u, kne_act_kind kind, int64_t n, int64_t f)
{
    ELEMENTS(act_kernel, n * f, a, g, u, kind, n * f);
}

static void
act_bwd(void *ctx, float *dg, float *du, const float *da, const float *g, const float *u, kne_act_kind kind,
        int64_t n, int64_t f)
{
    ELEMENTS(act_bwd_kernel, n * f, dg, du, da, g, u, kind, n * f);
}

static void
add(void *ctx, float *y, const float *x, int64_t n_elem)
{
    ELEMENTS(add_kernel, n_elem, y, x, n_elem);
}

static void
scale_rows(void *ctx, float *y, const float *s, int64_t n, int64_t d)
{
    ELEMENTS(scale_rows_kernel, n * d, y, s, n, d);
}

static void
embed(void *ctx, float *x, const kne_mat *tok, const kne_mat *pos_table, const int32_t *id, const int32_t *pos,
      int64_t n)
{
    kne_mat none = {};

    ELEMENTS(embed_kernel, n * tok->cols, x, *tok, pos_table ? *pos_table : none, id, pos, n);
}

static void
gather_cols(void *ctx, float *y, const float *x, int64_t ldx, const int32_t *col, int64_t n, int64_t n_col)
{
    ELEMENTS(gather_cols_kernel, n * n_col, y, x, ldx, col, n, n_col);
}

static void
scatter_cols(void *ctx, float *x, int64_t ldx, const float *y, const int32_t *col, int64_t n, int64_t n_col,
             bool add_to)
{
    ELEMENTS(scatter_cols_kernel, n * n_col, x, ldx, y, col, n, n_col, add_to);
}

static void
gather_rows(void *ctx, float *y, const float *x, const int32_t *row, int64_t n_row, int64_t d)
{
    ELEMENTS(gather_rows_kernel, n_row * d, y, x, row, n_row, d);
}

static void
scatter_rows(void *ctx, float *x, const float *y, const int32_t *row, int64_t n_row, int64_t d)
{
    ELEMENTS(scatter_rows_kernel, n_row * d, x, y, row, n_row, d);
}

static void
fold_rows(void *ctx, float *y, const float *wide, const int32_t *from, const int32_t *place, int64_t n, int64_t d)
{
    ELEMENTS(fold_rows_kernel, n * d, y, wide, from, place, n, d);
}

static void
score(void *ctx, float *score_out, const float *a, const float *u, const float *coef, int64_t n, int64_t f)
{
    ELEMENTS(score_kernel, f, score_out, a, u, coef, n, f);
}

static void
gather_neurons(void *ctx, float *out, const kne_mat *w, bool by_col, const int32_t *idx, int64_t n_idx)
{
    ELEMENTS(gather_neurons_kernel, n_idx * (by_col ? w->rows : w->cols), out, *w, by_col, idx, n_idx);
}

void
kne_cu_fill_elem(kne_backend *be)
{
    be->act = act;
    be->act_bwd = act_bwd;
    be->add = add;
    be->scale_rows = scale_rows;
    be->embed = embed;
    be->gather_cols = gather_cols;
    be->scatter_cols = scatter_cols;
    be->gather_rows = gather_rows;
    be->scatter_rows = scatter_rows;
    be->fold_rows = fold_rows;
    be->score = score;
    be->gather_neurons = gather_neurons;
}
