/*
 * worker_sql.c - how the editing worker uses SQL: short transactions as the extension's owner, kept plans, a few
 * conversions.
 *
 * The worker's session is the bootstrap superuser's, so it must not run what others wrote: names resolve in
 * pg_catalog only, and statements run as the extension's owner, whose tables they are. (Not as a
 * security-restricted operation: kne's own time stamps are set by a deferred trigger, which that forbids.)
 *
 * lock_timeout is what makes "never waits for a lock that a user holds" true for every lock, those of
 * foreign keys and deferred triggers included: whoever gets 55P03 tries again later.
 */
#include "postgres.h"

#include <math.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "kne_proc.h"

#define MAX_PLANS 96

static Oid           owner = InvalidOid;
static MemoryContext callers = NULL;
static Oid           save_userid;
static int           save_sec_context;

/* What ALTER DATABASE or ALTER ROLE ... SET may have chosen for people must not decide how the worker works. */
void
kne_worker_settings(void)
{
    static const char *const fixed[][2] = {
        {"role", "none"},
        {"exit_on_error", "off"},
        {"search_path", "pg_catalog, pg_temp"},
        {"lock_timeout", "100ms"},
        {"statement_timeout", "0"},
        {"idle_in_transaction_session_timeout", "0"},
        {"idle_session_timeout", "0"},
        {"transaction_timeout", "0"}, /* from v17 on */
        {"default_transaction_isolation", "read committed"},
        {"default_transaction_read_only", "off"},
        {"default_transaction_deferrable", "off"},
        {"session_replication_role", "origin"},
        {"row_security", "on"},
        {"jit", "off"},
        {"max_parallel_workers_per_gather", "0"},
        {"extra_float_digits", "1"},
    };
    size_t i;

    for (i = 0; i < lengthof(fixed); i++)
        if (GetConfigOption(fixed[i][0], true, false))
            SetConfigOption(fixed[i][0], fixed[i][1], PGC_SUSET, PGC_S_OVERRIDE);
}

void
kne_begin(void)
{
    callers = CurrentMemoryContext;
    SetCurrentStatementStartTimestamp();
    StartTransactionCommand();
    if (SPI_connect() != SPI_OK_CONNECT)
        elog(ERROR, "SPI_connect failed");
    PushActiveSnapshot(GetTransactionSnapshot());
    GetUserIdAndSecContext(&save_userid, &save_sec_context);
    if (OidIsValid(owner))
        SetUserIdAndSecContext(owner, save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
    MemoryContextSwitchTo(callers);
}

void
kne_commit(void)
{
    SPI_finish();
    PopActiveSnapshot();
    /* Deferred triggers run inside, as the owner too. */
    CommitTransactionCommand();
    SetUserIdAndSecContext(save_userid, save_sec_context);
    pgstat_report_stat(false);
    MemoryContextSwitchTo(callers);
}

void
kne_abort(MemoryContext mcxt)
{
    AbortCurrentTransaction(); /* puts the identity back, ends SPI */
    pgstat_report_stat(false);
    MemoryContextSwitchTo(mcxt);
}

bool
kne_extension_present(void)
{
    static const char sql[] = "SELECT extowner::int8 FROM pg_catalog.pg_extension WHERE extname = 'kne'"
        " AND pg_catalog.to_regclass('kne.edit_request') IS NOT NULL";

    if (kne_sql(sql, 0, NULL, NULL, NULL) == 0)
        return false;
    kne_require_version();
    owner = (Oid) kne_sql_int8(0, 1);
    SetUserIdAndSecContext(owner, save_sec_context | SECURITY_LOCAL_USERID_CHANGE);
    return true;
}

uint64
kne_sql(const char *sql, int nargs, const Oid *types, Datum *values, const char *nulls)
{
    static struct
    {
        const char *sql;
        SPIPlanPtr  plan;
    }             known[MAX_PLANS];
    static int    n_known = 0;
    MemoryContext caller = CurrentMemoryContext; /* SPI leaves its own behind */
    int           i, rc;

    for (i = 0; i < n_known; i++)
        if (known[i].sql == sql)
            break;
    if (i == n_known)
    {
        SPIPlanPtr plan = SPI_prepare(sql, nargs, unconstify(Oid *, types));

        if (plan == NULL)
            elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
        if (n_known == MAX_PLANS)
            elog(ERROR, "too many statements");
        SPI_keepplan(plan);
        known[i].sql = sql;
        known[i].plan = plan;
        n_known++;
    }
    rc = SPI_execute_plan(known[i].plan, values, nulls, false, 0);
    MemoryContextSwitchTo(caller);
    if (rc < 0)
        elog(ERROR, "SPI_execute_plan: %s", SPI_result_code_string(rc));
    return SPI_processed;
}

int64
kne_sql_int8(uint64 row, int col)
{
    bool  isnull;
    Datum d = SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, &isnull);

    if (isnull)
        return 0;
    return SPI_gettypeid(SPI_tuptable->tupdesc, col) == INT4OID ? DatumGetInt32(d) : DatumGetInt64(d);
}

char *
kne_sql_text(uint64 row, int col)
{
    return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col);
}

TimestampTz
kne_sql_time(uint64 row, int col)
{
    bool  isnull;
    Datum d = SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, &isnull);

    return isnull ? 0 : DatumGetTimestampTz(d);
}

/* ---- arrays ---- */

static Datum
plain_array(const void *v, int n, size_t size, Oid type)
{
    size_t     bytes = ARR_OVERHEAD_NONULLS(1) + n * size;
    ArrayType *a;

    if (n == 0)
        return PointerGetDatum(construct_empty_array(type));
    a = palloc0(bytes);
    SET_VARSIZE(a, bytes);
    a->ndim = 1;
    a->dataoffset = 0;
    a->elemtype = type;
    ARR_DIMS(a)[0] = n;
    ARR_LBOUND(a)[0] = 1;
    memcpy((char *) a + ARR_OVERHEAD_NONULLS(1), v, n * size);
    return PointerGetDatum(a);
}

Datum
kne_int8_array(const int64 *v, int n)
{
    return plain_array(v, n, sizeof(int64), INT8OID);
}

Datum
kne_int4_array(const int32 *v, int n)
{
    return plain_array(v, n, sizeof(int32), INT4OID);
}

Datum
kne_float4_array(const float4 *v, int n)
{
    return plain_array(v, n, sizeof(float4), FLOAT4OID);
}

/* ---- JSON ---- */

static void
json_key(StringInfo s, const char *key)
{
    appendStringInfoString(s, s->len > 1 ? ", " : "");
    escape_json(s, key);
    appendStringInfoString(s, ": ");
}

void
kne_json_open(StringInfo s)
{
    initStringInfo(s);
    appendStringInfoChar(s, '{');
}

void
kne_json_text(StringInfo s, const char *key, const char *value)
{
    if (!value)
        return;
    json_key(s, key);
    escape_json(s, value);
}

void
kne_json_number(StringInfo s, const char *key, double value)
{
    json_key(s, key);
    if (isfinite(value))
        appendStringInfo(s, "%.6g", value);
    else
        appendStringInfoString(s, "null");
}

void
kne_json_int(StringInfo s, const char *key, int64 value)
{
    json_key(s, key);
    appendStringInfo(s, INT64_FORMAT, value);
}

char *
kne_json_close(StringInfo s)
{
    appendStringInfoChar(s, '}');
    return s->data;
}
