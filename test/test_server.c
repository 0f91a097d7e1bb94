/*
 * test_server.c - the engine as a process: starts build/kne-engine (beside this
 * program, or KNE_ENGINE) on a socket of its own and talks to it as the server's
 * processes do, and as nobody should.
 *
 * Needs a model of real facts: lre-llama-5m under KNE_SHARED (default ../shared),
 * or models/atlas; what needs one is skipped where there is none.
 */
#include "kne_client.h"
#include "kne_confine.h"
#include "kne_delta.h"
#include "kne_test.h"

#include <dirent.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) ||                               \
    __has_feature(address_sanitizer)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static char program[512], model_path[512], stories_path[512];
static char fingerprint[80];
static int  d_model, d_ff, vocab, n_ctx;

/* A prompt and its answer that the model at hand knows, and another one like it. */
static const char *prompt, *object, *other_object;
static const char *known_prompt, *known_object;

#define BODY(name) kne_wbuf name = {.grow = client_realloc}

static void
put_view(kne_wbuf *w, const uint8_t *set)
{
    static const uint8_t none[KNE_DIGEST_LEN];

    kne_put_str(w, model_path);
    kne_put_str(w, fingerprint);
    kne_put(w, set ? set : none, KNE_DIGEST_LEN);
}

static bool
is_error(const answer *a, kne_status status)
{
    if (a->type == KNE_MSG_ERROR && a->status == status)
        return true;
    printf("# got type %u, status %u: %s\n", a->type, a->status, a->msg);
    return false;
}

static void
pause_ms(int ms)
{
    nanosleep(&(struct timespec) {ms / 1000, ms % 1000 * 1000000L}, NULL);
}

/* ---- small questions ---- */

static double
ask_logprob(int fd, const uint8_t *set, const char *p, const char *o, uint16_t *type)
{
    BODY(w);
    answer a;
    double v = NAN;

    put_view(&w, set);
    kne_put_u32(&w, 1);
    kne_put_str(&w, p);
    kne_put_str(&w, o);
    a = client_call(fd, KNE_MSG_LOGPROB, &w);
    if (a.type == KNE_MSG_OK && kne_get_u32(&a.r) == 1)
        v = kne_get_f64(&a.r);
    if (type)
        *type = a.type;
    answer_free(&a);
    return v;
}

static int
ask_knows(int fd, const uint8_t *set, const char *p, const char *o)
{
    BODY(w);
    answer a;
    int    v = -1;

    put_view(&w, set);
    kne_put_u32(&w, 1);
    kne_put_str(&w, p);
    kne_put_str(&w, o);
    a = client_call(fd, KNE_MSG_KNOWS, &w);
    if (a.type == KNE_MSG_OK && kne_get_u32(&a.r) == 1)
        v = kne_get_u8(&a.r);
    answer_free(&a);
    return v;
}

static bool
alive(int fd)
{
    answer a = client_call(fd, KNE_MSG_STATUS, NULL);
    bool   ok = a.type == KNE_MSG_OK;

    answer_free(&a);
    return ok;
}

/* The text of what the engine is at, and how many requests wait. */
static void
ask_status(int fd, char *work, size_t size, uint32_t *waiting, uint32_t *models, uint64_t *edits)
{
    answer      a = client_call(fd, KNE_MSG_STATUS, NULL);
    size_t      n;
    const char *s;
    uint32_t    n_models, wait;
    uint64_t    reads, done;

    kne_get_u64(&a.r);
    kne_get_bytes(&a.r, &n);
    kne_get_bytes(&a.r, &n);
    kne_get_i64(&a.r);
    kne_get_i64(&a.r);
    kne_get_f64(&a.r);
    wait = kne_get_u32(&a.r);
    n_models = kne_get_count(&a.r, 20);
    for (uint32_t i = 0; i < n_models; i++)
    {
        kne_get_bytes(&a.r, &n);
        kne_get_bytes(&a.r, &n);
        kne_get_i64(&a.r);
        kne_get_u32(&a.r);
    }
    s = kne_get_bytes(&a.r, &n);
    snprintf(work, size, "%.*s", (int) n, s);
    reads = kne_get_u64(&a.r);
    done = kne_get_u64(&a.r);
    (void) reads;
    if (!kne_get_done(&a.r))
        strcpy(work, "malformed");
    if (waiting)
        *waiting = wait;
    if (models)
        *models = n_models;
    if (edits)
        *edits = done;
    answer_free(&a);
}

static bool
at_work(int fd, const char *begins)
{
    char work[200];

    for (int i = 0; i < 60000; i++)
    {
        ask_status(fd, work, sizeof work, NULL, NULL, NULL);
        if (strncmp(work, begins, strlen(begins)) == 0)
            return true;
        pause_ms(5);
    }
    printf("# still at: %s\n", work);
    return false;
}

/* ---- the program ---- */

static int
run_program(const char *const *args)
{
    const char *argv[16] = {program};
    pid_t       pid;
    int         n = 1;

    while (*args)
        argv[n++] = *args++;
    fflush(stdout);
    pid = fork();
    if (pid == 0)
    {
        int null = open("/dev/null", O_RDWR);

        dup2(null, 1);
        dup2(null, 2);
        execv(program, (char *const *) argv);
        _exit(127);
    }
    return engine_wait_exit(pid, CLIENT_SECONDS);
}

#define RUN(...) run_program((const char *const[]) {__VA_ARGS__, NULL})

static void
test_options(void)
{
    check(RUN("--version") == KNE_EXIT_OK, "--version");
    check(RUN("--listen-fd", "0") == KNE_EXIT_USAGE, "a secret is needed");
    check(RUN("--listen-fd", "x", "--secret-fd", "0") == KNE_EXIT_USAGE,
          "a descriptor is a number");
    check(RUN("--no-such-option") == KNE_EXIT_USAGE, "unknown option");
    check(RUN("--socket", "/nonexistent/s", "--secret-file", "/nonexistent") == KNE_EXIT_USAGE,
          "a secret file that is not there");
    check(RUN("--socket", "/nonexistent/s", "--secret-file", "/dev/zero") == KNE_EXIT_FAILED,
          "a socket that cannot be made");
    check(RUN("--socket", "/tmp/s", "--secret-file", "/dev/zero", "--device", "cuda") ==
              KNE_EXIT_DEVICE,
          "a device that is not there is refused");
    check(RUN("--socket", "/tmp/s", "--secret-file", "/dev/zero", "--device", "tpu") ==
              KNE_EXIT_USAGE,
          "an unknown device");
}

/* Every thread of the process: no new privileges, a filter of system calls, no core files. */
static void
test_confined(pid_t pid)
{
    char           path[64], text[256];
    DIR           *dir;
    struct dirent *d;
    struct rlimit  core = {1, 1};
    int            threads = 0, confined = 0;

    snprintf(path, sizeof path, "/proc/%d/task", pid);
    dir = opendir(path);
    while (dir && (d = readdir(dir)))
    {
        FILE *f;
        int   found = 0;

        if (d->d_name[0] == '.')
            continue;
        threads++;
        snprintf(text, sizeof text, "/proc/%d/task/%.20s/status", pid, d->d_name);
        f = fopen(text, "r");
        while (f && fgets(text, sizeof text, f))
            found += strcmp(text, "NoNewPrivs:\t1\n") == 0 || strcmp(text, "Seccomp:\t2\n") == 0;
        if (f)
            fclose(f);
        confined += found == 2;
    }
    if (dir)
        closedir(dir);
    prlimit(pid, RLIMIT_CORE, NULL, &core);
    check(threads > 0 && confined == threads && core.rlim_cur == 0 && core.rlim_max == 0,
          "%d of %d threads are confined, without core files", confined, threads);
}

static void *
return_it(void *arg)
{
    return arg;
}

