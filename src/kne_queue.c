/*
 * kne_queue.c - requests one way, answers the other (see kne_queue.h).
 */
#include "kne_queue.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_CANCELS 65536 /* single edits cancelled in one request: more than a batch holds */

typedef struct list
{
    kne_request *first, *last;
    int          n;
} list;

struct kne_queue
{
    pthread_mutex_t lock;
    pthread_cond_t  wake;  /* the compute thread waits here */
    pthread_cond_t  ended_cond;
    int             fd;    /* eventfd: the main thread polls it */
    bool            stopping, ended;
    uint64_t        seq;
    list            waiting[KNE_CLASSES];
    kne_request    *active; /* taken, not finished; linked by next */
    list            answers;
    kne_activity    activity;
    kne_wbuf        models;
};

/* ---- requests ---- */

void *
kne_wire_realloc(void *p, size_t cap)
{
    return realloc(p, cap);
}

static void *
no_growth(void *p, size_t cap)
{
    (void) p;
    (void) cap;
    return NULL;
}

kne_request *
kne_request_new(uint64_t conn, uint16_t type, uint32_t id)
{
    kne_request *rq = malloc(sizeof *rq);

    if (!rq)
        return NULL;
    memset(rq, 0, offsetof(kne_request, spare));
    rq->conn = conn;
    rq->type = type;
    rq->id = id;
    rq->final = true;
    return rq;
}

void
kne_request_free(kne_request *rq)
{
    if (!rq)
        return;
    free(rq->body);
    free(rq->cancel_id);
    if (rq->reply != rq->spare)
        free(rq->reply);
    free(rq);
}

/*
 * Messages quote names and text from files and clients, and may have been cut
 * in the middle of a character: what is not UTF-8 goes out as '?', because the
 * server would choke on it.
 */
void
kne_put_text(kne_wbuf *w, const char *s)
{
    uint8_t out[512];
    size_t  n = 0, len = strnlen(s, sizeof out);

    for (size_t i = 0; i < len;)
    {
        uint8_t  c = (uint8_t) s[i];
        size_t   more = c < 0x80 ? 0 : c >= 0xc2 && c < 0xe0 ? 1 : (c & 0xf0) == 0xe0 ? 2
                        : c >= 0xf0 && c < 0xf5 ? 3 : SIZE_MAX;
        uint32_t cp = more == 0 ? c : more == 1 ? c & 0x1f : more == 2 ? c & 0x0f : c & 0x07;
        bool     good = more != SIZE_MAX && more < len - i;

        for (size_t k = 1; good && k <= more; k++)
        {
            good = ((uint8_t) s[i + k] & 0xc0) == 0x80;
            cp = cp << 6 | ((uint8_t) s[i + k] & 0x3f);
        }
        if (good && ((more == 2 && (cp < 0x800 || (cp >= 0xd800 && cp < 0xe000))) ||
                     (more == 3 && (cp < 0x10000 || cp > 0x10ffff))))
            good = false;
        if (good)
            for (size_t k = 0; k <= more; k++)
                out[n++] = (uint8_t) s[i++];
        else
        {
            out[n++] = '?';
            i++;
        }
    }
    kne_put_bytes(w, out, n);
}

void
kne_request_error(kne_request *rq, const kne_err *err)
{
    kne_wbuf w = {.p = rq->spare, .cap = sizeof rq->spare, .grow = no_growth};
    size_t   at = kne_frame_begin(&w, KNE_MSG_ERROR, rq->id);

    if (rq->reply != rq->spare)
        free(rq->reply);
    kne_put_u32(&w, err->code);
    kne_put_text(&w, err->msg);
    kne_put_text(&w, err->detail);
    kne_put_text(&w, err->hint);
    kne_frame_end(&w, at);
    rq->reply = rq->spare;
    rq->reply_len = w.len;
}

