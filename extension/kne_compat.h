/*
 * kne_compat.h - every PG_VERSION_NUM condition of kne.so (15 to 18).
 */
#ifndef KNE_COMPAT_H
#define KNE_COMPAT_H

#include "postgres.h"

#include "storage/proc.h"

#if PG_VERSION_NUM < 150000
#error "kne needs PostgreSQL 15 or newer"
#endif

/* v16 moved the VARDATA family out of postgres.h. */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/* v17 put the local transaction id into a struct. It differs from transaction to transaction of a backend. */
#if PG_VERSION_NUM >= 170000
#define KNE_LXID (MyProc->vxid.lxid)
#else
#define KNE_LXID (MyProc->lxid)
#endif

#endif