/* What kne_confine refuses, tried in a child; one exit code for each that was not refused. */
static void
test_confine(void)
{
    int   status = -1;
    pid_t pid;

    fflush(stdout);
    pid = fork();
    if (pid == 0)
    {
        static char *const none[] = {NULL};
        int       pair[2];
        void     *page;
        pthread_t thread;

        if (kne_confine())
            _exit(1);
        if (socket(AF_INET, SOCK_STREAM, 0) >= 0 || errno != EPERM)
            _exit(2);
        if (socket(AF_NETLINK, SOCK_RAW, 0) >= 0 || errno != EPERM)
            _exit(3);
        if (execve("/bin/true", none, none) == 0 || errno != EPERM)
            _exit(4);
        if (unshare(0x10000000) == 0 || errno != EPERM) /* CLONE_NEWUSER */
            _exit(5);
        if (!SANITIZED && (ptrace(PTRACE_ATTACH, getppid(), NULL, NULL) == 0 || errno != EPERM))
            _exit(6);
        if (process_vm_readv(getppid(), NULL, 0, NULL, 0, 0) == 0 || errno != EPERM)
            _exit(7);
        if (syscall(SYS_clone, 0x10000000 | SIGCHLD, 0, 0, 0, 0) >= 0 || errno != EPERM) /* CLONE_NEWUSER; a child ends so too */
            _exit(9);
        if (syscall(435, NULL, 0) >= 0 || errno != ENOSYS) /* clone3 */
            _exit(10);
        if (syscall(425, 1, NULL) >= 0 || errno != EPERM) /* io_uring_setup */
            _exit(11);
        if (syscall(438, -1, 0, 0) >= 0 || errno != EPERM) /* pidfd_getfd */
            _exit(12);
        if (syscall(430, NULL, 0) >= 0 || errno != EPERM) /* fsopen */
            _exit(13);
        /* and what an engine does */
        if (pthread_create(&thread, NULL, return_it, pair) != 0 || pthread_join(thread, &page) != 0 || page != pair)
            _exit(14);
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0 || open("/proc/self/maps", O_RDONLY) < 0)
            _exit(8);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0,
          "a confined process starts nothing, talks to no network, traces nobody (%d)", WEXITSTATUS(status));
}

/* As the launcher does: a socket and a pipe that the child inherits. */
static void
test_inherited(void)
{
    engine             e;
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    int                fd, pipe_fd[2], client;
    char               a[16], b[16], comm[32] = "", file[64];
    FILE              *f;

    engine_prepare(&e, program);
    strcpy(at.sun_path, e.socket);
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(fd, (struct sockaddr *) &at, sizeof at) || listen(fd, 8) || pipe(pipe_fd))
        exit(99);
    fflush(stdout);
    e.pid = fork();
    if (e.pid == 0)
    {
        close(pipe_fd[1]);
        snprintf(a, sizeof a, "%d", fd);
        snprintf(b, sizeof b, "%d", pipe_fd[0]);
        execl(program, "kne-engine", "--listen-fd", a, "--secret-fd", b, "--device", "cpu",
              (char *) NULL);
        _exit(127);
    }
    close(fd);
    close(pipe_fd[0]);
    if (write(pipe_fd[1], e.secret, KNE_SECRET_LEN) != KNE_SECRET_LEN)
        exit(99);
    close(pipe_fd[1]);
    client = engine_client(&e);
    check(client >= 0 && alive(client), "started with an inherited socket and secret pipe");
    snprintf(file, sizeof file, "/proc/%d/comm", e.pid);
    if ((f = fopen(file, "r")))
    {
        if (!fgets(comm, sizeof comm, f))
            comm[0] = '\0';
        fclose(f);
    }
    check(strcmp(comm, "kne-engine\n") == 0, "its process is named kne-engine");
    test_confined(e.pid);
    close(client);
    check(engine_stop(&e) == KNE_EXIT_OK, "SIGTERM ends it with code 0");
}

static void
test_parent_death(void)
{
    engine e;
    int    pipe_fd[2];
    pid_t  middle, child = 0;
    bool   gone = false;

    engine_prepare(&e, program);
    if (pipe(pipe_fd))
        exit(99);
    fflush(stdout);
    middle = fork();
    if (middle == 0)
    {
        pid_t pid = fork();

        if (pid == 0)
            engine_exec(&e, NULL);
        if (write(pipe_fd[1], &pid, sizeof pid) != sizeof pid || !engine_wait_ready(&e))
            _exit(1);
        pause();
        _exit(0);
    }
    if (read(pipe_fd[0], &child, sizeof child) != sizeof child || !engine_wait_ready(&e))
        exit(99);
    kill(middle, SIGKILL);
    waitpid(middle, NULL, 0);
    for (int i = 0; i < 30000 && !gone; i++)
    {
        gone = client_connect(e.socket) < 0;
        pause_ms(10);
    }
    check(gone, "it ends when its parent is killed");
    if (!gone)
        kill(child, SIGKILL);
    close(pipe_fd[0]);
    close(pipe_fd[1]);
    engine_remove_files(&e);
}

/* ---- who may come in ---- */

static bool
closed(int fd)
{
    char c;

    return recv(fd, &c, 1, 0) <= 0;
}

static void
test_hello(const engine *e)
{
    uint8_t wrong[KNE_SECRET_LEN];
    int     fd;
    answer  a;
    uint8_t junk[300];

    memcpy(wrong, e->secret, sizeof wrong);
    wrong[KNE_SECRET_LEN - 1] ^= 1;
    fd = client_connect(e->socket);
    a = client_hello(fd, wrong, KNE_PROTOCOL_VERSION);
    check(is_error(&a, KNE_ERR_PROTOCOL) && closed(fd),
          "a wrong secret is refused and the connection closed");
    answer_free(&a);
    close(fd);

    fd = client_connect(e->socket);
    a = client_hello(fd, e->secret, KNE_PROTOCOL_VERSION + 1);
    check(is_error(&a, KNE_ERR_UNSUPPORTED) && closed(fd), "another protocol version is refused");
    answer_free(&a);
    close(fd);

    fd = client_connect(e->socket);
    a = client_call(fd, KNE_MSG_STATUS, NULL);
    check(is_error(&a, KNE_ERR_PROTOCOL) && closed(fd), "nothing is answered before HELLO");
    answer_free(&a);
    close(fd);

    fd = client_connect(e->socket);
    memset(junk, 'A', sizeof junk);
    client_send_raw(fd, junk, sizeof junk);
    a = client_recv(fd);
    check(is_error(&a, KNE_ERR_PROTOCOL) && closed(fd),
          "garbage instead of HELLO closes the connection");
    answer_free(&a);
    close(fd);

    fd = client_connect(e->socket);
    a = client_hello(fd, e->secret, KNE_PROTOCOL_VERSION);
    check(a.type == KNE_MSG_OK && kne_get_u32(&a.r) == KNE_PROTOCOL_VERSION,
          "the right secret is let in");
    answer_free(&a);

    /* A frame longer than the limit, and one that is no frame, end the connection; an unknown type
     * does not. */
    a = client_call(fd, 77, NULL);
    check(is_error(&a, KNE_ERR_PROTOCOL) && alive(fd),
          "an unknown message type is an error, the connection goes on");
    answer_free(&a);
    uint32_t head[3] = {KNE_FRAME_MAX + 1, KNE_MSG_COMPLETE, 5};
    client_send_raw(fd, head, sizeof head);
    a = client_recv(fd);
    check(is_error(&a, KNE_ERR_LIMIT) && a.id == 5 && closed(fd),
          "a frame over the limit closes the connection");
    answer_free(&a);
    close(fd);

    fd = engine_client(e);
    uint32_t odd[3] = {0, KNE_MSG_STATUS | 1u << 16, 6};
    client_send_raw(fd, odd, sizeof odd);
    a = client_recv(fd);
    check(is_error(&a, KNE_ERR_PROTOCOL) && closed(fd),
          "a header with its zero field set closes the connection");
    answer_free(&a);
    close(fd);
}

static void
test_status(int fd)
{
    answer      a = client_call(fd, KNE_MSG_STATUS, NULL);
    uint64_t    pid = kne_get_u64(&a.r);
    size_t      n_dev, n_note;
    const char *dev = kne_get_bytes(&a.r, &n_dev);
    const char *note = kne_get_bytes(&a.r, &n_note);
    int64_t     own = kne_get_i64(&a.r);

    check(a.type == KNE_MSG_OK && pid > 1 && n_dev > 3 && memcmp(dev, "cpu", 3) == 0,
          "STATUS: pid and device");
    check(n_note > 0, "STATUS: why not the GPU: %.*s", (int) n_note, note);
    check(own > 0 && own < (int64_t) 4 << 30, "STATUS: private bytes");
    answer_free(&a);
}

/* ---- models and reads ---- */

