/*
 * kne_edit.c - a job from end to end: plan, optimise, check against the view that will be served, results.
 */
#include "kne_edit_impl.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void
kne_edit_end(edit *e, int outcome, const char *fmt, ...)
{
    va_list ap;

    e->state = EDIT_ENDED;
    e->out->outcome = outcome;
    va_start(ap, fmt);
    vsnprintf(e->out->message, sizeof e->out->message, fmt, ap);
    va_end(ap);
}

kne_status
kne_batch_pause(batch *b, kne_err *err)
{
    const kne_job_calls *c = &b->job->calls;

    if (c->yield && c->yield(c->ctx))
        return kne_error(err, KNE_ERR_CANCELLED, "cancelled");
    for (int32_t i = 0; c->cancelled && i < b->job->n_edits; i++)
        if (b->edit[i].state != EDIT_ENDED && c->cancelled(c->ctx, b->edit[i].spec->edit_id))
            kne_edit_end(&b->edit[i], KNE_OUTCOME_CANCELLED, "cancelled");
    return KNE_OK;
}

/* What a result owns besides its arrays. */
typedef struct owned
{
    kne_arena plan;
} owned;

void
kne_edit_result_free(kne_edit_result *r)
{
    if (!r)
        return;
    for (int32_t i = 0; r->edit && i < r->n_edits; i++)
    {
        kne_delta_release(r->edit[i].delta);
        free(r->edit[i].answer_before);
    }
    if (r->impl)
        kne_arena_free(&((owned *) r->impl)->plan);
    free(r->impl);
    free(r->edit);
    free(r->disturbed);
    free(r->provenance);
    free(r);
}

static kne_status
begin(const kne_edit_job *job, batch *b, kne_err *err)
{
    const int32_t L = job->model->arch.n_layers;

    memset(b, 0, sizeof *b);
    b->job = job;
    b->opt = job->options;
    if (b->opt.layer_max < 0)
        b->opt.layer_max = L - 1;
    if (b->opt.layer_max >= L || b->opt.layer_min > b->opt.layer_max)
    {
        kne_error(err, KNE_ERR_INVALID, "layers %d to %d are not in the model", b->opt.layer_min, b->opt.layer_max);
        kne_error_detail(err, "It has layers 0 to %d.", L - 1);
        return KNE_ERR_INVALID;
    }
    b->moves[KNE_MATRIX_DOWN] = true;
    b->moves[KNE_MATRIX_UP] = b->opt.matrices == KNE_MATRICES_ALL;
    b->moves[KNE_MATRIX_GATE] = b->opt.matrices == KNE_MATRICES_ALL && job->model->arch.gated;

    b->result = calloc(1, sizeof *b->result);
    if (b->result)
    {
        b->result->n_edits = job->n_edits;
        b->result->edit = calloc((size_t) job->n_edits + 1, sizeof *b->result->edit);
        b->result->impl = calloc(1, sizeof(owned));
    }
    if (!b->result || !b->result->edit || !b->result->impl)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    return KNE_OK;
}

/* Release the batch; the result keeps the ensembles. */
static void
end(batch *b, kne_status st, kne_edit_result **out)
{
    kne_arena_free(&b->text);
    kne_arena_free(&b->run);
    kne_device_free(&b->dev, b->job->backend);
    kne_ref_cache_free(b->cache);
    if (b->result && b->result->impl)
        ((owned *) b->result->impl)->plan = b->plan;
    else
        kne_arena_free(&b->plan);
    if (st == KNE_OK)
        *out = b->result;
    else
        kne_edit_result_free(b->result);
}

