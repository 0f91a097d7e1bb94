/*
 * kne_generate.c - decoding with a K/V cache, greedy or by sampling among the likeliest: the
 * prompt in one pass, then one row a token.
 *
 * Contract: at most n_ctx positions are fed, so the last id may be the
 * prediction that the last position makes. A decoding row sees the same numbers
 * in the same order as in a pass over the whole sequence.
 */
#include "kne_graph_impl.h"

#include <math.h>
#include <stdlib.h>

static kne_status
reserve(kne_ids *ids, int32_t extra, kne_err *err)
{
    int32_t  need;
    int32_t *grown;

    if (__builtin_add_overflow(ids->n, extra, &need))
        return kne_error(err, KNE_ERR_LIMIT, "too many tokens");
    if (need <= ids->cap)
        return KNE_OK;
    grown = realloc(ids->id, (size_t) need * sizeof *grown);
    if (!grown)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    ids->id = grown;
    ids->cap = need;
    return KNE_OK;
}

static kne_status
check_prompt(const kne_model *m, const int32_t *prompt, int32_t n_prompt, kne_err *err)
{
    if (n_prompt < 1)
        return kne_error(err, KNE_ERR_INVALID, "empty prompt");
    if (n_prompt > m->arch.n_ctx)
    {
        kne_error(err, KNE_ERR_LIMIT, "prompt is too long for the model");
        kne_error_detail(err, "The prompt has %d tokens, the model's context %d.", n_prompt,
                         m->arch.n_ctx);
        return KNE_ERR_LIMIT;
    }
    for (int32_t i = 0; i < n_prompt; i++)
        if (prompt[i] < 0 || prompt[i] >= m->arch.vocab_size)
            return kne_error(err, KNE_ERR_INVALID, "token id %d is outside the model's vocabulary",
                             prompt[i]);
    return KNE_OK;
}

static int32_t
max_edits(const kne_model *m, const kne_overlay *ov)
{
    int32_t most = 0;

    for (int32_t l = 0; ov && l < m->arch.n_layers; l++)
        if (ov->layer[l].n > most)
            most = ov->layer[l].n;
    return most;
}

/* One of the top_k likeliest, in proportion to their probabilities. logp: (n). */
static int32_t
sample(const float *logp, int32_t n, int32_t top_k, uint64_t *state)
{
    int32_t best[KNE_MAX_TOP_K] = {0}, size = 0;
    double  total = 0, at;

    for (int32_t id = 0; id < n; id++)
    {
        int32_t i = size < top_k ? size++ : top_k - 1;

        if (i == top_k - 1 && size == top_k && id >= top_k && logp[id] <= logp[best[i]])
            continue;
        for (; i > 0 && logp[best[i - 1]] < logp[id]; i--)
            best[i] = best[i - 1];
        best[i] = id;
    }
    for (int32_t i = 0; i < size; i++)
        total += exp((double) logp[best[i]]);
    at = (double) (kne_random_next(state) >> 11) * 0x1p-53 * total;
    for (int32_t i = 0; i < size; i++)
        if ((at -= exp((double) logp[best[i]])) < 0)
            return best[i];
    return best[size - 1];
}

kne_status
kne_generate(const kne_model *m, kne_backend *be, const kne_overlay *ov, const int32_t *prompt,
             int32_t n_prompt, int32_t max_tokens, int (*yield)(void *), void *yield_ctx,
             kne_ids *out, kne_err *err)
{
    return kne_generate_sampled(m, be, ov, prompt, n_prompt, max_tokens, 1, 0, yield, yield_ctx, out, err);
}

kne_status
kne_generate_sampled(const kne_model *m, kne_backend *be, const kne_overlay *ov, const int32_t *prompt,
                     int32_t n_prompt, int32_t max_tokens, int32_t top_k, uint64_t seed, int (*yield)(void *),
                     void *yield_ctx, kne_ids *out, kne_err *err)
{
    kne_work  *w = NULL;
    int32_t   *pos = NULL;
    float     *all = NULL;
    int32_t    steps, n_known = m->arch.vocab_size;
    kne_status st;

    KNE_TRY(check_prompt(m, prompt, n_prompt, err));
    steps = m->arch.n_ctx - n_prompt + 1;
    if (steps > max_tokens)
        steps = max_tokens;
    if (steps < 1)
        return KNE_OK;
    /* Rows of the head beyond the tokenizer's ids are padding: never chosen. */
    if (m->tokenizer && kne_tokenizer_vocab_size(m->tokenizer) < n_known)
        n_known = kne_tokenizer_vocab_size(m->tokenizer);
    KNE_TRY(reserve(out, steps, err));

    pos = malloc((size_t) n_prompt * sizeof *pos);
    if (top_k > 1)
        all = malloc((size_t) n_known * sizeof *all);
    if (!pos || (top_k > 1 && !all))
    {
        free(pos);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    for (int32_t i = 0; i < n_prompt; i++)
        pos[i] = i;
    kne_work_shape shape = {.max_n = n_prompt, .max_out = 1, .max_overlay = max_edits(m, ov)};
    int32_t        next = -1;

    st = kne_work_new_cached(m, shape, n_prompt + steps - 1, 0, &w, err);

    for (int32_t i = 0, past = 0; st == KNE_OK && i < steps; i++)
    {
        int32_t   n = i ? 1 : n_prompt, last = n - 1, target = 0;
        kne_seq   seq = {.q0 = 0, .q_len = n, .kv0 = 0, .kv_len = past + n};
        kne_batch b = {
            .n = n, .n_seq = 1, .n_out = 1, .id = i ? &next : prompt, .pos = i ? &past : pos,
            .seq = &seq, .out_row = &last,
        };

        if (yield && yield(yield_ctx))
            st = kne_error(err, KNE_ERR_CANCELLED, "generation was cancelled");
        else
            st = kne_forward_cached(m, be, w, &b, ov, NULL, 0, past, err);
        if (st != KNE_OK)
            break;
        if (all)
        {
            be->log_softmax(be->ctx, w->logits, w->logits, 1, n_known);
            be->get(be->ctx, all, w->logits, (size_t) n_known * sizeof *all);
        }
        else
            kne_work_logprob(be, w, 0, 1, n_known, &target, NULL, NULL, &next);
        if ((st = be->status(be->ctx, err)) != KNE_OK)
            break;
        if (all)
            next = sample(all, n_known, top_k, &seed);
        if (next == m->arch.eos_id && top_k == 1)
            break;
        out->id[out->n++] = next;
        past += n;
    }
    kne_work_free(w);
    free(pos);
    free(all);
    return st;
}