void
kne_request_answer(kne_request *rq, kne_wbuf *w)
{
    kne_err err;

    if (!w->bad)
    {
        if (rq->reply != rq->spare)
            free(rq->reply);
        rq->reply = w->p;
        rq->reply_len = w->len;
    }
    else
    {
        free(w->p);
        if (w->len > KNE_FRAME_MAX / 4)
            kne_error(&err, KNE_ERR_LIMIT, "the answer does not fit into one message");
        else
            kne_error(&err, KNE_ERR_NOMEM, "out of memory for the answer");
        kne_request_error(rq, &err);
    }
    *w = (kne_wbuf) {0};
}

/* ---- lists; the caller holds the lock ---- */

static void
append(list *l, kne_request *rq)
{
    rq->next = NULL;
    if (l->last)
        l->last->next = rq;
    else
        l->first = rq;
    l->last = rq;
    l->n++;
}

static kne_request *
take_first(list *l)
{
    kne_request *rq = l->first;

    if (rq)
    {
        l->first = rq->next;
        if (!l->first)
            l->last = NULL;
        l->n--;
        rq->next = NULL;
    }
    return rq;
}

/* ---- the queue ---- */

kne_status
kne_queue_new(kne_queue **out, kne_err *err)
{
    pthread_condattr_t attr;
    kne_queue         *q = calloc(1, sizeof *q);

    if (!q)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    q->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (q->fd < 0)
    {
        free(q);
        return kne_error(err, KNE_ERR_IO, "could not make an eventfd: %s", strerror(errno));
    }
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->wake, &attr);
    pthread_cond_init(&q->ended_cond, &attr);
    pthread_condattr_destroy(&attr);
    strcpy(q->activity.work, "idle");
    *out = q;
    return KNE_OK;
}

void
kne_queue_free(kne_queue *q)
{
    kne_request *rq;

    if (!q)
        return;
    for (int c = 0; c < KNE_CLASSES; c++)
        while ((rq = take_first(&q->waiting[c])))
            kne_request_free(rq);
    while ((rq = take_first(&q->answers)))
        kne_request_free(rq);
    free(q->models.p);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->wake);
    pthread_cond_destroy(&q->ended_cond);
    close(q->fd);
    free(q);
}

int
kne_queue_fd(const kne_queue *q)
{
    return q->fd;
}

void
kne_queue_push(kne_queue *q, kne_request *rq)
{
    pthread_mutex_lock(&q->lock);
    rq->seq = q->seq++;
    append(&q->waiting[rq->cls], rq);
    pthread_cond_signal(&q->wake);
    pthread_mutex_unlock(&q->lock);
}

kne_request *
kne_queue_answers(kne_queue *q)
{
    kne_request *first;
    uint64_t     n;

    /* Reset the eventfd before looking: an answer that comes after the look sets it again. */
    while (read(q->fd, &n, sizeof n) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&q->lock);
    first = q->answers.first;
    q->answers = (list) {0};
    pthread_mutex_unlock(&q->lock);
    return first;
}

