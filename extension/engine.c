/*
 * engine.c - starts kne-engine and looks after it. Runs in the launcher only.
 *
 *            spawn                HELLO answered
 *  STOPPED ---------> STARTING ------------------> RUNNING
 *                      |    ^                        |
 *    exit code 2 or 3  |    | delay over             | died, or the settings changed
 *  REFUSED <-----------+    |                        v
 *     |  settings changed   +---- BACKOFF <----------+   (1 s, 2 s, ... 60 s; 1 s again after a minute of life)
 *     +---------------------^
 *
 * The engine is a program of its own, so that whatever happens to it happens to no server process. It must
 * not outlive the server either: the kernel kills it when the launcher dies (PR_SET_PDEATHSIG), the launcher stops it
 * when it leaves in order, and it holds no descriptor of the server's but its log.
 *
 * The socket is made here, for each start anew, so that it is there before the engine runs: who connects meanwhile waits
 * in its backlog. The launcher closes its own copy, so that a dead engine refuses connections instead of collecting them.
 * What the engine writes to its standard error comes through a pipe into the server's log; the last line is kept as the
 * reason that kne_status() shows.
 */
#include "postgres.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "kne_proc.h"

#define SAYS "kne-engine: " /* what its lines begin with */
#define STOP_MS 2000   /* from SIGTERM to SIGKILL */
#define BACKOFF_MIN 1  /* seconds */
#define BACKOFF_MAX 60
#define HEALTHY_S 60   /* lived so long: the next death starts at the shortest delay again */

static pid_t       engine_pid = 0;
static int         log_fd = -1;
static int         probe_fd = -1; /* waits for the HELLO that says the engine is ready */
static int         backoff = BACKOFF_MIN;
static bool        stopping = false;
static TimestampTz started_at, kill_at;
static char       *run_device = NULL;
static int         run_threads;
static char        line[512]; /* of the engine's log, unfinished */
static size_t      line_len;

/* ---- what everybody sees ---- */

static void
set_state(KneEngineState state, const char *note)
{
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    kne_shared->engine_state = state;
    kne_shared->engine_pid = engine_pid;
    if (state == KNE_ENGINE_STARTING)
    {
        kne_shared->engine_starts++;
        kne_shared->engine_started_at = started_at;
    }
    strlcpy(kne_shared->engine_note, note, sizeof(kne_shared->engine_note));
    if (state == KNE_ENGINE_RUNNING)
    {
        int i;

        /* Whoever waited for it looks again. */
        for (i = 0; i < KNE_MAX_WORKERS; i++)
        {
            if (!OidIsValid(kne_shared->worker[i].dboid))
                continue;
            if (kne_proc->more[i].waiting)
                kne_shared->worker[i].wanted = true;
            if (kne_shared->worker[i].pid != 0)
                SetLatch(kne_shared->worker[i].latch);
        }
    }
    LWLockRelease(&kne_shared->lock);
}

/* ---- its log ---- */

static void
log_line(void)
{
    line[line_len] = '\0';
    line_len = 0;
    if (line[0] == '\0')
        return;
    ereport(LOG, (errmsg_internal("%s", line), errhidestmt(true)));
    if (strncmp(line, SAYS "ready", strlen(SAYS "ready")) == 0)
        return; /* no reason for anything */
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    strlcpy(kne_proc->engine_says, line + (strncmp(line, SAYS, strlen(SAYS)) == 0 ? strlen(SAYS) : 0),
            sizeof(kne_proc->engine_says));
    LWLockRelease(&kne_shared->lock);
}

static void
read_log(void)
{
    char    buf[1024];
    ssize_t n, i;

    while (log_fd >= 0)
    {
        n = read(log_fd, buf, sizeof(buf));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return; /* nothing more for now */
        for (i = 0; i < n; i++)
        {
            if (buf[i] != '\n')
                line[line_len++] = buf[i];
            if (buf[i] == '\n' || line_len == sizeof(line) - 1)
                log_line();
        }
        if (n == 0)
        {
            if (line_len > 0)
                log_line();
            close(log_fd);
            ReleaseExternalFD();
            log_fd = -1;
        }
    }
}

int
kne_engine_log_fd(void)
{
    return log_fd >= 0 ? log_fd : PGINVALID_SOCKET;
}

