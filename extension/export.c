/*
 * export.c - kne_export: a state of the model as a folder of files.
 *
 * The engine writes; who may have it write, and where, is decided here and only here: a member of pg_write_server_files, an absolute
 * path whose parent is there, once every symbolic link is resolved outside of the data directory (and of the model's own folder), at
 * which there is nothing or an empty folder.
 */
#include "kne_sql.h"

#include "catalog/pg_authid.h"
#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/json.h"

#include <sys/stat.h>
#include <unistd.h>

PG_FUNCTION_INFO_V1(kne_export);

/* ---------------------------------------------------------------- where */

/* ERROR unless nothing, or an empty folder, is at path. */
static void
check_free(const char *path)
{
    struct stat st;

    if (lstat(path, &st) != 0)
    {
        if (errno != ENOENT)
            ereport(ERROR, (errcode_for_file_access(), errmsg("could not look at \"%s\": %m", path)));
        return;
    }
    if (S_ISDIR(st.st_mode))
    {
        DIR *dir = AllocateDir(path);
        struct dirent *e;
        bool empty = true;

        while ((e = ReadDir(dir, path)) != NULL && empty)
            empty = strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0;
        FreeDir(dir);
        if (empty)
            return;
    }
    ereport(ERROR, (errcode(ERRCODE_DUPLICATE_FILE), errmsg("\"%s\" exists already", path),
                    errdetail(S_ISDIR(st.st_mode) ? "The folder is not empty." : "It is not a folder."),
                    errhint("Name a folder that does not exist yet; nothing is ever overwritten.")));
}

/* The path with its parent resolved. */
static char *
resolve(const char *given, const KneModel *model)
{
    char *path = pstrdup(given), *name, *parent, *real, *data, *result;

    canonicalize_path(path);
    name = strrchr(path, '/');
    if (!is_absolute_path(given) || strlen(given) >= MAXPGPATH || name[1] == '\0' || strcmp(name + 1, "..") == 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_NAME), errmsg("\"%s\" is not the absolute path of a folder to be made", given),
                        errhint("Name a folder on the server that does not exist yet, in one that does.")));
    parent = name == path ? pstrdup("/") : pnstrdup(path, name - path);
    real = realpath(parent, NULL);
    if (!real)
        ereport(ERROR, (errcode_for_file_access(), errmsg("could not open folder \"%s\": %m", parent),
                        errhint("The folder that is to hold the new one must exist.")));
    result = psprintf("%s%s", strcmp(real, "/") == 0 ? "" : real, name);
    data = realpath(DataDir, NULL);
    if (!data || path_is_prefix_of_path(data, result))
        ereport(ERROR, (errcode(ERRCODE_INVALID_NAME), errmsg("a model is not exported into the data directory")));
    if (path_is_prefix_of_path(model->path, result))
        ereport(ERROR, (errcode(ERRCODE_INVALID_NAME), errmsg("a model is not exported into its own folder")));
    free(data);
    free(real);
    check_free(result);
    return result;
}

/* ---------------------------------------------------------------- the card */

/* A cell of a table in Markdown. */
static void
put_cell(StringInfo s, const char *text)
{
    appendStringInfoString(s, " ");
    for (const char *p = text; *p; p++)
        if (*p == '\n' || *p == '\r')
            appendStringInfoChar(s, ' ');
        else if (strchr("|\\`*_<>[]", *p))
            appendStringInfo(s, "\\%c", *p);
        else
            appendStringInfoChar(s, *p);
    appendStringInfoString(s, " |");
}

static char *
card(const KneView *view, bool adapter)
{
    static KnePlan edits = {
        "SELECT r.edit_id::text, r.subject, r.relation, r.object, coalesce(s.answer_before, ''), s.n_neurons::text, r.requested_by::text,"
        " to_char(s.solved_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"
        " FROM unnest($1, $2) v (edit_id, generation) JOIN kne.edit_request r USING (edit_id)"
        " JOIN kne.solution s USING (edit_id, generation) ORDER BY edit_id",
        2,
        {INT8ARRAYOID, INT4ARRAYOID}};
    Datum values[2] = {kne_int8_array(view->edit_id, view->n), kne_int4_array(view->generation, view->n)};
    StringInfoData s;
    uint64 n;

    initStringInfo(&s);
    appendStringInfo(&s, "---\nlibrary_name: %s\ntags:\n- knowledge-editing\n- kne\n---\n\n# ", adapter ? "peft" : "transformers");
    put_cell(&s, view->model->name);
    s.data[--s.len] = '\0';
    appendStringInfo(&s, "with edits\n\n%s of a model whose knowledge was edited in PostgreSQL with kne %s, method KNE (arXiv 2412.20637).\n\n"
                     "- fingerprint of the unedited folder: `%s`\n- edits in force: %d, at %s\n",
                     adapter ? "A LoRA adapter with the edits" : "The files", KNE_ENGINE_VERSION, view->model->fingerprint, view->n,
                     timestamptz_to_str(GetCurrentTimestamp()));
    if (!adapter)
        appendStringInfoString(&s, "- `README-base.md`, where there is one, is the card of the unedited model\n");
    appendStringInfoString(&s, "- `sha256sum -c SHA256SUMS` checks the files\n\n"
                           "| edit | subject | relation | object | answer before | neurons | by | solved (UTC) |\n|---|---|---|---|---|---|---|---|\n");
    kne_spi_connect();
    n = kne_spi(&edits, KNE_READ, values, NULL);
    for (uint64 i = 0; i < n; i++)
    {
        appendStringInfoChar(&s, '|');
        for (int c = 1; c <= 8; c++)
        {
            char *text = kne_spi_text(i, c, CurrentMemoryContext);

            put_cell(&s, text ? text : "");
        }
        appendStringInfoChar(&s, '\n');
    }
    kne_spi_finish();
    return s.data;
}