static void
raise_fd(kne_queue *q)
{
    uint64_t one = 1;

    /* The only other failure is a full counter, and then the fd is readable already. */
    while (write(q->fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static kne_status
cancel_one(kne_request *rq, int64_t edit_id, kne_err *err)
{
    int64_t *grown;

    if (edit_id == 0)
    {
        rq->cancelled = true;
        return KNE_OK;
    }
    for (int32_t i = 0; i < rq->n_cancel; i++)
        if (rq->cancel_id[i] == edit_id)
            return KNE_OK;
    if (rq->n_cancel == MAX_CANCELS)
        return kne_error(err, KNE_ERR_LIMIT, "too many edits cancelled in one request");
    grown = realloc(rq->cancel_id, (size_t) (rq->n_cancel + 1) * sizeof *grown);
    if (!grown)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    rq->cancel_id = grown;
    rq->cancel_id[rq->n_cancel++] = edit_id;
    return KNE_OK;
}

kne_status
kne_queue_cancel(kne_queue *q, uint64_t conn, uint32_t id, int64_t edit_id, kne_err *err)
{
    kne_status st = KNE_OK;

    pthread_mutex_lock(&q->lock);
    for (kne_request *rq = q->active; rq && st == KNE_OK; rq = rq->next)
        if (rq->conn == conn && rq->id == id)
            st = cancel_one(rq, edit_id, err);
    for (int c = 0; c < KNE_CLASSES; c++)
    {
        list keep = {0};

        for (kne_request *rq; (rq = take_first(&q->waiting[c]));)
        {
            if (st == KNE_OK && rq->conn == conn && rq->id == id)
                st = cancel_one(rq, edit_id, err);
            /* Nothing is left to do but to say so: it need not wait for the edits before it. */
            if (rq->cancelled && c != KNE_CLASS_SHORT)
            {
                rq->cls = KNE_CLASS_SHORT;
                append(&q->waiting[KNE_CLASS_SHORT], rq);
            }
            else
                append(&keep, rq);
        }
        q->waiting[c] = keep;
    }
    pthread_mutex_unlock(&q->lock);
    return st;
}

void
kne_queue_hang_up(kne_queue *q, uint64_t conn)
{
    list dead = {0};

    pthread_mutex_lock(&q->lock);
    for (kne_request *rq = q->active; rq; rq = rq->next)
        if (rq->conn == conn)
            rq->gone = true;
    for (int c = 0; c < KNE_CLASSES; c++)
    {
        list keep = {0};

        for (kne_request *rq; (rq = take_first(&q->waiting[c]));)
            append(rq->conn == conn ? &dead : &keep, rq);
        q->waiting[c] = keep;
    }
    pthread_mutex_unlock(&q->lock);
    for (kne_request *rq; (rq = take_first(&dead));)
        kne_request_free(rq);
}

void
kne_queue_stop(kne_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->stopping = true;
    pthread_cond_signal(&q->wake);
    pthread_mutex_unlock(&q->lock);
}

static struct timespec
deadline(double seconds)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    ts.tv_sec += (time_t) seconds;
    ts.tv_nsec += (long) (1e9 * (seconds - (double) (time_t) seconds));
    if (ts.tv_nsec >= 1000000000)
    {
        ts.tv_sec++;
        ts.tv_nsec -= 1000000000;
    }
    return ts;
}

bool
kne_queue_wait_ended(kne_queue *q, double seconds)
{
    struct timespec until = deadline(seconds);
    bool            ended;

    pthread_mutex_lock(&q->lock);
    while (!q->ended && pthread_cond_timedwait(&q->ended_cond, &q->lock, &until) == 0)
        ;
    ended = q->ended;
    pthread_mutex_unlock(&q->lock);
    return ended;
}

kne_wake
kne_queue_wait(kne_queue *q, double seconds)
{
    struct timespec until = deadline(seconds);
    kne_wake        why = KNE_WAKE_WORK;
    int             rc = 0;

    pthread_mutex_lock(&q->lock);
    for (;;)
    {
        int n = 0;

        for (int c = 0; c < KNE_CLASSES; c++)
            n += q->waiting[c].n;
        if (q->stopping)
            why = KNE_WAKE_STOP;
        else if (n == 0 && rc != 0)
            why = KNE_WAKE_TIMEOUT;
        else if (n == 0)
        {
            rc = pthread_cond_timedwait(&q->wake, &q->lock, &until);
            continue;
        }
        break;
    }
    pthread_mutex_unlock(&q->lock);
    return why;
}

int
kne_queue_waiting(kne_queue *q, kne_class from, kne_class to)
{
    int n = 0;

    pthread_mutex_lock(&q->lock);
    for (kne_class c = from; c < to; c++)
        n += q->waiting[c].n;
    pthread_mutex_unlock(&q->lock);
    return n;
}

kne_request *
kne_queue_take(kne_queue *q, kne_class from, kne_class to)
{
    kne_request *rq = NULL;
    list        *oldest = NULL;

    pthread_mutex_lock(&q->lock);
    for (kne_class c = from; c < to; c++)
        if (q->waiting[c].first && (!oldest || q->waiting[c].first->seq < oldest->first->seq))
            oldest = &q->waiting[c];
    if (oldest && !q->stopping)
    {
        rq = take_first(oldest);
        rq->next = q->active;
        q->active = rq;
    }
    pthread_mutex_unlock(&q->lock);
    return rq;
}

void
kne_queue_finish(kne_queue *q, kne_request *rq)
{
    bool gone;

    free(rq->body); /* may be large, and the answer may wait for a slow client */
    rq->body = NULL;
    pthread_mutex_lock(&q->lock);
    for (kne_request **at = &q->active; *at; at = &(*at)->next)
        if (*at == rq)
        {
            *at = rq->next;
            break;
        }
    gone = rq->gone;
    if (!gone)
        append(&q->answers, rq);
    pthread_mutex_unlock(&q->lock);
    if (gone)
        kne_request_free(rq);
    else
        raise_fd(q);
}

void
kne_queue_send(kne_queue *q, kne_request *progress)
{
    pthread_mutex_lock(&q->lock);
    append(&q->answers, progress);
    pthread_mutex_unlock(&q->lock);
    raise_fd(q);
}

bool
kne_queue_dropped(kne_queue *q, const kne_request *rq)
{
    bool dropped;

    pthread_mutex_lock(&q->lock);
    dropped = rq->gone || q->stopping;
    pthread_mutex_unlock(&q->lock);
    return dropped;
}

bool
kne_queue_cancelled(kne_queue *q, const kne_request *rq, int64_t edit_id)
{
    bool yes;

    pthread_mutex_lock(&q->lock);
    yes = rq->cancelled;
    for (int32_t i = 0; !yes && edit_id != 0 && i < rq->n_cancel; i++)
        yes = rq->cancel_id[i] == edit_id;
    pthread_mutex_unlock(&q->lock);
    return yes;
}

void
kne_queue_ended(kne_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->ended = true;
    pthread_cond_signal(&q->ended_cond);
    pthread_mutex_unlock(&q->lock);
}

/* ---- for STATUS ---- */

void
kne_queue_set_work(kne_queue *q, const char *text)
{
    pthread_mutex_lock(&q->lock);
    snprintf(q->activity.work, sizeof q->activity.work, "%s", text);
    pthread_mutex_unlock(&q->lock);
}

void
kne_queue_count(kne_queue *q, uint64_t reads, uint64_t edits)
{
    pthread_mutex_lock(&q->lock);
    q->activity.reads += reads;
    q->activity.edits += edits;
    pthread_mutex_unlock(&q->lock);
}

void
kne_queue_set_models(kne_queue *q, kne_wbuf *models, int64_t mapped_bytes)
{
    kne_wbuf old = *models;

    if (!models->bad) /* out of memory: the list before stays */
    {
        pthread_mutex_lock(&q->lock);
        old = q->models;
        q->models = *models;
        q->activity.mapped_bytes = mapped_bytes;
        pthread_mutex_unlock(&q->lock);
    }
    free(old.p);
    *models = (kne_wbuf) {0};
}

void
kne_queue_activity(kne_queue *q, kne_activity *out, kne_wbuf *models)
{
    pthread_mutex_lock(&q->lock);
    *out = q->activity;
    out->waiting = 0;
    for (int c = 0; c < KNE_CLASSES; c++)
        out->waiting += (uint32_t) q->waiting[c].n;
    if (q->models.len)
        kne_put(models, q->models.p, q->models.len);
    else
        kne_put_u32(models, 0);
    pthread_mutex_unlock(&q->lock);
}
