/*
 * kne_compat.h - every PG_VERSION_NUM condition of kne.so (15 to 18).
 */
#ifndef KNE_COMPAT_H
#define KNE_COMPAT_H

#include "postgres.h"

#include "fmgr.h"
#include "storage/proc.h"

#if PG_VERSION_NUM < 150000
#error "kne needs PostgreSQL 15 or newer"
#endif

/*
 * kne.so is compiled with hidden visibility, so that it exports what the server calls and nothing else.
 * Before v16 the headers did not mark that.
 */
#if PG_VERSION_NUM < 160000
#undef PGDLLEXPORT
#define PGDLLEXPORT __attribute__((visibility("default")))
#undef PG_FUNCTION_INFO_V1
#define PG_FUNCTION_INFO_V1(funcname)                                               \
    extern PGDLLEXPORT Datum funcname(PG_FUNCTION_ARGS);                            \
    extern PGDLLEXPORT const Pg_finfo_record *CppConcat(pg_finfo_, funcname)(void); \
    const Pg_finfo_record *CppConcat(pg_finfo_, funcname)(void)                     \
    {                                                                               \
        static const Pg_finfo_record my_finfo = {1};                                \
        return &my_finfo;                                                           \
    }                                                                               \
    extern int no_such_variable
#endif

/* v16 moved the VARDATA family out of postgres.h. */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/* v18's spelling. */
#if PG_VERSION_NUM < 180000
#define pg_noreturn __attribute__((noreturn))
#endif

/* v17 put the local transaction id into a struct. It differs from transaction to transaction of a backend. */
#if PG_VERSION_NUM >= 170000
#define KNE_LXID (MyProc->vxid.lxid)
#else
#define KNE_LXID (MyProc->lxid)
#endif

#endif
