/*
 * kne_edit_step.c - the second half of a job: the masked optimiser.
 *
 * Every pass uses W + the view's deltas + the sum of the batch's deltas, rounded to the model's
 * format, so what is optimised is what will be served. The delta of an edit takes only the gradient
 * of its own sequences (its prompts, its anchors), masked by its ensemble: the edits stay
 * separable and each can be reverted alone. An edit that is reached stands still and is looked at now and then; when all are, they
 * are run once more together. Those that others disturbed go on, with shorter steps.
 */
#include "kne_edit_impl.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 1024
#define ANCHOR_BYTES ((size_t) 1 << 30) /* of the anchors' distributions */
#define STAYS 0.85 /* share of the probability asked for, above which an edit that was reached stays so */
#define SHORTEST 0.125 /* step of an edit, in units of lr */
#define ANCHORS_OF 64.0 /* edits of a batch that the anchors hold back with all their weight: of more they are too many for any to arrive */
#define ANCHOR_QUIET 1e-3 /* divergence at a position, below which an anchor need not be seen every round */

/* ---- layout ---- */

static void
count_rows(edit *e)
{
    e->n_rows = e->n_outs = 0;
    for (int32_t p = 0; p < e->spec->n_prompts; p++)
    {
        e->n_rows += e->prompt[p].n - 1;
        e->n_outs += e->prompt[p].n - e->prompt[p].n_prompt;
    }
}

/*
 * The anchors of all live edits, each once: the first of every edit, then the second ... as long as their references
 * fit ANCHOR_BYTES.
 */
static kne_status
gather_anchors(batch *b, kne_err *err)
{
    anchor_set *a = &b->anchors;
    uint8_t    *seen = calloc((size_t) b->n_known + 1, 1);
    size_t      bytes = 0;
    int32_t     n_edits = 0, most = 0, outs = 0;

    if (!seen)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        const edit *e = &b->edit[i];

        if (e->state == EDIT_ENDED || b->opt.beta <= 0)
            continue;
        n_edits++;
        most = e->n_anchors > most ? e->n_anchors : most;
        for (int32_t k = 0; k < e->n_anchors; k++)
            outs += b->known[e->anchor[k]].n - b->known[e->anchor[k]].n_prompt;
    }
    for (int32_t k = 0; k < most; k++)
        for (int32_t i = 0; i < b->job->n_edits; i++)
        {
            const edit *e = &b->edit[i];
            const kne_tokens *t;

            if (e->state == EDIT_ENDED || k >= e->n_anchors || seen[e->anchor[k]])
                continue;
            t = &b->known[e->anchor[k]];
            bytes += (size_t) (t->n - t->n_prompt) * (size_t) b->job->model->arch.vocab_size * sizeof(float);
            if (bytes > ANCHOR_BYTES)
                continue;
            seen[e->anchor[k]] = 1;
            a->known[a->n++] = e->anchor[k];
            a->n_rows += t->n - 1;
            a->n_outs += t->n - t->n_prompt;
        }
    a->outs_an_edit = n_edits ? (double) outs / n_edits : 0;
    free(seen);
    return KNE_OK;
}

