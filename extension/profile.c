/*
 * profile.c - options kept by name in kne.profile, and what a request's options come to.
 *
 * Resolved when the request is made, and written into its row: whoever changes a profile later changes no request, and the
 * row says what made the edit. Later ones of these go before earlier ones: the built-in defaults; the profile "default" for any model;
 * "default" for this model; the named profile for any model; the same for this model; the options given.
 */
#include "kne_sql.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "utils/builtins.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(kne_profile_before);

Jsonb *
kne_options_resolve(Jsonb *given, int32 model_id, const char *fallback, kne_options *out)
{
    /* One object merged in the order above; NULL when there is neither a profile nor an option. Does the named one exist? */
    static KnePlan plan = {
        "SELECT CASE WHEN $1 IS NULL AND d IS NULL AND n IS NULL THEN NULL"
        "       ELSE coalesce(d, '{}') || coalesce(n, '{}') || coalesce($1, '{}') END, n IS NOT NULL"
        " FROM (SELECT (SELECT options FROM kne.profile WHERE name = 'default' AND model_id IS NULL) AS da,"
        "   (SELECT options FROM kne.profile WHERE name = 'default' AND model_id = $2) AS dm,"
        "   (SELECT options FROM kne.profile WHERE name = $3 AND model_id IS NULL) AS na,"
        "   (SELECT options FROM kne.profile WHERE name = $3 AND model_id = $2) AS nm) p,"
        " LATERAL (SELECT CASE WHEN da IS NULL AND dm IS NULL THEN NULL ELSE coalesce(da, '{}') || coalesce(dm, '{}') END AS d,"
        "   CASE WHEN na IS NULL AND nm IS NULL THEN NULL ELSE coalesce(na, '{}') || coalesce(nm, '{}') END AS n) q",
        3,
        {JSONBOID, INT4OID, TEXTOID}};
    MemoryContext mcxt = CurrentMemoryContext;
    char *name;
    char nulls[] = "   ";
    Datum values[3], merged;
    Jsonb *resolved = NULL;
    bool isnull, found;

    kne_options_from_jsonb(given, out);
    name = kne_options_profile(given);
    values[0] = given ? JsonbPGetDatum(given) : (Datum) 0;
    nulls[0] = given ? ' ' : 'n';
    values[1] = Int32GetDatum(model_id);
    values[2] = CStringGetTextDatum(name ? name : fallback ? fallback : "");
    kne_spi_connect();
    kne_spi(&plan, KNE_READ, values, nulls);
    merged = kne_spi_datum(0, 1, &isnull);
    if (!isnull)
    {
        MemoryContext old = MemoryContextSwitchTo(mcxt);

        resolved = DatumGetJsonbPCopy(merged);
        MemoryContextSwitchTo(old);
    }
    found = kne_spi_bool(0, 2);
    kne_spi_finish();
    if (name && !found)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("profile \"%s\" does not exist", name),
                        errhint("SELECT name FROM kne.profile lists the profiles.")));
    kne_options_from_jsonb(resolved, out);
    return resolved;
}

char *
kne_options_resolved(int32 model_id, const char *fallback)
{
    kne_options options;
    Jsonb *resolved = kne_options_resolve(NULL, model_id, fallback, &options);

    return resolved ? JsonbToCString(NULL, &resolved->root, VARSIZE(resolved)) : NULL;
}

/* Options of a profile must be right by themselves, and name no other. */
Datum
kne_profile_before(PG_FUNCTION_ARGS)
{
    TriggerData *trig = (TriggerData *) fcinfo->context;
    HeapTuple row;
    kne_options options;
    bool isnull;
    Datum d;

    if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_ROW(trig->tg_event) || !TRIGGER_FIRED_BEFORE(trig->tg_event) ||
        RelationGetNamespace(trig->tg_relation) != get_namespace_oid("kne", true) ||
        strcmp(RelationGetRelationName(trig->tg_relation), "profile") != 0)
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
                        errmsg("this trigger function is for rows of kne.profile being written")));
    row = TRIGGER_FIRED_BY_UPDATE(trig->tg_event) ? trig->tg_newtuple : trig->tg_trigtuple;
    d = SPI_getbinval(row, trig->tg_relation->rd_att, SPI_fnumber(trig->tg_relation->rd_att, "options"), &isnull);
    if (!isnull)
    {
        kne_options_from_jsonb(DatumGetJsonbP(d), &options);
        if (kne_options_profile(DatumGetJsonbP(d)))
            ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("a profile cannot name another"),
                            errhint("Leave \"profile\" out of its options.")));
    }
    return PointerGetDatum(row);
}
