/*
 * kne_requests.c - one handler a request: what follows the view is parsed, the
 * model asked, the answer encoded as kne_protocol.h says. Edits are in
 * kne_requests_edit.c; HELLO, STATUS and CANCEL in kne_server.c.
 *
 * Contract: every count and length is checked against the body before it is
 * used, and a body with anything left over is malformed.
 */
#include "kne_serve.h"

#include "kne_edit.h"

#include <math.h>
#include <stdlib.h>

kne_text
kne_get_span(kne_rbuf *r)
{
    kne_text t;

    t.p = kne_get_bytes(r, &t.len);
    return t;
}

/* ---- models, sets, deltas ---- */

static kne_status
inspect(kne_call *c, kne_err *err)
{
    kne_text        path = kne_get_span(&c->in);
    char           *name;
    kne_loaded     *l = NULL;
    const kne_arch *a;
    kne_status      st;

    if (!kne_get_done(&c->in) || path.len == 0 || memchr(path.p, 0, path.len))
        return kne_malformed(c, err);
    name = strndup(path.p, path.len);
    if (!name)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    st = kne_store_inspect(c->engine->store, name, &l, err);
    free(name);
    if (st != KNE_OK)
        return st;
    a = &l->model->arch;
    kne_put_str(&c->out, a->family);
    kne_put_i32(&c->out, a->n_layers);
    kne_put_i32(&c->out, a->d_model);
    kne_put_i32(&c->out, a->d_ff);
    kne_put_i32(&c->out, a->vocab_size);
    kne_put_i32(&c->out, a->n_ctx);
    kne_put_str(&c->out, kne_model_dtype_name(l->model));
    kne_put_str(&c->out, l->model->fingerprint);
    kne_put_i64(&c->out, l->model->weight_bytes);
    kne_put_u8(&c->out, a->gated);
    kne_store_unpin(c->engine->store, l, NULL);
    return KNE_OK;
}

static kne_status
set_put(kne_call *c, kne_err *err)
{
    uint32_t n = kne_get_count(&c->in, 8 + KNE_DIGEST_LEN);
    int64_t *edit_id = malloc((size_t) n * sizeof *edit_id + 1);
    uint8_t(*digest)[KNE_DIGEST_LEN] = malloc((size_t) n * sizeof *digest + 1);
    uint8_t   *missing = malloc((size_t) n + 1);
    int32_t    n_missing = 0;
    kne_status st;

    if (!edit_id || !digest || !missing)
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
        goto out;
    }
    for (uint32_t i = 0; i < n; i++)
    {
        const void *d;

        edit_id[i] = kne_get_i64(&c->in);
        d = kne_get(&c->in, KNE_DIGEST_LEN);
        if (d)
            memcpy(digest[i], d, KNE_DIGEST_LEN);
    }
    if (!kne_get_done(&c->in))
    {
        st = kne_malformed(c, err);
        goto out;
    }
    st = kne_store_put_set(c->engine->store, c->loaded, c->set, (int32_t) n, edit_id, digest,
                           missing, &n_missing, err);
    if (st == KNE_OK && n_missing)
    {
        c->answer = KNE_MSG_NEED_DELTAS;
        kne_put_u32(&c->out, (uint32_t) n_missing);
        for (uint32_t i = 0; i < n; i++)
            if (missing[i])
                kne_put(&c->out, digest[i], KNE_DIGEST_LEN);
    }
out:
    free(edit_id);
    free(digest);
    free(missing);
    return st;
}

static kne_status
delta_put(kne_call *c, kne_err *err)
{
    const uint8_t *digest = kne_get(&c->in, KNE_DIGEST_LEN);
    kne_delta     *d = NULL;
    kne_status     st;

    if (!digest)
        return kne_malformed(c, err);
    KNE_TRY(kne_delta_read(&c->in, digest, &d, err));
    st = kne_get_done(&c->in) ? kne_store_put_delta(c->engine->store, d, err)
                              : kne_malformed(c, err);
    kne_delta_release(d);
    return st;
}

/* ---- reads ---- */

/* Encode a prompt and check that it is one: at least a token, no more than the context holds. */
kne_status
kne_encode_prompt(const kne_call *c, kne_text prompt, kne_ids *ids, kne_err *err)
{
    const kne_model *m = c->loaded->model;

    KNE_TRY(kne_tokenizer_encode(m->tokenizer, prompt.p, prompt.len, true, ids, err));
    if (ids->n == 0)
    {
        kne_error(err, KNE_ERR_INVALID, "the prompt is empty");
        kne_error_detail(err, "This model's tokenizer adds no token of its own to begin with.");
        return KNE_ERR_INVALID;
    }
    if (ids->n > m->arch.n_ctx)
    {
        kne_error(err, KNE_ERR_LIMIT, "the prompt is longer than the model's context");
        kne_error_detail(err, "The prompt has %d tokens, the model's context %d.", ids->n,
                         m->arch.n_ctx);
        return KNE_ERR_LIMIT;
    }
    for (int32_t i = 0; i < ids->n; i++)
        if (ids->id[i] < 0 || ids->id[i] >= m->arch.vocab_size)
            return kne_error(err, KNE_ERR_FORMAT,
                             "token %d of the tokenizer has no row in the model", ids->id[i]);
    return KNE_OK;
}

