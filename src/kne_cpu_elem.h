/*
 * kne_cpu_elem.h - activations, embeddings, sums and gathers (part of
 * kne_cpu_ops_impl.h). Each element is computed from its own inputs only.
 */

/* *y = act(x), *dy = act'(x). */
INLINE void
act_value(vr x, const kne_act_kind kind, vr *y, vr *dy)
{
    const kne_real half = (kne_real) 0.5, one = 1;

    if (kind == KNE_ACT_SILU)
    {
        vr s = one / (one + vr_exp(-x));

        *y = x * s;
        *dy = s + *y * (one - s);
    }
    else if (kind == KNE_ACT_GELU_TANH)
    {
        /* 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
        const kne_real c = (kne_real) 0.79788456080286535588, b = (kne_real) 0.044715;
        vr             s = one / (one + vr_exp((x + x * x * x * b) * (-2 * c)));

        *y = x * s;
        *dy = s + *y * (one - s) * ((one + x * x * (3 * b)) * (2 * c));
    }
    else
    {
        const kne_real r = (kne_real) 0.70710678118654752440, c = (kne_real) 0.39894228040143267794;
        vr             s = vr_erf(x * r) * half + half;

        *y = x * s;
        *dy = s + x * vr_exp(x * x * -half) * c;
    }
}

OP_ARGS(act, kne_real *a; const kne_real *g; const kne_real *u; kne_act_kind kind; int64_t f;)

INLINE void
act_kind_rows(const act_args *a, const kne_act_kind kind, int64_t r0, int64_t r1)
{
    for (int64_t r = r0; r < r1; r++)
        FOR_VECTORS(i, a->f)
        {
            int64_t at = r * a->f + i;
            vr      y, dy, u = LOAD(a->u + at, 0);

            act_value(a->g ? LOAD(a->g + at, 0) : u, kind, &y, &dy);
            STORE(a->a + at, a->g ? y * u : y);
        }
}

static void
act_rows(const act_args *a, int64_t r0, int64_t r1, char *scratch)
{
    if (a->kind == KNE_ACT_SILU)
        act_kind_rows(a, KNE_ACT_SILU, r0, r1);
    else if (a->kind == KNE_ACT_GELU_TANH)
        act_kind_rows(a, KNE_ACT_GELU_TANH, r0, r1);
    else
        act_kind_rows(a, KNE_ACT_GELU_ERF, r0, r1);
}
OP_TASK(act)

static void
act(void *ctx, kne_real *a, const kne_real *g, const kne_real *u, kne_act_kind kind, int64_t n,
    int64_t f)
{
    SPLIT(act, n, 5 + 0.6 * (double) f, 1, a, g, u, kind, f);
}

OP_ARGS(act_bwd, kne_real *dg; kne_real *du; const kne_real *da; const kne_real *g;
        const kne_real *u; kne_act_kind kind; int64_t f;)

INLINE void
act_bwd_kind_rows(const act_bwd_args *a, const kne_act_kind kind, int64_t r0, int64_t r1)
{
    for (int64_t r = r0; r < r1; r++)
        FOR_VECTORS(i, a->f)
        {
            int64_t at = r * a->f + i;
            vr      y, dy, u = LOAD(a->u + at, 0), da = LOAD(a->da + at, 0);

            act_value(a->g ? LOAD(a->g + at, 0) : u, kind, &y, &dy);
            if (a->g)
            {
                STORE(a->dg + at, da * u * dy);
                STORE(a->du + at, da * y);
            }
            else
                STORE(a->du + at, da * dy);
        }
}

static void
act_bwd_rows(const act_bwd_args *a, int64_t r0, int64_t r1, char *scratch)
{
    if (a->kind == KNE_ACT_SILU)
        act_bwd_kind_rows(a, KNE_ACT_SILU, r0, r1);
    else if (a->kind == KNE_ACT_GELU_TANH)
        act_bwd_kind_rows(a, KNE_ACT_GELU_TANH, r0, r1);
    else
        act_bwd_kind_rows(a, KNE_ACT_GELU_ERF, r0, r1);
}
OP_TASK(act_bwd)

static void
act_bwd(void *ctx, kne_real *dg, kne_real *du, const kne_real *da, const kne_real *g,
        const kne_real *u, kne_act_kind kind, int64_t n, int64_t f)
{
    SPLIT(act_bwd, n, 5 + 0.9 * (double) f, 1, dg, du, da, g, u, kind, f);
}

/* ---- element-wise ---- */

OP_ARGS(add, kne_real *y; const kne_real *x;)

static void
add_rows(const add_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t i = r0; i < r1; i++)
        a->y[i] += a->x[i];
}
OP_TASK(add)

static void
add(void *ctx, kne_real *y, const kne_real *x, int64_t n_elem)
{
    SPLIT(add, n_elem, 0.15, 64, y, x);
}

OP_ARGS(scale, kne_real *y; const kne_real *s; int64_t d;)

static void
scale_rows_(const scale_args *a, int64_t r0, int64_t r1)
{
    for (int64_t r = r0; r < r1; r++)
    {
        kne_real *y = a->y + r * a->d, s = a->s[r];

        for (int64_t i = 0; i < a->d; i++)
            y[i] *= s;
    }
}

static void
scale_task(void *arg, int64_t task, int thread)
{
    const scale_args *a = arg;
    int64_t           r0 = task * a->rows, r1 = r0 + a->rows < a->total ? r0 + a->rows : a->total;

    scale_rows_(a, r0, r1);
}

static void
scale_rows(void *ctx, kne_real *y, const kne_real *s, int64_t n, int64_t d)
{
    SPLIT(scale, n, 2 + 0.1 * (double) d, 1, y, s, d);
}

/* ---- embeddings ---- */

OP_ARGS(embed, kne_real *x; const kne_mat *tok; const kne_mat *pos_table; const int32_t *id;
        const int32_t *pos;)

INLINE kne_real
mat_at(const kne_mat *w, int64_t row, int64_t col)
{
    return (kne_real) kne_load(w->data, w->type, (size_t) (row * w->ld + col));
}

/* out[i] = row of w, as float */
INLINE void
mat_row(kne_real *out, const kne_mat *w, int64_t row)
{
    const char *p = (const char *) w->data + (size_t) (row * w->ld) * kne_dtype_size(w->type);

    if (w->type == KNE_BF16)
        for (int64_t i = 0; i < w->cols; i++)
        {
            uint16_t h;

            memcpy(&h, p + 2 * i, 2);
            out[i] = (kne_real) kne_bf16_to_f32(h);
        }
    else
        for (int64_t i = 0; i < w->cols; i++)
            out[i] = (kne_real) kne_load(p, w->type, (size_t) i);
}

static void
embed_rows(const embed_args *a, int64_t r0, int64_t r1, char *scratch)
{
    int64_t d = a->tok->cols;

    for (int64_t r = r0; r < r1; r++)
    {
        kne_real *x = a->x + r * d;

        mat_row(x, a->tok, a->id[r]);
        if (a->pos_table && a->pos_table->data)
            for (int64_t i = 0; i < d; i++)
                x[i] += mat_at(a->pos_table, a->pos[r], i);
    }
}
OP_TASK(embed)

static void
embed(void *ctx, kne_real *x, const kne_mat *tok, const kne_mat *pos_table, const int32_t *id,
      const int32_t *pos, int64_t n)
{
    SPLIT(embed, n, 50 + 0.2 * (double) tok->cols, 1, x, tok, pos_table, id, pos);
}

/* ---- ensembles ---- */

OP_ARGS(gather, kne_real *y; const kne_real *x; int64_t ldx; const int32_t *col; int64_t n_col;)

static void
gather_rows(const gather_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
        for (int64_t i = 0; i < a->n_col; i++)
            a->y[r * a->n_col + i] = a->x[r * a->ldx + a->col[i]];
}
OP_TASK(gather)

static void
gather_cols(void *ctx, kne_real *y, const kne_real *x, int64_t ldx, const int32_t *col, int64_t n,
            int64_t n_col)
{
    SPLIT(gather, n, 2 + 1.0 * (double) n_col, 1, y, x, ldx, col, n_col);
}

OP_ARGS(scatter, kne_real *x; int64_t ldx; const kne_real *y; const int32_t *col; int64_t n_col;
        bool add;)

static void
scatter_rows(const scatter_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        kne_real       *x = a->x + r * a->ldx;
        const kne_real *y = a->y + r * a->n_col;

        if (a->add)
            for (int64_t i = 0; i < a->n_col; i++)
                x[a->col[i]] += y[i];
        else
            for (int64_t i = 0; i < a->n_col; i++)
                x[a->col[i]] = y[i];
    }
}
OP_TASK(scatter)

