/*
 * kne_edit_step.c - the second half of a job: the masked optimiser.
 *
 * Every pass uses W + the view's deltas + the sum of the batch's deltas, rounded to the model's
 * format, so what is optimised is what will be served. The delta of an edit takes only the gradient
 * of its own sequences (its prompts, its anchors), masked by its ensemble: the edits stay
 * separable and each can be reverted alone. An edit that is reached leaves the passes; when all have, they are
 * run once more together and those that others disturbed go on.
 */
#include "kne_edit_impl.h"
#include "kne_metric.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PASS_ROWS 1024
#define ANCHOR_BYTES ((size_t) 1 << 30) /* of the anchors' distributions */
#define ANCHOR_QUIET 1e-3 /* divergence at a position, below which an anchor need not be seen every round */
#define ADAM_B1 0.9f
#define ADAM_B2 0.999f

static const kne_mat *
matrix_of(const kne_layer *layer, int k)
{
    return k == KNE_MATRIX_DOWN ? &layer->down : k == KNE_MATRIX_GATE ? &layer->gate : &layer->up;
}

/* ---- the union of rows ---- */

/* Neurons of the view and of the live edits, and each edit's places among them. Runs twice. */
static kne_status
union_layout(batch *b, int32_t *mark, kne_err *err)
{
    const kne_edit_job *job = b->job;
    const kne_arch     *arch = &job->model->arch;
    const int32_t       L = arch->n_layers, f = arch->d_ff, d = arch->d_model;
    shared_rows        *u = &b->rows;
    anchor_set         *a = &b->anchors;
    bool                view_has[N_MATRICES] = {false};

    if (!b->run.base) /* counting: mark what is there */
    {
        memset(mark, 0, (size_t) L * (size_t) f * sizeof *mark);
        for (int32_t l = 0; l < L; l++)
            for (int32_t i = 0; i < job->view->layer[l].n; i++)
                mark[l * f + job->view->neuron[l][i]] = 1;
        for (int32_t i = 0; i < job->n_edits; i++)
            for (int32_t j = 0; b->edit[i].state != EDIT_ENDED && j < b->edit[i].n; j++)
                mark[b->edit[i].index[j]] = 2;
        u->n = u->max_layer = a->n_neurons = a->widest = 0;
        for (int32_t l = 0; l < L; l++)
        {
            int32_t n = 0, mine = 0;

            for (int32_t k = 0; k < f; k++)
            {
                n += mark[l * f + k] > 0;
                mine += mark[l * f + k] == 2;
            }
            u->n += n;
            u->max_layer = n > u->max_layer ? n : u->max_layer;
            a->n_neurons += mine;
            a->widest = mine > a->widest ? mine : a->widest;
        }
    }
    for (int32_t i = 0; i < job->view->n_edits; i++)
        for (int32_t r = 0; r < job->view->delta[i]->n_rows; r++)
            view_has[job->view->delta[i]->row[r].matrix] = true;

    u->from = kne_arena_take(&b->run, (size_t) L + 1, sizeof *u->from);
    u->neuron = kne_arena_take(&b->run, (size_t) u->n, sizeof *u->neuron);
    u->dev_neuron = kne_arena_take(&b->dev, (size_t) u->n, sizeof *u->dev_neuron);
    u->layer = kne_arena_take(&b->run, (size_t) L, sizeof *u->layer);
    a->from = kne_arena_take(&b->run, (size_t) L + 1, sizeof *a->from);
    a->neuron = kne_arena_take(&b->run, (size_t) a->n_neurons, sizeof *a->neuron);
    a->dev_neuron = kne_arena_take(&b->dev, (size_t) a->n_neurons, sizeof *a->dev_neuron);
    for (int k = 0; k < N_MATRICES; k++)
        if (b->moves[k] && b->opt.beta > 0)
        {
            a->grad[k] = kne_arena_take(&b->run, (size_t) a->n_neurons * (size_t) d, sizeof(float));
            a->dev_grad[k] = kne_arena_take(&b->dev, (size_t) a->n_neurons * (size_t) d, sizeof(float));
        }
    for (int k = 0; k < N_MATRICES; k++)
    {
        bool key = k != KNE_MATRIX_DOWN; /* keys go together: both of a gated FFN or none */
        bool used = b->moves[k] || view_has[k] ||
                    (key && (view_has[KNE_MATRIX_GATE] || view_has[KNE_MATRIX_UP]));

        if (!used || (k == KNE_MATRIX_GATE && !arch->gated))
            continue;
        u->base[k] = kne_arena_take(&b->run, (size_t) u->n * (size_t) d, sizeof(float));
        u->before[k] = kne_arena_take(&b->run, (size_t) u->n * (size_t) d, sizeof(float));
        u->eff[k] = kne_arena_take(&b->run, (size_t) u->n * (size_t) d, sizeof(float));
        u->dev_eff[k] = kne_arena_take(&b->dev, (size_t) u->n * (size_t) d, sizeof(float));
    }
    return KNE_OK;
}