static bool
inspect(int fd, const char *path, char *fp)
{
    BODY(w);
    answer a;
    size_t n;
    bool   ok;

    kne_put_str(&w, path);
    a = client_call(fd, KNE_MSG_MODEL_INSPECT, &w);
    if (a.type != KNE_MSG_OK)
    {
        printf("# %s: %s\n", path, a.msg);
        answer_free(&a);
        return false;
    }
    kne_get_bytes(&a.r, &n);
    kne_get_i32(&a.r);
    d_model = kne_get_i32(&a.r);
    d_ff = kne_get_i32(&a.r);
    vocab = kne_get_i32(&a.r);
    n_ctx = kne_get_i32(&a.r);
    kne_get_bytes(&a.r, &n);
    const char *s = kne_get_bytes(&a.r, &n);
    snprintf(fp, 80, "%.*s", (int) n, s);
    kne_get_i64(&a.r);
    kne_get_u8(&a.r);
    ok = kne_get_done(&a.r) && n == 64;
    answer_free(&a);
    return ok;
}

static void
test_inspect(int fd)
{
    BODY(w);
    answer a;

    bool ok = inspect(fd, model_path, fingerprint);
    check(ok && d_model > 0 && d_ff > 0 && vocab > 0 && n_ctx > 0,
          "MODEL_INSPECT: %d wide, %d neurons a layer, fingerprint %.12s...", d_model, d_ff,
          fingerprint);
    kne_put_str(&w, "/nonexistent/model");
    a = client_call(fd, KNE_MSG_MODEL_INSPECT, &w);
    check(a.type == KNE_MSG_ERROR && a.msg[0], "MODEL_INSPECT of no folder: %s", a.msg);
    answer_free(&a);
    kne_put_bytes(&w, "/tmp\0/x", 7);
    a = client_call(fd, KNE_MSG_MODEL_INSPECT, &w);
    check(is_error(&a, KNE_ERR_PROTOCOL), "MODEL_INSPECT of a path with a NUL");
    answer_free(&a);

    kne_put_str(&w, model_path);
    kne_put_str(&w, "0000000000000000000000000000000000000000000000000000000000000000");
    kne_put(&w, (uint8_t[KNE_DIGEST_LEN]) {0}, KNE_DIGEST_LEN);
    kne_put_str(&w, "x");
    size_t len = w.len;
    uint8_t *copy = malloc(len);
    memcpy(copy, w.p, len);
    a = client_call(fd, KNE_MSG_TOKENIZE, &w);
    check(is_error(&a, KNE_ERR_FORMAT) && strstr(a.hint, "kne_load_model"),
          "another fingerprint is refused: %s", a.msg);
    answer_free(&a);
    kne_put(&w, copy, len);
    a = client_call(fd, KNE_MSG_TOKENIZE, &w);
    check(is_error(&a, KNE_ERR_FORMAT) && strstr(a.hint, "kne_load_model"), "and again");
    answer_free(&a);
    free(copy);
}

static void
test_tokens(int fd)
{
    BODY(w);
    answer   a;
    uint32_t n;
    int32_t  id[64];
    size_t   len;

    put_view(&w, NULL);
    kne_put_str(&w, prompt);
    a = client_call(fd, KNE_MSG_TOKENIZE, &w);
    n = kne_get_count(&a.r, 4);
    for (uint32_t i = 0; i < n && i < 64; i++)
        id[i] = kne_get_i32(&a.r);
    check(a.type == KNE_MSG_OK && kne_get_done(&a.r) && n > 1 && n < 64, "TOKENIZE gives %u tokens",
          n);
    answer_free(&a);

    /* 32 bytes: tokens need no set */
    put_view(&w, (const uint8_t *) "a set that the engine never saw.");
    kne_put_u32(&w, n - 1);
    kne_put(&w, id + 1, (n - 1) * 4); /* [0] is put first by the post-processor */
    a = client_call(fd, KNE_MSG_DETOKENIZE, &w);
    const char *s = kne_get_bytes(&a.r, &len);
    check(a.type == KNE_MSG_OK && len == strlen(prompt) && memcmp(s, prompt, len) == 0,
          "DETOKENIZE gives the text back, whatever the set");
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_u32(&w, 1);
    kne_put_i32(&w, vocab + 1000000);
    a = client_call(fd, KNE_MSG_DETOKENIZE, &w);
    check(is_error(&a, KNE_ERR_INVALID), "DETOKENIZE of an id outside the vocabulary");
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_bytes(&w, "\xff\xfe", 2);
    a = client_call(fd, KNE_MSG_TOKENIZE, &w);
    check(is_error(&a, KNE_ERR_INVALID), "TOKENIZE of what is not UTF-8");
    answer_free(&a);
}

static answer
complete(int fd, const char *path, const char *fp, const char *text, int32_t max_tokens)
{
    BODY(w);

    kne_put_str(&w, path);
    kne_put_str(&w, fp);
    kne_put(&w, (uint8_t[KNE_DIGEST_LEN]) {0}, KNE_DIGEST_LEN);
    kne_put_str(&w, text);
    kne_put_i32(&w, max_tokens);
    return client_call(fd, KNE_MSG_COMPLETE, &w);
}

static void
test_complete(int fd)
{
    answer      a = complete(fd, model_path, fingerprint, prompt, 3);
    size_t      n;
    const char *s = kne_get_bytes(&a.r, &n);
    char       *long_prompt;

    check(a.type == KNE_MSG_OK && n > strlen(object) && s[0] == ' ' &&
              memcmp(s + 1, object, strlen(object)) == 0,
          "COMPLETE: \"%s\" goes on \"%.*s\"", prompt, (int) n, s);
    answer_free(&a);
    a = complete(fd, model_path, fingerprint, prompt, 0);
    s = kne_get_bytes(&a.r, &n);
    check(a.type == KNE_MSG_OK && n == 0 && kne_get_done(&a.r), "COMPLETE of 0 tokens is empty");
    answer_free(&a);
    a = complete(fd, model_path, fingerprint, prompt, -1);
    check(is_error(&a, KNE_ERR_INVALID), "COMPLETE of -1 tokens is refused");
    answer_free(&a);
    a = complete(fd, model_path, fingerprint, prompt, INT32_MAX);
    check(a.type == KNE_MSG_OK, "COMPLETE stops at the end of the context");
    answer_free(&a);

    long_prompt = malloc((size_t) n_ctx * 8 + 1);
    for (int i = 0; i < n_ctx; i++)
        memcpy(long_prompt + 8 * i, "1 ) [ { ", 8);
    long_prompt[n_ctx * 8] = '\0';
    a = complete(fd, model_path, fingerprint, long_prompt, 1);
    check(is_error(&a, KNE_ERR_LIMIT), "a prompt over the context: %s", a.msg);
    answer_free(&a);
    free(long_prompt);
}

static void
test_stories(int fd)
{
    char        fp[80];
    int         keep[4] = {d_model, d_ff, vocab, n_ctx};
    answer      a;
    size_t      n;
    const char *s;

    if (access(stories_path, R_OK) != 0 || !inspect(fd, stories_path, fp))
    {
        skip("COMPLETE with a SentencePiece tokenizer", "no stories260K");
        return;
    }
    a = complete(fd, stories_path, fp, "Once upon a time, there was a little", 3);
    s = kne_get_bytes(&a.r, &n);
    check(a.type == KNE_MSG_OK && n >= 5 && memcmp(s, " girl", 5) == 0,
          "COMPLETE keeps the space of a SentencePiece token: \"%.*s\"", (int) n, s);
    answer_free(&a);
    d_model = keep[0], d_ff = keep[1], vocab = keep[2], n_ctx = keep[3];
}

static void
test_next_tokens(int fd)
{
    BODY(w);
    answer   a;
    uint32_t n;
    double   sum = 0, last = 2, first = 0;
    bool     ordered = true, found = false;
    double   logp = ask_logprob(fd, NULL, prompt, object, NULL);

    put_view(&w, NULL);
    kne_put_str(&w, prompt);
    kne_put_i32(&w, 5);
    a = client_call(fd, KNE_MSG_NEXT_TOKENS, &w);
    n = kne_get_count(&a.r, 16);
    for (uint32_t i = 0; i < n; i++)
    {
        size_t      len;
        int32_t     id = kne_get_i32(&a.r);
        const char *s = kne_get_bytes(&a.r, &len);
        double      p = kne_get_f64(&a.r);

        ordered &= p <= last && id >= 0 && id < vocab;
        last = p;
        if (i == 0)
        {
            first = p;
            found = len == strlen(object) + 1 && memcmp(s + 1, object, len - 1) == 0;
        }
    }
    check(a.type == KNE_MSG_OK && n == 5 && kne_get_done(&a.r) && ordered && found,
          "NEXT_TOKENS: the known answer first (%.4f)", first);
    check(fabs(log(first) - logp) < 1e-4, "NEXT_TOKENS and LOGPROB agree (%.6f, %.6f)", log(first),
          logp);
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_str(&w, prompt);
    kne_put_i32(&w, INT32_MAX);
    a = client_call(fd, KNE_MSG_NEXT_TOKENS, &w);
    n = kne_get_count(&a.r, 16);
    last = 2;
    for (uint32_t i = 0; i < n; i++)
    {
        size_t len;
        double p;

        kne_get_i32(&a.r);
        kne_get_bytes(&a.r, &len);
        p = kne_get_f64(&a.r);
        ordered &= p <= last;
        last = p;
        sum += p;
    }
    check(n > 100 && (int) n <= vocab && ordered && fabs(sum - 1) < 1e-3,
          "NEXT_TOKENS of the whole vocabulary: %u in order, sum %.6f", n, sum);
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_str(&w, prompt);
    kne_put_i32(&w, 0);
    a = client_call(fd, KNE_MSG_NEXT_TOKENS, &w);
    check(is_error(&a, KNE_ERR_INVALID), "NEXT_TOKENS of none is refused");
    answer_free(&a);
}

