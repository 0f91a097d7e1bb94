/*
 * client.c - one process's connection to the engine.
 *
 * Every backend and worker that calls the engine keeps one connection, made on first use: a Unix socket in the data
 * directory, opened with the secret that shared memory holds. There is one request on it at a time, so
 * the next frame is this request's PROGRESS or its answer, or the answer to a cancel that was sent meanwhile.
 *
 * Invariant: a connection whose next frame is not known for sure is closed. An error or a cancel while an
 * answer is awaited therefore closes it (and the engine stops the work, for a client that hangs up cancels all
 * it asked for); an ERROR frame is an answer like any other and leaves it open.
 *
 * The engine is a cache, so its death costs a reader nothing but the wait for the next one: what it asked is asked again,
 * once.
 *
 * The socket never blocks: every wait is on latch and socket together, so that an interrupt is answered at once.
 */
#include "postgres.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "access/xact.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "../src/kne_base.h"
#include "kne_proc.h"

#define ENGINE_WAIT_MS 10000 /* for an engine that is not there yet */
#define HELLO_WAIT_MS 60000  /* for one that is, but still looks for its device */

static pgsocket sock = PGINVALID_SOCKET;
static uint32   last_id = 0;
static int      cancels = 0; /* sent, and not answered yet */
static uint32   current = 0; /* the request in hand; 0: none */

static char     version_text[32] = ""; /* of the engine that answered HELLO last */
static TimestampTz answer_by = 0; /* 0: whenever it comes */
static int         patience = 0;  /* ms for one call; 0: no limit */

static KneIdle idle = NULL;
static void   *idle_arg = NULL;
static bool    in_idle = false;

static void
drop_connection(void)
{
    if (sock == PGINVALID_SOCKET)
        return;
    close(sock);
    ReleaseExternalFD();
    sock = PGINVALID_SOCKET;
    cancels = 0;
    current = 0;
    answer_by = 0;
}

int
kne_sqlstate(uint32 status)
{
    switch ((kne_status) status)
    {
        case KNE_ERR_INVALID:
            return ERRCODE_INVALID_PARAMETER_VALUE;
        case KNE_ERR_FORMAT:
            return ERRCODE_INVALID_BINARY_REPRESENTATION;
        case KNE_ERR_UNSUPPORTED:
            return ERRCODE_FEATURE_NOT_SUPPORTED;
        case KNE_ERR_IO:
            return ERRCODE_IO_ERROR;
        case KNE_ERR_NOMEM:
            return ERRCODE_OUT_OF_MEMORY;
        case KNE_ERR_LIMIT:
            return ERRCODE_PROGRAM_LIMIT_EXCEEDED;
        case KNE_ERR_CANCELLED:
            return ERRCODE_QUERY_CANCELED;
        case KNE_ERR_NOT_REACHED:
            return MAKE_SQLSTATE('K', 'N', '0', '0', '1');
        case KNE_ERR_PROTOCOL:
            return ERRCODE_PROTOCOL_VIOLATION;
        case KNE_ERR_DEVICE:
            return ERRCODE_SYSTEM_ERROR;
        case KNE_OK:
        case KNE_ERR_INTERNAL:
            break;
    }
    return ERRCODE_INTERNAL_ERROR;
}

/* ---- bodies ---- */

static void *
grow(void *p, size_t cap)
{
    return repalloc_huge(p, cap);
}

void
kne_wbuf_init(kne_wbuf *w)
{
    w->cap = 1024;
    w->p = palloc(w->cap);
    w->len = 0;
    w->grow = grow;
    w->bad = false;
}

char *
kne_safe_text(char *s)
{
    char *c;

    if (!pg_verifymbstr(s, strlen(s), true))
        for (c = s; *c; c++)
            if (IS_HIGHBIT_SET(*c))
                *c = '?';
    return s;
}

/* What the engine says is UTF-8; a message about an error must not fail for that. */
static char *
lossy_text(kne_rbuf *r)
{
    size_t      n;
    const char *s = kne_get_bytes(r, &n);
    char       *text = pnstrdup(s, n);
    char       *c;

    if (GetDatabaseEncoding() != PG_UTF8 || !pg_verify_mbstr(PG_UTF8, s, n, true))
        for (c = text; *c; c++)
            if (IS_HIGHBIT_SET(*c))
                *c = '?';
    return text;
}