static void
union_fill(batch *b, int32_t *mark)
{
    const kne_edit_job *job = b->job;
    const kne_model    *m = job->model;
    const int32_t       L = m->arch.n_layers, f = m->arch.d_ff, d = m->arch.d_model;
    shared_rows        *u = &b->rows;
    anchor_set         *a = &b->anchors;
    int32_t             n = 0, mine = 0;

    for (int32_t l = 0; l < L; l++)
    {
        a->from[l] = mine;
        for (int32_t k = 0; k < f; k++)
            if (mark[l * f + k] == 2)
                a->neuron[mine++] = k;
        u->from[l] = n;
        for (int32_t k = 0; k < f; k++)
            if (mark[l * f + k])
            {
                u->neuron[n] = k;
                mark[l * f + k] = n++; /* now: its row */
            }
        u->layer[l] = (kne_overlay_layer) {.n = n - u->from[l], .neuron = u->dev_neuron + u->from[l]};
    }
    u->from[L] = n;
    a->from[L] = mine;
    kne_device_put(job->backend, u->dev_neuron, u->neuron, (size_t) n * sizeof *u->neuron);
    kne_device_put(job->backend, a->dev_neuron, a->neuron, (size_t) mine * sizeof *a->neuron);
    u->overlay.layer = u->layer;
    for (int32_t i = 0; i < job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        for (int32_t l = 0; e->state != EDIT_ENDED && l < L; l++)
            for (int32_t j = e->from[l], at = a->from[l]; j < e->from[l + 1]; j++)
            {
                while (a->neuron[at] != e->index[j] - l * f)
                    at++;
                e->mine[j] = at;
                e->place[j] = mark[e->index[j]];
            }
    }

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!u->base[k])
            continue;
        for (int32_t l = 0; l < L; l++)
        {
            const kne_mat *w = matrix_of(&m->layer[l], k);
            size_t         at = (size_t) u->from[l] * (size_t) d;
            float         *eff = u->dev_eff[k] + at;

            job->backend->gather_neurons(job->backend->ctx, eff, w, (k == KNE_MATRIX_DOWN) != w->transposed,
                                         u->layer[l].neuron, u->layer[l].n);
            if (k == KNE_MATRIX_DOWN)
                u->layer[l].value_diff = eff;
            else if (k == KNE_MATRIX_GATE)
                u->layer[l].gate = eff;
            else
                u->layer[l].up = eff;
        }
        job->backend->get(job->backend->ctx, u->base[k], u->dev_eff[k], (size_t) u->n * (size_t) d * sizeof(float));
        memcpy(u->before[k], u->base[k], (size_t) u->n * (size_t) d * sizeof(float));
    }
    for (int32_t i = 0; i < job->view->n_edits; i++) /* ascending edit_id, as kne_view sums them */
        for (int32_t r = 0; r < job->view->delta[i]->n_rows; r++)
        {
            const kne_delta_row *row = &job->view->delta[i]->row[r];
            float               *at = u->before[row->matrix] + (size_t) mark[row->layer * f + row->neuron] * (size_t) d;

            for (int32_t c = 0; c < d; c++)
                at[c] += row->v[c];
        }
}

