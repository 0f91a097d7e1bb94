/*
 * kne_added_tokens.c - finds added tokens in text: at each place the longest,
 * from left to right, as the library's Aho-Corasick automaton does. Files have
 * from three to a few thousand of them, most beginning with "<": a sorted list,
 * narrowed byte by byte, needs no automaton to be built.
 */
#include <stdlib.h>

#include "kne_tokenizer_impl.h"

static const char *
text_of(const kne_finder *f, int32_t i, size_t *n)
{
    const kne_added *a = f->added[i];

    *n = f->normal ? a->normal_n : a->n;
    return f->normal ? a->normal : a->text;
}

static int
by_text(const char *x, size_t xn, const char *y, size_t yn)
{
    int c = memcmp(x, y, xn < yn ? xn : yn);

    return c ? c : (xn > yn) - (xn < yn);
}

static int
by_raw_text(const void *x, const void *y)
{
    const kne_added *a = *(kne_added *const *) x, *b = *(kne_added *const *) y;

    return by_text(a->text, a->n, b->text, b->n);
}

static int
by_normal_text(const void *x, const void *y)
{
    const kne_added *a = *(kne_added *const *) x, *b = *(kne_added *const *) y;

    return by_text(a->normal, a->normal_n, b->normal, b->normal_n);
}

kne_status
kne_finder_build(kne_finder *f, const kne_added *added, int32_t n, bool normal, kne_err *err)
{
    *f = (kne_finder) { .normal = normal };
    f->added = malloc(((size_t) n + 1) * sizeof *f->added);
    if (!f->added)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    for (int32_t i = 0; i < n; i++)
        if (added[i].normalized == normal)
            f->added[f->n++] = &added[i];
    qsort(f->added, (size_t) f->n, sizeof *f->added, normal ? by_normal_text : by_raw_text);
    for (int32_t i = 0; i < f->n; i++)
    {
        const kne_added *a = f->added[i];
        size_t           len, before_len;
        const char      *s = text_of(f, i, &len);

        if (len == 0)
            return kne_error(err, KNE_ERR_FORMAT,
                             "nothing is left of added token %d when it is normalised", a->id);
        if (i > 0)
        {
            const char *before = text_of(f, i - 1, &before_len);

            if (by_text(s, len, before, before_len) == 0)
                return kne_error(err, KNE_ERR_FORMAT,
                                 "added tokens %d and %d are the same text when normalised",
                                 f->added[i - 1]->id, a->id);
        }
        f->first[(unsigned char) s[0] + 1] = i + 1;
    }
    for (int b = 0; b < 256; b++)
        if (f->first[b + 1] < f->first[b])
            f->first[b + 1] = f->first[b];
    return KNE_OK;
}

void
kne_finder_free(kne_finder *f)
{
    free(f->added);
    *f = (kne_finder) { 0 };
}

/* The first of [lo, hi) whose byte at depth is not below c. */
static int32_t
lower_bound(const kne_finder *f, int32_t lo, int32_t hi, size_t depth, int c)
{
    while (lo < hi)
    {
        int32_t mid = lo + (hi - lo) / 2;
        size_t  n;

        if ((unsigned char) text_of(f, mid, &n)[depth] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest token that begins at s, NULL: none. */
static const kne_added *
longest_at(const kne_finder *f, const char *s, size_t n, size_t *len)
{
    int32_t          lo = f->first[(unsigned char) s[0]];
    int32_t          hi = f->first[(unsigned char) s[0] + 1];
    const kne_added *best = NULL;

    for (size_t depth = 1; lo < hi; depth++)
    {
        size_t k;
        int    c;

        text_of(f, lo, &k); /* of those with this prefix, the prefix itself sorts first */
        if (k == depth)
        {
            best = f->added[lo++];
            *len = depth;
        }
        if (depth == n)
            break;
        c = (unsigned char) s[depth];
        lo = lower_bound(f, lo, hi, depth, c);
        hi = lower_bound(f, lo, hi, depth, c + 1);
    }
    return best;
}

kne_status
kne_finder_split(const kne_finder *f, const char *text, size_t at, size_t n, bool start,
                 kne_pieces *out, kne_err *err)
{
    const char *s = text + at;
    size_t      done = 0, k;

    for (size_t i = 0, len; f->n > 0 && i < n; i += len)
    {
        const kne_added *a = longest_at(f, s + i, n - i, &len);
        size_t           from = i, to;

        if (!a)
        {
            len = 1;
            continue;
        }
        to = i + len;
        if (a->single_word && ((from > 0 && kne_char_is_word(kne_u8_last(s, from, &k))) ||
                               (to < n && kne_char_is_word(kne_u8_get(s + to, &k)))))
            continue;
        if (a->lstrip) /* takes the space before it, but none an earlier token took */
        {
            while (from > 0 && kne_char_is_space(kne_u8_last(s, from, &k)))
                from -= k;
            if (from < done)
                from = done;
        }
        if (a->rstrip)
            while (to < n && kne_char_is_space(kne_u8_get(s + to, &k)))
                to += k;
        if (to <= from) /* lies in space that an earlier token took (there the library panics) */
            continue;
        if (done < from)
            KNE_TRY(kne_pieces_add(out, at + done, from - done, -1, start && done == 0, err));
        KNE_TRY(kne_pieces_add(out, at + from, to - from, a->id, false, err));
        done = to;
    }
    if (done < n)
        KNE_TRY(kne_pieces_add(out, at + done, n - done, -1, start && done == 0, err));
    return KNE_OK;
}
