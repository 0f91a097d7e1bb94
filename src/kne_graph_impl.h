/*
 * kne_graph_impl.h - private to the graph: what a workspace holds beyond
 * kne_graph.h, and the small helpers that forward and backward share.
 *
 * Contract: the passes touch activations through the op table only; they allocate nothing.
 */
#ifndef KNE_GRAPH_IMPL_H
#define KNE_GRAPH_IMPL_H

#include "kne_device.h"
#include "kne_graph.h"

/* n: max_n; K = n_heads head_dim; Kv = n_kv_heads head_dim. */
typedef struct kne_work_impl
{
    int32_t max_kv;          /* rows of each layer's K and V */
    int32_t max_key;         /* keys that a batch may pick from a cache */
    kne_backend *device;     /* that the workspace lives on; NULL: the host */
    int32_t *id, *pos, *out_row; /* (n), (n), (max_out) the batch, on the device */
    kne_seq *seq;            /* (n) */
    int32_t *row, *from, *place, *first; /* (max_place), (n + 1), (max_place), (n) */
    int32_t *key;            /* (max_key) */
    float   *wide[8];        /* (max_place, K or Kv) enum wide: attention of sequences that share rows; K and V (max_key, Kv) behind a cache */
    float   *wide_lse;       /* (max_place, H) */
    /* forward */
    float   *y;              /* (n, d) a branch on its way into the residual stream */
    float   *qkv;            /* (n, 3 K) the product of a per-head layout; backward: its gradient */
    int32_t *split[3];       /* (K) its columns that are q, k, v */
    float   *ones;           /* (n) */
    float   *edit;           /* (n, max_overlay) columns of edited neurons */
    float   *edit_bias;      /* (max_overlay) */
    float   *final_x;        /* (max_out, d) the out rows of x */
    float   *final_h;        /* (max_out, d); backward: its gradient */
    float   *final_mean, *final_rstd; /* (max_out) */
    /* backward, keep only */
    float   *dx;             /* (n, d) at the residual stream */
    float   *final_dx;       /* (max_out, d) its out rows */
    float   *dh1, *dh2;      /* (n, d) at the norms' outputs; one buffer where there is one norm */
    float   *u;              /* (n, f) */
    float   *dgate, *dup;    /* (n, f); dgate NULL without a gate */
    float   *dattn, *dq, *dk, *dv;  /* (n, K), (n, K), (n, Kv), (n, Kv) */
    float   *dq_raw, *dk_raw; /* before q/k norm, where there is one */
} kne_work_impl;

/* The last four are of backward. */
enum wide { WIDE_Q, WIDE_K, WIDE_V, WIDE_O, WIDE_DO, WIDE_DQ, WIDE_DK, WIDE_DV };

/* What every step of a pass needs. */
typedef struct kne_pass
{
    const kne_model     *m;
    kne_backend         *be;
    kne_work            *w;
    kne_work_impl       *s;
    const kne_batch     *b;
    const kne_overlay   *ov;
    const float *const  *alpha;
    int32_t              past; /* rows already in the K/V cache; 0 without one */
} kne_pass;

/* A workspace whose layers each have K and V of max_kv rows (0: no cache, kne_work_new); max_key: for batches that pick their keys. */
kne_status kne_work_new_cached(const kne_model *m, kne_work_shape shape, int32_t max_kv, int32_t max_key,
                               kne_work **out, kne_err *err);
/* kne_forward of rows that follow `past` rows in the cache. */
kne_status kne_forward_cached(const kne_model *m, kne_backend *be, kne_work *w, const kne_batch *b,
                              const kne_overlay *ov, const float *const *alpha, int32_t first_layer,
                              int32_t past, kne_err *err);
/* Batch and overlay against the workspace. */
kne_status kne_graph_check(const kne_pass *p, kne_err *err);

static inline kne_attn_shape
kne_graph_attn_shape(const kne_pass *p)
{
    const kne_arch *a = &p->m->arch;
    kne_attn_shape  s = {
        .n_heads = a->n_heads, .n_kv_heads = a->n_kv_heads, .head_dim = a->head_dim,
        .n_seq = p->b->n_seq, .seq = p->s->seq, .n_rows = p->b->n_place ? p->b->n_place : p->b->n,
        .scale = 1.0f / __builtin_sqrtf((float) a->head_dim),
    };

    for (int32_t i = 0; i < p->b->n_seq; i++)
        s.max_q = p->b->seq[i].q_len > s.max_q ? p->b->seq[i].q_len : s.max_q;
    return s;
}

/* Rows as the places of the batch see them. */
static inline void
kne_graph_widen(const kne_pass *p, float *wide, const float *x, int64_t d)
{
    p->be->gather_rows(p->be->ctx, wide, x, p->s->row, p->b->n_place, d);
}

/* The layer's overlay, NULL where nothing is edited. */
static inline const kne_overlay_layer *
kne_graph_edits(const kne_pass *p, int32_t l)
{
    return p->ov && p->ov->layer[l].n > 0 ? &p->ov->layer[l] : NULL;
}

static inline const float *
kne_graph_alpha(const kne_pass *p, int32_t l)
{
    return p->alpha ? p->alpha[l] : NULL;
}

/* Overlay rows as a matrix: keys are rows of a Linear, values its columns, so transposed. */
static inline kne_mat
kne_graph_rows(const float *data, int64_t n, int64_t d, bool transposed)
{
    return (kne_mat) {
        .data = data, .type = KNE_F32, .transposed = transposed, .rows = n, .cols = d, .ld = d,
    };
}

static inline void
kne_graph_zero(const kne_pass *p, float *x, int64_t n_elem)
{
    p->be->zero(p->be->ctx, x, (size_t) n_elem * sizeof *x);
}

#endif
