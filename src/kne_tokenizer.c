/*
 * kne_tokenizer.c - the tokenizer's interface: encode, decode and what can be
 * asked about tokens. How a file becomes a kne_tokenizer: kne_tokenizer_load.c.
 */
#include <stdlib.h>

#include "kne_tokenizer_impl.h"

/* What encoding one text needs. */
typedef struct scratch
{
    kne_matcher     m;
    kne_pieces      raw;     /* cut around the tokens found before normalising */
    kne_tokbuf      tmp[2];  /* within the normaliser */
    kne_tokbuf      normal;  /* normalised text */
    kne_splits      splits;
    kne_bpe_scratch bpe;
} scratch;

static void
scratch_free(scratch *w)
{
    kne_matcher_free(&w->m);
    free(w->raw.p);
    kne_tokbuf_free(&w->tmp[0]);
    kne_tokbuf_free(&w->tmp[1]);
    kne_tokbuf_free(&w->normal);
    kne_tokbuf_free(&w->splits.buf[0]);
    kne_tokbuf_free(&w->splits.buf[1]);
    free(w->splits.pieces.p);
    free(w->splits.next.p);
    free(w->splits.spans.p);
    kne_bpe_scratch_free(&w->bpe);
}

kne_status
kne_ids_add(kne_ids *ids, int32_t id, kne_err *err)
{
    if (ids->n == ids->cap)
    {
        int32_t  cap = ids->cap ? ids->cap : 64;
        int32_t *grown;

        if (cap > INT32_MAX / 2)
            return kne_error(err, KNE_ERR_LIMIT, "too many tokens");
        cap *= ids->cap ? 2 : 1;
        grown = realloc(ids->id, (size_t) cap * sizeof *grown);
        if (!grown)
            return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
        ids->id = grown;
        ids->cap = cap;
    }
    ids->id[ids->n++] = id;
    return KNE_OK;
}

void
kne_ids_free(kne_ids *ids)
{
    free(ids->id);
    *ids = (kne_ids) { 0 };
}

/* Added tokens out of the raw text, the rest normalised, more added tokens out of that. */
static kne_status
extract(const kne_tokenizer *t, const char *text, size_t n, scratch *w, kne_err *err)
{
    kne_splits *splits = &w->splits;

    if (t->norm.n == 0)
    {
        splits->text = text;
        KNE_TRY(kne_finder_split(&t->raw, text, 0, n, true,
                                 t->normal.n ? &w->raw : &splits->pieces, err));
        for (size_t i = 0; i < w->raw.n; i++)
        {
            const kne_piece *p = &w->raw.p[i];

            if (p->id >= 0)
                KNE_TRY(kne_pieces_add(&splits->pieces, p->at, p->n, p->id, false, err));
            else
                KNE_TRY(kne_finder_split(&t->normal, text, p->at, p->n, p->start, &splits->pieces,
                                         err));
        }
        return KNE_OK;
    }
    KNE_TRY(kne_finder_split(&t->raw, text, 0, n, true, &w->raw, err));
    KNE_TRY(kne_tokbuf_reserve(&w->normal, n + 16, err));
    for (size_t i = 0; i < w->raw.n; i++)
    {
        const kne_piece *p = &w->raw.p[i];
        size_t           at = w->normal.n;
        bool             start = p->start;

        if (p->id >= 0)
            KNE_TRY(kne_pieces_add(&splits->pieces, at, 0, p->id, false, err));
        else
        {
            KNE_TRY(kne_normalizer_run(&t->norm, &w->m, text + p->at, p->n, &start, w->tmp,
                                       &w->normal, err));
            KNE_TRY(kne_finder_split(&t->normal, w->normal.s, at, w->normal.n - at, start,
                                     &splits->pieces, err));
        }
    }
    splits->text = w->normal.s;
    return KNE_OK;
}

static kne_status
encode_text(const kne_tokenizer *t, const char *text, size_t n, scratch *w, kne_ids *ids,
            kne_err *err)
{
    const kne_splits *splits = &w->splits;

    if (n == 0)
        return KNE_OK;
    KNE_TRY(extract(t, text, n, w, err));
    KNE_TRY(kne_pretokenizer_run(&t->pre, &w->m, &w->splits, err));
    for (size_t i = 0; i < splits->pieces.n; i++)
    {
        const kne_piece *p = &splits->pieces.p[i];

        if (p->id >= 0)
            KNE_TRY(kne_ids_add(ids, p->id, err));
        else
            KNE_TRY(kne_bpe_encode(&t->bpe, splits->text + p->at, p->n, t->pre.byte_level, &w->bpe,
                                   ids, err));
    }
    return KNE_OK;
}

/* Around the text, what the post-processor adds. */
static kne_status
encode_template(const kne_tokenizer *t, const char *text, size_t n, bool special, scratch *w,
                kne_ids *ids, kne_err *err)
{
    int32_t from = -1, len = 0;

    if (!t->template_id)
        return encode_text(t, text, n, w, ids, err);
    for (int32_t i = 0; i < t->n_template; i++)
    {
        if (t->template_id[i] >= 0)
        {
            if (special)
                KNE_TRY(kne_ids_add(ids, t->template_id[i], err));
        }
        else if (from < 0)
        {
            from = ids->n;
            KNE_TRY(encode_text(t, text, n, w, ids, err));
            len = ids->n - from;
        }
        else /* a template may repeat the text */
            for (int32_t k = 0; k < len; k++)
                KNE_TRY(kne_ids_add(ids, ids->id[from + k], err));
    }
    return KNE_OK;
}