static void
layout(batch *b)
{
    const kne_arch *arch = &b->job->model->arch;
    const int32_t   most = kne_pass_rows(b->job->model, PASS_ROWS);
    anchor_set     *a = &b->anchors;
    int32_t         rows = 1, outs = 1, total = a->n_rows, total_outs = a->n_outs, widest = a->widest > 1 ? a->widest : 1;

    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        if (e->state == EDIT_ENDED)
            continue;
        count_rows(e);
        rows = e->n_rows > rows ? e->n_rows : rows;
        outs = e->n_outs > outs ? e->n_outs : outs;
        total += e->n_rows;
        total_outs += e->n_outs;
    }
    float *logp = kne_arena_take(&b->dev, (size_t) a->n_outs, (size_t) arch->vocab_size * sizeof *logp);

    a->logp = kne_arena_take(&b->run, (size_t) a->n, sizeof *a->logp);
    a->turn = kne_arena_take(&b->run, (size_t) a->n, sizeof *a->turn);
    a->rest = kne_arena_take(&b->run, (size_t) a->n, sizeof *a->rest);
    a->pause = kne_arena_take(&b->run, (size_t) a->n, sizeof *a->pause);
    for (int32_t i = 0; i < a->n; i++)
    {
        const kne_tokens *t = &b->known[a->known[i]];

        if (a->logp)
        {
            a->logp[i] = logp;
            logp += (size_t) (t->n - t->n_prompt) * (size_t) arch->vocab_size;
        }
        rows = t->n > rows ? t->n : rows;
        outs = t->n - t->n_prompt > outs ? t->n - t->n_prompt : outs;
    }
    /* a pass holds whole edits and anchors: as many as its rows take, at least one */
    if (rows < most)
        rows = total < most ? (total > rows ? total : rows) : most;
    outs = outs > rows ? outs : total_outs < rows ? total_outs : rows;
    int32_t places = total < 2 * most ? total : 2 * most;

    kne_pack_layout_shared(&b->pack, &b->run, rows, rows, outs, b->job->backend->fold_rows ? (places > rows ? places : rows) : 0);
    b->logp = kne_arena_take(&b->run, (size_t) outs, sizeof *b->logp);
    b->coef = kne_arena_take(&b->run, (size_t) outs, sizeof *b->coef);
    b->kl = kne_arena_take(&b->run, (size_t) outs, sizeof *b->kl);
    b->best = kne_arena_take(&b->run, (size_t) outs, sizeof *b->best);
    b->gathered = kne_arena_take(&b->dev, (size_t) rows * (size_t) widest, sizeof *b->gathered);
}

/* ---- passes ---- */

/*
 * Is every token of every prompt of the edit, from out row `out`, the argmax with enough probability. Less is enough to stay so: edits
 * that stop at one threshold and are judged by the same would undo one another without end.
 */
static bool
reached(const batch *b, const edit *e, int32_t out)
{
    const double enough = b->opt.probability * (e->state == EDIT_REACHED ? STAYS : 1);

    for (int32_t p = 0; p < e->spec->n_prompts; p++)
        for (int32_t j = e->prompt[p].n_prompt; j < e->prompt[p].n; j++, out++)
            if (b->best[out] != b->pack.target[out] || !(exp((double) b->logp[out]) >= enough)) /* NaN is no answer */
                return false;
    return true;
}

static void
collect_gradient(void *ctx, const kne_ffn_grad *g)
{
    batch            *b = ctx;
    const kne_edit_job *job = b->job;
    kne_backend      *be = job->backend;
    const int32_t     d = job->model->arch.d_model, f = job->model->arch.d_ff;
    /* a value vector's gradient is a^T dy, a key's is (its pre-activation's gradient)^T h */
    const float *const left[N_MATRICES] = {g->a, g->dgate, g->dup};
    const float *const right[N_MATRICES] = {g->dy, g->h, g->h};
    const anchor_set  *a = &b->anchors;
    const moving_rows *m = &b->moving;
    const int32_t      a0 = a->rows ? a->from[g->layer] : 0, n_a = a->rows ? a->from[g->layer + 1] - a0 : 0;
    const int32_t      r0 = m->grad_from[g->layer], n = m->grad_from[g->layer + 1] - r0;

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!b->moves[k])
            continue;
        if (n_a)
        {
            be->gather_cols(be->ctx, b->gathered, left[k], f, a->dev_neuron + a0, a->rows, n_a);
            be->matmul_tn(be->ctx, a->grad[k] + (size_t) a0 * (size_t) d, d, b->gathered, n_a, right[k], d, n_a, d, a->rows, 1);
        }
        if (n)
            be->grad_rows(be->ctx, m->grad[k], m->grad_row + r0, n, left[k], f, right[k], d, b->gathered);
    }
}

