/*
 * kne_backend.h - the op table: the narrow waist between the model graph and a
 * device. The CPU fills it in kne_cpu.c; another device is another table.
 *
 * Conventions. n: rows (tokens of all sequences, packed without padding), d:
 * model width, f: FFN width, V: vocabulary. All activations are float,
 * row-major, rows contiguous unless an ld says otherwise. A backward op adds
 * into dx where its comment says "+=", else it overwrites. Pointers are the device's.
 *
 * Invariant (tested): each row of a result depends on that row's inputs alone,
 * summed in an order that does not depend on n or on the number of threads. So
 * a batch gives bit for bit what single runs give, and so do 1 or 8 threads.
 */
#ifndef KNE_BACKEND_H
#define KNE_BACKEND_H

#include "kne_model.h"

#define KNE_BACKEND_ABI 3u /* grows when the table, or what it is given, changes */

/*
 * One sequence of a packed batch. Its queries are rows [q0, q0 + q_len); its keys
 * and values are rows [kv0, kv0 + kv_len) of the K/V buffers; query i sees keys
 * 0 .. kv_len - q_len + i. Without a cache kv0 = q0 and kv_len = q_len.
 */
typedef struct kne_seq
{
    int32_t q0, q_len, kv0, kv_len;
} kne_seq;

typedef struct kne_attn_shape
{
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t n_seq;
    const kne_seq *seq; /* (n_seq) of the device */
    float   scale;
    int32_t n_rows, max_q; /* of q; the longest q_len: a device has to know without looking at seq */
} kne_attn_shape;

/* A row of a weight's gradient: grad[row, :] = sum over t in [from, to) of left[t, col] right[t, :]. */
typedef struct kne_grad_row
{
    int32_t row, col, from, to;
} kne_grad_row;

/* An (n, n) matrix, `at` numbers into the factors; what it is applied to begins at row `row` and is edit `owner`'s. */
typedef struct kne_metric_block
{
    int64_t at;
    int32_t row, n, owner;
} kne_metric_block;

/* What an optimiser's step does to one edit, whose rows are [row, row + n) of the N of a batch. */
typedef struct kne_mover
{
    int32_t row, n, moves; /* moves 0: nothing */
    float   rate;          /* step size; of a protected step the step's length */
    float   anchor;        /* weight of the anchors' gradient */
    float   c1, c2;        /* Adam: 1 - b1^t, 1 - b2^t */
} kne_mover;

#define KNE_ADAM_B1 0.9f
#define KNE_ADAM_B2 0.999f

typedef struct kne_backend kne_backend;
struct kne_backend
{
    const char *name; /* "cpu: AVX-512, 2 threads" */
    void       *ctx;

    /* ---- memory (kne_device.h for more). What ops are asked to do happens in order, perhaps later: get waits. ---- */
    bool   host; /* its memory is the host's: weights stay where the file maps them */
    void *(*alloc)(void *ctx, size_t bytes); /* zeroed, aligned to 256; NULL: none left */
    void  (*release)(void *ctx, void *p);
    void  (*put)(void *ctx, void *to, const void *from_host, size_t bytes); /* from_host may change on return */
    void  (*get)(void *ctx, void *to_host, const void *from, size_t bytes);
    void  (*zero)(void *ctx, void *to, size_t bytes);
    void  (*memory)(void *ctx, size_t *free_bytes, size_t *total_bytes);
    /* Ops have no status of their own: what went wrong since the last call, known so far (all, after a get).
     * KNE_ERR_NOMEM is over with it; after KNE_ERR_DEVICE the device is lost to this process. */
    kne_status (*status)(void *ctx, kne_err *err);
    void  (*close)(kne_backend *be);
    /*
     * The same ops again and again: while (!begin(ctx, key)) { ops; if (end(ctx)) break; }. Equal keys promise equal ops with
     * equal arguments, device memory not released in between, and neither alloc, put nor get among them. The device may
     * record them and do them from the record: then begin says true. end false: they were not done, once more. Both NULL: plain.
     */
    bool  (*begin)(void *ctx, uint64_t key);
    bool  (*end)(void *ctx);

    /* ---- matrix products ---- */
    /* y[n, out] = beta y + x[n, in] W^T (+ bias): Linear forward, W in its file's format, either orientation. */
    void (*linear)(void *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const kne_mat *w,
                   const float *bias, int64_t n, float beta);
    /* dx[n, in] = beta dx + dy[n, out] W: Linear backward to its input. */
    void (*linear_bwd)(void *ctx, float *dx, int64_t ldx, const float *dy, int64_t ldy, const kne_mat *w,
                       int64_t n, float beta);
    /* c[m, p] = beta c + a[k, m]^T b[k, p]: weight gradients of few rows. */
    void (*matmul_tn)(void *ctx, float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
                      int64_t ldb, int64_t m, int64_t p, int64_t k, float beta);

