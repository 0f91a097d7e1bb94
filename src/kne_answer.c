/*
 * kne_answer.c - facts scored, and what the model itself says after their prompts (see kne_attrib.h): one pass over
 * prompts and objects, then one row a token of every answer that goes on.
 *
 * An object's tokens are rows of the first pass already, so as long as the model says the same they need no other. Each pass puts its
 * keys and values behind those of the passes before, and a sequence picks its own from among them.
 */
#include "kne_attrib.h"
#include "kne_graph_impl.h"
#include "kne_pack.h"

#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 512
#define PASS_OUTS 256

/* An answer that goes on. */
typedef struct speaker
{
    int32_t  who;   /* its fact */
    int32_t  row0, n0; /* its rows in the first pass: where, and how many of them count */
    int32_t  n, *row;  /* (max_tokens) its rows in later passes */
    int32_t  next;  /* the token that is fed next */
} speaker;

typedef struct talk
{
    const kne_model   *m;
    kne_backend       *be;
    const kne_overlay *ov;
    const kne_tokens  *fact;
    int32_t            max_tokens, n_known;
    kne_ids           *answer;
    bool             (*enough)(void *ctx, const kne_ids *ids);
    void              *ctx;
    kne_pack           pack;
    kne_work          *work;
    float             *logp;    /* (max_out) */
    int32_t           *best;    /* (max_out) */
    speaker           *speaker; /* (max_seq) */
    int32_t            n;       /* of them */
    int32_t           *later;   /* (max_seq, max_tokens) */
    int32_t           *key;     /* (max_key) */
} talk;

/* The token that an out row of the last pass calls for. Rows of the head beyond the tokenizer's ids are padding: never chosen. */
static int32_t
likeliest(const talk *t, int32_t out)
{
    const int32_t target = 0;
    kne_work     *w = t->work;
    int32_t       best;

    if (t->best[out] < t->n_known)
        return t->best[out];
    kne_device_put(t->be, w->target, &target, sizeof target);
    t->be->logprob(t->be->ctx, w->logp, w->best, NULL, w->logits + (size_t) out * (size_t) t->m->arch.vocab_size, w->target, NULL, 1,
                   t->n_known);
    t->be->get(t->be->ctx, &best, w->best, sizeof best);
    return best;
}

/* Does the answer go on after this token. */
static bool
say(const talk *t, int32_t who, int32_t token)
{
    const int32_t room = t->m->arch.n_ctx - t->fact[who].n_prompt + 1;
    kne_ids      *ids = &t->answer[who];

    if (token == t->m->arch.eos_id)
        return false;
    ids->id[ids->n++] = token;
    return ids->n < t->max_tokens && ids->n < room && !(t->enough && t->enough(t->ctx, ids));
}

/* Facts [from, to) are packed. */
static kne_status
begin_answers(talk *t, int32_t from, int32_t to, double *logp, uint8_t *right, kne_err *err)
{
    const int32_t V = t->m->arch.vocab_size;

    t->n = 0;
    KNE_TRY(kne_forward_cached(t->m, t->be, t->work, &t->pack.b, t->ov, NULL, 0, 0, err));
    kne_work_logprob(t->be, t->work, 0, t->pack.b.n_out, V, t->pack.target, NULL, t->logp, t->best);
    KNE_TRY(t->be->status(t->be->ctx, err));
    for (int32_t i = from, out = 0; i < to; i++)
    {
        const kne_tokens *f = &t->fact[i];
        const int32_t     s = f->n - f->n_prompt;
        int32_t           j = 0, token;
        bool              more;

        logp[i] = 0;
        right[i] = true;
        for (int32_t k = out; k < out + s; k++)
        {
            logp[i] += t->logp[k];
            right[i] &= t->best[k] == t->pack.target[k];
        }
        more = say(t, i, token = likeliest(t, out));
        while (more && j + 1 < s && token == f->id[f->n_prompt + j])
            more = say(t, i, token = likeliest(t, out + ++j));
        if (more)
        {
            t->speaker[t->n] = (speaker) {i, t->pack.seq[i - from].q0, f->n_prompt + j, 0, t->later + (size_t) t->n * (size_t) t->max_tokens, token};
            t->n++;
        }
        out += s;
    }
    return KNE_OK;
}