/* The delta rows of one edit, ascending by (layer, neuron, matrix). */
static kne_status
make_delta(batch *b, edit *e, kne_err *err)
{
    const kne_arch *arch = &b->job->model->arch;
    const int32_t   d = arch->d_model;
    kne_delta_row  *row = malloc((size_t) e->n * N_MATRICES * sizeof *row);
    int32_t         n = 0;
    double          norm = 0;
    kne_status      st;

    if (!row)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < e->n; i++)
        for (int k = 0; k < N_MATRICES; k++)
            if (b->moves[k])
            {
                const float *v = e->delta[k] + (size_t) i * (size_t) d;

                row[n++] = (kne_delta_row) {e->index[i] / arch->d_ff, e->index[i] % arch->d_ff, (uint8_t) k, d, v};
                for (int32_t c = 0; c < d; c++)
                    norm += (double) v[c] * v[c];
            }
    st = kne_delta_new(row, n, &e->out->delta, err);
    e->out->norm = sqrt(norm);
    free(row);
    return st;
}

typedef struct member
{
    int64_t    edit_id;
    kne_delta *delta;
} member;

static int
member_order(const void *pa, const void *pb)
{
    const member *a = pa, *b = pb;

    return (a->edit_id > b->edit_id) - (a->edit_id < b->edit_id);
}

/* The view with the batch's edits in it, as readers will have it. */
static kne_status
view_after(batch *b, kne_view **out, kne_err *err)
{
    const kne_view *before = b->job->view;
    int32_t         n = before->n_edits + b->job->n_edits, at = 0;
    member         *all = malloc(((size_t) n + 1) * sizeof *all);
    int64_t        *id = malloc(((size_t) n + 1) * sizeof *id);
    kne_delta     **delta = malloc(((size_t) n + 1) * sizeof *delta);
    kne_status      st = all && id && delta ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    for (int32_t i = 0; i < before->n_edits && st == KNE_OK; i++)
        all[at++] = (member) {before->edit_id[i], before->delta[i]};
    for (int32_t i = 0; i < b->job->n_edits && st == KNE_OK; i++)
        if (b->edit[i].out->delta)
            all[at++] = (member) {b->edit[i].spec->edit_id, b->edit[i].out->delta};
    if (st == KNE_OK)
    {
        qsort(all, (size_t) at, sizeof *all, member_order);
        for (int32_t i = 0; i < at; i++)
        {
            id[i] = all[i].edit_id;
            delta[i] = all[i].delta;
        }
        st = kne_view_new(b->job->model, b->job->backend, at, id, delta, out, err);
    }
    free(all);
    free(id);
    free(delta);
    return st;
}

/* Final probabilities in the view that will be served, and earlier edits that no longer hold in it. */
static kne_status
look_after(batch *b, const kne_view *view, kne_err *err)
{
    const kne_edit_job *job = b->job;
    size_t              most = (size_t) job->n_edits + (size_t) b->n_known;
    kne_tokens         *fact = malloc((most + 1) * sizeof *fact);
    int32_t            *who = malloc((most + 1) * sizeof *who), n = 0, mine;
    double             *logp = malloc((most + 1) * sizeof *logp);
    uint8_t            *right = malloc(most + 1);
    kne_status st = fact && who && logp && right ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    b->result->disturbed = malloc(((size_t) b->n_known + 1) * sizeof *b->result->disturbed);
    if (!b->result->disturbed)
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < job->n_edits && st == KNE_OK; i++)
        if (b->edit[i].out->delta || b->edit[i].out->outcome == KNE_OUTCOME_HOLDS)
        {
            who[n] = i;
            fact[n++] = b->edit[i].prompt[0];
        }
    mine = n;
    for (int32_t i = 0; i < b->n_known && st == KNE_OK; i++)
        if (b->held[i])
        {
            who[n] = i;
            fact[n++] = b->known[i];
        }
    if (st == KNE_OK)
        st = kne_score_tokens(job->model, job->backend, view, fact, n, logp, right, NULL, job->calls.yield,
                              job->calls.ctx, err);
    for (int32_t i = 0; i < n && st == KNE_OK; i++)
    {
        if (i >= mine)
        {
            if (!right[i])
                b->result->disturbed[b->result->n_disturbed++] = b->known_at[who[i]];
            continue;
        }
        edit *e = &b->edit[who[i]];

        e->out->p_after = exp(logp[i]);
        /* what is said must be so once it is committed */
        if (e->out->outcome == KNE_OUTCOME_HOLDS && !right[i])
        {
            e->out->undone = true;
            kne_edit_end(e, KNE_OUTCOME_FAILED, "the model answered this already, but no longer does "
                         "with the edits that ran with it");
        }
    }
    free(fact);
    free(who);
    free(logp);
    free(right);
    return st;
}

