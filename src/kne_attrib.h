/*
 * kne_attrib.h - gradient attribution of object tokens to FFN neurons, the
 * contrast with other facts, and the choice of an ensemble.
 *
 * Source: arXiv 2412.20637 (score, global quantile); the contrast, the joint and layer paths and
 * the log-probability score are this project's (docs/method.md).
 */
#ifndef KNE_ATTRIB_H
#define KNE_ATTRIB_H

#include "kne_edit.h"

/* A fact as tokens: id[0 .. n_prompt) is the prompt, id[n_prompt .. n) the object. */
typedef struct kne_tokens
{
    const int32_t *id;
    int32_t        n, n_prompt;
} kne_tokens;

/*
 * Teacher-forced pass over n facts, some at a time (a reader waits for no more than one pass). Any of the results may be NULL:
 * logp[i]: sum over the object's tokens; right[i]: every one is the argmax;
 * all_logp[i]: NULL or (tokens of the object, V) of the device, the log-probabilities at each of its positions.
 */
kne_status kne_score_tokens(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact,
                            int32_t n, double *logp, uint8_t *right, float *const *all_logp,
                            int (*yield)(void *), void *yield_ctx, kne_err *err);
/* The same; likeliest: NULL or the argmax at each object token, of all facts one after the other. */
kne_status kne_score_each(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact,
                          int32_t n, double *logp, uint8_t *right, float *const *all_logp, int32_t *likeliest,
                          int (*yield)(void *), void *yield_ctx, kne_err *err);

/*
 * The same of n facts, and what the model says itself after their prompts: answer[i] is what kne_generate gives for up to max_tokens, or
 * fewer where enough (NULL: never) is true of what there is. answer: overwritten, the caller's to free, after a failure too, so
 * zero before.
 */
kne_status kne_answers(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact, int32_t n, int32_t max_tokens,
                       double *logp, uint8_t *right, kne_ids *answer, bool (*enough)(void *ctx, const kne_ids *ids), void *ctx,
                       int (*yield)(void *), void *yield_ctx, kne_err *err);

/*
 * Attr(l,k) of every object token: score[i] points at (L, f) floats of the device, one for each object token of each fact
 * in order, added to (so zero them first; the same pointer may be given several times to sum tokens).
 *   sum over the points of weight * <v, d score / d v at alpha v>,  v = value vector of neuron k of layer l.
 * Facts are packed into passes; yield is called between them.
 */
kne_status kne_attribute(const kne_model *m, kne_backend *be, const kne_view *view, const kne_options *opt,
                         const kne_tokens *fact, int32_t n_facts, float *const *score,
                         const kne_job_calls *calls, kne_err *err);

/* Nodes and weights on [0, 1]; one point is alpha = 1, weight 1 (gradient times weight). */
void kne_quadrature_points(kne_quadrature rule, int n, double *node, double *weight);

/* How many neurons the options ask for, at least 1. */
int32_t kne_ensemble_size(const kne_arch *arch, const kne_options *opt);

#endif
