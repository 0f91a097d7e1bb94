/*
 * kne_tokenizer_regex.c - regular expressions of tokenizer.json, by PCRE2.
 *
 * The files are written for Oniguruma's Ruby syntax. Most of it PCRE2 reads the
 * same way; where it would read something else (\s, \w, script names, \u, {,n},
 * x{n,m}+ ...) the pattern is translated, and where that cannot be done it is
 * refused: a pattern never silently means something different.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <strings.h>

#include "kne_tokenizer_impl.h"

#define MATCH_LIMIT  10000000u /* steps of one match; no sane pattern needs a thousandth */
#define DEPTH_LIMIT  10000u
#define HEAP_LIMIT   (64u * 1024) /* KiB */
#define JIT_STACK    (8u << 20)
#define MAX_GROUPS   64
#define SPACES       "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}" \
                     "\\x{202f}\\x{205f}\\x{3000}"
#define WORD         "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define WORD_ALONE   WORD "\\xb2\\xb3\\xb9\\xbc-\\xbe" /* Oniguruma's own, outside classes only */

struct kne_regex
{
    pcre2_code *code;
    bool        jit;
};

typedef struct translator
{
    const char *s;
    size_t      n, i;
    kne_tokbuf  out;
    size_t      atom; /* where in out the last atom began */
    size_t      group[MAX_GROUPS];
    int         depth;
    kne_err    *err;
} translator;

static kne_status
refuse(translator *t, const char *what)
{
    kne_status st;

    st = kne_error(t->err, KNE_ERR_UNSUPPORTED,
                   "tokenizer's regular expression has %s, which is not supported", what);
    kne_error_detail(t->err, "The pattern is: %.*s", kne_u8_prefix(t->s, t->n, 400), t->s);
    return st;
}

static kne_status
put(translator *t, const char *s)
{
    return kne_tokbuf_add(&t->out, s, strlen(s), t->err);
}

static const struct
{
    const char *name, *pcre;
} properties[] = {
    { "Any", "Any" },
    { "Alpha", "Alphabetic" },
    { "Alphabetic", "Alphabetic" },
    { "Space", "White_Space" },
    { "White_Space", "White_Space" },
    { "Upper", "Uppercase" },
    { "Uppercase", "Uppercase" },
    { "Lower", "Lowercase" },
    { "Lowercase", "Lowercase" },
    { "Digit", "Nd" },
    { "Emoji", "Emoji" },
    { "Extended_Pictographic", "Extended_Pictographic" },
    { "Ideographic", "Ideographic" },
    { "Letter", "L" },
    { "Uppercase_Letter", "Lu" },
    { "Lowercase_Letter", "Ll" },
    { "Titlecase_Letter", "Lt" },
    { "Modifier_Letter", "Lm" },
    { "Other_Letter", "Lo" },
    { "Mark", "M" },
    { "Nonspacing_Mark", "Mn" },
    { "Spacing_Mark", "Mc" },
    { "Enclosing_Mark", "Me" },
    { "Number", "N" },
    { "Decimal_Number", "Nd" },
    { "Letter_Number", "Nl" },
    { "Other_Number", "No" },
    { "Punctuation", "P" },
    { "Symbol", "S" },
    { "Separator", "Z" },
    { "Space_Separator", "Zs" },
    { "Other", "C" },
    { "Control", "Cc" },
};

