/*
 * kne_requests_edit.c - EDIT and LOCATE: the message becomes a kne_edit_job,
 * its result the answer.
 *
 * The job's texts point into the frame, which lives as long as the request.
 * What is wrong with the message as a whole is an ERROR before anything is
 * computed; what is wrong with one edit is that edit's outcome.
 */
#include "kne_serve.h"

#include "kne_edit.h"

#include <stdlib.h>

#define PROGRESS_SECONDS 0.1

/* What the arrays of a job point to. */
typedef struct parsed
{
    kne_edit_job   job;
    kne_known     *known;
    kne_edit_spec *edit;
    kne_text      *prompts; /* of all edits, one after the other */
    int32_t       *anchors;
    kne_text      *texts;
} parsed;

static void
free_parsed(parsed *p)
{
    free(p->known);
    free(p->edit);
    free(p->prompts);
    free(p->anchors);
    free(p->texts);
}

static kne_status
parse_edits(kne_call *c, parsed *p, kne_err *err)
{
    uint32_t n = kne_get_count(&c->in, 8 + 4 + 4 + 4);
    size_t   left = c->in.len - c->in.at, n_prompts = 0, n_anchors = 0;

    /* A prompt and an anchor take 4 bytes or more each, so no more of them than this can follow. */
    p->edit = calloc((size_t) n + 1, sizeof *p->edit);
    p->prompts = malloc((left / 4 + 1) * sizeof *p->prompts);
    p->anchors = malloc((left / 4 + 1) * sizeof *p->anchors);
    if (!p->edit || !p->prompts || !p->anchors)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < n && !c->in.bad; i++)
    {
        kne_edit_spec *e = &p->edit[i];

        e->edit_id = kne_get_i64(&c->in);
        e->n_prompts = (int32_t) kne_get_count(&c->in, 4);
        e->prompt = p->prompts + n_prompts;
        for (int32_t k = 0; k < e->n_prompts; k++)
            p->prompts[n_prompts++] = kne_get_span(&c->in);
        e->object = kne_get_span(&c->in);
        e->n_anchors = (int32_t) kne_get_count(&c->in, 4);
        e->anchor = p->anchors + n_anchors;
        for (int32_t k = 0; k < e->n_anchors; k++)
        {
            int32_t at = kne_get_i32(&c->in);

            if (at < 0 || at >= p->job.n_known)
                c->in.bad = true;
            p->anchors[n_anchors++] = at;
        }
        if (e->n_prompts < 1)
            c->in.bad = true;
    }
    if (p->job.options.max_damage > 0)
    {
        p->job.n_texts = (int32_t) kne_get_count(&c->in, 4);
        p->texts = malloc((size_t) p->job.n_texts * sizeof *p->texts + 1);
        if (!p->texts)
            return kne_error(err, KNE_ERR_NOMEM, "out of memory");
        for (int32_t i = 0; i < p->job.n_texts; i++)
            p->texts[i] = kne_get_span(&c->in);
        p->job.text = p->texts;
    }
    if (!kne_get_done(&c->in) || n == 0)
        return kne_malformed(c, err);
    p->job.n_edits = (int32_t) n;
    p->job.edit = p->edit;
    return KNE_OK;
}

static bool
job_cancelled(void *ctx, int64_t edit_id)
{
    kne_call *c = ctx;

    return kne_queue_cancelled(c->engine->queue, c->request, edit_id);
}

static void
job_progress(void *ctx, int phase, int done, int total, float loss, int finished)
{
    static const char *const names[] = {"load", "attribute", "optimise", "check"};
    kne_call    *c = ctx;
    double       now = kne_now();
    kne_request *rq;
    kne_wbuf     w = {.grow = kne_wire_realloc};
    size_t       at;

    if (c->progress_at != 0 && now - c->progress_at < PROGRESS_SECONDS)
        return;
    c->progress_at = now;
    kne_serve_work(c, "%s: %s step %d of %d, %d edits finished",
                   c->request->type == KNE_MSG_LOCATE ? "locate" : "edit",
                   phase >= 0 && phase < 4 ? names[phase] : "?", done, total, finished);
    rq = kne_request_new(c->request->conn, 0, c->request->id);
    if (!rq)
        return; /* progress is a courtesy */
    rq->final = false;
    at = kne_frame_begin(&w, KNE_MSG_PROGRESS, c->request->id);
    kne_put_u32(&w, (uint32_t) phase);
    kne_put_u32(&w, (uint32_t) done);
    kne_put_u32(&w, (uint32_t) total);
    kne_put_f32(&w, loss);
    kne_put_u32(&w, (uint32_t) finished);
    kne_frame_end(&w, at);
    if (w.bad)
    {
        free(w.p);
        kne_request_free(rq);
        return;
    }
    kne_request_answer(rq, &w);
    kne_queue_send(c->engine->queue, rq);
}

/* Everything after the view. */
static kne_status
parse_job(kne_call *c, parsed *p, kne_err *err)
{
    kne_text options = kne_get_span(&c->in);
    uint32_t n = kne_get_count(&c->in, 4 + 4 + 8);

    p->known = malloc((size_t) n * sizeof *p->known + 1);
    if (!p->known)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < n; i++)
    {
        p->known[i].prompt = kne_get_span(&c->in);
        p->known[i].object = kne_get_span(&c->in);
        p->known[i].edit_id = kne_get_i64(&c->in);
    }
    p->job.n_known = (int32_t) n;
    p->job.known = p->known;
    if (!c->in.bad)
        KNE_TRY(kne_options_parse(&p->job.options, options.p, options.len, err));
    KNE_TRY(parse_edits(c, p, err));
    if (!c->loaded->ref_cache)
        KNE_TRY(kne_ref_cache_new(&c->loaded->ref_cache, err));
    p->job.model = c->loaded->model;
    p->job.backend = c->engine->backend;
    p->job.view = c->view;
    p->job.cache = c->loaded->ref_cache;
    p->job.calls = (kne_job_calls) {c, kne_serve_yield, job_cancelled, job_progress};
    return KNE_OK;
}