/* The rows of the gradient that the pass gives, layer by layer. */
static void
list_gradient(batch *b)
{
    const int32_t L = b->job->model->arch.n_layers;
    moving_rows  *m = &b->moving;
    int32_t       n = 0;

    for (int32_t l = 0; l < L; l++)
    {
        m->grad_from[l] = n;
        for (int32_t i = 0; i < b->n_turn; i++)
        {
            const edit *e = b->turn[i];

            for (int32_t j = e->from[l]; j < e->from[l + 1]; j++)
                m->host_grad_row[n++] = (kne_grad_row) {e->row + j, e->index[j], e->row0, e->row1};
        }
    }
    m->grad_from[L] = n;
    kne_device_put(b->job->backend, m->grad_row, m->host_grad_row, (size_t) n * sizeof *m->grad_row);
}

/*
 * What an anchors' position weighs in the loss mean(-log P) + beta mean(KL) of an edit. An edit that circles where the
 * two balance gets there later: after the first fifth of its steps beta is halved with every tenth.
 */
static double
anchor_weight(const batch *b, const edit *e)
{
    const double late = fmax(0, (double) e->out->steps / b->opt.max_steps - 0.2);

    return b->anchors.n ? fmin(1, ANCHORS_OF / b->job->n_edits) * b->opt.beta * exp2(-10 * late) / b->anchors.outs_an_edit : 0;
}

/* Tokens of the object of anchor i. */
static int32_t
n_outs(const batch *b, int32_t i)
{
    const kne_tokens *t = &b->known[b->anchors.known[i]];

    return t->n - t->n_prompt;
}

/* Out rows of the anchors; those of the edits follow. */
static int32_t
anchor_outs(const batch *b)
{
    return b->n_turn ? b->turn[0]->out0 : b->pack.b.n_out;
}

/* Everything up to the losses; w->dlogits of the anchors' divergence. */
static kne_status
forward_ops(batch *b, int32_t first_layer, bool learn, kne_err *err)
{
    const kne_edit_job *job = b->job;
    kne_backend        *be = job->backend;
    kne_work           *w = b->work;
    const int32_t       V = job->model->arch.vocab_size;
    const anchor_set   *a = &b->anchors;

    KNE_TRY(kne_forward(job->model, be, w, &b->pack.b, &b->rows.overlay, NULL, first_layer, err));
    be->logprob(be->ctx, w->logp, w->best, NULL, w->logits, w->target, NULL, b->pack.b.n_out, V);
    /* the references of neighbours lie one after the other */
    for (int32_t at = 0, to, out = 0, outs; learn && at < a->n_turn; at = to, out += outs)
    {
        for (to = at, outs = 0; to < a->n_turn && a->turn[to] - a->turn[at] == to - at; to++)
            outs += n_outs(b, a->turn[to]);
        be->kl(be->ctx, w->kl + out, w->dlogits + (size_t) out * (size_t) V, w->logits + (size_t) out * (size_t) V,
               a->logp[a->turn[at]], w->coef + out, outs, V);
    }
    return be->status(be->ctx, err);
}

