/*
 * kne_edit_plan.c - the first half of a job: text to tokens, what the model says before,
 * what it does on facts it knows, and the ensemble of each edit.
 */
#include "kne_edit_impl.h"
#include "kne_energy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ANSWER_TOKENS 8
#define SCORE_BYTES ((size_t) 256 << 20) /* attribution scores held at once */

/* ---- tokens ---- */

static kne_status
keep_tokens(kne_arena *arena, const kne_ids *ids, int32_t n_prompt, kne_tokens *out)
{
    int32_t *id = kne_arena_take(arena, (size_t) ids->n, sizeof *id);

    if (id && out) /* neither while it is counted */
    {
        memcpy(id, ids->id, (size_t) ids->n * sizeof *id);
        *out = (kne_tokens) {id, ids->n, n_prompt};
    }
    return KNE_OK;
}

/*
 * Tokenise everything; runs twice, first to count. A known fact that has no tokens (too long, empty) is left
 * out; an edit's prompt or object that has none ends the edit.
 */
static kne_status
tokenise(batch *b, kne_err *err)
{
    const kne_edit_job *job = b->job;
    kne_ids             ids = {0};
    kne_status          st = KNE_OK;

    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        kne_arena *a = &b->text;

        b->known = kne_arena_take(a, (size_t) job->n_known, sizeof *b->known);
        b->known_at = kne_arena_take(a, (size_t) job->n_known, sizeof *b->known_at);
        b->known_of = kne_arena_take(a, (size_t) job->n_known, sizeof *b->known_of);
        b->ref = kne_arena_take(a, (size_t) job->n_known, sizeof *b->ref);
        b->protect = kne_arena_take(a, (size_t) job->n_known, sizeof *b->protect);
        b->anchors.known = kne_arena_take(a, (size_t) job->n_known, sizeof *b->anchors.known);
        b->held = kne_arena_take(a, (size_t) job->n_known, sizeof *b->held);
        b->edit = kne_arena_take(a, (size_t) job->n_edits, sizeof *b->edit);
        b->turn = kne_arena_take(a, (size_t) job->n_edits, sizeof *b->turn);
        b->n_known = 0;
        for (int32_t i = 0; i < job->n_known && st == KNE_OK; i++)
        {
            int32_t    n_prompt = 0;
            kne_tokens t = {0};

            if (b->known_of)
                b->known_of[i] = -1;
            st = kne_tokenize_fact(job->model, job->known[i].prompt, job->known[i].object, &ids, &n_prompt, err);
            if (st == KNE_ERR_NOMEM)
                break;
            if (st != KNE_OK)
            {
                st = KNE_OK;
                continue;
            }
            keep_tokens(a, &ids, n_prompt, &t);
            if (b->known)
            {
                b->known_of[i] = b->n_known;
                b->known_at[b->n_known] = i;
                b->known[b->n_known] = t;
            }
            b->n_known++;
        }
        for (int32_t i = 0; i < job->n_edits && st == KNE_OK; i++)
        {
            const kne_edit_spec *spec = &job->edit[i];
            edit                *e = b->edit ? &b->edit[i] : NULL;
            kne_tokens          *prompt = kne_arena_take(a, (size_t) spec->n_prompts, sizeof *prompt);
            int32_t             *anchor = kne_arena_take(a, (size_t) spec->n_anchors, sizeof *anchor);

            if (e)
            {
                *e = (edit) {.spec = spec, .out = &b->result->edit[i], .prompt = prompt, .anchor = anchor};
                e->out->edit_id = spec->edit_id;
            }
            for (int32_t p = 0; p < spec->n_prompts; p++)
            {
                int32_t n_prompt = 0;

                st = kne_tokenize_fact(job->model, spec->prompt[p], spec->object, &ids, &n_prompt, err);
                if (st == KNE_ERR_NOMEM)
                    break;
                if (st != KNE_OK)
                {
                    if (e && e->state != EDIT_ENDED)
                        kne_edit_end(e, KNE_OUTCOME_FAILED, "%s", err->msg);
                    st = KNE_OK;
                    continue;
                }
                keep_tokens(a, &ids, n_prompt, prompt ? &prompt[p] : NULL);
            }
            for (int32_t k = 0; e && k < spec->n_anchors && e->n_anchors < b->opt.anchors; k++)
                if (spec->anchor[k] >= 0 && spec->anchor[k] < job->n_known && b->known_of[spec->anchor[k]] >= 0)
                    anchor[e->n_anchors++] = b->known_of[spec->anchor[k]];
        }
        if (turn == 0 && st == KNE_OK)
            st = kne_arena_commit(a, err);
    }
    kne_ids_free(&ids);
    return st;
}