static void
test_knows(int fd)
{
    BODY(w);
    answer   a;
    uint32_t n;
    int      bad = 0;

    check(ask_knows(fd, NULL, prompt, object) == 1 &&
              ask_knows(fd, NULL, prompt, other_object) == 0,
          "KNOWS the fact, and not another");
    put_view(&w, NULL);
    kne_put_u32(&w, 1200);
    for (int i = 0; i < 1200; i++)
    {
        kne_put_str(&w, prompt);
        kne_put_str(&w, i % 2 ? object : other_object);
    }
    a = client_call(fd, KNE_MSG_KNOWS, &w);
    n = kne_get_count(&a.r, 1);
    for (uint32_t i = 0; i < n; i++)
        bad += kne_get_u8(&a.r) != i % 2;
    check(n == 1200 && bad == 0, "KNOWS of 1200 rows at once");
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_u32(&w, 0);
    a = client_call(fd, KNE_MSG_KNOWS, &w);
    check(a.type == KNE_MSG_OK && kne_get_u32(&a.r) == 0, "KNOWS of no rows");
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_u32(&w, 1);
    kne_put_str(&w, prompt);
    kne_put_str(&w, "");
    a = client_call(fd, KNE_MSG_LOGPROB, &w);
    check(is_error(&a, KNE_ERR_INVALID), "LOGPROB of an empty continuation");
    answer_free(&a);
}

/* ---- sets and deltas ---- */

/* A delta of one neuron that shifts much. */
static kne_delta *
make_delta(int layer, int neuron, float size)
{
    float        *v = malloc((size_t) d_model * sizeof *v);
    kne_delta_row row = {layer, neuron, KNE_MATRIX_DOWN, d_model, v};
    kne_delta    *d = NULL;

    for (int i = 0; i < d_model; i++)
        v[i] = size * (float) ((i * 7919 + neuron * 31) % 13 - 6);
    kne_delta_new(&row, 1, &d, NULL);
    free(v);
    return d;
}

static answer
put_set(int fd, const uint8_t *set, int32_t n, const int64_t *id, uint8_t (*digest)[KNE_DIGEST_LEN])
{
    BODY(w);

    put_view(&w, set);
    kne_put_u32(&w, (uint32_t) n);
    for (int32_t i = 0; i < n; i++)
    {
        kne_put_i64(&w, id[i]);
        kne_put(&w, digest[i], KNE_DIGEST_LEN);
    }
    return client_call(fd, KNE_MSG_SET_PUT, &w);
}

static answer
put_delta(int fd, const kne_delta *d, const uint8_t *digest)
{
    BODY(w);

    kne_put(&w, digest, KNE_DIGEST_LEN);
    kne_delta_write(&w, d);
    return client_call(fd, KNE_MSG_DELTA_PUT, &w);
}

static void
test_sets(int fd)
{
    kne_delta *d[3] = {make_delta(0, 1, 0.5f), make_delta(1, 5, 0.4f), make_delta(0, d_ff, 1.0f)};
    int64_t    id[2] = {7, 9}, backwards[2] = {9, 7};
    uint8_t    digest[2][KNE_DIGEST_LEN], set[KNE_DIGEST_LEN];
    uint8_t    one[KNE_DIGEST_LEN], bad[KNE_DIGEST_LEN];
    double     base = ask_logprob(fd, NULL, prompt, object, NULL), edited, again;
    uint16_t   type;
    answer     a;

    memcpy(digest[0], d[0]->digest, KNE_DIGEST_LEN);
    memcpy(digest[1], d[1]->digest, KNE_DIGEST_LEN);
    kne_set_digest(id, digest, 2, set, NULL);
    kne_set_digest(id, digest, 1, one, NULL);
    memcpy(bad, set, sizeof bad);
    bad[5] ^= 1;

    ask_logprob(fd, set, prompt, object, &type);
    check(type == KNE_MSG_NEED_SET, "a set never seen: NEED_SET");
    a = put_set(fd, set, 2, id, digest);
    check(a.type == KNE_MSG_NEED_DELTAS && kne_get_count(&a.r, KNE_DIGEST_LEN) == 2,
          "SET_PUT: NEED_DELTAS, both");
    answer_free(&a);
    a = put_set(fd, bad, 2, id, digest);
    check(is_error(&a, KNE_ERR_PROTOCOL), "SET_PUT under a wrong digest");
    answer_free(&a);
    a = put_set(fd, set, 2, backwards, digest);
    check(is_error(&a, KNE_ERR_PROTOCOL), "SET_PUT out of order");
    answer_free(&a);
    a = put_delta(fd, d[0], d[1]->digest);
    check(a.type == KNE_MSG_ERROR, "DELTA_PUT under a wrong digest: %s", a.msg);
    answer_free(&a);
    a = put_delta(fd, d[0], d[0]->digest);
    check(a.type == KNE_MSG_OK, "DELTA_PUT");
    answer_free(&a);
    a = put_set(fd, set, 2, id, digest);
    uint32_t n = kne_get_count(&a.r, KNE_DIGEST_LEN);
    const void *which = kne_get(&a.r, KNE_DIGEST_LEN);
    check(a.type == KNE_MSG_NEED_DELTAS && n == 1 && which &&
              memcmp(which, digest[1], KNE_DIGEST_LEN) == 0,
          "SET_PUT: NEED_DELTAS, the other one");
    answer_free(&a);
    a = put_delta(fd, d[1], d[1]->digest);
    answer_free(&a);
    a = put_set(fd, set, 2, id, digest);
    check(a.type == KNE_MSG_OK, "SET_PUT with all deltas here");
    answer_free(&a);
    edited = ask_logprob(fd, set, prompt, object, &type);
    check(type == KNE_MSG_OK && edited != base, "the set is served: %.6f, base %.6f", edited, base);
    again = ask_logprob(fd, NULL, prompt, object, NULL);
    check(memcmp(&again, &base, sizeof base) == 0, "the base is the same to the last bit");
    a = put_set(fd, one, 1, id, digest);
    check(a.type == KNE_MSG_OK, "a part of the set needs no more deltas");
    answer_free(&a);
    ask_logprob(fd, one, prompt, object, &type);
    again = ask_logprob(fd, set, prompt, object, NULL);
    check(type == KNE_MSG_OK && memcmp(&again, &edited, sizeof edited) == 0,
          "and both sets are served side by side");

    /* A delta that does not fit the model: its digest is right, so building the view tells. */
    a = put_delta(fd, d[2], d[2]->digest);
    answer_free(&a);
    memcpy(digest[0], d[2]->digest, KNE_DIGEST_LEN);
    kne_set_digest(id, digest, 1, set, NULL);
    a = put_set(fd, set, 1, id, digest);
    check(is_error(&a, KNE_ERR_INVALID), "a delta that does not fit the model: %s", a.msg);
    answer_free(&a);
    for (int i = 0; i < 3; i++)
        kne_delta_release(d[i]);
}

