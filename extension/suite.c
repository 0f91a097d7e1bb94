/*
 * suite.c - benchmarks as rows: the records of CounterFact, zsRE and KnowEdit, in their published JSON forms, become requests and
 * probes.
 *
 * The forms are told apart by their keys, record by record, and one statement reads them all:
 *   CounterFact (ROME)      requested_rewrite {prompt, subject, target_new, target_true}, paraphrase_prompts, neighborhood_prompts
 *   CounterFact (EasyEdit)  prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth
 *   zsRE (MEND)             src, subject, alt, answers, rephrase, loc, loc_ans
 *   KnowEdit                prompt, subject, target_new, ground_truth, rephrase_prompt, portability {name: [{prompt, ground_truth}]},
 *                           locality (as that)
 *   plain                   subject, relation, object, and for a probe kind, prompt, answer, versus: one record a probe
 * A prompt that is not "subject relation" makes its own row of kne.relation, named by the template.
 */
#include "kne_sql.h"

#include "catalog/pg_type.h"
#include "funcapi.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(kne_load_suite);

/* The first of a list, of a list of lists (the first alias), or the string itself. */
#define FIRST(j) "nullif(coalesce(" j " #>> '{0,0}', " j " #>> '{0}', " j " #>> '{}'), '[]')"

/* $1 the suite, $2 first record, $3 how many: one row a record. */
#define RECORDS                                                                                                            \
    "WITH raw AS (SELECT n, r, coalesce(r #>> '{requested_rewrite,subject}', r ->> 'subject') AS subject,"                 \
    "  coalesce(r #>> '{requested_rewrite,prompt}', CASE WHEN r ? 'relation' THEN NULL ELSE r ->> 'prompt' END,"           \
    "   r ->> 'src') AS prompt,"                                                                                           \
    "  coalesce(r #>> '{requested_rewrite,target_new,str}', " FIRST("r -> 'target_new'") ", r ->> 'alt', r ->> 'object') AS object," \
    "  coalesce(r #>> '{requested_rewrite,target_true,str}', " FIRST("r -> 'ground_truth'") ", " FIRST("r -> 'answers'") ") AS old," \
    "  r ->> 'relation' AS relation"                                                                                       \
    "  FROM jsonb_array_elements($1) WITH ORDINALITY u (r, n) WHERE n >= $2 AND ($3 IS NULL OR n < $2::bigint + $3)),"     \
    " rec AS (SELECT n, r, object, old, replace(prompt, '{}', coalesce(subject, '')) AS prompt,"                           \
    "  CASE WHEN relation IS NOT NULL OR position('{}' IN prompt) > 0 OR position(subject IN prompt) > 0"                  \
    "   THEN subject ELSE prompt END AS subject,"                                                                          \
    "  CASE WHEN relation IS NOT NULL THEN relation WHEN position('{}' IN prompt) > 0 THEN prompt"                         \
    "   WHEN position(subject IN prompt) > 0 THEN replace(prompt, subject, '{}') ELSE '{}' END AS relation FROM raw)"

static void
check_suite(Jsonb *suite, Datum *values, const char *nulls)
{
    static KnePlan bad = {
        RECORDS " SELECT n FROM rec WHERE coalesce(subject, '') = '' OR coalesce(relation, '') = '' OR object IS NULL"
                " ORDER BY n LIMIT 1",
        3,
        {JSONBOID, INT4OID, INT4OID}};

    static KnePlan empty = {RECORDS " SELECT count(*) FROM rec WHERE object = ''", 3, {JSONBOID, INT4OID, INT4OID}};
    int64 n;

    if (!JB_ROOT_IS_ARRAY(suite) || JB_ROOT_IS_SCALAR(suite))
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("a suite must be a JSON array"),
                        errdetail("Each of its records is an object.")));
    if (kne_spi(&bad, KNE_READ, values, nulls) > 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                        errmsg("record " INT64_FORMAT " of the suite is of no known form", kne_spi_int8(0, 1)),
                        errdetail("It lacks a subject, a prompt or a relation, or the new object."),
                        errhint("Known are CounterFact, zsRE as MEND has it, KnowEdit, and objects with the keys"
                                " subject, relation, object, kind, prompt, answer, versus.")));
    kne_spi(&empty, KNE_READ, values, nulls);
    n = kne_spi_int8(0, 1);
    if (n > 0) /* as in the published files */
        ereport(WARNING, (errmsg_plural("%lld record of the suite was left out, for its new object is empty",
                                        "%lld records of the suite were left out, for their new object is empty",
                                        (unsigned long) n, (long long) n)));
}

