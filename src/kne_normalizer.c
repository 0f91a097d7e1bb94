/*
 * kne_normalizer.c - the normaliser of tokenizer.json: a list of stages, each
 * from one buffer to another. Unicode forms are utf8proc's.
 *
 * Besides the text, a stage keeps track of whether its first character still
 * is (or grew from) the first character of the input: Metaspace's "first" asks.
 */
#include <stdlib.h>
#include <utf8proc.h>

#include "kne_tokenizer_impl.h"

/*
 * Canonical ordering of marks is quadratic in their number in a row; text has
 * a few, Unicode's stream-safe format allows 30.
 */
#define MAX_MARKS 1024

typedef enum norm_kind
{
    NORM_FORM, /* NFC, NFD, NFKC, NFKD */
    NORM_PREPEND,
    NORM_REPLACE,
    NORM_STRIP,
    NORM_LOWERCASE,
    NORM_STRIP_ACCENTS,
    NORM_BYTE_LEVEL
} norm_kind;

struct kne_norm_stage
{
    norm_kind   kind;
    int         form; /* options of utf8proc */
    kne_pattern pattern;
    char       *text; /* to prepend, or to put in place of matches */
    size_t      text_n;
    bool        left, right; /* strip */
};

static kne_status
load(kne_normalizer *norm, cJSON *json, int depth, kne_err *err)
{
    static const struct
    {
        const char *type;
        norm_kind   kind;
        int         form;
    } known[] = {
        { "NFC", NORM_FORM, UTF8PROC_STABLE | UTF8PROC_COMPOSE },
        { "NFD", NORM_FORM, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE },
        { "NFKC", NORM_FORM, UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT },
        { "NFKD", NORM_FORM, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT },
        { "Prepend", NORM_PREPEND, 0 },
        { "Replace", NORM_REPLACE, 0 },
        { "Strip", NORM_STRIP, 0 },
        { "Lowercase", NORM_LOWERCASE, 0 },
        { "StripAccents", NORM_STRIP_ACCENTS, 0 },
        { "ByteLevel", NORM_BYTE_LEVEL, 0 },
    };
    const char     *type = kne_tokjson_type(json);
    kne_norm_stage *stage;
    size_t          i;

    if (type && strcmp(type, "Sequence") == 0)
    {
        cJSON *list = kne_tokjson_get(json, "normalizers"), *item;

        if (!list || !cJSON_IsArray(list) || depth == KNE_TOK_MAX_DEPTH)
            return kne_error(err, KNE_ERR_FORMAT, "tokenizer's normalizer Sequence is malformed");
        cJSON_ArrayForEach(item, list)
            KNE_TRY(load(norm, item, depth + 1, err));
        return KNE_OK;
    }
    for (i = 0; i < sizeof known / sizeof *known; i++)
        if (type && strcmp(type, known[i].type) == 0)
            break;
    if (i == sizeof known / sizeof *known)
        return kne_tok_unsupported(err, "normalizer", type);
    if (norm->n == KNE_TOK_MAX_STAGE)
        return kne_error(err, KNE_ERR_LIMIT, "tokenizer has too many normalizers");
    if (norm->n == norm->cap)
        KNE_TRY(kne_tok_grow((void **) &norm->stage, &norm->cap, norm->n, sizeof *norm->stage,
                             err));
    stage = &norm->stage[norm->n++];
    *stage = (kne_norm_stage) { .kind = known[i].kind, .form = known[i].form };
    switch (stage->kind)
    {
        case NORM_PREPEND:
            return kne_tokjson_string(json, "prepend", "Prepend", &stage->text, &stage->text_n,
                                      err);
        case NORM_REPLACE:
            KNE_TRY(kne_pattern_load(json, "Replace", &stage->pattern, err));
            return kne_tokjson_string(json, "content", "Replace", &stage->text, &stage->text_n,
                                      err);
        case NORM_STRIP:
            KNE_TRY(kne_tokjson_bool(json, "strip_left", true, &stage->left, err));
            return kne_tokjson_bool(json, "strip_right", true, &stage->right, err);
        default:
            return KNE_OK;
    }
}

kne_status
kne_normalizer_load(kne_normalizer *norm, cJSON *json, kne_err *err)
{
    return json ? load(norm, json, 0, err) : KNE_OK;
}

