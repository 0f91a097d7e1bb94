/*
 * kne_test.h - the few lines that engine tests share. A test program prints
 * one line a check in TAP ("ok 1 - name", "not ok 2 - name", "ok 3 # SKIP why")
 * and its plan at the end; main returns kne_test_done().
 */
#ifndef KNE_TEST_H
#define KNE_TEST_H

#include <stdarg.h>
#include <stdio.h>

static int kne_test_count, kne_test_failed;

static inline int __attribute__((format(printf, 2, 3)))
check(int ok, const char *fmt, ...)
{
    va_list ap;

    printf("%sok %d - ", ok ? "" : "not ", ++kne_test_count);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    putchar('\n');
    fflush(stdout);
    kne_test_failed += !ok;
    return ok;
}

static inline void
skip(const char *name, const char *why)
{
    printf("ok %d - %s # SKIP %s\n", ++kne_test_count, name, why);
}

static inline int
kne_test_done(void)
{
    printf("1..%d\n", kne_test_count);
    return kne_test_failed != 0;
}

#endif