/* ---- before ---- */

/* What the model said, to the first full stop or line end. *ended: there is one, so that no further token changes it. */
static kne_status
answer_text(const kne_tokenizer *tokenizer, const kne_ids *ids, char **out, bool *ended, kne_err *err)
{
    char  *text, *from;
    size_t len;

    KNE_TRY(kne_tokenizer_decode(tokenizer, ids->id, ids->n, true, &text, &len, err));
    from = text + strspn(text, " \t\r\n");
    len = strcspn(from, ".\r\n");
    *ended = from[len] != '\0';
    memmove(text, from, len);
    text[len] = '\0';
    *out = text;
    return KNE_OK;
}

/* What cannot be decoded ends nothing: it fails with the whole. */
static bool
answered(void *ctx, const kne_ids *ids)
{
    bool  ended = false;
    char *text = NULL;

    if (answer_text(ctx, ids, &text, &ended, NULL) == KNE_OK)
        free(text);
    return ended;
}

/* What holds already, the probability of each object now, and the model's own answers. */
static kne_status
look_before(batch *b, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const int32_t       n = job->n_edits;
    kne_tokens         *fact = malloc(((size_t) n + (size_t) b->n_known) * sizeof *fact + 1);
    int32_t            *who = malloc(((size_t) n + (size_t) b->n_known) * sizeof *who + 1);
    double             *logp = malloc(((size_t) n + (size_t) b->n_known) * sizeof *logp + 1);
    uint8_t            *right = malloc((size_t) n + (size_t) b->n_known + 1);
    kne_ids            *answer = calloc((size_t) n + 1, sizeof *answer);
    int32_t             n_facts = 0, n_mine;
    kne_status st = fact && who && logp && right && answer ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < n && st == KNE_OK; i++)
        if (b->edit[i].state == EDIT_ACTIVE)
        {
            who[n_facts] = i;
            fact[n_facts++] = b->edit[i].prompt[0];
        }
    n_mine = n_facts;
    for (int32_t i = 0; i < b->n_known && st == KNE_OK; i++)
        if (job->known[b->known_at[i]].edit_id)
        {
            who[n_facts] = i;
            fact[n_facts++] = b->known[i];
        }
    if (st == KNE_OK)
        st = kne_answers(job->model, job->backend, job->view, fact, n_mine, ANSWER_TOKENS, logp, right, answer, answered,
                         job->model->tokenizer, job->calls.yield, job->calls.ctx, err);
    if (st == KNE_OK)
        st = kne_score_tokens(job->model, job->backend, job->view, fact + n_mine, n_facts - n_mine, logp + n_mine, right + n_mine,
                              NULL, job->calls.yield, job->calls.ctx, err);
    for (int32_t i = 0; i < n_facts && st == KNE_OK; i++)
    {
        bool ended;

        if (i >= n_mine)
        {
            b->held[who[i]] = right[i];
            continue;
        }
        edit *e = &b->edit[who[i]];

        e->out->p_before = e->out->p_after = exp(logp[i]);
        e->out->n_tokens = e->prompt[0].n - e->prompt[0].n_prompt;
        if (right[i] && !b->locate_only && !e->spec->solve)
            kne_edit_end(e, KNE_OUTCOME_HOLDS, "the model answers this already");
        st = answer_text(job->model->tokenizer, &answer[i], &e->out->answer_before, &ended, err);
    }
    for (int32_t i = 0; answer && i < n; i++)
        kne_ids_free(&answer[i]);
    free(answer);
    free(fact);
    free(who);
    free(logp);
    free(right);
    return st;
}