/* Effective rows from the deltas as they are now. */
static void
compose(batch *b)
{
    const kne_model *m = b->job->model;
    const int32_t    L = m->arch.n_layers, d = m->arch.d_model;
    shared_rows     *u = &b->rows;

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!u->base[k])
            continue;
        memcpy(u->eff[k], u->before[k], (size_t) u->n * (size_t) d * sizeof(float));
        for (int32_t i = 0; b->moves[k] && i < b->job->n_edits; i++)
        {
            const edit *e = &b->edit[i];

            if (e->state == EDIT_ENDED)
                continue;
            for (int32_t j = 0; j < e->n; j++)
            {
                const float *delta = e->delta[k] + (size_t) j * (size_t) d;
                float       *eff = u->eff[k] + (size_t) e->place[j] * (size_t) d;

                for (int32_t c = 0; c < d; c++)
                    eff[c] += delta[c];
            }
        }
        for (int32_t l = 0; l < L; l++)
        {
            kne_dtype type = matrix_of(&m->layer[l], k)->type;
            size_t    from = (size_t) u->from[l] * (size_t) d, to = (size_t) u->from[l + 1] * (size_t) d;

            for (size_t i = from; i < to; i++)
            {
                float eff = kne_round_to(u->eff[k][i], type);

                u->eff[k][i] = k == KNE_MATRIX_DOWN ? eff - u->base[k][i] : eff;
            }
        }
        kne_device_put(b->job->backend, u->dev_eff[k], u->eff[k], (size_t) u->n * (size_t) d * sizeof(float));
    }
}

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
    const int32_t   L = arch->n_layers, d = arch->d_model;
    anchor_set     *a = &b->anchors;
    int32_t         rows = 1, outs = 1, total = a->n_rows, total_outs = a->n_outs, widest = a->widest > 1 ? a->widest : 1;
    const edit     *first = NULL;

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
        e->dev_index = kne_arena_take(&b->dev, (size_t) e->n, sizeof *e->dev_index);
        e->owns_chol = b->opt.step == KNE_STEP_PROTECTED && !(b->opt.select == KNE_SELECT_ALL && first);
        if (e->owns_chol)
            e->chol = kne_arena_take(&b->run, (size_t) L, sizeof *e->chol);
        else if (first)
            e->chol = first->chol; /* the same neurons */
        if (!first)
            first = e;
        for (int32_t l = 0; l < L; l++)
        {
            size_t  n = (size_t) (e->from[l + 1] - e->from[l]);
            double *c = n && e->owns_chol ? kne_arena_take(&b->run, n * n, sizeof *c) : NULL;

            if (e->chol && e->owns_chol)
                e->chol[l] = c;
            widest = (int32_t) n > widest ? (int32_t) n : widest;
        }
        for (int k = 0; k < N_MATRICES; k++)
            if (b->moves[k])
            {
                size_t n = (size_t) e->n * (size_t) d;

                e->delta[k] = kne_arena_take(&b->run, n, sizeof(float));
                e->grad[k] = kne_arena_take(&b->run, n, sizeof(float));
                e->dev_grad[k] = kne_arena_take(&b->dev, n, sizeof(float));
                e->mean[k] = kne_arena_take(&b->run, n, sizeof(float));
                if (b->opt.step == KNE_STEP_ADAM)
                    e->var[k] = kne_arena_take(&b->run, n, sizeof(float));
            }
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
    /* a pass holds whole edits and anchors: as many as PASS_ROWS takes, at least one */
    if (rows < PASS_ROWS)
        rows = total < PASS_ROWS ? (total > rows ? total : rows) : PASS_ROWS;
    outs = outs > rows ? outs : total_outs < rows ? total_outs : rows;
    int32_t places = total < 2 * PASS_ROWS ? total : 2 * PASS_ROWS;

    kne_pack_layout_shared(&b->pack, &b->run, rows, rows, outs, b->job->backend->fold_rows ? (places > rows ? places : rows) : 0);
    b->logp = kne_arena_take(&b->run, (size_t) outs, sizeof *b->logp);
    b->coef = kne_arena_take(&b->run, (size_t) outs, sizeof *b->coef);
    b->kl = kne_arena_take(&b->run, (size_t) outs, sizeof *b->kl);
    b->best = kne_arena_take(&b->run, (size_t) outs, sizeof *b->best);
    b->gathered = kne_arena_take(&b->dev, (size_t) rows * (size_t) widest, sizeof *b->gathered);
    b->column = kne_arena_take(&b->run, (size_t) widest * KNE_METRIC_COLUMNS, sizeof *b->column);
}