kne_status
kne_tokenizer_encode(const kne_tokenizer *t, const char *text, size_t len, bool special,
                     kne_ids *ids, kne_err *err)
{
    scratch    w = { 0 };
    int32_t    before = ids->n;
    kne_status st;

    if (len > KNE_TOK_MAX_TEXT)
        return kne_error(err, KNE_ERR_LIMIT, "text is too long for the tokenizer");
    if (!kne_u8_valid(text, len))
        return kne_error(err, KNE_ERR_INVALID, "text is not valid UTF-8");
    st = encode_template(t, text, len, special, &w, ids, err);
    if (st != KNE_OK)
        ids->n = before;
    scratch_free(&w);
    return st;
}

/* The added token of an id, NULL: none. */
static const kne_added *
added_by_id(const kne_tokenizer *t, int32_t id)
{
    int32_t lo = 0, hi = t->n_added;

    while (lo < hi)
    {
        int32_t mid = lo + (hi - lo) / 2;

        if (t->added[mid].id < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < t->n_added && t->added[lo].id == id ? &t->added[lo] : NULL;
}

static kne_status
gather(const kne_tokenizer *t, const int32_t *id, int32_t n, bool skip_special, kne_strings *out,
       kne_err *err)
{
    for (int32_t i = 0; i < n; i++)
    {
        size_t      at = out->buf.n, len;
        const char *s = kne_tokenizer_token(t, id[i]);
        uint8_t     flags;

        if (!s)
            return kne_error(err, KNE_ERR_INVALID, "token id %d is outside the vocabulary", id[i]);
        len = t->bpe.token[id[i]].n;
        flags = t->bpe.flags[id[i]];
        if (flags & KNE_TOK_RENAMED)
        {
            /* As the library: the decoder has to see what the normaliser made of it. */
            const kne_added *a = added_by_id(t, id[i]);

            s = a->normal;
            len = a->normal_n;
        }
        /* And as the library, which asks by that text, a renamed token is not special. */
        else if (skip_special && (flags & KNE_TOK_SPECIAL))
            continue;
        KNE_TRY(kne_tokbuf_add(&out->buf, s, len, err));
        KNE_TRY(kne_pieces_add(&out->pieces, at, len, -1, false, err));
    }
    return KNE_OK;
}

kne_status
kne_tokenizer_decode(const kne_tokenizer *t, const int32_t *id, int32_t n, bool skip_special,
                     char **text, size_t *len, kne_err *err)
{
    kne_strings tokens = { 0 }, spare = { 0 };
    kne_tokbuf  out = { 0 };
    kne_status  st;

    *text = NULL;
    *len = 0;
    st = gather(t, id, n, skip_special, &tokens, err);
    if (st == KNE_OK)
        st = kne_decoder_run(&t->dec, &tokens, &spare, err);
    if (st == KNE_OK)
        st = kne_tokbuf_reserve(&tokens.buf, 1, err); /* a pointer, even if all texts are empty */
    for (size_t i = 0; i < tokens.pieces.n && st == KNE_OK; i++)
    {
        if (i > 0 && !t->dec.present)
            st = kne_tokbuf_add(&out, " ", 1, err);
        if (st == KNE_OK)
            st = kne_tokbuf_add(&out, tokens.buf.s + tokens.pieces.p[i].at, tokens.pieces.p[i].n,
                                err);
    }
    if (st == KNE_OK)
        st = kne_tokbuf_add(&out, "", 1, err);
    if (st == KNE_OK)
    {
        *text = out.s;
        *len = out.n - 1;
        out = (kne_tokbuf) { 0 };
    }
    kne_tokbuf_free(&out);
    kne_tokbuf_free(&tokens.buf);
    kne_tokbuf_free(&spare.buf);
    free(tokens.pieces.p);
    free(spare.pieces.p);
    return st;
}

int32_t
kne_tokenizer_vocab_size(const kne_tokenizer *t)
{
    return t->bpe.n_id;
}

int32_t
kne_tokenizer_token_id(const kne_tokenizer *t, const char *token)
{
    size_t n = strlen(token);

    for (int32_t i = 0; i < t->n_added; i++)
        if (t->added[i].n == n && memcmp(t->added[i].text, token, n) == 0)
            return t->added[i].id;
    return kne_bpe_find(&t->bpe, token, n);
}

const char *
kne_tokenizer_token(const kne_tokenizer *t, int32_t id)
{
    if (id < 0 || id >= t->bpe.n_id || t->bpe.token[id].at == 0)
        return NULL;
    return t->bpe.pool + t->bpe.token[id].at;
}

bool
kne_tokenizer_is_special(const kne_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->bpe.n_id && (t->bpe.flags[id] & KNE_TOK_SPECIAL);
}
