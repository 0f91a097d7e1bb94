/*
 * test_edit_nomem.h - part of test_edit.c: memory that runs out at every allocation
 * of a job in turn, once or for good. It must end with a status, leak nothing
 * and leave nothing wrong in the cache.
 *
 * glibc lets a program define malloc over __libc_malloc. A sanitizer or valgrind wants malloc
 * for itself: build with -DKNE_TEST_WRAP -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc then.
 */
#ifndef TEST_EDIT_NOMEM_H
#define TEST_EDIT_NOMEM_H

#include "test_edit_world.h"

#include <errno.h>

static long nomem_at = -1, nomem_seen; /* which allocation fails, counted from 0; -1: none */
static bool nomem_for_good;

static bool
nomem(void)
{
    if (nomem_at < 0)
        return false;
    long n = __atomic_fetch_add(&nomem_seen, 1, __ATOMIC_RELAXED);

    if (n == nomem_at || (nomem_for_good && n > nomem_at))
    {
        errno = ENOMEM;
        return true;
    }
    return false;
}

#if defined(KNE_TEST_WRAP)
#define NOMEM_OUTER(name) __wrap_##name
#define NOMEM_INNER(name) __real_##name
#elif defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NOMEM_OUTER(name) name
#define NOMEM_INNER(name) __libc_##name
#endif

#ifdef NOMEM_OUTER
extern void *NOMEM_INNER(malloc)(size_t);
extern void *NOMEM_INNER(calloc)(size_t, size_t);
extern void *NOMEM_INNER(realloc)(void *, size_t);
void *NOMEM_OUTER(malloc)(size_t n);
void *NOMEM_OUTER(calloc)(size_t n, size_t size);
void *NOMEM_OUTER(realloc)(void *p, size_t n);

void *
NOMEM_OUTER(malloc)(size_t n)
{
    return nomem() ? NULL : NOMEM_INNER(malloc)(n);
}

void *
NOMEM_OUTER(calloc)(size_t n, size_t size)
{
    return nomem() ? NULL : NOMEM_INNER(calloc)(n, size);
}

void *
NOMEM_OUTER(realloc)(void *p, size_t n)
{
    return nomem() ? NULL : NOMEM_INNER(realloc)(p, n);
}
#endif

static void
test_nomem(bool for_good, bool locate)
{
#ifndef NOMEM_OUTER
    skip("memory that runs out", "malloc is not ours here");
#else
    world                *w = world_new(&tiny_specs[2], 73);
    kne_edit_job          job = job_of(w, 2);
    struct kne_ref_cache *cache = NULL;
    kne_backend          *both = be, *one = NULL;
    kne_edit_result      *fresh = NULL, *r;
    kne_err               err;
    bool                  fine = true;
    long                  at = 0, refused = 0;

    /* one thread: what allocates is this one */
    ok(kne_cpu_backend_new(1, getenv("KNE_TEST_ISA"), &one, &err), &err);
    job.backend = be = one;
    job.n_known = 12;
    for (int i = 0; i < 2; i++)
        w->edit[i].n_anchors = 1;
    job.options.tokens = KNE_TOKENS_CURRENT;
    job.options.reference = 4;
    job.options.max_steps = 60;
    if (locate)
        job.n_edits = 1;
    ok((locate ? kne_locate_run : kne_edit_run)(&job, &fresh, &err), &err);
    ok(kne_ref_cache_new(&cache, &err), &err);
    job.cache = cache;
    for (; fine; at++)
    {
        r = NULL;
        nomem_seen = 0;
        nomem_for_good = for_good;
        nomem_at = at;
        kne_status st = (locate ? kne_locate_run : kne_edit_run)(&job, &r, &err);
        bool       past = nomem_seen <= at;

        nomem_at = -1;
        refused += st != KNE_OK;
        /* a library may do without what it asked for; then the result is whole */
        fine = st == KNE_OK ? r && same_deltas(r, fresh) : st == KNE_ERR_NOMEM && !r;
        if (!fine)
        {
            printf("# allocation %ld: status %d, %s\n", at, st,
                   st == KNE_OK ? "another result" : err.msg);
            describe(r);
        }
        kne_edit_result_free(r);
        if (past)
            break;
    }
    check(fine && refused > 20, "%s: memory that runs out%s at any of %ld allocations is a status",
          locate ? "locate" : "edit", for_good ? " for good" : "", at);
    r = NULL;
    check(ok((locate ? kne_locate_run : kne_edit_run)(&job, &r, &err), &err) &&
              same_deltas(r, fresh),
          "and with the cache that is left, the result of a fresh one");
    kne_edit_result_free(r);
    kne_edit_result_free(fresh);
    kne_ref_cache_free(cache);
    be = both;
    kne_cpu_backend_free(one);
    world_free(w);
#endif
}

#endif
