/*
 * plain_tokenizer.h - for programs that check and measure a GPU on a machine with nothing installed: in place of
 * a tokenizer file and of libcrypto stand a tokenizer of letters and a checksum. Neither is what they check.
 */
#ifndef PLAIN_TOKENIZER_H
#define PLAIN_TOKENIZER_H

#include "kne_edit.h"

#include <stdlib.h>
#include <string.h>

/* ---- a tokenizer: 0 begins a text; a letter is 1 to 16, a space and a letter 17 to 32 ---- */

void
kne_ids_free(kne_ids *ids)
{
    free(ids->id);
    *ids = (kne_ids) {0};
}

kne_status
kne_tokenizer_encode(const kne_tokenizer *t, const char *text, size_t len, bool special, kne_ids *ids, kne_err *err)
{
    ids->id = realloc(ids->id, ((size_t) ids->n + len + 2) * sizeof *ids->id);
    if (special)
        ids->id[ids->n++] = 0;
    for (size_t i = 0; i < len; i++)
    {
        bool space = text[i] == ' ' && i + 1 < len;

        i += space;
        ids->id[ids->n++] = 1 + (text[i] - 'a') + (space ? 16 : 0);
    }
    return KNE_OK;
}

kne_status
kne_tokenizer_decode(const kne_tokenizer *t, const int32_t *id, int32_t n, bool skip_special, char **text, size_t *len,
                     kne_err *err)
{
    char *out = *text = malloc((size_t) n * 2 + 1);

    for (int32_t i = 0; i < n; i++)
    {
        if (id[i] > 16)
            *out++ = ' ';
        if (id[i] > 0)
            *out++ = (char) ('a' + (id[i] - 1) % 16);
    }
    *out = '\0';
    *len = (size_t) (out - *text);
    return KNE_OK;
}

int32_t
kne_tokenizer_vocab_size(const kne_tokenizer *t)
{
    return 33;
}

bool
kne_tokenizer_is_special(const kne_tokenizer *t, int32_t id)
{
    return id == 0;
}

/* FNV-1a in the place of SHA-256 */
struct kne_sha256
{
    uint64_t h;
};

kne_sha256 *
kne_sha256_new(void)
{
    kne_sha256 *h = malloc(sizeof *h);

    if (h)
        h->h = 1469598103934665603ull;
    return h;
}

void
kne_sha256_add(kne_sha256 *h, const void *data, size_t len)
{
    for (size_t i = 0; i < len; i++)
        h->h = (h->h ^ ((const unsigned char *) data)[i]) * 1099511628211ull;
}

void
kne_sha256_end(kne_sha256 *h, uint8_t out[KNE_DIGEST_LEN])
{
    memset(out, 0, KNE_DIGEST_LEN);
    memcpy(out, &h->h, sizeof h->h);
    free(h);
}

#endif