/* ---- references ---- */

typedef struct pick
{
    uint64_t order;
    int32_t  i;
} pick;

static int
pick_order(const void *pa, const void *pb)
{
    const pick *a = pa, *b = pb;

    return a->order != b->order ? (a->order < b->order ? -1 : 1) : a->i - b->i;
}

/*
 * mean over the reference facts of |Attr| into mean_ref (L, f); *n_ref: how many there were. They are plain facts
 * that the base answers; ordering them by a hash of seed and content makes the sample the
 * same whatever else the table holds.
 */
static kne_status
contrast(batch *b, float *mean_ref, int32_t *n_ref, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const size_t        len = (size_t) job->model->arch.n_layers * (size_t) job->model->arch.d_ff;
    pick               *pool = malloc(((size_t) b->n_known + 1) * sizeof *pool);
    int32_t            *picked = malloc(((size_t) b->n_known + 1) * sizeof *picked), n = 0;
    kne_status          st = pool && picked ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < b->n_known && st == KNE_OK; i++)
        if (b->ref[i] && b->ref[i]->right && !job->known[b->known_at[i]].edit_id)
        {
            uint64_t h = b->ref[i]->key ^ (uint64_t) b->opt.seed;

            pool[n++] = (pick) {kne_random_next(&h), i};
        }
    if (st == KNE_OK)
    {
        qsort(pool, (size_t) n, sizeof *pool, pick_order);
        n = n < b->opt.reference ? n : b->opt.reference;
        for (int32_t i = 0; i < n; i++)
            picked[i] = pool[i].i;
        st = kne_ref_scores(job->model, job->backend, &b->opt, b->known, b->ref, picked, n, &job->calls, err);
    }
    for (int32_t i = 0; i < n && st == KNE_OK; i++)
        for (size_t k = 0; k < len; k++)
            mean_ref[k] += b->ref[picked[i]]->score[k] / (float) n;
    *n_ref = n;
    free(pool);
    free(picked);
    return st;
}

static kne_status
references(batch *b, struct kne_ref_cache *cache, kne_err *err)
{
    const kne_edit_job *job = b->job;
    bool                contrasts = b->opt.select == KNE_SELECT_ATTRIBUTION && b->opt.contrast > 0;
    int32_t             n = b->opt.protect;

    if (contrasts && n < b->opt.reference) /* a contrast needs its facts, whatever protects */
        n = b->opt.reference;
    n = n < b->n_known ? n : b->n_known;
    KNE_TRY(kne_refs(cache, job->model, job->backend, b->known, n, b->ref, &job->calls, err));
    for (int32_t i = 0; i < n && i < b->opt.protect; i++)
        if (b->ref[i]->right || job->known[b->known_at[i]].edit_id)
            b->protect[b->n_protect++] = b->ref[i];
    b->is_protected = b->n_protect >= 64; /* KNE.md 4: fewer protect nothing */
    return KNE_OK;
}

/* ---- ensembles ---- */

static int
int_order(const void *pa, const void *pb)
{
    int32_t a = *(const int32_t *) pa, b = *(const int32_t *) pb;

    return (a > b) - (a < b);
}

typedef struct ranked
{
    int32_t index; /* layer * f + neuron */
    float   score;
} ranked;

/*
 * What choosing needs, for as many tokens and edits at a time as SCORE_BYTES has room for. Scores of all neurons stay on the device;
 * what comes back is n neurons an edit with their scores.
 */
