/*
 * kne_edit_rows.c - what a batch moves: the rows of its edits, the union of them as the overlay of the passes, and the
 * metric of a protected step. Everything of size d lives on the device.
 *
 * Layouts run twice, first to count (see kne_arena).
 */
#include "kne_edit_impl.h"
#include "kne_metric.h"

#include <math.h>
#include <string.h>

static const kne_mat *
matrix_of(const kne_layer *layer, int k)
{
    return k == KNE_MATRIX_DOWN ? &layer->down : k == KNE_MATRIX_GATE ? &layer->gate : &layer->up;
}

static bool
live(const edit *e)
{
    return e->state != EDIT_ENDED;
}

/* ---- layout ---- */

/* mark (L, f): 1 what the view edits, 2 what the batch moves; how much of each there is. */
static void
count_union(batch *b, int32_t *mark)
{
    const kne_edit_job *job = b->job;
    const int32_t       L = job->model->arch.n_layers, f = job->model->arch.d_ff;
    shared_rows        *u = &b->rows;
    anchor_set         *a = &b->anchors;

    memset(mark, 0, (size_t) L * (size_t) f * sizeof *mark);
    for (int32_t l = 0; l < L; l++)
        for (int32_t i = 0; i < job->view->layer[l].n; i++)
            mark[l * f + job->view->neuron[l][i]] = 1;
    for (int32_t i = 0; i < job->n_edits; i++)
        for (int32_t j = 0; live(&b->edit[i]) && j < b->edit[i].n; j++)
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

/* With select all every edit has the same neurons, so the first one's metric serves them all. */
static bool
one_metric(const batch *b)
{
    return b->opt.select == KNE_SELECT_ALL;
}

static void
count_moving(batch *b)
{
    const int32_t L = b->job->model->arch.n_layers;
    moving_rows  *m = &b->moving;
    bool          first = true;

    m->n = m->n_block = m->max_block = 0;
    m->n_metric = 0;
    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        if (!live(e))
            continue;
        e->row = m->n;
        m->n += e->n;
        for (int32_t l = 0; l < L; l++)
        {
            const int32_t n = e->from[l + 1] - e->from[l];

            m->n_block += n > 0;
            m->max_block = n > m->max_block ? n : m->max_block;
            if (first || !one_metric(b))
                m->n_metric += (int64_t) n * n;
        }
        first = false;
    }
}

