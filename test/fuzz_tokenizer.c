/*
 * fuzz_tokenizer.c - libFuzzer target: a tokenizer.json and a text for it.
 *
 *   clang -std=gnu11 -g -O1 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Isrc \
 *       test/fuzz_tokenizer.c src/kne_base.c src/kne_error.c src/kne_tokenizer*.c \
 *       src/kne_bpe*.c src/kne_added_tokens.c src/kne_normalizer.c src/kne_pretokenizer.c \
 *       src/kne_decoder.c -lpcre2-8 -lutf8proc -lcjson -lcrypto -lm -o build/fuzz_tokenizer
 *
 * The input is the file, a NUL, and the text. Seeds: the whole tokenizers that
 * "test_tokenizer --cases DIR" writes, one for each case. Whatever is accepted
 * has to encode and decode without a fault, and twice alike.
 */
#include <stdlib.h>
#include <string.h>

#include "kne_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *nul = memchr(data, '\0', size);
    size_t         json_n = nul ? (size_t) (nul - data) : size;
    const char    *text = (const char *) data + json_n + (nul != NULL);
    size_t         text_n = size - json_n - (nul != NULL);
    kne_tokenizer *t;
    kne_err        err = { 0 };

    if (kne_tokenizer_parse((const char *) data, json_n, &t, &err) != KNE_OK)
    {
        if (t || err.code == KNE_OK || err.code == KNE_ERR_INTERNAL || !err.msg[0])
            abort();
        return 0;
    }
    for (int special = 0; special < 2; special++)
    {
        kne_ids    ids = { 0 }, again = { 0 };
        char      *back;
        size_t     n;
        kne_status st = kne_tokenizer_encode(t, text, text_n, special, &ids, &err);

        if (kne_tokenizer_encode(t, text, text_n, special, &again, &err) != st ||
            ids.n != again.n ||
            (ids.n && memcmp(ids.id, again.id, (size_t) ids.n * sizeof *ids.id)))
            abort();
        for (int32_t i = 0; i < ids.n; i++)
            if (!kne_tokenizer_token(t, ids.id[i]))
                abort();
        st = kne_tokenizer_decode(t, ids.id, ids.n, special, &back, &n, &err);
        if (st == KNE_OK ? back[n] != '\0' : back != NULL || st == KNE_ERR_INVALID)
            abort();
        free(back);
        kne_ids_free(&ids);
        kne_ids_free(&again);
    }
    kne_tokenizer_free(t);
    return 0;
}