typedef struct choice
{
    size_t    most;    /* rows of scores: tokens, and one an edit */
    int32_t   n;       /* neurons of an ensemble */
    kne_arena dev, host;
    float    *score;   /* (most, L * f) those of the tokens, then one of each edit */
    float    *mean;    /* (L * f) of the reference facts */
    float    *row;     /* (L * f) of the host, by option random */
    int32_t  *index;   /* (most, n) an edit a row */
    uint64_t *keys;    /* (most, n) scratch */
    float    *picked;  /* (most, n) scores of what is in index: as the rows of score */
    int32_t  *host_index; /* again, on the host; layer * f + neuron */
    float    *host_picked;
} choice;

/* Runs twice, first to count; every edit has an ensemble of n. */
static void
choice_layout(const batch *b, choice *c)
{
    const kne_arch *arch = &b->job->model->arch;
    const size_t    len = (size_t) arch->n_layers * (size_t) arch->d_ff;
    const bool      scores = b->opt.select != KNE_SELECT_ALL;

    c->score = kne_arena_take(&c->dev, scores ? c->most : 0, len * sizeof *c->score);
    c->mean = kne_arena_take(&c->dev, b->opt.select == KNE_SELECT_ATTRIBUTION ? len : 0, sizeof *c->mean);
    c->index = kne_arena_take(&c->dev, scores ? c->most : 0, (size_t) c->n * sizeof *c->index);
    c->keys = kne_arena_take(&c->dev, scores ? c->most : 0, (size_t) c->n * sizeof *c->keys);
    c->picked = kne_arena_take(&c->dev, scores ? c->most : 0, (size_t) c->n * sizeof *c->picked);
    c->row = kne_arena_take(&c->host, b->opt.select == KNE_SELECT_RANDOM ? len : 0, sizeof *c->row);
    c->host_index = kne_arena_take(&c->host, c->most, (size_t) c->n * sizeof *c->host_index);
    c->host_picked = kne_arena_take(&c->host, c->most, (size_t) c->n * sizeof *c->host_picked);
}

static kne_status
choice_new(batch *b, choice *c, kne_err *err)
{
    const kne_arch *arch = &b->job->model->arch;
    size_t          row, all = 0, widest = 0;
    kne_status      st;

    for (int32_t i = 0; i < b->job->n_edits; i++)
        if (b->edit[i].state != EDIT_ENDED)
        {
            const size_t rows = (size_t) b->edit[i].out->n_tokens + 1;

            all += rows;
            widest = rows > widest ? rows : widest;
        }
    c->n = kne_ensemble_size(arch, &b->opt);
    row = (size_t) arch->n_layers * (size_t) arch->d_ff * sizeof *c->score +
          (size_t) c->n * (sizeof *c->index + sizeof *c->keys + sizeof *c->picked);
    c->most = SCORE_BYTES / row > 32 ? SCORE_BYTES / row : 32;
    c->most = c->most > widest ? c->most : widest;
    c->most = c->most < all ? c->most : all;
    choice_layout(b, c);
    st = kne_arena_commit(&c->host, err);
    if (st == KNE_OK)
        st = kne_device_commit(&c->dev, b->job->backend, err);
    if (st == KNE_OK)
        choice_layout(b, c);
    return st;
}