/* Everything from the losses of the edits to the step. */
static kne_status
backward_ops(batch *b, kne_err *err)
{
    const kne_edit_job *job = b->job;
    kne_backend        *be = job->backend;
    kne_work           *w = b->work;
    moving_rows        *m = &b->moving;
    const int32_t       V = job->model->arch.vocab_size, n_kl = anchor_outs(b), n = b->pack.b.n_out - n_kl;
    const int64_t       d = job->model->arch.d_model;
    int32_t             parts = 0;

    if (n)
        be->logprob(be->ctx, w->logp + n_kl, NULL, w->dlogits + (size_t) n_kl * (size_t) V, w->logits + (size_t) n_kl * (size_t) V,
                    w->target + n_kl, w->coef + n_kl, n, V);
    KNE_TRY(kne_backward(job->model, be, w, &b->pack.b, &b->rows.overlay, NULL, b->lowest, collect_gradient, b, err));
    for (int k = 0; k < N_MATRICES && b->n_turn; k++)
    {
        if (!b->moves[k])
            continue;
        if (b->anchors.n)
            be->add_anchors(be->ctx, m->grad[k], b->anchors.grad[k], m->mine, m->owner, m->mover, m->n, d);
        if (b->opt.step == KNE_STEP_ADAM)
        {
            be->adam(be->ctx, m->delta[k], m->mean[k], m->var[k], m->grad[k], m->owner, m->mover, m->n, d);
            continue;
        }
        /* the metric is that of the value vectors' inputs; keys take the plain gradient */
        if (k == KNE_MATRIX_DOWN)
            be->solve(be->ctx, m->mean[k], (float) b->opt.momentum, 1, m->grad[k], m->metric, m->block, m->n_block, m->max_block,
                      m->mover, d, m->column);
        else
            be->momentum(be->ctx, m->mean[k], (float) b->opt.momentum, m->grad[k], m->owner, m->mover, m->n, d);
        be->row_norms(be->ctx, m->norm + (size_t) parts++ * (size_t) m->n, m->mean[k], m->n, d);
    }
    for (int k = 0; k < N_MATRICES && parts; k++)
        if (b->moves[k])
            be->step(be->ctx, m->delta[k], m->mean[k], m->norm, parts, m->owner, m->mover, m->n, d);
    return be->status(be->ctx, err);
}

/* Ops of one kind (a small number), recorded where the device can: the sequences packed decide all of them. */
static kne_status
replayed(batch *b, int kind, kne_status (*ops)(batch *, int32_t, bool, kne_err *), int32_t first_layer, bool learn, kne_err *err)
{
    kne_backend *be = b->job->backend;
    uint64_t     key = b->pass_key + (uint64_t) kind;

    if (!be->begin)
        return ops(b, first_layer, learn, err);
    key = kne_random_next(&key);
    while (!be->begin(be->ctx, key))
    {
        const kne_status st = ops(b, first_layer, learn, err);
        const bool       done = be->end(be->ctx);

        if (st != KNE_OK)
            return st;
        if (done)
            break;
    }
    return be->status(be->ctx, err);
}

/* One that others undid has not far to go: shorter steps, lest it undo them. */
static void
arrive(const batch *b, edit *e)
{
    const bool was = e->state == EDIT_REACHED;

    e->state = reached(b, e, e->out0) ? EDIT_REACHED : EDIT_ACTIVE;
    if (e->state == EDIT_REACHED)
        e->pause = was && e->pause ? 4 : 1;
    else
    {
        e->pause = 0;
        if (was)
            e->pace = fmax(e->pace / 2, SHORTEST);
    }
    e->rest = e->pause;
}

/* What came out: the edits' losses and states, the anchors' divergence and their turn to rest. */
static void
read_losses(batch *b, bool learn)
{
    anchor_set *a = &b->anchors;

    for (int32_t at = 0, out = 0; learn && at < a->n_turn; at++)
    {
        const int32_t i = a->turn[at], n = n_outs(b, i);
        double        sum = 0;

        for (int32_t k = 0; k < n; k++)
            sum += b->kl[out++];
        a->loss += sum;
        a->pause[i] = sum > ANCHOR_QUIET * n ? 0 : a->pause[i] ? 4 : 1;
        a->rest[i] = a->pause[i];
    }
    for (int32_t i = 0; i < b->n_turn; i++)
    {
        edit   *e = b->turn[i];
        int32_t out = e->out0;

        arrive(b, e);
        e->loss = 0;
        for (int32_t k = 0; k < e->n_outs; k++)
        {
            e->loss -= b->logp[out + k] / e->n_outs;
            b->coef[out + k] = e->state == EDIT_ACTIVE ? -1.0f / (float) e->n_outs : 0; /* nothing once it has arrived */
        }
        e->loss += anchor_weight(b, e) * a->loss;
    }
}

/*
 * The step that an edit takes now. Protected: momentum on M^-1 G, a step of length lr |W_S| along it. An edit that has not
 * arrived after a fifth of its steps has far to go, or goes too far: longer while its loss falls, shorter where it rises.
 */
