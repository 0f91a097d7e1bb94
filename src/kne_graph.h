/*
 * kne_graph.h - one model graph for all families and devices: forward (keeping
 * what backward needs), backward (input gradients only), decoding with a cache.
 *
 * The graph knows nothing of knowledge editing but two things: an overlay
 * (effective rows in place of base rows) and a visitor that is shown each
 * layer's FFN on the way back. Attribution and the optimiser live in the visitor.
 */
#ifndef KNE_GRAPH_H
#define KNE_GRAPH_H

#include "kne_backend.h"

/*
 * Packed sequences, no padding. Sequences that begin alike may share the rows of what they have in common: then seq
 * counts places, one for each token of each sequence, and each place has a row. All but attention works on rows.
 */
typedef struct kne_batch
{
    int32_t        n;       /* rows = tokens of all sequences, shared ones once */
    int32_t        n_seq;
    int32_t        n_out;   /* rows whose logits are wanted */
    const int32_t *id;      /* (n) */
    const int32_t *pos;     /* (n) position in its sequence */
    const kne_seq *seq;     /* (n_seq) */
    const int32_t *out_row; /* (n_out), ascending */
    int32_t        n_place; /* where rows are shared; 0: every place is its row */
    const int32_t *row;     /* (n_place) */
    const int32_t *from;    /* (n + 1) where the places of each row begin in: */
    const int32_t *place;   /* (n_place) ascending within a row */
    const int32_t *first;   /* (n) the first of them */
    int32_t        n_key;   /* behind a cache: its rows that are keys, sequence by sequence; 0: as they lie there */
    const int32_t *key;     /* (n_key) */
    bool           there;   /* kne_batch_put has been called since anything changed */
} kne_batch;

/*
 * Edited neurons of one layer, ascending. value_diff: effective minus base
 * value vectors (columns of W_down), NULL: none edited. gate, up: effective key
 * vectors, which replace the base's results; NULL: not edited (both or neither where gated). Of the device.
 */
typedef struct kne_overlay_layer
{
    int32_t        n;
    const int32_t *neuron;     /* (n) */
    const float   *value_diff; /* (n, d) */
    const float   *gate, *up;  /* (n, d) */
} kne_overlay_layer;

typedef struct kne_overlay
{
    const kne_overlay_layer *layer; /* (L) */
} kne_overlay;

/* What a forward pass keeps of one layer; valid until the next forward on the same workspace. */
typedef struct kne_saved
{
    float *x_in;             /* (n, d) residual stream entering the layer */
    float *h1, *mean1, *rstd1;
    float *q, *k, *v;        /* after q/k norm and RoPE */
    float *q_raw, *k_raw, *q_rstd, *k_rstd; /* before q/k norm, where there is one */
    float *attn, *lse;       /* (n, H hd), (n, H) */
    float *x_mid;            /* (n, d) after attention (sequential blocks) */
    float *h2, *mean2, *rstd2;
    float *gate, *up, *a;    /* (n, f) before the activation, and after */
} kne_saved;

/*
 * A workspace: one allocation, sized once for the largest pass that will use it.
 * keep: save every layer for a backward pass; without it layers share one set.
 */
typedef struct kne_work
{
    kne_arena  arena;    /* of the model's device, as all it holds */
    int32_t    max_n, max_out, max_overlay, max_place;
    bool       keep;
    kne_saved *layer;    /* (L) */
    float     *x;        /* (max_n, d) the residual stream; after forward: before the final norm */
    float     *logits;   /* (max_out, V) */
    float     *dlogits;  /* (max_out, V), keep only: filled by the caller before backward */
    int32_t   *target, *best;     /* (max_out) for the losses on its rows */
    float     *coef, *logp, *kl;
    void      *impl;
} kne_work;

typedef struct kne_work_shape
{
    int32_t max_n, max_out;
    int32_t max_overlay;     /* most overlay neurons of one layer */
    bool    keep;
} kne_work_shape;

