/*
 * kne_tokenizer_text.c - growing buffers, UTF-8 and character classes of the
 * tokenizer. Classes that Unicode defines by general category come from
 * utf8proc; White_Space and what a regular expression calls a word character
 * are spelled out here, as the tokenizers library has them from Rust.
 */
#include <stdlib.h>
#include <utf8proc.h>

#include "kne_tokenizer_impl.h"

kne_status
kne_tokbuf_reserve(kne_tokbuf *b, size_t more, kne_err *err)
{
    size_t cap;
    char  *s;

    if (more <= b->cap - b->n)
        return KNE_OK;
    cap = b->cap ? b->cap : 256;
    while (cap - b->n < more)
    {
        if (cap > SIZE_MAX / 4)
            return kne_error(err, KNE_ERR_LIMIT, "text too long for the tokenizer");
        cap *= 2;
    }
    s = realloc(b->s, cap);
    if (!s)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    b->s = s;
    b->cap = cap;
    return KNE_OK;
}

kne_status
kne_tokbuf_add(kne_tokbuf *b, const void *s, size_t n, kne_err *err)
{
    KNE_TRY(kne_tokbuf_reserve(b, n, err));
    if (n > 0)
        memcpy(b->s + b->n, s, n);
    b->n += n;
    return KNE_OK;
}

void
kne_tokbuf_free(kne_tokbuf *b)
{
    free(b->s);
    *b = (kne_tokbuf) { 0 };
}

kne_status
kne_tok_grow(void **p, size_t *cap, size_t n, size_t elem_size, kne_err *err)
{
    size_t want = *cap ? *cap : 16;
    void  *grown;

    while (want <= n)
        want *= 2;
    grown = realloc(*p, want * elem_size);
    if (!grown)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    *p = grown;
    *cap = want;
    return KNE_OK;
}

/*
 * The length of the well-formed character at s, or minus the length of the
 * maximal part of one that breaks off (at least 1).
 */
static int
char_form(const unsigned char *s, size_t n)
{
    unsigned char lo = 0x80, hi = 0xBF;
    int           len;

    if (s[0] < 0x80)
        return 1;
    if (s[0] < 0xC2 || s[0] > 0xF4)
        return -1;
    len = s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if (s[0] == 0xE0)
        lo = 0xA0; /* shorter forms exist */
    else if (s[0] == 0xED)
        hi = 0x9F; /* surrogates */
    else if (s[0] == 0xF0)
        lo = 0x90;
    else if (s[0] == 0xF4)
        hi = 0x8F; /* above U+10FFFF */
    for (int i = 1; i < len; i++)
    {
        if ((size_t) i == n || s[i] < lo || s[i] > hi)
            return -i;
        lo = 0x80;
        hi = 0xBF;
    }
    return len;
}

/* How many bytes from s on are ASCII, in steps of eight. */
static size_t
ascii_run(const char *s, size_t n)
{
    size_t i = 0;

    for (; n - i >= 8; i += 8)
    {
        uint64_t w;

        memcpy(&w, s + i, 8);
        if (w & 0x8080808080808080ull)
            break;
    }
    return i;
}

bool
kne_u8_valid(const char *s, size_t n)
{
    for (size_t i = 0; i < n;)
    {
        int len;

        if ((signed char) s[i] >= 0)
        {
            size_t run = ascii_run(s + i, n - i);

            i += run ? run : 1;
            continue;
        }
        if (n - i >= 2 && (unsigned char) s[i] >= 0xC2 && (unsigned char) s[i] < 0xE0 &&
            (signed char) s[i + 1] < -64) /* two bytes: what byte-level vocabularies are full of */
        {
            i += 2;
            continue;
        }
        len = char_form((const unsigned char *) s + i, n - i);
        if (len < 0)
            return false;
        i += (size_t) len;
    }
    return true;
}

size_t
kne_u8_put(uint32_t cp, char *out)
{
    if (cp < 0x80)
    {
        out[0] = (char) cp;
        return 1;
    }
    if (cp < 0x800)
    {
        out[0] = (char) (0xC0 | cp >> 6);
        out[1] = (char) (0x80 | (cp & 0x3F));
        return 2;
    }
    if (cp < 0x10000)
    {
        out[0] = (char) (0xE0 | cp >> 12);
        out[1] = (char) (0x80 | (cp >> 6 & 0x3F));
        out[2] = (char) (0x80 | (cp & 0x3F));
        return 3;
    }
    out[0] = (char) (0xF0 | cp >> 18);
    out[1] = (char) (0x80 | (cp >> 12 & 0x3F));
    out[2] = (char) (0x80 | (cp >> 6 & 0x3F));
    out[3] = (char) (0x80 | (cp & 0x3F));
    return 4;
}

