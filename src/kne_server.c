/*
 * kne_server.c - sockets, connections, frames.
 *
 * Threads. The main thread runs the poll loop below: it accepts, reads frames,
 * answers HELLO, STATUS and CANCEL itself, pushes everything else to the queue
 * and writes answers. The compute thread (kne_serve.c) owns the backend, the
 * models and the caches. The backend's pool threads only run ops. Locks: one,
 * inside kne_queue.c; this file has none, its state is the main thread's.
 *
 * Invariant: no client can make another wait. Sockets never block; what a
 * client does not read piles up in its own queue, and one that has too much
 * outstanding is not read from until it has taken its answers. A frame's memory
 * is grown as its bytes arrive, never on the word of its header.
 */
#include "kne_server.h"

#include "kne_queue.h"
#include "kne_serve.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define HELLO_MAX         256         /* longest body before a connection is trusted */
#define HELLO_SECONDS     10.0        /* to say it */
#define CLOSING_SECONDS   2.0         /* to take a last ERROR */
#define MAX_PENDING       256         /* unanswered requests of one connection, */
#define MAX_PENDING_BYTES (64u << 20) /* and their bodies, before it is no longer read from */
#define PROGRESS_BACKLOG  65536       /* unread bytes above which a client gets no more PROGRESS */
#define MAX_WRITE         (4u << 20)  /* bytes to one connection before the others' turn */
#define STOP_SECONDS      0.2         /* grace of the compute thread at the end */

typedef struct conn
{
    uint64_t serial;      /* generation << 32 | index in the table */
    int      fd;
    bool     trusted;     /* HELLO was right */
    bool     closing;     /* only writes are left */
    double   deadline;    /* while not trusted, or closing */

    uint8_t  head[KNE_FRAME_HEADER];
    uint32_t head_have;
    uint8_t *body;        /* of the frame that is arriving */
    size_t   want, have, cap;
    bool     skip;        /* no memory for this body: its bytes are dropped */

    kne_request *out_first, *out_last; /* answers not yet written */
    size_t   out_bytes;
    int32_t  n_pending;   /* requests at the queue */
    size_t   pending_bytes;
} conn;

struct kne_server
{
    kne_server_config config;
    kne_queue        *queue;
    kne_engine       *engine;
    pthread_t         compute;
    bool              started;
    int               stop_fd; /* eventfd: kne_server_stop */
    double            since;
    double            accept_after; /* out of descriptors: not before this time */
    conn            **conn;    /* (n_conn) NULL: free */
    uint32_t          n_conn;
    uint32_t          generation;
    struct pollfd    *poll;    /* (n_conn + 3) */
    uint8_t           scratch[65536];
};

/* ---- connections ---- */

static void
conn_close(kne_server *s, conn *c)
{
    if (c->trusted)
        kne_queue_hang_up(s->queue, c->serial);
    s->conn[(uint32_t) c->serial] = NULL;
    close(c->fd);
    free(c->body);
    while (c->out_first)
    {
        kne_request *next = c->out_first->next;

        kne_request_free(c->out_first);
        c->out_first = next;
    }
    free(c);
}

static conn *
conn_find(const kne_server *s, uint64_t serial)
{
    uint32_t at = (uint32_t) serial;
    conn    *c = at < s->n_conn ? s->conn[at] : NULL;

    return c && c->serial == serial ? c : NULL;
}

/* A free place in the table; the table and the poll set grow together. */
static bool
find_place(kne_server *s, uint32_t *at)
{
    uint32_t n = s->n_conn ? 2 * s->n_conn : 16;

    for (*at = 0; *at < s->n_conn; ++*at)
        if (!s->conn[*at])
            return true;

    conn **grown = realloc(s->conn, n * sizeof *grown);
    if (!grown)
        return false;
    s->conn = grown;
    struct pollfd *p = realloc(s->poll, (n + 3) * sizeof *p);
    if (!p)
        return false;
    s->poll = p;
    memset(s->conn + s->n_conn, 0, (n - s->n_conn) * sizeof *s->conn);
    s->n_conn = n;
    return true;
}

static void
accept_all(kne_server *s)
{
    for (;;)
    {
        struct ucred peer = {.uid = (uid_t) -1};
        socklen_t    len = sizeof peer;
        int          fd = accept4(s->config.listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        uint32_t     at;
        conn        *c;

        if (fd < 0)
        {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            /* Out of descriptors or memory: the socket stays readable, so look away a moment. */
            if (errno != EAGAIN && errno != EWOULDBLOCK)
                s->accept_after = kne_now() + 0.1;
            return;
        }
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) != 0 || peer.uid != geteuid())
        {
            s->config.log("refused a client of another user");
            close(fd);
            continue;
        }
        if (!find_place(s, &at) || !(c = calloc(1, sizeof *c)))
        {
            close(fd);
            s->accept_after = kne_now() + 0.1;
            return;
        }
        c->serial = (uint64_t) ++s->generation << 32 | at;
        c->fd = fd;
        c->deadline = kne_now() + HELLO_SECONDS;
        s->conn[at] = c;
    }
}

