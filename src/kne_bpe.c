/*
 * kne_bpe.c - the BPE model's tables: vocabulary, merges, and what is derived
 * from them. How a word is merged: kne_bpe_merge.c.
 *
 * Token texts lie in a pool, addressed by offset; two open-addressed hash
 * tables map the vocabulary (text to id) and the merges (pair of ids to rank
 * and joined id). A lookup costs one or two cache lines. Ids may have gaps.
 *
 * Loading is bound by memory: cJSON's nodes of a large file fill tens of
 * megabytes, so they are walked as seldom as can be.
 */
#include <stdlib.h>

#include "kne_bpe_impl.h"

static inline uint64_t
mix(uint64_t a, uint64_t b)
{
    __uint128_t m = (__uint128_t) a * b;

    return (uint64_t) m ^ (uint64_t) (m >> 64);
}

/* Eight bytes at a time; the tail by one or two overlapping reads. */
static uint32_t
hash_text(const char *s, size_t n)
{
    uint64_t h = 0x2D358DCCAA6C78A5ull ^ n, w = 0, v;

    for (; n >= 8; s += 8, n -= 8)
    {
        memcpy(&w, s, 8);
        h = mix(h ^ w, 0x9E3779B97F4A7C15ull);
    }
    if (n >= 4)
    {
        uint32_t a, b;

        memcpy(&a, s, 4);
        memcpy(&b, s + n - 4, 4);
        v = (uint64_t) a << 32 | b;
    }
    else if (n > 0)
        v = (uint32_t) (uint8_t) s[0] << 16 | (uint32_t) (uint8_t) s[n / 2] << 8 |
            (uint8_t) s[n - 1];
    else
        v = 0;
    h = mix(h ^ v, 0xD1342543DE82EF95ull);
    return (uint32_t) (h ^ h >> 32);
}

static int32_t
find_hashed(const kne_bpe *bpe, const char *s, size_t n, uint32_t hash, uint32_t *slot)
{
    uint32_t i = hash & bpe->vocab_mask;

    for (; bpe->vocab[i].id1; i = (i + 1) & bpe->vocab_mask)
        if (bpe->vocab[i].hash == hash)
        {
            const kne_token *t = &bpe->token[bpe->vocab[i].id1 - 1];

            if (t->n == n && memcmp(bpe->pool + t->at, s, n) == 0)
                break;
        }
    *slot = i;
    return bpe->vocab[i].id1 - 1;
}

int32_t
kne_bpe_find(const kne_bpe *bpe, const char *s, size_t n)
{
    uint32_t slot;

    return find_hashed(bpe, s, n, hash_text(s, n), &slot);
}

/* ---- loading ---- */

/*
 * The tables of a large vocabulary do not fit the near caches, and loading
 * looks up hundreds of thousands of texts in no order. So it goes by blocks,
 * and brings what a block will touch closer, step by step, before it looks.
 */
#define BLOCK 16

typedef struct probe
{
    const char *s;
    size_t      n;
    uint32_t    hash;
} probe;

static void
fetch_slots(const kne_bpe *bpe, probe *p, size_t count)
{
    for (size_t i = 0; i < count; i++)
    {
        p[i].hash = hash_text(p[i].s, p[i].n);
        __builtin_prefetch(&bpe->vocab[p[i].hash & bpe->vocab_mask]);
    }
}

static void
fetch_texts(const kne_bpe *bpe, const probe *p, size_t count)
{
    int32_t id1;

    for (size_t i = 0; i < count; i++)
        if ((id1 = bpe->vocab[p[i].hash & bpe->vocab_mask].id1) != 0)
            __builtin_prefetch(&bpe->token[id1 - 1]);
    for (size_t i = 0; i < count; i++)
        if ((id1 = bpe->vocab[p[i].hash & bpe->vocab_mask].id1) != 0)
            __builtin_prefetch(bpe->pool + bpe->token[id1 - 1].at);
}

static int32_t
find_probe(const kne_bpe *bpe, const probe *p)
{
    uint32_t slot;

    return find_hashed(bpe, p->s, p->n, p->hash, &slot);
}

static void
put_text(kne_bpe *bpe, int32_t id, const char *s, size_t n)
{
    bpe->token[id] = (kne_token) { .at = (uint32_t) bpe->pool_n, .n = (uint32_t) n };
    memcpy(bpe->pool + bpe->pool_n, s, n);
    bpe->pool[bpe->pool_n + n] = '\0';
    bpe->pool_n += n + 1;
}

kne_status
kne_bpe_add_token(kne_bpe *bpe, int32_t id, const char *s, size_t n, kne_err *err)
{
    if (bpe->token[id].at)
        return kne_error(err, KNE_ERR_FORMAT, "added token \"%.*s\" has the id %d of another token",
                         kne_u8_prefix(s, n, 60), s, id);
    put_text(bpe, id, s, n);
    return KNE_OK;
}

