/*
 * kne_main.c - the program kne-engine: options, signals, start and end.
 *
 * The launcher binds the socket, writes the secret into a pipe, and starts
 *     kne-engine --listen-fd N --secret-fd M [--threads T] [--device D] [--memory MB]
 * Tests and benchmarks start it with --socket PATH --secret-file F instead. It
 * ends at once on SIGTERM and when its parent dies. This is the only file that
 * may end the process or write to stderr; exit codes are enum kne_exit.
 */
#include "kne_confine.h"
#include "kne_device.h"
#include "kne_server.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SAY "kne-engine: "

typedef struct options
{
    int         listen_fd, secret_fd, threads;
    const char *device, *socket, *secret_file;
    size_t      cache_bytes;
} options;

static kne_server *server; /* for the signal handlers */

static void __attribute__((format(printf, 1, 2)))
say(const char *fmt, ...)
{
    char    line[1024];
    int     n = snprintf(line, sizeof line, SAY);
    va_list ap;

    va_start(ap, fmt);
    n += vsnprintf(line + n, sizeof line - (size_t) n - 1, fmt, ap);
    va_end(ap);
    n = n < (int) sizeof line - 1 ? n : (int) sizeof line - 2;
    line[n++] = '\n';
    /* one write, one line, whoever else writes there */
    if (write(STDERR_FILENO, line, (size_t) n) < 0)
        return;
}

static void
log_line(const char *line)
{
    say("%s", line);
}

static int __attribute__((format(printf, 2, 3)))
fail(int code, const char *fmt, ...)
{
    char    text[900];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    say("%s", text);
    return code;
}

static int
fail_err(int code, const kne_err *err)
{
    return fail(code, "%s%s%s%s%s", err->msg, err->detail[0] ? ". " : "", err->detail,
                err->hint[0] ? " " : "", err->hint);
}

/* ---- options ---- */

static bool
number(const char *text, long min, long max, long *out)
{
    char *end;

    errno = 0;
    *out = strtol(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && *out >= min && *out <= max;
}

/* KNE_EXIT_OK: go on. -1: all done. */
static int
read_options(int argc, char **argv, options *o)
{
    enum { LISTEN_FD = 256, SECRET_FD, THREADS, DEVICE, MEMORY, SOCKET, SECRET_FILE, VERSION,
           HELP };
    static const struct option names[] = {
        {"listen-fd", required_argument, NULL, LISTEN_FD},
        {"secret-fd", required_argument, NULL, SECRET_FD},
        {"threads", required_argument, NULL, THREADS},
        {"device", required_argument, NULL, DEVICE},
        {"memory", required_argument, NULL, MEMORY},
        {"socket", required_argument, NULL, SOCKET},
        {"secret-file", required_argument, NULL, SECRET_FILE},
        {"version", no_argument, NULL, VERSION},
        {"help", no_argument, NULL, HELP},
        {0},
    };
    static const char usage[] =
        "usage: kne-engine (--listen-fd N --secret-fd M | --socket PATH --secret-file FILE)\n"
        "                  [--threads T] [--device auto|cpu|cuda|cuda:N] [--memory MB]\n"
        "It is started by the PostgreSQL extension kne; see the extension's documentation.\n";
    long n;

    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;)
    {
        bool ok = true;

        switch (c)
        {
            case LISTEN_FD:
                ok = number(optarg, 0, 1 << 20, &n);
                o->listen_fd = (int) n;
                break;
            case SECRET_FD:
                ok = number(optarg, 0, 1 << 20, &n);
                o->secret_fd = (int) n;
                break;
            case THREADS:
                ok = number(optarg, 0, 1024, &n);
                o->threads = (int) n;
                break;
            case MEMORY:
                ok = number(optarg, 1, 1 << 30, &n);
                o->cache_bytes = (size_t) n << 20;
                break;
            case DEVICE:
                o->device = optarg;
                break;
            case SOCKET:
                o->socket = optarg;
                break;
            case SECRET_FILE:
                o->secret_file = optarg;
                break;
            case VERSION:
                puts("kne-engine " KNE_ENGINE_VERSION);
                return -1;
            case HELP:
                fputs(usage, stdout);
                return -1;
            default:
                return fail(KNE_EXIT_USAGE, "unknown option or missing argument: \"%s\"",
                            argv[optind - 1]);
        }
        if (!ok)
            return fail(KNE_EXIT_USAGE, "\"%s\" is not a number in range", optarg);
    }
    if (optind < argc)
        return fail(KNE_EXIT_USAGE, "unexpected argument \"%s\"", argv[optind]);
    if (o->socket ? o->listen_fd >= 0 || o->secret_fd >= 0 || !o->secret_file
                  : o->listen_fd < 0 || o->secret_fd < 0 || o->secret_file)
    {
        fputs(usage, stderr);
        return KNE_EXIT_USAGE;
    }
    return KNE_EXIT_OK;
}

