/*
 * kne_view.h - a state of the model: base + a set of edits, as an overlay.
 *
 * Effective row = base row + the set's deltas of that row in ascending edit_id,
 * summed in fp32, rounded to the model's format last. A view is a function of
 * the base and the set alone, so the same set gives the same bits whatever was
 * applied and reverted in between. Immutable once made.
 */
#ifndef KNE_VIEW_H
#define KNE_VIEW_H

#include "kne_delta.h"
#include "kne_graph.h"

typedef struct kne_view
{
    kne_overlay        overlay;     /* pass &view->overlay to the graph */
    kne_overlay_layer *layer;       /* (L) */
    int32_t          **neuron;      /* (L) layer[l].neuron as the host sees it */
    int32_t            max_overlay; /* most neurons of one layer: kne_work_shape.max_overlay */
    int32_t            n_edits;
    int64_t           *edit_id;     /* (n_edits) ascending */
    kne_delta        **delta;       /* (n_edits) a reference held on each */
    size_t             bytes;
    int32_t            refs;        /* the owner's to count */
    kne_arena          arena, rows; /* of the host, of the device */
    kne_backend       *device;
} kne_view;

/* n = 0 gives the base. Checks every delta against the model (KNE_ERR_INVALID). Takes references. */
kne_status kne_view_new(const kne_model *m, kne_backend *be, int32_t n, const int64_t *edit_id,
                        kne_delta *const *delta, kne_view **out, kne_err *err);
void       kne_view_free(kne_view *v);

/* A delta row and the place of its edit in the set. */
typedef struct kne_row_ref
{
    const kne_delta_row *row;
    int32_t              edit;
} kne_row_ref;

/* All rows of n deltas in order of layer, neuron, matrix and place in the set; malloc'ed, NULL: out of memory. */
kne_row_ref *kne_row_refs(int32_t n, kne_delta *const *delta, size_t *n_refs);

#endif