typedef struct sizes
{
    int32_t n_id, n_model;
    size_t  text;
} sizes;

/* All texts and the NUL behind each are shorter than the file: quotes and commas see to that. */
static kne_status
measure(cJSON *vocab, cJSON *added, size_t file_n, sizes *size, kne_err *err)
{
    cJSON  *item;
    int32_t id;

    size->text = file_n + 64;
    cJSON_ArrayForEach(item, vocab)
    {
        if (!kne_tokjson_to_int(item, KNE_TOK_MAX_ID, &id))
            return kne_error(err, KNE_ERR_FORMAT,
                             "token \"%.*s\" has no id from 0 to %d in tokenizer.json",
                             kne_u8_prefix(item->string, strlen(item->string), 60), item->string,
                             KNE_TOK_MAX_ID - 1);
        size->n_model++;
        if (id >= size->n_id)
            size->n_id = id + 1;
    }
    cJSON_ArrayForEach(item, added) /* malformed ones are refused by who reads them */
        if (kne_tokjson_to_int(kne_tokjson_get(item, "id"), KNE_TOK_MAX_ID, &id) &&
            id >= size->n_id)
            size->n_id = id + 1;
    return KNE_OK;
}

/* Called twice: to count, and to hand out. */
static void
layout(kne_bpe *bpe, const sizes *size, bool byte_level)
{
    kne_arena *a = &bpe->arena;
    size_t     n = (size_t) size->n_id;

    bpe->vocab = kne_arena_take(a, (size_t) bpe->vocab_mask + 1, sizeof *bpe->vocab);
    bpe->token = kne_arena_take(a, n, sizeof *bpe->token);
    bpe->flags = kne_arena_take(a, n, 1);
    bpe->pool = kne_arena_take(a, size->text, 1);
    if (!byte_level)
    {
        bpe->first_char = kne_arena_take(a, n, sizeof *bpe->first_char);
        bpe->last_char = kne_arena_take(a, n, sizeof *bpe->last_char);
        bpe->may_join = kne_arena_take(a, KNE_JOIN_BITS / 8, 1);
    }
}

static kne_status
load_vocab(kne_bpe *bpe, cJSON *vocab, kne_err *err)
{
    cJSON *item = vocab->child;

    while (item)
    {
        probe   p[BLOCK];
        int32_t id[BLOCK];
        size_t  count = 0;

        for (; item && count < BLOCK; item = item->next)
        {
            p[count].s = kne_tokjson_text(item->string, &p[count].n);
            id[count++] = (int32_t) item->valuedouble; /* in range: measure() looked */
        }
        fetch_slots(bpe, p, count);
        for (size_t i = 0; i < count; i++)
        {
            uint32_t slot;

            if (bpe->token[id[i]].at)
                return kne_error(err, KNE_ERR_FORMAT, "two tokens have the id %d in tokenizer.json",
                                 id[i]);
            if (find_hashed(bpe, p[i].s, p[i].n, p[i].hash, &slot) >= 0)
                return kne_error(err, KNE_ERR_FORMAT, "token \"%.*s\" is twice in tokenizer.json",
                                 kne_u8_prefix(p[i].s, p[i].n, 60), p[i].s);
            bpe->vocab[slot] = (kne_vocab_slot) { .hash = p[i].hash, .id1 = id[i] + 1 };
            put_text(bpe, id[i], p[i].s, p[i].n);
        }
    }
    return KNE_OK;
}

/* A merge as read; its rank is its place. */
typedef struct merge
{
    int32_t left, right, id;
} merge;

typedef struct merge_list
{
    merge *m;
    size_t n, cap;
} merge_list;

/* The table of merges, and the bitmap of what may join at all. */
static kne_status
build_merges(kne_bpe *bpe, const merge_list *list, kne_err *err)
{
    const merge *m = list->m;
    uint32_t     mask;

    bpe->merge_bits = 6;
    while (((size_t) 1 << bpe->merge_bits) / 4 * 3 < list->n)
        bpe->merge_bits++;
    mask = (1u << bpe->merge_bits) - 1;
    bpe->merge = calloc((size_t) mask + 1, sizeof *bpe->merge);
    if (!bpe->merge)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    for (size_t rank = 0; rank < list->n; rank++)
    {
        uint32_t left1 = (uint32_t) m[rank].left + 1, right = (uint32_t) m[rank].right, i;

        if (rank + BLOCK < list->n)
            __builtin_prefetch(&bpe->merge[kne_merge_hash(bpe, (uint32_t) m[rank + BLOCK].left,
                                                          (uint32_t) m[rank + BLOCK].right)], 1);
        i = kne_merge_hash(bpe, left1 - 1, right);
        while (bpe->merge[i].left1 &&
               (bpe->merge[i].left1 != left1 || bpe->merge[i].right != right))
            i = (i + 1) & mask;
        /* a pair given twice: the later rank holds, as in the library */
        bpe->merge[i] = (kne_merge_slot) { .left1 = left1, .right = right,
                                           .rank = (uint32_t) rank, .id = m[rank].id };
        if (bpe->may_join)
        {
            uint32_t bit = kne_join_bit(bpe, m[rank].left, m[rank].right);

            bpe->may_join[bit / 8] |= (uint8_t) (1u << bit % 8);
        }
    }
    return KNE_OK;
}