/* ---- start ---- */

static int
listen_on_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    mode_t             mask;
    int                fd, rc;

    if (unlink(KNE_SOCKET) != 0 && errno != ENOENT)
        return -1;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    strlcpy(address.sun_path, KNE_SOCKET, sizeof(address.sun_path));
    mask = umask(077);
    rc = bind(fd, (struct sockaddr *) &address, sizeof(address));
    umask(mask);
    if (rc != 0 || listen(fd, SOMAXCONN) != 0)
    {
        int save_errno = errno;

        close(fd);
        errno = save_errno;
        return -1;
    }
    return fd;
}

/* The engine gets of the environment what a program needs to find its libraries, device and language. */
static char **
engine_environment(void)
{
    static const char *const keep[] = {
        "PATH=", "HOME=", "LANG=", "LC_", "TZ=", "TMPDIR=", "LD_LIBRARY_PATH=",
        "CUDA_", "NVIDIA_", "OPENBLAS_", "KNE_", "ASAN_OPTIONS=", "UBSAN_OPTIONS=",
    };
    extern char      **environ;
    char             **env;
    int                n = 0, i;
    size_t             k;

    while (environ[n])
        n++;
    env = palloc((n + 1) * sizeof(char *));
    for (n = i = 0; environ[i]; i++)
        for (k = 0; k < lengthof(keep); k++)
            if (strncmp(environ[i], keep[k], strlen(keep[k])) == 0)
            {
                env[n++] = environ[i];
                break;
            }
    env[n] = NULL;
    return env;
}

/* In the child, between fork and exec: system calls only, nothing that allocates, logs or returns. */
static void
become_engine(const char *path, char *const *argv, char *const *env, int listen_fd, int secret_fd, int out_fd,
              pid_t launcher)
{
    struct sigaction sa;
    sigset_t         none;
    int              fd, s;

    setsid();
    memset(&sa, 0, sizeof(sa));
    sa.sa_handler = SIG_DFL;
    for (s = 1; s < NSIG; s++)
        sigaction(s, &sa, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);

    /* Tied to the launcher; it may be gone already. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != launcher)
        _exit(127);

    /* Out of the way of 0 to 4 first. dup2 clears close-on-exec. */
    listen_fd = fcntl(listen_fd, F_DUPFD, 10);
    secret_fd = fcntl(secret_fd, F_DUPFD, 10);
    out_fd = fcntl(out_fd, F_DUPFD, 10);
    fd = open("/dev/null", O_RDONLY);
    if (listen_fd < 0 || secret_fd < 0 || out_fd < 0 || fd < 0 ||
        dup2(fd, 0) < 0 || dup2(out_fd, 1) < 0 || dup2(out_fd, 2) < 0 ||
        dup2(listen_fd, 3) < 0 || dup2(secret_fd, 4) < 0)
        _exit(127);
    if (close_range(5, ~0U, 0) != 0)
        for (fd = 5; fd < 65536; fd++)
            close(fd);

    /* The server may be protected from the out-of-memory killer; the engine is what it should take. */
    fd = open("/proc/self/oom_score_adj", O_WRONLY);
    if (fd >= 0)
    {
        if (write(fd, "0", 1) < 0)
            (void) errno;
        close(fd);
    }
    execve(path, argv, env);
    _exit(127);
}