void
kne_rows_layout(batch *b, int32_t *mark)
{
    const kne_edit_job *job = b->job;
    const kne_arch     *arch = &job->model->arch;
    const size_t        L = (size_t) arch->n_layers, d = (size_t) arch->d_model;
    const bool          is_protected = b->opt.step == KNE_STEP_PROTECTED;
    shared_rows        *u = &b->rows;
    anchor_set         *a = &b->anchors;
    moving_rows        *m = &b->moving;
    bool                view_has[N_MATRICES] = {false};
    int                 n_moves = 0;

    if (!b->run.base)
    {
        count_union(b, mark);
        count_moving(b);
    }
    const size_t N = (size_t) m->n, n_u = (size_t) u->n, n_known = is_protected ? (size_t) kne_metric_rows(b->protect, b->n_protect) : 0;

    for (int32_t i = 0; i < job->view->n_edits; i++)
        for (int32_t r = 0; r < job->view->delta[i]->n_rows; r++)
            view_has[job->view->delta[i]->row[r].matrix] = true;
    u->from = kne_arena_take(&b->run, L + 1, sizeof *u->from);
    u->neuron = kne_arena_take(&b->run, n_u, sizeof *u->neuron);
    u->host = kne_arena_take(&b->run, n_u, d * sizeof *u->host);
    u->dev_neuron = kne_arena_take(&b->dev, n_u, sizeof *u->dev_neuron);
    u->layer = kne_arena_take(&b->run, L, sizeof *u->layer);
    a->from = kne_arena_take(&b->run, L + 1, sizeof *a->from);
    a->neuron = kne_arena_take(&b->run, (size_t) a->n_neurons, sizeof *a->neuron);
    a->dev_neuron = kne_arena_take(&b->dev, (size_t) a->n_neurons, sizeof *a->dev_neuron);
    for (int k = 0; k < N_MATRICES; k++)
    {
        const bool key = k != KNE_MATRIX_DOWN; /* keys go together: both of a gated FFN or none */
        const bool used = b->moves[k] || view_has[k] || (key && (view_has[KNE_MATRIX_GATE] || view_has[KNE_MATRIX_UP]));

        if (used && (k != KNE_MATRIX_GATE || arch->gated))
        {
            u->base[k] = kne_arena_take(&b->dev, n_u, d * sizeof(float));
            u->before[k] = kne_arena_take(&b->dev, n_u, d * sizeof(float));
            u->eff[k] = kne_arena_take(&b->dev, n_u, d * sizeof(float));
        }
        if (!b->moves[k])
            continue;
        n_moves++;
        m->delta[k] = kne_arena_take(&b->dev, N, d * sizeof(float));
        m->host_delta[k] = job->backend->host ? NULL : kne_arena_take(&b->run, N, d * sizeof(float));
        m->grad[k] = kne_arena_take(&b->dev, N, d * sizeof(float));
        m->mean[k] = kne_arena_take(&b->dev, N, d * sizeof(float));
        m->var[k] = is_protected ? NULL : kne_arena_take(&b->dev, N, d * sizeof(float));
        if (b->opt.beta > 0)
            a->grad[k] = kne_arena_take(&b->dev, (size_t) a->n_neurons, d * sizeof(float));
    }
    m->norm = kne_arena_take(&b->dev, (size_t) n_moves, N * sizeof *m->norm);
    m->owner = kne_arena_take(&b->dev, N, sizeof *m->owner);
    m->mine = kne_arena_take(&b->dev, N, sizeof *m->mine);
    m->from = kne_arena_take(&b->dev, n_u + 1, sizeof *m->from);
    m->place = kne_arena_take(&b->dev, N, sizeof *m->place);
    m->mover = kne_arena_take(&b->dev, (size_t) job->n_edits, sizeof *m->mover);
    m->grad_row = kne_arena_take(&b->dev, N, sizeof *m->grad_row);
    m->grad_from = kne_arena_take(&b->run, L + 1, sizeof *m->grad_from);
    m->host_mover = kne_arena_take(&b->run, (size_t) job->n_edits, sizeof *m->host_mover);
    m->host_grad_row = kne_arena_take(&b->run, N, sizeof *m->host_grad_row);
    m->host_int = kne_arena_take(&b->run, N + n_u + 1, sizeof *m->host_int);
    if (!is_protected)
        return;
    m->metric = kne_arena_take(&b->dev, (size_t) m->n_metric, sizeof *m->metric);
    m->block = kne_arena_take(&b->dev, (size_t) m->n_block, sizeof *m->block);
    m->activation = kne_arena_take(&b->dev, n_known, (size_t) a->widest * sizeof *m->activation);
    m->block_from = kne_arena_take(&b->run, L + 1, sizeof *m->block_from);
    m->host_block = kne_arena_take(&b->run, (size_t) m->n_block, sizeof *m->host_block);
    m->host_activation = kne_arena_take(&b->run, n_known, (size_t) a->widest * sizeof *m->host_activation);
    m->column = job->backend->host ? kne_arena_take(&b->run, (size_t) m->max_block * KNE_METRIC_COLUMNS, sizeof *m->column) : NULL;
}

/* ---- contents ---- */

/* Neurons of the union and of what moves, layer by layer; mark becomes each one's row, and edits learn theirs. */
static void
number_rows(batch *b, int32_t *mark)
{
    const kne_edit_job *job = b->job;
    const int32_t       L = job->model->arch.n_layers, f = job->model->arch.d_ff;
    shared_rows        *u = &b->rows;
    anchor_set         *a = &b->anchors;
    int32_t             n = 0, mine = 0;

    b->lowest = L;
    for (int32_t l = 0; l < L; l++)
    {
        a->from[l] = mine;
        u->from[l] = n;
        for (int32_t k = 0; k < f; k++)
        {
            if (mark[l * f + k] == 2)
                a->neuron[mine++] = k;
            if (mark[l * f + k])
            {
                u->neuron[n] = k;
                mark[l * f + k] = n++;
            }
        }
        u->layer[l] = (kne_overlay_layer) {.n = n - u->from[l], .neuron = u->dev_neuron + u->from[l]};
        if (b->lowest == L && mine > a->from[l])
            b->lowest = l;
    }
    u->from[L] = n;
    a->from[L] = mine;
    u->overlay.layer = u->layer;
    kne_device_put(job->backend, u->dev_neuron, u->neuron, (size_t) n * sizeof *u->neuron);
    kne_device_put(job->backend, a->dev_neuron, a->neuron, (size_t) mine * sizeof *a->neuron);
    for (int32_t i = 0; i < job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        for (int32_t l = 0; live(e) && l < L; l++)
            for (int32_t j = e->from[l], at = a->from[l]; j < e->from[l + 1]; j++)
            {
                while (a->neuron[at] != e->index[j] - l * f)
                    at++;
                e->mine[j] = at;
                e->place[j] = mark[e->index[j]];
            }
    }
}

