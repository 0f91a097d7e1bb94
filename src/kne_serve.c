/*
 * kne_serve.c - the compute thread's loop: which request is next, and who is
 * served between the passes of a long one (see kne_queue.h on classes).
 *
 * Nobody starves: the loop serves the reads that wait, then one edit, and an
 * edit between two steps (as a completion between two tokens) serves no more
 * than those that waited when it looked.
 */
#include "kne_serve.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define LONG_BODY     4096   /* a request with a larger body is more than one short pass */
#define TIDY_SECONDS  60.0

kne_status
kne_engine_new(kne_queue *queue, kne_backend *be, size_t cache_bytes, kne_engine **out,
               kne_err *err)
{
    kne_engine *e = calloc(1, sizeof *e);
    kne_status  st;

    if (!e)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    e->queue = queue;
    e->backend = be;
    st = kne_store_new(be, cache_bytes, &e->store, err);
    if (st != KNE_OK)
    {
        free(e);
        return st;
    }
    *out = e;
    return KNE_OK;
}

void
kne_engine_free(kne_engine *e)
{
    if (!e)
        return;
    kne_store_free(e->store);
    free(e);
}

bool
kne_serve_classify(uint16_t type, size_t len, kne_class *cls)
{
    const kne_request_kind *kind = kne_request_kind_of(type);

    if (!kind)
        return false;
    *cls = kind->cls;
    if (kind->cls == KNE_CLASS_SHORT && len > LONG_BODY &&
        (type == KNE_MSG_KNOWS || type == KNE_MSG_LOGPROB))
        *cls = KNE_CLASS_LONG;
    return true;
}

kne_status
kne_malformed(const kne_call *c, kne_err *err)
{
    return kne_error(err, KNE_ERR_PROTOCOL, "malformed %s",
                     kne_request_kind_of(c->request->type)->name);
}

void
kne_serve_work(kne_call *c, const char *fmt, ...)
{
    char    text[160];
    va_list ap;

    if (c->engine->depth != 1)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    kne_queue_set_work(c->engine->queue, text);
}

/* str path, str fingerprint, digest set; then the model, and the set where it is needed. */
static kne_status
resolve_view(kne_call *c, kne_needs needs, kne_err *err)
{
    size_t      n_path, n_fp;
    const char *path_at = kne_get_bytes(&c->in, &n_path), *fp_at = kne_get_bytes(&c->in, &n_fp);
    const void *set = kne_get(&c->in, KNE_DIGEST_LEN);
    char       *path, fingerprint[65];
    kne_status  st;

    if (c->in.bad || n_path == 0 || memchr(path_at, 0, n_path) || n_fp != sizeof fingerprint - 1 ||
        memchr(fp_at, 0, n_fp))
        return kne_malformed(c, err);
    memcpy(c->set, set, KNE_DIGEST_LEN);
    memcpy(fingerprint, fp_at, n_fp);
    fingerprint[n_fp] = '\0';
    path = strndup(path_at, n_path);
    if (!path)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    st = kne_store_open(c->engine->store, path, fingerprint, &c->loaded, err);
    free(path);
    if (st == KNE_OK && needs == KNE_NEEDS_VIEW)
    {
        st = kne_store_view(c->engine->store, c->loaded, c->set, &c->view, err);
        if (st == KNE_OK && !c->view)
            c->answer = KNE_MSG_NEED_SET;
    }
    return st;
}

static void
serve(kne_engine *e, kne_request *rq)
{
    const kne_request_kind *kind = kne_request_kind_of(rq->type);
    kne_call                c = {.engine = e, .request = rq, .answer = KNE_MSG_OK};
    kne_err                 err;
    kne_status              st = KNE_OK;
    bool                    read = kind->cls != KNE_CLASS_EDIT;

    e->depth++;
    c.in = (kne_rbuf) {.p = rq->body, .len = rq->len};
    c.out.grow = kne_wire_realloc;
    c.at = kne_frame_begin(&c.out, KNE_MSG_OK, rq->id);
    kne_serve_work(&c, "%s", kind->name);

    if (read && kne_queue_cancelled(e->queue, rq, 0))
        st = kne_error(&err, KNE_ERR_CANCELLED, "cancelled before it began");
    if (st == KNE_OK && kind->needs != KNE_NEEDS_NOTHING)
        st = resolve_view(&c, kind->needs, &err);
    if (st == KNE_OK && c.answer == KNE_MSG_OK)
        st = kind->handle(&c, &err);
    if (st == KNE_ERR_DEVICE)
    {
        /* no answer: the client sees the engine die, which is no fault of its request */
        e->lost = err;
        free(c.out.p);
        kne_store_unpin(e->store, c.loaded, c.view);
        e->depth--;
        return;
    }
    if (st == KNE_OK)
    {
        if (c.answer != KNE_MSG_OK && !c.out.bad)
            memcpy(c.out.p + c.at + 4, &c.answer, 2);
        kne_frame_end(&c.out, c.at);
        kne_request_answer(rq, &c.out);
    }
    else
    {
        free(c.out.p);
        kne_request_error(rq, &err);
    }
    kne_store_unpin(e->store, c.loaded, c.view);

    if (read)
        kne_queue_count(e->queue, 1, 0);
    if (kne_store_changed(e->store))
    {
        kne_wbuf models = {.grow = kne_wire_realloc};
        int64_t  mapped = kne_store_list(e->store, &models);

        kne_queue_set_models(e->queue, &models, mapped);
    }
    e->depth--;
    if (e->depth == 0)
        kne_queue_set_work(e->queue, "idle");
    /* Last, so that a client that has its answer sees in STATUS what came of it. */
    kne_queue_finish(e->queue, rq);
}

/* Serve what waits in [0, to) now, not what comes meanwhile. */
static void
serve_waiting(kne_engine *e, kne_class to)
{
    kne_request *rq;

    for (int n = kne_queue_waiting(e->queue, 0, to);
         n > 0 && (rq = kne_queue_take(e->queue, 0, to)); n--)
        serve(e, rq);
}

int
kne_serve_yield(void *ctx)
{
    kne_call *c = ctx;
    bool      edit = c->request->cls == KNE_CLASS_EDIT;

    serve_waiting(c->engine, c->request->cls);
    /* A cancelled edit is an outcome, which the method comes to; a cancelled read just ends. */
    return kne_queue_dropped(c->engine->queue, c->request) ||
           (!edit && kne_queue_cancelled(c->engine->queue, c->request, 0));
}

void
kne_serve_run(kne_engine *e)
{
    for (;;)
    {
        kne_wake     why = kne_queue_wait(e->queue, TIDY_SECONDS);
        kne_request *rq;

        if (why == KNE_WAKE_STOP)
            return;
        if (why == KNE_WAKE_TIMEOUT)
        {
            kne_store_tidy(e->store);
            continue;
        }
        serve_waiting(e, KNE_CLASS_EDIT);
        if (e->lost.code == KNE_OK && (rq = kne_queue_take(e->queue, KNE_CLASS_EDIT, KNE_CLASSES)))
            serve(e, rq);
        if (e->lost.code != KNE_OK)
            return;
    }
}