/* ---- socket and secret ---- */

/* 32 bytes and no more; the descriptor is closed. */
static bool
read_secret(int fd, uint8_t secret[KNE_SECRET_LEN])
{
    size_t have = 0;

    while (have < KNE_SECRET_LEN)
    {
        ssize_t n = read(fd, secret + have, KNE_SECRET_LEN - have);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        have += (size_t) n;
    }
    close(fd);
    return have == KNE_SECRET_LEN;
}

/* A socket of our own, readable by this user alone. */
static int
make_socket(const char *path)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int                fd;

    if (strlen(path) >= sizeof at.sun_path)
    {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(at.sun_path, path, strlen(path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    unlink(path);
    mode_t old = umask(0177);
    int    rc = bind(fd, (struct sockaddr *) &at, sizeof at);
    umask(old);
    if (rc != 0 || listen(fd, 128) != 0)
    {
        int saved = errno;

        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

/* ---- process ---- */

static void
on_terminate(int sig)
{
    if (server)
        kne_server_stop(server);
    else
        _exit(KNE_EXIT_OK);
}

/* A page of a mapped file is gone: no number can be trusted, the next start begins afresh. */
static void
on_bus_error(int sig)
{
    static const char line[] =
        SAY "a model file was truncated or became unreadable while in use (SIGBUS), stopping\n";

    if (write(STDERR_FILENO, line, sizeof line - 1) < 0)
        _exit(KNE_EXIT_FILE_LOST);
    _exit(KNE_EXIT_FILE_LOST);
}

static void
set_signal(int sig, void (*handler)(int))
{
    struct sigaction sa = {.sa_handler = handler, .sa_flags = SA_RESTART};

    sigemptyset(&sa.sa_mask);
    sigaction(sig, &sa, NULL);
}

static void
set_signals(void)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    set_signal(SIGTERM, on_terminate);
    set_signal(SIGINT, on_terminate);
    set_signal(SIGQUIT, on_terminate);
    set_signal(SIGBUS, on_bus_error);
    set_signal(SIGPIPE, SIG_IGN);
    set_signal(SIGXFSZ, SIG_IGN); /* a write over the limit of file sizes is an error of the export */
    set_signal(SIGHUP, SIG_IGN); /* reloads are the server's affair */
    set_signal(SIGUSR1, SIG_IGN);
    set_signal(SIGUSR2, SIG_IGN);
    set_signal(SIGCHLD, SIG_DFL);
}

/* Never outlive the parent. It set this already; a start by hand did not. */
static bool
follow_parent(void)
{
    pid_t parent = getppid();

    return prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent;
}

/* The name in ps: "kne-engine", without the path and the numbers of descriptors. */
static void
set_title(int argc, char **argv)
{
    char  *end = argv[0];
    size_t size;

    prctl(PR_SET_NAME, "kne-engine");
    for (int i = 0; i < argc && argv[i] == end; i++)
        end += strlen(end) + 1;
    size = (size_t) (end - argv[0]);
    if (size > sizeof "kne-engine")
    {
        memset(argv[0], 0, size);
        memcpy(argv[0], "kne-engine", sizeof "kne-engine");
    }
}

/* The backend that --device asks for, and why it is not the GPU where that might surprise. */
static int
open_device(const options *o, kne_backend **out, char *note, size_t note_size)
{
    kne_err    err;
    kne_status st = kne_device_open(o->device, o->threads, out, note, note_size, &err);

    if (st == KNE_ERR_INVALID)
        return fail(KNE_EXIT_USAGE, "%s", err.msg);
    if (st != KNE_OK && strncmp(o->device, "cuda", 4) == 0)
        return fail(KNE_EXIT_DEVICE,
                    "device \"%s\" was asked for, but %s; set kne.device to \"auto\" or \"cpu\"",
                    o->device, err.msg);
    return st == KNE_OK ? KNE_EXIT_OK : fail_err(KNE_EXIT_DEVICE, &err);
}

/* Until told to stop; ends the server and what it was given, unless its compute does not end in time. */
static int
serve(const kne_server_config *config, const char *unconfined)
{
    kne_err err;
    int     rc;

    if (kne_server_new(config, &server, &err) != KNE_OK)
        return fail_err(KNE_EXIT_FAILED, &err);
    if (unconfined)
        say("runs with more rights than it needs: %s", unconfined);
    say("ready (%s%s%s)", config->backend->name, config->device_note[0] ? "; " : "", config->device_note);
    switch (kne_server_run(server, &err))
    {
        case KNE_OK:
            rc = KNE_EXIT_OK;
            break;
        case KNE_ERR_DEVICE: /* nothing of the device can be ended in order */
            _exit(fail_err(KNE_EXIT_DEVICE_LOST, &err));
        default:
            rc = fail_err(KNE_EXIT_FAILED, &err);
    }
    /* A second signal must not find a server that is being freed. */
    set_signal(SIGTERM, SIG_IGN);
    set_signal(SIGINT, SIG_IGN);
    return rc;
}

int
main(int argc, char **argv)
{
    options           o = {.listen_fd = -1, .secret_fd = -1, .device = "auto",
                           .cache_bytes = (size_t) 1 << 30};
    kne_server_config config = {.log = log_line};
    kne_backend      *backend = NULL;
    const char       *unconfined;
    char              note[512], *socket_path;
    int               rc;

    if ((rc = read_options(argc, argv, &o)) != KNE_EXIT_OK)
        return rc < 0 ? KNE_EXIT_OK : rc;
    set_signals();
    if (!follow_parent())
        return fail(KNE_EXIT_FAILED, "the parent process is gone");
    if (o.secret_file)
        o.secret_fd = open(o.secret_file, O_RDONLY | O_CLOEXEC);
    if (o.secret_fd < 0 || !read_secret(o.secret_fd, config.secret))
        return fail(KNE_EXIT_USAGE, "could not read the %d bytes of the secret", KNE_SECRET_LEN);
    if ((rc = open_device(&o, &backend, note, sizeof note)) != KNE_EXIT_OK)
        return rc;
    unconfined = kne_confine(); /* before the first byte of a client */
    socket_path = o.socket ? strdup(o.socket) : NULL;
    set_title(argc, argv); /* the options end here: their text is overwritten */
    config.listen_fd = socket_path ? make_socket(socket_path) : o.listen_fd;
    config.backend = backend;
    config.device_note = note;
    config.cache_bytes = o.cache_bytes;
    if (config.listen_fd < 0)
        rc = fail(KNE_EXIT_FAILED, "could not make socket \"%s\": %s", socket_path ? socket_path : "", strerror(errno));
    else
    {
        rc = serve(&config, unconfined);
        if (socket_path)
            unlink(socket_path);
    }
    free(socket_path);
    if (server && !kne_server_free(server))
        _exit(rc);
    backend->close(backend);
    return rc;
}
