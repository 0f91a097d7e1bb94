/*
 * kne_facts.c - facts as tokens, and what a model makes of them.
 */
#include "kne_attrib.h"
#include "kne_pack.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS 1024 /* of one packed pass: a reader waits for no more than that */

static bool
is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Punctuation that hangs on the word before it. */
static bool
joins_left(char c)
{
    return c && strchr(".,;:!?)]}'\"%", c) != NULL;
}

kne_status
kne_tokenize_fact(const kne_model *m, kne_text prompt, kne_text object, kne_ids *ids, int32_t *n_prompt,
                  kne_err *err)
{
    kne_ids    alone = {0};
    char      *text;
    size_t     len = prompt.len;
    kne_status st;

    if (object.len == 0)
        return kne_error(err, KNE_ERR_INVALID, "the text after the prompt is empty");
    text = malloc(prompt.len + object.len + 2);
    if (!text)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    memcpy(text, prompt.p, len);
    if (len && !is_space(text[len - 1]) && !is_space(object.p[0]) && !joins_left(object.p[0]))
        text[len++] = ' ';
    memcpy(text + len, object.p, object.len);
    len += object.len;

    ids->n = 0;
    st = kne_tokenizer_encode(m->tokenizer, prompt.p, prompt.len, true, &alone, err);
    if (st == KNE_OK)
        st = kne_tokenizer_encode(m->tokenizer, text, len, true, ids, err);
    free(text);

    if (st == KNE_OK)
    {
        /* A post-processor that also closes the text puts its last token after the object: not part of it. */
        int32_t end = ids->n;
        while (end > 1 && alone.n && ids->id[end - 1] == alone.id[alone.n - 1] &&
               kne_tokenizer_is_special(m->tokenizer, ids->id[end - 1]))
            end--, alone.n--;
        ids->n = end;

        int32_t at = 0;
        while (at < alone.n && at < ids->n && alone.id[at] == ids->id[at])
            at++;
        *n_prompt = at;
        if (at == ids->n)
            st = kne_error(err, KNE_ERR_INVALID, "the text after the prompt has no token of its own");
        else if (at == 0)
        {
            st = kne_error(err, KNE_ERR_INVALID, "the prompt is empty");
            kne_error_detail(err, "This model's tokenizer puts no token before a text, so there is nothing to predict from.");
        }
        else if (ids->n > m->arch.n_ctx)
        {
            st = kne_error(err, KNE_ERR_LIMIT, "prompt and answer are longer than the model's context");
            kne_error_detail(err, "They have %d tokens, the context has %d.", ids->n, m->arch.n_ctx);
        }
    }
    kne_ids_free(&alone);
    return st;
}

/* Run what is packed: facts [from, to). */
static kne_status
score_pass(const kne_model *m, kne_backend *be, const kne_view *view, kne_work *work, const kne_pack *pack,
           const kne_tokens *fact, int32_t from, int32_t to, float *lp, int32_t *best, double *logp,
           uint8_t *right, float *const *all_logp, int32_t *likeliest, kne_err *err)
{
    const int32_t V = m->arch.vocab_size;

    KNE_TRY(kne_forward(m, be, work, &pack->b, view ? &view->overlay : NULL, NULL, 0, err));
    kne_work_logprob(be, work, 0, pack->b.n_out, V, pack->target, NULL, lp, best);
    KNE_TRY(be->status(be->ctx, err));
    if (likeliest)
        memcpy(likeliest, best, (size_t) pack->b.n_out * sizeof *best);
    for (int32_t i = from, o = 0; i < to; i++)
    {
        int32_t s = fact[i].n - fact[i].n_prompt;
        double  sum = 0;
        bool    ok = true;

        if (all_logp && all_logp[i])
            be->log_softmax(be->ctx, all_logp[i], work->logits + (size_t) o * (size_t) V, s, V);
        for (int32_t j = 0; j < s; j++, o++)
        {
            sum += lp[o];
            ok &= best[o] == pack->target[o];
        }
        if (logp)
            logp[i] = sum;
        if (right)
            right[i] = ok;
    }
    return KNE_OK;
}

kne_status
kne_score_tokens(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact, int32_t n,
                 double *logp, uint8_t *right, float *const *all_logp, int (*yield)(void *), void *yield_ctx,
                 kne_err *err)
{
    return kne_score_each(m, be, view, fact, n, logp, right, all_logp, NULL, yield, yield_ctx, err);
}

