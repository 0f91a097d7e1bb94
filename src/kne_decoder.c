/*
 * kne_decoder.c - the decoder of tokenizer.json: stages from a list of strings
 * (one for each token) to a list of strings, joined at the end.
 */
#include <stdlib.h>

#include "kne_tokenizer_impl.h"

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

typedef enum dec_kind
{
    DEC_BYTE_LEVEL,
    DEC_METASPACE,
    DEC_REPLACE,
    DEC_BYTE_FALLBACK,
    DEC_FUSE,
    DEC_STRIP
} dec_kind;

struct kne_dec_stage
{
    dec_kind    kind;
    kne_pattern pattern;
    char       *text; /* put in place of matches; or the character of Strip and Metaspace */
    size_t      text_n;
    int32_t     left, right; /* Strip: at most so many characters */
    bool        drop_first;  /* Metaspace: the mark in the first token was put there by us */
};

static kne_status
load_stage(kne_dec_stage *stage, cJSON *json, kne_err *err)
{
    bool add;

    switch (stage->kind)
    {
        case DEC_REPLACE:
            KNE_TRY(kne_pattern_load(json, "Replace", &stage->pattern, err));
            return kne_tokjson_string(json, "content", "Replace", &stage->text, &stage->text_n,
                                      err);
        case DEC_STRIP:
            KNE_TRY(kne_tokjson_int(json, "start", -1, INT32_MAX, &stage->left, err));
            KNE_TRY(kne_tokjson_int(json, "stop", -1, INT32_MAX, &stage->right, err));
            KNE_TRY(kne_tokjson_string(json, "content", "Strip", &stage->text, &stage->text_n,
                                       err));
            break;
        case DEC_METASPACE:
        {
            const char *scheme = cJSON_GetStringValue(kne_tokjson_get(json, "prepend_scheme"));

            KNE_TRY(kne_tokjson_bool(json, "add_prefix_space", true, &add, err));
            stage->drop_first = scheme ? strcmp(scheme, "never") != 0 : add;
            KNE_TRY(kne_tokjson_string(json, "replacement", "Metaspace", &stage->text,
                                       &stage->text_n, err));
            break;
        }
        default:
            return KNE_OK;
    }
    if (stage->text_n == 0 || kne_u8_len(stage->text) != stage->text_n)
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's %s decoder does not name one character",
                         stage->kind == DEC_STRIP ? "Strip" : "Metaspace");
    return KNE_OK;
}

static kne_status
load(kne_decoder *dec, cJSON *json, int depth, kne_err *err)
{
    static const char *const known[] = { "ByteLevel",    "Metaspace", "Replace",
                                         "ByteFallback", "Fuse",      "Strip" };
    const char *type = kne_tokjson_type(json);
    size_t      i;

    if (type && strcmp(type, "Sequence") == 0)
    {
        cJSON *list = kne_tokjson_get(json, "decoders"), *item;

        if (!list || !cJSON_IsArray(list) || depth == KNE_TOK_MAX_DEPTH)
            return kne_error(err, KNE_ERR_FORMAT, "tokenizer's decoder Sequence is malformed");
        cJSON_ArrayForEach(item, list)
            KNE_TRY(load(dec, item, depth + 1, err));
        return KNE_OK;
    }
    for (i = 0; i < sizeof known / sizeof *known; i++)
        if (type && strcmp(type, known[i]) == 0)
            break;
    if (i == sizeof known / sizeof *known)
        return kne_tok_unsupported(err, "decoder", type);
    if (dec->n == KNE_TOK_MAX_STAGE)
        return kne_error(err, KNE_ERR_LIMIT, "tokenizer has too many decoders");
    if (dec->n == dec->cap)
        KNE_TRY(kne_tok_grow((void **) &dec->stage, &dec->cap, dec->n, sizeof *dec->stage, err));
    dec->stage[dec->n] = (kne_dec_stage) { .kind = (dec_kind) i };
    return load_stage(&dec->stage[dec->n++], json, err);
}

kne_status
kne_decoder_load(kne_decoder *dec, cJSON *json, kne_err *err)
{
    dec->present = json != NULL;
    return json ? load(dec, json, 0, err) : KNE_OK;
}

void
kne_decoder_free(kne_decoder *dec)
{
    for (size_t i = 0; i < dec->n; i++)
    {
        kne_pattern_free(&dec->stage[i].pattern);
        free(dec->stage[i].text);
    }
    free(dec->stage);
    *dec = (kne_decoder) { 0 };
}

/* The bytes a token stands for; a token with a character outside the alphabet is itself. */
static kne_status
from_alphabet(const char *s, size_t n, kne_tokbuf *out, kne_err *err)
{
    size_t before = out->n;

    KNE_TRY(kne_tokbuf_reserve(out, n, err));
    for (size_t i = 0, k; i < n; i += k)
    {
        int b = kne_char_to_byte(kne_u8_get(s + i, &k));

        if (b < 0)
        {
            out->n = before;
            return kne_tokbuf_add(out, s, n, err);
        }
        out->s[out->n++] = (char) b;
    }
    return KNE_OK;
}

static kne_status
byte_level(const kne_strings *in, kne_strings *out, kne_err *err)
{
    kne_tokbuf bytes = { 0 };
    kne_status st = KNE_OK;

    for (size_t i = 0; i < in->pieces.n && st == KNE_OK; i++)
        st = from_alphabet(in->buf.s + in->pieces.p[i].at, in->pieces.p[i].n, &bytes, err);
    if (st == KNE_OK)
        st = kne_u8_add_lossy(&out->buf, bytes.s, bytes.n, err);
    if (st == KNE_OK)
        st = kne_pieces_add(&out->pieces, 0, out->buf.n, -1, false, err);
    kne_tokbuf_free(&bytes);
    return st;
}

