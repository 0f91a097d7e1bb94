/*
 * kne_queue.h - where the engine's two threads meet: requests go one way,
 * answers the other, and nothing else is shared.
 *
 * The main thread reads frames and pushes requests; the compute thread takes
 * them, in order within what it asks for, and finishes each exactly once. One
 * mutex guards everything here and is held for a few instructions only, never
 * across a system call that can block. A request belongs to whoever took it
 * last: main until pushed, the queue, compute until finished, main again.
 */
#ifndef KNE_QUEUE_H
#define KNE_QUEUE_H

#include "kne_protocol.h"
#include "kne_wire.h"
#include "kne_base.h"

/*
 * How long a request may keep the compute thread. While one of a class runs,
 * only those of lower classes are served between its passes, so calls nest at
 * most three deep: an edit, a long read, a short one.
 */
typedef enum kne_class
{
    KNE_CLASS_SHORT, /* one pass or less */
    KNE_CLASS_LONG,  /* a completion, or many rows */
    KNE_CLASS_EDIT,
    KNE_CLASSES
} kne_class;

/* Room for an ERROR frame, kept with each request so that "out of memory" can always be said. */
#define KNE_ERROR_FRAME 1664

/* A request on its way in, and its answer on its way out. */
typedef struct kne_request
{
    struct kne_request *next;
    uint64_t  conn;  /* the connection, by a number that never comes back */
    uint64_t  seq;   /* order of arrival */
    uint32_t  id;    /* the client's */
    uint16_t  type;
    kne_class cls;
    uint8_t  *body;  /* malloc'ed; freed with the request, or earlier */
    size_t    len;

    /* Under the queue's lock. */
    bool      gone;      /* the client hung up */
    bool      cancelled; /* the whole request */
    int32_t   n_cancel;
    int64_t  *cancel_id; /* single edits of it */

    /* The answer: a whole frame. */
    uint8_t  *reply;     /* malloc'ed, or `spare` */
    size_t    reply_len, sent;
    bool      final;     /* false: PROGRESS, the request itself is still at work */
    uint8_t   spare[KNE_ERROR_FRAME];
} kne_request;

kne_request *kne_request_new(uint64_t conn, uint16_t type, uint32_t id); /* NULL: out of memory */
void         kne_request_free(kne_request *rq);
/* Make the frame in w the answer; takes its memory. One that did not fit becomes an ERROR. */
void         kne_request_answer(kne_request *rq, kne_wbuf *w);
void         kne_request_error(kne_request *rq, const kne_err *err); /* cannot fail */
/* A message of at most 511 bytes as UTF-8, whatever it quotes. */
void         kne_put_text(kne_wbuf *w, const char *s);
void        *kne_wire_realloc(void *p, size_t cap);                  /* kne_wire_grow */

typedef struct kne_queue kne_queue;

kne_status kne_queue_new(kne_queue **out, kne_err *err);
void       kne_queue_free(kne_queue *q);

/* ---- main thread ---- */
int          kne_queue_fd(const kne_queue *q); /* readable: answers wait */
void         kne_queue_push(kne_queue *q, kne_request *rq);
kne_request *kne_queue_answers(kne_queue *q);  /* all that wait, oldest first, linked by next */
/* edit_id 0: the whole request. One that has not begun is answered soon, out of turn. */
kne_status kne_queue_cancel(kne_queue *q, uint64_t conn, uint32_t id, int64_t edit_id,
                            kne_err *err);
void         kne_queue_hang_up(kne_queue *q, uint64_t conn);
void         kne_queue_stop(kne_queue *q); /* compute's next look says so */
bool         kne_queue_wait_ended(kne_queue *q, double seconds); /* has the compute thread ended */

/* ---- compute thread ---- */
typedef enum kne_wake { KNE_WAKE_WORK, KNE_WAKE_TIMEOUT, KNE_WAKE_STOP } kne_wake;

kne_wake     kne_queue_wait(kne_queue *q, double seconds);
int          kne_queue_waiting(kne_queue *q, kne_class from, kne_class to); /* from <= class < to */
kne_request *kne_queue_take(kne_queue *q, kne_class from, kne_class to);    /* NULL: none */
void         kne_queue_finish(kne_queue *q, kne_request *rq);               /* its answer is set */
void         kne_queue_send(kne_queue *q, kne_request *progress);           /* an extra frame */
bool         kne_queue_dropped(kne_queue *q, const kne_request *rq);        /* nobody waits */
/* edit_id 0: the whole request */
bool         kne_queue_cancelled(kne_queue *q, const kne_request *rq, int64_t edit_id);
void         kne_queue_ended(kne_queue *q);

/* ---- what STATUS shows of the compute thread; it writes, main reads ---- */
typedef struct kne_activity
{
    char     work[160];
    uint32_t waiting;
    uint64_t reads, edits; /* served */
    int64_t  mapped_bytes;
} kne_activity;

void kne_queue_set_work(kne_queue *q, const char *text);
void kne_queue_count(kne_queue *q, uint64_t reads, uint64_t edits); /* adds */
/* models: the list as STATUS sends it (its count and items); taken over. */
void kne_queue_set_models(kne_queue *q, kne_wbuf *models, int64_t mapped_bytes);
void kne_queue_activity(kne_queue *q, kne_activity *out, kne_wbuf *models); /* appends the list */

#endif
