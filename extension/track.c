/*
 * track.c - kne.track: the trigger that turns changes of a user's table into edits (kne_track_table makes it).
 *
 * Arguments: column of the subject, relation, column of the object, model ('' for the default). A row says that subject has object; a row
 * with a null in either says nothing. What a row newly says is asked for as an edit. When nothing is said of a subject any more, edits of
 * that fact are taken back, whoever asked for them: those in force or superseded are reverted, those that have not finished cancelled. The model then
 * answers as it did by itself.
 *
 * Whoever may write to the table asks for edits through it: the check is on who makes the trigger, by EXECUTE on this function.
 */
#include "kne_sql.h"

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "utils/builtins.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(kne_track);

static char *
value_of(TriggerData *trig, HeapTuple row, const char *column)
{
    int attnum = SPI_fnumber(RelationGetDescr(trig->tg_relation), column);

    if (attnum == SPI_ERROR_NOATTRIBUTE)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
                        errmsg("column \"%s\" of table \"%s\", which kne tracks, does not exist", column, RelationGetRelationName(trig->tg_relation)),
                        errhint("kne_untrack_table ends it, kne_track_table begins anew.")));
    return SPI_getvalue(row, RelationGetDescr(trig->tg_relation), attnum);
}

/* Nothing is said of the fact any more: no edit of it is to be in force, nor to come. */
static void
take_back(int32 model_id, const char *subject, const char *relation)
{
    static KnePlan of_fact = {
        "SELECT edit_id, state IN ('applied', 'superseded') FROM kne.edit_request r WHERE model_id = $1 AND subject = $2"
        " AND relation = $3 AND state IN ('pending', 'running', 'applied', 'superseded')"
        " AND NOT " KNE_IN_BASE("r") /* these stay */
        " ORDER BY edit_id FOR NO KEY UPDATE",
        3,
        {INT4OID, TEXTOID, TEXTOID}};
    Datum values[3];
    int64 *made, *asked;
    int n_made = 0, n_asked = 0;
    uint64 n;

    values[0] = Int32GetDatum(model_id);
    values[1] = CStringGetTextDatum(subject);
    values[2] = CStringGetTextDatum(relation);
    n = kne_spi(&of_fact, KNE_WRITE, values, NULL);
    made = palloc(sizeof(int64) * Max(n, 1));
    asked = palloc(sizeof(int64) * Max(n, 1));
    for (uint64 i = 0; i < n; i++)
        if (kne_spi_bool(i, 2))
            made[n_made++] = kne_spi_int8(i, 1);
        else
            asked[n_asked++] = kne_spi_int8(i, 1);
    for (int i = 0; i < n_asked; i++)
        kne_cancel_edit(asked[i]);
    kne_revert_edits(made, n_made, "the row that said so is gone");
}

static Datum
track_body(PG_FUNCTION_ARGS)
{
    static KnePlan ask = {"INSERT INTO kne.edit_request (model_id, subject, relation, object) VALUES ($1, $2, $3, $4)",
                          4,
                          {INT4OID, TEXTOID, TEXTOID, TEXTOID}};
    TriggerData *trig = (TriggerData *) fcinfo->context;
    char *said[2] = {NULL, NULL}, *says[2] = {NULL, NULL}; /* subject, object */
    char **arg;
    KneModel *model;
    Datum values[4];

    if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trig->tg_event) || !TRIGGER_FIRED_FOR_ROW(trig->tg_event) ||
        trig->tg_trigger->tgnargs != 4)
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
                        errmsg("function \"track\" must be fired after a row changed, with four arguments"),
                        errhint("kne_track_table makes the trigger.")));
    arg = trig->tg_trigger->tgargs;
    kne_spi_connect();
    for (int k = 0; k < 2; k++)
    {
        const char *column = arg[k == 0 ? 0 : 2];

        if (!TRIGGER_FIRED_BY_INSERT(trig->tg_event))
            said[k] = value_of(trig, trig->tg_trigtuple, column);
        if (!TRIGGER_FIRED_BY_DELETE(trig->tg_event))
            says[k] = value_of(trig, TRIGGER_FIRED_BY_UPDATE(trig->tg_event) ? trig->tg_newtuple : trig->tg_trigtuple, column);
    }
    if (!said[0] || !said[1])
        said[0] = NULL;
    if (!says[0] || !says[1])
        says[0] = NULL;
    if (said[0] && says[0] && strcmp(said[0], says[0]) == 0 && strcmp(said[1], says[1]) == 0)
        said[0] = says[0] = NULL;
    if (said[0] || says[0])
    {
        model = kne_model_by_name(arg[3][0] ? arg[3] : NULL);
        /* Of the same subject the new edit supersedes the old. */
        if (said[0] && (!says[0] || strcmp(said[0], says[0]) != 0))
            take_back(model->model_id, said[0], arg[1]);
        if (says[0])
        {
            values[0] = Int32GetDatum(model->model_id);
            values[1] = CStringGetTextDatum(says[0]);
            values[2] = CStringGetTextDatum(arg[1]);
            values[3] = CStringGetTextDatum(says[1]);
            kne_spi(&ask, KNE_WRITE, values, NULL);
        }
    }
    kne_spi_finish();
    return PointerGetDatum(NULL);
}

Datum
kne_track(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, track_body);
}