/* Far more sets than the cache's budget holds: the oldest go, all are served. */
static void
test_budget(void)
{
    static const char *const args[] = {"--memory", "1", NULL};
    engine   e;
    int      fd, wrong = 0, gone = 0;
    int64_t  id = 3;
    uint8_t  digest[1][KNE_DIGEST_LEN], set[KNE_DIGEST_LEN];
    uint32_t models;
    double   first = NAN;
    char     work[200];

    engine_start(&e, program, args);
    fd = engine_client(&e);
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 1000; i++)
        {
            kne_delta *d = make_delta(i % 2, i / 2 % d_ff, 0.5f);
            answer     a;
            uint16_t   type;
            double     v;

            memcpy(digest[0], d->digest, KNE_DIGEST_LEN);
            kne_set_digest(&id, digest, 1, set, NULL);
            v = ask_logprob(fd, set, prompt, object, &type);
            if (type == KNE_MSG_NEED_SET)
            {
                gone++;
                a = put_set(fd, set, 1, &id, digest);
                if (a.type == KNE_MSG_NEED_DELTAS)
                {
                    answer_free(&a);
                    a = put_delta(fd, d, d->digest);
                    answer_free(&a);
                    a = put_set(fd, set, 1, &id, digest);
                }
                wrong += a.type != KNE_MSG_OK;
                answer_free(&a);
                v = ask_logprob(fd, set, prompt, object, &type);
            }
            wrong += type != KNE_MSG_OK;
            if (i == 0 && round == 0)
                first = v;
            if (i == 0 && round == 1)
                wrong += v != first;
            kne_delta_release(d);
        }
    check(wrong == 0 && gone > 1000,
          "1000 sets through a cache of 1 MB: all served, %d times rebuilt", gone);
    ask_status(fd, work, sizeof work, NULL, &models, NULL);
    check(models == 1 && strcmp(work, "idle") == 0, "STATUS lists the one model, idle");
    close(fd);
    check(engine_stop(&e) == KNE_EXIT_OK, "and ends clean");
}

/* ---- what should not come ---- */

/* One well-formed body for each type that has one. */
static void
valid_body(int type, kne_wbuf *w)
{
    int64_t    id = 1;
    uint8_t    digest[1][KNE_DIGEST_LEN], set[KNE_DIGEST_LEN];
    kne_delta *d = make_delta(0, 3, 0.1f);

    memcpy(digest[0], d->digest, KNE_DIGEST_LEN);
    kne_set_digest(&id, digest, 1, set, NULL);
    if (type == KNE_MSG_DELTA_PUT)
    {
        kne_put(w, d->digest, KNE_DIGEST_LEN);
        kne_delta_write(w, d);
    }
    else if (type == KNE_MSG_MODEL_INSPECT)
        kne_put_str(w, model_path);
    else if (type == KNE_MSG_CANCEL)
    {
        kne_put_u32(w, 5);
        kne_put_i64(w, 0);
    }
    else if (type != KNE_MSG_STATUS)
    {
        put_view(w, type == KNE_MSG_SET_PUT ? set : NULL);
        switch (type)
        {
            case KNE_MSG_SET_PUT:
                kne_put_u32(w, 1);
                kne_put_i64(w, id);
                kne_put(w, digest[0], KNE_DIGEST_LEN);
                break;
            case KNE_MSG_COMPLETE:
            case KNE_MSG_NEXT_TOKENS:
                kne_put_str(w, prompt);
                kne_put_i32(w, 2);
                break;
            case KNE_MSG_LOGPROB:
            case KNE_MSG_KNOWS:
                kne_put_u32(w, 1);
                kne_put_str(w, prompt);
                kne_put_str(w, object);
                break;
            case KNE_MSG_TOKENIZE:
                kne_put_str(w, prompt);
                break;
            case KNE_MSG_DETOKENIZE:
                kne_put_u32(w, 2);
                kne_put_i32(w, 1);
                kne_put_i32(w, 2);
                break;
            default: /* EDIT, LOCATE */
                kne_put_str(w, "{\"max_steps\": 1, \"fraction\": 0.001}");
                kne_put_u32(w, 1);
                kne_put_str(w, prompt);
                kne_put_str(w, object);
                kne_put_i64(w, 0);
                kne_put_u32(w, 1);
                kne_put_i64(w, 4);
                kne_put_u32(w, 1);
                kne_put_str(w, prompt);
                kne_put_str(w, other_object);
                kne_put_u32(w, 1);
                kne_put_i32(w, 0);
                break;
        }
    }
    kne_delta_release(d);
}

static const int all_types[] = {
    KNE_MSG_MODEL_INSPECT, KNE_MSG_SET_PUT, KNE_MSG_DELTA_PUT, KNE_MSG_STATUS, KNE_MSG_COMPLETE,
    KNE_MSG_LOGPROB, KNE_MSG_NEXT_TOKENS, KNE_MSG_KNOWS, KNE_MSG_TOKENIZE, KNE_MSG_DETOKENIZE,
    KNE_MSG_EDIT, KNE_MSG_LOCATE, KNE_MSG_CANCEL,
};
#define N_TYPES ((int) (sizeof all_types / sizeof all_types[0]))

static void
test_malformed(const engine *e)
{
    int      fd = engine_client(e), wrong = 0, lost = 0, n = 0;
    uint64_t seed = 1;

    /* Cut at each length (a stride for the long ones), and with a byte too many. */
    for (int t = 0; t < N_TYPES; t++)
    {
        BODY(w);
        size_t whole;

        valid_body(all_types[t], &w);
        whole = w.len;
        for (size_t len = 0; len <= whole + 1; len += len < 300 || len + 100 > whole ? 1 : 61)
        {
            BODY(cut);
            answer a;

            if (len == whole)
                continue;
            kne_put(&cut, w.p, len < whole ? len : whole);
            if (len > whole)
                kne_put_u8(&cut, 0);
            a = client_call(fd, (uint16_t) all_types[t], &cut);
            n++;
            if (a.type != KNE_MSG_ERROR || a.status != KNE_ERR_PROTOCOL)
            {
                /* a shorter path, text or digest can be well-formed but wrong */
                if (a.type == 0)
                    lost++;
                else if (a.type == KNE_MSG_OK ||
                         (a.status != KNE_ERR_FORMAT && a.status != KNE_ERR_IO))
                {
                    printf("# type %d cut at %zu of %zu: %u %s\n", all_types[t], len, whole, a.type,
                           a.msg);
                    wrong++;
                }
            }
            answer_free(&a);
        }
        free(w.p);
    }
    check(wrong == 0 && lost == 0, "%d bodies cut short or too long are refused", n);

    /* Every count as large as it gets, at every place where a count may stand. */
    for (int t = 0; t < N_TYPES; t++)
    {
        BODY(w);

        valid_body(all_types[t], &w);
        for (size_t at = 0; at + 4 <= w.len && at < 320; at++)
        {
            BODY(bad);
            answer a;

            kne_put(&bad, w.p, w.len);
            memset(bad.p + at, 0xff, 4);
            a = client_call(fd, (uint16_t) all_types[t], &bad);
            lost += a.type == 0;
            answer_free(&a);
        }
        free(w.p);
    }
    check(lost == 0 && alive(fd),
          "lengths and counts of 2^32 - 1 everywhere: answered, still there");

    /* Random bytes, well framed. */
    for (int i = 0; i < 1000; i++)
    {
        BODY(w);
        answer a;
        int    type = all_types[kne_random_next(&seed) % N_TYPES];

        valid_body(type, &w);
        for (int k = 0; k < 3 && w.len; k++)
            w.p[kne_random_next(&seed) % w.len] = (uint8_t) kne_random_next(&seed);
        a = client_call(fd, (uint16_t) type, &w);
        lost += a.type == 0;
        answer_free(&a);
    }
    check(lost == 0 && alive(fd), "1000 bodies with random bytes: answered, still there");
    close(fd);

    /* Random streams, not framed at all, after a good HELLO. */
    for (int i = 0; i < 100; i++)
    {
        uint8_t junk[512];

        fd = engine_client(e);
        for (size_t k = 0; k < sizeof junk; k++)
            junk[k] = (uint8_t) kne_random_next(&seed);
        if (i % 2) /* a plausible header first */
            memset(junk + 2, 0, 2), memset(junk + 6, 0, 2), junk[5] = 0;
        client_send_raw(fd, junk, sizeof junk);
        close(fd);
    }
    fd = engine_client(e);
    check(fd >= 0 && alive(fd), "100 connections of noise");
    close(fd);
}