    /* ---- embeddings and norms ---- */
    void (*embed)(void *ctx, float *x, const kne_mat *tok, const kne_mat *pos_table, const int32_t *id,
                  const int32_t *pos, int64_t n); /* pos_table NULL or absent: none added */
    void (*rmsnorm)(void *ctx, float *y, float *rstd, const float *x, const float *w, float eps,
                    int64_t n, int64_t d);
    void (*rmsnorm_bwd)(void *ctx, float *dx, const float *dy, const float *x, const float *rstd,
                        const float *w, int64_t n, int64_t d); /* dx += */
    void (*layernorm)(void *ctx, float *y, float *mean, float *rstd, const float *x, const float *w,
                      const float *b, float eps, int64_t n, int64_t d);
    void (*layernorm_bwd)(void *ctx, float *dx, const float *dy, const float *x, const float *mean,
                          const float *rstd, const float *w, int64_t n, int64_t d); /* dx += */

    /* ---- attention ---- */
    /* Rotate in place n rows of n_heads heads, head_dim apart; sign -1: the backward rotation. */
    void (*rope)(void *ctx, float *x, int64_t ldx, const float *cos, const float *sin, const int32_t *pos,
                 int64_t n, int32_t n_heads, int32_t head_dim, int32_t rotary_dim, bool interleaved,
                 float sign);
    /* o[n, H hd]; lse[n, H] = log-sum-exp of each row of scores, for the backward pass (NULL: not kept). */
    void (*attention)(void *ctx, float *o, float *lse, const float *q, const float *k, const float *v,
                      const kne_attn_shape *shape);
    /* dq, dk, dv overwritten; q [n, H hd], k and v [n, Hkv hd]; no cache. */
    void (*attention_bwd)(void *ctx, float *dq, float *dk, float *dv, const float *do_, const float *o,
                          const float *lse, const float *q, const float *k, const float *v,
                          const kne_attn_shape *shape);

    /* ---- FFN activation: a = act(g) * u, or a = act(u) where g is NULL ---- */
    void (*act)(void *ctx, float *a, const float *g, const float *u, kne_act_kind kind, int64_t n, int64_t f);
    void (*act_bwd)(void *ctx, float *dg, float *du, const float *da, const float *g, const float *u,
                    kne_act_kind kind, int64_t n, int64_t f); /* overwrites */

    /* ---- element-wise ---- */
    void (*add)(void *ctx, float *y, const float *x, int64_t n_elem); /* y += x */
    void (*scale_rows)(void *ctx, float *y, const float *s, int64_t n, int64_t d); /* y[r, :] *= s[r] */

    /* ---- losses on rows of logits ---- */
    /* logp[r] = log softmax(logits[r])[target[r]], best[r] = argmax (lowest id of equals);
     * dlogits (NULL: not wanted) = coef[r] * (onehot - softmax): the gradient of coef * logp. */
    void (*logprob)(void *ctx, float *logp, int32_t *best, float *dlogits, const float *logits,
                    const int32_t *target, const float *coef, int64_t n, int64_t v);
    /* kl[r] = KL(ref || softmax(logits[r])), ref_logp given as log-probabilities;
     * dlogits = coef[r] * (softmax - exp(ref_logp)): the gradient of coef * kl. */
    void (*kl)(void *ctx, float *kl, float *dlogits, const float *logits, const float *ref_logp,
               const float *coef, int64_t n, int64_t v);
    void (*log_softmax)(void *ctx, float *logp, const float *logits, int64_t n, int64_t v); /* logp may be logits */