void
kne_normalizer_free(kne_normalizer *norm)
{
    for (size_t i = 0; i < norm->n; i++)
    {
        kne_pattern_free(&norm->stage[i].pattern);
        free(norm->stage[i].text);
    }
    free(norm->stage);
    *norm = (kne_normalizer) { 0 };
}

/*
 * Characters that got a decomposition or a combining class in Unicode 10 to 15.
 * The library's tables end before: it leaves these as they are, and nothing is
 * ordered or composed across them. Models were trained on what it does.
 */
static const uint32_t left_alone[][2] = {
    { 0x7FD, 0x7FD },     { 0x898, 0x89F },     { 0x8CA, 0x8D3 },     { 0x9FE, 0x9FE },
    { 0xC3C, 0xC3C },     { 0xD3B, 0xD3C },     { 0xEBA, 0xEBA },     { 0x1715, 0x1715 },
    { 0x1ABF, 0x1ACE },   { 0x1DF6, 0x1DFA },   { 0x32FF, 0x32FF },   { 0xA7F2, 0xA7F4 },
    { 0xA82C, 0xA82C },   { 0xAB69, 0xAB69 },   { 0x10781, 0x10785 }, { 0x10787, 0x107B0 },
    { 0x107B2, 0x107BA }, { 0x10D24, 0x10D27 }, { 0x10EAB, 0x10EAC }, { 0x10EFD, 0x10EFF },
    { 0x10F46, 0x10F50 }, { 0x10F82, 0x10F85 }, { 0x11070, 0x11070 }, { 0x1133B, 0x1133B },
    { 0x1145E, 0x1145E }, { 0x11839, 0x1183A }, { 0x11930, 0x11930 }, { 0x11938, 0x11938 },
    { 0x1193D, 0x1193E }, { 0x11943, 0x11943 }, { 0x119E0, 0x119E0 }, { 0x11A34, 0x11A34 },
    { 0x11A47, 0x11A47 }, { 0x11A99, 0x11A99 }, { 0x11D42, 0x11D42 }, { 0x11D44, 0x11D45 },
    { 0x11D97, 0x11D97 }, { 0x11F41, 0x11F42 }, { 0x16FF0, 0x16FF1 }, { 0x1E030, 0x1E06D },
    { 0x1E08F, 0x1E08F }, { 0x1E130, 0x1E136 }, { 0x1E2AE, 0x1E2AE }, { 0x1E2EC, 0x1E2EF },
    { 0x1E4EC, 0x1E4EF }, { 0x1F16C, 0x1F16C }, { 0x1FBF0, 0x1FBF9 },
};

