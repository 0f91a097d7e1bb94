/*
 * kne_client.h - a small blocking client of the engine, and starting one, for
 * tests and benchmarks. Not hardened: it trusts the engine to keep the protocol,
 * and gives up on a frame after CLIENT_SECONDS.
 */
#ifndef KNE_CLIENT_H
#define KNE_CLIENT_H

#include "kne_base.h"
#include "kne_protocol.h"
#include "kne_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CLIENT_SECONDS 300

/* ---- frames ---- */

typedef struct answer
{
    uint16_t type;   /* 0: no frame (closed, or too late) */
    uint32_t id;
    uint8_t *body;
    kne_rbuf r;      /* over the body */
    uint32_t status; /* of an ERROR */
    char     msg[512], hint[512];
} answer;

static inline void *
client_realloc(void *p, size_t cap)
{
    return realloc(p, cap);
}

static inline void
answer_free(answer *a)
{
    free(a->body);
    *a = (answer) {0};
}

static inline int
client_connect(const char *path)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    struct timeval     tv = {.tv_sec = CLIENT_SECONDS};
    int                fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strncpy(at.sun_path, path, sizeof at.sun_path - 1);
    if (connect(fd, (struct sockaddr *) &at, sizeof at) != 0)
    {
        close(fd);
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    return fd;
}

static inline bool
client_send_raw(int fd, const void *p, size_t n)
{
    for (size_t at = 0; at < n;)
    {
        ssize_t k = send(fd, (const char *) p + at, n - at, MSG_NOSIGNAL);

        if (k <= 0)
            return false;
        at += (size_t) k;
    }
    return true;
}

/* Send body as a frame; the buffer stays the caller's. */
static inline bool
client_send(int fd, uint16_t type, uint32_t id, const kne_wbuf *body)
{
    uint8_t  head[KNE_FRAME_HEADER] = {0};
    uint32_t len = body ? (uint32_t) body->len : 0;

    memcpy(head, &len, 4);
    memcpy(head + 4, &type, 2);
    memcpy(head + 8, &id, 4);
    return client_send_raw(fd, head, sizeof head) && (!len || client_send_raw(fd, body->p, len));
}

static inline bool
client_recv_raw(int fd, void *p, size_t n)
{
    for (size_t at = 0; at < n;)
    {
        ssize_t k = recv(fd, (char *) p + at, n - at, 0);

        if (k <= 0)
            return false;
        at += (size_t) k;
    }
    return true;
}

static inline answer
client_recv(int fd)
{
    answer   a = {0};
    uint8_t  head[KNE_FRAME_HEADER];
    uint32_t len;

    if (!client_recv_raw(fd, head, sizeof head))
        return a;
    memcpy(&len, head, 4);
    a.body = malloc((size_t) len + 1);
    if (!client_recv_raw(fd, a.body, len))
        return a;
    memcpy(&a.type, head + 4, 2);
    memcpy(&a.id, head + 8, 4);
    a.r = (kne_rbuf) {.p = a.body, .len = len};
    if (a.type == KNE_MSG_ERROR)
    {
        kne_rbuf    r = a.r;
        size_t      n;
        const char *s;

        a.status = kne_get_u32(&r);
        s = kne_get_bytes(&r, &n);
        snprintf(a.msg, sizeof a.msg, "%.*s", (int) n, s);
        kne_get_bytes(&r, &n);
        s = kne_get_bytes(&r, &n);
        snprintf(a.hint, sizeof a.hint, "%.*s", (int) n, s);
    }
    return a;
}

/* Send, and wait for the final answer; PROGRESS is counted, answers to others dropped. Frees body's
 * memory. */
static inline answer
client_call_counting(int fd, uint16_t type, uint32_t id, kne_wbuf *body, int *n_progress)
{
    answer a = {0};

    client_send(fd, type, id, body);
    if (body)
    {
        free(body->p);
        *body = (kne_wbuf) {.grow = client_realloc};
    }
    for (;;)
    {
        a = client_recv(fd);
        if (a.type == 0 || (a.type != KNE_MSG_PROGRESS && a.id == id))
            return a;
        if (n_progress && a.type == KNE_MSG_PROGRESS)
            ++*n_progress;
        answer_free(&a);
    }
}