/* ---- answers ---- */

/* Queue a finished frame; takes it over. */
static void
conn_send(conn *c, kne_request *rq)
{
    rq->next = NULL;
    if (c->out_last)
        c->out_last->next = rq;
    else
        c->out_first = rq;
    c->out_last = rq;
    c->out_bytes += rq->reply_len;
}

/* An ERROR from here; false: not even memory for that, the connection must go. */
static bool
conn_error(conn *c, uint32_t id, const kne_err *err)
{
    kne_request *rq = kne_request_new(c->serial, 0, id);

    if (!rq)
        return false;
    kne_request_error(rq, err);
    conn_send(c, rq);
    return true;
}

static bool
conn_answer(conn *c, uint32_t id, kne_wbuf *w)
{
    kne_request *rq = kne_request_new(c->serial, 0, id);

    if (!rq)
    {
        free(w->p);
        return false;
    }
    kne_request_answer(rq, w);
    conn_send(c, rq);
    return true;
}

/* The last word to a client that broke the framing or may not come in. */
static bool
conn_refuse(conn *c, uint32_t id, const kne_err *err)
{
    c->closing = true;
    c->deadline = kne_now() + CLOSING_SECONDS;
    return conn_error(c, id, err);
}

/* Write what the socket takes, bounded: a fast reader must not hold the loop. False: gone. */
static bool
conn_write(conn *c)
{
    size_t before = c->out_bytes;

    while (c->out_first && before - c->out_bytes < MAX_WRITE)
    {
        kne_request *rq = c->out_first;
        ssize_t      n = send(c->fd, rq->reply + rq->sent, rq->reply_len - rq->sent,
                              MSG_NOSIGNAL | MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK;
        rq->sent += (size_t) n;
        c->out_bytes -= (size_t) n;
        if (rq->sent < rq->reply_len)
            continue;
        c->out_first = rq->next;
        if (!c->out_first)
            c->out_last = NULL;
        kne_request_free(rq);
    }
    return true;
}

/* What the compute thread has finished, to the connections that still want it. */
static void
deliver(kne_server *s)
{
    kne_request *next;

    for (kne_request *rq = kne_queue_answers(s->queue); rq; rq = next)
    {
        conn *c = conn_find(s, rq->conn);

        next = rq->next;
        if (c && rq->final)
        {
            c->n_pending--;
            c->pending_bytes -= rq->len;
        }
        if (!c || c->closing || (!rq->final && c->out_bytes > PROGRESS_BACKLOG))
            kne_request_free(rq);
        else
            conn_send(c, rq);
    }
}

/* ---- requests answered here ---- */

static bool
same_secret(const uint8_t *a, const uint8_t *b)
{
    volatile uint8_t diff = 0; /* no early way out: the time tells nothing */

    for (int i = 0; i < KNE_SECRET_LEN; i++)
        diff |= a[i] ^ b[i];
    return diff == 0;
}

static bool
hello(kne_server *s, conn *c, uint32_t id, kne_rbuf *r)
{
    size_t      n;
    const char *secret = kne_get_bytes(r, &n);
    uint32_t    version = kne_get_u32(r);
    kne_wbuf    w = {.grow = kne_wire_realloc};
    kne_err     err;

    if (!kne_get_done(r) || n != KNE_SECRET_LEN ||
        !same_secret((const uint8_t *) secret, s->config.secret))
    {
        s->config.log("refused a client with a wrong secret");
        kne_error(&err, KNE_ERR_PROTOCOL, "the engine refused the connection");
        return conn_refuse(c, id, &err);
    }
    if (version != KNE_PROTOCOL_VERSION)
    {
        kne_error(&err, KNE_ERR_UNSUPPORTED, "the engine speaks protocol version %d, not %u",
                  KNE_PROTOCOL_VERSION, version);
        kne_error_hint(&err, "Restart the server, so that engine and extension come from the same "
                             "installation.");
        return conn_refuse(c, id, &err);
    }
    c->trusted = true;
    size_t at = kne_frame_begin(&w, KNE_MSG_OK, id);
    kne_put_u32(&w, KNE_PROTOCOL_VERSION);
    kne_put_str(&w, KNE_ENGINE_VERSION);
    kne_frame_end(&w, at);
    return conn_answer(c, id, &w);
}

/* Resident pages of this process that no file backs. */
static int64_t
private_bytes(void)
{
    long  size, resident, shared;
    FILE *f = fopen("/proc/self/statm", "re");
    int   n = f ? fscanf(f, "%ld %ld %ld", &size, &resident, &shared) : 0;

    if (f)
        fclose(f);
    return n == 3 ? (int64_t) (resident - shared) * sysconf(_SC_PAGESIZE) : 0;
}

static bool
status(kne_server *s, conn *c, uint32_t id)
{
    kne_wbuf     w = {.grow = kne_wire_realloc}, models = {.grow = kne_wire_realloc};
    kne_activity now;
    size_t       at = kne_frame_begin(&w, KNE_MSG_OK, id);

    kne_queue_activity(s->queue, &now, &models);
    kne_put_u64(&w, (uint64_t) getpid());
    kne_put_str(&w, s->config.backend->name);
    kne_put_str(&w, s->config.device_note);
    kne_put_i64(&w, private_bytes());
    kne_put_i64(&w, now.mapped_bytes);
    kne_put_f64(&w, kne_now() - s->since);
    kne_put_u32(&w, now.waiting);
    kne_put(&w, models.p, models.len);
    w.bad |= models.bad;
    kne_put_str(&w, now.work);
    kne_put_u64(&w, now.reads);
    kne_put_u64(&w, now.edits);
    kne_frame_end(&w, at);
    free(models.p);
    return conn_answer(c, id, &w);
}

static bool
cancel(kne_server *s, conn *c, uint32_t id, kne_rbuf *r)
{
    uint32_t which = kne_get_u32(r);
    int64_t  edit_id = kne_get_i64(r);
    kne_wbuf w = {.grow = kne_wire_realloc};
    kne_err  err;

    if (!kne_get_done(r))
        kne_error(&err, KNE_ERR_PROTOCOL, "malformed CANCEL");
    else if (kne_queue_cancel(s->queue, c->serial, which, edit_id, &err) == KNE_OK)
    {
        kne_frame_end(&w, kne_frame_begin(&w, KNE_MSG_OK, id));
        return conn_answer(c, id, &w);
    }
    return conn_error(c, id, &err);
}

/* ---- frames ---- */

/* A whole frame is there: c->head and c->body. False: close at once. */
static bool
frame(kne_server *s, conn *c)
{
    uint16_t type;
    uint32_t id;
    kne_rbuf r = {.p = c->body, .len = c->want};
    kne_err  err;
    bool     ok;

    memcpy(&type, c->head + 4, 2);
    memcpy(&id, c->head + 8, 4);
    if (!c->trusted && type != KNE_MSG_HELLO)
    {
        kne_error(&err, KNE_ERR_PROTOCOL, "the first message must be HELLO");
        return conn_refuse(c, id, &err);
    }
    switch (c->skip ? -1 : type)
    {
        case -1:
            kne_error(&err, KNE_ERR_NOMEM, "out of memory for a message of %zu bytes", c->want);
            return conn_error(c, id, &err);
        case KNE_MSG_HELLO:
            return hello(s, c, id, &r);
        case KNE_MSG_STATUS:
            if (c->want == 0)
                return status(s, c, id);
            kne_error(&err, KNE_ERR_PROTOCOL, "malformed STATUS");
            return conn_error(c, id, &err);
        case KNE_MSG_CANCEL:
            return cancel(s, c, id, &r);
        default:
            break;
    }

    kne_request *rq = kne_request_new(c->serial, type, id);
    if (!rq)
        return false;
    if (!kne_serve_classify(type, c->want, &rq->cls))
    {
        kne_error(&err, KNE_ERR_PROTOCOL, "unknown message type %u", type);
        ok = conn_error(c, id, &err);
        kne_request_free(rq);
        return ok;
    }
    rq->body = c->body;
    rq->len = c->want;
    c->body = NULL;
    c->cap = 0;
    c->n_pending++;
    c->pending_bytes += rq->len;
    kne_queue_push(s->queue, rq);
    return true;
}

/* The header is there. False: close at once. */
static bool
begin_frame(conn *c)
{
    uint32_t len, id;
    uint16_t type, zero;
    uint32_t max = c->trusted ? KNE_FRAME_MAX : HELLO_MAX;
    kne_err  err;

    memcpy(&len, c->head, 4);
    memcpy(&type, c->head + 4, 2);
    memcpy(&zero, c->head + 6, 2);
    memcpy(&id, c->head + 8, 4);
    c->want = len;
    c->have = 0;
    c->skip = false;
    if (zero == 0 && len <= max)
        return true;
    if (zero != 0)
        kne_error(&err, KNE_ERR_PROTOCOL, "not a message of this protocol");
    else if (!c->trusted)
        kne_error(&err, KNE_ERR_PROTOCOL, "the first message must be HELLO");
    else
        kne_error(&err, KNE_ERR_LIMIT, "a message of %u bytes is over the limit of %u", len, max);
    return conn_refuse(c, id, &err);
}

static void
reserve_body(conn *c, size_t more)
{
    size_t   need = c->have + more, cap = c->cap;
    uint8_t *p;

    if (c->skip || need <= cap)
        return;
    cap = cap < 512 ? 512 : cap;
    while (cap < need)
        cap *= 2;
    if (cap > c->want) /* the last growth: to what the header says, now mostly here */
        cap = c->want;
    p = realloc(c->body, cap);
    if (!p)
    {
        free(c->body);
        c->body = NULL;
        c->cap = 0;
        c->skip = true;
        return;
    }
    c->body = p;
    c->cap = cap;
}

/* n bytes arrived. False: close at once. */
static bool
feed(kne_server *s, conn *c, const uint8_t *p, size_t n)
{
    while (n && !c->closing)
    {
        size_t take;

        if (c->head_have < KNE_FRAME_HEADER)
        {
            take = KNE_FRAME_HEADER - c->head_have;
            take = take < n ? take : n;
            memcpy(c->head + c->head_have, p, take);
            c->head_have += (uint32_t) take;
            p += take;
            n -= take;
            if (c->head_have < KNE_FRAME_HEADER)
                return true;
            if (!begin_frame(c))
                return false;
            if (c->closing)
                return true;
        }
        take = c->want - c->have;
        take = take < n ? take : n;
        reserve_body(c, take);
        if (!c->skip && take)
            memcpy(c->body + c->have, p, take);
        c->have += take;
        p += take;
        n -= take;
        if (c->have == c->want)
        {
            bool ok = frame(s, c);

            /* A body that no request took is of no use for the next frame, which may be small. */
            free(c->body);
            c->body = NULL;
            c->cap = 0;
            c->head_have = 0;
            if (!ok)
                return false;
        }
    }
    return true;
}

static bool
conn_wants_input(const conn *c)
{
    return !c->closing && c->n_pending < MAX_PENDING && c->pending_bytes < MAX_PENDING_BYTES &&
           c->out_bytes < MAX_PENDING_BYTES;
}

/* Read a bounded amount, so that a client that floods takes turns. False: gone. */
static bool
conn_read(kne_server *s, conn *c)
{
    for (int turn = 0; turn < 16 && conn_wants_input(c); turn++)
    {
        ssize_t n = recv(c->fd, s->scratch, sizeof s->scratch, MSG_DONTWAIT);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK;
        if (n == 0 || !feed(s, c, s->scratch, (size_t) n))
            return false;
        if ((size_t) n < sizeof s->scratch)
            break;
    }
    return true;
}

/* ---- the loop ---- */

enum { POLL_STOP, POLL_QUEUE, POLL_LISTEN, POLL_CONN };

/* Fill the poll set; returns the milliseconds to wait, -1: for ever. */
static int
prepare(kne_server *s)
{
    double now = kne_now(), until = 0;
    bool   may_accept = now >= s->accept_after;

    s->poll[POLL_STOP] = (struct pollfd) {.fd = s->stop_fd, .events = POLLIN};
    s->poll[POLL_QUEUE] = (struct pollfd) {.fd = kne_queue_fd(s->queue), .events = POLLIN};
    s->poll[POLL_LISTEN] = (struct pollfd) {.fd = may_accept ? s->config.listen_fd : -1,
                                            .events = POLLIN};
    if (!may_accept)
        until = s->accept_after;
    for (uint32_t i = 0; i < s->n_conn; i++)
    {
        conn *c = s->conn[i];

        s->poll[POLL_CONN + i] = (struct pollfd) {.fd = -1};
        if (!c)
            continue;
        s->poll[POLL_CONN + i].fd = c->fd;
        s->poll[POLL_CONN + i].events = (short) ((conn_wants_input(c) ? POLLIN : 0) |
                                                 (c->out_first ? POLLOUT : 0));
        if ((!c->trusted || c->closing) && (until == 0 || c->deadline < until))
            until = c->deadline;
    }
    if (until == 0)
        return -1;
    return until <= now ? 0 : (int) ((until - now) * 1000) + 1;
}

static void
serve_conn(kne_server *s, conn *c, short events)
{
    bool alive = true;

    if (events & POLLIN)
        alive = conn_read(s, c);
    if (events & (POLLHUP | POLLERR | POLLNVAL))
        alive = false;
    /* Write whether or not POLLOUT was asked for: most answers fit at once. */
    if (alive && c->out_first)
        alive = conn_write(c);
    if (alive && c->closing && !c->out_first)
        alive = false;
    if (alive && (!c->trusted || c->closing) && kne_now() >= c->deadline)
        alive = false;
    if (!alive)
        conn_close(s, c);
}

kne_status
kne_server_run(kne_server *s, kne_err *err)
{
    for (;;)
    {
        int      wait_ms = prepare(s);
        uint32_t n = s->n_conn;

        if (poll(s->poll, POLL_CONN + n, wait_ms) < 0)
        {
            if (errno == EINTR)
                continue;
            return kne_error(err, KNE_ERR_IO, "poll failed: %s", strerror(errno));
        }
        if (s->poll[POLL_STOP].revents)
        {
            if (s->engine->lost.code == KNE_OK)
                return KNE_OK;
            *err = s->engine->lost;
            return err->code;
        }
        if (s->poll[POLL_LISTEN].revents & (POLLERR | POLLNVAL))
            return kne_error(err, KNE_ERR_IO, "the listening socket failed");
        if (s->poll[POLL_QUEUE].revents)
            deliver(s);
        for (uint32_t i = 0; i < n; i++)
            if (s->conn[i])
                serve_conn(s, s->conn[i], s->poll[POLL_CONN + i].revents);
        if (s->poll[POLL_LISTEN].revents)
            accept_all(s); /* last: the poll set may move */
    }
}

void
kne_server_stop(kne_server *s)
{
    uint64_t one = 1;
    int      saved = errno;

    if (write(s->stop_fd, &one, sizeof one) < 0)
    {
        /* the counter is full: it is readable, which is all that is wanted */
    }
    errno = saved;
}

/* ---- beginning and end ---- */

static void *
compute_main(void *arg)
{
    kne_server *s = arg;

    pthread_setname_np(pthread_self(), "kne-compute");
    kne_serve_run(s->engine);
    if (s->engine->lost.code != KNE_OK)
        kne_server_stop(s);
    kne_queue_ended(s->queue);
    return NULL;
}

static kne_status
start_compute(kne_server *s, kne_err *err)
{
    sigset_t block, old;
    int      rc;

    /* Signals are the main thread's; but a fault of this thread's own must reach its handler. */
    sigfillset(&block);
    sigdelset(&block, SIGBUS);
    sigdelset(&block, SIGSEGV);
    sigdelset(&block, SIGILL);
    sigdelset(&block, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &block, &old);
    rc = pthread_create(&s->compute, NULL, compute_main, s);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return kne_error(err, KNE_ERR_IO, "could not start a thread: %s", strerror(rc));
    s->started = true;
    return KNE_OK;
}

kne_status
kne_server_new(const kne_server_config *config, kne_server **out, kne_err *err)
{
    kne_server *s = calloc(1, sizeof *s);
    uint32_t    place;
    kne_status  st;

    if (!s)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    s->config = *config;
    s->since = kne_now();
    s->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (s->stop_fd < 0 || fcntl(config->listen_fd, F_SETFL, O_NONBLOCK) != 0)
        st = kne_error(err, KNE_ERR_IO, "could not set up the socket: %s", strerror(errno));
    else if (!find_place(s, &place))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
    else
        st = kne_queue_new(&s->queue, err);
    if (st == KNE_OK)
        st = kne_engine_new(s->queue, config->backend, config->cache_bytes, &s->engine, err);
    if (st == KNE_OK)
        st = start_compute(s, err);
    if (st != KNE_OK)
    {
        kne_server_free(s); /* nothing runs that could keep it */
        return st; /* NOLINT(clang-analyzer-unix.Malloc) */
    }
    *out = s;
    return KNE_OK;
}

bool
kne_server_free(kne_server *s)
{
    if (s->started)
    {
        kne_queue_stop(s->queue);
        if (!kne_queue_wait_ended(s->queue, STOP_SECONDS))
            return false;
        pthread_join(s->compute, NULL);
    }
    for (uint32_t i = 0; i < s->n_conn; i++)
        if (s->conn[i])
            conn_close(s, s->conn[i]);
    kne_engine_free(s->engine);
    kne_queue_free(s->queue);
    if (s->stop_fd >= 0)
        close(s->stop_fd);
    close(s->config.listen_fd);
    free(s->conn);
    free(s->poll);
    free(s);
    return true;
}