/* ---- passes ---- */

/* Is every token of every prompt of the edit, from out row `out`, the argmax with enough probability. */
static bool
reached(const batch *b, const edit *e, int32_t out)
{
    for (int32_t p = 0; p < e->spec->n_prompts; p++)
        for (int32_t j = e->prompt[p].n_prompt; j < e->prompt[p].n; j++, out++)
            if (b->best[out] != b->pack.target[out] || !(exp(b->logp[out]) >= b->opt.probability)) /* NaN is no answer */
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
    const anchor_set *a = &b->anchors;
    const int32_t     a0 = a->rows ? a->from[g->layer] : 0, n_a = a->rows ? a->from[g->layer + 1] - a0 : 0;

    for (int k = 0; n_a && k < N_MATRICES; k++)
        if (b->moves[k])
        {
            be->gather_cols(be->ctx, b->gathered, left[k], f, a->dev_neuron + a0, a->rows, n_a);
            be->matmul_tn(be->ctx, a->dev_grad[k] + (size_t) a0 * (size_t) d, d, b->gathered, n_a, right[k], d, n_a, d,
                          a->rows, 1);
        }
    for (int32_t i = 0; i < b->n_turn; i++)
    {
        edit   *e = b->turn[i];
        int32_t from = e->from[g->layer], n = e->from[g->layer + 1] - from, t = e->row1 - e->row0;

        if (n == 0 || e->state != EDIT_ACTIVE)
            continue;
        for (int k = 0; k < N_MATRICES; k++)
        {
            if (!b->moves[k])
                continue;
            be->gather_cols(be->ctx, b->gathered, left[k] + (size_t) e->row0 * (size_t) f, f,
                            e->dev_index + from, t, n);
            be->matmul_tn(be->ctx, e->dev_grad[k] + (size_t) from * (size_t) d, d, b->gathered, n,
                          right[k] + (size_t) e->row0 * (size_t) d, d, n, d, t, 0);
        }
    }
}

/*
 * What an anchors' position weighs in the loss mean(-log P) + beta mean(KL) of an edit. An edit that circles where the
 * two balance gets there later: after the first fifth of its steps beta is halved with every tenth.
 */
static double
anchor_weight(const batch *b, const edit *e)
{
    const double late = fmax(0, (double) e->out->steps / b->opt.max_steps - 0.2);

    return b->anchors.n ? b->opt.beta * exp2(-10 * late) / b->anchors.outs_an_edit : 0;
}

/* Tokens of the object of anchor i. */
static int32_t
n_outs(const batch *b, int32_t i)
{
    const kne_tokens *t = &b->known[b->anchors.known[i]];

    return t->n - t->n_prompt;
}