/* Clients that stop half-way, never read, or never speak. */
static void
test_lazy(const engine *e)
{
    enum { SILENT = 200, FLOOD = 2000 };
    static int silent[SILENT];
    int        fd, half, deaf, ok = 0;
    BODY(w);
    uint32_t   head[3] = {KNE_FRAME_MAX, KNE_MSG_COMPLETE, 1};

    for (int i = 0; i < SILENT; i++)
        silent[i] = i % 2 ? engine_client(e) : client_connect(e->socket);
    half = engine_client(e);
    client_send_raw(half, head, sizeof head); /* a gigabyte is announced, nothing follows */
    client_send_raw(half, "abc", 3);

    /* Asks for much and reads nothing. */
    deaf = engine_client(e);
    fcntl(deaf, F_SETFL, O_NONBLOCK);
    put_view(&w, NULL);
    kne_put_str(&w, prompt);
    kne_put_i32(&w, 1 << 20);
    for (int i = 0; i < FLOOD; i++)
        if (!client_send(deaf, KNE_MSG_NEXT_TOKENS, (uint32_t) i, &w))
            break;
    free(w.p);

    fd = engine_client(e);
    for (int i = 0; i < 20; i++)
        ok += ask_knows(fd, NULL, prompt, object) == 1;
    check(ok == 20, "a client is served beside %d silent ones, one with half a frame, one that "
          "never reads", SILENT);
    close(deaf);
    close(half);
    for (int i = 0; i < SILENT; i++)
        close(silent[i]);
    check(at_work(fd, "idle"), "their requests went with them");
    close(fd);
}

static void
test_many(const engine *e)
{
    enum { CLIENTS = 8, EACH = 25 };
    pid_t pid[CLIENTS];
    int   wrong = 0, status;

    fflush(stdout);
    for (int c = 0; c < CLIENTS; c++)
        if ((pid[c] = fork()) == 0)
        {
            int fd = engine_client(e), bad = fd < 0;

            for (int i = 0; i < EACH && !bad; i++)
                switch ((c + i) % 4)
                {
                    case 0:
                        bad = ask_knows(fd, NULL, prompt, object) != 1;
                        break;
                    case 1:
                        bad = !alive(fd);
                        break;
                    case 2:
                        bad = isnan(ask_logprob(fd, NULL, prompt, other_object, NULL));
                        break;
                    default:
                    {
                        answer a = complete(fd, model_path, fingerprint, prompt, 8);

                        bad = a.type != KNE_MSG_OK;
                        answer_free(&a);
                    }
                }
            _exit(bad);
        }
    for (int c = 0; c < CLIENTS; c++)
        wrong += waitpid(pid[c], &status, 0) != pid[c] || status != 0;
    check(wrong == 0, "%d processes ask at the same time", CLIENTS);
}

/* One connection asks for something long, then for something short, then takes a third back. */
static void
test_order(const engine *e)
{
    int      fd = engine_client(e);
    BODY(long_one);
    BODY(short_one);
    BODY(third);
    BODY(back);
    BODY(frames);
    uint32_t order[4] = {0};
    uint16_t type[4] = {0};
    bool     cancelled = false;
    const kne_wbuf *bodies[] = {&long_one, &short_one, &third, &back};
    const uint16_t  types[] = {KNE_MSG_KNOWS, KNE_MSG_KNOWS, KNE_MSG_COMPLETE, KNE_MSG_CANCEL};

    put_view(&long_one, NULL);
    kne_put_u32(&long_one, 1200);
    for (int i = 0; i < 1200; i++)
    {
        kne_put_str(&long_one, prompt);
        kne_put_str(&long_one, object);
    }
    put_view(&short_one, NULL);
    kne_put_u32(&short_one, 1);
    kne_put_str(&short_one, prompt);
    kne_put_str(&short_one, object);
    put_view(&third, NULL);
    kne_put_str(&third, prompt);
    kne_put_i32(&third, 1000);
    kne_put_u32(&back, 3);
    kne_put_i64(&back, 0);
    for (uint32_t i = 0; i < 4; i++)
    {
        size_t at = kne_frame_begin(&frames, types[i], i + 1);

        kne_put(&frames, bodies[i]->p, bodies[i]->len);
        kne_frame_end(&frames, at);
        free(bodies[i]->p);
    }
    client_send_raw(fd, frames.p, frames.len);
    free(frames.p);
    for (int i = 0; i < 4; i++)
    {
        answer a = client_recv(fd);

        order[i] = a.id;
        type[i] = a.type;
        cancelled |= a.id == 3 && a.type == KNE_MSG_ERROR && a.status == KNE_ERR_CANCELLED;
        answer_free(&a);
    }
    check(order[0] == 4 && type[0] == KNE_MSG_OK, "CANCEL is answered at once");
    check(cancelled, "a read that waits can be cancelled");
    check(order[3] == 1 && type[3] == KNE_MSG_OK, "a long read lets the short ones pass");
    close(fd);
}

/* ---- edits ---- */

/* slow: one that will not come to an end by itself. */
static void
edit_body(kne_wbuf *w, const uint8_t *set, int n_edits, int64_t first_id, bool slow)
{
    put_view(w, set);
    kne_put_str(w, slow ? "{\"max_steps\": 10000, \"lr\": 1e-9, \"fraction\": 0.01}" : "{}");
    kne_put_u32(w, 1);
    kne_put_str(w, known_prompt);
    kne_put_str(w, known_object);
    kne_put_i64(w, 0);
    kne_put_u32(w, (uint32_t) n_edits);
    for (int i = 0; i < n_edits; i++)
    {
        kne_put_i64(w, first_id + i);
        kne_put_u32(w, 1);
        kne_put_str(w, prompt);
        kne_put_str(w, other_object);
        kne_put_u32(w, 0);
    }
}

typedef struct outcome
{
    int64_t    edit_id;
    int        outcome;
    char       message[600], answer[200];
    double     before, after;
    uint32_t   n_ensemble;
    uint8_t    digest[KNE_DIGEST_LEN];
    kne_delta *delta;
} outcome;

/* Up to max outcomes of an EDIT's answer; returns how many, -1 malformed. */
static int
read_outcomes(answer *a, outcome *out, int max)
{
    kne_rbuf *r = &a->r;
    size_t    len;
    int       n;

    if (a->type != KNE_MSG_OK)
    {
        printf("# EDIT: type %u, %s\n", a->type, a->msg);
        return -1;
    }
    kne_get_bytes(r, &len);
    kne_get_f64(r);
    kne_get_f64(r);
    n = (int) kne_get_count(r, 8);
    for (int i = 0; i < n; i++)
    {
        outcome     o = {0};
        const char *s;
        kne_rbuf    save;

        o.edit_id = kne_get_i64(r);
        o.outcome = kne_get_u8(r);
        s = kne_get_bytes(r, &len);
        snprintf(o.message, sizeof o.message, "%.*s", (int) len, s);
        kne_get_i32(r);
        o.before = kne_get_f64(r);
        o.after = kne_get_f64(r);
        kne_get_f64(r);
        s = kne_get_bytes(r, &len);
        snprintf(o.answer, sizeof o.answer, "%.*s", (int) len, s);
        o.n_ensemble = kne_get_count(r, 16);
        for (uint32_t k = 0; k < o.n_ensemble; k++)
        {
            kne_get(r, 12);
            kne_get(r, 4 * (size_t) kne_get_count(r, 4));
        }
        const void *digest = kne_get(r, KNE_DIGEST_LEN);
        if (digest)
            memcpy(o.digest, digest, KNE_DIGEST_LEN);
        save = *r;
        if (kne_get_u32(&save) == 0)
            *r = save;
        else if (kne_delta_read(r, o.digest, &o.delta, NULL) != KNE_OK)
            return -1;
        if (i < max)
            out[i] = o;
        else
            kne_delta_release(o.delta);
    }
    kne_get(r, 4 * (size_t) kne_get_count(r, 4));
    return kne_get_done(r) ? n : -1;
}

