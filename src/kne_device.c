/*
 * kne_device.c - see kne_device.h.
 *
 * The list of a model's matrices and vectors is walked three times: to add up, to copy, to point.
 * Rows are padded to 16 bytes, which is what matrix units want to read.
 */
#include "kne_device.h"

#include <stdlib.h>
#include <string.h>

#define BOUNCE  ((size_t) 8 << 20)   /* bytes of rows repacked at a time */
#define RESERVE ((size_t) 512 << 20) /* left for a pass: activations, the library's own */
#define GIB     (1.0 / (1 << 30))

static kne_status
no_room(kne_backend *be, const char *what, size_t bytes, kne_err *err)
{
    size_t     free_bytes = 0, total = 0;
    kne_status st = be->status(be->ctx, err);

    if (st == KNE_ERR_DEVICE) /* it is not memory that is missing */
        return st;
    be->memory(be->ctx, &free_bytes, &total);
    kne_error(err, KNE_ERR_NOMEM, "out of device memory for %s", what);
    kne_error_detail(err, "It takes %.2f GiB; of the device's %.2f GiB, %.2f are free.", (double) bytes * GIB,
                     (double) total * GIB, (double) free_bytes * GIB);
    return KNE_ERR_NOMEM;
}

kne_status
kne_device_commit(kne_arena *arena, kne_backend *be, kne_err *err)
{
    size_t size = arena->used;

    if (!be || be->host)
        return kne_arena_commit(arena, err);
    arena->base = be->alloc(be->ctx, size);
    if (!arena->base)
    {
        *arena = (kne_arena) {0};
        return no_room(be, "a pass", size, err);
    }
    arena->size = size;
    arena->used = 0;
    return KNE_OK;
}

void
kne_device_free(kne_arena *arena, kne_backend *be)
{
    if (!be || be->host)
    {
        kne_arena_free(arena);
        return;
    }
    if (arena->base)
        be->release(be->ctx, arena->base);
    *arena = (kne_arena) {0};
}

/* ---- a model's weights ---- */

/* One walk over the weights. base NULL: add up only. */
typedef struct walk
{
    kne_backend *be;
    char        *base, *bounce;
    size_t       used;
} walk;

static void *
take(walk *w, size_t bytes)
{
    void *at = w->base ? w->base + w->used : NULL;

    w->used += (bytes + 255) & ~(size_t) 255;
    return at;
}

static void
vector(walk *w, const float **v, int64_t n)
{
    void *at;

    if (!*v || n <= 0)
        return;
    at = take(w, (size_t) n * sizeof(float));
    if (!at)
        return;
    w->be->put(w->be->ctx, at, *v, (size_t) n * sizeof(float));
    *v = at;
}

static void
matrix(walk *w, kne_mat *m)
{
    const size_t e = kne_dtype_size(m->type), row = (size_t) m->cols * e;
    const size_t pitch = (row + 15) & ~(size_t) 15;
    const char  *from = m->data;
    char        *at;

    if (!from)
        return;
    at = take(w, (size_t) m->rows * pitch);
    if (!at)
        return;
    if (pitch == row && m->ld == m->cols)
        w->be->put(w->be->ctx, at, from, (size_t) m->rows * row);
    else
        for (int64_t r = 0, n; r < m->rows; r += n)
        {
            n = (int64_t) (BOUNCE / pitch) < m->rows - r ? (int64_t) (BOUNCE / pitch) : m->rows - r;
            if (n < 1)
                n = 1; /* bounce has room for a row, however long */
            for (int64_t i = 0; i < n; i++)
                memcpy(w->bounce + (size_t) i * pitch, from + (size_t) ((r + i) * m->ld) * e, row);
            w->be->put(w->be->ctx, at + (size_t) r * pitch, w->bounce, (size_t) n * pitch);
        }
    m->data = at;
    m->ld = (int64_t) (pitch / e);
}

static void
weights(walk *w, kne_model *m)
{
    const kne_arch *a = &m->arch;
    const int64_t   d = a->d_model, f = a->d_ff, k = (int64_t) a->n_heads * a->head_dim,
                    kv = (int64_t) a->n_kv_heads * a->head_dim;
    const bool      tied = m->head.data == m->embed.data;

    matrix(w, &m->embed);
    if (tied)
        m->head = m->embed;
    else
        matrix(w, &m->head);
    matrix(w, &m->pos_embed);
    vector(w, &m->head_b, a->vocab_size);
    vector(w, &m->final_norm_w, d);
    vector(w, &m->final_norm_b, d);
    vector(w, &m->rope_cos, (int64_t) a->n_ctx * (a->rotary_dim / 2));
    vector(w, &m->rope_sin, (int64_t) a->n_ctx * (a->rotary_dim / 2));
    for (int32_t l = 0; l < a->n_layers; l++)
    {
        kne_layer *t = &m->layer[l];
        kne_mat   *mat[] = {&t->q, &t->k, &t->v, &t->o, &t->gate, &t->up, &t->down};
        struct { const float **v; int64_t n; } vec[] = {
            {&t->norm1_w, d}, {&t->norm1_b, d}, {&t->norm2_w, d}, {&t->norm2_b, d},
            {&t->q_b, a->qkv == KNE_QKV_PER_HEAD ? 3 * k : k}, {&t->k_b, kv}, {&t->v_b, kv}, {&t->o_b, d},
            {&t->q_norm, a->head_dim}, {&t->k_norm, a->head_dim}, {&t->gate_b, f}, {&t->up_b, f}, {&t->down_b, d},
        };

        for (size_t i = 0; i < sizeof mat / sizeof *mat; i++)
            matrix(w, mat[i]);
        for (size_t i = 0; i < sizeof vec / sizeof *vec; i++)
            vector(w, vec[i].v, vec[i].n);
    }
}

size_t
kne_model_device_bytes(const kne_model *m)
{
    kne_model copy = *m; /* a walk that only adds up changes nothing but the tied head */
    walk      w = {0};

    weights(&w, &copy);
    return w.used;
}

kne_status
kne_model_bind(kne_model *m, kne_backend *be, kne_err *err)
{
    size_t      bytes, free_bytes = 0, total = 0, longest = 0;
    walk        w = {.be = be};

    if (!be || be->host)
        return KNE_OK;
    bytes = kne_model_device_bytes(m);
    be->memory(be->ctx, &free_bytes, &total);
    if (bytes + RESERVE > free_bytes)
        return no_room(be, "the model", bytes + RESERVE, err);
    longest = (size_t) (m->arch.n_ctx > m->arch.vocab_size ? m->arch.n_ctx : m->arch.vocab_size);
    longest = (longest + (size_t) m->arch.d_ff + 3 * (size_t) m->arch.n_heads * (size_t) m->arch.head_dim +
               (size_t) m->arch.d_model) * sizeof(float) + 16; /* no row is longer */
    w.bounce = malloc(longest > BOUNCE ? longest : BOUNCE);
    if (!w.bounce)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    w.base = m->device_block = be->alloc(be->ctx, bytes);
    if (!w.base)
    {
        free(w.bounce);
        return no_room(be, "the model", bytes, err);
    }
    m->device = be;
    memset(w.bounce, 0, longest > BOUNCE ? longest : BOUNCE);
    weights(&w, m);
    free(w.bounce);
    return be->status(be->ctx, err);
}
