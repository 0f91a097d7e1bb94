/*
 * test_pool.c - the thread pool: every task runs once, on a thread of its own
 * number, with all signals blocked; short jobs in a row, long ones, parked
 * threads, more threads than cores.
 */
#include "kne_pool.h"
#include "kne_test.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_TASKS = 5000 };

typedef struct job
{
    _Atomic int ran[MAX_TASKS];
    _Atomic int bad_thread, unblocked;
    int         size;
    pthread_t   caller;
    int64_t     sum[MAX_TASKS];
    int         sleep_us;
} job;

static void
task(void *ctx, int64_t i, int thread)
{
    job     *j = ctx;
    sigset_t set;

    j->ran[i]++;
    if (thread < 0 || thread >= j->size || (thread == 0) != (pthread_equal(pthread_self(), j->caller) != 0))
        j->bad_thread++;
    if (thread != 0)
    {
        pthread_sigmask(SIG_SETMASK, NULL, &set);
        for (int s = 1; s < 32; s++)
            if (s != SIGKILL && s != SIGSTOP && s != SIGBUS && !sigismember(&set, s))
                j->unblocked++;
    }
    if (j->sleep_us)
        usleep((useconds_t) j->sleep_us);
    j->sum[i] = i * i;
}

/* Whether a job of n tasks runs each once, and all are visible afterwards. */
static bool
run(kne_pool *pool, int64_t n, int sleep_us)
{
    static job j;
    bool       ok = true;

    memset(&j, 0, sizeof(j));
    j.size = kne_pool_size(pool);
    j.caller = pthread_self();
    j.sleep_us = sleep_us;
    kne_pool_run(pool, task, &j, n);
    for (int64_t i = 0; i < MAX_TASKS; i++)
        ok &= j.ran[i] == (i < n) && j.sum[i] == (i < n ? i * i : 0);
    return ok && j.bad_thread == 0 && j.unblocked == 0;
}

static void
count(void *ctx, int64_t i, int thread)
{
    atomic_fetch_add((_Atomic int64_t *) ctx, i + 1);
}

int
main(void)
{
    static const int sizes[] = {1, 2, 3, 9};
    kne_pool        *pool;
    kne_err          err;
    sigset_t         before, after; /* libc fills only a part of them */

    memset(&before, 0, sizeof(before));
    memset(&after, 0, sizeof(after));
    check(kne_pool_new(-1, &pool, &err) == KNE_ERR_INVALID && pool == NULL, "a negative size: %s", err.msg);
    check(kne_pool_new(100000, &pool, &err) == KNE_ERR_INVALID && pool == NULL, "too many: %s", err.msg);
    check(run(NULL, 100, 0) && kne_pool_size(NULL) == 1, "no pool: all on the caller");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
    {
        bool            ok = true;
        _Atomic int64_t sum = 0;

        pthread_sigmask(SIG_SETMASK, NULL, &before);
        if (!check(kne_pool_new(sizes[i], &pool, &err) == KNE_OK && kne_pool_size(pool) == sizes[i],
                   "a pool of %d", sizes[i]))
            continue;
        pthread_sigmask(SIG_SETMASK, NULL, &after);
        check(memcmp(&before, &after, sizeof(before)) == 0, "%d threads: the caller's signals as before",
              sizes[i]);
        for (int64_t n = 0; n < 60; n++)
            ok &= run(pool, n, 0);
        check(ok && run(pool, MAX_TASKS, 0), "%d threads: each task once", sizes[i]);
        usleep(20000);
        check(run(pool, 7, 0), "%d threads: after being parked", sizes[i]);
        check(run(pool, 12, 3000), "%d threads: long tasks", sizes[i]);
        for (int64_t k = 0; k < 20000; k++)
        {
            if (k % 500 == 0)
                usleep(200); /* threads park between some jobs */
            kne_pool_run(pool, count, &sum, 1 + k % 5);
        }
        check(sum == 20000 / 5 * (1 + 3 + 6 + 10 + 15), "%d threads: 20000 short jobs", sizes[i]);
        kne_pool_free(pool);
    }
    check(kne_pool_new(0, &pool, &err) == KNE_OK && kne_pool_size(pool) >= 1, "as many as cores");
    kne_pool_free(pool);
    kne_pool_free(NULL);
    return kne_test_done();
}
