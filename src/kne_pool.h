/*
 * kne_pool.h - the engine's thread pool: all signals but SIGBUS blocked in its threads,
 * parked on a condition variable when idle, never OpenMP.
 */
#ifndef KNE_POOL_H
#define KNE_POOL_H

#include "kne_base.h"

typedef struct kne_pool kne_pool;

/* n_threads includes the caller's; 0: one a core that this process may use. */
kne_status kne_pool_new(int n_threads, kne_pool **out, kne_err *err);
void       kne_pool_free(kne_pool *pool);
int        kne_pool_size(const kne_pool *pool);

/*
 * Run fn(ctx, task, thread) for task 0..n_tasks-1 on all threads, the caller's
 * among them; returns when all are done. One caller at a time. pool NULL: all on
 * the caller. Which thread runs a task is not determined: results must not depend on it.
 */
void kne_pool_run(kne_pool *pool, void (*fn)(void *ctx, int64_t task, int thread), void *ctx,
                  int64_t n_tasks);

#endif