/* The n best of each live edit of [from, to) by a score of its own, into c->index and c->host_index, and those scores into c->host_picked. */
static void
choose(batch *b, choice *c, int32_t from, int32_t to, size_t n_tokens, bool has_mean, float mean_all)
{
    const kne_arch *arch = &b->job->model->arch;
    const int64_t   len = (int64_t) arch->n_layers * arch->d_ff, first = (int64_t) b->opt.layer_min * arch->d_ff;
    const int64_t   last = ((int64_t) b->opt.layer_max + 1) * arch->d_ff;
    kne_backend    *be = b->job->backend;
    float          *own = c->score + n_tokens * (size_t) len, *token = c->score;
    int32_t         n = 0;

    for (int32_t i = from; i < to; i++)
    {
        const edit *e = &b->edit[i];
        float      *score = own + (size_t) n * (size_t) len;

        if (e->state == EDIT_ENDED)
            continue;
        n++;
        if (b->opt.select == KNE_SELECT_ATTRIBUTION)
            be->contrast(be->ctx, score, token, len, e->out->n_tokens, len, has_mean ? c->mean : NULL,
                         (float) b->opt.contrast * mean_all, b->opt.signed_score);
        else
        {
            uint64_t state = (uint64_t) b->opt.seed ^ (uint64_t) e->spec->edit_id * 0x9E3779B97F4A7C15ull;

            for (int64_t k = 0; k < len; k++)
                c->row[k] = (float) (kne_random_next(&state) >> 40) * 0x1p-24f;
            kne_device_put(be, score, c->row, (size_t) len * sizeof *score);
        }
        token += (size_t) e->out->n_tokens * (size_t) len;
    }
    be->top(be->ctx, c->index, own + first, len, c->keys, n, last - first, c->n);
    for (int32_t i = 0; i < n; i++)
        be->gather_cols(be->ctx, c->picked + (size_t) i * (size_t) c->n, own + (size_t) i * (size_t) len + first, len,
                        c->index + (size_t) i * (size_t) c->n, 1, c->n);
    be->get(be->ctx, c->host_picked, c->picked, (size_t) n * (size_t) c->n * sizeof *c->picked);
    be->get(be->ctx, c->host_index, c->index, (size_t) n * (size_t) c->n * sizeof *c->index);
    for (size_t i = 0; i < (size_t) n * (size_t) c->n; i++)
        c->host_index[i] += (int32_t) first;
}

/* What is in c->host_index and c->host_picked, best first, becomes the ensembles; with the scores of their tokens, if there are any. */
static void
keep_ensembles(batch *b, choice *c, int32_t from, int32_t to, bool attributed)
{
    const kne_arch *arch = &b->job->model->arch;
    const size_t    len = (size_t) arch->n_layers * (size_t) arch->d_ff, n = (size_t) c->n;
    kne_backend    *be = b->job->backend;
    size_t          at = 0, token = 0;

    for (int32_t i = from; i < to; i++)
    {
        edit         *e = &b->edit[i];
        const int32_t f = arch->d_ff, s = e->out->n_tokens;

        if (e->state == EDIT_ENDED)
            continue;
        for (size_t k = 0; k < n; k++, at++)
        {
            const int32_t index = c->host_index[at];

            e->out->ensemble[k] = (kne_ensemble_row) {index / f, index % f, c->host_picked[at], e->token_score + k * (size_t) s};
            e->index[k] = index;
        }
        if (attributed)
        {
            kne_device_put(be, c->index, e->index, n * sizeof *c->index);
            be->gather_cols(be->ctx, c->picked + token * n, c->score + token * len, (int64_t) len, c->index, s, c->n);
        }
        token += (size_t) s;
        qsort(e->index, n, sizeof *e->index, int_order);
        for (int32_t l = 0, j = 0; l <= arch->n_layers; l++)
        {
            while (j < e->n && e->index[j] < l * f)
                j++;
            e->from[l] = j;
        }
    }
    if (!attributed)
        return; /* they are zero */
    be->get(be->ctx, c->host_picked, c->picked, token * n * sizeof *c->picked);
    token = 0;
    for (int32_t i = from; i < to; i++)
        for (int32_t j = 0; b->edit[i].state != EDIT_ENDED && j < b->edit[i].out->n_tokens; j++, token++)
            for (size_t k = 0; k < n; k++)
                b->edit[i].token_score[k * (size_t) b->edit[i].out->n_tokens + (size_t) j] = c->host_picked[token * n + k];
}