/* One more token of every answer that goes on; past: rows of all passes before. */
static kne_status
next_tokens(talk *t, int32_t past, kne_err *err)
{
    kne_pack *p = &t->pack;
    int32_t   n_key = 0, left = 0;

    kne_pack_clear(p);
    for (int32_t i = 0; i < t->n; i++)
    {
        speaker      *s = &t->speaker[i];
        const int32_t kv0 = n_key;

        p->id[i] = s->next;
        p->pos[i] = s->n0 + s->n;
        p->out_row[i] = i;
        p->target[i] = 0;
        s->row[s->n++] = past + i;
        for (int32_t k = 0; k < s->n0; k++)
            t->key[n_key++] = s->row0 + k;
        memcpy(t->key + n_key, s->row, (size_t) s->n * sizeof *s->row);
        n_key += s->n;
        p->seq[i] = (kne_seq) {.q0 = i, .q_len = 1, .kv0 = kv0, .kv_len = n_key - kv0};
    }
    p->b.n = p->b.n_seq = p->b.n_out = t->n;
    p->b.n_key = n_key;
    p->b.key = t->key;
    KNE_TRY(kne_forward_cached(t->m, t->be, t->work, &p->b, t->ov, NULL, 0, past, err));
    kne_work_logprob(t->be, t->work, 0, t->n, t->m->arch.vocab_size, p->target, NULL, NULL, t->best);
    KNE_TRY(t->be->status(t->be->ctx, err));
    for (int32_t i = 0; i < t->n; i++)
    {
        speaker *s = &t->speaker[i];

        s->next = likeliest(t, i);
        if (say(t, s->who, s->next))
            t->speaker[left++] = *s;
    }
    t->n = left;
    return KNE_OK;
}

static void
layout(talk *t, kne_arena *a, int32_t rows, int32_t outs, int32_t seqs, int32_t keys)
{
    kne_pack_layout(&t->pack, a, rows, seqs, outs);
    t->logp = kne_arena_take(a, (size_t) outs, sizeof *t->logp);
    t->best = kne_arena_take(a, (size_t) outs, sizeof *t->best);
    t->speaker = kne_arena_take(a, (size_t) seqs, sizeof *t->speaker);
    t->later = kne_arena_take(a, (size_t) seqs * (size_t) t->max_tokens, sizeof *t->later);
    t->key = kne_arena_take(a, (size_t) keys, sizeof *t->key);
}

kne_status
kne_answers(const kne_model *m, kne_backend *be, const kne_view *view, const kne_tokens *fact, int32_t n, int32_t max_tokens,
            double *logp, uint8_t *right, kne_ids *answer, bool (*enough)(void *ctx, const kne_ids *ids), void *ctx,
            int (*yield)(void *), void *yield_ctx, kne_err *err)
{
    talk       t = {.m = m, .be = be, .ov = &view->overlay, .fact = fact, .max_tokens = max_tokens, .n_known = m->arch.vocab_size,
                    .answer = answer, .enough = enough, .ctx = ctx};
    kne_arena  arena = {0};
    int32_t    rows, outs, seqs, longest = 1, most_out = 1;
    int64_t    total = 0, total_out = 0;
    kne_status st = KNE_OK;

    if (n == 0)
        return KNE_OK;
    if (m->tokenizer && kne_tokenizer_vocab_size(m->tokenizer) < t.n_known)
        t.n_known = kne_tokenizer_vocab_size(m->tokenizer);
    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        const int32_t s = fact[i].n - fact[i].n_prompt;

        longest = fact[i].n - 1 > longest ? fact[i].n - 1 : longest;
        most_out = s > most_out ? s : most_out;
        total += fact[i].n - 1;
        total_out += s;
        answer[i] = (kne_ids) {.id = malloc((size_t) max_tokens * sizeof *answer[i].id), .cap = max_tokens};
        if (!answer[i].id)
            st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    /* everything when it is little, else as many facts as one pass should take */
    rows = kne_pass_rows(m, PASS_ROWS);
    rows = longest > rows ? longest : total < rows ? (int32_t) total : rows;
    outs = most_out > PASS_OUTS ? most_out : total_out < PASS_OUTS ? (int32_t) total_out : PASS_OUTS;
    seqs = n < outs ? n : outs;
    seqs = seqs < rows ? seqs : rows;
    const int32_t keys = rows + seqs * max_tokens;

    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        layout(&t, &arena, rows, outs, seqs, keys);
        if (turn == 0)
            st = kne_arena_commit(&arena, err);
    }
    if (st == KNE_OK)
        st = kne_work_new_cached(m, (kne_work_shape) {rows, outs, view->max_overlay, false}, keys, keys, &t.work, err);
    for (int32_t from = 0, to = 0; from < n && st == KNE_OK; from = to)
    {
        int32_t past;

        kne_pack_clear(&t.pack);
        for (; to < n && kne_pack_fits(&t.pack, fact[to].n, fact[to].n_prompt); to++)
            kne_pack_add(&t.pack, fact[to].id, fact[to].n, fact[to].n_prompt);
        past = t.pack.b.n;
        t.n = 0;
        for (bool first = true; st == KNE_OK && (first || t.n); first = false)
        {
            const int32_t fed = t.n;

            if (yield && yield(yield_ctx))
                st = kne_error(err, KNE_ERR_CANCELLED, "cancelled");
            else
                st = first ? begin_answers(&t, from, to, logp, right, err) : next_tokens(&t, past, err);
            past += first ? 0 : fed;
        }
    }
    kne_work_free(t.work);
    kne_arena_free(&arena);
    return st;
}
