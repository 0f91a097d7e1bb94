/*
 * kne_requests_score.c - SCORE, GENERATE and TEXTS: what evaluations ask, many questions in a message and many in a pass.
 *
 * Contract as in kne_requests.c.
 */
#include "kne_serve.h"

#include "kne_attrib.h"

#include <stdlib.h>

/* Texts of a message and their tokens. */
typedef struct question
{
    kne_ids    *ids;  /* (n) */
    kne_tokens *fact; /* (n) */
    double     *logp; /* (n) */
    int32_t     n;
} question;

static kne_status
question_new(question *q, uint32_t n, kne_err *err)
{
    q->ids = calloc((size_t) n + 1, sizeof *q->ids);
    q->fact = calloc((size_t) n + 1, sizeof *q->fact);
    q->logp = calloc((size_t) n + 1, sizeof *q->logp);
    q->n = (int32_t) n;
    return q->ids && q->fact && q->logp ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");
}

static void
question_free(question *q)
{
    for (int32_t i = 0; q->ids && i < q->n; i++)
        kne_ids_free(&q->ids[i]);
    free(q->ids);
    free(q->fact);
    free(q->logp);
}

kne_status
kne_handle_score(kne_call *c, kne_err *err)
{
    uint32_t   n = kne_get_count(&c->in, 8);
    question   q = {0};
    int32_t   *likeliest = NULL;
    int64_t    total = 0;
    kne_status st = question_new(&q, n, err);

    for (uint32_t i = 0; i < n && st == KNE_OK && !c->in.bad; i++)
    {
        kne_text prompt = kne_get_span(&c->in), answer = kne_get_span(&c->in);

        if (c->in.bad)
            break;
        st = kne_tokenize_fact(c->loaded->model, prompt, answer, &q.ids[i], &q.fact[i].n_prompt, err);
        q.fact[i].id = q.ids[i].id;
        q.fact[i].n = q.ids[i].n;
        total += q.fact[i].n - q.fact[i].n_prompt;
    }
    if (st == KNE_OK && !kne_get_done(&c->in))
        st = kne_malformed(c, err);
    if (st == KNE_OK && !(likeliest = malloc((size_t) total * sizeof *likeliest + 1)))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (st == KNE_OK)
        st = kne_score_each(c->loaded->model, c->engine->backend, c->view, q.fact, q.n, q.logp, NULL, NULL, likeliest,
                            kne_serve_yield, c, err);
    if (st == KNE_OK)
        kne_put_u32(&c->out, n);
    for (int32_t i = 0, at = 0; i < q.n && st == KNE_OK; i++)
    {
        kne_put_f64(&c->out, q.logp[i]);
        kne_put_u32(&c->out, (uint32_t) (q.fact[i].n - q.fact[i].n_prompt));
        for (int32_t k = q.fact[i].n_prompt; k < q.fact[i].n; k++)
        {
            kne_put_i32(&c->out, q.fact[i].id[k]);
            kne_put_i32(&c->out, likeliest[at++]);
        }
    }
    question_free(&q);
    free(likeliest);
    return st;
}

kne_status
kne_handle_generate(kne_call *c, kne_err *err)
{
    int32_t    max_tokens = kne_get_i32(&c->in), top_k = kne_get_i32(&c->in);
    int64_t    seed = kne_get_i64(&c->in);
    uint32_t   n = kne_get_count(&c->in, 4);
    kne_status st = KNE_OK;

    if (!c->in.bad && (max_tokens < 0 || top_k < 1 || top_k > KNE_MAX_TOP_K))
        return kne_error(err, KNE_ERR_INVALID, "max_tokens or top_k out of range");
    kne_put_u32(&c->out, n);
    for (uint32_t i = 0; i < n && st == KNE_OK && !c->in.bad; i++)
    {
        kne_text prompt = kne_get_span(&c->in);
        kne_ids  ids = {0}, more = {0};

        if (c->in.bad)
            break;
        st = kne_encode_prompt(c, prompt, &ids, err);
        if (st == KNE_OK && max_tokens > 0)
            st = kne_generate_sampled(c->loaded->model, c->engine->backend, &c->view->overlay, ids.id, ids.n, max_tokens, top_k,
                                      (uint64_t) seed + i, kne_serve_yield, c, &more, err);
        if (st == KNE_OK && more.n > 0)
            st = kne_put_continuation(c, &ids, &more, err);
        else if (st == KNE_OK)
            kne_put_str(&c->out, "");
        kne_ids_free(&ids);
        kne_ids_free(&more);
    }
    if (st == KNE_OK && !kne_get_done(&c->in))
        st = kne_malformed(c, err);
    return st;
}

/* A text as a fact whose prompt is its first token; what is over the context is cut off. */
static kne_status
text_tokens(const kne_model *m, kne_text text, kne_ids *ids, kne_tokens *fact, kne_err *err)
{
    KNE_TRY(kne_tokenizer_encode(m->tokenizer, text.p, text.len, true, ids, err));
    fact->id = ids->id;
    fact->n = ids->n < m->arch.n_ctx ? ids->n : m->arch.n_ctx;
    fact->n_prompt = 1;
    for (int32_t k = 0; k < fact->n; k++)
        if (ids->id[k] < 0 || ids->id[k] >= m->arch.vocab_size)
            return kne_error(err, KNE_ERR_FORMAT, "token %d of the tokenizer has no row in the model", ids->id[k]);
    return KNE_OK;
}

kne_status
kne_handle_texts(kne_call *c, kne_err *err)
{
    uint32_t   n = kne_get_count(&c->in, 4);
    question   q = {0};
    int32_t    m = 0; /* texts that have a second token, packed to the front */
    int32_t   *of = NULL;
    kne_status st = question_new(&q, n, err);

    if (st == KNE_OK && !(of = malloc((size_t) n * sizeof *of + 1)))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < n && st == KNE_OK && !c->in.bad; i++)
    {
        kne_text text = kne_get_span(&c->in);

        if (c->in.bad)
            break;
        st = text_tokens(c->loaded->model, text, &q.ids[i], &q.fact[m], err);
        of[i] = q.fact[m].n > 1 ? m++ : -1;
    }
    if (st == KNE_OK && !kne_get_done(&c->in))
        st = kne_malformed(c, err);
    if (st == KNE_OK)
        st = kne_score_tokens(c->loaded->model, c->engine->backend, c->view, q.fact, m, q.logp, NULL, NULL, kne_serve_yield, c,
                              err);
    if (st == KNE_OK)
        kne_put_u32(&c->out, n);
    for (uint32_t i = 0; i < n && st == KNE_OK; i++)
    {
        kne_put_f64(&c->out, of[i] < 0 ? 0 : q.logp[of[i]]);
        kne_put_i32(&c->out, of[i] < 0 ? 0 : q.fact[of[i]].n - 1);
    }
    question_free(&q);
    free(of);
    return st;
}