static void
plan_layout(batch *b)
{
    const kne_arch *arch = &b->job->model->arch;

    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        if (e->state == EDIT_ENDED)
            continue;
        e->n = kne_ensemble_size(arch, &b->opt);
        e->index = kne_arena_take(&b->plan, (size_t) e->n, sizeof *e->index);
        e->place = kne_arena_take(&b->plan, (size_t) e->n, sizeof *e->place);
        e->mine = kne_arena_take(&b->plan, (size_t) e->n, sizeof *e->mine);
        e->from = kne_arena_take(&b->plan, (size_t) arch->n_layers + 1, sizeof *e->from);
        e->token_score = kne_arena_take(&b->plan, (size_t) e->n * (size_t) e->out->n_tokens, sizeof(float));
        e->out->ensemble = kne_arena_take(&b->plan, (size_t) e->n, sizeof *e->out->ensemble);
        e->out->n_ensemble = e->out->ensemble ? e->n : 0;
    }
}

static int
by_index(const void *pa, const void *pb)
{
    const ranked *a = pa, *b = pb;

    return a->index != b->index ? (a->index < b->index ? -1 : 1) : (a->score < b->score) - (a->score > b->score);
}

static int
by_score(const void *pa, const void *pb)
{
    const ranked *a = pa, *b = pb;

    return a->score != b->score ? (a->score < b->score ? 1 : -1) : (a->index > b->index) - (a->index < b->index);
}

/*
 * The n best of each live edit of [from, to) by energy, into c->host_index and c->host_picked. A neuron's score is 1 over the best rank that it has for any of the edit's
 * tokens (none below the size of an ensemble). So each token has its share of the ensemble: what follows the first one stands on
 * activations that no known fact has, and would take it whole. n_tokens: of all of them. attributed: c->score gets their attribution from
 * the same passes.
 */
static kne_status
energies(batch *b, struct kne_ref_cache *cache, choice *c, int32_t from, int32_t to, size_t n_tokens, bool attributed, kne_err *err)
{
    const kne_edit_job  *job = b->job;
    const size_t         len = (size_t) job->model->arch.n_layers * (size_t) job->model->arch.d_ff;
    const kne_energy_top want = {b->opt.layer_min, b->opt.layer_max, c->n};
    size_t               n_prompts = 0, n = 0, used = 0, at = 0;
    kne_energy_of       *of = malloc((n_tokens + 1) * sizeof *of);
    int32_t             *top = malloc((n_tokens * (size_t) want.n + 1) * sizeof *top);
    ranked              *all = malloc((n_tokens * (size_t) want.n + 1) * sizeof *all);
    kne_tokens          *prompt;
    kne_status           st = KNE_OK;

    for (int32_t i = from; i < to; i++)
        n_prompts += (size_t) b->edit[i].out->n_tokens * (size_t) b->edit[i].spec->n_prompts;
    prompt = malloc((n_prompts + 1) * sizeof *prompt);
    if (!of || !prompt || !top || !all)
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory for the energies of %zu tokens", n_tokens);
    for (int32_t i = from; i < to && st == KNE_OK; i++)
        for (int32_t j = 0; b->edit[i].state != EDIT_ENDED && j < b->edit[i].out->n_tokens; j++, n++)
        {
            of[n] = (kne_energy_of) {.prompt = prompt + used, .top = top + n * (size_t) want.n,
                                     .attribution = attributed ? c->score + n * len : NULL};
            for (int32_t p = 0; p < b->edit[i].spec->n_prompts; p++)
            {
                const kne_tokens *t = &b->edit[i].prompt[p];

                if (t->n_prompt + j >= t->n)
                    continue; /* tokenised shorter after this prompt */
                prompt[used++] = (kne_tokens) {t->id, t->n_prompt + j + 1, t->n_prompt + j};
                of[n].n_prompts++;
            }
        }
    if (st == KNE_OK && attributed)
        job->backend->zero(job->backend->ctx, c->score, n_tokens * len * sizeof *c->score);
    if (st == KNE_OK)
        st = kne_energy(job->model, job->backend, job->view, kne_ref_cache_energy(cache), b->protect, b->n_protect, b->opt.ridge, of,
                        (int32_t) n, &want, &job->calls, err);
    n = 0;
    for (int32_t i = from; i < to && st == KNE_OK; i++)
    {
        const int32_t s = b->edit[i].out->n_tokens;
        size_t        many = 0, kept = 0;

        if (b->edit[i].state == EDIT_ENDED)
            continue;
        for (int32_t j = 0; j < s; j++)
            for (int32_t k = 0; k < want.n; k++)
                all[many++] = (ranked) {of[n + (size_t) j].top[k], 1.0f / (float) (k + 1)};
        qsort(all, many, sizeof *all, by_index);
        for (size_t k = 0; k < many; k++)
            if (!kept || all[kept - 1].index != all[k].index)
                all[kept++] = all[k];
        qsort(all, kept, sizeof *all, by_score);
        for (int32_t k = 0; k < want.n; k++, at++)
        {
            c->host_index[at] = all[k].index;
            c->host_picked[at] = all[k].score;
        }
        n += (size_t) s;
    }
    free(of);
    free(prompt);
    free(top);
    free(all);
    return st;
}

