/*
 * kne_requests_export.c - the handler of EXPORT: what follows the view is parsed, the folder written, the answer encoded.
 */
#include "kne_serve.h"

#include "kne_export.h"

#include <stdlib.h>
#include <string.h>

kne_status
kne_handle_export(kne_call *c, kne_err *err)
{
    size_t      n_path, n_card;
    const char *path_at = kne_get_bytes(&c->in, &n_path);
    uint8_t     format = kne_get_u8(&c->in);
    const char *card = kne_get_bytes(&c->in, &n_card);
    char       *path;
    kne_status  st;

    if (!kne_get_done(&c->in) || n_path == 0 || path_at[0] != '/' || memchr(path_at, 0, n_path) || format > KNE_EXPORT_PEFT)
        return kne_malformed(c, err);
    path = strndup(path_at, n_path);
    if (!path)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    st = kne_export(c->loaded->path, c->loaded->model->fingerprint, c->view, format, path, card, n_card, kne_serve_yield, c, &c->out, err);
    free(path);
    return st;
}
