/*
 * kne_cpu_step.c - the CPU's ops of the optimiser: gradients of an ensemble's rows, the metric, the step. Plain loops: all of it
 * together is a few per cent of a pass. What has a metric keeps its Cholesky factor.
 */
#include "kne_cpu.h"
#include "kne_metric.h"

#include <math.h>
#include <string.h>

/* Rows with one range, which are an edit's, as one product. */
static void
grad_rows(void *ctx, float *grad, const kne_grad_row *of, int64_t n_of, const float *left, int64_t f, const float *right,
          int64_t d, float *scratch)
{
    kne_backend *be = &((kne_cpu *) ctx)->be;

    for (int64_t i = 0, j; i < n_of; i = j)
    {
        const int64_t from = of[i].from, rows = of[i].to - from;

        for (j = i + 1; j < n_of && of[j].from == from && of[j].to == of[i].to && of[j].row == of[j - 1].row + 1; j++)
            ;
        for (int64_t t = 0; t < rows; t++)
            for (int64_t c = i; c < j; c++)
                scratch[t * (j - i) + c - i] = left[(from + t) * f + of[c].col];
        be->matmul_tn(ctx, grad + of[i].row * d, d, scratch, j - i, right + from * d, d, j - i, d, rows, 0);
    }
}

static void
compose(void *ctx, float *eff, const float *base, const float *before, const float *delta, const int32_t *from,
        const int32_t *place, int64_t n, int64_t d, kne_dtype type)
{
    for (int64_t r = 0; r < n; r++)
    {
        float *to = eff + r * d;

        memcpy(to, before + r * d, (size_t) d * sizeof *to);
        for (int32_t p = from[r]; delta && p < from[r + 1]; p++)
            for (int64_t c = 0; c < d; c++)
                to[c] += delta[place[p] * d + c];
        for (int64_t c = 0; c < d; c++)
        {
            to[c] = kne_round_to(to[c], type);
            if (base)
                to[c] -= base[r * d + c];
        }
    }
}

static void
gram(void *ctx, double *m, const float *a, int64_t ld, int64_t rows, const int32_t *idx, int32_t first,
     const kne_metric_block *block, int64_t n_block, int64_t max_n)
{
    for (const kne_metric_block *b = block; b < block + n_block; b++)
    {
        const int32_t *col = idx + b->row;
        double        *to = m + b->at;

        memset(to, 0, (size_t) b->n * (size_t) b->n * sizeof *to);
        for (int64_t t = 0; t < rows; t++)
            for (int32_t i = 0; i < b->n; i++)
                for (int32_t j = 0; j <= i; j++)
                    to[(size_t) i * b->n + j] += (double) a[t * ld + col[i] - first] * a[t * ld + col[j] - first];
    }
}

static void
factor(void *ctx, double *m, const float *gram_of, const kne_metric_block *block, int64_t n_block, int64_t max_n, double scale,
       double ridge)
{
    for (const kne_metric_block *b = block; b < block + n_block; b++)
    {
        double *to = m + b->at;

        for (int32_t i = 0; i < b->n; i++)
        {
            for (int32_t j = 0; j <= i; j++)
                to[(size_t) i * b->n + j] = scale * (gram_of ? gram_of[(size_t) i * b->n + j] : to[(size_t) i * b->n + j]);
            to[(size_t) i * b->n + i] += ridge;
        }
        kne_metric_cholesky(to, b->n);
    }
}

static void
solve(void *ctx, float *x, float beta, float scale, float *g, const double *m, const kne_metric_block *block, int64_t n_block,
      int64_t max_n, const kne_mover *mover, int64_t d, double *scratch)
{
    for (const kne_metric_block *b = block; b < block + n_block; b++)
    {
        float *gb = g + b->row * d, *xb = x + b->row * d;

        if (mover && !mover[b->owner].moves)
            continue;
        kne_metric_solve(m + b->at, b->n, gb, gb, (int32_t) d, scratch);
        for (int64_t i = 0; i < b->n * d; i++)
            xb[i] = beta == 0.0f ? scale * gb[i] : beta * xb[i] + scale * gb[i];
    }
}

static void
add_anchors(void *ctx, float *grad, const float *x, const int32_t *place, const int32_t *owner, const kne_mover *mover,
            int64_t n, int64_t d)
{
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; mover[owner[r]].moves && c < d; c++)
            grad[r * d + c] += mover[owner[r]].anchor * x[place[r] * d + c];
}

static void
momentum(void *ctx, float *mean, float beta, const float *grad, const int32_t *owner, const kne_mover *mover, int64_t n, int64_t d)
{
    for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; mover[owner[r]].moves && c < d; c++)
            mean[r * d + c] = beta * mean[r * d + c] + grad[r * d + c];
}

static void
row_norms(void *ctx, double *norm, const float *x, int64_t n, int64_t d)
{
    for (int64_t r = 0; r < n; r++)
    {
        norm[r] = 0;
        for (int64_t c = 0; c < d; c++)
            norm[r] += (double) x[r * d + c] * x[r * d + c];
    }
}

