/*
 * kne_pool.c - the thread pool.
 *
 * One 64-bit word holds (job number, tasks unclaimed); a task is claimed by
 * counting it down with compare-and-swap. A claim that succeeds proves that the
 * job read before is still the current one: the caller cannot leave, nor set up
 * another job, while a task is unclaimed. So a thread that wakes late finds
 * nothing and nobody waits for it. Idle threads spin for some microseconds (the ops of one
 * step follow each other closely), then park on a condition variable.
 */
#include "kne_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#define POOL_MAX_THREADS 256
#define POOL_MAX_TASKS   ((int64_t) 1 << 30)
#define POOL_SPIN_SEC    20e-6

typedef void (*pool_fn)(void *ctx, int64_t task, int thread);

typedef struct pool_thread
{
    pthread_t id;
    kne_pool *pool;
    int       index; /* 0 is the caller's */
} pool_thread;

struct kne_pool
{
    _Alignas(64) _Atomic uint64_t head; /* job << 32 | tasks unclaimed */
    /* The job; stable while a task of it is unclaimed or running. */
    _Atomic(pool_fn) fn;
    _Atomic(void *)  ctx;
    _Atomic uint32_t n_tasks;
    _Atomic int64_t  base; /* task number of index 0 */

    _Alignas(64) _Atomic uint32_t done; /* tasks of this job that are finished */

    _Alignas(64) pthread_mutex_t lock;
    pthread_cond_t wake;     /* threads wait here for a job */
    pthread_cond_t finished; /* the caller waits here for the last task */
    _Atomic int    parked;
    _Atomic int    caller_waits;
    _Atomic int    stop;

    int         n_threads; /* with the caller's */
    int         n_started;
    pool_thread thread[];
};

static inline void
cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Claim and run tasks until the current job has none left. */
static void
pool_work(kne_pool *p, int thread)
{
    uint64_t head = atomic_load(&p->head);

    for (;;)
    {
        pool_fn  fn = atomic_load_explicit(&p->fn, memory_order_relaxed);
        void    *ctx = atomic_load_explicit(&p->ctx, memory_order_relaxed);
        int64_t  base = atomic_load_explicit(&p->base, memory_order_relaxed);
        uint32_t n = atomic_load_explicit(&p->n_tasks, memory_order_relaxed);
        uint32_t left = (uint32_t) head;

        if (left == 0)
            return;
        if (!atomic_compare_exchange_weak(&p->head, &head, head - 1))
            continue;
        fn(ctx, base + (n - left), thread);
        if (atomic_fetch_add(&p->done, 1) + 1 == n && atomic_load(&p->caller_waits))
        {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->finished);
            pthread_mutex_unlock(&p->lock);
        }
        head = atomic_load(&p->head);
    }
}

static void *
pool_main(void *arg)
{
    pool_thread *self = arg;
    kne_pool    *p = self->pool;
    uint32_t     seen = 0; /* the job last worked on */

    while (!atomic_load(&p->stop))
    {
        uint32_t job = (uint32_t) (atomic_load(&p->head) >> 32);

        if (job == seen)
        {
            double until = kne_now() + POOL_SPIN_SEC;

            do
            {
                for (int i = 0; i < 32 && job == seen; i++)
                {
                    cpu_relax();
                    job = (uint32_t) (atomic_load(&p->head) >> 32);
                }
            } while (job == seen && !atomic_load(&p->stop) && kne_now() < until);
        }
        if (job == seen)
        {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->parked, 1);
            while (!atomic_load(&p->stop) && (uint32_t) (atomic_load(&p->head) >> 32) == seen)
                pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->parked, 1);
            pthread_mutex_unlock(&p->lock);
            job = (uint32_t) (atomic_load(&p->head) >> 32);
            if (job == seen)
                continue; /* stopped */
        }
        pool_work(p, self->index);
        seen = job;
    }
    return NULL;
}

static int
pool_cores(void)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) != 0)
        return 1;
    return CPU_COUNT(&set);
}