static void
put_ensemble(kne_wbuf *w, const kne_edit_outcome *o)
{
    kne_put_u32(w, (uint32_t) o->n_ensemble);
    for (int32_t i = 0; i < o->n_ensemble; i++)
    {
        const kne_ensemble_row *row = &o->ensemble[i];
        uint32_t                n = row->token_score ? (uint32_t) o->n_tokens : 0;

        kne_put_i32(w, row->layer);
        kne_put_i32(w, row->neuron);
        kne_put_f32(w, row->score);
        kne_put_u32(w, n);
        kne_put(w, row->token_score, (size_t) n * sizeof(float));
    }
}

static void
put_outcome(kne_wbuf *w, const kne_edit_outcome *o)
{
    static const uint8_t none[KNE_DIGEST_LEN];

    kne_put_i64(w, o->edit_id);
    kne_put_u8(w, (uint8_t) o->outcome);
    kne_put_text(w, o->message);
    kne_put_i32(w, o->steps);
    kne_put_f64(w, o->p_before);
    kne_put_f64(w, o->p_after);
    kne_put_f64(w, o->norm);
    kne_put_str(w, o->answer_before ? o->answer_before : "");
    put_ensemble(w, o);
    kne_put(w, o->delta ? o->delta->digest : none, KNE_DIGEST_LEN);
    if (o->delta)
        kne_delta_write(w, o->delta);
    else
        kne_put_u32(w, 0);
}

/* An EDIT that was cancelled whole before it began: every edit's outcome says so. */
static void
put_all_cancelled(kne_call *c, const kne_edit_job *job)
{
    kne_put_str(&c->out, "{}");
    kne_put_f64(&c->out, 0);
    kne_put_f64(&c->out, 0);
    kne_put_u32(&c->out, (uint32_t) job->n_edits);
    for (int32_t i = 0; i < job->n_edits; i++)
    {
        kne_edit_outcome o = {.edit_id = job->edit[i].edit_id, .outcome = KNE_OUTCOME_CANCELLED,
                              .message = "cancelled before it began"};

        put_outcome(&c->out, &o);
    }
    kne_put_u32(&c->out, 0);
}

kne_status
kne_handle_edit(kne_call *c, kne_err *err)
{
    parsed           p = {0};
    kne_edit_result *r = NULL;
    kne_status       st = parse_job(c, &p, err);

    if (st == KNE_OK && kne_queue_cancelled(c->engine->queue, c->request, 0))
    {
        put_all_cancelled(c, &p.job);
        free_parsed(&p);
        return KNE_OK;
    }
    if (st == KNE_OK)
        st = kne_edit_run(&p.job, &r, err);
    if (st == KNE_OK) /* what was computed on files that changed meanwhile must not be recorded */
        st = kne_store_recheck(c->engine->store, c->loaded, err);
    if (st == KNE_OK)
    {
        kne_put_str(&c->out, r->provenance ? r->provenance : "{}");
        kne_put_f64(&c->out, r->attribute_seconds);
        kne_put_f64(&c->out, r->optimise_seconds);
        kne_put_u32(&c->out, (uint32_t) r->n_edits);
        for (int32_t i = 0; i < r->n_edits; i++)
        {
            put_outcome(&c->out, &r->edit[i]);
            /* A reader will ask for it next. Without memory it will send it instead. */
            if (r->edit[i].delta)
                kne_store_put_delta(c->engine->store, r->edit[i].delta, NULL);
        }
        kne_put_u32(&c->out, (uint32_t) r->n_disturbed);
        kne_put(&c->out, r->disturbed, (size_t) r->n_disturbed * sizeof *r->disturbed);
        kne_queue_count(c->engine->queue, 0, (uint64_t) r->n_edits);
    }
    kne_edit_result_free(r);
    free_parsed(&p);
    return st;
}

kne_status
kne_handle_locate(kne_call *c, kne_err *err)
{
    parsed           p = {0};
    kne_edit_result *r = NULL;
    kne_status       st = parse_job(c, &p, err);

    if (st == KNE_OK && p.job.n_edits != 1)
        st = kne_malformed(c, err);
    if (st == KNE_OK && kne_queue_cancelled(c->engine->queue, c->request, 0))
        st = kne_error(err, KNE_ERR_CANCELLED, "cancelled before it began");
    if (st == KNE_OK)
        st = kne_locate_run(&p.job, &r, err);
    if (st == KNE_OK && r->edit[0].outcome == KNE_OUTCOME_CANCELLED)
        st = kne_error(err, KNE_ERR_CANCELLED, "%s", r->edit[0].message);
    else if (st == KNE_OK && r->edit[0].outcome == KNE_OUTCOME_FAILED)
        st = kne_error(err, KNE_ERR_INVALID, "%s", r->edit[0].message);
    if (st == KNE_OK)
        put_ensemble(&c->out, &r->edit[0]);
    kne_edit_result_free(r);
    free_parsed(&p);
    return st;
}
