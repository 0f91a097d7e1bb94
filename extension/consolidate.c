/*
 * consolidate.c - asking for a consolidation, and changing one's mind. The worker does it: worker_consolidate.c.
 */
#include "kne_sql.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(kne_consolidate);
PG_FUNCTION_INFO_V1(kne_cancel_consolidation);

void
kne_no_such_consolidation(int64 consolidation_id)
{
    ereport(ERROR,
            (errcode(ERRCODE_UNDEFINED_OBJECT),
             errmsg("consolidation " INT64_FORMAT " does not exist", consolidation_id),
             errhint("SELECT consolidation_id FROM kne.consolidation lists them.")));
    pg_unreachable();
}

static Datum
consolidate_body(PG_FUNCTION_ARGS)
{
    static KnePlan insert = {
        "INSERT INTO kne.consolidation (model_id, options, requested_by, origin, origin_database)"
        " VALUES ($1, $2, $3::name, $4, $5) RETURNING consolidation_id",
        5,
        {INT4OID, JSONBOID, TEXTOID, UUIDOID, OIDOID}};
    kne_options options;
    KneModel *model;
    Jsonb *resolved;
    Datum values[5];
    int64 id;

    kne_options_from_jsonb(PG_ARGISNULL(1) ? NULL : PG_GETARG_JSONB_P(1), &options);
    kne_require_preload();
    kne_check_subscriptions("consolidate");
    model = kne_model_by_name(PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0)));
    resolved = kne_options_resolve(PG_ARGISNULL(1) ? NULL : PG_GETARG_JSONB_P(1), model->model_id, "consolidation", &options);
    kne_check_layers(&options, model);
    values[0] = Int32GetDatum(model->model_id);
    values[1] = resolved ? JsonbPGetDatum(resolved) : (Datum) 0;
    values[2] = CStringGetTextDatum(kne_caller());
    values[3] = UUIDPGetDatum(kne_origin());
    values[4] = ObjectIdGetDatum(MyDatabaseId);
    kne_spi_connect();
    kne_spi(&insert, KNE_WRITE, values, resolved ? NULL : " n   ");
    id = kne_spi_int8(0, 1);
    kne_spi_finish();
    kne_warn_if_idle();
    kne_wake_at_commit();
    PG_RETURN_INT64(id);
}

Datum
kne_consolidate(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, consolidate_body);
}

Datum
kne_cancel_consolidation(PG_FUNCTION_ARGS)
{
    static KnePlan cancel = {
        "UPDATE kne.consolidation SET state = 'cancelled', finished_at = clock_timestamp()"
        " WHERE consolidation_id = $1 AND state IN ('pending', 'running')",
        1,
        {INT8OID}};
    static KnePlan exists = {"SELECT 1 FROM kne.consolidation WHERE consolidation_id = $1", 1, {INT8OID}};
    Datum id;
    bool done;

    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("consolidation_id must not be null")));
    id = PG_GETARG_DATUM(0);
    kne_spi_connect();
    done = kne_spi(&cancel, KNE_WRITE, &id, NULL) > 0;
    if (done)
        kne_wake_at_commit(); /* the worker stops the engine, and finds the row no longer running */
    else if (kne_spi(&exists, KNE_WRITE, &id, NULL) == 0)
        kne_no_such_consolidation(DatumGetInt64(id));
    kne_spi_finish();
    PG_RETURN_BOOL(done);
}