static Datum
load_suite_body(PG_FUNCTION_ARGS)
{
    static KnePlan load = {
        RECORDS
        /* plain records of one fact are one request */
        ", fact AS MATERIALIZED (SELECT min(n) AS n, subject, relation, object,"
        "  nextval(pg_get_serial_sequence('kne.edit_request', 'edit_id')) AS edit_id"
        "  FROM rec WHERE object <> '' GROUP BY subject, relation, object, CASE WHEN r ? 'relation' THEN 0 ELSE n END),"
        " new_relation AS (INSERT INTO kne.relation (relation, prompt) SELECT DISTINCT relation, relation FROM rec"
        "  WHERE NOT r ? 'relation' ON CONFLICT DO NOTHING),"
        " request AS (INSERT INTO kne.edit_request (edit_id, model_id, subject, relation, object, options)"
        "  SELECT edit_id, $4, subject, relation, object, $5 FROM fact ORDER BY n),"
        " probe AS (SELECT f.edit_id, rec.n, q.kind, q.prompt, q.answer, q.versus FROM rec"
        "  JOIN fact f ON f.subject = rec.subject AND f.relation = rec.relation AND f.object = rec.object"
        "   AND (rec.r ? 'relation' OR f.n = rec.n),"
        "  LATERAL (SELECT 'edit' AS kind, rec.prompt, rec.object AS answer, rec.old AS versus WHERE rec.old IS NOT NULL"
        "   UNION ALL SELECT 'paraphrase', p, rec.object, rec.old"
        "    FROM unnest(ARRAY[r ->> 'rephrase_prompt', r ->> 'rephrase']) p WHERE NOT r ? 'relation'"
        "   UNION ALL SELECT 'paraphrase', p #>> '{}', rec.object, rec.old FROM jsonb_path_query(r, 'lax $.paraphrase_prompts[*]') p"
        "   UNION ALL SELECT 'locality', p #>> '{}', rec.old, rec.object FROM jsonb_path_query(r, 'lax $.neighborhood_prompts[*]') p"
        "   UNION ALL SELECT 'locality', r ->> 'locality_prompt', " FIRST("r -> 'locality_ground_truth'") ", rec.object"
        "   UNION ALL SELECT 'locality', r ->> 'loc', " FIRST("r -> 'loc_ans'") ", NULL"
        "   UNION ALL SELECT k, p ->> 'prompt', " FIRST("p -> 'ground_truth'") ", NULL"
        "    FROM (VALUES ('portability'), ('locality')) v (k), LATERAL jsonb_path_query(r -> k, 'lax $.*[*]') p"
        "    WHERE jsonb_typeof(p) = 'object'"
        "   UNION ALL SELECT r ->> 'kind', coalesce(r ->> 'prompt', ''), r ->> 'answer', r ->> 'versus'"
        "    WHERE r ? 'relation' AND coalesce(r ->> 'kind', '') <> '') q WHERE q.prompt IS NOT NULL AND q.answer <> ''),"
        " new_probe AS (INSERT INTO kne.probe (edit_id, kind, prompt, answer, versus)"
        "  SELECT edit_id, kind, prompt, answer, nullif(versus, '') FROM probe ORDER BY n, kind)"
        " SELECT edit_id FROM fact ORDER BY n",
        5,
        {JSONBOID, INT4OID, INT4OID, INT4OID, JSONBOID}};
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    kne_options options;
    KneModel *model;
    Datum values[5];
    char nulls[] = "     ";
    uint64 n;

    InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
    if (PG_ARGISNULL(0))
        return (Datum) 0;
    if (PG_ARGISNULL(3) || PG_GETARG_INT32(3) < 1 || (!PG_ARGISNULL(4) && PG_GETARG_INT32(4) < 0))
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("first must be at least 1, and records not negative")));
    kne_options_from_jsonb(PG_ARGISNULL(2) ? NULL : PG_GETARG_JSONB_P(2), &options);
    kne_require_preload();
    model = kne_model_by_name(PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)));
    values[0] = PG_GETARG_DATUM(0);
    values[1] = PG_GETARG_DATUM(3);
    values[2] = PG_GETARG_DATUM(4);
    nulls[2] = PG_ARGISNULL(4) ? 'n' : ' ';
    values[3] = Int32GetDatum(model->model_id);
    values[4] = PG_GETARG_DATUM(2);
    nulls[4] = PG_ARGISNULL(2) ? 'n' : ' ';
    kne_spi_connect();
    check_suite(PG_GETARG_JSONB_P(0), values, nulls);
    n = kne_spi(&load, KNE_WRITE, values, nulls);
    for (uint64 i = 0; i < n; i++)
    {
        Datum id = Int64GetDatum(kne_spi_int8(i, 1));
        bool isnull = false;

        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &id, &isnull);
    }
    kne_spi_finish();
    return (Datum) 0;
}

Datum
kne_load_suite(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, load_suite_body);
}