static kne_mover
next_step(const batch *b, edit *e)
{
    const double factor = b->opt.alpha > 0 ? b->opt.alpha / sqrt((double) e->n) : 1;
    kne_mover    m = {.row = e->row, .n = e->n, .moves = 1};

    e->out->steps++;
    m.anchor = (float) anchor_weight(b, e);
    if (b->opt.step == KNE_STEP_ADAM)
    {
        m.rate = (float) b->opt.lr * (float) factor;
        m.c1 = 1 - powf(KNE_ADAM_B1, (float) e->out->steps);
        m.c2 = 1 - powf(KNE_ADAM_B2, (float) e->out->steps);
        return m;
    }
    if (5 * e->out->steps > b->opt.max_steps)
        e->pace = e->loss < e->last_loss ? fmin(e->pace * 1.1, 8) : fmax(e->pace / 2, SHORTEST);
    e->last_loss = e->loss;
    m.rate = (float) (b->opt.lr * e->pace * e->w_norm * factor);
    return m;
}

/* Who moves. An edit out of steps, or whose loss is no number, ends. */
static bool
plan_steps(batch *b)
{
    kne_mover *mover = b->moving.host_mover;
    bool       any = false;

    for (int32_t i = 0; i < b->job->n_edits; i++)
        mover[i].moves = 0;
    for (int32_t i = 0; i < b->n_turn; i++)
    {
        edit *e = b->turn[i];

        if (e->state != EDIT_ACTIVE)
            continue;
        if (e->out->steps >= b->opt.max_steps || !isfinite(e->loss))
        {
            kne_edit_end(e, KNE_OUTCOME_FAILED, isfinite(e->loss)
                             ? "the object was not reached in %d steps" : "the loss is not finite after %d steps",
                         e->out->steps);
            continue;
        }
        mover[e - b->edit] = next_step(b, e);
        any = true;
    }
    return any;
}

static kne_status
ops_of_step(batch *b, int32_t first_layer, bool learn, kne_err *err)
{
    return backward_ops(b, err);
}

/*
 * One forward pass over the packed anchors and the edits in b->turn, with the losses; where learn is set, also a step of those that
 * are not reached. Sets e->loss and moves edits between ACTIVE and REACHED.
 */
static kne_status
run_pass(batch *b, bool learn, kne_err *err)
{
    const kne_edit_job *job = b->job;
    kne_backend        *be = job->backend;
    kne_work           *w = b->work;
    const bool          again = b->pass_key == b->last_key;
    const size_t        n_out = (size_t) b->pack.b.n_out;

    kne_pack_share(&b->pack);
    kne_batch_put(be, w, &b->pack.b);
    if (!again)
        list_gradient(b);
    kne_device_put(be, w->target, b->pack.target, n_out * sizeof *b->pack.target);
    for (size_t k = 0; k < n_out; k++)
        b->coef[k] = 1;
    kne_device_put(be, w->coef, b->coef, n_out * sizeof *b->coef);
    /* the same sequences as in the pass before: what lies below the lowest layer that moves is as it was */
    KNE_TRY(replayed(b, again + 2 * learn, forward_ops, again ? b->lowest : 0, learn, err));
    b->last_key = b->pass_key;
    be->get(be->ctx, b->logp, w->logp, n_out * sizeof *b->logp);
    be->get(be->ctx, b->best, w->best, n_out * sizeof *b->best);
    if (learn)
        be->get(be->ctx, b->kl, w->kl, (size_t) anchor_outs(b) * sizeof *b->kl);
    KNE_TRY(be->status(be->ctx, err));
    read_losses(b, learn);
    if (!learn || !(plan_steps(b) | (b->more && b->anchors.n_turn > 0)))
        return KNE_OK;
    kne_device_put(be, w->coef, b->coef, n_out * sizeof *b->coef);
    kne_device_put(be, b->moving.mover, b->moving.host_mover, (size_t) job->n_edits * sizeof *b->moving.mover);
    return replayed(b, 4, ops_of_step, 0, true, err);
}

static void
clear_pass(batch *b)
{
    kne_pack_clear(&b->pack);
    b->n_turn = 0;
    b->pass_key = 0;
    b->anchors.n_turn = b->anchors.rows = 0;
}