/*
 * The two halves of a merge, "a b" or ["a", "b"], appended to text one behind
 * the other: together they are the joined token.
 */
static kne_status
merge_halves(cJSON *item, kne_tokbuf *text, size_t *left_n, bool *good, kne_err *err)
{
    cJSON *right = NULL;
    size_t n;
    char  *s, *space;

    *good = false;
    if (cJSON_IsString(item))
    {
        s = kne_tokjson_text(item->valuestring, &n);
        space = memchr(s, ' ', n);
        if (!space || memchr(space + 1, ' ', n - (size_t) (space + 1 - s)))
            return KNE_OK;
        *good = true;
        *left_n = (size_t) (space - s);
        KNE_TRY(kne_tokbuf_add(text, s, *left_n, err));
        return kne_tokbuf_add(text, space + 1, n - *left_n - 1, err);
    }
    if (cJSON_IsArray(item) && item->child)
        right = item->child->next;
    if (!right || right->next || !cJSON_IsString(item->child) || !cJSON_IsString(right))
        return KNE_OK;
    *good = true;
    s = kne_tokjson_text(item->child->valuestring, left_n);
    KNE_TRY(kne_tokbuf_add(text, s, *left_n, err));
    s = kne_tokjson_text(right->valuestring, &n);
    return kne_tokbuf_add(text, s, n, err);
}

/* One block: its texts lie in text, half by half. */
static kne_status
add_merges(kne_bpe *bpe, probe *half, size_t count, merge_list *list, kne_err *err)
{
    int32_t id = list->n ? list->m[list->n - 1].id : 0;

    fetch_slots(bpe, half, count);
    fetch_texts(bpe, half, count);
    for (size_t i = 0; i < count; i += 2)
    {
        int32_t     left = find_probe(bpe, &half[i]), right = find_probe(bpe, &half[i + 1]);
        const char *s = half[i].s;
        size_t      n = half[i].n + half[i + 1].n;

        /* Most vocabularies list the joined tokens in the order of the merges. */
        if (++id >= bpe->n_id || bpe->token[id].n != n || bpe->token[id].at == 0 ||
            memcmp(bpe->pool + bpe->token[id].at, s, n) != 0)
            id = kne_bpe_find(bpe, s, n);
        if (left < 0 || right < 0 || id < 0)
        {
            kne_status st = kne_error(
                err, KNE_ERR_FORMAT,
                "merge %zu in tokenizer.json names a token that the vocabulary lacks", list->n + 1);

            kne_error_detail(err, "It would make \"%.*s\".", kne_u8_prefix(s, n, 200), s);
            return st;
        }
        if (list->n == KNE_TOK_MAX_ID)
            return kne_error(err, KNE_ERR_LIMIT, "tokenizer.json has too many merges");
        if (list->n == list->cap)
            KNE_TRY(kne_tok_grow((void **) &list->m, &list->cap, list->n, sizeof *list->m, err));
        list->m[list->n++] = (merge) { .left = left, .right = right, .id = id };
    }
    return KNE_OK;
}

static kne_status
load_merges(kne_bpe *bpe, cJSON *merges, kne_err *err)
{
    kne_tokbuf text = { 0 };
    merge_list list = { 0 };
    cJSON     *item = merges->child;
    kne_status st = kne_tokbuf_reserve(&text, 4096, err);

    while (item && st == KNE_OK)
    {
        probe       half[2 * BLOCK];
        size_t      count = 0;
        const char *s;

        text.n = 0;
        for (; item && count < 2 * BLOCK && st == KNE_OK; item = item->next)
        {
            size_t before = text.n;
            bool   good;

            if (cJSON_IsString(item) && strncmp(item->valuestring, "#version", 8) == 0)
                continue; /* the first line of a merges.txt, taken over */
            st = merge_halves(item, &text, &half[count].n, &good, err);
            if (st == KNE_OK && !good)
                st = kne_error(err, KNE_ERR_FORMAT, "merge %zu in tokenizer.json is malformed",
                               list.n + count / 2 + 1);
            if (st == KNE_OK)
                half[count + 1].n = text.n - before - half[count].n;
            count += 2;
        }
        if (st != KNE_OK)
            break;
        s = text.s; /* only now: it may have moved */
        for (size_t i = 0; i < count; s += half[i++].n)
            half[i].s = s;
        st = add_merges(bpe, half, count, &list, err);
    }
    if (st == KNE_OK)
        st = build_merges(bpe, &list, err);
    free(list.m);
    kne_tokbuf_free(&text);
    return st;
}