/* The fact whose tokens are attributed, where it is prompt and present answer: its first tokens, as many as the object has. *own keeps it. */
static kne_status
present_answer(const batch *b, const edit *e, kne_ids *own, kne_tokens *fact, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const int32_t       p = e->prompt[0].n_prompt;
    kne_ids             now = {0};
    kne_status          st = kne_generate(job->model, job->backend, &job->view->overlay, e->prompt[0].id, p, e->out->n_tokens,
                                          job->calls.yield, job->calls.ctx, &now, err);

    if (st == KNE_OK && now.n)
    {
        own->id = malloc((size_t) (p + now.n) * sizeof *own->id);
        if (own->id)
        {
            memcpy(own->id, e->prompt[0].id, (size_t) p * sizeof *own->id);
            memcpy(own->id + p, now.id, (size_t) now.n * sizeof *own->id);
            *fact = (kne_tokens) {own->id, p + now.n, p};
        }
        else
            st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    kne_ids_free(&now);
    return st;
}

/* Attribution of the tokens of the live edits of [from, to) into c->score, n_tokens rows of it. at, fact and own: room for as many. */
static kne_status
attribute(batch *b, choice *c, int32_t from, int32_t to, size_t n_tokens, float **at, kne_tokens *fact, kne_ids *own, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const size_t        len = (size_t) job->model->arch.n_layers * (size_t) job->model->arch.d_ff;
    size_t              token = 0, k = 0;
    int32_t             n = 0;

    for (int32_t i = from; i < to; i++)
    {
        const edit *e = &b->edit[i];

        if (e->state == EDIT_ENDED)
            continue;
        fact[n] = e->prompt[0];
        if (b->opt.tokens == KNE_TOKENS_CURRENT)
            KNE_TRY(present_answer(b, e, &own[i], &fact[n], err));
        /* a present answer may have fewer tokens than the object: its rows then stay zero at the end */
        for (int32_t j = fact[n].n_prompt; j < fact[n].n; j++)
            at[k++] = c->score + (token + (size_t) (j - fact[n].n_prompt)) * len;
        token += (size_t) e->out->n_tokens;
        n++;
    }
    job->backend->zero(job->backend->ctx, c->score, n_tokens * len * sizeof *c->score);
    return kne_attribute(job->model, job->backend, job->view, &b->opt, fact, n, at, &job->calls, err);
}

/* Every neuron of the layers that may move. */
static void
choose_all(const batch *b, choice *c, int32_t from, int32_t to)
{
    const int32_t first = b->opt.layer_min * b->job->model->arch.d_ff;
    size_t        at = 0;

    for (int32_t i = from; i < to; i++)
        for (int32_t k = 0; b->edit[i].state != EDIT_ENDED && k < c->n; k++, at++)
        {
            c->host_index[at] = first + k;
            c->host_picked[at] = 0;
        }
}

/* Attribute and select, as many edits at a time as SCORE_BYTES lets their scores stand side by side. */
static kne_status
ensembles(batch *b, struct kne_ref_cache *cache, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const size_t        len = (size_t) job->model->arch.n_layers * (size_t) job->model->arch.d_ff;
    const bool          by_energy = b->opt.select == KNE_SELECT_ENERGY;
    const bool          attributed = by_energy || b->opt.select == KNE_SELECT_ATTRIBUTION; /* for the record too */
    /* then the passes of the energy are those of the attribution */
    const bool          both = by_energy && b->opt.points == 1 && b->opt.score == KNE_SCORE_LOGP && b->opt.tokens == KNE_TOKENS_OBJECT;
    choice      c = {0};
    float     **at = NULL, *mean_ref = calloc(len, sizeof *mean_ref);
    kne_tokens *fact = calloc((size_t) job->n_edits + 1, sizeof *fact);
    kne_ids    *own = calloc((size_t) job->n_edits + 1, sizeof *own); /* prompt and present answer, option "current" */
    int32_t     n_ref = 0;
    float       mean_all = 0;
    kne_status  st = mean_ref && fact && own ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    plan_layout(b);
    if (st == KNE_OK)
        st = kne_arena_commit(&b->plan, err);
    if (st == KNE_OK)
        plan_layout(b);
    if (st == KNE_OK && attributed && !by_energy && b->opt.contrast > 0)
        st = contrast(b, mean_ref, &n_ref, err);
    for (size_t k = 0; k < len; k++)
        mean_all += mean_ref && n_ref ? mean_ref[k] / (float) len : 0;
    if (st == KNE_OK)
        st = choice_new(b, &c, err);
    if (st == KNE_OK && !(at = malloc((c.most + 1) * sizeof *at)))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (st == KNE_OK && n_ref)
        kne_device_put(job->backend, c.mean, mean_ref, len * sizeof *c.mean);

    for (int32_t from = 0, to = 0; from < job->n_edits && st == KNE_OK; from = to)
    {
        size_t n_tokens = 0, rows = 0;

        for (; to < job->n_edits; to++)
        {
            const size_t s = b->edit[to].state == EDIT_ENDED ? 0 : (size_t) b->edit[to].out->n_tokens;

            if (s && rows + s + 1 > c.most)
                break;
            n_tokens += s;
            rows += s ? s + 1 : 0;
        }
        if (!rows)
            continue;
        if (attributed && !both)
            st = attribute(b, &c, from, to, n_tokens, at, fact, own, err);
        if (st == KNE_OK && by_energy)
            st = energies(b, cache, &c, from, to, n_tokens, both, err);
        else if (st == KNE_OK && b->opt.select == KNE_SELECT_ALL)
            choose_all(b, &c, from, to);
        else if (st == KNE_OK)
            choose(b, &c, from, to, n_tokens, n_ref > 0, mean_all);
        if (st == KNE_OK)
            st = job->backend->status(job->backend->ctx, err);
        if (st == KNE_OK)
            keep_ensembles(b, &c, from, to, attributed);
        if (st == KNE_OK)
            st = job->backend->status(job->backend->ctx, err);
    }
    for (int32_t i = 0; own && i < job->n_edits; i++)
        kne_ids_free(&own[i]);
    kne_device_free(&c.dev, job->backend);
    kne_arena_free(&c.host);
    free(own);
    free(fact);
    free(mean_ref);
    free(at);
    return st;
}

kne_status
kne_batch_plan(batch *b, kne_err *err)
{
    const kne_edit_job   *job = b->job;
    struct kne_ref_cache *cache = job->cache;
    bool                  any = false;

    KNE_TRY(tokenise(b, err));
    KNE_TRY(look_before(b, err));
    for (int32_t i = 0; i < job->n_edits; i++)
        any |= b->edit[i].state != EDIT_ENDED;
    if (!any)
        return KNE_OK;
    if (!cache)
    {
        KNE_TRY(kne_ref_cache_new(&b->cache, err));
        cache = b->cache;
    }
    KNE_TRY(references(b, cache, err));
    return ensembles(b, cache, err);
}