static void
add_key(batch *b, int32_t what)
{
    b->pass_key = (b->pass_key ^ (uint64_t) (what + 2)) * 0x9E3779B97F4A7C15ull;
}

/* Fill a clear pack with anchors from *next on. Those that nothing disturbed when last seen sit out a round, then four. */
static void
fill_anchors(batch *b, int32_t *next)
{
    anchor_set *a = &b->anchors;

    for (; *next < a->n; (*next)++)
    {
        const kne_tokens *t = &b->known[a->known[*next]];

        if (a->rest[*next])
        {
            a->rest[*next]--;
            continue;
        }
        if (!kne_pack_fits(&b->pack, t->n, t->n_prompt))
            break;
        kne_pack_add(&b->pack, t->id, t->n, t->n_prompt);
        add_key(b, -1 - *next);
        a->turn[a->n_turn++] = *next;
    }
    a->rows = b->pack.b.n;
}

/* Add edits to the pack, from *next on: all that are reached, or those that are not and of the others those whose rest is over. */
static void
fill_edits(batch *b, bool check, int32_t *next)
{
    for (; *next < b->job->n_edits; (*next)++)
    {
        edit *e = &b->edit[*next];

        if (e->state == EDIT_ENDED)
            continue;
        if (e->state == EDIT_REACHED && !check && e->rest)
        {
            e->rest--;
            continue;
        }
        if (!kne_pack_room(&b->pack, e->n_rows, e->spec->n_prompts, e->n_outs))
            break;
        kne_pack_group(&b->pack);
        e->row0 = b->pack.b.n;
        e->out0 = b->pack.b.n_out;
        for (int32_t p = 0; p < e->spec->n_prompts; p++)
            kne_pack_add(&b->pack, e->prompt[p].id, e->prompt[p].n, e->prompt[p].n_prompt);
        e->row1 = b->pack.b.n;
        b->turn[b->n_turn++] = e;
        add_key(b, *next);
    }
}

/* ---- the job ---- */

/* The anchors' distributions in the view, before anything moves, and which of them hold. */
static kne_status
anchor_references(batch *b, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const anchor_set   *a = &b->anchors;
    kne_tokens         *fact = malloc(((size_t) a->n + 1) * sizeof *fact);
    uint8_t            *right = malloc((size_t) a->n + 1);
    kne_status          st = fact && right ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < a->n && st == KNE_OK; i++)
        fact[i] = b->known[a->known[i]];
    if (st == KNE_OK)
        st = kne_score_tokens(job->model, job->backend, job->view, fact, a->n, NULL, right, a->logp, job->calls.yield,
                              job->calls.ctx, err);
    for (int32_t i = 0; i < a->n && st == KNE_OK; i++)
    {
        b->held[a->known[i]] = right[i];
        a->rest[i] = 1; /* in the first round nothing has moved yet */
    }
    free(right);
    free(fact);
    return st;
}

static void
report(batch *b, int phase, int done)
{
    const kne_job_calls *c = &b->job->calls;
    double               loss = 0;
    int                  active = 0;

    if (!c->progress)
        return;
    for (int32_t i = 0; i < b->job->n_edits; i++)
        if (b->edit[i].state == EDIT_ACTIVE)
        {
            loss += b->edit[i].loss;
            active++;
        }
    c->progress(c->ctx, phase, done, b->opt.max_steps, (float) (active ? loss / active : 0), b->job->n_edits - active);
}

static int32_t
count_state(const batch *b, edit_state s)
{
    int32_t n = 0;

    for (int32_t i = 0; i < b->job->n_edits; i++)
        n += b->edit[i].state == s;
    return n;
}

/* e->index: layer * f + neuron, becomes the neuron within its layer (sign -1), and back. */
static void
layer_indices(batch *b, int32_t sign)
{
    const kne_arch *arch = &b->job->model->arch;

    for (int32_t i = 0; i < b->job->n_edits; i++)
        for (int32_t l = 0; l < arch->n_layers && b->edit[i].state != EDIT_ENDED; l++)
            for (int32_t j = b->edit[i].from[l]; j < b->edit[i].from[l + 1]; j++)
                b->edit[i].index[j] += sign * l * arch->d_ff;
}