/* w->dlogits: of the divergence of the anchors packed, whose sum goes to the round's loss, and of -log P of the edits. */
static kne_status
loss_gradient(batch *b, kne_err *err)
{
    kne_backend  *be = b->job->backend;
    kne_work     *w = b->work;
    const int32_t V = b->job->model->arch.vocab_size;
    anchor_set   *a = &b->anchors;
    const int32_t n_kl = b->n_turn ? b->turn[0]->out0 : b->pack.b.n_out; /* out rows of the anchors */

    for (int32_t k = 0; k < n_kl; k++)
        b->coef[k] = 1;
    kne_device_put(be, w->coef, b->coef, (size_t) b->pack.b.n_out * sizeof *b->coef);
    /* the references of neighbours lie one after the other */
    for (int32_t at = 0, to, out = 0, outs; at < a->n_turn; at = to, out += outs)
    {
        for (to = at, outs = 0; to < a->n_turn && a->turn[to] - a->turn[at] == to - at; to++)
            outs += n_outs(b, a->turn[to]);
        be->kl(be->ctx, w->kl + out, w->dlogits + (size_t) out * (size_t) V, w->logits + (size_t) out * (size_t) V,
               a->logp[a->turn[at]], w->coef + out, outs, V);
    }
    if (b->pack.b.n_out > n_kl)
        be->logprob(be->ctx, w->logp + n_kl, NULL, w->dlogits + (size_t) n_kl * (size_t) V,
                    w->logits + (size_t) n_kl * (size_t) V, w->target + n_kl, w->coef + n_kl, b->pack.b.n_out - n_kl, V);
    be->get(be->ctx, b->kl, w->kl, (size_t) n_kl * sizeof *b->kl);
    for (int32_t at = 0, out = 0; at < a->n_turn; at++)
    {
        const int32_t i = a->turn[at], n = n_outs(b, i);
        double        sum = 0;

        for (int32_t k = 0; k < n; k++)
            sum += b->kl[out++];
        a->loss += sum;
        a->pause[i] = sum > ANCHOR_QUIET * n ? 0 : a->pause[i] ? 4 : 1;
        a->rest[i] = a->pause[i];
    }
    return be->status(be->ctx, err);
}

/* What backward left on the device. */
static kne_status
fetch_gradients(batch *b, kne_err *err)
{
    kne_backend  *be = b->job->backend;
    const size_t  row = (size_t) b->job->model->arch.d_model * sizeof(float);
    anchor_set   *a = &b->anchors;

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!b->moves[k])
            continue;
        if (a->rows)
            be->get(be->ctx, a->grad[k], a->dev_grad[k], (size_t) a->n_neurons * row);
        for (int32_t i = 0; i < b->n_turn; i++)
            if (b->turn[i]->state == EDIT_ACTIVE)
                be->get(be->ctx, b->turn[i]->grad[k], b->turn[i]->dev_grad[k], (size_t) b->turn[i]->n * row);
    }
    return be->status(be->ctx, err);
}

/*
 * One forward pass over the packed anchors and the edits in b->turn, with the losses; where learn is set, also the gradient of
 * those that are not reached. Sets e->loss and moves edits between ACTIVE and REACHED.
 */
