/*
 * kne_tokenizer.h - tokenizer.json (Hugging Face tokenizers' format), read and
 * run: added tokens, normaliser, pre-tokeniser, BPE, post-processor, decoder.
 *
 * Invariant: what the file says is what happens; a component this engine lacks
 * is refused at load time by its name, never ignored. A loaded tokenizer is
 * read-only and may be used by several threads at once (each call allocates
 * its own scratch).
 */
#ifndef KNE_TOKENIZER_H
#define KNE_TOKENIZER_H

#include "kne_base.h"

typedef struct kne_tokenizer kne_tokenizer;

/* Ids grown by the functions below; start from {0}, release with kne_ids_free. */
typedef struct kne_ids
{
    int32_t *id;
    int32_t  n, cap;
} kne_ids;
void kne_ids_free(kne_ids *ids);

/*
 * Load from memory. KNE_ERR_FORMAT for broken JSON or impossible content,
 * KNE_ERR_UNSUPPORTED for a component that is not implemented.
 */
kne_status kne_tokenizer_parse(const char *json, size_t len, kne_tokenizer **out, kne_err *err);
kne_status kne_tokenizer_open(const char *path, kne_tokenizer **out, kne_err *err);
void       kne_tokenizer_free(kne_tokenizer *t);

/*
 * Encode len bytes of UTF-8 (need not end in NUL). special: let the
 * post-processor add its tokens. Appends to *ids. KNE_ERR_INVALID for invalid
 * UTF-8. Special tokens' texts inside the input are recognised, as the
 * tokenizers library does.
 */
kne_status kne_tokenizer_encode(const kne_tokenizer *t, const char *text, size_t len, bool special,
                                kne_ids *ids, kne_err *err);

/*
 * Decode ids by the file's decoder. skip_special: leave special tokens out.
 * *text is malloc'ed, NUL-terminated, *len without the NUL. Byte sequences that
 * are not UTF-8 become U+FFFD, as the library does. KNE_ERR_INVALID for an id outside
 * the vocabulary.
 */
kne_status kne_tokenizer_decode(const kne_tokenizer *t, const int32_t *id, int32_t n, bool skip_special,
                                char **text, size_t *len, kne_err *err);

int32_t     kne_tokenizer_vocab_size(const kne_tokenizer *t); /* largest id + 1, added tokens included */
int32_t     kne_tokenizer_token_id(const kne_tokenizer *t, const char *token); /* -1: no such token */
const char *kne_tokenizer_token(const kne_tokenizer *t, int32_t id); /* raw vocabulary text, NULL: none */
bool        kne_tokenizer_is_special(const kne_tokenizer *t, int32_t id);

#endif
