/*
 * kne_metric.c - see kne_metric.h. The matrices have some tens of rows (the ensemble within one layer), so a
 * plain Cholesky in double is microseconds and a LAPACK would be a dependency for thirty lines.
 */
#include "kne_metric.h"

#include <math.h>
#include <string.h>

double
kne_metric_mean(const kne_ref *const *ref, int32_t n_ref, int32_t layer, int32_t f)
{
    double  sum = 0;
    int64_t rows = 0;

    for (int32_t r = 0; r < n_ref; r++)
    {
        sum += ref[r]->square[layer];
        rows += ref[r]->n_rows;
    }
    return rows ? sum / (double) rows / f : 0;
}

int64_t
kne_metric_rows(const kne_ref *const *ref, int32_t n_ref)
{
    int64_t rows = 0;

    for (int32_t r = 0; r < n_ref; r++)
        rows += ref[r]->n_rows;
    return rows;
}

void
kne_metric_gather(float *out, const kne_ref *const *ref, int32_t n_ref, int32_t layer, int32_t f, const int32_t *neuron, int32_t n)
{
    for (int32_t r = 0; r < n_ref; r++)
    {
        const float *a = ref[r]->a + (size_t) layer * (size_t) ref[r]->n_rows * (size_t) f;

        for (int32_t t = 0; t < ref[r]->n_rows; t++, a += f, out += n)
            for (int32_t i = 0; i < n; i++)
                out[i] = a[neuron[i]];
    }
}

void
kne_metric_cholesky(double *chol, int32_t n)
{
    for (int32_t j = 0; j < n; j++)
    {
        double *cj = chol + (size_t) j * n, diag = cj[j];

        for (int32_t k = 0; k < j; k++)
            diag -= cj[k] * cj[k];
        cj[j] = sqrt(diag > 1e-300 ? diag : 1e-300); /* the ridge keeps it positive */
        for (int32_t i = j + 1; i < n; i++)
        {
            double *ci = chol + (size_t) i * n, sum = ci[j];

            for (int32_t k = 0; k < j; k++)
                sum -= ci[k] * cj[k];
            ci[j] = cj[i] = sum / cj[j]; /* and its transpose above the diagonal, for the solver */
        }
    }
}

void
kne_metric_solve(const double *chol, int32_t n, const float *g, float *x, int32_t d, double *scratch)
{
    for (int32_t c0 = 0; c0 < d; c0 += KNE_METRIC_COLUMNS)
    {
        const int32_t m = d - c0 < KNE_METRIC_COLUMNS ? d - c0 : KNE_METRIC_COLUMNS;

        for (int32_t i = 0; i < n; i++)
        {
            const double *l = chol + (size_t) i * n;
            double        sum[KNE_METRIC_COLUMNS] = {0};

            for (int32_t c = 0; c < m; c++)
                sum[c] = g[(size_t) i * d + c0 + c];
            for (int32_t k = 0; k < i; k++)
                for (int32_t c = 0; c < KNE_METRIC_COLUMNS; c++)
                    sum[c] -= l[k] * scratch[(size_t) k * KNE_METRIC_COLUMNS + c];
            for (int32_t c = 0; c < KNE_METRIC_COLUMNS; c++)
                scratch[(size_t) i * KNE_METRIC_COLUMNS + c] = sum[c] / l[i];
        }
        for (int32_t i = n - 1; i >= 0; i--)
        {
            const double *l = chol + (size_t) i * n; /* above the diagonal: the transpose */
            double        sum[KNE_METRIC_COLUMNS];

            memcpy(sum, scratch + (size_t) i * KNE_METRIC_COLUMNS, sizeof sum);
            for (int32_t k = i + 1; k < n; k++)
                for (int32_t c = 0; c < KNE_METRIC_COLUMNS; c++)
                    sum[c] -= l[k] * scratch[(size_t) k * KNE_METRIC_COLUMNS + c];
            for (int32_t c = 0; c < KNE_METRIC_COLUMNS; c++)
                scratch[(size_t) i * KNE_METRIC_COLUMNS + c] = sum[c] / l[i];
            for (int32_t c = 0; c < m; c++)
                x[(size_t) i * d + c0 + c] = (float) scratch[(size_t) i * KNE_METRIC_COLUMNS + c];
        }
    }
}
