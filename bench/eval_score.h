/*
 * eval_score.h - what a view answers: token by token, teacher-forced, and by free generation.
 *
 * Definitions are those of EasyEdit's evaluation, ROME's and MEMIT's (docs/quality.md names each). Exact match, "every
 * object token is the argmax", is what greedy decoding from the prompt would say, token for token.
 */
#ifndef EVAL_SCORE_H
#define EVAL_SCORE_H

#include "eval_suite.h"
#include "kne_graph_impl.h"
#include "kne_pack.h"

#include <ctype.h>
#include <math.h>

#define SCORE_ROWS 1024
#define FLUENCY_TOKENS 100 /* prompt included */
#define FLUENCY_TOP 5

typedef struct device
{
    kne_model   *model;
    kne_backend *be;
} device;

/* The answer's tokens at one probe; n = 0: it could not be tokenised. */
typedef struct span
{
    int32_t  n, *target, *best;
    double   logp; /* mean over the tokens */
} span;

static span *
score_spans(const device *dev, const kne_view *view, const probes *p)
{
    const int32_t V = dev->model->arch.vocab_size;
    const int32_t max = dev->model->arch.n_ctx > SCORE_ROWS ? dev->model->arch.n_ctx : SCORE_ROWS;
    span         *out = take((size_t) p->n, sizeof *out);
    kne_ids      *ids = take((size_t) p->n, sizeof *ids);
    int32_t      *n_prompt = take((size_t) p->n, sizeof *n_prompt), *best = take((size_t) max, sizeof *best);
    float        *logp = take((size_t) max, sizeof *logp);
    kne_arena     arena = {0};
    kne_pack      pack = {0};
    kne_work     *w = NULL;
    kne_err       err;

    for (int turn = 0; turn < 2; turn++)
    {
        kne_pack_layout(&pack, &arena, max, max, max);
        if (turn == 0 && kne_arena_commit(&arena, &err) != KNE_OK)
            die("scoring", &err);
    }
    if (kne_work_new(dev->model, (kne_work_shape) {max, max, view->max_overlay, false}, &w, &err) != KNE_OK)
        die("scoring", &err);
    for (int i = 0; i < p->n; i++)
    {
        kne_status st = kne_tokenize_fact(dev->model, p->prompt[i], p->answer[i], &ids[i], &n_prompt[i], &err);

        if (st == KNE_ERR_NOMEM)
            die("scoring", &err);
        if (st != KNE_OK)
            continue;
        out[i].n = ids[i].n - n_prompt[i];
        out[i].target = take((size_t) out[i].n, sizeof(int32_t));
        out[i].best = take((size_t) out[i].n, sizeof(int32_t));
    }
    for (int from = 0, to = 0; from < p->n; from = to)
    {
        int32_t at = 0;

        kne_pack_clear(&pack);
        for (; to < p->n && (!out[to].n || kne_pack_fits(&pack, ids[to].n, n_prompt[to])); to++)
            if (out[to].n)
                kne_pack_add(&pack, ids[to].id, ids[to].n, n_prompt[to]);
        if (!pack.b.n)
            continue;
        if (kne_forward(dev->model, dev->be, w, &pack.b, &view->overlay, NULL, 0, &err) != KNE_OK)
            die("scoring", &err);
        kne_work_logprob(dev->be, w, 0, pack.b.n_out, V, pack.target, NULL, logp, best);
        for (int i = from; i < to; i++)
            for (int32_t k = 0; k < out[i].n; k++, at++)
            {
                out[i].target[k] = pack.target[at];
                out[i].best[k] = best[at];
                out[i].logp += logp[at] / out[i].n;
            }
    }
    for (int i = 0; i < p->n; i++)
        kne_ids_free(&ids[i]);
    free(ids), free(n_prompt), free(best), free(logp);
    kne_work_free(w);
    kne_arena_free(&arena);
    return out;
}

static void
free_spans(span *s, int n)
{
    for (int i = 0; i < n; i++)
        free(s[i].target), free(s[i].best);
    free(s);
}

/* Share of the answer's tokens that are the argmax; against another view's argmax where `before` is given. */
static double
token_share(const span *s, const span *before)
{
    int n = 0;

    for (int32_t k = 0; k < s->n; k++)
        n += s->best[k] == (before ? before->best[k] : s->target[k]);
    return s->n ? (double) n / s->n : 0;
}

static bool
is_exact(const span *s)
{
    return s->n && token_share(s, NULL) == 1;
}

/* ---- fluency ---- */

typedef struct gram
{
    const char *p;
    int         len;
} gram;

static int
gram_order(const void *a, const void *b)
{
    const gram *x = a, *y = b;
    int         n = x->len < y->len ? x->len : y->len, c = memcmp(x->p, y->p, (size_t) n);

    return c ? c : x->len - y->len;
}

