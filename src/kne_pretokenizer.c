/*
 * kne_pretokenizer.c - the pre-tokeniser of tokenizer.json: stages that cut
 * pieces of text into smaller ones, and a few that also rewrite the text.
 *
 * Pieces that are tokens already (added tokens) pass through untouched. A
 * ByteLevel at the end, as GPT-2, Llama 3 and Qwen have it, does not rewrite:
 * the model maps bytes to ids itself, which saves a copy twice as long.
 */
#include <stdlib.h>

#include "kne_tokenizer_impl.h"

#define GPT2_PATTERN \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

typedef enum pre_kind
{
    PRE_BYTE_LEVEL,
    PRE_SPLIT,
    PRE_CHARS, /* splits on characters of a class: digits, punctuation, white space */
    PRE_METASPACE,
    PRE_WHITESPACE /* words and runs of other visible characters */
} pre_kind;

typedef enum behavior
{
    REMOVED,
    ISOLATED,
    MERGED_WITH_PREVIOUS,
    MERGED_WITH_NEXT,
    CONTIGUOUS
} behavior;

typedef enum scheme
{
    PREPEND_ALWAYS,
    PREPEND_FIRST,
    PREPEND_NEVER
} scheme;

struct kne_pre_stage
{
    pre_kind    kind;
    behavior    behavior;
    bool        invert;
    kne_pattern pattern;
    bool (*is)(uint32_t cp); /* PRE_CHARS */
    bool   add_prefix_space; /* ByteLevel */
    scheme prepend;          /* Metaspace */
    bool   split;
    char   mark[4]; /* what stands for a space */
    size_t mark_n;
};