/* Base rows and those of the view, and the norm of what each edit moves. */
static void
fill_union(batch *b, const int32_t *mark)
{
    const kne_edit_job *job = b->job;
    const kne_model    *m = job->model;
    const int32_t       L = m->arch.n_layers, f = m->arch.d_ff;
    const size_t        d = (size_t) m->arch.d_model, bytes = (size_t) b->rows.n * d * sizeof(float);
    kne_backend        *be = job->backend;
    shared_rows        *u = &b->rows;

    for (int k = 0; k < N_MATRICES; k++)
    {
        if (!u->base[k])
            continue;
        for (int32_t l = 0; l < L; l++)
        {
            const kne_mat *w = matrix_of(&m->layer[l], k);
            float         *eff = u->eff[k] + (size_t) u->from[l] * d;

            be->gather_neurons(be->ctx, u->base[k] + (size_t) u->from[l] * d, w, (k == KNE_MATRIX_DOWN) != w->transposed,
                               u->layer[l].neuron, u->layer[l].n);
            if (k == KNE_MATRIX_DOWN)
                u->layer[l].value_diff = eff;
            else if (k == KNE_MATRIX_GATE)
                u->layer[l].gate = eff;
            else
                u->layer[l].up = eff;
        }
        be->get(be->ctx, u->host, u->base[k], bytes);
        for (int32_t i = 0; b->moves[k] && i < job->n_edits; i++)
            for (int32_t j = 0; live(&b->edit[i]) && j < b->edit[i].n; j++)
                for (size_t c = 0; c < d; c++)
                {
                    const double v = u->host[(size_t) b->edit[i].place[j] * d + c];

                    b->edit[i].w_norm += v * v;
                }
        for (int32_t i = 0; i < job->view->n_edits; i++) /* ascending edit_id, as kne_view sums them */
            for (int32_t r = 0; r < job->view->delta[i]->n_rows; r++)
            {
                const kne_delta_row *row = &job->view->delta[i]->row[r];

                for (size_t c = 0; row->matrix == k && c < d; c++)
                    u->host[(size_t) mark[row->layer * f + row->neuron] * d + c] += row->v[c];
            }
        kne_device_put(be, u->before[k], u->host, bytes);
    }
    for (int32_t i = 0; i < job->n_edits; i++)
    {
        b->edit[i].w_norm = sqrt(b->edit[i].w_norm);
        b->edit[i].pace = 1;
    }
}

/* Who owns each moving row, where it stands in the union and in the anchors' gradient. */
static void
fill_moving(batch *b)
{
    kne_backend       *be = b->job->backend;
    const shared_rows *u = &b->rows;
    moving_rows       *m = &b->moving;
    int32_t           *to = m->host_int, *count = to + m->n;

    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        const edit *e = &b->edit[i];

        m->host_mover[i] = (kne_mover) {.row = e->row, .n = live(e) ? e->n : 0};
        for (int32_t j = 0; live(e) && j < e->n; j++)
            to[e->row + j] = i;
    }
    kne_device_put(be, m->owner, to, (size_t) m->n * sizeof *to);
    for (int32_t i = 0; i < b->job->n_edits; i++)
        if (live(&b->edit[i]))
            memcpy(to + b->edit[i].row, b->edit[i].mine, (size_t) b->edit[i].n * sizeof *to);
    kne_device_put(be, m->mine, to, (size_t) m->n * sizeof *to);

    memset(count, 0, ((size_t) u->n + 1) * sizeof *count);
    for (int32_t i = 0; i < b->job->n_edits; i++)
        for (int32_t j = 0; live(&b->edit[i]) && j < b->edit[i].n; j++)
            count[b->edit[i].place[j] + 1]++;
    for (int32_t r = 0; r < u->n; r++)
        count[r + 1] += count[r];
    kne_device_put(be, m->from, count, ((size_t) u->n + 1) * sizeof *count);
    for (int32_t i = 0; i < b->job->n_edits; i++) /* edits in order */
        for (int32_t j = 0; live(&b->edit[i]) && j < b->edit[i].n; j++)
            to[count[b->edit[i].place[j]]++] = b->edit[i].row + j;
    kne_device_put(be, m->place, to, (size_t) m->n * sizeof *to);
}