    /* ---- ensembles ---- */
    void (*gather_cols)(void *ctx, float *y, const float *x, int64_t ldx, const int32_t *col, int64_t n,
                        int64_t n_col); /* y[n, n_col] = x[:, col] */
    void (*scatter_cols)(void *ctx, float *x, int64_t ldx, const float *y, const int32_t *col, int64_t n,
                         int64_t n_col, bool add); /* x[:, col] = or += y */
    void (*gather_rows)(void *ctx, float *y, const float *x, const int32_t *row, int64_t n_row,
                        int64_t d); /* y[n_row, d] = x[row, :] */
    void (*scatter_rows)(void *ctx, float *x, const float *y, const int32_t *row, int64_t n_row,
                         int64_t d); /* x[row, :] += y; rows distinct */
    /* y[r, :] = sum over j in [from[r], from[r + 1]) of x[place[j], :], in that order. NULL: the device has none, and
     * batches without shared rows only. */
    void (*fold_rows)(void *ctx, float *y, const float *x, const int32_t *from, const int32_t *place, int64_t n,
                      int64_t d);
    /* score[f] += sum over rows r of coef[r] * a[r, :] * u[r, :] */
    void (*score)(void *ctx, float *score, const float *a, const float *u, const float *coef, int64_t n,
                  int64_t f);
    /* Copy neuron vectors out of a weight matrix as float: rows of W (by_col false) or columns. out[n_idx, len]. */
    void (*gather_neurons)(void *ctx, float *out, const kne_mat *w, bool by_col, const int32_t *idx,
                           int64_t n_idx);
    /* index[r, n]: columns of the n largest of score[r, n_all] (rows ld apart), largest first, of equals the first, NaN last.
     * keys: scratch (rows, n) */
    void (*top)(void *ctx, int32_t *index, const float *score, int64_t ld, uint64_t *keys, int64_t rows, int64_t n_all,
                int64_t n);
    /* y[k] = |sum over rows r of x[r, k]|, rows ld apart; keep_sign: without the bars; over mean[k] + floor unless mean is NULL */
    void (*contrast)(void *ctx, float *y, const float *x, int64_t ld, int64_t rows, int64_t n, const float *mean, float floor,
                     bool keep_sign);
    /* score[e, f] (ld apart) = scale sum over rows i, j in [row0[e], row0[e + 1]) of z[i, :] k[i, j] a[j, :]; k [rows, rows] */
    void (*energy)(void *ctx, float *score, int64_t ld, const float *z, const float *a, const float *k,
                   const int32_t *row0, int64_t n, int64_t rows, int64_t f, float scale);

    /* ---- the optimiser: N rows of d numbers, of all edits of a batch one after another; owner[N]: whose ---- */
    /* left [., f], right [., d]. scratch: (most rows of a range, most rows of an edit) */
    void (*grad_rows)(void *ctx, float *grad, const kne_grad_row *of, int64_t n_of, const float *left, int64_t f,
                      const float *right, int64_t d, float *scratch);
    /* eff[r, :] = before[r, :] + sum over j in [from[r], from[r + 1]) of delta[place[j], :], rounded to type; less base.
     * base and delta may be NULL: nothing of it. */
    void (*compose)(void *ctx, float *eff, const float *base, const float *before, const float *delta, const int32_t *from,
                    const int32_t *place, int64_t n, int64_t d, kne_dtype type);
    /* m[i, j] of each block = sum over rows t of a[t, idx[row + i] - first] a[t, idx[row + j] - first], in double. a [rows, ld] */
    void (*gram)(void *ctx, double *m, const float *a, int64_t ld, int64_t rows, const int32_t *idx, int32_t first,
                 const kne_metric_block *block, int64_t n_block, int64_t max_n);
    /* For each block, in place: what solve wants of M = scale m + ridge I, positive. gram (n, n) unless NULL: instead of m, of one block. */
    void (*factor)(void *ctx, double *m, const float *gram, const kne_metric_block *block, int64_t n_block, int64_t max_n,
                   double scale, double ridge);
    /* x = beta x + scale M^-1 g for the blocks of edits that move (mover NULL: all); g is lost. scratch: (max_n, KNE_METRIC_COLUMNS) */
    void (*solve)(void *ctx, float *x, float beta, float scale, float *g, const double *m, const kne_metric_block *block,
                  int64_t n_block, int64_t max_n, const kne_mover *mover, int64_t d, double *scratch);
    /* These touch rows of edits that move. grad[r, :] += anchor x[place[r], :] */
    void (*add_anchors)(void *ctx, float *grad, const float *x, const int32_t *place, const int32_t *owner,
                        const kne_mover *mover, int64_t n, int64_t d);
    void (*momentum)(void *ctx, float *mean, float beta, const float *grad, const int32_t *owner, const kne_mover *mover,
                     int64_t n, int64_t d); /* mean = beta mean + grad */
    void (*row_norms)(void *ctx, double *norm, const float *x, int64_t n, int64_t d); /* norm[r] = sum of x[r, :]^2; of all */
    /* delta -= rate mean / |mean of the edit|; norm [parts, N]: row_norms of every matrix that moves */
    void (*step)(void *ctx, float *delta, const float *mean, const double *norm, int32_t parts, const int32_t *owner,
                 const kne_mover *mover, int64_t n, int64_t d);
    void (*adam)(void *ctx, float *delta, float *mean, float *var, const float *grad, const int32_t *owner,
                 const kne_mover *mover, int64_t n, int64_t d);
};

/* The CPU's table. n_threads as in kne_pool_new. isa: NULL for the best this machine has, or one of
 * "portable", "avx2", "avx512", "avx512bf16" (KNE_ERR_UNSUPPORTED when the machine lacks it). */
kne_status kne_cpu_backend_new(int n_threads, const char *isa, kne_backend **out, kne_err *err);
void       kne_cpu_backend_free(kne_backend *be);

#endif
