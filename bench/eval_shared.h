/*
 * eval_shared.h - a batch solved with one delta: the upper bound that deltas of each edit's own are compared with.
 *
 * Plan as any batch, so every edit chooses its ensemble; then one edit that has all prompts, all anchors and the union of
 * the ensembles takes the place of the batch in the optimiser. Value vectors only. A batch that is not reached in `max_steps` keeps what it
 * has: each of its edits is judged by its own answer.
 */
#ifndef EVAL_SHARED_H
#define EVAL_SHARED_H

#include "eval_suite.h"
#include "kne_edit_impl.h"

/* The edit that stands for all: what `all` have, side by side. `mark`: (L * f) zeroes. */
static void
merge_edits(const kne_arch *arch, const edit *all, int32_t n, uint8_t *mark, kne_edit_spec *spec, edit *one)
{
    const int32_t L = arch->n_layers, f = arch->d_ff;
    int32_t       prompts = 0, at = 0;

    for (int32_t i = 0; i < n; i++)
    {
        prompts += all[i].spec->n_prompts;
        one->n_anchors += all[i].n_anchors;
        for (int32_t k = 0; all[i].state != EDIT_ENDED && k < all[i].n; k++)
        {
            one->n += !mark[all[i].index[k]];
            mark[all[i].index[k]] = 1;
        }
    }
    one->spec = spec;
    one->prompt = take((size_t) prompts, sizeof *one->prompt);
    one->anchor = take((size_t) one->n_anchors, sizeof *one->anchor);
    one->index = take((size_t) one->n, sizeof *one->index);
    one->place = take((size_t) one->n, sizeof *one->place);
    one->mine = take((size_t) one->n, sizeof *one->mine);
    one->from = take((size_t) L + 1, sizeof *one->from);
    one->n_anchors = 0;
    for (int32_t i = 0; i < n; i++)
    {
        if (all[i].state == EDIT_ENDED)
            continue;
        for (int32_t p = 0; p < all[i].spec->n_prompts; p++)
            one->prompt[spec->n_prompts++] = all[i].prompt[p];
        for (int32_t k = 0; k < all[i].n_anchors; k++)
            one->anchor[one->n_anchors++] = all[i].anchor[k];
    }
    for (int32_t k = 0; k < L * f; k++)
    {
        if (k % f == 0)
            one->from[k / f] = at;
        if (mark[k])
            one->index[at++] = k;
    }
    one->from[L] = at;
}

static kne_status
solve_shared(const kne_edit_job *job, kne_edit_result **out, kne_err *err)
{
    const kne_arch  *arch = &job->model->arch;
    kne_edit_outcome outcome = {0};
    kne_edit_result *r = take(1, sizeof *r);
    kne_edit_spec    spec = {.edit_id = job->edit[0].edit_id};
    kne_edit_job     as_one = *job;
    edit             one = {.out = &outcome};
    batch            b = {.job = job, .opt = job->options, .result = r, .moves = {[KNE_MATRIX_DOWN] = true}};
    kne_delta_row   *row;
    uint8_t         *mark = take((size_t) arch->n_layers * (size_t) arch->d_ff, 1);

    if (b.opt.layer_max < 0)
        b.opt.layer_max = arch->n_layers - 1;
    r->n_edits = job->n_edits;
    r->edit = take((size_t) job->n_edits, sizeof *r->edit);
    KNE_TRY(kne_batch_plan(&b, err));
    merge_edits(arch, b.edit, job->n_edits, mark, &spec, &one);
    as_one.n_edits = 1;
    as_one.edit = &spec;
    b.job = &as_one;
    b.edit = &one;
    KNE_TRY(kne_batch_optimise(&b, err));

    row = take((size_t) one.n, sizeof *row);
    for (int32_t l = 0; l < arch->n_layers; l++)
        for (int32_t k = one.from[l]; k < one.from[l + 1]; k++)
            row[k] = (kne_delta_row) {l, one.index[k] % arch->d_ff, KNE_MATRIX_DOWN, arch->d_model,
                                      one.delta[KNE_MATRIX_DOWN] + (size_t) k * (size_t) arch->d_model};
    for (int32_t i = 0; i < r->n_edits; i++)
    {
        r->edit[i].steps = outcome.steps;
        r->edit[i].outcome = outcome.outcome ? outcome.outcome : KNE_OUTCOME_APPLIED;
        r->edit[i].ensemble = NULL;
        r->edit[i].n_ensemble = 0;
    }
    r->edit[0].n_ensemble = one.n;
    KNE_TRY(kne_delta_new(row, one.n, &r->edit[0].delta, err));
    kne_arena_free(&b.text), kne_arena_free(&b.run), kne_arena_free(&b.plan);
    kne_device_free(&b.dev, job->backend);
    free(row), free(mark), free(one.prompt), free(one.anchor), free(one.index), free(one.place), free(one.mine), free(one.from);
    *out = r;
    return KNE_OK;
}

#endif