static void
scatter_cols(void *ctx, kne_real *x, int64_t ldx, const kne_real *y, const int32_t *col, int64_t n,
             int64_t n_col, bool add_to)
{
    SPLIT(scatter, n, 2 + 1.0 * (double) n_col, 1, x, ldx, y, col, n_col, add_to);
}

OP_ARGS(pick, kne_real *y; const kne_real *x; const int32_t *row; int64_t d;)

static void
pick_rows(const pick_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
        memcpy(a->y + r * a->d, a->x + a->row[r] * a->d, (size_t) a->d * sizeof(kne_real));
}
OP_TASK(pick)

static void
pick(void *ctx, kne_real *y, const kne_real *x, const int32_t *row, int64_t n_row, int64_t d)
{
    SPLIT(pick, n_row, 2 + 0.1 * (double) d, 1, y, x, row, d);
}

OP_ARGS(spread, kne_real *x; const kne_real *y; const int32_t *row; int64_t d;)

static void
spread_rows(const spread_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
        for (int64_t i = 0; i < a->d; i++)
            a->x[a->row[r] * a->d + i] += a->y[r * a->d + i];
}
OP_TASK(spread)

static void
spread(void *ctx, kne_real *x, const kne_real *y, const int32_t *row, int64_t n_row, int64_t d)
{
    SPLIT(spread, n_row, 2 + 0.15 * (double) d, 1, x, y, row, d);
}

