/*
 * kne_view.c - base + a set of edits, as an overlay (see kne_view.h).
 */
#include "kne_device.h"
#include "kne_view.h"

#include <stdlib.h>
#include <string.h>

static int
ref_order(const void *pa, const void *pb)
{
    const kne_row_ref *a = pa, *b = pb;

    if (a->row->layer != b->row->layer)
        return a->row->layer < b->row->layer ? -1 : 1;
    if (a->row->neuron != b->row->neuron)
        return a->row->neuron < b->row->neuron ? -1 : 1;
    if (a->row->matrix != b->row->matrix)
        return (int) a->row->matrix - (int) b->row->matrix;
    return a->edit - b->edit; /* fp32 sums run in ascending edit_id */
}

kne_row_ref *
kne_row_refs(int32_t n, kne_delta *const *delta, size_t *n_refs)
{
    size_t       total = 0, at = 0;
    kne_row_ref *refs;

    for (int32_t i = 0; i < n; i++)
        total += (size_t) delta[i]->n_rows;
    *n_refs = total;
    refs = malloc((total + 1) * sizeof *refs);
    if (!refs)
        return NULL;
    for (int32_t i = 0; i < n; i++)
        for (int32_t r = 0; r < delta[i]->n_rows; r++)
            refs[at++] = (kne_row_ref) {&delta[i]->row[r], i};
    qsort(refs, total, sizeof *refs, ref_order);
    return refs;
}

/* Which overlay rows a layer has: [from, to) of the refs, its distinct neurons, and whether keys are among them. */
typedef struct span
{
    int32_t from, to, n;
    bool    values, keys;
} span;

static void
layout(const kne_model *m, const span *span_, kne_view *v, int32_t n_edits, float *(*rows)[3])
{
    int32_t d = m->arch.d_model;

    v->layer = kne_arena_take(&v->arena, (size_t) m->arch.n_layers, sizeof *v->layer);
    v->edit_id = kne_arena_take(&v->arena, (size_t) n_edits, sizeof *v->edit_id);
    v->delta = kne_arena_take(&v->arena, (size_t) n_edits, sizeof *v->delta);
    v->neuron = kne_arena_take(&v->arena, (size_t) m->arch.n_layers, sizeof *v->neuron);
    for (int32_t l = 0; l < m->arch.n_layers; l++)
    {
        const span *s = &span_[l];
        size_t      n = (size_t) s->n * (size_t) d;
        int32_t    *list = kne_arena_take(&v->arena, (size_t) s->n, sizeof *list);
        int32_t    *neuron = kne_arena_take(&v->rows, (size_t) s->n, sizeof *neuron);
        float      *down = s->values ? kne_arena_take(&v->rows, n, sizeof(float)) : NULL;
        float      *gate = s->keys && m->arch.gated ? kne_arena_take(&v->rows, n, sizeof(float)) : NULL;
        float      *up = s->keys ? kne_arena_take(&v->rows, n, sizeof(float)) : NULL;

        if (v->layer)
        {
            v->neuron[l] = list;
            v->layer[l] = (kne_overlay_layer) {s->n, neuron, down, gate, up};
            rows[l][KNE_MATRIX_DOWN] = down;
            rows[l][KNE_MATRIX_GATE] = gate;
            rows[l][KNE_MATRIX_UP] = up;
        }
    }
}

/* Base rows of the layer's neurons, then each matrix's deltas in order, rounded. base, eff: (n, d) of the host. */
static void
fill_layer(const kne_model *m, kne_backend *be, const kne_view *v, int32_t l, const span *s, const kne_row_ref *refs,
           float *const *rows, float *base, float *eff)
{
    const kne_layer *layer = &m->layer[l];
    const kne_mat   *mat[3] = {&layer->down, &layer->gate, &layer->up};
    const int32_t    d = m->arch.d_model;
    const size_t     size = (size_t) s->n * (size_t) d * sizeof(float);
    int32_t         *neuron = v->neuron[l], n = 0;

    for (int32_t i = s->from; i < s->to; i++)
        if (n == 0 || neuron[n - 1] != refs[i].row->neuron)
            neuron[n++] = refs[i].row->neuron;
    kne_device_put(be, (void *) v->layer[l].neuron, neuron, (size_t) n * sizeof *neuron);

    for (int k = 0; k < 3; k++)
    {
        int32_t at = 0;

        if (!rows[k])
            continue;
        /* A neuron's value is a column of W_down as maths, its keys are rows; Conv1D stores the transpose. */
        be->gather_neurons(be->ctx, rows[k], mat[k], (k == KNE_MATRIX_DOWN) != mat[k]->transposed,
                           v->layer[l].neuron, s->n);
        be->get(be->ctx, base, rows[k], size);
        memcpy(eff, base, size);
        for (int32_t i = s->from; i < s->to; i++)
        {
            const kne_delta_row *r = refs[i].row;

            while (neuron[at] != r->neuron)
                at++;
            if (r->matrix == k)
                for (int32_t j = 0; j < d; j++)
                    eff[(size_t) at * d + j] += r->v[j];
        }
        for (size_t j = 0; j < (size_t) s->n * (size_t) d; j++)
        {
            eff[j] = kne_round_to(eff[j], mat[k]->type);
            if (k == KNE_MATRIX_DOWN)
                eff[j] -= base[j];
        }
        kne_device_put(be, rows[k], eff, size);
    }
}