static inline answer
client_call(int fd, uint16_t type, kne_wbuf *body)
{
    static uint32_t id = 1000;

    return client_call_counting(fd, type, ++id, body, NULL);
}

static inline answer
client_hello(int fd, const uint8_t *secret, uint32_t version)
{
    kne_wbuf w = {.grow = client_realloc};

    kne_put_bytes(&w, secret, KNE_SECRET_LEN);
    kne_put_u32(&w, version);
    return client_call(fd, KNE_MSG_HELLO, &w);
}

/* ---- an engine of one's own ---- */

typedef struct engine
{
    pid_t   pid;
    char    dir[64], socket[96];
    uint8_t secret[KNE_SECRET_LEN];
    const char *program;
} engine;

/* Connect and say hello; -1: no. */
static inline int
engine_client(const engine *e)
{
    int    fd = client_connect(e->socket);
    answer a;

    if (fd < 0)
        return -1;
    a = client_hello(fd, e->secret, KNE_PROTOCOL_VERSION);
    if (a.type != KNE_MSG_OK)
    {
        close(fd);
        fd = -1;
    }
    answer_free(&a);
    return fd;
}

/* A folder with a secret, no process yet. */
static inline void
engine_prepare(engine *e, const char *program)
{
    char  file[128];
    FILE *f;

    *e = (engine) {.program = program};
    strcpy(e->dir, "/tmp/kne-test-XXXXXX");
    if (!mkdtemp(e->dir))
        exit(99);
    snprintf(e->socket, sizeof e->socket, "%s/s", e->dir);
    snprintf(file, sizeof file, "%s/secret", e->dir);
    for (int i = 0; i < KNE_SECRET_LEN; i++)
        e->secret[i] = (uint8_t) (37 * i + getpid());
    f = fopen(file, "w");
    fwrite(e->secret, 1, KNE_SECRET_LEN, f);
    fclose(f);
}

/* In the child: become the engine. extra: NULL-terminated. */
static inline void
engine_exec(const engine *e, const char *const *extra)
{
    char        file[128];
    const char *argv[32] = {e->program, "--socket", e->socket, "--secret-file", file};
    int         n = 5;

    snprintf(file, sizeof file, "%s/secret", e->dir);
    while (extra && *extra && n < 31)
        argv[n++] = *extra++;
    execv(e->program, (char *const *) argv);
    _exit(127);
}

static inline bool
engine_wait_ready(const engine *e)
{
    for (int i = 0; i < 6000; i++)
    {
        int fd = engine_client(e);

        if (fd >= 0)
        {
            close(fd);
            return true;
        }
        nanosleep(&(struct timespec) {.tv_nsec = 20000000}, NULL);
    }
    return false;
}

static inline bool
engine_start(engine *e, const char *program, const char *const *extra)
{
    engine_prepare(e, program);
    fflush(stdout);
    e->pid = fork();
    if (e->pid == 0)
        engine_exec(e, extra);
    return engine_wait_ready(e);
}

/* Exit code, or 1000 + signal; -1: still running after `seconds`. */
static inline int
engine_wait_exit(pid_t pid, double seconds)
{
    int status;

    for (double t = 0; t <= seconds; t += 0.01)
    {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
        nanosleep(&(struct timespec) {.tv_nsec = 10000000}, NULL);
    }
    return -1;
}

static inline void
engine_remove_files(const engine *e)
{
    char file[128];

    snprintf(file, sizeof file, "%s/secret", e->dir);
    unlink(file);
    unlink(e->socket);
    rmdir(e->dir);
}

static inline int
engine_stop(engine *e)
{
    int rc;

    kill(e->pid, SIGTERM);
    rc = engine_wait_exit(e->pid, 60);
    if (rc == -1)
    {
        kill(e->pid, SIGKILL);
        waitpid(e->pid, NULL, 0);
    }
    engine_remove_files(e);
    return rc;
}

#endif