kne_status
kne_batch_optimise(batch *b, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const kne_arch     *arch = &job->model->arch;
    int32_t            *mark = malloc((size_t) arch->n_layers * (size_t) arch->d_ff * sizeof *mark);
    kne_status          st = mark ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    if (st == KNE_OK) /* who is cancelled by now brings no anchors */
        st = kne_batch_pause(b, err);
    if (st == KNE_OK)
        st = gather_anchors(b, err);
    for (int turn = 0; turn < 2 && st == KNE_OK; turn++)
    {
        kne_rows_layout(b, mark);
        layout(b);
        if (turn == 0)
            st = kne_arena_commit(&b->run, err);
        if (turn == 0 && st == KNE_OK)
            st = kne_device_commit(&b->dev, job->backend, err);
    }
    if (st == KNE_OK)
        st = kne_work_new_shared(job->model, (kne_work_shape) {b->pack.max_n, b->pack.max_out, b->rows.max_layer, true},
                                 b->pack.max_place, &b->work, err);
    if (st == KNE_OK)
    {
        kne_rows_fill(b, mark);
        layer_indices(b, -1);
        st = anchor_references(b, err);
    }
    free(mark);

    for (int step = 0, seen = 0, ended = 0; st == KNE_OK; step++)
    {
        int32_t next = 0;

        st = kne_batch_pause(b, err);
        report(b, KNE_PHASE_OPTIMISE, step);
        /* of two rounds one makes a step of somebody's budget or ends; anything else would be a loop */
        if (st == KNE_OK && step / 2 > (int64_t) (job->n_edits + 1) * (b->opt.max_steps + 2))
            st = kne_error(err, KNE_ERR_INTERNAL, "the batch does not settle");
        if (st != KNE_OK)
            break;
        kne_rows_compose(b);
        if (count_state(b, EDIT_ACTIVE) == 0)
        {
            /* all reached: in the last round, all of them as they are now? Else one after another: do they all hold together? */
            if (step && count_state(b, EDIT_ENDED) == ended && seen == job->n_edits - ended)
                break;
            ended = count_state(b, EDIT_ENDED);
            while (st == KNE_OK && next < job->n_edits)
            {
                clear_pass(b);
                fill_edits(b, true, &next);
                if (b->n_turn && (st = run_pass(b, false, err)) == KNE_OK)
                    st = kne_batch_pause(b, err);
            }
            if (count_state(b, EDIT_ENDED) != ended)
                continue; /* cancelled meanwhile: the others were checked with its delta in */
            if (count_state(b, EDIT_ACTIVE) == 0)
                break;
            next = 0;
        }
        int32_t next_anchor = 0;

        seen = 0;
        ended = count_state(b, EDIT_ENDED);
        b->anchors.loss = 0;
        for (int k = 0; k < N_MATRICES; k++)
            if (b->anchors.grad[k])
                job->backend->zero(job->backend->ctx, b->anchors.grad[k],
                                   (size_t) b->anchors.n_neurons * (size_t) arch->d_model * sizeof(float));
        /* the anchors first, then the edits that take their gradient; all in one pass where there is room */
        while (st == KNE_OK && (next < job->n_edits || next_anchor < b->anchors.n))
        {
            clear_pass(b);
            fill_anchors(b, &next_anchor);
            if (next_anchor == b->anchors.n)
                fill_edits(b, false, &next);
            if (b->pack.b.n == 0)
                break;
            b->more = next < job->n_edits;
            seen += b->n_turn;
            st = run_pass(b, true, err);
            if (st == KNE_OK)
                st = kne_batch_pause(b, err);
        }
    }
    if (st == KNE_OK)
    {
        layer_indices(b, 1);
        st = kne_rows_fetch(b, err);
    }
    kne_work_free(b->work);
    b->work = NULL;
    return st;
}