/*
 * The text of the continuation, as the difference that it makes to the prompt's: decoders treat the
 * first token of a text as such (SentencePiece's drop its space), so it is not decoded alone.
 */
kne_status
kne_put_continuation(kne_call *c, const kne_ids *prompt, const kne_ids *more, kne_err *err)
{
    const kne_tokenizer *t = c->loaded->model->tokenizer;
    int32_t              n = prompt->n + more->n;
    int32_t             *all = malloc((size_t) n * sizeof *all + 1);
    char                *before = NULL, *whole = NULL, *alone = NULL;
    size_t               n_before, n_whole, n_alone;
    kne_status           st = KNE_OK;

    if (!all)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    memcpy(all, prompt->id, (size_t) prompt->n * sizeof *all);
    if (more->n)
        memcpy(all + prompt->n, more->id, (size_t) more->n * sizeof *all);
    st = kne_tokenizer_decode(t, all, prompt->n, true, &before, &n_before, err);
    if (st == KNE_OK)
        st = kne_tokenizer_decode(t, all, n, true, &whole, &n_whole, err);
    if (st == KNE_OK && n_whole >= n_before && memcmp(whole, before, n_before) == 0)
        kne_put_bytes(&c->out, whole + n_before, n_whole - n_before);
    else if (st == KNE_OK)
    {
        st = kne_tokenizer_decode(t, more->id, more->n, true, &alone, &n_alone, err);
        if (st == KNE_OK)
            kne_put_bytes(&c->out, alone, n_alone);
    }
    free(all);
    free(before);
    free(whole);
    free(alone);
    return st;
}

static kne_status
complete(kne_call *c, kne_err *err)
{
    kne_text   prompt = kne_get_span(&c->in);
    int32_t    max_tokens = kne_get_i32(&c->in);
    kne_ids    ids = {0}, more = {0};
    kne_status st;

    if (!kne_get_done(&c->in))
        return kne_malformed(c, err);
    if (max_tokens < 0)
        return kne_error(err, KNE_ERR_INVALID, "max_tokens must not be negative");
    st = kne_encode_prompt(c, prompt, &ids, err);
    if (st == KNE_OK && max_tokens > 0)
        st = kne_generate(c->loaded->model, c->engine->backend, &c->view->overlay, ids.id, ids.n,
                          max_tokens, kne_serve_yield, c, &more, err);
    if (st == KNE_OK && more.n > 0)
        st = kne_put_continuation(c, &ids, &more, err);
    else if (st == KNE_OK)
        kne_put_str(&c->out, "");
    kne_ids_free(&ids);
    kne_ids_free(&more);
    return st;
}

/* n * (str prompt, str object) -> kne_score_facts, for LOGPROB and KNOWS. */
static kne_status
score(kne_call *c, bool want_logp, kne_err *err)
{
    uint32_t   n = kne_get_count(&c->in, 8);
    kne_text  *prompt = malloc((size_t) n * sizeof *prompt + 1);
    kne_text  *object = malloc((size_t) n * sizeof *object + 1);
    double    *logp = malloc((size_t) n * sizeof *logp + 1);
    uint8_t   *right = malloc((size_t) n + 1);
    kne_status st = KNE_OK;

    if (!prompt || !object || !logp || !right)
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
        goto out;
    }
    for (uint32_t i = 0; i < n; i++)
    {
        prompt[i] = kne_get_span(&c->in);
        object[i] = kne_get_span(&c->in);
    }
    if (!kne_get_done(&c->in))
    {
        st = kne_malformed(c, err);
        goto out;
    }
    if (n)
        st = kne_score_facts(c->loaded->model, c->engine->backend, c->view, prompt, object,
                             (int32_t) n, want_logp ? logp : NULL, want_logp ? NULL : right,
                             kne_serve_yield, c, err);
    if (st != KNE_OK)
        goto out;
    kne_put_u32(&c->out, n);
    if (want_logp)
        kne_put(&c->out, logp, (size_t) n * sizeof *logp);
    else
        kne_put(&c->out, right, n);
out:
    free(prompt);
    free(object);
    free(logp);
    free(right);
    return st;
}