static void
step(void *ctx, float *delta, const float *mean, const double *norm, int32_t parts, const int32_t *owner,
     const kne_mover *mover, int64_t n, int64_t d)
{
    double sum = 0;

    for (int64_t r = 0; r < n; r++)
    {
        const kne_mover *e = &mover[owner[r]];

        if (!e->moves)
            continue;
        if (r == e->row)
        {
            sum = 0;
            for (int32_t p = 0; p < parts; p++)
                for (int32_t i = e->row; i < e->row + e->n; i++)
                    sum += norm[p * n + i];
        }
        const float scale = sum > 0 ? (float) (e->rate / sqrt(sum)) : 0;

        for (int64_t c = 0; c < d; c++)
            delta[r * d + c] -= scale * mean[r * d + c];
    }
}

static void
adam(void *ctx, float *delta, float *mean, float *var, const float *grad, const int32_t *owner, const kne_mover *mover,
     int64_t n, int64_t d)
{
    for (int64_t r = 0; r < n; r++)
    {
        const kne_mover *e = &mover[owner[r]];

        for (int64_t i = r * d; e->moves && i < (r + 1) * d; i++)
        {
            mean[i] = KNE_ADAM_B1 * mean[i] + (1 - KNE_ADAM_B1) * grad[i];
            var[i] = KNE_ADAM_B2 * var[i] + (1 - KNE_ADAM_B2) * grad[i] * grad[i];
            delta[i] -= e->rate * (mean[i] / e->c1) / (sqrtf(var[i] / e->c2) + 1e-8f);
        }
    }
}

static void
energy(void *ctx, float *score, int64_t ld, const float *z, const float *a, const float *k, const int32_t *row0, int64_t n,
       int64_t rows, int64_t f, float scale)
{
    for (int64_t e = 0; e < n; e++)
    {
        float *to = score + e * ld;

        memset(to, 0, (size_t) f * sizeof *to);
        for (int64_t i = row0[e]; i < row0[e + 1]; i++)
            for (int64_t j = row0[e]; j < row0[e + 1]; j++)
            {
                const float kij = scale * k[i * rows + j], *zi = z + i * f, *aj = a + j * f;

                for (int64_t c = 0; c < f; c++)
                    to[c] += kij * zi[c] * aj[c];
            }
    }
}

/* ---- the largest ---- */

static void
contrast(void *ctx, float *y, const float *x, int64_t ld, int64_t rows, int64_t n, const float *mean, float floor, bool keep_sign)
{
    for (int64_t k = 0; k < n; k++)
    {
        float sum = 0;

        for (int64_t r = 0; r < rows; r++)
            sum += x[r * ld + k];
        if (!keep_sign)
            sum = fabsf(sum);
        y[k] = mean ? sum / (mean[k] + floor) : sum;
    }
}

/* Does column a rank before b: higher score, then lower index. NaN ranks last. */
static inline bool
ranks_before(const float *score, int32_t a, int32_t b)
{
    float sa = score[a], sb = score[b];

    if (sa > sb || (sb != sb && sa == sa))
        return true;
    return !(sb > sa || (sa != sa && sb == sb)) && a < b;
}

static void
sift_down(const float *score, int32_t *heap, int64_t n, int64_t i)
{
    for (;;)
    {
        int64_t worst = i, l = 2 * i + 1;

        for (int64_t c = l; c < n && c < l + 2; c++)
            if (ranks_before(score, heap[worst], heap[c]))
                worst = c;
        if (worst == i)
            return;
        int32_t t = heap[i];
        heap[i] = heap[worst];
        heap[worst] = t;
        i = worst;
    }
}

/* A heap of the n best whose root is the worst of them; emptied from the back it comes out in order. */
static void
top(void *ctx, int32_t *index, const float *score, int64_t ld, uint64_t *keys, int64_t rows, int64_t n_all, int64_t n)
{
    for (; rows > 0; rows--, index += n, score += ld)
    {
        for (int64_t i = 0; i < n; i++)
            index[i] = (int32_t) i;
        for (int64_t i = n / 2 - 1; i >= 0; i--)
            sift_down(score, index, n, i);
        for (int64_t i = n; i < n_all; i++)
            if (ranks_before(score, (int32_t) i, index[0]))
            {
                index[0] = (int32_t) i;
                sift_down(score, index, n, 0);
            }
        for (int64_t last = n - 1; last > 0; last--)
        {
            int32_t worst = index[0];

            index[0] = index[last];
            index[last] = worst;
            sift_down(score, index, last, 0);
        }
    }
}

void
kne_cpu_fill_step(kne_backend *be)
{
    be->grad_rows = grad_rows;
    be->compose = compose;
    be->gram = gram;
    be->factor = factor;
    be->solve = solve;
    be->add_anchors = add_anchors;
    be->momentum = momentum;
    be->row_norms = row_norms;
    be->step = step;
    be->adam = adam;
    be->contrast = contrast;
    be->energy = energy;
    be->top = top;
}