static void
spawn(void)
{
    MemoryContext  scratch = AllocSetContextCreate(CurrentMemoryContext, "kne engine start", ALLOCSET_SMALL_SIZES);
    MemoryContext  old = MemoryContextSwitchTo(scratch);
    char          *path = psprintf("%s/kne-engine", pkglib_path);
    char          *argv[10];
    char         **env = engine_environment();
    int            argc = 0;
    int            secret[2] = {-1, -1}, out[2] = {-1, -1};
    int            listen_fd;
    pid_t          launcher = getpid();
    sigset_t       all, before;
    char           note[256];
    const char    *failed = NULL;

    if (run_device)
        pfree(run_device);
    run_device = MemoryContextStrdup(TopMemoryContext, kne_device);
    run_threads = kne_cpu_threads;

    argv[argc++] = "kne-engine";
    argv[argc++] = "--listen-fd";
    argv[argc++] = "3";
    argv[argc++] = "--secret-fd";
    argv[argc++] = "4";
    argv[argc++] = "--device";
    argv[argc++] = run_device;
    if (run_threads > 0)
    {
        argv[argc++] = "--threads";
        argv[argc++] = psprintf("%d", run_threads);
    }
    argv[argc] = NULL;

    started_at = GetCurrentTimestamp();
    stopping = false;
    line_len = 0;
    LWLockAcquire(&kne_shared->lock, LW_EXCLUSIVE);
    kne_proc->engine_says[0] = '\0';
    LWLockRelease(&kne_shared->lock);

    listen_fd = listen_on_socket();
    if (listen_fd < 0)
        failed = "could not make the socket \"" KNE_SOCKET "\" in the data directory";
    else if (pipe2(secret, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0)
        failed = "could not make a pipe";
    else if (write(secret[1], kne_shared->secret, KNE_SECRET_LEN) != KNE_SECRET_LEN) /* fits the pipe's buffer */
        failed = "could not write to a pipe";
    else if (access(path, X_OK) != 0)
        failed = "could not find the program";
    else
    {
        /* No handler of the launcher may run in the child. */
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, &before);
        engine_pid = fork();
        if (engine_pid == 0)
            become_engine(path, argv, env, listen_fd, secret[0], out[1], launcher);
        sigprocmask(SIG_SETMASK, &before, NULL);
        if (engine_pid < 0)
        {
            engine_pid = 0;
            failed = "could not fork";
        }
    }
    if (failed)
    {
        int save_errno = errno;

        snprintf(note, sizeof(note), "%s: %s", failed, strerror(save_errno));
        ereport(LOG, (errmsg("could not start the kne engine \"%s\"", path), errdetail_internal("%s", note)));
        if (out[0] >= 0)
            close(out[0]);
        kne_shared->engine_retry_at = TimestampTzPlusMilliseconds(started_at, backoff * 1000L);
        set_state(KNE_ENGINE_BACKOFF, note);
        backoff = Min(backoff * 2, BACKOFF_MAX);
    }
    else
    {
        fcntl(out[0], F_SETFL, O_NONBLOCK);
        log_fd = out[0];
        ReserveExternalFD();
        set_state(KNE_ENGINE_STARTING, "");
    }
    if (listen_fd >= 0)
        close(listen_fd);
    if (secret[0] >= 0)
        close(secret[0]);
    if (secret[1] >= 0)
        close(secret[1]);
    if (out[1] >= 0)
        close(out[1]);
    MemoryContextSwitchTo(old);
    MemoryContextDelete(scratch);
}

/* ---- is it ready? ---- */

static void
end_probe(void)
{
    if (probe_fd < 0)
        return;
    close(probe_fd);
    ReleaseExternalFD();
    probe_fd = -1;
}

/* Any answer to HELLO, even an error, says that it serves; never waits. */
static void
probe(void)
{
    if (probe_fd < 0)
    {
        kne_wbuf w;
        bool     sent;

        probe_fd = kne_engine_connect();
        if (probe_fd < 0)
            return;
        ReserveExternalFD();
        kne_wbuf_init(&w);
        kne_put_hello(&w, 1);
        sent = send(probe_fd, w.p, w.len, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t) w.len;
        pfree(w.p);
        if (!sent)
            end_probe();
    }
    else
    {
        char    header[KNE_FRAME_HEADER];
        ssize_t n = recv(probe_fd, header, sizeof(header), MSG_DONTWAIT);

        if (n == KNE_FRAME_HEADER)
        {
            set_state(KNE_ENGINE_RUNNING, "");
            ereport(LOG,
                    (errmsg("kne engine is ready"),
                     errdetail("Process %d, device setting \"%s\".", (int) engine_pid, run_device)));
        }
        if (n >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
            end_probe();
    }
}

/* ---- end ---- */

static void
request_stop(void)
{
    if (stopping || engine_pid == 0)
        return;
    stopping = true;
    kill_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), STOP_MS);
    kill(engine_pid, SIGTERM);
}

