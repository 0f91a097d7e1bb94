/*
 * version.c - do the library that is loaded and the objects of this database fit together?
 *
 * A newer library serves the objects of every earlier version. An older one does not know what newer objects mean: a server has it
 * that was not restarted after its package was upgraded, until then it refuses to work here.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/pg_extension.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"

#include "../src/kne_protocol.h"
#include "kne_ext.h"

/* "1.2.3" as a number, missing parts are 0. */
static int64
number_of(const char *version)
{
    int part[3] = {0, 0, 0};

    sscanf(version, "%6d.%6d.%6d", &part[0], &part[1], &part[2]);
    return ((int64) part[0] * 1000000 + part[1]) * 1000000 + part[2];
}

/* extversion of kne in this database, NULL without it. */
static char *
objects_version(void)
{
    Relation    rel = table_open(ExtensionRelationId, AccessShareLock);
    ScanKeyData key;
    SysScanDesc scan;
    HeapTuple   tuple;
    Datum       version = 0;
    bool        isnull = true;
    char       *said = NULL;

    ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ, CStringGetDatum("kne"));
    scan = systable_beginscan(rel, ExtensionNameIndexId, true, NULL, 1, &key);
    tuple = systable_getnext(scan);
    if (HeapTupleIsValid(tuple))
        version = heap_getattr(tuple, Anum_pg_extension_extversion, RelationGetDescr(rel), &isnull);
    if (!isnull)
        said = TextDatumGetCString(version);
    systable_endscan(scan);
    table_close(rel, AccessShareLock);
    return said;
}

void
kne_require_version(void)
{
    static bool fits = false; /* once it does, for the life of the session: objects may be updated under it, as under any session */
    char       *objects;

    if (fits || !IsTransactionState())
        return;
    objects = objects_version();
    if (objects && number_of(objects) > number_of(KNE_ENGINE_VERSION))
        ereport(ERROR,
                (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                 errmsg("the library of kne is older than its objects in this database"),
                 errdetail("The server has loaded version %s, the extension is of version %s.", KNE_ENGINE_VERSION, objects),
                 errhint("Install the newer version if it is not, and restart the server.")));
    fits = true;
}