/* M = C_SS + ridge * (mean diagonal) * I of every edit and layer, from the activations of known facts. */
static void
fill_metric(batch *b)
{
    const kne_arch   *arch = &b->job->model->arch;
    const int32_t     L = arch->n_layers, f = arch->d_ff;
    const int64_t     rows = kne_metric_rows(b->protect, b->n_protect);
    const anchor_set *a = &b->anchors;
    kne_backend      *be = b->job->backend;
    moving_rows      *m = &b->moving;
    int64_t           at = 0;
    int32_t           n = 0;

    for (int32_t l = 0; l < L; l++)
    {
        m->block_from[l] = n;
        for (int32_t i = 0; i < b->job->n_edits; i++)
        {
            const edit   *e = &b->edit[i];
            const int32_t wide = live(e) ? e->from[l + 1] - e->from[l] : 0;

            if (!wide)
                continue;
            m->host_block[n] = (kne_metric_block) {.at = at, .row = e->row + e->from[l], .n = wide, .owner = i};
            if (n++ == m->block_from[l] || !one_metric(b))
                at += (int64_t) wide * wide;
            else
                m->host_block[n - 1].at = m->host_block[m->block_from[l]].at;
        }
    }
    m->block_from[L] = n;
    kne_device_put(be, m->block, m->host_block, (size_t) n * sizeof *m->block);
    for (int32_t l = 0; l < L; l++)
    {
        const int32_t           wide = a->from[l + 1] - a->from[l];
        const kne_metric_block *block = m->block + m->block_from[l];
        const double            mean = kne_metric_mean(b->protect, b->n_protect, l, f);

        n = one_metric(b) && m->block_from[l + 1] > m->block_from[l] ? 1 : m->block_from[l + 1] - m->block_from[l];
        if (!n)
            continue;
        kne_metric_gather(m->host_activation, b->protect, b->n_protect, l, f, a->neuron + a->from[l], wide);
        kne_device_put(be, m->activation, m->host_activation, (size_t) (rows * wide) * sizeof(float));
        be->gram(be->ctx, m->metric, m->activation, wide, rows, m->mine, a->from[l], block, n, m->max_block);
        be->factor(be->ctx, m->metric, NULL, block, n, m->max_block, rows ? 1.0 / (double) rows : 0,
                   mean > 0 ? b->opt.ridge * mean : 1);
    }
}

/* Matrix k's effective rows from the deltas as they are; layers of one format at a time. */
static void
compose(batch *b, int k)
{
    const kne_model   *model = b->job->model;
    const int32_t      L = model->arch.n_layers;
    const size_t       d = (size_t) model->arch.d_model;
    kne_backend       *be = b->job->backend;
    const shared_rows *u = &b->rows;
    const moving_rows *m = &b->moving;

    for (int32_t l = 0, to; l < L; l = to)
    {
        const kne_dtype type = matrix_of(&model->layer[l], k)->type;
        const size_t    at = (size_t) u->from[l] * d;

        for (to = l + 1; to < L && matrix_of(&model->layer[to], k)->type == type; to++)
            ;
        be->compose(be->ctx, u->eff[k] + at, k == KNE_MATRIX_DOWN ? u->base[k] + at : NULL, u->before[k] + at, m->delta[k],
                    m->from + u->from[l], m->place, u->from[to] - u->from[l], (int64_t) d, type);
    }
}

void
kne_rows_fill(batch *b, int32_t *mark)
{
    number_rows(b, mark);
    fill_union(b, mark);
    fill_moving(b);
    if (b->opt.step == KNE_STEP_PROTECTED)
        fill_metric(b);
    for (int k = 0; k < N_MATRICES; k++)
        if (b->rows.base[k])
            compose(b, k);
}

void
kne_rows_compose(batch *b)
{
    const size_t d = (size_t) b->job->model->arch.d_model;
    kne_backend *be = b->job->backend;

    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        edit *e = &b->edit[i];

        for (int k = 0; k < N_MATRICES && !live(e) && !e->cleared; k++)
            if (b->moves[k] && b->moving.host_mover[i].n)
                be->zero(be->ctx, b->moving.delta[k] + (size_t) e->row * d, (size_t) e->n * d * sizeof(float));
        e->cleared = !live(e);
    }
    for (int k = 0; k < N_MATRICES; k++)
        if (b->moves[k])
            compose(b, k);
}

kne_status
kne_rows_fetch(batch *b, kne_err *err)
{
    const size_t d = (size_t) b->job->model->arch.d_model;
    kne_backend *be = b->job->backend;

    for (int k = 0; k < N_MATRICES; k++)
        if (b->moves[k] && !be->host)
            be->get(be->ctx, b->moving.host_delta[k], b->moving.delta[k], (size_t) b->moving.n * d * sizeof(float));
    for (int32_t i = 0; i < b->job->n_edits; i++)
        for (int k = 0; k < N_MATRICES; k++)
            if (b->moves[k] && live(&b->edit[i]))
                b->edit[i].delta[k] = (be->host ? b->moving.delta[k] : b->moving.host_delta[k]) + (size_t) b->edit[i].row * d;
    return be->status(be->ctx, err);
}