/* It is dead: why, and what now. */
static void
bury(int status)
{
    char  says[sizeof(kne_proc->engine_says)];
    char  note[sizeof(kne_shared->engine_note)];
    pid_t was = engine_pid;

    end_probe();
    read_log();
    if (log_fd >= 0) /* somebody else may hold the other end; it is of no use any more */
    {
        close(log_fd);
        ReleaseExternalFD();
        log_fd = -1;
    }
    engine_pid = 0;
    unlink(KNE_SOCKET);
    strlcpy(says, kne_proc->engine_says, sizeof(says));

    if (stopping)
    {
        ereport(LOG, (errmsg("kne engine (process %d) stopped", (int) was)));
        backoff = BACKOFF_MIN;
        kne_shared->engine_retry_at = GetCurrentTimestamp();
        set_state(KNE_ENGINE_STOPPED, "");
        return;
    }
    if (WIFEXITED(status) && (WEXITSTATUS(status) == KNE_EXIT_DEVICE || WEXITSTATUS(status) == KNE_EXIT_USAGE))
    {
        snprintf(note, sizeof(note), "%s", says[0] ? says : "it refuses its configuration");
        ereport(LOG,
                (errmsg("kne engine does not start as it is configured"),
                 errdetail_internal("%s", note),
                 errhint("Change kne.device and reload the configuration.")));
        set_state(KNE_ENGINE_REFUSED, note);
        return;
    }
    if (WIFSIGNALED(status))
        snprintf(note, sizeof(note), "killed by signal %d%s%s", WTERMSIG(status), says[0] ? "; last words: " : "", says);
    else if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        snprintf(note, sizeof(note), "%s/kne-engine could not be executed", pkglib_path);
    else
        snprintf(note, sizeof(note), "exited with code %d%s%s", WEXITSTATUS(status), says[0] ? "; last words: " : "",
                 says);
    if (TimestampDifferenceExceeds(started_at, GetCurrentTimestamp(), HEALTHY_S * 1000))
        backoff = BACKOFF_MIN;
    kne_shared->engine_retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), backoff * 1000L);
    ereport(WARNING,
            (errmsg("kne engine (process %d) died: %s", (int) was, note),
             errdetail("It starts again in %d s. Sessions are not affected.", backoff)));
    set_state(KNE_ENGINE_BACKOFF, note);
    backoff = Min(backoff * 2, BACKOFF_MAX);
}

static void
reap(void)
{
    int   status;
    pid_t pid;

    if (engine_pid == 0)
        return;
    pid = waitpid(engine_pid, &status, WNOHANG);
    if (pid == engine_pid)
        bury(status);
    else if (pid < 0 && errno == ECHILD)
        bury(0);
}

long
kne_engine_tick(void)
{
    TimestampTz now;

    read_log();
    reap();
    now = GetCurrentTimestamp();
    if (engine_pid == 0 && kne_shared->engine_state != KNE_ENGINE_REFUSED)
    {
        if (kne_shared->engine_state != KNE_ENGINE_BACKOFF || now >= kne_shared->engine_retry_at)
            spawn();
        else
            return TimestampDifferenceMilliseconds(now, kne_shared->engine_retry_at) + 1;
    }
    if (engine_pid == 0)
        return 60000;
    if (stopping)
    {
        if (now >= kill_at)
            kill(engine_pid, SIGKILL);
        return 50;
    }
    if (kne_shared->engine_state == KNE_ENGINE_STARTING)
    {
        probe();
        return kne_shared->engine_state == KNE_ENGINE_STARTING ? 20 : 60000;
    }
    return 60000;
}

void
kne_engine_reconfigure(void)
{
    bool changed = run_device == NULL || strcmp(run_device, kne_device) != 0 || run_threads != kne_cpu_threads;

    /* Whatever it refused may have been put right outside: a driver, a library. */
    if (kne_shared->engine_state == KNE_ENGINE_REFUSED || (changed && engine_pid == 0))
        set_state(KNE_ENGINE_STOPPED, "");
    else if (changed)
        request_stop();
}

void
kne_engine_stop(void)
{
    request_stop();
    while (engine_pid != 0)
    {
        reap();
        if (engine_pid == 0)
            break;
        if (GetCurrentTimestamp() >= kill_at)
            kill(engine_pid, SIGKILL);
        pg_usleep(10000L);
    }
    set_state(KNE_ENGINE_STOPPED, "");
}

void
kne_engine_kill_now(void)
{
    if (engine_pid > 0)
        kill(engine_pid, SIGKILL);
    unlink(KNE_SOCKET);
}
