/*
 * unit.c - what follows from an edit, and editing it together: kne_consequences, kne_edit_unit, kne_revert_unit.
 *
 * Consequences are derived from rows: kne.relation.inverse and kne.alias. The edits of a unit are ordinary requests with
 * one `unit`; the worker solves them in one batch and writes them in one transaction, or fails them all. Cancel and retry
 * of one is of all (request.c). Applied, each can still be reverted alone.
 */
#include "kne_sql.h"

#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(kne_consequences);
PG_FUNCTION_INFO_V1(kne_edit_unit);
PG_FUNCTION_INFO_V1(kne_revert_unit);

/* $1 subject, $2 relation, $3 object: what kind, subject, relation, object; the edit itself first. */
#define CONSEQUENCES                                                                                                         \
    "WITH name (of, name) AS (SELECT x, x FROM unnest(ARRAY[$1, $3]) x UNION SELECT name, alias FROM kne.alias"              \
    "  UNION SELECT alias, name FROM kne.alias),"                                                                            \
    " edits AS (SELECT CASE WHEN n.name = $1 THEN 'edit' ELSE 'alias' END AS derived, n.name AS s, $2 AS r, $3 AS o"         \
    "  FROM name n WHERE n.of = $1"                                                                                          \
    "  UNION ALL SELECT CASE WHEN n.name = $3 THEN 'inverse' ELSE 'inverse of alias' END, n.name, r.inverse, $1"             \
    "  FROM kne.relation r, name n WHERE r.relation = $2 AND r.inverse <> '' AND n.of = $3),"                                \
    " consequence AS (SELECT derived, s, r, o, row_number() OVER (ORDER BY derived <> 'edit', derived LIKE 'inverse%', derived," \
    "  s COLLATE \"C\") AS n FROM edits)"

static void
fact_args(FunctionCallInfo fcinfo, Datum *values)
{
    static const char *const what[] = {"subject", "relation", "object"};

    for (int i = 0; i < 3; i++)
    {
        kne_check_text(what[i], PG_ARGISNULL(i) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(i)));
        values[i] = PG_GETARG_DATUM(i);
    }
}

Datum
kne_consequences(PG_FUNCTION_ARGS)
{
    static KnePlan plan = {CONSEQUENCES " SELECT derived, s, r, o, (SELECT f.object FROM kne.fact f WHERE f.model_id = $4"
                                        " AND f.subject = s AND f.relation = r AND f.valid_to IS NULL"
                                        " ORDER BY f.edit_id DESC NULLS LAST, f.fact_id LIMIT 1) FROM consequence ORDER BY n",
                           4,
                           {TEXTOID, TEXTOID, TEXTOID, INT4OID}};
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    Datum values[4];
    uint64 n;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
        return (Datum) 0;
    fact_args(fcinfo, values);
    values[3] = Int32GetDatum(kne_model_by_name(PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)))->model_id);
    kne_spi_connect();
    n = kne_spi(&plan, KNE_READ, values, NULL);
    for (uint64 i = 0; i < n; i++)
    {
        Datum row[5];
        bool nulls[5];

        for (int c = 0; c < 5; c++)
            row[c] = kne_spi_datum(i, c + 1, &nulls[c]);
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, row, nulls);
    }
    kne_spi_finish();
    return (Datum) 0;
}

static Datum
edit_unit_body(PG_FUNCTION_ARGS)
{
    static KnePlan insert = {
        CONSEQUENCES ", asked AS MATERIALIZED (SELECT s, r, o, n, nextval(pg_get_serial_sequence('kne.edit_request', 'edit_id')) AS id"
                     "  FROM consequence ORDER BY n)"
                     " INSERT INTO kne.edit_request (edit_id, model_id, subject, relation, object, options, unit)"
                     " SELECT id, $4, s, r, o, $5, (SELECT id FROM asked WHERE n = 1) FROM asked ORDER BY n RETURNING unit",
        5,
        {TEXTOID, TEXTOID, TEXTOID, INT4OID, JSONBOID}};
    /* A request waits for older ones of its fact, and a unit for all of its own. */
    static KnePlan twice = {CONSEQUENCES " SELECT s, r FROM consequence GROUP BY s, r HAVING count(*) > 1 ORDER BY min(n) LIMIT 1",
                            3,
                            {TEXTOID, TEXTOID, TEXTOID}};
    kne_options options;
    KneModel *model;
    Datum values[5];
    int64 unit;

    fact_args(fcinfo, values);
    kne_require_preload();
    model = kne_model_by_name(PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)));
    (void) kne_options_resolve(PG_ARGISNULL(4) ? NULL : PG_GETARG_JSONB_P(4), model->model_id, NULL, &options);
    kne_check_layers(&options, model);
    values[3] = Int32GetDatum(model->model_id);
    values[4] = PG_ARGISNULL(4) ? (Datum) 0 : PG_GETARG_DATUM(4);
    kne_spi_connect();
    if (kne_spi(&twice, KNE_WRITE, values, NULL) > 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                        errmsg("a unit cannot hold two edits of one fact (%s, %s)", kne_spi_text(0, 1, CurrentMemoryContext),
                               kne_spi_text(0, 2, CurrentMemoryContext)),
                        errhint("kne_consequences shows what would be edited.")));
    kne_spi(&insert, KNE_WRITE, values, PG_ARGISNULL(4) ? "    n" : NULL);
    unit = kne_spi_int8(0, 1);
    kne_spi_finish();
    PG_RETURN_INT64(unit);
}

Datum
kne_edit_unit(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, edit_unit_body);
}

static Datum
revert_unit_body(PG_FUNCTION_ARGS)
{
    static KnePlan find = {"SELECT edit_id FROM kne.edit_request WHERE unit = $1 AND state = 'applied' ORDER BY edit_id",
                           1,
                           {INT8OID}};
    static KnePlan exists = {"SELECT 1 FROM kne.edit_request WHERE unit = $1", 1, {INT8OID}};
    char *reason = PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1));
    Datum unit;
    int64 *id;
    uint64 n;

    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("unit must not be null")));
    unit = PG_GETARG_DATUM(0);
    kne_spi_connect();
    if (kne_spi(&exists, KNE_WRITE, &unit, NULL) == 0)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("unit " INT64_FORMAT " does not exist", DatumGetInt64(unit)),
                        errhint("kne_revert takes out an edit that is in no unit.")));
    n = kne_spi(&find, KNE_WRITE, &unit, NULL);
    id = palloc(sizeof *id * Max(n, 1));
    for (uint64 i = 0; i < n; i++)
        id[i] = kne_spi_int8(i, 1);
    kne_lock_facts(id, (int) n);
    for (uint64 i = 0; i < n; i++)
        kne_revert_edit(id[i], reason);
    kne_spi_finish();
    if (n == 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("no edit of unit " INT64_FORMAT " is applied, so it cannot be reverted", DatumGetInt64(unit))));
    PG_RETURN_INT32((int32) n);
}

Datum
kne_revert_unit(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, revert_unit_body);
}