/* In the memory of the device that the model is bound to. */
kne_status kne_work_new(const kne_model *m, kne_work_shape shape, kne_work **out, kne_err *err);
/* Likewise, for batches that share rows and have at most max_place places (0: none do). */
kne_status kne_work_new_shared(const kne_model *m, kne_work_shape shape, int32_t max_place, kne_work **out, kne_err *err);
void       kne_work_free(kne_work *w);
/* Rows of a pass that keeps its layers: most; on a device no more than take KNE_PASS_BYTES, but 64. */
#define KNE_PASS_BYTES 1.5e9
int32_t    kne_pass_rows(const kne_model *m, int32_t most);

/* The batch to the device, which kne_forward does otherwise; it fits the workspace. */
void kne_batch_put(kne_backend *be, kne_work *w, kne_batch *b);

/*
 * logp and best (either may be NULL) of n rows of w->logits from row `from` on, and with coef (n) their
 * w->dlogits: the backend's logprob, from and to the host. v: columns that count, V unless n is 1.
 */
void kne_work_logprob(kne_backend *be, kne_work *w, int32_t from, int32_t n, int32_t v, const int32_t *target,
                      const float *coef, float *logp, int32_t *best);

/*
 * What the visitor is shown after the FFN's backward of one layer, top to bottom.
 * dy: gradient at the FFN's output y = alpha * (W_down a) + b, before alpha.
 * u = dy W_down + overlay part, so da = alpha * u. dgate, du: at the pre-activations.
 */
typedef struct kne_ffn_grad
{
    int32_t      layer;
    int32_t      n;
    const float *h;          /* (n, d) input of the FFN */
    const float *a;          /* (n, f) */
    const float *dy;         /* (n, d) */
    const float *u;          /* (n, f) */
    const float *dgate, *dup; /* (n, f); dgate NULL without a gate */
} kne_ffn_grad;
typedef void (*kne_ffn_visitor)(void *ctx, const kne_ffn_grad *g);

/*
 * Forward from first_layer (0: from the embedding; > 0: from work->layer[first_layer].x_in
 * as an earlier pass over the same batch left it) to the logits of out rows.
 * alpha: NULL, or L pointers, each NULL or (n) of the device: a factor for the layer's FFN output of each row, bias excluded.
 * Sizes are checked against the workspace (KNE_ERR_INTERNAL); ids and positions are the caller's duty.
 */
kne_status kne_forward(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
                       const kne_overlay *ov, const float *const *alpha, int32_t first_layer, kne_err *err);

/*
 * Backward of the last forward (workspace with keep) from w->dlogits (n_out, V),
 * down to and including the FFN of last_layer; nothing below is computed. The visitor sees each layer's FFN.
 */
kne_status kne_backward(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
                        const kne_overlay *ov, const float *const *alpha, int32_t last_layer,
                        kne_ffn_visitor visit, void *visit_ctx, kne_err *err);

/*
 * Greedy continuation with a K/V cache: appends up to max_tokens ids, stops at the
 * end-of-text id (not appended) or a full context (n_ctx positions fed, so the last
 * id may be the one after them). ids of the tokenizer's range only. KNE_ERR_LIMIT: a prompt over n_ctx.
 * yield (may be NULL) is called between tokens; non-zero stops with KNE_ERR_CANCELLED.
 */
kne_status kne_generate(const kne_model *m, kne_backend *be, const kne_overlay *ov, const int32_t *prompt,
                        int32_t n_prompt, int32_t max_tokens, int (*yield)(void *), void *yield_ctx,
                        kne_ids *out, kne_err *err);

/*
 * The same, each token drawn from the top_k likeliest (1 to KNE_MAX_TOP_K, the caller's duty) in proportion to their probabilities;
 * 1 is greedy. Equal seeds give equal texts. A sampled
 * text goes on behind the end-of-text id, as the field's figures of fluency want it.
 */
#define KNE_MAX_TOP_K 64
kne_status kne_generate_sampled(const kne_model *m, kne_backend *be, const kne_overlay *ov, const int32_t *prompt,
                                int32_t n_prompt, int32_t max_tokens, int32_t top_k, uint64_t seed,
                                int (*yield)(void *), void *yield_ctx, kne_ids *out, kne_err *err);

#endif