static kne_status
perplexity(batch *b, const kne_view *view, double *out, kne_err *err)
{
    const kne_edit_job *job = b->job;
    double             *logp = malloc((size_t) job->n_texts * sizeof *logp + 1), sum = 0, n = 0;
    int32_t            *tokens = malloc((size_t) job->n_texts * sizeof *tokens + 1);
    kne_status          st = logp && tokens ? KNE_OK : kne_error(err, KNE_ERR_NOMEM, "out of memory");

    if (st == KNE_OK)
        st = kne_score_texts(job->model, job->backend, view, job->text, job->n_texts, logp, tokens, job->calls.yield,
                             job->calls.ctx, err);
    for (int32_t i = 0; i < job->n_texts && st == KNE_OK; i++)
    {
        sum += logp[i];
        n += tokens[i];
    }
    *out = n > 0 ? exp(-sum / n) : 0;
    free(logp);
    free(tokens);
    return st;
}

/* What the batch does to texts that it is not about. Too much: it fails, all of it. */
static kne_status
check_damage(batch *b, const kne_view *after_view, kne_err *err)
{
    double before, after;

    if (b->opt.max_damage == 0)
        return KNE_OK;
    KNE_TRY(perplexity(b, b->job->view, &before, err));
    KNE_TRY(perplexity(b, after_view, &after, err));
    if (before > 0 && after <= before * b->opt.max_damage)
        return KNE_OK;
    for (int32_t i = 0; i < b->job->n_edits; i++)
    {
        kne_edit_outcome *o = b->edit[i].out;

        if (!o->delta)
            continue;
        kne_delta_release(o->delta);
        o->delta = NULL;
        if (before > 0)
            kne_edit_end(&b->edit[i], KNE_OUTCOME_FAILED,
                         "perplexity over the health texts would rise from %.5g to %.5g, by a factor of %.4g: max_damage is %g",
                         before, after, after / before, b->opt.max_damage);
        else
            kne_edit_end(&b->edit[i], KNE_OUTCOME_FAILED, "max_damage is set, but kne.health_text holds no text to measure it by");
    }
    b->result->n_disturbed = 0;
    return KNE_OK;
}

