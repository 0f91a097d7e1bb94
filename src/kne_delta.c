/*
 * kne_delta.c - delta rows and their digests (see kne_delta.h).
 */
#include "kne_delta.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int
row_order(const kne_delta_row *a, const kne_delta_row *b)
{
    if (a->layer != b->layer)
        return a->layer < b->layer ? -1 : 1;
    if (a->neuron != b->neuron)
        return a->neuron < b->neuron ? -1 : 1;
    return (int) a->matrix - (int) b->matrix;
}

static kne_status
digest_rows(const kne_delta_row *row, int32_t n, uint8_t out[KNE_DIGEST_LEN], kne_err *err)
{
    kne_sha256 *h = kne_sha256_new();

    if (!h)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < n; i++)
    {
        uint32_t len = (uint32_t) row[i].len;

        kne_sha256_add(h, &row[i].layer, 4);
        kne_sha256_add(h, &row[i].neuron, 4);
        kne_sha256_add(h, &row[i].matrix, 1);
        kne_sha256_add(h, &len, 4);
        kne_sha256_add(h, row[i].v, (size_t) len * 4);
    }
    kne_sha256_end(h, out);
    return KNE_OK;
}

kne_status
kne_delta_new(const kne_delta_row *row, int32_t n_rows, kne_delta **out, kne_err *err)
{
    size_t     n_values = 0, bytes;
    kne_delta *d;
    float     *v;

    for (int32_t i = 0; i < n_rows; i++)
    {
        if (i && row_order(&row[i - 1], &row[i]) >= 0)
            return kne_error(err, KNE_ERR_INVALID, "delta rows are not in order of layer, neuron and matrix");
        for (int32_t k = 0; k < row[i].len; k++)
            if (!isfinite(row[i].v[k]))
                return kne_error(err, KNE_ERR_INVALID, "delta of layer %d neuron %d holds a value that is not finite",
                                 row[i].layer, row[i].neuron);
        n_values += (size_t) row[i].len;
    }

    bytes = sizeof *d + (size_t) n_rows * sizeof *row + n_values * sizeof *v;
    d = malloc(bytes);
    if (!d)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory: %zu bytes asked for", bytes);
    d->n_rows = n_rows;
    d->refs = 1;
    d->bytes = bytes;
    d->row = (kne_delta_row *) (d + 1);
    v = (float *) (d->row + n_rows);
    for (int32_t i = 0; i < n_rows; i++)
    {
        d->row[i] = row[i];
        d->row[i].v = v;
        memcpy(v, row[i].v, (size_t) row[i].len * sizeof *v);
        v += row[i].len;
    }
    kne_status st = digest_rows(d->row, n_rows, d->digest, err);
    if (st != KNE_OK)
    {
        free(d);
        return st;
    }
    *out = d;
    return KNE_OK;
}

kne_status
kne_delta_read(kne_rbuf *r, const uint8_t claimed[KNE_DIGEST_LEN], kne_delta **out, kne_err *err)
{
    uint32_t       n = kne_get_count(r, 13);
    kne_delta_row *row = malloc(((size_t) n + 1) * sizeof *row);
    float         *values = NULL;
    kne_status     st;

    if (!row)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    /* Values in the frame may be unaligned: copied to a buffer that is. No more of them than bytes left. */
    size_t used = 0, most = (r->len - r->at) / 4;
    values = malloc((most + 1) * sizeof *values);
    st = values ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < n && st == KNE_OK; i++)
    {
        row[i].layer = kne_get_i32(r);
        row[i].neuron = kne_get_i32(r);
        row[i].matrix = kne_get_u8(r);

        uint32_t    len = kne_get_count(r, 4);
        const void *v = kne_get(r, (size_t) len * 4);
        if (!v)
            break;
        memcpy(values + used, v, (size_t) len * 4);
        row[i].v = values + used;
        row[i].len = (int32_t) len;
        used += len;
    }
    if (st == KNE_OK && r->bad)
        st = kne_error(err, KNE_ERR_PROTOCOL, "malformed delta");
    if (st == KNE_OK)
        st = kne_delta_new(row, (int32_t) n, out, err);
    free(values);
    free(row);
    if (st == KNE_OK && memcmp((*out)->digest, claimed, KNE_DIGEST_LEN) != 0)
    {
        kne_delta_release(*out);
        *out = NULL;
        st = kne_error(err, KNE_ERR_FORMAT, "delta rows do not match their digest");
        kne_error_detail(err, "The rows of kne.weight_delta were changed after they were written.");
    }
    return st;
}

void
kne_delta_write(kne_wbuf *w, const kne_delta *d)
{
    kne_put_u32(w, (uint32_t) d->n_rows);
    for (int32_t i = 0; i < d->n_rows; i++)
    {
        const kne_delta_row *row = &d->row[i];

        kne_put_i32(w, row->layer);
        kne_put_i32(w, row->neuron);
        kne_put_u8(w, row->matrix);
        kne_put_u32(w, (uint32_t) row->len);
        kne_put(w, row->v, (size_t) row->len * 4);
    }
}

void
kne_delta_release(kne_delta *d)
{
    if (d && --d->refs == 0)
        free(d);
}

kne_status
kne_delta_check(const kne_delta *d, const kne_model *m, kne_err *err)
{
    for (int32_t i = 0; i < d->n_rows; i++)
    {
        const kne_delta_row *r = &d->row[i];

        if (r->layer < 0 || r->layer >= m->arch.n_layers || r->neuron < 0 || r->neuron >= m->arch.d_ff ||
            r->len != m->arch.d_model || r->matrix > KNE_MATRIX_UP ||
            (r->matrix == KNE_MATRIX_GATE && !m->arch.gated))
            return kne_error(err, KNE_ERR_INVALID,
                             "delta of layer %d neuron %d (%d values) does not fit the model (%d layers of %d neurons, width %d)",
                             r->layer, r->neuron, r->len, m->arch.n_layers, m->arch.d_ff, m->arch.d_model);
    }
    return KNE_OK;
}

kne_status
kne_set_digest(const int64_t *edit_id, const uint8_t (*digest)[KNE_DIGEST_LEN], int32_t n,
               uint8_t out[KNE_DIGEST_LEN], kne_err *err)
{
    kne_sha256 *h;

    memset(out, 0, KNE_DIGEST_LEN);
    if (n == 0)
        return KNE_OK;
    h = kne_sha256_new();
    if (!h)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < n; i++)
    {
        kne_sha256_add(h, &edit_id[i], 8);
        kne_sha256_add(h, digest[i], KNE_DIGEST_LEN);
    }
    kne_sha256_end(h, out);
    return KNE_OK;
}
