/*
 * kne_delta.h - the delta of one (edit, generation): the rows of
 * kne.weight_delta as the engine holds them, immutable, named by their digest.
 */
#ifndef KNE_DELTA_H
#define KNE_DELTA_H

#include "kne_model.h"
#include "kne_protocol.h"
#include "kne_wire.h"

typedef struct kne_delta_row
{
    int32_t      layer, neuron;
    uint8_t      matrix; /* enum kne_matrix */
    int32_t      len;    /* d_model */
    const float *v;      /* (len) */
} kne_delta_row;

typedef struct kne_delta
{
    uint8_t        digest[KNE_DIGEST_LEN];
    int32_t        n_rows;
    int32_t        refs;
    size_t         bytes;
    kne_delta_row *row; /* ascending (layer, neuron, matrix) */
} kne_delta;

/* One allocation: the record, its rows and their values, copied. refs = 1. Computes the digest.
 * KNE_ERR_INVALID: rows not strictly ascending, or a value that is not finite. */
kne_status kne_delta_new(const kne_delta_row *row, int32_t n_rows, kne_delta **out, kne_err *err);
/* From the body of DELTA_PUT after its digest; `claimed` must match what the rows give. */
kne_status kne_delta_read(kne_rbuf *r, const uint8_t claimed[KNE_DIGEST_LEN], kne_delta **out, kne_err *err);
void       kne_delta_write(kne_wbuf *w, const kne_delta *d); /* n * (layer, neuron, matrix, values) */
void       kne_delta_release(kne_delta *d); /* refs--, freed at 0; NULL is fine */

/* Do the rows fit this model: layers, neurons, lengths, matrices. */
kne_status kne_delta_check(const kne_delta *d, const kne_model *m, kne_err *err);

/* Digest of a set of pairs in ascending edit_id; all zero for n = 0. */
kne_status kne_set_digest(const int64_t *edit_id, const uint8_t (*digest)[KNE_DIGEST_LEN], int32_t n,
                          uint8_t out[KNE_DIGEST_LEN], kne_err *err);

#endif