/* Entropy in bits of the word n-grams of a text whose words are one space apart. */
static double
gram_entropy(const char *text, int n)
{
    gram  *g = take(strlen(text) / 2 + 1, sizeof *g);
    int    n_grams = 0, n_words = 0;
    const char *start[16];
    double h = 0;

    for (const char *p = text; *p; n_words++)
    {
        const char *end = p + strcspn(p, " ");

        for (int i = n - 1; i > 0; i--)
            start[i] = start[i - 1];
        start[0] = p;
        if (n_words >= n - 1)
            g[n_grams++] = (gram) {start[n - 1], (int) (end - start[n - 1])};
        p = end + (*end == ' ');
    }
    qsort(g, (size_t) n_grams, sizeof *g, gram_order);
    for (int i = 0, k; i < n_grams; i = k)
    {
        for (k = i; k < n_grams && gram_order(&g[i], &g[k]) == 0; k++)
            ;
        h -= (double) (k - i) / n_grams * log2((double) (k - i) / n_grams);
    }
    free(g);
    return h;
}

/* Words and punctuation marks one space apart: letters, digits, apostrophes and bytes above 127 hold together. */
static char *
words_of(const char *text)
{
    char *out = take(2 * strlen(text), 1), *to = out;
    bool  in_word = false;

    for (const unsigned char *p = (const unsigned char *) text; *p; p++)
    {
        bool word = isalnum(*p) || *p == '\'' || *p > 127;

        if ((!word || !in_word) && !isspace(*p) && to > out)
            *to++ = ' ';
        if (!isspace(*p))
            *to++ = (char) *p;
        in_word = word;
    }
    *to = '\0';
    return out;
}

/* (2/3 H2 + 4/3 H3) / 2 of a continuation of the prompt by top-5 sampling, x 100. */
static double
fluency(const device *dev, const kne_view *view, kne_text prompt, uint64_t seed)
{
    const kne_arch *arch = &dev->model->arch;
    int32_t         n_prompt, max = arch->n_ctx < FLUENCY_TOKENS ? arch->n_ctx : FLUENCY_TOKENS, n_vocab = arch->vocab_size;
    int32_t         pos[FLUENCY_TOKENS];
    kne_ids         ids = {0};
    kne_work       *w = NULL;
    char           *text = NULL, *words;
    size_t          len;
    kne_err         err;

    if (kne_tokenize_fact(dev->model, prompt, text_of("a"), &ids, &n_prompt, &err) != KNE_OK || n_prompt >= max)
    {
        kne_ids_free(&ids);
        return NAN;
    }
    if (kne_tokenizer_vocab_size(dev->model->tokenizer) < n_vocab)
        n_vocab = kne_tokenizer_vocab_size(dev->model->tokenizer);
    ids.id = realloc(ids.id, ((size_t) max + 1) * sizeof *ids.id);
    ids.n = n_prompt;
    if (!ids.id ||
        kne_work_new_cached(dev->model, (kne_work_shape) {n_prompt, 1, view->max_overlay, false}, max, 0, &w, &err) != KNE_OK)
        die("fluency", &err);
    for (int32_t i = 0; i < max; i++)
        pos[i] = i;
    for (int32_t past = 0; ids.n < max;)
    {
        int32_t   n = ids.n - past, last = n - 1, top[FLUENCY_TOP];
        kne_seq   seq = {0, n, 0, ids.n};
        kne_batch b = {.n = n, .n_seq = 1, .n_out = 1, .id = ids.id + past, .pos = pos + past, .seq = &seq, .out_row = &last};
        double    p[FLUENCY_TOP], sum = 0, draw;
        int       n_top = 0, k;

        if (kne_forward_cached(dev->model, dev->be, w, &b, &view->overlay, NULL, 0, past, &err) != KNE_OK)
            die("fluency", &err);
        for (int32_t v = 0; v < n_vocab; v++) /* the five likeliest, best first */
        {
            for (k = n_top; k > 0 && w->logits[v] > w->logits[top[k - 1]]; k--)
                if (k < FLUENCY_TOP)
                    top[k] = top[k - 1];
            if (k < FLUENCY_TOP)
            {
                top[k] = v;
                n_top += n_top < FLUENCY_TOP;
            }
        }
        for (k = 0; k < n_top; k++)
            sum += p[k] = exp((double) w->logits[top[k]] - w->logits[top[0]]);
        draw = (double) (kne_random_next(&seed) >> 11) * 0x1p-53 * sum;
        for (k = 0; k < n_top - 1 && draw >= p[k]; k++)
            draw -= p[k];
        past = ids.n;
        ids.id[ids.n++] = top[k];
    }
    if (kne_tokenizer_decode(dev->model->tokenizer, ids.id, ids.n, true, &text, &len, &err) != KNE_OK)
        die("fluency", &err);
    words = words_of(text);
    double h = (2.0 / 3 * gram_entropy(words, 2) + 4.0 / 3 * gram_entropy(words, 3)) / 2;
    free(words), free(text);
    kne_ids_free(&ids);
    kne_work_free(w);
    return 100 * h;
}

#endif
