/*
 * model.c - kne_load_model, kne_drop_model, and looking models up.
 *
 * A model is a folder on the server; its row keeps the folder's real path and fingerprint, and the engine
 * opens it when a request first asks for it. Which folders may be named is decided here and only here: those
 * below kne.model_dir once every symbolic link is resolved, or any for a member of pg_read_server_files.
 */
#include "kne_sql.h"

#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"

#include <stdlib.h>

#define MAX_NAME_BYTES 200 /* of a model */
#define FOLDER_HINT "The path names a folder on the server with config.json, *.safetensors and tokenizer.json."

PG_FUNCTION_INFO_V1(kne_load_model);
PG_FUNCTION_INFO_V1(kne_drop_model);
PG_FUNCTION_INFO_V1(kne_move_model);

/* ---------------------------------------------------------------- lookups */

#define MODEL_COLUMNS \
    "SELECT model_id, name, path, fingerprint, n_layers, d_model, d_ff, n_ctx, gated FROM kne.model WHERE "

static KneModel *
model_from_row(MemoryContext mcxt)
{
    KneModel *m = MemoryContextAllocZero(mcxt, sizeof *m);

    m->model_id = kne_spi_int4(0, 1);
    m->name = kne_spi_text(0, 2, mcxt);
    m->path = kne_spi_text(0, 3, mcxt);
    m->fingerprint = kne_spi_text(0, 4, mcxt);
    m->n_layers = kne_spi_int4(0, 5);
    m->d_model = kne_spi_int4(0, 6);
    m->d_ff = kne_spi_int4(0, 7);
    m->n_ctx = kne_spi_int4(0, 8);
    m->gated = kne_spi_bool(0, 9);
    return m;
}

const char *
kne_model_meant(const char *name)
{
    return !name && kne_default_model && kne_default_model[0] ? kne_default_model : name;
}

KneModel *
kne_model_by_name(const char *name)
{
    static KnePlan by_name = {MODEL_COLUMNS "name = $1", 1, {TEXTOID}};
    static KnePlan by_default = {MODEL_COLUMNS "is_default"};
    static KnePlan any = {"SELECT EXISTS (SELECT FROM kne.model)"};
    MemoryContext mcxt = CurrentMemoryContext;
    KneModel *m;
    Datum value;

    name = kne_model_meant(name);
    value = name ? CStringGetTextDatum(name) : (Datum) 0;

    kne_spi_connect();
    if (kne_spi(name ? &by_name : &by_default, KNE_READ, name ? &value : NULL, NULL) == 0)
    {
        if (name)
            ereport(
                ERROR,
                (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("model \"%s\" does not exist", name),
                 errhint(
                     "SELECT name FROM kne.model lists the models; kne_load_model(name, path) adds one.")));
        kne_spi(&any, KNE_READ, NULL, NULL);
        if (kne_spi_bool(0, 1))
            ereport(ERROR,
                    (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("no model is the default"),
                     errhint("Name the model, or UPDATE kne.model SET is_default = true for one of them.")));
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("no model is loaded"),
                        errhint("Load one with kne_load_model(name, path).")));
    }
    m = model_from_row(mcxt);
    kne_spi_finish();
    return m;
}

KneModel *
kne_model_by_id(int32 model_id)
{
    static KnePlan by_id = {MODEL_COLUMNS "model_id = $1", 1, {INT4OID}};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum value = Int32GetDatum(model_id);
    KneModel *m;

    kne_spi_connect();
    if (kne_spi(&by_id, KNE_READ, &value, NULL) == 0)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("model %d does not exist", model_id),
                        errhint("SELECT model_id, name FROM kne.model lists the models.")));
    m = model_from_row(mcxt);
    kne_spi_finish();
    return m;
}

/* Loads and drops come one after the other, so that the one default is told and not found out by its index. */
static KnePlan one_at_a_time = {"LOCK TABLE kne.model IN SHARE ROW EXCLUSIVE MODE"};

/* ---------------------------------------------------------------- load */