static kne_status
logprob(kne_call *c, kne_err *err)
{
    return score(c, true, err);
}

static kne_status
knows(kne_call *c, kne_err *err)
{
    return score(c, false, err);
}

/* Likelier first; of equals the lower id. */
static bool
likelier(const float *logp, int32_t a, int32_t b)
{
    return logp[a] > logp[b] || (logp[a] == logp[b] && a < b);
}

/* The k likeliest of n, likeliest first: a heap of the best so far, the worst of them on top. */
static void
top_k(const float *logp, int32_t n, int32_t k, int32_t *heap)
{
    int32_t size = 0;

    for (int32_t id = 0; id < n + k; id++)
    {
        int32_t at, moving;

        if (id < n && size < k) /* grow: sift up */
        {
            for (at = size++; at > 0 && likelier(logp, heap[(at - 1) / 2], id); at = (at - 1) / 2)
                heap[at] = heap[(at - 1) / 2];
            heap[at] = id;
            continue;
        }
        if (id < n && !likelier(logp, id, heap[0]))
            continue;
        /* Replace the worst by id; or, when all are seen, move it behind the heap, which sorts. */
        moving = id;
        if (id >= n)
        {
            moving = heap[--size];
            heap[size] = heap[0];
        }
        at = 0;
        for (;;)
        {
            int32_t kid = 2 * at + 1;

            if (kid + 1 < size && likelier(logp, heap[kid], heap[kid + 1]))
                kid++;
            if (kid >= size || !likelier(logp, moving, heap[kid]))
                break;
            heap[at] = heap[kid];
            at = kid;
        }
        if (size)
            heap[at] = moving;
    }
}

/* The text of one token: as the decoder gives it, else as the vocabulary spells it. */
static kne_status
put_token(kne_call *c, int32_t id, kne_err *err)
{
    const kne_tokenizer *t = c->loaded->model->tokenizer;
    const char          *raw = kne_tokenizer_token(t, id);
    char                *text = NULL;
    size_t               len = 0;
    kne_status           st = kne_tokenizer_decode(t, &id, 1, false, &text, &len, err);

    if (st == KNE_ERR_NOMEM)
        return st;
    if (st == KNE_OK && len > 0)
        kne_put_bytes(&c->out, text, len);
    else
        kne_put_str(&c->out, raw ? raw : "");
    free(text);
    return KNE_OK;
}

static kne_status
one_pass(kne_call *c, const kne_ids *ids, kne_work **w, kne_err *err)
{
    int32_t *pos = malloc((size_t) ids->n * sizeof *pos);
    int32_t  last = ids->n - 1;
    kne_seq  seq = {.q0 = 0, .q_len = ids->n, .kv0 = 0, .kv_len = ids->n};
    kne_status st;

    if (!pos)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < ids->n; i++)
        pos[i] = i;
    kne_batch b = {.n = ids->n, .n_seq = 1, .n_out = 1, .id = ids->id, .pos = pos, .seq = &seq,
                   .out_row = &last};
    st = kne_store_work(c->loaded, c->view, ids->n, w, err);
    if (st == KNE_OK)
        st = kne_forward(c->loaded->model, c->engine->backend, *w, &b, &c->view->overlay, NULL, 0,
                         err);
    free(pos);
    return st;
}

static kne_status
next_tokens(kne_call *c, kne_err *err)
{
    kne_text         prompt = kne_get_span(&c->in);
    int32_t          k = kne_get_i32(&c->in);
    const kne_model *m = c->loaded->model;
    kne_backend     *be = c->engine->backend;
    int32_t          vocab = kne_tokenizer_vocab_size(m->tokenizer);
    kne_ids          ids = {0};
    kne_work        *w = NULL;
    int32_t         *best = NULL;
    float           *logp = NULL;
    kne_status       st;

    if (!kne_get_done(&c->in))
        return kne_malformed(c, err);
    if (k < 1)
        return kne_error(err, KNE_ERR_INVALID, "k must be at least 1");
    /* Rows of the head beyond the tokenizer's are padding. */
    vocab = vocab < m->arch.vocab_size ? vocab : m->arch.vocab_size;
    k = k < vocab ? k : vocab;
    st = kne_encode_prompt(c, prompt, &ids, err);
    if (st == KNE_OK)
        st = one_pass(c, &ids, &w, err);
    best = calloc((size_t) k + 1, sizeof *best);
    logp = malloc((size_t) m->arch.vocab_size * sizeof *logp + 1);
    if (st == KNE_OK && (!best || !logp))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (st == KNE_OK)
    {
        /* Probabilities are over all rows, as LOGPROB's are. */
        be->log_softmax(be->ctx, w->logits, w->logits, 1, m->arch.vocab_size);
        be->get(be->ctx, logp, w->logits, (size_t) m->arch.vocab_size * sizeof *logp);
        st = be->status(be->ctx, err);
    }
    if (st == KNE_OK)
    {
        top_k(logp, vocab, k, best);
        kne_put_u32(&c->out, (uint32_t) k);
    }
    for (int32_t i = 0; i < k && st == KNE_OK; i++)
    {
        kne_put_i32(&c->out, best[i]);
        st = put_token(c, best[i], err);
        kne_put_f64(&c->out, exp((double) logp[best[i]]));
    }
    kne_store_work_done(c->loaded);
    kne_ids_free(&ids);
    free(best);
    free(logp);
    return st;
}