kne_status
kne_pool_new(int n_threads, kne_pool **out, kne_err *err)
{
    kne_pool *p;
    sigset_t  all, old;
    int       rc = 0;

    *out = NULL;
    if (n_threads < 0 || n_threads > POOL_MAX_THREADS)
        return kne_error(err, KNE_ERR_INVALID, "number of threads %d is not between 0 and %d",
                         n_threads, POOL_MAX_THREADS);
    if (n_threads == 0)
    {
        n_threads = pool_cores();
        if (n_threads > POOL_MAX_THREADS)
            n_threads = POOL_MAX_THREADS;
        if (n_threads < 1)
            n_threads = 1;
    }
    {
        size_t size = sizeof(*p) + (size_t) n_threads * sizeof(pool_thread);

        p = aligned_alloc(64, (size + 63) / 64 * 64);
    }
    if (p == NULL)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory for the thread pool");
    atomic_init(&p->head, 0);
    atomic_init(&p->fn, NULL);
    atomic_init(&p->ctx, NULL);
    atomic_init(&p->n_tasks, 0);
    atomic_init(&p->base, 0);
    atomic_init(&p->done, 0);
    atomic_init(&p->parked, 0);
    atomic_init(&p->caller_waits, 0);
    atomic_init(&p->stop, 0);
    p->n_threads = n_threads;
    p->n_started = 0;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->finished, NULL);

    /* The threads inherit the mask: signals are the main thread's business, but for a fault of their own
     * (a model file truncated under its map), whose handler must run where it happens. */
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 1; i < n_threads && rc == 0; i++)
    {
        p->thread[i].pool = p;
        p->thread[i].index = i;
        rc = pthread_create(&p->thread[i].id, NULL, pool_main, &p->thread[i]);
        if (rc == 0)
            p->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc != 0)
    {
        kne_pool_free(p);
        return kne_error(err, KNE_ERR_NOMEM, "could not start a thread: error %d", rc);
    }
    *out = p;
    return KNE_OK;
}

void
kne_pool_free(kne_pool *p)
{
    if (p == NULL)
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->stop, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i <= p->n_started; i++)
        pthread_join(p->thread[i].id, NULL);
    pthread_cond_destroy(&p->finished);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

int
kne_pool_size(const kne_pool *p)
{
    return p == NULL ? 1 : p->n_threads;
}

static void
pool_run_part(kne_pool *p, pool_fn fn, void *ctx, int64_t base, uint32_t n)
{
    uint32_t job = (uint32_t) (atomic_load_explicit(&p->head, memory_order_relaxed) >> 32) + 1;

    atomic_store_explicit(&p->fn, fn, memory_order_relaxed);
    atomic_store_explicit(&p->ctx, ctx, memory_order_relaxed);
    atomic_store_explicit(&p->base, base, memory_order_relaxed);
    atomic_store_explicit(&p->n_tasks, n, memory_order_relaxed);
    atomic_store_explicit(&p->done, 0, memory_order_relaxed);
    atomic_store(&p->head, (uint64_t) job << 32 | n);
    if (atomic_load(&p->parked) > 0)
    {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    pool_work(p, 0);

    /* The others' last tasks: usually a matter of microseconds. */
    for (int i = 0; i < 256; i++)
    {
        if (atomic_load(&p->done) == n)
            return;
        cpu_relax();
    }
    {
        double until = kne_now() + POOL_SPIN_SEC;

        while (kne_now() < until)
        {
            if (atomic_load(&p->done) == n)
                return;
            cpu_relax();
        }
    }
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->caller_waits, 1);
    while (atomic_load(&p->done) != n)
        pthread_cond_wait(&p->finished, &p->lock);
    atomic_store(&p->caller_waits, 0);
    pthread_mutex_unlock(&p->lock);
}

void
kne_pool_run(kne_pool *p, pool_fn fn, void *ctx, int64_t n_tasks)
{
    if (p == NULL || p->n_started == 0 || n_tasks <= 1)
    {
        for (int64_t i = 0; i < n_tasks; i++)
            fn(ctx, i, 0);
        return;
    }
    for (int64_t base = 0; base < n_tasks; base += POOL_MAX_TASKS)
    {
        int64_t left = n_tasks - base;

        pool_run_part(p, fn, ctx, base, (uint32_t) (left < POOL_MAX_TASKS ? left : POOL_MAX_TASKS));
    }
}
