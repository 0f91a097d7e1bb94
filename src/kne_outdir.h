/*
 * kne_outdir.h - a folder that appears whole or not at all.
 *
 * Files are written into a folder of another name beside it, with their digests, and made durable; the last thing is to
 * rename it. Whatever goes wrong before leaves nothing under the final name, and kne_outdir_free takes the rest away; a
 * process that dies leaves a folder ".NAME.kne-XXXXXX".
 */
#ifndef KNE_OUTDIR_H
#define KNE_OUTDIR_H

#include "kne_base.h"

typedef struct kne_outfile
{
    char   *name;
    int64_t bytes;
    uint8_t sha256[KNE_DIGEST_LEN];
} kne_outfile;

typedef struct kne_outdir
{
    char        *path, *temp; /* temp NULL: there is none (any more) */
    int32_t      n_files;
    kne_outfile *file;        /* (n_files) those that are whole */
    /* the file at work */
    int          fd;          /* -1: none */
    kne_sha256  *digest;
    uint8_t     *buffer;
    size_t       used;
    /* Called for every MiB written; non-zero ends it with KNE_ERR_CANCELLED. May be NULL. */
    int        (*yield)(void *ctx);
    void        *ctx;
} kne_outdir;

/* KNE_ERR_IO, _NOMEM, _CANCELLED everywhere. After an error only kne_outdir_free. */
kne_status kne_outdir_new(const char *path, kne_outdir **out, kne_err *err);
kne_status kne_outdir_open(kne_outdir *o, const char *name, kne_err *err);
kne_status kne_outdir_put(kne_outdir *o, const void *data, size_t len, kne_err *err);
kne_status kne_outdir_close(kne_outdir *o, kne_err *err); /* the file; durable */
kne_status kne_outdir_commit(kne_outdir *o, kne_err *err);
void       kne_outdir_free(kne_outdir *o); /* NULL is fine */

#endif
