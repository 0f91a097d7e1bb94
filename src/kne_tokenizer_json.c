/*
 * kne_tokenizer_json.c - tokenizer.json through cJSON, every field checked.
 *
 * cJSON hands out C strings, so an escaped NUL would cut a text short. Such an
 * escape is put in as the byte 0xFF, which no UTF-8 contains and cJSON copies,
 * and turned back by kne_tokjson_text. Numbers are doubles: only integers in
 * range are taken.
 */
#include <math.h>
#include <stdlib.h>

#include "kne_tokenizer_impl.h"

#define STAND_IN "\xFF"

/* The first escaped NUL of text (to end) at s or after it, NULL: none. "\\u0000" is a backslash and letters. */
static const char *
find_nul(const char *text, const char *s, const char *end)
{
    while ((s = memmem(s, (size_t) (end - s), "\\u0000", 6)) != NULL)
    {
        const char *p = s;

        /* The text before is known to be JSON up to here only if cJSON agrees later; counting
         * backslashes is right inside strings and harmless outside. */
        while (p > text && p[-1] == '\\')
            p--;
        if ((s - p) % 2 == 0)
            return s;
        s += 6;
    }
    return NULL;
}

static kne_status
substitute_nul(const char *text, size_t n, kne_tokbuf *out, kne_err *err)
{
    const char *end = text + n, *from = text, *hit;

    while ((hit = find_nul(text, from, end)) != NULL)
    {
        KNE_TRY(kne_tokbuf_add(out, from, (size_t) (hit - from), err));
        KNE_TRY(kne_tokbuf_add(out, STAND_IN, 1, err));
        from = hit + 6;
    }
    return kne_tokbuf_add(out, from, (size_t) (end - from), err);
}

kne_status
kne_tokjson_parse(const char *text, size_t n, cJSON **root, kne_err *err)
{
    kne_tokbuf  copy = { 0 };
    const char *end = NULL;
    kne_status  st = KNE_OK;

    *root = NULL;
    if (n > KNE_TOK_MAX_TEXT)
        return kne_error(err, KNE_ERR_LIMIT, "tokenizer.json is too large");
    if (n == 0 || memchr(text, '\0', n) || !kne_u8_valid(text, n))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer.json is not text in UTF-8");
    if (find_nul(text, text, text + n))
    {
        st = substitute_nul(text, n, &copy, err);
        text = copy.s;
        n = copy.n;
    }
    if (st == KNE_OK)
    {
        *root = cJSON_ParseWithLengthOpts(text, n, &end, false);
        if (*root)
            while (end < text + n && strchr(" \t\r\n", *end))
                end++;
        if (!*root || end < text + n)
        {
            size_t at = end ? (size_t) (end - text) : 0;

            st = kne_error(err, KNE_ERR_FORMAT, "tokenizer.json is not valid JSON near byte %zu",
                           at);
        }
        else if (!cJSON_IsObject(*root))
            st = kne_error(err, KNE_ERR_FORMAT, "tokenizer.json is not a JSON object");
    }
    kne_tokbuf_free(&copy);
    if (st != KNE_OK)
    {
        cJSON_Delete(*root);
        *root = NULL;
    }
    return st;
}

char *
kne_tokjson_text(char *s, size_t *n)
{
    *n = strlen(s);
    for (char *hit = s; (hit = memchr(hit, STAND_IN[0], *n - (size_t) (hit - s))) != NULL;)
        *hit = '\0';
    return s;
}

cJSON *
kne_tokjson_get(cJSON *object, const char *name)
{
    cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);

    return item && cJSON_IsNull(item) ? NULL : item;
}

const char *
kne_tokjson_type(cJSON *object)
{
    return cJSON_GetStringValue(kne_tokjson_get(object, "type"));
}

kne_status
kne_tokjson_string(cJSON *object, const char *name, const char *owner, char **s, size_t *n,
                   kne_err *err)
{
    cJSON *item = kne_tokjson_get(object, name);
    char  *text;

    *s = NULL;
    if (!item || !cJSON_IsString(item))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's %s has no text \"%s\"", owner, name);
    text = kne_tokjson_text(item->valuestring, n);
    *s = malloc(*n + 1);
    if (!*s)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    memcpy(*s, text, *n + 1);
    return KNE_OK;
}

kne_status
kne_tokjson_bool(cJSON *object, const char *name, bool missing, bool *value, kne_err *err)
{
    cJSON *item = kne_tokjson_get(object, name);

    *value = item ? cJSON_IsTrue(item) : missing;
    if (item && !cJSON_IsBool(item))
        return kne_error(err, KNE_ERR_FORMAT, "\"%s\" in tokenizer.json is not true or false",
                         name);
    return KNE_OK;
}

bool
kne_tokjson_to_int(const cJSON *item, int32_t limit, int32_t *value)
{
    double d;

    if (!cJSON_IsNumber(item))
        return false;
    d = item->valuedouble;
    if (!(d >= 0 && d < limit) || d != floor(d))
        return false;
    *value = (int32_t) d;
    return true;
}

kne_status
kne_tokjson_int(cJSON *object, const char *name, int32_t missing, int32_t limit, int32_t *value,
                kne_err *err)
{
    cJSON *item = kne_tokjson_get(object, name);

    *value = missing;
    if (!item && missing >= 0)
        return KNE_OK;
    if (!item || !kne_tokjson_to_int(item, limit, value))
        return kne_error(err, KNE_ERR_FORMAT,
                         "\"%s\" in tokenizer.json is not an integer from 0 to %d", name,
                         limit - 1);
    return KNE_OK;
}

kne_status
kne_tok_unsupported(kne_err *err, const char *kind, const char *type)
{
    if (!type)
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's %s has no type", kind);
    return kne_error(err, KNE_ERR_UNSUPPORTED, "tokenizer's %s \"%.*s\" is not supported", kind,
                     kne_u8_prefix(type, strlen(type), 80), type);
}
