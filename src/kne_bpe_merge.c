/*
 * kne_bpe_merge.c - from a piece of text to ids by the BPE model: characters to
 * symbols, then pairs of symbols merged in the order of rank, leftmost first.
 *
 * A short word is merged by looking for the lowest rank over and over, a long
 * one with a heap; both give the same result, since a pair's rank does not
 * change while it stands. Without a pre-tokeniser (Llama 2) a text would be one
 * word; it is cut where no merge can reach over (kne_join_bit), exactly.
 */
#include <stdlib.h>

#include "kne_bpe_impl.h"

#define SHORT_WORD 64
#define NO_RANK    UINT32_MAX

void
kne_bpe_scratch_free(kne_bpe_scratch *scratch)
{
    free(scratch->sym);
    free(scratch->heap_mem);
    kne_tokbuf_free(&scratch->text);
    *scratch = (kne_bpe_scratch) { 0 };
}

/* The rank of joining two symbols, NO_RANK: they do not join. */
static inline uint32_t
rank_of(const kne_bpe *bpe, int32_t left, int32_t right, int32_t *joined)
{
    uint32_t mask = (1u << bpe->merge_bits) - 1;
    uint32_t i = kne_merge_hash(bpe, (uint32_t) left, (uint32_t) right);

    for (; bpe->merge[i].left1; i = (i + 1) & mask)
        if (bpe->merge[i].left1 == (uint32_t) left + 1 && bpe->merge[i].right == (uint32_t) right)
        {
            *joined = bpe->merge[i].id;
            return bpe->merge[i].rank;
        }
    return NO_RANK;
}

/* Merge n <= SHORT_WORD symbols in place; returns how many are left. */
static size_t
merge_short(const kne_bpe *bpe, int32_t *sym, size_t n)
{
    uint32_t rank[SHORT_WORD]; /* of sym[i] with sym[i + 1] */
    int32_t  joined[SHORT_WORD];

    for (size_t i = 0; i + 1 < n; i++)
        rank[i] = rank_of(bpe, sym[i], sym[i + 1], &joined[i]);
    while (n > 1)
    {
        size_t   best = 0;
        uint32_t low = rank[0];

        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < low)
            {
                low = rank[i];
                best = i;
            }
        if (low == NO_RANK)
            break;
        sym[best] = joined[best];
        n--;
        memmove(sym + best + 1, sym + best + 2, (n - best - 1) * sizeof *sym);
        if (best + 1 < n)
        {
            memmove(rank + best + 1, rank + best + 2, (n - best - 2) * sizeof *rank);
            memmove(joined + best + 1, joined + best + 2, (n - best - 2) * sizeof *joined);
            rank[best] = rank_of(bpe, sym[best], sym[best + 1], &joined[best]);
        }
        if (best > 0)
            rank[best - 1] = rank_of(bpe, sym[best - 1], sym[best], &joined[best - 1]);
    }
    return n;
}

/* ---- long words ---- */

typedef struct long_word
{
    int32_t  *sym, *joined;
    uint32_t *rank; /* of a symbol with the next one; NO_RANK also for symbols merged away */
    int32_t  *prev, *next;
    uint64_t *heap; /* rank << 32 | position: lowest rank first, then leftmost */
    size_t    n, heap_n;
} long_word;