/* ERROR when there is a model of that name. SPI connected. */
static void
check_new(const char *name)
{
    static KnePlan exists = {"SELECT 1 FROM kne.model WHERE name = $1", 1, {TEXTOID}};
    Datum value = CStringGetTextDatum(name);

    if (kne_spi(&exists, KNE_WRITE, &value, NULL) > 0)
        ereport(ERROR, (errcode(ERRCODE_DUPLICATE_OBJECT), errmsg("model \"%s\" already exists", name),
                        errhint("Take another name, or drop it first with kne_drop_model.")));
}

/* Is path dir itself or below it? Both canonical. */
static bool
is_below(const char *path, const char *dir)
{
    size_t n = strlen(dir);

    while (n > 1 && dir[n - 1] == '/')
        n--;
    if (n == 1 && dir[0] == '/')
        return path[0] == '/';
    return strncmp(path, dir, n) == 0 && (path[n] == '/' || path[n] == '\0');
}

/* The folder's real path, if this caller may load it. */
static char *
resolve(const char *path)
{
    bool any = has_privs_of_role(kne_caller_id(), ROLE_PG_READ_SERVER_FILES);
    char *real, *dir = NULL, *result;
    int save_errno;

    if (strlen(path) >= MAXPGPATH)
        ereport(ERROR, (errcode(ERRCODE_INVALID_NAME), errmsg("the path of a model is too long"),
                        errdetail("It has %zu bytes; a path has less than %d.", strlen(path), MAXPGPATH),
                        errhint(FOLDER_HINT)));
    if (!is_absolute_path(path))
        ereport(ERROR, (errcode(ERRCODE_INVALID_NAME),
                        errmsg("the path of a model must be absolute, not \"%s\"", path),
                        errdetail("An absolute path begins with a slash."), errhint(FOLDER_HINT)));
    real = realpath(path, NULL);
    save_errno = errno;
    if (kne_model_dir && kne_model_dir[0])
        dir = realpath(kne_model_dir, NULL);

    if (!any)
    {
        char *lexical = pstrdup(path);
        bool inside;

        /* A path that leads nowhere says so only where this caller may look. */
        canonicalize_path(lexical);
        inside =
            dir && (real ? is_below(real, dir) : is_below(lexical, dir) && strstr(lexical, "..") == NULL);
        if (!inside)
        {
            free(real);
            free(dir);
            ereport(ERROR,
                    (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
                     errmsg("path \"%s\" is not below kne.model_dir", path),
                     errdetail("Only members of pg_read_server_files load models from elsewhere."),
                     kne_model_dir && kne_model_dir[0] ? errhint("kne.model_dir is \"%s\".", kne_model_dir)
                                                       : errhint("kne.model_dir is not set.")));
        }
        pfree(lexical);
    }
    free(dir);
    if (!real)
    {
        errno = save_errno;
        ereport(
            ERROR,
            (errcode_for_file_access(), errmsg("could not open model folder \"%s\": %m", path),
             errhint(FOLDER_HINT)));
    }
    result = pstrdup(real);
    free(real);
    /* What a link leads to may have any bytes for a name; a row has text. */
    if (!pg_verifymbstr(result, strlen(result), true))
        ereport(ERROR, (errcode(ERRCODE_CHARACTER_NOT_IN_REPERTOIRE),
                        errmsg("the name of the folder behind \"%s\" is not valid in this database's encoding", path),
                        errhint("Rename the folder.")));
    return result;
}

/* What the engine says of a folder. */
typedef struct Inspected
{
    StringInfoData part[3]; /* architecture, dtype, fingerprint */
    Datum numbers[5];       /* n_layers, d_model, d_ff, vocab_size, n_ctx */
    bool gated;
} Inspected;

static void
inspect(const char *path, Inspected *in)
{
    kne_wbuf w;
    KneReply reply;

    kne_wbuf_init(&w);
    kne_put_str(&w, path); /* bytes of the file system, as they are */
    kne_call(KNE_MSG_MODEL_INSPECT, &w, NULL, NULL, &reply);
    for (int i = 0; i < 3; i++)
        initStringInfo(&in->part[i]);
    kne_get_text(&reply.body, &in->part[0]);
    for (int i = 0; i < 5; i++)
        in->numbers[i] = Int32GetDatum(kne_get_i32(&reply.body));
    kne_get_text(&reply.body, &in->part[1]);
    kne_get_text(&reply.body, &in->part[2]);
    (void) kne_get_i64(&reply.body); /* bytes of weights */
    in->gated = kne_get_u8(&reply.body) != 0;
    kne_reply_done(&reply);
}