void
kne_get_text(kne_rbuf *r, StringInfo out)
{
    size_t      n;
    const char *s = kne_get_bytes(r, &n);
    char       *converted;

    if (r->bad)
        ereport(ERROR,
                (errcode(ERRCODE_PROTOCOL_VIOLATION),
                 errmsg("the kne engine sent a malformed text")));
    if (n == 0)
        return;
    converted = pg_any_to_server(s, n, PG_UTF8);
    if (converted == s)
        appendBinaryStringInfo(out, s, n);
    else
        appendStringInfoString(out, converted);
}

void
kne_reply_done(const KneReply *reply)
{
    if (!kne_get_done(&reply->body))
        ereport(ERROR,
                (errcode(ERRCODE_PROTOCOL_VIOLATION),
                 errmsg("the kne engine sent a malformed answer"),
                 errhint("Do kne.so and kne-engine come from the same release? Restart the server after an upgrade.")));
}

/* ---- frames ---- */

static void
engine_died(void)
{
    ereport(ERROR,
            (errcode(ERRCODE_CONNECTION_FAILURE),
             errmsg("the kne engine died during the call"),
             errdetail("The server is not affected; the engine is started again."),
             errhint("The server's log says why it died. Try again.")));
}

void
kne_call_idle(KneIdle f, void *arg)
{
    idle = f;
    idle_arg = arg;
}

/* After each wait, with what it returned. */
static void
woken(int rc)
{
    if (rc & WL_LATCH_SET)
        ResetLatch(MyLatch);
    CHECK_FOR_INTERRUPTS();
    if (answer_by != 0 && GetCurrentTimestamp() > answer_by)
        ereport(ERROR,
                (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                 errmsg("the kne engine does not answer"),
                 errhint("kne_status() and the server's log say more.")));
    if (idle && !in_idle && (rc & (WL_LATCH_SET | WL_TIMEOUT)))
    {
        in_idle = true;
        PG_TRY();
        {
            idle(idle_arg);
        }
        PG_FINALLY();
        {
            in_idle = false;
        }
        PG_END_TRY();
    }
}

/* Wait for the socket, a latch, or a while. */
static void
wait_for(uint32 event)
{
    woken(WaitLatchOrSocket(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH | event, sock,
                            idle || answer_by != 0 ? KNE_IDLE_MS : 10000, PG_WAIT_EXTENSION));
}

/* False: the other end is gone. */
static bool
send_all(const void *data, size_t n, int flags)
{
    const char *p = data;

    while (n > 0)
    {
        ssize_t done = send(sock, p, n, MSG_NOSIGNAL | MSG_DONTWAIT | flags);

        if (done > 0)
        {
            p += done;
            n -= done;
            CHECK_FOR_INTERRUPTS();
        }
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            wait_for(WL_SOCKET_WRITEABLE);
        else if (errno != EINTR)
            return false;
    }
    return true;
}

static bool
send_frame(uint16 type, uint32 id, const kne_wbuf *body)
{
    uint8  header[KNE_FRAME_HEADER] = {0};
    uint32 length = body ? body->len : 0;

    memcpy(header, &length, 4);
    memcpy(header + 4, &type, 2);
    memcpy(header + 8, &id, 4);
    return send_all(header, sizeof header, length > 0 ? MSG_MORE : 0) &&
        (length == 0 || send_all(body->p, length, 0));
}