static void
heap_push(long_word *w, uint64_t key)
{
    size_t i = w->heap_n++;

    while (i > 0 && w->heap[(i - 1) / 2] > key)
    {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = key;
}

static uint64_t
heap_pop(long_word *w)
{
    uint64_t top = w->heap[0], key = w->heap[--w->heap_n];
    size_t   i = 0, child;

    while ((child = 2 * i + 1) < w->heap_n)
    {
        if (child + 1 < w->heap_n && w->heap[child + 1] < w->heap[child])
            child++;
        if (w->heap[child] >= key)
            break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = key;
    return top;
}

static void
consider(const kne_bpe *bpe, long_word *w, int32_t i)
{
    int32_t next = w->next[i];

    w->rank[i] = next < 0 ? NO_RANK : rank_of(bpe, w->sym[i], w->sym[next], &w->joined[i]);
    if (w->rank[i] != NO_RANK)
        heap_push(w, (uint64_t) w->rank[i] << 32 | (uint32_t) i);
}

/*
 * Merge any number of symbols in place. A heap entry whose rank is no longer
 * that of its place is out of date; each merge adds at most two entries and
 * takes one away, so the heap stays below 2n.
 */
static kne_status
merge_long(const kne_bpe *bpe, kne_bpe_scratch *scratch, size_t *count, kne_err *err)
{
    size_t    n = *count, out = 0;
    size_t    bytes = n * (2 * sizeof(uint64_t) + 4 * sizeof(int32_t));
    long_word w = { .sym = scratch->sym, .n = n };

    if (n > INT32_MAX / 64)
        return kne_error(err, KNE_ERR_LIMIT, "text without a break is too long for the tokenizer");
    if (bytes > scratch->heap_cap)
    {
        free(scratch->heap_mem);
        scratch->heap_cap = 0;
        scratch->heap_mem = malloc(bytes);
        if (!scratch->heap_mem)
            return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
        scratch->heap_cap = bytes;
    }
    w.heap = scratch->heap_mem;
    w.joined = (int32_t *) (w.heap + 2 * n);
    w.rank = (uint32_t *) (w.joined + n);
    w.prev = (int32_t *) (w.rank + n);
    w.next = w.prev + n;
    for (size_t i = 0; i < n; i++)
    {
        w.prev[i] = (int32_t) i - 1;
        w.next[i] = i + 1 < n ? (int32_t) i + 1 : -1;
    }
    for (size_t i = 0; i < n; i++)
        consider(bpe, &w, (int32_t) i);
    while (w.heap_n > 0)
    {
        uint64_t top = heap_pop(&w);
        int32_t  i = (int32_t) (uint32_t) top, gone;

        if (w.rank[i] != (uint32_t) (top >> 32))
            continue;
        gone = w.next[i];
        w.sym[i] = w.joined[i];
        w.rank[gone] = NO_RANK;
        w.next[i] = w.next[gone];
        if (w.next[i] >= 0)
            w.prev[w.next[i]] = i;
        consider(bpe, &w, i);
        if (w.prev[i] >= 0)
            consider(bpe, &w, w.prev[i]);
    }
    for (int32_t i = 0; i >= 0; i = w.next[i])
        w.sym[out++] = w.sym[i];
    *count = out;
    return KNE_OK;
}

/* Merge the symbols collected and append them. */
static kne_status
flush(const kne_bpe *bpe, kne_bpe_scratch *scratch, kne_ids *ids, kne_err *err)
{
    size_t n = scratch->n;

    scratch->n = 0;
    if (n > SHORT_WORD)
        KNE_TRY(merge_long(bpe, scratch, &n, err));
    else if (n > 1)
        n = merge_short(bpe, scratch->sym, n);
    for (size_t i = 0; i < n; i++)
        KNE_TRY(kne_ids_add(ids, scratch->sym[i], err));
    return KNE_OK;
}

/* ---- characters to symbols ---- */

static kne_status
add_symbol(const kne_bpe *bpe, int32_t id, kne_bpe_scratch *scratch, kne_ids *ids, kne_err *err)
{
    if (bpe->may_join && scratch->n > 0)
    {
        uint32_t bit = kne_join_bit(bpe, scratch->sym[scratch->n - 1], id);

        if (!(bpe->may_join[bit / 8] >> bit % 8 & 1))
            KNE_TRY(flush(bpe, scratch, ids, err));
    }
    if (scratch->n == scratch->cap)
        KNE_TRY(kne_tok_grow((void **) &scratch->sym, &scratch->cap, scratch->n,
                             sizeof *scratch->sym, err));
    scratch->sym[scratch->n++] = id;
    return KNE_OK;
}

/* All bytes of a character by their own tokens, if there are such for all. */
static bool
has_fallback(const kne_bpe *bpe, const char *s, size_t n)
{
    if (!bpe->byte_fallback)
        return false;
    for (size_t i = 0; i < n; i++)
        if (bpe->fallback[(uint8_t) s[i]] < 0)
            return false;
    return true;
}

/*
 * Unknown characters wait, to be fused with those that follow; a character put
 * by its bytes does not end the wait. Both as the library does it.
 */
static kne_status
encode_chars(const kne_bpe *bpe, const char *s, size_t n, kne_bpe_scratch *scratch, kne_ids *ids,
             kne_err *err)
{
    bool waiting = false;

    for (size_t i = 0, k; i < n; i += k)
    {
        unsigned char c = (unsigned char) s[i];
        int32_t       id;

        k = kne_u8_len(s + i);
        id = c < 128 ? bpe->ascii[c] : kne_bpe_find(bpe, s + i, k);
        if (id >= 0)
        {
            if (waiting)
                KNE_TRY(add_symbol(bpe, bpe->unk, scratch, ids, err));
            waiting = false;
            KNE_TRY(add_symbol(bpe, id, scratch, ids, err));
        }
        else if (has_fallback(bpe, s + i, k))
            for (size_t j = 0; j < k; j++)
                KNE_TRY(add_symbol(bpe, bpe->fallback[(uint8_t) s[i + j]], scratch, ids, err));
        else if (bpe->unk_lost)
            return kne_error(err, KNE_ERR_FORMAT,
                             "tokenizer's unknown token is not in its vocabulary");
        else if (bpe->unk >= 0)
        {
            if (waiting && !bpe->fuse_unk)
                KNE_TRY(add_symbol(bpe, bpe->unk, scratch, ids, err));
            waiting = true;
        }
    }
    if (waiting)
        KNE_TRY(add_symbol(bpe, bpe->unk, scratch, ids, err));
    return flush(bpe, scratch, ids, err);
}

/* The piece in the byte-level alphabet, in scratch->text. */
static kne_status
to_alphabet(const char *s, size_t n, kne_bpe_scratch *scratch, kne_err *err)
{
    kne_tokbuf *b = &scratch->text;

    b->n = 0;
    KNE_TRY(kne_tokbuf_reserve(b, 2 * n, err));
    for (size_t i = 0; i < n; i++)
        b->n += kne_u8_put(kne_byte_to_char((uint8_t) s[i]), b->s + b->n);
    return KNE_OK;
}

kne_status
kne_bpe_encode(const kne_bpe *bpe, const char *s, size_t n, bool byte_level,
               kne_bpe_scratch *scratch, kne_ids *ids, kne_err *err)
{
    scratch->n = 0;
    if (byte_level && (bpe->ignore_merges || !bpe->level_full))
    {
        KNE_TRY(to_alphabet(s, n, scratch, err));
        if (!bpe->level_full)
        {
            byte_level = false;
            s = scratch->text.s;
            n = scratch->text.n;
        }
    }
    if (bpe->ignore_merges)
    {
        int32_t id = byte_level ? kne_bpe_find(bpe, scratch->text.s, scratch->text.n)
                                : kne_bpe_find(bpe, s, n);

        if (id >= 0)
            return kne_ids_add(ids, id, err);
    }
    if (!byte_level)
        return encode_chars(bpe, s, n, scratch, ids, err);
    if (scratch->cap < n)
        KNE_TRY(kne_tok_grow((void **) &scratch->sym, &scratch->cap, n, sizeof *scratch->sym, err));
    for (size_t i = 0; i < n; i++)
        scratch->sym[i] = bpe->level[(uint8_t) s[i]];
    scratch->n = n;
    return flush(bpe, scratch, ids, err);
}
