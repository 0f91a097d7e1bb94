/*
 * kne_tokenizer_impl.h - what the files of the tokenizer share and nobody else
 * includes: text helpers, regular expressions, the stages, the loaded form.
 *
 * The stages are flat arrays: a Sequence in the file only means "one after the
 * other", so it is unrolled at load time. Everything reached from kne_tokenizer
 * is read-only after loading; what a call needs besides lives in kne_scratch.
 */
#ifndef KNE_TOKENIZER_IMPL_H
#define KNE_TOKENIZER_IMPL_H

#include <cjson/cJSON.h>
#include <string.h>

#include "kne_tokenizer.h"

#define KNE_TOK_MAX_ID    (16 * 1024 * 1024) /* ids from a file are below this */
#define KNE_TOK_MAX_TEXT  ((size_t) 1 << 30) /* of a file, and of a text to encode or decode */
#define KNE_TOK_MAX_STAGE 64                 /* components of one kind, Sequences unrolled */
#define KNE_TOK_MAX_DEPTH 16                 /* Sequences within Sequences */

/* ---- kne_tokenizer_text.c: growing buffers and UTF-8 ---- */

typedef struct kne_tokbuf
{
    char  *s;
    size_t n, cap;
} kne_tokbuf;

kne_status kne_tokbuf_reserve(kne_tokbuf *b, size_t more, kne_err *err);
kne_status kne_tokbuf_add(kne_tokbuf *b, const void *s, size_t n, kne_err *err);
void       kne_tokbuf_free(kne_tokbuf *b);
/* Make room for one more element in an array that doubles. */
kne_status kne_tok_grow(void **p, size_t *cap, size_t n, size_t elem_size, kne_err *err);

bool   kne_u8_valid(const char *s, size_t n);
size_t kne_u8_put(uint32_t cp, char *out); /* bytes written, at most 4 */
/*
 * How many bytes of s to show in a message: at most max, no character cut, and
 * up to a NUL or what stands for one (kne_tokjson_parse).
 */
int kne_u8_prefix(const char *s, size_t n, size_t max);
/* Append s, each maximal ill-formed part replaced by U+FFFD (as WHATWG and Rust do it). */
kne_status kne_u8_add_lossy(kne_tokbuf *out, const char *s, size_t n, kne_err *err);
/* General category etc. of the character; White_Space; what Rust's regex calls \w. */
bool kne_char_is_space(uint32_t cp);
bool kne_char_is_word(uint32_t cp);
bool kne_char_is_number(uint32_t cp); /* Nd, Nl, No */
bool kne_char_is_mark(uint32_t cp);   /* Mn, Mc, Me */
bool kne_char_is_punct(uint32_t cp);  /* P*, and the ASCII symbols */

/* The bytes of the character at s; the text must have been validated. */
static inline size_t
kne_u8_len(const char *s)
{
    unsigned char c = (unsigned char) *s;

    return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}
/* Decode a character of validated text; *n is its length. */
static inline uint32_t
kne_u8_get(const char *s, size_t *n)
{
    const unsigned char *u = (const unsigned char *) s;

    *n = kne_u8_len(s);
    switch (*n)
    {
        case 1: return u[0];
        case 2: return (u[0] & 0x1Fu) << 6 | (u[1] & 0x3Fu);
        case 3: return (u[0] & 0x0Fu) << 12 | (u[1] & 0x3Fu) << 6 | (u[2] & 0x3Fu);
        default:
            return (u[0] & 0x07u) << 18 | (u[1] & 0x3Fu) << 12 | (u[2] & 0x3Fu) << 6 |
                   (u[3] & 0x3Fu);
    }
}
/* The character that ends before s + n (n > 0, validated). */
static inline uint32_t
kne_u8_last(const char *s, size_t n, size_t *char_len)
{
    size_t i = n - 1;

    while (i > 0 && ((unsigned char) s[i] & 0xC0) == 0x80)
        i--;
    return kne_u8_get(s + i, char_len);
}

/* The byte-level alphabet of GPT-2: each byte is shown as one printable character. */
uint32_t kne_byte_to_char(uint8_t b);
int      kne_char_to_byte(uint32_t cp); /* -1: not of the alphabet */

/* ---- kne_tokenizer_regex.c ---- */

typedef struct kne_regex kne_regex;

/* What one call needs to match; start from {0}. */
typedef struct kne_matcher
{
    void *data, *context, *stack; /* of PCRE2 */
} kne_matcher;

/* A position in the matches of one text: start from {0} with last_match = SIZE_MAX. */
typedef struct kne_regex_at
{
    size_t start, end;       /* of the match found */
    size_t from, last_match; /* internal */
} kne_regex_at;

kne_status kne_regex_compile(const char *pattern, size_t n, kne_regex **out, kne_err *err);
void       kne_regex_free(kne_regex *re);
void       kne_matcher_free(kne_matcher *m);
/* The next match, left to right; *found is false after the last one. */
kne_status kne_regex_next(const kne_regex *re, kne_matcher *m, const char *s, size_t n,
                          kne_regex_at *at, bool *found, kne_err *err);