OP_ARGS(fold, kne_real *y; const kne_real *x; const int32_t *from; const int32_t *place; int64_t d;)

static void
fold_rows(const fold_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        kne_real *y = a->y + r * a->d;

        memcpy(y, a->x + a->place[a->from[r]] * a->d, (size_t) a->d * sizeof(kne_real));
        for (int32_t j = a->from[r] + 1; j < a->from[r + 1]; j++)
            for (int64_t i = 0; i < a->d; i++)
                y[i] += a->x[a->place[j] * a->d + i];
    }
}
OP_TASK(fold)

static void
fold(void *ctx, kne_real *y, const kne_real *x, const int32_t *from, const int32_t *place, int64_t n, int64_t d)
{
    SPLIT(fold, n, 2 + 0.2 * (double) d, 1, y, x, from, place, d);
}

OP_ARGS(score, kne_real *score; const kne_real *a; const kne_real *u; const kne_real *coef;
        int64_t n; int64_t f;)

/* "Rows" are columns here: a column's sum over the batch has one owner, and runs from row 0. */
static void
score_rows(const score_args *a, int64_t c0, int64_t c1, char *scratch)
{
    for (int64_t c = c0; c < c1; c += 64)
    {
        kne_real acc[64] = {0};
        int64_t  nc = c1 - c < 64 ? c1 - c : 64;

        for (int64_t r = 0; r < a->n; r++)
        {
            const kne_real *x = a->a + r * a->f + c, *u = a->u + r * a->f + c;
            kne_real        k = a->coef[r];

            for (int64_t i = 0; i < nc; i++)
                acc[i] += k * x[i] * u[i];
        }
        for (int64_t i = 0; i < nc; i++)
            a->score[c + i] += acc[i];
    }
}
OP_TASK(score)

static void
score(void *ctx, kne_real *score_out, const kne_real *a, const kne_real *u, const kne_real *coef,
      int64_t n, int64_t f)
{
    SPLIT(score, f, 0.2 * (double) n, 64, score_out, a, u, coef, n, f);
}

OP_ARGS(neurons, kne_real *out; const kne_mat *w; const int32_t *idx; bool by_col;)

static void
neurons_rows(const neurons_args *a, int64_t r0, int64_t r1, char *scratch)
{
    const kne_mat *w = a->w;

    for (int64_t r = r0; r < r1; r++)
        if (!a->by_col)
            mat_row(a->out + r * w->cols, w, a->idx[r]);
        else
            for (int64_t i = 0; i < w->rows; i++)
                a->out[r * w->rows + i] = mat_at(w, i, a->idx[r]);
}
OP_TASK(neurons)

static void
gather_neurons(void *ctx, kne_real *out, const kne_mat *w, bool by_col, const int32_t *idx,
               int64_t n_idx)
{
    SPLIT(neurons, n_idx, 5 + (by_col ? 3.0 * (double) w->rows : 0.2 * (double) w->cols), 1, out, w,
          idx, by_col);
}