static bool
is_left_alone(uint32_t cp)
{
    size_t lo = 0, hi = sizeof left_alone / sizeof *left_alone;

    while (lo < hi)
    {
        size_t mid = (lo + hi) / 2;

        if (left_alone[mid][1] < cp)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < sizeof left_alone / sizeof *left_alone && left_alone[lo][0] <= cp;
}

static kne_status
unicode_run(int form, const char *s, size_t n, kne_tokbuf *out, kne_err *err)
{
    utf8proc_uint8_t *made;
    utf8proc_ssize_t  len;
    kne_status        st;

    len = utf8proc_map((const utf8proc_uint8_t *) s, (utf8proc_ssize_t) n, &made,
                       (utf8proc_option_t) form);
    if (len == UTF8PROC_ERROR_NOMEM)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    if (len < 0)
        return kne_error(err, KNE_ERR_INTERNAL, "unicode normalisation failed: %s",
                         utf8proc_errmsg(len));
    st = kne_tokbuf_add(out, made, (size_t) len, err);
    free(made);
    return st;
}

static kne_status
unicode_form(int form, const char *s, size_t n, kne_tokbuf *out, kne_err *err)
{
    /* Below U+0300 nothing composes; below U+00A0 nothing changes at all. */
    uint32_t plain_end = (form & UTF8PROC_COMPOSE) && !(form & UTF8PROC_COMPAT) ? 0x300 : 0xA0;
    size_t   from = 0, marks = 0;
    bool     plain = true; /* from on */

    for (size_t i = 0, k = 1; i <= n; i += k)
    {
        uint32_t cp = i < n ? kne_u8_get(s + i, &k) : 0;
        bool     cut;

        if (i < n && cp < plain_end)
        {
            marks = 0;
            continue;
        }
        cut = i == n || is_left_alone(cp);
        if (cut && plain)
            KNE_TRY(kne_tokbuf_add(out, s + from, i - from, err));
        else if (cut)
            KNE_TRY(unicode_run(form, s + from, i - from, out, err));
        if (i == n)
            break;
        plain = cut;
        if (cut)
        {
            KNE_TRY(kne_tokbuf_add(out, s + i, k, err));
            from = i + k;
        }
        marks = utf8proc_get_property((utf8proc_int32_t) cp)->combining_class ? marks + 1 : 0;
        if (marks > MAX_MARKS)
            return kne_error(err, KNE_ERR_LIMIT, "more than %d combining marks in a row",
                             MAX_MARKS);
    }
    return KNE_OK;
}

static kne_status
replace(const kne_norm_stage *stage, kne_matcher *m, const char *s, size_t n, bool *start,
        kne_tokbuf *out, kne_err *err)
{
    kne_regex_at at = KNE_REGEX_START;
    size_t       done = 0;
    bool         found;

    for (;;)
    {
        KNE_TRY(kne_pattern_next(&stage->pattern, m, s, n, &at, &found, err));
        if (!found)
            break;
        /* What is put in stands where the last character taken out stood. */
        if (at.start == 0 && at.end > 0 && (stage->text_n == 0 || at.end > kne_u8_len(s)))
            *start = false;
        KNE_TRY(kne_tokbuf_add(out, s + done, at.start - done, err));
        KNE_TRY(kne_tokbuf_add(out, stage->text, stage->text_n, err));
        done = at.end;
    }
    return kne_tokbuf_add(out, s + done, n - done, err);
}

/* Character by character: lower case, without marks, or to the byte-level alphabet. */
static kne_status
map_chars(norm_kind kind, const char *s, size_t n, bool *start, kne_tokbuf *out, kne_err *err)
{
    for (size_t i = 0, k; i < n; i += k)
    {
        uint32_t cp = kne_u8_get(s + i, &k);
        char    *to;

        KNE_TRY(kne_tokbuf_reserve(out, 8, err));
        to = out->s + out->n;
        if (kind == NORM_BYTE_LEVEL)
            for (size_t j = 0; j < k; j++)
                out->n += kne_u8_put(kne_byte_to_char((uint8_t) s[i + j]), out->s + out->n);
        else if (kind == NORM_STRIP_ACCENTS)
        {
            if (!kne_char_is_mark(cp))
                out->n += kne_u8_put(cp, to);
            else if (i == 0)
                *start = false;
        }
        else if (cp == 0x130) /* the only lower case of two characters */
        {
            memcpy(to, "i\xCC\x87", 3);
            out->n += 3;
        }
        else
            out->n += kne_u8_put((uint32_t) utf8proc_tolower((utf8proc_int32_t) cp), to);
    }
    return KNE_OK;
}

static kne_status
run_stage(const kne_norm_stage *stage, kne_matcher *m, const char *s, size_t n, bool *start,
          kne_tokbuf *out, kne_err *err)
{
    size_t k;

    switch (stage->kind)
    {
        case NORM_FORM:
            return unicode_form(stage->form, s, n, out, err);
        case NORM_PREPEND:
            if (n > 0)
                KNE_TRY(kne_tokbuf_add(out, stage->text, stage->text_n, err));
            return kne_tokbuf_add(out, s, n, err);
        case NORM_REPLACE:
            return replace(stage, m, s, n, start, out, err);
        case NORM_STRIP:
            while (stage->left && n > 0 && kne_char_is_space(kne_u8_get(s, &k)))
            {
                s += k;
                n -= k;
                *start = false;
            }
            while (stage->right && n > 0 && kne_char_is_space(kne_u8_last(s, n, &k)))
                n -= k;
            return kne_tokbuf_add(out, s, n, err);
        default:
            return map_chars(stage->kind, s, n, start, out, err);
    }
}

kne_status
kne_normalizer_run(const kne_normalizer *norm, kne_matcher *m, const char *s, size_t n, bool *start,
                   kne_tokbuf tmp[2], kne_tokbuf *out, kne_err *err)
{
    if (norm->n == 0)
        return kne_tokbuf_add(out, s, n, err);
    for (size_t i = 0; i < norm->n; i++)
    {
        kne_tokbuf *to = i + 1 == norm->n ? out : &tmp[i % 2];

        if (to != out)
            to->n = 0;
        KNE_TRY(run_stage(&norm->stage[i], m, s, n, start, to, err));
        s = to->s;
        n = to->n;
    }
    return KNE_OK;
}