/* What Split and Replace search for: a regular expression, or a plain string. */
typedef struct kne_pattern
{
    kne_regex *re; /* NULL: the string */
    char      *text;
    size_t     n;
} kne_pattern;

kne_status kne_pattern_load(cJSON *json, const char *owner, kne_pattern *out, kne_err *err);
void       kne_pattern_free(kne_pattern *p);
kne_status kne_pattern_next(const kne_pattern *p, kne_matcher *m, const char *s, size_t n,
                            kne_regex_at *at, bool *found, kne_err *err);

#define KNE_REGEX_START ((kne_regex_at) { .last_match = SIZE_MAX })

/* ---- kne_tokenizer_json.c: reading fields, each with its error ---- */

cJSON *kne_tokjson_get(cJSON *object, const char *name); /* NULL: absent, or JSON null */
const char *kne_tokjson_type(cJSON *object);             /* its "type", NULL: none */
/*
 * The text of a string, its length apart because it may contain NUL. A text is
 * asked for once only: this puts the NULs back (see kne_tokjson_parse).
 */
char      *kne_tokjson_text(char *s, size_t *n);
kne_status kne_tokjson_string(cJSON *object, const char *name, const char *owner, char **s,
                              size_t *n, kne_err *err); /* malloc'ed copy */
kne_status kne_tokjson_bool(cJSON *object, const char *name, bool missing, bool *value,
                            kne_err *err);
/* An integer of [0, limit); missing < 0: the field is required. */
kne_status kne_tokjson_int(cJSON *object, const char *name, int32_t missing, int32_t limit,
                        int32_t *value, kne_err *err);
bool       kne_tokjson_to_int(const cJSON *item, int32_t limit, int32_t *value);
kne_status kne_tokjson_parse(const char *text, size_t n, cJSON **root, kne_err *err);

/* ---- kne_bpe.c: vocabulary and model ---- */

enum
{
    KNE_TOK_ADDED   = 1, /* of added_tokens */
    KNE_TOK_SPECIAL = 2,
    KNE_TOK_RENAMED = 4  /* added, and its normalised form is another text */
};

typedef struct kne_token
{
    uint32_t at, n; /* in the pool; at = 0: no such token */
} kne_token;

typedef struct kne_vocab_slot
{
    uint32_t hash;
    int32_t  id1; /* id + 1; 0: empty */
} kne_vocab_slot;

typedef struct kne_merge_slot
{
    uint32_t left1, right; /* left + 1; 0: empty */
    uint32_t rank;
    int32_t  id; /* of the joined token */
} kne_merge_slot;

typedef struct kne_bpe
{
    kne_arena       arena;
    char           *pool;       /* every token's text, each ended by NUL; offset 0 is not used */
    size_t          pool_n;
    kne_token      *token;      /* (n_id) */
    uint8_t        *flags;      /* (n_id) */
    kne_vocab_slot *vocab;      /* (vocab_mask + 1), the model's tokens only */
    kne_merge_slot *merge;      /* (1 << merge_bits), on its own */
    uint16_t       *first_char; /* (n_id) hashes of characters, for may_join; NULL: byte level */
    uint16_t       *last_char;
    uint8_t        *may_join;   /* bitmap */
    int32_t         n_id;
    uint32_t        vocab_mask;
    int             merge_bits;
    int32_t         unk; /* -1: none */
    bool            unk_lost; /* an unknown token is named, but not in the vocabulary */
    bool            fuse_unk, byte_fallback, ignore_merges;
    int32_t         ascii[128];    /* ids of the one-character tokens */
    int32_t         level[256];    /* ids of the byte-level characters */
    int32_t         fallback[256]; /* ids of <0x00> ... <0xFF> */
    bool            level_full;    /* no -1 in level */
} kne_bpe;

/* added: the array of added tokens, whose texts get room in the pool too; file_n: its length. */
kne_status kne_bpe_load(kne_bpe *bpe, cJSON *model, cJSON *added, size_t file_n, bool byte_level,
                        kne_err *err);
void       kne_bpe_free(kne_bpe *bpe);
int32_t    kne_bpe_find(const kne_bpe *bpe, const char *s, size_t n); /* -1: none */
/* Put an added token that the model does not have. */
kne_status kne_bpe_add_token(kne_bpe *bpe, int32_t id, const char *s, size_t n, kne_err *err);

/* What the merging of one word needs. */
typedef struct kne_bpe_scratch
{
    int32_t   *sym; /* symbols of the word at hand */
    size_t     n, cap;
    void      *heap_mem; /* of a long word */
    size_t     heap_cap;
    kne_tokbuf text; /* a piece in the byte-level alphabet */
} kne_bpe_scratch;
void kne_bpe_scratch_free(kne_bpe_scratch *scratch);

/* Append the ids of one piece. byte_level: the piece is not yet in the byte-level alphabet. */
kne_status kne_bpe_encode(const kne_bpe *bpe, const char *s, size_t n, bool byte_level,
                          kne_bpe_scratch *scratch, kne_ids *ids, kne_err *err);
