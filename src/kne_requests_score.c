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

kne_status
kne_handle_texts(kne_call *c, kne_err *err)
{
    uint32_t   n = kne_get_count(&c->in, 4);
    kne_text  *text = malloc((size_t) n * sizeof *text + 1);
    double    *logp = malloc((size_t) n * sizeof *logp + 1);
    int32_t   *tokens = malloc((size_t) n * sizeof *tokens + 1);
    kne_status st = text && logp && tokens ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (uint32_t i = 0; i < n && st == KNE_OK; i++)
        text[i] = kne_get_span(&c->in);
    if (st == KNE_OK && !kne_get_done(&c->in))
        st = kne_malformed(c, err);
    if (st == KNE_OK)
        st = kne_score_texts(c->loaded->model, c->engine->backend, c->view, text, (int32_t) n, logp, tokens, kne_serve_yield, c,
                             err);
    if (st == KNE_OK)
        kne_put_u32(&c->out, n);
    for (uint32_t i = 0; i < n && st == KNE_OK; i++)
    {
        kne_put_f64(&c->out, logp[i]);
        kne_put_i32(&c->out, tokens[i]);
    }
    free(text);
    free(logp);
    free(tokens);
    return st;
}