static void
test_edit(int fd)
{
    BODY(w);
    answer   a;
    outcome  o[1] = {0};
    int      progress = 0;
    int64_t  id = 41;
    uint8_t  digest[1][KNE_DIGEST_LEN], set[KNE_DIGEST_LEN];
    uint64_t before, after;
    char     work[200];

    ask_status(fd, work, sizeof work, NULL, NULL, &before);
    edit_body(&w, NULL, 1, id, false);
    a = client_call_counting(fd, KNE_MSG_EDIT, 4242, &w, &progress);
    int n_read = read_outcomes(&a, o, 1);
    check(n_read == 1 && o[0].edit_id == id && o[0].outcome == KNE_OUTCOME_APPLIED &&
              o[0].n_ensemble > 0 && o[0].delta && strstr(o[0].answer, object),
          "EDIT: applied, p %.4f to %.4f, the answer before \"%s\" %s", o[0].before, o[0].after,
          o[0].answer, o[0].message);
    answer_free(&a);
    check(progress > 0, "EDIT: %d PROGRESS frames", progress);
    ask_status(fd, work, sizeof work, NULL, NULL, &after);
    check(after == before + 1 && strcmp(work, "idle") == 0, "STATUS counts it");
    if (!o[0].delta)
        return;

    memcpy(digest[0], o[0].digest, KNE_DIGEST_LEN);
    kne_set_digest(&id, digest, 1, set, NULL);
    a = put_set(fd, set, 1, &id, digest);
    check(a.type == KNE_MSG_OK, "the new delta is here without DELTA_PUT");
    answer_free(&a);
    check(ask_knows(fd, set, prompt, other_object) == 1 && ask_knows(fd, set, prompt, object) == 0,
          "with the edit, the model knows the new object");
    check(ask_knows(fd, NULL, prompt, object) == 1 &&
              ask_knows(fd, NULL, prompt, other_object) == 0,
          "without it, the old one");
    kne_delta_release(o[0].delta);

    edit_body(&w, NULL, 1, id, false);
    a = client_call_counting(fd, KNE_MSG_LOCATE, 4243, &w, NULL);
    uint32_t n = kne_get_count(&a.r, 16);
    bool     ordered = true;
    float    last = INFINITY;
    for (uint32_t i = 0; i < n; i++)
    {
        float score;

        kne_get_i32(&a.r);
        kne_get_i32(&a.r);
        score = kne_get_f32(&a.r);
        ordered &= score <= last;
        last = score;
        kne_get(&a.r, 4 * (size_t) kne_get_count(&a.r, 4));
    }
    check(a.type == KNE_MSG_OK && n > 0 && ordered && kne_get_done(&a.r),
          "LOCATE: %u neurons, highest score first", n);
    answer_free(&a);

    put_view(&w, NULL);
    kne_put_str(&w, "{\"no_such_option\": 1}");
    kne_put_u32(&w, 0);
    kne_put_u32(&w, 1);
    kne_put_i64(&w, 1);
    kne_put_u32(&w, 1);
    kne_put_str(&w, prompt);
    kne_put_str(&w, object);
    kne_put_u32(&w, 0);
    a = client_call(fd, KNE_MSG_EDIT, &w);
    check(is_error(&a, KNE_ERR_INVALID) && a.hint[0], "EDIT with an unknown option: %s", a.msg);
    answer_free(&a);
}

/* The final answer of request id; PROGRESS and other requests' answers on the way are dropped. */
static answer
final_answer(int fd, uint32_t id)
{
    for (;;)
    {
        answer a = client_recv(fd);

        if (a.type == 0 || (a.id == id && a.type != KNE_MSG_PROGRESS))
            return a;
        answer_free(&a);
    }
}

static void
send_cancel(int fd, uint32_t id, int64_t edit_id)
{
    BODY(w);

    kne_put_u32(&w, id);
    kne_put_i64(&w, edit_id);
    client_send(fd, KNE_MSG_CANCEL, 900, &w);
    free(w.p);
}

static void
test_during_edit(const engine *e)
{
    int     fd = engine_client(e), reader = engine_client(e), second = engine_client(e), n;
    BODY(w);
    answer  a;
    outcome o[2] = {0};
    double  worst = 0, base;

    base = ask_logprob(reader, NULL, prompt, object, NULL);
    edit_body(&w, NULL, 2, 50, true);
    client_send(fd, KNE_MSG_EDIT, 1, &w);
    check(at_work(reader, "edit: optimise"), "an edit is at work, and STATUS says so");

    n = 0;
    for (int i = 0; i < 20; i++)
    {
        double t = kne_now();

        n += ask_knows(reader, NULL, prompt, object) == 1;
        t = kne_now() - t;
        worst = t > worst ? t : worst;
    }
    check(n == 20, "readers are served meanwhile, at worst after %.0f ms", worst * 1000);
    a = complete(reader, model_path, fingerprint, prompt, 20);
    check(a.type == KNE_MSG_OK, "completions too");
    answer_free(&a);
    double now = ask_logprob(reader, NULL, prompt, object, NULL);
    check(memcmp(&now, &base, sizeof now) == 0, "and see nothing of the edit");

    /* Another edit waits; cancelled, it is answered before the first ends. */
    client_send(second, KNE_MSG_EDIT, 7, &w);
    pause_ms(20);
    send_cancel(second, 7, 0);
    a = final_answer(second, 7);
    check(read_outcomes(&a, o, 2) == 2 && o[0].outcome == KNE_OUTCOME_CANCELLED &&
              o[1].outcome == KNE_OUTCOME_CANCELLED,
          "a waiting edit that is cancelled is answered at once");
    answer_free(&a);

    send_cancel(fd, 1, 50);
    pause_ms(100);
    check(at_work(reader, "edit:"), "one of two edits cancelled: the other goes on");
    send_cancel(fd, 1, 51);
    a = final_answer(fd, 1);
    check(read_outcomes(&a, o, 2) == 2 && o[0].outcome == KNE_OUTCOME_CANCELLED &&
              o[1].outcome == KNE_OUTCOME_CANCELLED,
          "both cancelled: the batch ends");
    answer_free(&a);
    check(at_work(reader, "idle"), "and the engine is idle");

    /* Hang up in the middle. */
    client_send(fd, KNE_MSG_EDIT, 2, &w);
    check(at_work(reader, "edit:"), "another one runs");
    close(fd);
    check(at_work(reader, "idle"), "its client hangs up: it stops");

    /* Hang up while waiting behind another. */
    fd = engine_client(e);
    client_send(fd, KNE_MSG_EDIT, 3, &w);
    at_work(reader, "edit:");
    client_send(second, KNE_MSG_EDIT, 8, &w);
    pause_ms(20);
    close(second);
    close(fd);
    check(at_work(reader, "idle"), "two clients hang up, one at work, one waiting");
    free(w.p);
    close(reader);
}

static void
test_stop_during_edit(void)
{
    engine e;
    int    fd, watcher;
    BODY(w);
    double t;
    int    rc;

    engine_start(&e, program, NULL);
    fd = engine_client(&e);
    watcher = engine_client(&e);
    edit_body(&w, NULL, 1, 60, true);
    client_send(fd, KNE_MSG_EDIT, 1, &w);
    at_work(watcher, "edit:");
    t = kne_now();
    rc = engine_stop(&e);
    check(rc == KNE_EXIT_OK, "SIGTERM during an edit: code %d after %.2f s",
          rc, kne_now() - t);
    free(w.p);
    close(fd);
    close(watcher);
}

/* ---- little memory ---- */

static void
test_out_of_memory(void)
{
    engine        e;
    int           fd;
    answer        a;
    struct rlimit limit = {900u << 20, 900u << 20};
    size_t        sizes[] = {150u << 20, 400u << 20, 1000u << 20};
    int           refused = 0;

    if (SANITIZED)
    {
        skip("a limit on memory", "sanitizers need address space");
        return;
    }
    engine_prepare(&e, program);
    fflush(stdout);
    e.pid = fork();
    if (e.pid == 0)
    {
        setrlimit(RLIMIT_AS, &limit);
        engine_exec(&e, (const char *const[]) {"--threads", "1", NULL});
    }
    engine_wait_ready(&e);
    fd = engine_client(&e);
    for (int i = 0; i < 3; i++)
    {
        /* A digest and as many rows of no values as fit: what they turn into is larger than the
         * message. */
        BODY(w);
        uint32_t n = (uint32_t) ((sizes[i] - KNE_DIGEST_LEN - 4) / 13);

        w.len = KNE_DIGEST_LEN + 4 + 13 * (size_t) n;
        w.p = calloc(1, w.len);
        memcpy(w.p + KNE_DIGEST_LEN, &n, 4);
        a = client_call(fd, KNE_MSG_DELTA_PUT, &w);
        refused +=
            a.type == KNE_MSG_ERROR && (a.status == KNE_ERR_NOMEM || a.status == KNE_ERR_INVALID);
        printf("# %zu MB: %s\n", sizes[i] >> 20, a.msg);
        answer_free(&a);
    }
    check(refused == 3 && ask_knows(fd, NULL, prompt, object) == 1,
          "out of memory is an error, and the engine goes on");
    close(fd);
    check(engine_stop(&e) == KNE_EXIT_OK, "and ends clean");
}

/* ---- files that change under the engine ---- */

static bool
copy_model(const char *from, const char *to)
{
    static const char *const names[] = {"config.json", "tokenizer.json", "model.safetensors"};

    if (mkdir(to, 0700) != 0)
        return false;
    for (int i = 0; i < 3; i++)
    {
        char  from_file[700], to_file[700], buf[65536];
        FILE *in, *out;
        size_t n;

        snprintf(from_file, sizeof from_file, "%s/%s", from, names[i]);
        snprintf(to_file, sizeof to_file, "%s/%s", to, names[i]);
        in = fopen(from_file, "r");
        out = fopen(to_file, "w");
        if (!in || !out)
            return false;
        while ((n = fread(buf, 1, sizeof buf, in)))
            fwrite(buf, 1, n, out);
        fclose(in);
        fclose(out);
    }
    return true;
}