/* False: the other end is gone. */
static bool
receive_all(void *data, size_t n)
{
    char *p = data;

    while (n > 0)
    {
        ssize_t done = recv(sock, p, n, MSG_DONTWAIT);

        if (done > 0)
        {
            p += done;
            n -= done;
            CHECK_FOR_INTERRUPTS();
        }
        else if (done < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            wait_for(WL_SOCKET_READABLE);
        else if (done == 0 || errno != EINTR)
            return false;
    }
    return true;
}

static bool
receive_frame(uint16 *type, uint32 *id, KneReply *reply)
{
    uint8  header[KNE_FRAME_HEADER];
    uint32 length;
    void  *body;

    if (!receive_all(header, sizeof header))
        return false;
    memcpy(&length, header, 4);
    memcpy(type, header + 4, 2);
    memcpy(id, header + 8, 4);
    if (length > KNE_FRAME_MAX)
        ereport(ERROR,
                (errcode(ERRCODE_PROTOCOL_VIOLATION),
                 errmsg("the kne engine sent a message of %u bytes", length)));
    body = palloc_extended(Max(length, 1), MCXT_ALLOC_HUGE);
    if (!receive_all(body, length))
        return false;
    reply->type = *type;
    reply->body.p = body;
    reply->body.len = length;
    reply->body.at = 0;
    reply->body.bad = false;
    return true;
}

static void
throw_error(KneReply *reply)
{
    uint32 status = kne_get_u32(&reply->body);
    char  *message = lossy_text(&reply->body);
    char  *detail = lossy_text(&reply->body);
    char  *hint = lossy_text(&reply->body);

    kne_reply_done(reply);
    ereport(ERROR,
            (errcode(kne_sqlstate(status)),
             errmsg_internal("%s", message),
             detail[0] ? errdetail_internal("%s", detail) : 0,
             hint[0] ? errhint("%s", hint) : 0));
}

/* ---- the connection ---- */

int
kne_engine_connect(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int                fd;

    StaticAssertStmt(sizeof(KNE_SOCKET) <= sizeof(address.sun_path), "socket name is too long");
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    strlcpy(address.sun_path, KNE_SOCKET, sizeof(address.sun_path));
    if (connect(fd, (struct sockaddr *) &address, sizeof(address)) != 0)
    {
        int save_errno = errno;

        close(fd);
        errno = save_errno;
        return -1;
    }
    return fd;
}

void
kne_put_hello(kne_wbuf *w, uint32 id)
{
    size_t at = kne_frame_begin(w, KNE_MSG_HELLO, id);

    kne_put_bytes(w, kne_shared->secret, KNE_SECRET_LEN);
    kne_put_u32(w, KNE_PROTOCOL_VERSION);
    kne_frame_end(w, at);
}

bool
kne_engine_up(void)
{
    KneEngineState state;

    LWLockAcquire(&kne_shared->lock, LW_SHARED);
    state = kne_shared->engine_state;
    LWLockRelease(&kne_shared->lock);
    return state == KNE_ENGINE_RUNNING || state == KNE_ENGINE_STARTING;
}

static void
engine_absent(KneEngineState state, const char *note)
{
    ereport(ERROR,
            (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
             state == KNE_ENGINE_REFUSED
             ? errmsg("the kne engine does not start as it is configured")
             : errmsg("the kne engine is not running"),
             note[0] ? errdetail_internal("%s", note) : 0,
             state == KNE_ENGINE_REFUSED
             ? errhint("Change kne.device and reload the configuration.")
             : errhint("kne_status() and the server's log say more.")));
}

const char *
kne_engine_version(void)
{
    return version_text;
}

/* HELLO and its answer. False: the engine went away meanwhile. */
static bool
say_hello(void)
{
    kne_wbuf w;
    KneReply reply;
    uint16   type;
    uint32   id, version;

    answer_by = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), patience > 0 ? patience : HELLO_WAIT_MS);
    kne_wbuf_init(&w);
    kne_put_hello(&w, ++last_id);
    if (!send_all(w.p, w.len, 0) || !receive_frame(&type, &id, &reply))
        return false;
    answer_by = 0;
    pfree(w.p);
    if (type == KNE_MSG_ERROR)
        throw_error(&reply);
    version = kne_get_u32(&reply.body);
    if (type != KNE_MSG_OK || id != last_id || reply.body.bad || version != KNE_PROTOCOL_VERSION)
        ereport(ERROR,
                (errcode(ERRCODE_PROTOCOL_VIOLATION),
                 errmsg("the kne engine speaks another protocol version"),
                 errdetail("It speaks version %u, kne.so version %d.", version, KNE_PROTOCOL_VERSION),
                 errhint("Install kne.so and kne-engine of the same release and restart the server.")));
    strlcpy(version_text, lossy_text(&reply.body), sizeof(version_text));
    return true;
}

static void
connect_to_engine(void)
{
    TimestampTz    start = GetCurrentTimestamp();
    KneEngineState state;
    char           note[sizeof(kne_shared->engine_note)];

    for (;;)
    {
        LWLockAcquire(&kne_shared->lock, LW_SHARED);
        state = kne_shared->engine_state;
        strlcpy(note, kne_shared->engine_note, sizeof(note));
        LWLockRelease(&kne_shared->lock);
        kne_safe_text(note);

        if (state == KNE_ENGINE_REFUSED)
            engine_absent(state, note);
        if (state == KNE_ENGINE_RUNNING || state == KNE_ENGINE_STARTING)
        {
            if (!AcquireExternalFD())
                ereport(ERROR,
                        (errcode(ERRCODE_INSUFFICIENT_RESOURCES),
                         errmsg("no file descriptor is left for the kne engine's socket")));
            sock = kne_engine_connect();
            if (sock < 0)
            {
                sock = PGINVALID_SOCKET;
                ReleaseExternalFD();
            }
            else if (say_hello())
                return;
            else
                drop_connection();
        }
        if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), patience > 0 ? patience : ENGINE_WAIT_MS))
            engine_absent(state, note);
        woken(WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 50, PG_WAIT_EXTENSION));
    }
}