kne_status
kne_view_new(const kne_model *m, kne_backend *be, int32_t n, const int64_t *edit_id, kne_delta *const *delta,
             kne_view **out, kne_err *err)
{
    const int32_t L = m->arch.n_layers;
    kne_view     *v = calloc(1, sizeof *v);
    kne_row_ref  *refs = NULL;
    span         *spans = calloc((size_t) L, sizeof *spans);
    float      *(*rows)[3] = calloc((size_t) L, sizeof *rows);
    float        *base = NULL, *eff = NULL;
    size_t        n_refs = 0;
    kne_status    st = KNE_OK;

    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        st = kne_delta_check(delta[i], m, err);
        if (st == KNE_OK && i && edit_id[i - 1] >= edit_id[i])
            st = kne_error(err, KNE_ERR_INVALID, "edits of a view are not in order");
    }
    refs = kne_row_refs(n, delta, &n_refs);
    if (st == KNE_OK && (!v || !refs || !spans || !rows))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (st != KNE_OK)
        goto out;

    int32_t max_n = 0;
    for (int32_t l = 0, i = 0; l < L; l++)
    {
        span *s = &spans[l];

        s->from = i;
        for (; i < (int32_t) n_refs && refs[i].row->layer == l; i++)
        {
            s->n += i == s->from || refs[i].row->neuron != refs[i - 1].row->neuron;
            s->values |= refs[i].row->matrix == KNE_MATRIX_DOWN;
            s->keys |= refs[i].row->matrix != KNE_MATRIX_DOWN;
        }
        s->to = i;
        max_n = s->n > max_n ? s->n : max_n;
    }

    layout(m, spans, v, n, rows);
    st = kne_arena_commit(&v->arena, err);
    if (st == KNE_OK)
        st = kne_device_commit(&v->rows, v->device = be, err);
    base = malloc(((size_t) max_n * (size_t) m->arch.d_model + 1) * sizeof *base);
    eff = malloc(((size_t) max_n * (size_t) m->arch.d_model + 1) * sizeof *eff);
    if (st == KNE_OK && (!base || !eff))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (st != KNE_OK)
        goto out;
    layout(m, spans, v, n, rows);
    for (int32_t l = 0; l < L; l++)
        if (spans[l].n)
            fill_layer(m, be, v, l, &spans[l], refs, rows[l], base, eff);
    st = be->status(be->ctx, err);
    if (st != KNE_OK)
        goto out;
    for (int32_t i = 0; i < n; i++)
    {
        v->edit_id[i] = edit_id[i];
        v->delta[i] = delta[i];
        delta[i]->refs++;
    }
    v->overlay.layer = v->layer;
    v->max_overlay = max_n;
    v->n_edits = n;
    v->bytes = v->arena.size + v->rows.size;
    v->refs = 1;

out:
    if (st == KNE_OK)
        *out = v;
    else if (v)
    {
        kne_device_free(&v->rows, v->device);
        kne_arena_free(&v->arena);
        free(v);
    }
    free(eff);
    free(base);
    free(refs);
    free(spans);
    free(rows);
    return st;
}

void
kne_view_free(kne_view *v)
{
    if (!v)
        return;
    for (int32_t i = 0; i < v->n_edits; i++)
        kne_delta_release(v->delta[i]);
    kne_device_free(&v->rows, v->device);
    kne_arena_free(&v->arena);
    free(v);
}