kne_status
kne_score_each(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact, int32_t n,
               double *logp, uint8_t *right, float *const *all_logp, int32_t *likeliest, int (*yield)(void *),
               void *yield_ctx, kne_err *err)
{
    kne_work  *work = NULL;
    kne_pack   pack = {0};
    kne_arena  arena = {0};
    float     *lp = NULL;
    int32_t   *best = NULL, rows, outs, longest = 1, most_out = 1;
    int64_t    total = 0, done = 0;
    kne_status st = KNE_OK;

    if (n == 0)
        return KNE_OK;
    for (int32_t i = 0; i < n; i++)
    {
        int32_t s = fact[i].n - fact[i].n_prompt;

        longest = fact[i].n > longest ? fact[i].n : longest;
        most_out = s > most_out ? s : most_out;
        total += fact[i].n;
    }
    /* everything when it is little, else as many facts as one pass should take */
    rows = total < MAX_ROWS ? (int32_t) total : MAX_ROWS;
    rows = rows > longest ? rows : longest;
    outs = rows < 256 ? rows : 256;
    outs = outs > most_out ? outs : most_out;
    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        kne_pack_layout(&pack, &arena, rows, rows, outs);
        lp = kne_arena_take(&arena, (size_t) outs, sizeof *lp);
        best = kne_arena_take(&arena, (size_t) outs, sizeof *best);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
    }
    if (st == KNE_OK)
        st = kne_work_new(m, (kne_work_shape) {rows, outs, view ? view->max_overlay : 0, false}, &work, err);

    for (int32_t from = 0, to = 0; from < n && st == KNE_OK; from = to)
    {
        kne_pack_clear(&pack);
        for (; to < n && kne_pack_fits(&pack, fact[to].n, fact[to].n_prompt); to++)
            kne_pack_add(&pack, fact[to].id, fact[to].n, fact[to].n_prompt);
        if (from && yield && yield(yield_ctx))
            st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
        else
            st = score_pass(m, be, view, work, &pack, fact, from, to, lp, best, logp, right, all_logp,
                            likeliest ? likeliest + done : NULL, err);
        done += pack.b.n_out;
    }
    kne_work_free(work);
    kne_arena_free(&arena);
    return st;
}

kne_status
kne_score_facts(const kne_model *m, kne_backend *be, const kne_view *view, const kne_text *prompt,
                const kne_text *object, int32_t n, double *logp, uint8_t *right, int (*yield)(void *),
                void *yield_ctx, kne_err *err)
{
    kne_ids    *ids = calloc((size_t) n + 1, sizeof *ids);
    kne_tokens *fact = calloc((size_t) n + 1, sizeof *fact);
    kne_status  st = ids && fact ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        st = kne_tokenize_fact(m, prompt[i], object[i], &ids[i], &fact[i].n_prompt, err);
        fact[i].id = ids[i].id;
        fact[i].n = ids[i].n;
    }
    if (st == KNE_OK)
        st = kne_score_tokens(m, be, view, fact, n, logp, right, NULL, yield, yield_ctx, err);
    for (int32_t i = 0; ids && i < n; i++)
        kne_ids_free(&ids[i]);
    free(ids);
    free(fact);
    return st;
}

kne_status
kne_score_texts(const kne_model *m, kne_backend *be, const kne_view *view, const kne_text *text, int32_t n,
                double *logp, int32_t *tokens, int (*yield)(void *), void *yield_ctx, kne_err *err)
{
    kne_ids    *ids = calloc((size_t) n + 1, sizeof *ids);
    kne_tokens *fact = calloc((size_t) n + 1, sizeof *fact);
    double     *found = calloc((size_t) n + 1, sizeof *found);
    int32_t     used = 0;
    kne_status  st = ids && fact && found ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        int32_t length;

        st = kne_tokenizer_encode(m->tokenizer, text[i].p, text[i].len, true, &ids[i], err);
        length = ids[i].n < m->arch.n_ctx ? ids[i].n : m->arch.n_ctx;
        for (int32_t k = 0; k < length && st == KNE_OK; k++)
            if (ids[i].id[k] < 0 || ids[i].id[k] >= m->arch.vocab_size)
                st = kne_error(err, KNE_ERR_FORMAT, "token %d of the tokenizer has no row in the model", ids[i].id[k]);
        tokens[i] = length > 1 ? length - 1 : 0;
        if (tokens[i])
            fact[used++] = (kne_tokens) {ids[i].id, length, 1};
    }
    if (st == KNE_OK)
        st = kne_score_tokens(m, be, view, fact, used, found, NULL, NULL, yield, yield_ctx, err);
    for (int32_t i = 0, at = 0; i < n && st == KNE_OK; i++)
        logp[i] = tokens[i] ? found[at++] : 0;
    for (int32_t i = 0; ids && i < n; i++)
        kne_ids_free(&ids[i]);
    free(ids);
    free(fact);
    free(found);
    return st;
}