/* The engine restarted since the last call: the connection has come to its end. */
static bool
connection_is_dead(void)
{
    char    c;
    ssize_t n = recv(sock, &c, 1, MSG_PEEK | MSG_DONTWAIT);

    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

/* What can be asked again of the next engine, as if nothing had been: it changes nothing, and is no long work of the worker. */
static bool
is_repeatable(uint16 type)
{
    return (type >= KNE_MSG_COMPLETE && type <= KNE_MSG_DETOKENIZE) || type == KNE_MSG_LOCATE ||
        type == KNE_MSG_SET_PUT || type == KNE_MSG_DELTA_PUT;
}

/* One request and its answer. False: the engine died meanwhile. */
static bool
exchange(uint16 type, const kne_wbuf *body, KneProgress progress, void *arg, KneReply *reply)
{
    uint16 got;
    uint32 id, mine;
    bool   reused = false;

    if (sock != PGINVALID_SOCKET && connection_is_dead())
        drop_connection();
    if (sock == PGINVALID_SOCKET)
        connect_to_engine();
    else
        reused = true;

    mine = ++last_id;
    if (!send_frame(type, mine, body))
    {
        if (!reused)
            return false;
        drop_connection();
        connect_to_engine();
        mine = ++last_id;
        if (!send_frame(type, mine, body))
            return false;
    }
    current = is_repeatable(type) ? 0 : mine; /* not what merely supplies an edit: a cancel waits for the edit itself */
    if (patience > 0)
        answer_by = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), patience);
    for (;;)
    {
        if (!receive_frame(&got, &id, reply))
            return false;
        if (id == mine && got == KNE_MSG_PROGRESS)
        {
            if (progress)
                progress(arg, &reply->body);
            pfree(unconstify(uint8_t *, reply->body.p));
        }
        else if (id == mine)
            break;
        else if (cancels > 0 && (got == KNE_MSG_OK || got == KNE_MSG_ERROR))
        {
            cancels--;
            pfree(unconstify(uint8_t *, reply->body.p));
        }
        else
            ereport(ERROR,
                    (errcode(ERRCODE_PROTOCOL_VIOLATION),
                     errmsg("the kne engine answered a request that was not asked")));
    }
    current = 0;
    answer_by = 0;
    if (got != KNE_MSG_OK && got != KNE_MSG_ERROR && got != KNE_MSG_NEED_SET && got != KNE_MSG_NEED_DELTAS)
        ereport(ERROR,
                (errcode(ERRCODE_PROTOCOL_VIOLATION),
                 errmsg("the kne engine sent an answer of unknown type %d", got)));
    return true;
}

void
kne_call(uint16 type, const kne_wbuf *body, KneProgress progress, void *arg, KneReply *reply)
{
    bool done = false;

    kne_require_preload();
    if (body && body->bad)
        ereport(ERROR,
                (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
                 errmsg("a message to the kne engine would be over %u bytes", KNE_FRAME_MAX)));
    PG_TRY();
    {
        done = exchange(type, body, progress, arg, reply);
        if (!done && is_repeatable(type))
        {
            /* Once: what has killed two engines may be this very request. */
            drop_connection();
            done = exchange(type, body, progress, arg, reply);
        }
        if (!done)
            engine_died();
    }
    PG_CATCH();
    {
        drop_connection();
        PG_RE_THROW();
    }
    PG_END_TRY();
    if (reply->type == KNE_MSG_ERROR)
        throw_error(reply);
}

void
kne_call_patience(int ms)
{
    patience = ms;
}

bool
kne_call_cancel(int64 edit_id)
{
    kne_wbuf w;

    Assert(in_idle);
    if (current == 0)
        return false; /* nothing that can be cancelled was sent, or not all of it */
    kne_wbuf_init(&w);
    kne_put_u32(&w, current);
    kne_put_i64(&w, edit_id);
    if (!send_frame(KNE_MSG_CANCEL, ++last_id, &w))
        engine_died();
    cancels++;
    pfree(w.p);
    return true;
}