static kne_status
load_options(kne_bpe *bpe, cJSON *model, kne_err *err)
{
    cJSON *unk = kne_tokjson_get(model, "unk_token");
    cJSON *dropout = kne_tokjson_get(model, "dropout");

    if (dropout && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        return kne_error(err, KNE_ERR_UNSUPPORTED, "tokenizer's BPE dropout is not supported");
    for (int i = 0; i < 2; i++)
    {
        const char *name = i ? "end_of_word_suffix" : "continuing_subword_prefix";
        cJSON      *item = kne_tokjson_get(model, name);

        if (item && (!cJSON_IsString(item) || *item->valuestring))
            return kne_error(err, KNE_ERR_UNSUPPORTED, "tokenizer's BPE %s is not supported", name);
    }
    KNE_TRY(kne_tokjson_bool(model, "fuse_unk", false, &bpe->fuse_unk, err));
    KNE_TRY(kne_tokjson_bool(model, "byte_fallback", false, &bpe->byte_fallback, err));
    KNE_TRY(kne_tokjson_bool(model, "ignore_merges", false, &bpe->ignore_merges, err));
    bpe->unk = -1;
    if (unk)
    {
        size_t      n;
        const char *s;

        if (!cJSON_IsString(unk))
            return kne_error(err, KNE_ERR_FORMAT, "unk_token in tokenizer.json is no text");
        s = kne_tokjson_text(unk->valuestring, &n);
        bpe->unk = kne_bpe_find(bpe, s, n);
        bpe->unk_lost = bpe->unk < 0;
    }
    return KNE_OK;
}

/* Tables of what is looked up for every character. */
static void
derive(kne_bpe *bpe)
{
    char text[8];

    for (int c = 0; c < 128; c++)
    {
        text[0] = (char) c;
        bpe->ascii[c] = kne_bpe_find(bpe, text, 1);
    }
    bpe->level_full = true;
    for (int b = 0; b < 256; b++)
    {
        static const char hex[] = "0123456789ABCDEF";

        bpe->level[b] = kne_bpe_find(bpe, text, kne_u8_put(kne_byte_to_char((uint8_t) b), text));
        bpe->level_full = bpe->level_full && bpe->level[b] >= 0;
        memcpy(text, "<0x  >", 6);
        text[3] = hex[b >> 4];
        text[4] = hex[b & 15];
        bpe->fallback[b] = kne_bpe_find(bpe, text, 6);
    }
    if (!bpe->first_char)
        return;
    for (int32_t id = 0; id < bpe->n_id; id++)
    {
        const kne_token *t = &bpe->token[id];
        size_t           k;

        if (t->n == 0)
            continue;
        bpe->first_char[id] = kne_char_hash(kne_u8_get(bpe->pool + t->at, &k));
        bpe->last_char[id] = kne_char_hash(kne_u8_last(bpe->pool + t->at, t->n, &k));
    }
}

kne_status
kne_bpe_load(kne_bpe *bpe, cJSON *model, cJSON *added, size_t file_n, bool byte_level,
             kne_err *err)
{
    cJSON   *vocab = kne_tokjson_get(model, "vocab");
    cJSON   *merges = kne_tokjson_get(model, "merges");
    sizes    size = { 0 };
    uint32_t slots = 64;

    if (!vocab || !cJSON_IsObject(vocab) || !merges || !cJSON_IsArray(merges))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's BPE has no vocab or no merges");
    KNE_TRY(measure(vocab, added, file_n, &size, err));
    if (size.text > UINT32_MAX || size.n_model > KNE_TOK_MAX_ID)
        return kne_error(err, KNE_ERR_LIMIT, "tokenizer.json has too many tokens");
    while (slots / 4 * 3 < (uint32_t) size.n_model)
        slots *= 2;
    bpe->vocab_mask = slots - 1;
    layout(bpe, &size, byte_level);
    KNE_TRY(kne_arena_commit(&bpe->arena, err));
    layout(bpe, &size, byte_level);
    bpe->n_id = size.n_id;
    bpe->pool_n = 1; /* offset 0 means no token */
    KNE_TRY(load_vocab(bpe, vocab, err));
    KNE_TRY(load_options(bpe, model, err));
    derive(bpe);
    return load_merges(bpe, merges, err);
}

void
kne_bpe_free(kne_bpe *bpe)
{
    kne_arena_free(&bpe->arena);
    free(bpe->merge);
    *bpe = (kne_bpe) { 0 };
}