char *
kne_model_folder(const char *path, char **fingerprint)
{
    char *real = resolve(path);
    Inspected in;

    inspect(real, &in);
    *fingerprint = in.part[2].data;
    return real;
}

static Datum
load_model_body(PG_FUNCTION_ARGS)
{
    static KnePlan undefault = {"UPDATE kne.model SET is_default = false WHERE is_default"};
    static KnePlan insert = {
        "INSERT INTO kne.model (name, path, architecture, n_layers, d_model, d_ff, vocab_size, n_ctx, gated,"
        " dtype, fingerprint, is_default)"
        " SELECT $1, $2, s.v[1], i.v[1], i.v[2], i.v[3], i.v[4], i.v[5], $5, s.v[2], s.v[3], $6"
        " FROM (SELECT $3) s (v), (SELECT $4) i (v) RETURNING model_id",
        6,
        {TEXTOID, TEXTOID, TEXTARRAYOID, INT4ARRAYOID, BOOLOID, BOOLOID}};
    char *name, *path;
    bool is_default;
    Inspected in;
    Datum strings[3], values[6];
    int32 model_id;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1) || PG_ARGISNULL(2))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
                        errmsg("name, path and is_default of a model must not be null")));
    name = text_to_cstring(PG_GETARG_TEXT_PP(0));
    path = text_to_cstring(PG_GETARG_TEXT_PP(1));
    is_default = PG_GETARG_BOOL(2);
    if (name[strspn(name, " \t\r\n\v\f")] == '\0')
        ereport(ERROR,
                (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("name of a model must not be empty"),
                 errhint("It is what other functions know the model by.")));
    if (strlen(name) > MAX_NAME_BYTES)
        ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("name of a model is too long"),
                        errdetail("It has %zu bytes; at most %d are allowed.", strlen(name), MAX_NAME_BYTES)));

    kne_spi_connect();
    check_new(name);
    kne_spi_finish();

    path = resolve(path);
    inspect(path, &in);
    for (int i = 0; i < 3; i++)
        strings[i] = CStringGetTextDatum(in.part[i].data);
    values[0] = CStringGetTextDatum(name);
    values[1] = CStringGetTextDatum(path);
    values[2] = PointerGetDatum(construct_array(strings, 3, TEXTOID, -1, false, TYPALIGN_INT));
    values[3] = PointerGetDatum(construct_array(in.numbers, 5, INT4OID, sizeof(int32), true, TYPALIGN_INT));
    values[4] = BoolGetDatum(in.gated);
    values[5] = BoolGetDatum(is_default);
    kne_spi_connect();
    kne_spi(&one_at_a_time, KNE_WRITE, NULL, NULL);
    check_new(name); /* again: the look at the folder took its time */
    if (is_default)
        kne_spi(&undefault, KNE_WRITE, NULL, NULL);
    kne_spi(&insert, KNE_WRITE, values, NULL);
    model_id = kne_spi_int4(0, 1);
    kne_spi_finish();
    PG_RETURN_INT32(model_id);
}

Datum
kne_load_model(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, load_model_body);
}

/* ---------------------------------------------------------------- move */

static Datum
move_model_body(PG_FUNCTION_ARGS)
{
    static KnePlan move = {"UPDATE kne.model SET path = $2, fingerprint = $3 WHERE model_id = $1 AND fingerprint = $4", 4,
                           {INT4OID, TEXTOID, TEXTOID, TEXTOID}};
    KneModel *model;
    KneBase base;
    Datum values[4];
    char *path, *fingerprint;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("name and path of a model must not be null")));
    model = kne_model_by_name(text_to_cstring(PG_GETARG_TEXT_PP(0)));
    base = kne_base_of(model);
    path = kne_model_folder(text_to_cstring(PG_GETARG_TEXT_PP(1)), &fingerprint);
    if (strcmp(fingerprint, base.fingerprint) != 0)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("folder \"%s\" is not that of model \"%s\"", path, model->name),
                        errdetail("Its fingerprint is %s, not %s.", fingerprint, base.fingerprint),
                        errhint("Another model is loaded under a name of its own, with kne_load_model.")));
    values[0] = Int32GetDatum(model->model_id);
    values[1] = CStringGetTextDatum(path);
    values[2] = CStringGetTextDatum(fingerprint);
    values[3] = CStringGetTextDatum(model->fingerprint);
    kne_spi_connect();
    if (kne_spi(&move, KNE_WRITE, values, NULL) == 0)
        ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE), errmsg("model \"%s\" was rebased or dropped meanwhile", model->name)));
    kne_spi_finish();
    PG_RETURN_VOID();
}

