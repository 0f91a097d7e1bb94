/*
 * kne_options_json.c - options from the JSON object of a message (engine only).
 */
#include "kne_options.h"

#include <cjson/cJSON.h>
#include <string.h>

kne_status
kne_options_parse(kne_options *o, const char *json, size_t len, kne_err *err)
{
    kne_status st = KNE_OK;

    kne_options_defaults(o);
    if (len == 0)
        return KNE_OK;

    const char *end = json;
    cJSON      *root = cJSON_ParseWithLengthOpts(json, len, &end, false);
    while (end < json + len && strchr(" \t\r\n", *end) && *end)
        end++;
    if (!cJSON_IsObject(root) || end != json + len)
        st = kne_error(err, KNE_ERR_INVALID, "edit options are not a JSON object");
    for (const cJSON *c = root && st == KNE_OK ? root->child : NULL; c && st == KNE_OK; c = c->next)
    {
        kne_json_kind kind = cJSON_IsNumber(c) ? KNE_JSON_NUMBER
                             : cJSON_IsBool(c) ? KNE_JSON_BOOL
                             : cJSON_IsString(c) ? KNE_JSON_STRING : KNE_JSON_OTHER;

        st = kne_option_set(o, c->string, kind, cJSON_IsBool(c) ? cJSON_IsTrue(c) : c->valuedouble,
                            c->valuestring, err);
    }
    cJSON_Delete(root);
    return st == KNE_OK ? kne_options_check(o, err) : st;
}