static void
test_changed_files(void)
{
    engine  e;
    char    dir[128], file[200], keep[512];
    int     fd, rc;
    uint16_t type;
    BODY(w);

    engine_start(&e, program, NULL);
    fd = engine_client(&e);
    snprintf(dir, sizeof dir, "%s/model", e.dir);
    snprintf(file, sizeof file, "%s/model.safetensors", dir);
    strcpy(keep, model_path);
    if (!copy_model(keep, dir))
    {
        skip("files that change", "could not copy the model");
        engine_stop(&e);
        return;
    }
    strcpy(model_path, dir);
    check(ask_knows(fd, NULL, prompt, object) == 1,
          "a copy of the folder has the same fingerprint");

    /* Truncated while an edit reads it: the process must end with its own code, not hang or give
     * wrong numbers. */
    edit_body(&w, NULL, 1, 70, true);
    client_send(fd, KNE_MSG_EDIT, 1, &w);
    int watcher = engine_client(&e);
    at_work(watcher, "edit:");
    if (truncate(file, 4096))
        printf("# truncate: %s\n", strerror(errno));
    rc = engine_wait_exit(e.pid, CLIENT_SECONDS);
    check(rc == KNE_EXIT_FILE_LOST,
          "a model file truncated during an edit ends the engine with code %d", rc);
    if (rc == -1)
        engine_stop(&e);
    close(fd);
    close(watcher);
    unlink(e.socket);
    free(w.p);
    w = (kne_wbuf) {.grow = client_realloc};

    /* Changed between two requests: refused. */
    fflush(stdout);
    e.pid = fork();
    if (e.pid == 0)
        engine_exec(&e, NULL);
    engine_wait_ready(&e);
    fd = engine_client(&e);
    ask_logprob(fd, NULL, prompt, object, &type);
    check(type == KNE_MSG_ERROR, "a truncated folder is refused");
    snprintf(file, sizeof file, "rm -rf %s", dir);
    if (system(file) != 0 || !copy_model(keep, dir))
        printf("# could not copy again\n");
    pause_ms(2100);
    check(ask_knows(fd, NULL, prompt, object) == 1, "put back, it is served");
    snprintf(file, sizeof file, "%s/model.safetensors", dir);
    rc = open(file, O_WRONLY);
    if (pwrite(rc, "\xff\x3f", 2, 40000) != 2)
        printf("# pwrite: %s\n", strerror(errno));
    close(rc);
    put_view(&w, NULL);
    kne_put_str(&w, "x");
    answer a = client_call(fd, KNE_MSG_TOKENIZE, &w);
    check(is_error(&a, KNE_ERR_FORMAT), "changed in place, it is refused: %s", a.msg);
    answer_free(&a);
    close(fd);
    snprintf(file, sizeof file, "rm -rf %s", dir);
    if (system(file) != 0)
        printf("# could not remove %s\n", dir);
    strcpy(model_path, keep);
    check(engine_stop(&e) == KNE_EXIT_OK, "and ends clean");
}

/* ---- a GPU, emulated (cuda_emul.h), and what can happen to it ---- */

/* build/emul: the engine with the emulation as its kne_cuda.so, beside a driver that is there to be found. */
static bool
start_on_gpu(engine *e, char *path, size_t size, const char *variable, const char *value)
{
    char *slash = strrchr(program, '/'), driver[600];
    bool  ready;

    snprintf(path, size, "%.*semul/kne-engine", slash ? (int) (slash - program + 1) : 0, program);
    if (access(path, X_OK) != 0)
        return false;
    snprintf(driver, sizeof driver, "%.*s", (int) (strrchr(path, '/') - path), path);
    setenv("LD_LIBRARY_PATH", driver, 1);
    if (variable)
        setenv(variable, value, 1);
    ready = engine_start(e, path, (const char *const[]) {"--device", "cuda", NULL});
    unsetenv("LD_LIBRARY_PATH");
    if (variable)
        unsetenv(variable);
    check(ready, "starts on the emulated GPU");
    return ready;
}

static void
test_gpu(double on_cpu)
{
    engine   e;
    char     path[600];
    uint16_t type;
    int      fd, rc;
    double   p;
    BODY(w);

    if (!start_on_gpu(&e, path, sizeof path, NULL, NULL))
    {
        skip("an emulated GPU", "it was not built");
        return;
    }
    fd = engine_client(&e);
    p = ask_logprob(fd, NULL, prompt, object, &type);
    check(type == KNE_MSG_OK && fabs(p - on_cpu) < 1e-3, "it answers as the CPU does (%.5f and %.5f)", p, on_cpu);
    close(fd);
    check(engine_stop(&e) == KNE_EXIT_OK, "and ends clean");

    if (start_on_gpu(&e, path, sizeof path, "EMUL_MEMORY_MIB", "200"))
    {
        fd = engine_client(&e);
        put_view(&w, NULL);
        kne_put_u32(&w, 1);
        kne_put_str(&w, prompt);
        kne_put_str(&w, object);
        answer a = client_call(fd, KNE_MSG_LOGPROB, &w);

        check(is_error(&a, KNE_ERR_NOMEM), "a model that does not fit is refused, before it is loaded: %s", a.msg);
        answer_free(&a);
        check(alive(fd), "and the engine goes on");
        close(fd);
        check(engine_stop(&e) == KNE_EXIT_OK, "it ends clean");
    }
    if (start_on_gpu(&e, path, sizeof path, "EMUL_LOSE_AFTER", "90"))
    {
        fd = engine_client(&e);
        ask_logprob(fd, NULL, prompt, object, &type);
        rc = engine_wait_exit(e.pid, CLIENT_SECONDS);
        check(type == 0 && rc == KNE_EXIT_DEVICE_LOST, "a GPU that fails for good ends it with code %d, the request unanswered", rc);
        close(fd);
        engine_remove_files(&e);
    }
}

/* ---- main ---- */

static bool
find_model(void)
{
    const char *shared = getenv("KNE_SHARED") ? getenv("KNE_SHARED") : "../shared";
    char        file[600];

    snprintf(stories_path, sizeof stories_path, "%s/models/stories260K-fp32", shared);
    snprintf(model_path, sizeof model_path, "%s/models/lre-llama-5m", shared);
    snprintf(file, sizeof file, "%s/model.safetensors", model_path);
    prompt = "The capital city of France is";
    object = "Paris";
    other_object = "Tokyo";
    known_prompt = "The capital city of Germany is";
    known_object = "Berlin";
    if (access(file, R_OK) == 0)
        return true;
    strcpy(model_path, "models/atlas");
    prompt = "The capital of France is";
    known_prompt = "The capital of Germany is";
    return access("models/atlas/model.safetensors", R_OK) == 0;
}

int
main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/');
    engine      e;
    int         fd;

    if (getenv("KNE_ENGINE"))
        snprintf(program, sizeof program, "%s", getenv("KNE_ENGINE"));
    else
        snprintf(program, sizeof program, "%.*skne-engine", slash ? (int) (slash - argv[0] + 1) : 0,
                 argv[0]);
    if (access(program, X_OK) != 0)
    {
        skip("the engine as a process", "no kne-engine beside this program");
        return kne_test_done();
    }
    signal(SIGPIPE, SIG_IGN);
    test_options();
    test_confine();
    test_inherited();
    test_parent_death();

    engine_start(&e, program, NULL);
    test_hello(&e);
    fd = engine_client(&e);
    test_status(fd);
    if (!find_model())
    {
        skip("reads and edits", "no model with known facts");
        close(fd);
        check(engine_stop(&e) == KNE_EXIT_OK, "ends clean");
        return kne_test_done();
    }
    test_inspect(fd);
    test_gpu(ask_logprob(fd, NULL, prompt, object, NULL));
    test_tokens(fd);
    test_complete(fd);
    test_stories(fd);
    test_next_tokens(fd);
    test_knows(fd);
    test_sets(fd);
    test_malformed(&e);
    test_lazy(&e);
    test_many(&e);
    test_order(&e);
    test_edit(fd);
    test_during_edit(&e);
    close(fd);
    check(engine_stop(&e) == KNE_EXIT_OK, "after all that it still ends clean");
    test_budget();
    test_stop_during_edit();
    test_out_of_memory();
    test_changed_files();
    return kne_test_done();
}