static kne_status
load_behavior(cJSON *json, bool required, behavior *out, kne_err *err)
{
    static const char *const names[] = { "Removed", "Isolated", "MergedWithPrevious",
                                         "MergedWithNext", "Contiguous" };
    cJSON      *item = kne_tokjson_get(json, "behavior");
    const char *name = cJSON_GetStringValue(item);

    *out = ISOLATED;
    if (!item && !required)
        return KNE_OK;
    for (size_t i = 0; name && i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
        {
            *out = (behavior) i;
            return KNE_OK;
        }
    return kne_error(err, KNE_ERR_FORMAT, "unknown behavior of a pre-tokenizer in tokenizer.json");
}

static kne_status
load_metaspace(kne_pre_stage *stage, cJSON *json, kne_err *err)
{
    const char *name = cJSON_GetStringValue(kne_tokjson_get(json, "prepend_scheme"));
    const char *mark = cJSON_GetStringValue(kne_tokjson_get(json, "replacement"));
    bool        add;

    if (!mark || !*mark || kne_u8_len(mark) != strlen(mark))
        return kne_error(err, KNE_ERR_FORMAT,
                         "the replacement of tokenizer's Metaspace is not one character");
    stage->mark_n = strlen(mark);
    memcpy(stage->mark, mark, stage->mark_n);
    KNE_TRY(kne_tokjson_bool(json, "split", true, &stage->split, err));
    KNE_TRY(kne_tokjson_bool(json, "add_prefix_space", true, &add, err));
    if (!name)
        stage->prepend = add ? PREPEND_ALWAYS : PREPEND_NEVER; /* files before schemes existed */
    else if (strcmp(name, "always") == 0)
        stage->prepend = PREPEND_ALWAYS;
    else if (strcmp(name, "first") == 0)
        stage->prepend = PREPEND_FIRST;
    else if (strcmp(name, "never") == 0)
        stage->prepend = PREPEND_NEVER;
    else
        return kne_error(err, KNE_ERR_FORMAT, "unknown prepend_scheme of tokenizer's Metaspace");
    if (!add && stage->prepend != PREPEND_NEVER)
        return kne_error(err, KNE_ERR_FORMAT,
                         "tokenizer's Metaspace contradicts itself in prepend_scheme and "
                         "add_prefix_space");
    return KNE_OK;
}

static kne_status
load_stage(kne_pre_stage *stage, const char *type, cJSON *json, kne_err *err)
{
    bool flag;

    if (strcmp(type, "ByteLevel") == 0)
    {
        stage->kind = PRE_BYTE_LEVEL;
        KNE_TRY(kne_tokjson_bool(json, "add_prefix_space", true, &stage->add_prefix_space, err));
        KNE_TRY(kne_tokjson_bool(json, "use_regex", true, &flag, err));
        if (!flag)
            return KNE_OK;
        stage->behavior = ISOLATED;
        return kne_regex_compile(GPT2_PATTERN, strlen(GPT2_PATTERN), &stage->pattern.re, err);
    }
    if (strcmp(type, "Split") == 0)
    {
        stage->kind = PRE_SPLIT;
        KNE_TRY(load_behavior(json, true, &stage->behavior, err));
        KNE_TRY(kne_tokjson_bool(json, "invert", false, &stage->invert, err));
        return kne_pattern_load(json, "Split", &stage->pattern, err);
    }
    if (strcmp(type, "Whitespace") == 0)
    {
        stage->kind = PRE_WHITESPACE;
        stage->behavior = REMOVED;
        return KNE_OK;
    }
    if (strcmp(type, "Metaspace") == 0)
    {
        stage->kind = PRE_METASPACE;
        return load_metaspace(stage, json, err);
    }
    stage->kind = PRE_CHARS;
    if (strcmp(type, "Digits") == 0)
    {
        stage->is = kne_char_is_number;
        KNE_TRY(kne_tokjson_bool(json, "individual_digits", false, &flag, err));
        stage->behavior = flag ? ISOLATED : CONTIGUOUS;
        return KNE_OK;
    }
    if (strcmp(type, "Punctuation") == 0)
    {
        stage->is = kne_char_is_punct;
        return load_behavior(json, false, &stage->behavior, err);
    }
    if (strcmp(type, "WhitespaceSplit") == 0)
    {
        stage->is = kne_char_is_space;
        stage->behavior = REMOVED;
        return KNE_OK;
    }
    return kne_tok_unsupported(err, "pre-tokenizer", type);
}

static kne_status
load(kne_pretokenizer *pre, cJSON *json, int depth, kne_err *err)
{
    const char *type = kne_tokjson_type(json);

    if (!type)
        return kne_tok_unsupported(err, "pre-tokenizer", NULL);
    if (strcmp(type, "Sequence") == 0)
    {
        cJSON *list = kne_tokjson_get(json, "pretokenizers"), *item;

        if (!list || !cJSON_IsArray(list) || depth == KNE_TOK_MAX_DEPTH)
            return kne_error(err, KNE_ERR_FORMAT,
                             "tokenizer's pre-tokenizer Sequence is malformed");
        cJSON_ArrayForEach(item, list)
            KNE_TRY(load(pre, item, depth + 1, err));
        return KNE_OK;
    }
    if (pre->n == KNE_TOK_MAX_STAGE)
        return kne_error(err, KNE_ERR_LIMIT, "tokenizer has too many pre-tokenizers");
    if (pre->n == pre->cap)
        KNE_TRY(kne_tok_grow((void **) &pre->stage, &pre->cap, pre->n, sizeof *pre->stage, err));
    pre->stage[pre->n] = (kne_pre_stage) { 0 };
    return load_stage(&pre->stage[pre->n++], type, json, err);
}

kne_status
kne_pretokenizer_load(kne_pretokenizer *pre, cJSON *json, kne_err *err)
{
    if (!json)
        return KNE_OK;
    KNE_TRY(load(pre, json, 0, err));
    pre->byte_level = pre->n > 0 && pre->stage[pre->n - 1].kind == PRE_BYTE_LEVEL;
    return KNE_OK;
}

void
kne_pretokenizer_free(kne_pretokenizer *pre)
{
    for (size_t i = 0; i < pre->n; i++)
        kne_pattern_free(&pre->stage[i].pattern);
    free(pre->stage);
    *pre = (kne_pretokenizer) { 0 };
}

/* ---- cutting ---- */

/*
 * Turn spans (the matches of one piece and what lies between, covering it) into
 * pieces. Empty spans count while merging and are dropped at the end.
 */
static kne_status
cut(kne_splits *splits, behavior how, const kne_piece *in, kne_err *err)
{
    kne_piece *span = splits->spans.p;
    size_t     n = splits->spans.n, made = 0;
    bool       before = false;

    if (how == MERGED_WITH_NEXT)
    {
        size_t to = n;

        for (size_t i = n; i-- > 0;)
        {
            bool match = span[i].id != 0;

            if (match && !before && to < n)
            {
                span[to].n += span[to].at - span[i].at;
                span[to].at = span[i].at;
            }
            else
                span[--to] = span[i];
            before = match;
        }
        span += to;
        made = n - to;
    }
    else
        for (size_t i = 0; i < n; i++)
        {
            bool match = span[i].id != 0, join = false;

            switch (how)
            {
                case REMOVED:
                    if (match)
                        continue;
                    break;
                case MERGED_WITH_PREVIOUS:
                    join = match && !before;
                    break;
                case CONTIGUOUS:
                    join = match == before;
                    break;
                default:
                    break;
            }
            before = match;
            if (join && made > 0)
                span[made - 1].n = span[i].at + span[i].n - span[made - 1].at;
            else
                span[made++] = span[i];
        }
    for (size_t i = 0; i < made; i++)
        if (span[i].n > 0)
            KNE_TRY(kne_pieces_add(&splits->next, in->at + span[i].at, span[i].n, -1,
                                   in->start && span[i].at == 0, err));
    return KNE_OK;
}

static kne_status
add_span(kne_splits *splits, size_t from, size_t to, bool match, kne_err *err)
{
    return kne_pieces_add(&splits->spans, from, to - from, match, false, err);
}

/* Cut one piece at the matches of a pattern. */
static kne_status
cut_pattern(const kne_pattern *pattern, bool invert, behavior how, kne_matcher *m,
            kne_splits *splits, const kne_piece *in, kne_err *err)
{
    const char  *s = splits->text + in->at;
    kne_regex_at at = KNE_REGEX_START;
    size_t       done = 0;
    bool         found;

    splits->spans.n = 0;
    for (;;)
    {
        KNE_TRY(kne_pattern_next(pattern, m, s, in->n, &at, &found, err));
        if (!found)
            break;
        if (how == ISOLATED) /* the usual: matches and gaps are treated alike */
        {
            if (at.start > done)
                KNE_TRY(kne_pieces_add(&splits->next, in->at + done, at.start - done, -1,
                                       in->start && done == 0, err));
            if (at.end > at.start)
                KNE_TRY(kne_pieces_add(&splits->next, in->at + at.start, at.end - at.start, -1,
                                       in->start && at.start == 0, err));
        }
        else
        {
            if (at.start != done)
                KNE_TRY(add_span(splits, done, at.start, invert, err));
            KNE_TRY(add_span(splits, at.start, at.end, !invert, err));
        }
        done = at.end;
    }
    if (done < in->n)
        KNE_TRY(add_span(splits, done, in->n, invert, err));
    return cut(splits, how, in, err);
}

/* Cut one piece at each character of a class. */
static kne_status
cut_chars(const kne_pre_stage *stage, kne_splits *splits, const kne_piece *in, kne_err *err)
{
    const char *s = splits->text + in->at;
    size_t      done = 0;

    splits->spans.n = 0;
    for (size_t i = 0, k; i < in->n; i += k)
    {
        if (!stage->is(kne_u8_get(s + i, &k)))
            continue;
        if (done < i)
            KNE_TRY(add_span(splits, done, i, false, err));
        done = i + k;
        KNE_TRY(add_span(splits, i, done, true, err));
    }
    if (done < in->n)
        KNE_TRY(add_span(splits, done, in->n, false, err));
    return cut(splits, stage->behavior, in, err);
}

/* Runs of word characters, and runs of others that are not space. */
static kne_status
cut_words(kne_splits *splits, const kne_piece *in, kne_err *err)
{
    const char *s = splits->text + in->at;
    size_t      from = 0;
    int         run = 0; /* 0: space, 1: word, 2: other */

    for (size_t i = 0, k; i < in->n; i += k)
    {
        uint32_t cp = kne_u8_get(s + i, &k);
        int      what = kne_char_is_word(cp) ? 1 : kne_char_is_space(cp) ? 0 : 2;

        if (what == run)
            continue;
        if (run)
            KNE_TRY(kne_pieces_add(&splits->next, in->at + from, i - from, -1,
                                   in->start && from == 0, err));
        from = i;
        run = what;
    }
    if (run)
        KNE_TRY(kne_pieces_add(&splits->next, in->at + from, in->n - from, -1,
                               in->start && from == 0, err));
    return KNE_OK;
}

/* ---- rewriting ---- */

static kne_tokbuf *
spare_buf(kne_splits *splits)
{
    kne_tokbuf *b = &splits->buf[splits->text == splits->buf[0].s];

    b->n = 0;
    return b;
}

/* After a stage: its pieces become the ones to go on with. */
static void
advance(kne_splits *splits)
{
    kne_pieces old = splits->pieces;

    splits->pieces = splits->next;
    splits->next = old;
    splits->next.n = 0;
}

/* Copy the pieces one by one to a spare buffer, rewritten; they stay as many. */
static kne_status
rewrite(kne_splits *splits,
        kne_status (*one)(const kne_pre_stage *stage, const char *s, const kne_piece *in,
                          kne_tokbuf *to, kne_err *err),
        const kne_pre_stage *stage, kne_err *err)
{
    kne_tokbuf *to = spare_buf(splits);

    for (size_t i = 0; i < splits->pieces.n; i++)
    {
        kne_piece *p = &splits->pieces.p[i];
        size_t     at = to->n;

        if (p->id >= 0)
            continue;
        KNE_TRY(one(stage, splits->text + p->at, p, to, err));
        p->at = at;
        p->n = to->n - at;
    }
    if (to->s)
        splits->text = to->s;
    return KNE_OK;
}

static kne_status
with_space(const kne_pre_stage *stage, const char *s, const kne_piece *in, kne_tokbuf *to,
           kne_err *err)
{
    if (s[0] != ' ')
        KNE_TRY(kne_tokbuf_add(to, " ", 1, err));
    return kne_tokbuf_add(to, s, in->n, err);
}

static kne_status
to_alphabet(const kne_pre_stage *stage, const char *s, const kne_piece *in, kne_tokbuf *to,
            kne_err *err)
{
    KNE_TRY(kne_tokbuf_reserve(to, 2 * in->n, err));
    for (size_t i = 0; i < in->n; i++)
        to->n += kne_u8_put(kne_byte_to_char((uint8_t) s[i]), to->s + to->n);
    return KNE_OK;
}

static kne_status
with_marks(const kne_pre_stage *stage, const char *s, const kne_piece *in, kne_tokbuf *to,
           kne_err *err)
{
    const char *end = s + in->n;
    bool        has = s[0] == ' ' ||
               (in->n >= stage->mark_n && memcmp(s, stage->mark, stage->mark_n) == 0);

    if (!has &&
        (stage->prepend == PREPEND_ALWAYS || (stage->prepend == PREPEND_FIRST && in->start)))
        KNE_TRY(kne_tokbuf_add(to, stage->mark, stage->mark_n, err));
    while (s < end)
    {
        const char *space = memchr(s, ' ', (size_t) (end - s));

        KNE_TRY(kne_tokbuf_add(to, s, (size_t) ((space ? space : end) - s), err));
        if (!space)
            break;
        KNE_TRY(kne_tokbuf_add(to, stage->mark, stage->mark_n, err));
        s = space + 1;
    }
    return KNE_OK;
}

static kne_status
run_stage(const kne_pre_stage *stage, bool last, kne_matcher *m, kne_splits *splits, kne_err *err)
{
    kne_pattern mark = { .text = (char *) stage->mark, .n = stage->mark_n };

    if (stage->kind == PRE_BYTE_LEVEL && stage->add_prefix_space)
        KNE_TRY(rewrite(splits, with_space, stage, err));
    if (stage->kind == PRE_METASPACE)
        KNE_TRY(rewrite(splits, with_marks, stage, err));
    if (stage->kind != PRE_BYTE_LEVEL || stage->pattern.re)
    {
        if (stage->kind == PRE_METASPACE && !stage->split)
            return KNE_OK;
        for (size_t i = 0; i < splits->pieces.n; i++)
        {
            const kne_piece *p = &splits->pieces.p[i];

            if (p->id >= 0)
                KNE_TRY(kne_pieces_add(&splits->next, p->at, p->n, p->id, false, err));
            else if (stage->kind == PRE_CHARS)
                KNE_TRY(cut_chars(stage, splits, p, err));
            else if (stage->kind == PRE_WHITESPACE)
                KNE_TRY(cut_words(splits, p, err));
            else if (stage->kind == PRE_METASPACE)
                KNE_TRY(cut_pattern(&mark, false, MERGED_WITH_NEXT, m, splits, p, err));
            else
                KNE_TRY(cut_pattern(&stage->pattern, stage->invert, stage->behavior, m, splits, p,
                                    err));
        }
        advance(splits);
    }
    if (stage->kind == PRE_BYTE_LEVEL && !last)
        KNE_TRY(rewrite(splits, to_alphabet, stage, err));
    return KNE_OK;
}

kne_status
kne_pretokenizer_run(const kne_pretokenizer *pre, kne_matcher *m, kne_splits *splits, kne_err *err)
{
    splits->next.n = 0;
    for (size_t i = 0; i < pre->n; i++)
        KNE_TRY(run_stage(&pre->stage[i], i + 1 == pre->n, m, splits, err));
    return KNE_OK;
}