int
kne_u8_prefix(const char *s, size_t n, size_t max)
{
    size_t i = 0;

    while (i < n && i < max && s[i] && (unsigned char) s[i] != 0xFF)
        i++;
    if (i == max && i < n)
        while (i > 0 && ((unsigned char) s[i] & 0xC0) == 0x80)
            i--;
    return (int) i;
}

kne_status
kne_u8_add_lossy(kne_tokbuf *out, const char *s, size_t n, kne_err *err)
{
    for (size_t i = 0, good = 0; i < n || good < n;)
    {
        int len = 1;

        while (i < n && (len = char_form((const unsigned char *) s + i, n - i)) > 0)
            i += (size_t) len;
        KNE_TRY(kne_tokbuf_add(out, s + good, i - good, err));
        if (i < n)
        {
            KNE_TRY(kne_tokbuf_add(out, "\xEF\xBF\xBD", 3, err));
            i += (size_t) -len;
        }
        good = i;
    }
    return KNE_OK;
}

bool
kne_char_is_space(uint32_t cp)
{
    if (cp < 0x80)
        return cp == ' ' || (cp >= 9 && cp <= 13);
    return cp == 0x85 || cp == 0xA0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) ||
           cp == 0x2028 || cp == 0x2029 || cp == 0x202F || cp == 0x205F || cp == 0x3000;
}

bool
kne_char_is_word(uint32_t cp)
{
    switch (utf8proc_category((utf8proc_int32_t) cp))
    {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        case UTF8PROC_CATEGORY_SO: /* circled letters are Alphabetic */
            return (cp >= 0x24B6 && cp <= 0x24E9) || (cp >= 0x1F130 && cp <= 0x1F149) ||
                   (cp >= 0x1F150 && cp <= 0x1F169) || (cp >= 0x1F170 && cp <= 0x1F189);
        default:
            return cp == 0x200C || cp == 0x200D; /* joiners */
    }
}

bool
kne_char_is_number(uint32_t cp)
{
    utf8proc_category_t c;

    if (cp < 0x80)
        return cp >= '0' && cp <= '9';
    c = utf8proc_category((utf8proc_int32_t) cp);
    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool
kne_char_is_mark(uint32_t cp)
{
    utf8proc_category_t c;

    if (cp < 0x300)
        return false;
    c = utf8proc_category((utf8proc_int32_t) cp);
    return c == UTF8PROC_CATEGORY_MN || c == UTF8PROC_CATEGORY_MC || c == UTF8PROC_CATEGORY_ME;
}

bool
kne_char_is_punct(uint32_t cp)
{
    utf8proc_category_t c;

    if (cp < 0x80)
        return (cp >= '!' && cp <= '/') || (cp >= ':' && cp <= '@') || (cp >= '[' && cp <= '`') ||
               (cp >= '{' && cp <= '~');
    c = utf8proc_category((utf8proc_int32_t) cp);
    return c >= UTF8PROC_CATEGORY_PC && c <= UTF8PROC_CATEGORY_PO;
}

/*
 * Printable Latin-1 stands for itself; the other 68 bytes, in order, for
 * U+0100 and up: 0-32, 127-160, 173.
 */
uint32_t
kne_byte_to_char(uint8_t b)
{
    if (b <= 32)
        return 0x100u + b;
    if (b >= 127 && b <= 160)
        return 0x100u + 33 + (b - 127u);
    return b == 173 ? 0x100u + 67 : b;
}

int
kne_char_to_byte(uint32_t cp)
{
    if (cp < 0x100)
        return kne_byte_to_char((uint8_t) cp) == cp ? (int) cp : -1;
    if (cp <= 0x100 + 32)
        return (int) (cp - 0x100);
    if (cp < 0x100 + 67)
        return (int) (cp - 0x100 - 33 + 127);
    return cp == 0x100 + 67 ? 173 : -1;
}