static int
hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The byte of "<0xE2>", -1 for any other token. */
static int
fallback_byte(const char *s, size_t n)
{
    int high, low;

    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    high = hex_digit(s[3]);
    low = hex_digit(s[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

/* Runs of byte tokens become text, or as many U+FFFD when they are none. */
static kne_status
byte_fallback(const kne_strings *in, kne_strings *out, kne_err *err)
{
    const kne_piece *p = in->pieces.p;
    size_t           at;

    for (size_t i = 0, j; i < in->pieces.n; i = j)
    {
        int b = fallback_byte(in->buf.s + p[i].at, p[i].n);

        at = out->buf.n;
        if (b < 0)
        {
            KNE_TRY(kne_tokbuf_add(&out->buf, in->buf.s + p[i].at, p[i].n, err));
            KNE_TRY(kne_pieces_add(&out->pieces, at, p[i].n, -1, false, err));
            j = i + 1;
            continue;
        }
        for (j = i; j < in->pieces.n && (b = fallback_byte(in->buf.s + p[j].at, p[j].n)) >= 0; j++)
        {
            char c = (char) b;

            KNE_TRY(kne_tokbuf_add(&out->buf, &c, 1, err));
        }
        if (kne_u8_valid(out->buf.s + at, out->buf.n - at))
            KNE_TRY(kne_pieces_add(&out->pieces, at, out->buf.n - at, -1, false, err));
        else
        {
            out->buf.n = at;
            for (size_t k = i; k < j; k++)
            {
                KNE_TRY(kne_pieces_add(&out->pieces, out->buf.n, 3, -1, false, err));
                KNE_TRY(kne_tokbuf_add(&out->buf, REPLACEMENT, 3, err));
            }
        }
    }
    return KNE_OK;
}

static bool
is_char(const char *s, size_t n, const kne_dec_stage *stage)
{
    return n >= stage->text_n && memcmp(s, stage->text, stage->text_n) == 0;
}

/* Replace, Strip and Metaspace go token by token. */
static kne_status
one_token(const kne_dec_stage *stage, kne_matcher *m, const char *s, size_t n, bool first,
          kne_tokbuf *out, kne_err *err)
{
    kne_regex_at at = KNE_REGEX_START;
    size_t       done = 0, stop = n;
    bool         found;

    if (stage->kind == DEC_REPLACE)
    {
        for (;;)
        {
            KNE_TRY(kne_pattern_next(&stage->pattern, m, s, n, &at, &found, err));
            if (!found)
                return kne_tokbuf_add(out, s + done, n - done, err);
            KNE_TRY(kne_tokbuf_add(out, s + done, at.start - done, err));
            KNE_TRY(kne_tokbuf_add(out, stage->text, stage->text_n, err));
            done = at.end;
        }
    }
    if (stage->kind == DEC_STRIP)
    {
        for (int32_t i = 0; i < stage->left && is_char(s + done, n - done, stage); i++)
            done += stage->text_n;
        for (int32_t i = 0; i < stage->right && stop - done >= stage->text_n &&
                            is_char(s + stop - stage->text_n, stage->text_n, stage);
             i++)
            stop -= stage->text_n;
        return kne_tokbuf_add(out, s + done, stop - done, err);
    }
    for (size_t k; done < n; done += k)
    {
        k = kne_u8_len(s + done);
        if (k != stage->text_n || !is_char(s + done, n - done, stage))
            KNE_TRY(kne_tokbuf_add(out, s + done, k, err));
        else if (!(first && stage->drop_first))
            KNE_TRY(kne_tokbuf_add(out, " ", 1, err));
    }
    return KNE_OK;
}

static kne_status
run_stage(const kne_dec_stage *stage, kne_matcher *m, const kne_strings *in, kne_strings *out,
          kne_err *err)
{
    switch (stage->kind)
    {
        case DEC_BYTE_LEVEL:
            return byte_level(in, out, err);
        case DEC_BYTE_FALLBACK:
            return byte_fallback(in, out, err);
        case DEC_FUSE:
            for (size_t i = 0; i < in->pieces.n; i++)
                KNE_TRY(kne_tokbuf_add(&out->buf, in->buf.s + in->pieces.p[i].at,
                                       in->pieces.p[i].n, err));
            return kne_pieces_add(&out->pieces, 0, out->buf.n, -1, false, err);
        default:
            for (size_t i = 0; i < in->pieces.n; i++)
            {
                const kne_piece *p = &in->pieces.p[i];
                size_t           at = out->buf.n;

                KNE_TRY(one_token(stage, m, in->buf.s + p->at, p->n, i == 0, &out->buf, err));
                KNE_TRY(kne_pieces_add(&out->pieces, at, out->buf.n - at, -1, false, err));
            }
            return KNE_OK;
    }
}

kne_status
kne_decoder_run(const kne_decoder *dec, kne_strings *tokens, kne_strings *spare, kne_err *err)
{
    kne_matcher m = { 0 };
    kne_status  st = KNE_OK;

    for (size_t i = 0; i < dec->n && st == KNE_OK; i++)
    {
        kne_strings made;

        spare->buf.n = spare->pieces.n = 0;
        /* texts may all be empty: pointers into the buffer must still be pointers */
        st = kne_tokbuf_reserve(&tokens->buf, 1, err);
        if (st == KNE_OK)
            st = run_stage(&dec->stage[i], &m, tokens, spare, err);
        made = *spare;
        *spare = *tokens;
        *tokens = made;
    }
    kne_matcher_free(&m);
    return st;
}