/* ---------------------------------------------------------------- the answer */

static void
put_json(StringInfo s, const char *key, const char *value)
{
    appendStringInfo(s, "%s\"%s\": ", s->len > 1 ? ", " : "", key);
    escape_json(s, value);
}

static char *
reply_text(kne_rbuf *r)
{
    StringInfoData s;

    initStringInfo(&s);
    kne_get_text(r, &s);
    return s.data;
}

static Datum
report(KneReply *reply, const KneView *view, const char *path, const char *format)
{
    StringInfoData s;
    char *fingerprint = reply_text(&reply->body);
    int64 rows = kne_get_i64(&reply->body);
    uint32 n = kne_get_count(&reply->body, 4 + 8 + 32);

    initStringInfo(&s);
    appendStringInfoChar(&s, '{');
    put_json(&s, "path", path);
    put_json(&s, "format", format);
    put_json(&s, "model", view->model->name);
    put_json(&s, "base_fingerprint", view->model->fingerprint);
    if (fingerprint[0])
        put_json(&s, "fingerprint", fingerprint);
    appendStringInfo(&s, ", \"edits\": %d, \"rows\": " INT64_FORMAT ", \"files\": [", view->n, rows);
    for (uint32 i = 0; i < n; i++)
    {
        char *name = reply_text(&reply->body);
        int64 bytes = kne_get_i64(&reply->body);
        const uint8 *digest = kne_get(&reply->body, 32);

        appendStringInfo(&s, "%s{\"name\": ", i ? ", " : "");
        escape_json(&s, name);
        appendStringInfo(&s, ", \"bytes\": " INT64_FORMAT ", \"sha256\": \"", bytes);
        for (int k = 0; digest && k < 32; k++)
            appendStringInfo(&s, "%02x", digest[k]);
        appendStringInfoString(&s, "\"}");
    }
    appendStringInfoString(&s, "], \"left_out\": [");
    n = kne_get_count(&reply->body, 4);
    for (uint32 i = 0; i < n; i++)
    {
        appendStringInfoString(&s, i ? ", " : "");
        escape_json(&s, reply_text(&reply->body));
    }
    appendStringInfoString(&s, "]}");
    kne_reply_done(reply);
    return DirectFunctionCall1(jsonb_in, CStringGetDatum(s.data));
}

/* ---------------------------------------------------------------- kne_export */

static const char *const formats[] = {"huggingface", "peft"}; /* enum kne_export_format */

Datum
kne_export_view(const KneView *view, const char *given, uint8 format, char **path)
{
    kne_wbuf w;
    KneReply reply;

    if (!has_privs_of_role(kne_caller_id(), ROLE_PG_WRITE_SERVER_FILES))
        ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("permission denied to write files of the server"),
                        errdetail("Only members of pg_write_server_files export models.")));
    *path = resolve(given, view->model);
    kne_wbuf_init(&w);
    kne_put_view(&w, view);
    kne_put_str(&w, *path);
    kne_put_u8(&w, format);
    kne_put_text(&w, card(view, format == KNE_EXPORT_PEFT));
    kne_call_view(view, KNE_MSG_EXPORT, &w, NULL, NULL, &reply);
    return report(&reply, view, *path, formats[format]);
}

static Datum
export_body(PG_FUNCTION_ARGS)
{
    char *format, *path;
    KneView *view;
    uint8 code;

    if (PG_ARGISNULL(0) || PG_ARGISNULL(2))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("path and format of an export must not be null")));
    format = text_to_cstring(PG_GETARG_TEXT_PP(2));
    for (code = 0; code < lengthof(formats) && strcmp(format, formats[code]) != 0;)
        code++;
    if (code == lengthof(formats))
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("\"%s\" is not a format of exports", format),
                        errhint("The formats are \"huggingface\" and \"peft\".")));
    kne_require_preload();
    view = kne_view_for_read(PG_ARGISNULL(1) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(1)), kne_as_of_arg(fcinfo, 3));
    return kne_export_view(view, text_to_cstring(PG_GETARG_TEXT_PP(0)), code, &path);
}

Datum
kne_export(PG_FUNCTION_ARGS)
{
    return kne_as_owner(fcinfo, export_body);
}