Datum
kne_move_model(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, move_model_body);
}

/* ---------------------------------------------------------------- drop */

Datum
kne_drop_model(PG_FUNCTION_ARGS)
{
    static KnePlan find = {"SELECT model_id FROM kne.model WHERE name = $1 FOR UPDATE", 1, {TEXTOID}};
    static KnePlan count = {"SELECT count(*) FROM kne.edit_request WHERE model_id = $1", 1, {INT4OID}};
#define OF_EDITS " t USING kne.edit_request r WHERE t.edit_id = r.edit_id AND r.model_id = $1"
    static KnePlan drop[] = {
        {"DELETE FROM kne.evaluation" OF_EDITS, 1, {INT4OID}},
        {"DELETE FROM kne.probe" OF_EDITS, 1, {INT4OID}},
        {"DELETE FROM kne.edit_event" OF_EDITS, 1, {INT4OID}},
        {"DELETE FROM kne.activation WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.ensemble" OF_EDITS, 1, {INT4OID}},
        {"DELETE FROM kne.weight_delta" OF_EDITS, 1, {INT4OID}},
        {"DELETE FROM kne.solution WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.fact WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.edit_request WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.consolidation WHERE model_id = $1", 1, {INT4OID}}, /* after the solutions it made */
        {"DELETE FROM kne.profile WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.tag WHERE model_id = $1", 1, {INT4OID}},
        {"DELETE FROM kne.model WHERE model_id = $1", 1, {INT4OID}},
    };
    char *name;
    bool force;
    Datum value;
    int64 edits;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("name and force must not be null")));
    name = text_to_cstring(PG_GETARG_TEXT_PP(0));
    force = PG_GETARG_BOOL(1);

    kne_spi_connect();
    kne_spi(&one_at_a_time, KNE_WRITE, NULL, NULL);
    value = CStringGetTextDatum(name);
    if (kne_spi(&find, KNE_WRITE, &value, NULL) == 0)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("model \"%s\" does not exist", name),
                        errhint("SELECT name FROM kne.model lists the models.")));
    value = Int32GetDatum(kne_spi_int4(0, 1));
    kne_spi(&count, KNE_WRITE, &value, NULL);
    edits = kne_spi_int8(0, 1);
    if (edits > 0 && !force)
        ereport(ERROR, (errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
                        errmsg("cannot drop model \"%s\" because it has edits", name),
                        errdetail_plural("%lld request of it, with its history, would go too.",
                                         "%lld requests of it, with their history, would go too.",
                                         (unsigned long) edits, (long long) edits),
                        errhint("kne_drop_model(name, force => true) drops them with the model.")));

    /* The worker records nothing of this model from here on: it takes the same lock before it does. */
    kne_lock_model(DatumGetInt32(value), true);
    for (size_t i = 0; i < lengthof(drop); i++)
        kne_spi(&drop[i], KNE_WRITE, &value, NULL);
    kne_spi_finish();
    if (edits > 0)
        kne_wake_at_commit(); /* it may be at work on one of them */
    PG_RETURN_VOID();
}

void
kne_check_layers(const kne_options *options, const KneModel *model)
{
    int low = options->layer_min, high = options->layer_max;

    if (low >= model->n_layers || high >= model->n_layers)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                        errmsg("layer %d is not in model \"%s\"", Max(low, high), model->name),
                        errdetail("It has layers 0 to %d.", model->n_layers - 1),
                        errhint("Set \"layer_min\" and \"layer_max\" within them.")));
}
