/*
 * kne_serve.h - the compute thread: takes requests from the queue and answers
 * them, one at a time, serving the shorter ones between the passes of a longer one.
 *
 * Everything here but kne_serve_classify belongs to the compute thread: the
 * backend, the caches, and every model, view and delta in them.
 */
#ifndef KNE_SERVE_H
#define KNE_SERVE_H

#include "kne_backend.h"
#include "kne_edit.h"
#include "kne_queue.h"
#include "kne_store.h"

typedef struct kne_engine
{
    kne_queue   *queue;
    kne_backend *backend;
    kne_store   *store;
    int          depth; /* requests at work: 0 to 3 */
    kne_err      lost;  /* code KNE_OK: no; else the device failed for good, and so does the engine */
} kne_engine;

kne_status kne_engine_new(kne_queue *queue, kne_backend *be, size_t cache_bytes, kne_engine **out,
                          kne_err *err);
void       kne_engine_free(kne_engine *e); /* NULL is fine */
void       kne_serve_run(kne_engine *e);   /* until the queue is stopped, or the device is lost */

/* The class of a request, by type and size; false: no such type here. Any thread. */
bool kne_serve_classify(uint16_t type, size_t len, kne_class *cls);

/* ---- between kne_serve.c and the handlers (kne_requests.c, kne_requests_edit.c) ---- */

/* One request at work. */
typedef struct kne_call
{
    kne_engine  *engine;
    kne_request *request;
    kne_rbuf     in;    /* at what follows the view */
    kne_wbuf     out;   /* the answer; its frame is begun */
    size_t       at;    /* where */
    uint16_t     answer; /* its type: KNE_MSG_OK unless the handler says otherwise */
    kne_loaded  *loaded; /* pinned while the call lasts; NULL where the request names no view */
    kne_view    *view;
    uint8_t      set[KNE_DIGEST_LEN];
    double       progress_at; /* when the last PROGRESS went */
} kne_call;

/* KNE_OK: c->out holds the answer. Else err is the answer. */
typedef kne_status (*kne_handler)(kne_call *c, kne_err *err);

/* What the dispatcher does before the handler. */
typedef enum kne_needs
{
    KNE_NEEDS_NOTHING,
    KNE_NEEDS_MODEL, /* read a view, open the model */
    KNE_NEEDS_VIEW   /* and have its set, else NEED_SET */
} kne_needs;

typedef struct kne_request_kind
{
    uint16_t    type;
    const char *name;
    kne_class   cls;
    kne_needs   needs;
    kne_handler handle;
} kne_request_kind;

const kne_request_kind *kne_request_kind_of(uint16_t type); /* NULL: unknown */

/* Serve others (ctx is the kne_call); non-zero: stop, nobody waits for this one any more. */
int kne_serve_yield(void *ctx);
/* Text of what is going on, shown by STATUS; only the outermost call is. */
void kne_serve_work(kne_call *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* KNE_ERR_PROTOCOL, naming the request */
kne_status kne_malformed(const kne_call *c, kne_err *err);

/* kne_requests.c, for the others: a text that points into the frame; a prompt's tokens, at least one and no more than the context
 * holds; the text that `more` adds to the prompt's, into the answer. */
kne_text   kne_get_span(kne_rbuf *r);
kne_status kne_encode_prompt(const kne_call *c, kne_text prompt, kne_ids *ids, kne_err *err);
kne_status kne_put_continuation(kne_call *c, const kne_ids *prompt, const kne_ids *more, kne_err *err);

/* kne_requests_score.c */
kne_status kne_handle_score(kne_call *c, kne_err *err);
kne_status kne_handle_generate(kne_call *c, kne_err *err);
kne_status kne_handle_texts(kne_call *c, kne_err *err);

/* kne_requests_edit.c */
kne_status kne_handle_edit(kne_call *c, kne_err *err);
kne_status kne_handle_locate(kne_call *c, kne_err *err);
/* kne_requests_export.c */
kne_status kne_handle_export(kne_call *c, kne_err *err);

#endif
