/*
 * kne_error.c - the error record of src/kne_base.h for kne.so, which shares kne_options.c with the engine but not
 * kne_base.c (that one needs libcrypto).
 */
#include "postgres.h"

#include <stdarg.h>

#include "../src/kne_base.h"

kne_status
kne_error(kne_err *err, kne_status code, const char *fmt, ...)
{
    va_list ap;

    if (err == NULL)
        return code;
    err->code = code;
    err->detail[0] = err->hint[0] = '\0';
    va_start(ap, fmt);
    vsnprintf(err->msg, sizeof err->msg, fmt, ap);
    va_end(ap);
    return code;
}

void
kne_error_detail(kne_err *err, const char *fmt, ...)
{
    va_list ap;

    if (err == NULL)
        return;
    va_start(ap, fmt);
    vsnprintf(err->detail, sizeof err->detail, fmt, ap);
    va_end(ap);
}

void
kne_error_hint(kne_err *err, const char *fmt, ...)
{
    va_list ap;

    if (err == NULL)
        return;
    va_start(ap, fmt);
    vsnprintf(err->hint, sizeof err->hint, fmt, ap);
    va_end(ap);
}