static kne_status
provenance(batch *b, kne_err *err)
{
    char        options[2048], hex[2 * KNE_DIGEST_LEN + 1];
    uint8_t     digest[KNE_DIGEST_LEN];
    kne_sha256 *h = kne_sha256_new();
    size_t      size = sizeof options + 512;

    b->result->provenance = malloc(size);
    if (!b->result->provenance && h)
        kne_sha256_end(h, digest); /* frees it */
    if (!h || !b->result->provenance)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (int32_t i = 0; i < b->job->n_known; i++)
    {
        uint64_t len[2] = {b->job->known[i].prompt.len, b->job->known[i].object.len};

        kne_sha256_add(h, len, sizeof len);
        kne_sha256_add(h, b->job->known[i].prompt.p, len[0]);
        kne_sha256_add(h, b->job->known[i].object.p, len[1]);
    }
    kne_sha256_end(h, digest);
    for (int i = 0; i < KNE_DIGEST_LEN; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    kne_options_print(&b->job->options, options, sizeof options);
    snprintf(b->result->provenance, size,
             "{\"engine\":\"%s\",\"device\":\"%s\",\"protected\":%s,\"facts\":%d,\"protecting_facts\":%d,"
             "\"facts_digest\":\"%s\",\"batch\":%d,\"options\":%s}",
             KNE_ENGINE_VERSION, b->job->backend->name, b->is_protected ? "true" : "false", b->job->n_known,
             b->n_protect, hex, b->job->n_edits, options);
    return KNE_OK;
}

static kne_status
run(const kne_edit_job *job, kne_edit_result **out, kne_err *err)
{
    batch      b;
    kne_view  *after = NULL;
    double     t0 = kne_now(), t1;
    kne_status st = begin(job, &b, err);

    if (st == KNE_OK)
        st = kne_batch_plan(&b, err);
    t1 = kne_now();
    bool any = false;
    for (int32_t i = 0; st == KNE_OK && i < job->n_edits; i++)
        any |= b.edit[i].state != EDIT_ENDED;
    if (st == KNE_OK && any)
        st = kne_batch_optimise(&b, err);
    for (int32_t i = 0; st == KNE_OK && i < job->n_edits; i++)
        if (b.edit[i].state != EDIT_ENDED)
        {
            b.edit[i].out->outcome = KNE_OUTCOME_APPLIED;
            st = make_delta(&b, &b.edit[i], err);
        }
    if (st == KNE_OK)
        st = view_after(&b, &after, err);
    if (st == KNE_OK)
        st = look_after(&b, after, err);
    if (st == KNE_OK)
        st = check_damage(&b, after, err);
    if (st == KNE_OK)
        st = provenance(&b, err);
    kne_view_free(after);
    if (b.result)
    {
        b.result->attribute_seconds = t1 - t0;
        b.result->optimise_seconds = kne_now() - t1;
    }
    end(&b, st, out);
    return st;
}

static int32_t
count_failed(const kne_edit_result *r)
{
    int32_t n = 0;

    for (int32_t i = 0; i < r->n_edits; i++)
        n += r->edit[i].outcome == KNE_OUTCOME_FAILED;
    return n;
}

/*
 * Facts that held until the rest of the batch came are solved with it: once more from the start, until there are no more of
 * them. If that gains nothing (facts that contradict each other), the batch stays without.
 */
kne_status
kne_edit_run(const kne_edit_job *job, kne_edit_result **out, kne_err *err)
{
    kne_edit_job     again = *job;
    kne_edit_spec   *spec = malloc((size_t) job->n_edits * sizeof *spec);
    kne_edit_result *next = NULL;
    kne_status       st;

    if (!spec)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    memcpy(spec, job->edit, (size_t) job->n_edits * sizeof *spec);
    again.edit = spec;
    st = run(&again, out, err);
    while (st == KNE_OK)
    {
        int32_t undone = 0;
        bool    better;

        for (int32_t i = 0; i < job->n_edits; i++)
            if ((*out)->edit[i].undone)
            {
                spec[i].solve = true;
                undone++;
            }
        if (!undone)
            break;
        st = run(&again, &next, err);
        better = st == KNE_OK && count_failed(next) < count_failed(*out);
        if (st == KNE_OK)
            kne_edit_result_free(better ? *out : next);
        else
            kne_edit_result_free(*out);
        *out = st != KNE_OK ? NULL : better ? next : *out;
        if (!better)
            break;
    }
    free(spec);
    return st;
}

kne_status
kne_locate_run(const kne_edit_job *job, kne_edit_result **out, kne_err *err)
{
    batch      b;
    kne_status st = begin(job, &b, err);

    b.locate_only = true;
    if (st == KNE_OK)
        st = kne_batch_plan(&b, err);
    if (st == KNE_OK && b.edit[0].state == EDIT_ENDED)
        st = kne_error(err, KNE_ERR_INVALID, "%s", b.edit[0].out->message);
    end(&b, st, out);
    return st;
}