static kne_status
tokenize(kne_call *c, kne_err *err)
{
    kne_text   text = kne_get_span(&c->in);
    kne_ids    ids = {0};
    kne_status st;

    if (!kne_get_done(&c->in))
        return kne_malformed(c, err);
    st = kne_tokenizer_encode(c->loaded->model->tokenizer, text.p, text.len, true, &ids, err);
    if (st == KNE_OK)
    {
        kne_put_u32(&c->out, (uint32_t) ids.n);
        kne_put(&c->out, ids.id, (size_t) ids.n * sizeof *ids.id);
    }
    kne_ids_free(&ids);
    return st;
}

static kne_status
detokenize(kne_call *c, kne_err *err)
{
    uint32_t    n = kne_get_count(&c->in, 4);
    const void *raw = kne_get(&c->in, (size_t) n * 4);
    int32_t    *id;
    char       *text = NULL;
    size_t      len = 0;
    kne_status  st;

    if (!raw || !kne_get_done(&c->in))
        return kne_malformed(c, err);
    id = malloc((size_t) n * sizeof *id + 1); /* those in the frame may be unaligned */
    if (!id)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    memcpy(id, raw, (size_t) n * 4);
    st = kne_tokenizer_decode(c->loaded->model->tokenizer, id, (int32_t) n, false, &text, &len,
                              err);
    if (st == KNE_OK)
        kne_put_bytes(&c->out, text, len);
    free(id);
    free(text);
    return st;
}

/* ---- the table ---- */

static const kne_request_kind kinds[] = {
    {KNE_MSG_MODEL_INSPECT, "MODEL_INSPECT", KNE_CLASS_SHORT, KNE_NEEDS_NOTHING, inspect},
    {KNE_MSG_SET_PUT, "SET_PUT", KNE_CLASS_SHORT, KNE_NEEDS_MODEL, set_put},
    {KNE_MSG_DELTA_PUT, "DELTA_PUT", KNE_CLASS_SHORT, KNE_NEEDS_NOTHING, delta_put},
    {KNE_MSG_COMPLETE, "COMPLETE", KNE_CLASS_LONG, KNE_NEEDS_VIEW, complete},
    {KNE_MSG_LOGPROB, "LOGPROB", KNE_CLASS_SHORT, KNE_NEEDS_VIEW, logprob},
    {KNE_MSG_NEXT_TOKENS, "NEXT_TOKENS", KNE_CLASS_SHORT, KNE_NEEDS_VIEW, next_tokens},
    {KNE_MSG_KNOWS, "KNOWS", KNE_CLASS_SHORT, KNE_NEEDS_VIEW, knows},
    {KNE_MSG_TOKENIZE, "TOKENIZE", KNE_CLASS_SHORT, KNE_NEEDS_MODEL, tokenize},
    {KNE_MSG_DETOKENIZE, "DETOKENIZE", KNE_CLASS_SHORT, KNE_NEEDS_MODEL, detokenize},
    {KNE_MSG_SCORE, "SCORE", KNE_CLASS_LONG, KNE_NEEDS_VIEW, kne_handle_score},
    {KNE_MSG_GENERATE, "GENERATE", KNE_CLASS_LONG, KNE_NEEDS_VIEW, kne_handle_generate},
    {KNE_MSG_TEXTS, "TEXTS", KNE_CLASS_LONG, KNE_NEEDS_VIEW, kne_handle_texts},
    {KNE_MSG_EDIT, "EDIT", KNE_CLASS_EDIT, KNE_NEEDS_VIEW, kne_handle_edit},
    {KNE_MSG_LOCATE, "LOCATE", KNE_CLASS_EDIT, KNE_NEEDS_VIEW, kne_handle_locate},
    {KNE_MSG_EXPORT, "EXPORT", KNE_CLASS_LONG, KNE_NEEDS_VIEW, kne_handle_export},
};

const kne_request_kind *
kne_request_kind_of(uint16_t type)
{
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (kinds[i].type == type)
            return &kinds[i];
    return NULL;
}