kne_status kne_ids_add(kne_ids *ids, int32_t id, kne_err *err);

/* ---- kne_added_tokens.c ---- */

typedef struct kne_added
{
    int32_t     id;
    bool        single_word, lstrip, rstrip, normalized, special;
    char       *text;   /* as in the file */
    size_t      n;
    char       *normal; /* as the normaliser leaves it; may be text itself */
    size_t      normal_n;
} kne_added;

/* Tokens searched for together, sorted by text. */
typedef struct kne_finder
{
    const kne_added **added;
    int32_t           n;
    bool              normal;           /* search for ->normal */
    int32_t           first[256 + 1];   /* by the first byte */
} kne_finder;

/* A piece of the text on its way: either still text, or already a token. */
typedef struct kne_piece
{
    size_t  at, n;
    int32_t id;    /* >= 0: a token */
    bool    start; /* its first character stood first in the text given to encode */
} kne_piece;

typedef struct kne_pieces
{
    kne_piece *p;
    size_t     n, cap;
} kne_pieces;

static inline kne_status
kne_pieces_add(kne_pieces *v, size_t at, size_t n, int32_t id, bool start, kne_err *err)
{
    if (v->n == v->cap)
        KNE_TRY(kne_tok_grow((void **) &v->p, &v->cap, v->n, sizeof(*v->p), err));
    v->p[v->n++] = (kne_piece) { .at = at, .n = n, .id = id, .start = start };
    return KNE_OK;
}

kne_status kne_finder_build(kne_finder *f, const kne_added *added, int32_t n, bool normal,
                            kne_err *err);
void       kne_finder_free(kne_finder *f);
/* Split text (n > 0 bytes at text + at) around the tokens found in it. */
kne_status kne_finder_split(const kne_finder *f, const char *text, size_t at, size_t n, bool start,
                            kne_pieces *out, kne_err *err);

/* ---- kne_normalizer.c ---- */

typedef struct kne_norm_stage kne_norm_stage;
typedef struct kne_normalizer
{
    kne_norm_stage *stage;
    size_t          n, cap;
} kne_normalizer;

kne_status kne_normalizer_load(kne_normalizer *norm, cJSON *json, kne_err *err);
void       kne_normalizer_free(kne_normalizer *norm);
/*
 * Append the normalised form of s to *out. *start says whether the first
 * character of s stood first in the text, and after the call the same of the
 * result. tmp: two buffers for the stages between.
 */
kne_status kne_normalizer_run(const kne_normalizer *norm, kne_matcher *m, const char *s, size_t n,
                              bool *start, kne_tokbuf tmp[2], kne_tokbuf *out, kne_err *err);

/* ---- kne_pretokenizer.c ---- */

typedef struct kne_pre_stage kne_pre_stage;
typedef struct kne_pretokenizer
{
    kne_pre_stage *stage;
    size_t         n, cap;
    bool           byte_level; /* the last stage maps to the alphabet: left to the model */
} kne_pretokenizer;

/* Text on its way through the stages. Pieces are offsets into text. */
typedef struct kne_splits
{
    const char *text;
    kne_tokbuf     buf[2]; /* text may lie in either */
    kne_pieces  pieces, next;
    kne_pieces  spans; /* of one piece; id: is a match */
} kne_splits;

kne_status kne_pretokenizer_load(kne_pretokenizer *pre, cJSON *json, kne_err *err);
void       kne_pretokenizer_free(kne_pretokenizer *pre);
kne_status kne_pretokenizer_run(const kne_pretokenizer *pre, kne_matcher *m, kne_splits *splits,
                                kne_err *err);

/* ---- kne_decoder.c ---- */

typedef struct kne_dec_stage kne_dec_stage;
typedef struct kne_decoder
{
    kne_dec_stage *stage;
    size_t         n, cap;
    bool           present; /* without a decoder, tokens are joined by spaces */
} kne_decoder;

/* Tokens on their way: pieces of buf. */
typedef struct kne_strings
{
    kne_tokbuf    buf;
    kne_pieces pieces;
} kne_strings;

kne_status kne_decoder_load(kne_decoder *dec, cJSON *json, kne_err *err);
void       kne_decoder_free(kne_decoder *dec);
kne_status kne_decoder_run(const kne_decoder *dec, kne_strings *tokens, kne_strings *spare,
                           kne_err *err);

/* ---- the whole ---- */

struct kne_tokenizer
{
    kne_bpe          bpe;
    kne_added       *added; /* (n_added), by id */
    int32_t          n_added;
    kne_finder       raw, normal; /* added tokens searched before and after the normaliser */
    kne_normalizer   norm;
    kne_pretokenizer pre;
    kne_decoder      dec;
    int32_t         *template_id; /* (n_template), -1: the text; NULL: the text only */
    int32_t          n_template;
};

kne_status kne_tok_unsupported(kne_err *err, const char *kind, const char *type);

#endif