static kne_status
run_pass(batch *b, bool learn, kne_err *err)
{
    const kne_edit_job *job = b->job;
    kne_backend        *be = job->backend;
    anchor_set         *a = &b->anchors;
    bool                any = b->more && a->n_turn > 0;

    kne_pack_share(&b->pack);
    /* the same sequences as in the pass before: what lies below the lowest layer that moves is as it was */
    KNE_TRY(kne_forward(job->model, be, b->work, &b->pack.b, &b->rows.overlay, NULL,
                        b->pass_key == b->last_key ? b->lowest : 0, err));
    b->last_key = b->pass_key;
    kne_work_logprob(be, b->work, 0, b->pack.b.n_out, job->model->arch.vocab_size, b->pack.target, NULL, b->logp, b->best);
    KNE_TRY(be->status(be->ctx, err));
    for (int32_t i = 0; i < b->n_turn; i++)
    {
        edit   *e = b->turn[i];
        int32_t out = e->out0;

        e->state = reached(b, e, out) ? EDIT_REACHED : EDIT_ACTIVE;
        any |= e->state == EDIT_ACTIVE;
        e->loss = 0;
        for (int32_t k = 0; k < e->n_outs; k++)
        {
            e->loss -= b->logp[out + k] / e->n_outs;
            b->coef[out + k] = e->state == EDIT_ACTIVE ? -1.0f / (float) e->n_outs : 0; /* nothing once it has arrived */
        }
    }
    if (learn)
        KNE_TRY(loss_gradient(b, err));
    for (int32_t i = 0; i < b->n_turn; i++)
        b->turn[i]->loss += anchor_weight(b, b->turn[i]) * a->loss;
    if (!learn || !any)
        return KNE_OK;
    KNE_TRY(kne_backward(job->model, be, b->work, &b->pack.b, &b->rows.overlay, NULL, b->lowest, collect_gradient, b, err));
    return fetch_gradients(b, err);
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

/* Add edits of the wanted state to the pack, from *next on. */
static void
fill_edits(batch *b, edit_state wanted, int32_t *next)
{
    for (; *next < b->job->n_edits; (*next)++)
    {
        edit *e = &b->edit[*next];

        if (e->state != wanted)
            continue;
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

/* ---- the step ---- */

/* Protected: momentum on M^-1 G, a step of length lr |W_S| along it. */
static void
protected_step(batch *b, edit *e)
{
    const int32_t L = b->job->model->arch.n_layers, d = b->job->model->arch.d_model;
    double        norm = 0;

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!b->moves[k])
            continue;
        /* the metric is that of the value vectors' inputs; keys take the plain gradient */
        for (int32_t l = 0; k == KNE_MATRIX_DOWN && l < L; l++)
        {
            int32_t from = e->from[l], n = e->from[l + 1] - from;
            float  *g = e->grad[k] + (size_t) from * (size_t) d;

            if (n)
                kne_metric_solve(e->chol[l], n, g, g, d, b->column);
        }
        for (size_t i = 0; i < (size_t) e->n * (size_t) d; i++)
        {
            e->mean[k][i] = (float) b->opt.momentum * e->mean[k][i] + e->grad[k][i];
            norm += (double) e->mean[k][i] * e->mean[k][i];
        }
    }
    /* an edit that has not arrived after a fifth of its steps has far to go, or goes too far: longer while its loss falls, shorter where it rises */
    if (5 * e->out->steps > b->opt.max_steps)
        e->pace = e->loss < e->last_loss ? fmin(e->pace * 1.1, 8) : fmax(e->pace / 2, 0.125);
    e->last_loss = e->loss;

    double scale = norm > 0 ? b->opt.lr * e->pace * e->w_norm / sqrt(norm) : 0;
    if (b->opt.alpha > 0)
        scale *= b->opt.alpha / sqrt((double) e->n);
    for (int k = 0; k < N_MATRICES; k++)
        for (size_t i = 0; b->moves[k] && i < (size_t) e->n * (size_t) d; i++)
            e->delta[k][i] -= (float) scale * e->mean[k][i];
}

static void
adam_step(batch *b, edit *e)
{
    const int32_t d = b->job->model->arch.d_model;
    const float   c1 = 1 - powf(ADAM_B1, (float) e->out->steps), c2 = 1 - powf(ADAM_B2, (float) e->out->steps);
    float         lr = (float) b->opt.lr;

    if (b->opt.alpha > 0)
        lr *= (float) (b->opt.alpha / sqrt((double) e->n));
    for (int k = 0; k < N_MATRICES; k++)
        for (size_t i = 0; b->moves[k] && i < (size_t) e->n * (size_t) d; i++)
        {
            float g = e->grad[k][i];

            e->mean[k][i] = ADAM_B1 * e->mean[k][i] + (1 - ADAM_B1) * g;
            e->var[k][i] = ADAM_B2 * e->var[k][i] + (1 - ADAM_B2) * g * g;
            e->delta[k][i] -= lr * (e->mean[k][i] / c1) / (sqrtf(e->var[k][i] / c2) + 1e-8f);
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

/* The edit's gradient, to which that of the anchors is added for its neurons. */
static void
add_anchors(batch *b, edit *e)
{
    const int32_t d = b->job->model->arch.d_model;
    const float   w = (float) anchor_weight(b, e);

    for (int k = 0; b->anchors.n && k < N_MATRICES; k++)
        for (int32_t j = 0; b->moves[k] && j < e->n; j++)
        {
            const float *from = b->anchors.grad[k] + (size_t) e->mine[j] * (size_t) d;
            float       *to = e->grad[k] + (size_t) j * (size_t) d;

            for (int32_t c = 0; c < d; c++)
                to[c] += w * from[c];
        }
}

static void
prepare_edits(batch *b)
{
    const kne_arch *arch = &b->job->model->arch;
    const int32_t   L = arch->n_layers, f = arch->d_ff, d = arch->d_model;

    b->lowest = L;
    for (int32_t l = 0; l < L; l++)
    {
        double mean = kne_metric_mean(b->protect, b->n_protect, l, f);

        for (int32_t i = 0; i < b->job->n_edits; i++)
        {
            edit   *e = &b->edit[i];
            int32_t from = e->state == EDIT_ENDED ? 0 : e->from[l], n = e->state == EDIT_ENDED ? 0 : e->from[l + 1] - from;

            if (n && l < b->lowest)
                b->lowest = l;
            for (int32_t j = from; j < from + n; j++)
                for (int k = 0; k < N_MATRICES; k++)
                    for (int32_t c = 0; b->moves[k] && c < d; c++)
                    {
                        double v = b->rows.base[k][(size_t) e->place[j] * (size_t) d + (size_t) c];

                        e->w_norm += v * v;
                    }
            for (int32_t j = from; j < from + n; j++)
                e->index[j] -= l * f; /* from here on: the neuron within its layer */
            if (n && e->owns_chol)
                kne_metric_factor(e->chol[l], b->protect, b->n_protect, l, f, e->index + from, n, b->opt.ridge, mean,
                                  b->column);
        }
    }
    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        e->w_norm = sqrt(e->w_norm);
        e->pace = 1;
        if (e->state != EDIT_ENDED)
            kne_device_put(b->job->backend, e->dev_index, e->index, (size_t) e->n * sizeof *e->index);
    }
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
        union_layout(b, mark, err);
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
        union_fill(b, mark);
        prepare_edits(b);
        st = anchor_references(b, err);
    }
    free(mark);

    for (int step = 0; st == KNE_OK; step++)
    {
        int32_t next = 0;

        st = kne_batch_pause(b, err);
        report(b, KNE_PHASE_OPTIMISE, step);
        /* of two rounds one makes a step of somebody's budget or ends; anything else would be a loop */
        if (st == KNE_OK && step / 2 > (int64_t) (job->n_edits + 1) * (b->opt.max_steps + 2))
            st = kne_error(err, KNE_ERR_INTERNAL, "the batch does not settle");
        if (st != KNE_OK)
            break;
        compose(b);
        if (count_state(b, EDIT_ACTIVE) == 0)
        {
            /* all reached, one after another: do they all hold together? */
            int32_t ended = count_state(b, EDIT_ENDED);

            while (st == KNE_OK && next < job->n_edits)
            {
                clear_pass(b);
                fill_edits(b, EDIT_REACHED, &next);
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

        b->anchors.loss = 0;
        for (int k = 0; k < N_MATRICES; k++)
            if (b->anchors.dev_grad[k])
            {
                memset(b->anchors.grad[k], 0, (size_t) b->anchors.n_neurons * (size_t) arch->d_model * sizeof(float));
                job->backend->zero(job->backend->ctx, b->anchors.dev_grad[k],
                                   (size_t) b->anchors.n_neurons * (size_t) arch->d_model * sizeof(float));
            }
        /* the anchors first, then the edits that take their gradient; all in one pass where there is room */
        while (st == KNE_OK && (next < job->n_edits || next_anchor < b->anchors.n))
        {
            clear_pass(b);
            fill_anchors(b, &next_anchor);
            if (next_anchor == b->anchors.n)
                fill_edits(b, EDIT_ACTIVE, &next);
            if (b->pack.b.n == 0)
                break;
            b->more = next < job->n_edits;
            st = run_pass(b, true, err);
            for (int32_t i = 0; i < b->n_turn && st == KNE_OK; i++)
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
                e->out->steps++;
                add_anchors(b, e);
                if (b->opt.step == KNE_STEP_PROTECTED)
                    protected_step(b, e);
                else
                    adam_step(b, e);
            }
            if (st == KNE_OK)
                st = kne_batch_pause(b, err);
        }
    }
    for (int32_t i = 0; i < job->n_edits && st == KNE_OK; i++)
        for (int32_t l = 0; l < arch->n_layers && b->edit[i].state != EDIT_ENDED; l++)
            for (int32_t j = b->edit[i].from[l]; j < b->edit[i].from[l + 1]; j++)
                b->edit[i].index[j] += l * arch->d_ff;
    kne_work_free(b->work);
    b->work = NULL;
    return st;
}