/* \p{...}: t->i is at the p. A longer name that is none of the above is a script. */
static kne_status
property(translator *t)
{
    bool        negate = t->s[t->i] == 'P';
    const char *name, *close;
    char        text[64];
    size_t      n;

    t->i++;
    if (t->i >= t->n || t->s[t->i] != '{')
        return refuse(t, "a \\p without braces");
    name = t->s + ++t->i;
    close = memchr(name, '}', t->n - t->i);
    if (!close || close - name > 40)
        return refuse(t, "a \\p without an end");
    t->i = (size_t) (close - t->s) + 1;
    if (name < close && *name == '^')
    {
        negate = !negate;
        name++;
    }
    n = (size_t) (close - name);
    memcpy(text, name, n);
    text[n] = '\0';
    for (size_t i = 0; i < n; i++) /* keeps "}" tricks and options out of the result */
        if (!strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_ -", text[i]))
            return refuse(t, "an unknown \\p{...}");
    KNE_TRY(put(t, negate ? "\\P{" : "\\p{"));
    if (n > 2)
    {
        size_t i;

        for (i = 0; i < sizeof properties / sizeof *properties; i++)
            if (strcasecmp(properties[i].name, text) == 0)
                break;
        if (i < sizeof properties / sizeof *properties)
            KNE_TRY(put(t, properties[i].pcre));
        else
        {
            KNE_TRY(put(t, "sc:"));
            KNE_TRY(put(t, text));
        }
    }
    else
        KNE_TRY(put(t, text));
    return put(t, "}");
}

/* A backslash and what follows it: t->i is at the backslash. */
static kne_status
escape(translator *t, bool in_class)
{
    char c;

    if (++t->i >= t->n)
        return refuse(t, "a backslash at its end");
    c = t->s[t->i];
    switch (c)
    {
        case 'p':
        case 'P':
            return property(t);
        case 's':
            KNE_TRY(put(t, in_class ? SPACES : "[" SPACES "]"));
            break;
        case 'S':
            KNE_TRY(put(t, in_class ? "\\P{White_Space}" : "[^" SPACES "]"));
            break;
        case 'w':
            KNE_TRY(put(t, in_class ? WORD : "[" WORD_ALONE "]"));
            break;
        case 'W':
            if (in_class)
                return refuse(t, "\\W in a class");
            KNE_TRY(put(t, "[^" WORD_ALONE "]"));
            break;
        case 'd':
            KNE_TRY(put(t, "\\p{Nd}"));
            break;
        case 'D':
            KNE_TRY(put(t, "\\P{Nd}"));
            break;
        case 'u':
            if (t->n - t->i < 5)
                return refuse(t, "a short \\u");
            for (int k = 1; k <= 4; k++)
                if (!strchr("0123456789abcdefABCDEF", t->s[t->i + (size_t) k]))
                    return refuse(t, "a short \\u");
            KNE_TRY(put(t, "\\x{"));
            KNE_TRY(kne_tokbuf_add(&t->out, t->s + t->i + 1, 4, t->err));
            KNE_TRY(put(t, "}"));
            t->i += 4;
            break;
        case 'x': /* a byte in Oniguruma, a character in PCRE2: the same only in ASCII */
            if (t->n - t->i < 2 || (t->s[t->i + 1] != '{' && !strchr("01234567", t->s[t->i + 1])))
                return refuse(t, "a byte by \\x");
            KNE_TRY(put(t, "\\x"));
            break;
        default:
            if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
                if (!strchr(in_class ? "abefnrtv" : "abefnrtvABzZ", c))
                    return refuse(t, "an escape");
            KNE_TRY(put(t, "\\"));
            KNE_TRY(kne_tokbuf_add(&t->out, &c, 1, t->err));
    }
    t->i++;
    return KNE_OK;
}

/*
 * [...]: t->i is at the bracket. A class within a class is a union: its brackets
 * are left out, unless a minus beside them would then make a range.
 */
static kne_status
class(translator *t)
{
    size_t first;
    int    inner = 0;

    KNE_TRY(put(t, "["));
    t->i++;
    if (t->i < t->n && t->s[t->i] == '^')
    {
        KNE_TRY(put(t, "^"));
        t->i++;
    }
    for (first = t->i; t->i < t->n;)
    {
        char c = t->s[t->i], before = t->s[t->i - 1];
        char after = t->i + 1 < t->n ? t->s[t->i + 1] : '\0';

        if (c == ']' && t->i == first)
            return refuse(t, "an empty class");
        if (c == ']' && inner == 0)
        {
            t->i++;
            return put(t, "]");
        }
        if (c == '[' && (after == '^' || after == ':' || after == '-' || before == '-'))
            return refuse(t, "a class within a class");
        if (c == ']' && (after == '-' || before == '-'))
            return refuse(t, "a class within a class");
        if (c == '&' && after == '&')
            return refuse(t, "an intersection of classes");
        if (c == '[' || c == ']')
        {
            inner += c == '[' ? 1 : -1;
            first = ++t->i;
            continue;
        }
        if (c == '\\')
            KNE_TRY(escape(t, true));
        else
        {
            KNE_TRY(kne_tokbuf_add(&t->out, &c, 1, t->err));
            t->i++;
        }
    }
    return refuse(t, "a class without an end");
}

/* t->i is at the opening parenthesis. */
static kne_status
group(translator *t)
{
    size_t i = t->i + 1;

    if (t->depth == MAX_GROUPS)
        return refuse(t, "too many groups within groups");
    if (i < t->n && t->s[i] == '*')
        return refuse(t, "(*");
    if (i < t->n && t->s[i] == '?')
    {
        char c = ++i < t->n ? t->s[i] : '\0';

        if (c == 'i' || c == '-' || c == 'm' || c == 'x')
        {
            /* "(?i:" is the same in both; the scope of "(?i)" only at the very beginning. */
            size_t j = i + (c == '-');

            if (j + 1 >= t->n || t->s[j] != 'i' ||
                !(t->s[j + 1] == ':' || (t->s[j + 1] == ')' && t->i == 0)))
                return refuse(t, "an option in parentheses");
            if (t->s[j + 1] == ')')
            {
                KNE_TRY(kne_tokbuf_add(&t->out, t->s, j + 2, t->err));
                t->i = j + 2;
                return KNE_OK;
            }
            i = j + 1;
        }
        else if (c == '<' && i + 1 < t->n && (t->s[i + 1] == '=' || t->s[i + 1] == '!'))
            i++;
        else if (!c || !strchr(":=!>", c))
            return refuse(t, "a special group");
        i++;
    }
    else
        i = t->i + 1;
    t->group[t->depth++] = t->out.n;
    KNE_TRY(kne_tokbuf_add(&t->out, t->s + t->i, i - t->i, t->err));
    t->i = i;
    return KNE_OK;
}

/* {n}, {n,}, {n,m}, {,m}; anything else is a plain brace. t->i is at the brace. */
static kne_status
interval(translator *t)
{
    size_t j = t->i + 1, from = j, comma = 0;

    while (j < t->n && ((t->s[j] >= '0' && t->s[j] <= '9') || (t->s[j] == ',' && !comma)))
    {
        if (t->s[j] == ',')
            comma = j;
        j++;
    }
    if (j >= t->n || t->s[j] != '}' || j == from || (comma && j == from + 1))
    {
        t->atom = t->out.n;
        t->i++;
        return put(t, "\\{");
    }
    j++;
    if (j < t->n && t->s[j] == '?' && !comma)
        return refuse(t, "{n}?");
    KNE_TRY(put(t, comma == from ? "{0" : "{"));
    KNE_TRY(kne_tokbuf_add(&t->out, t->s + from, j - from, t->err));
    if (j < t->n && t->s[j] == '+') /* greedy repetition of the interval, not possessive */
    {
        KNE_TRY(kne_tokbuf_reserve(&t->out, 3, t->err));
        memmove(t->out.s + t->atom + 3, t->out.s + t->atom, t->out.n - t->atom);
        memcpy(t->out.s + t->atom, "(?:", 3);
        t->out.n += 3;
        KNE_TRY(put(t, ")+"));
        j++;
    }
    t->i = j;
    return KNE_OK;
}

static kne_status
translate(translator *t)
{
    while (t->i < t->n)
    {
        char c = t->s[t->i];

        switch (c)
        {
            case '\\':
                t->atom = t->out.n;
                KNE_TRY(escape(t, false));
                break;
            case '[':
                t->atom = t->out.n;
                KNE_TRY(class(t));
                break;
            case '(':
                KNE_TRY(group(t));
                break;
            case ')':
                if (t->depth == 0)
                    return refuse(t, "an unmatched parenthesis");
                t->atom = t->group[--t->depth];
                KNE_TRY(put(t, ")"));
                t->i++;
                break;
            case '{':
                KNE_TRY(interval(t));
                break;
            default:
            {
                size_t len = kne_u8_len(t->s + t->i);

                if (c != '*' && c != '+' && c != '?')
                    t->atom = t->out.n;
                KNE_TRY(kne_tokbuf_add(&t->out, t->s + t->i, len, t->err));
                t->i += len;
            }
        }
    }
    return KNE_OK;
}

kne_status
kne_regex_compile(const char *pattern, size_t n, kne_regex **out, kne_err *err)
{
    translator             t = { .s = pattern, .n = n, .err = err };
    pcre2_compile_context *context = NULL;
    kne_regex             *re = NULL;
    kne_status             st;
    int                    code;
    PCRE2_SIZE             at;

    *out = NULL;
    st = translate(&t);
    if (st == KNE_OK)
        st = kne_tokbuf_reserve(&t.out, 1, err); /* an empty pattern: not NULL */
    if (st != KNE_OK)
        goto out;
    re = calloc(1, sizeof *re);
    context = pcre2_compile_context_create(NULL);
    if (!re || !context)
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
        goto out;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_max_pattern_length(context, 1u << 20);
    /* Ruby's ^ and $ are those of lines. */
    re->code = pcre2_compile((PCRE2_SPTR) t.out.s, t.out.n,
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &code,
                             &at, context);
    if (!re->code)
    {
        char why[128];

        pcre2_get_error_message(code, (PCRE2_UCHAR *) why, sizeof why);
        st = kne_error(err, KNE_ERR_UNSUPPORTED, "tokenizer's regular expression does not compile");
        kne_error_detail(err, "PCRE2 says: %s. The pattern is: %.*s", why,
                         kne_u8_prefix(pattern, n, 300), pattern);
        goto out;
    }
    re->jit = pcre2_jit_compile(re->code, PCRE2_JIT_COMPLETE) == 0; /* slower without, else equal */
    *out = re;
    re = NULL;
out:
    kne_tokbuf_free(&t.out);
    pcre2_compile_context_free(context);
    free(re);
    return st;
}

void
kne_regex_free(kne_regex *re)
{
    if (re)
        pcre2_code_free(re->code);
    free(re);
}

void
kne_matcher_free(kne_matcher *m)
{
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    *m = (kne_matcher) { 0 };
}

static kne_status
matcher_start(kne_matcher *m, kne_err *err)
{
    m->data = pcre2_match_data_create(1, NULL);
    m->context = pcre2_match_context_create(NULL);
    if (!m->data || !m->context)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    pcre2_set_match_limit(m->context, MATCH_LIMIT);
    pcre2_set_depth_limit(m->context, DEPTH_LIMIT);
    pcre2_set_heap_limit(m->context, HEAP_LIMIT);
    return KNE_OK;
}

/* One search from a place on: PCRE2's return code. */
static int
search(const kne_regex *re, kne_matcher *m, const char *s, size_t n, size_t from)
{
    int rc;

    if (!re->jit)
        return pcre2_match(re->code, (PCRE2_SPTR) s, n, from, PCRE2_NO_UTF_CHECK, m->data,
                           m->context);
    rc = pcre2_jit_match(re->code, (PCRE2_SPTR) s, n, from, PCRE2_NO_UTF_CHECK, m->data,
                         m->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && !m->stack)
    {
        m->stack = pcre2_jit_stack_create(64 * 1024, JIT_STACK, NULL);
        if (!m->stack)
            return PCRE2_ERROR_NOMEMORY;
        pcre2_jit_stack_assign(m->context, NULL, m->stack);
        rc = pcre2_jit_match(re->code, (PCRE2_SPTR) s, n, from, PCRE2_NO_UTF_CHECK, m->data,
                             m->context);
    }
    return rc;
}

/*
 * Empty matches count, but not right behind the match before: that is how the
 * library's iterator goes on.
 */
kne_status
kne_regex_next(const kne_regex *re, kne_matcher *m, const char *s, size_t n, kne_regex_at *at,
               bool *found, kne_err *err)
{
    *found = false;
    if (!m->context || !m->data)
        KNE_TRY(matcher_start(m, err));
    while (at->from <= n)
    {
        int         rc = search(re, m, s, n, at->from);
        PCRE2_SIZE *pos;

        if (rc == PCRE2_ERROR_NOMATCH)
            return KNE_OK;
        if (rc < 0)
        {
            char why[128];

            pcre2_get_error_message(rc, (PCRE2_UCHAR *) why, sizeof why);
            return kne_error(err, rc == PCRE2_ERROR_NOMEMORY ? KNE_ERR_NOMEM : KNE_ERR_LIMIT,
                             "tokenizer's regular expression gave up: %s", why);
        }
        pos = pcre2_get_ovector_pointer(m->data);
        if (pos[0] == pos[1] && pos[1] == at->last_match)
        {
            at->from += at->from < n ? kne_u8_len(s + at->from) : 1;
            continue;
        }
        at->start = pos[0];
        at->end = at->from = at->last_match = pos[1];
        *found = true;
        return KNE_OK;
    }
    return KNE_OK;
}

/* {"String": "..."} or {"Regex": "..."} under the key "pattern". */
kne_status
kne_pattern_load(cJSON *json, const char *owner, kne_pattern *out, kne_err *err)
{
    cJSON     *pattern = kne_tokjson_get(json, "pattern");
    kne_status st;

    *out = (kne_pattern) { 0 };
    if (!pattern || !cJSON_IsObject(pattern))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's %s has no pattern", owner);
    if (kne_tokjson_get(pattern, "String"))
    {
        KNE_TRY(kne_tokjson_string(pattern, "String", owner, &out->text, &out->n, err));
        if (out->n == 0)
        {
            kne_pattern_free(out);
            return kne_error(err, KNE_ERR_UNSUPPORTED,
                             "tokenizer's %s searches for an empty string, which is not supported",
                             owner);
        }
        return KNE_OK;
    }
    KNE_TRY(kne_tokjson_string(pattern, "Regex", owner, &out->text, &out->n, err));
    st = kne_regex_compile(out->text, out->n, &out->re, err);
    if (st != KNE_OK)
        kne_pattern_free(out);
    return st;
}

void
kne_pattern_free(kne_pattern *p)
{
    kne_regex_free(p->re);
    free(p->text);
    *p = (kne_pattern) { 0 };
}

kne_status
kne_pattern_next(const kne_pattern *p, kne_matcher *m, const char *s, size_t n, kne_regex_at *at,
                 bool *found, kne_err *err)
{
    const char *hit;

    if (p->re)
        return kne_regex_next(p->re, m, s, n, at, found, err);
    hit = at->from < n ? memmem(s + at->from, n - at->from, p->text, p->n) : NULL;
    *found = hit != NULL;
    if (hit)
    {
        at->start = (size_t) (hit - s);
        at->end = at->from = at->last_match = at->start + p->n;
    }
    return KNE_OK;
}
