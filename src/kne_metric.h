/*
 * kne_metric.h - the metric of the protected step, restricted to an ensemble:
 * M = C_SS + ridge * (mean diagonal of C) * I, with C = E[a a^T] of the FFN activations on known facts.
 *
 * Source: ROME and MEMIT (arXiv 2202.05262, 2210.07229) take C over a corpus and a whole layer; here the
 * facts in the database are the corpus and the ensemble is the matrix, so nothing is precomputed.
 */
#ifndef KNE_METRIC_H
#define KNE_METRIC_H

#include "kne_ref.h"

/* Mean diagonal of C over all neurons of a layer; 0 without facts. */
double kne_metric_mean(const kne_ref *const *ref, int32_t n_ref, int32_t layer, int32_t f);

/* Rows of activations that C is taken over. */
int64_t kne_metric_rows(const kne_ref *const *ref, int32_t n_ref);
/* out (rows, n): the activations of neurons (n, within `layer`). */
void kne_metric_gather(float *out, const kne_ref *const *ref, int32_t n_ref, int32_t layer, int32_t f, const int32_t *neuron,
                       int32_t n);

/* In place: the lower triangle of a positive matrix (n, n) becomes its factor L, and L^T stands above the diagonal. */
void kne_metric_cholesky(double *chol, int32_t n);

#define KNE_METRIC_COLUMNS 32 /* solved for at a time: they lie in vectors */

/* x[n, d] = M^-1 g[n, d], x may be g; scratch: (n, KNE_METRIC_COLUMNS). */
void kne_metric_solve(const double *chol, int32_t n, const float *g, float *x, int32_t d, double *scratch);

#endif
