/*
 * kne_tokenizer_load.c - from tokenizer.json to a kne_tokenizer.
 *
 * "truncation" and "padding" are ignored on purpose: they are settings for
 * batches of a training script, and a text cut without notice would be edited
 * or scored as something it is not. Lengths are the caller's business.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kne_tokenizer_impl.h"

static int
by_id(const void *x, const void *y)
{
    const kne_added *a = x, *b = y;

    return (a->id > b->id) - (a->id < b->id);
}

/* One added token: checked against the model's vocabulary, and put there if it is new. */
static kne_status
load_added_token(kne_tokenizer *t, cJSON *json, kne_added *a, kne_matcher *m, kne_err *err)
{
    kne_tokbuf tmp[2] = { 0 }, normal = { 0 };
    int32_t    known;
    bool       start = true;
    kne_status st;

    if (!cJSON_IsObject(json))
        return kne_error(err, KNE_ERR_FORMAT, "an added token in tokenizer.json is no object");
    KNE_TRY(kne_tokjson_int(json, "id", -1, KNE_TOK_MAX_ID, &a->id, err));
    KNE_TRY(kne_tokjson_string(json, "content", "added token", &a->text, &a->n, err));
    a->normal = a->text;
    a->normal_n = a->n;
    KNE_TRY(kne_tokjson_bool(json, "single_word", false, &a->single_word, err));
    KNE_TRY(kne_tokjson_bool(json, "lstrip", false, &a->lstrip, err));
    KNE_TRY(kne_tokjson_bool(json, "rstrip", false, &a->rstrip, err));
    KNE_TRY(kne_tokjson_bool(json, "special", false, &a->special, err));
    KNE_TRY(kne_tokjson_bool(json, "normalized", !a->special, &a->normalized, err));
    if (a->n == 0)
        return KNE_OK; /* the library ignores it: dropped by the caller */

    known = kne_bpe_find(&t->bpe, a->text, a->n);
    if (known >= 0 && known != a->id)
        return kne_error(err, KNE_ERR_FORMAT,
                         "added token \"%.*s\" has id %d, but %d in the vocabulary",
                         kne_u8_prefix(a->text, a->n, 60), a->text, a->id, known);
    if (known < 0)
        KNE_TRY(kne_bpe_add_token(&t->bpe, a->id, a->text, a->n, err));
    if (t->bpe.flags[a->id] & KNE_TOK_ADDED)
        return kne_error(err, KNE_ERR_FORMAT, "two added tokens have the id %d", a->id);
    t->bpe.flags[a->id] |= KNE_TOK_ADDED | (a->special ? KNE_TOK_SPECIAL : 0);
    if (!a->normalized || t->norm.n == 0)
        return KNE_OK;

    st = kne_normalizer_run(&t->norm, m, a->text, a->n, &start, tmp, &normal, err);
    kne_tokbuf_free(&tmp[0]);
    kne_tokbuf_free(&tmp[1]);
    if (st == KNE_OK && (normal.n != a->n || memcmp(normal.s, a->text, a->n) != 0))
    {
        t->bpe.flags[a->id] |= KNE_TOK_RENAMED;
        st = kne_tokbuf_reserve(&normal, 1, err); /* not NULL, even if nothing is left */
        a->normal = normal.s;
        a->normal_n = normal.n;
    }
    else
        kne_tokbuf_free(&normal);
    return st;
}

static kne_status
load_added(kne_tokenizer *t, cJSON *list, kne_err *err)
{
    kne_matcher m = { 0 };
    kne_status  st = KNE_OK;
    cJSON      *item;
    int         n = list ? cJSON_GetArraySize(list) : 0;

    t->added = calloc((size_t) n + 1, sizeof *t->added);
    if (!t->added)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    cJSON_ArrayForEach(item, list)
    {
        kne_added *a = &t->added[t->n_added++]; /* counted first: freed whatever happens */

        st = load_added_token(t, item, a, &m, err);
        if (st != KNE_OK)
            break;
        if (a->n == 0)
        {
            free(a->text);
            *a = (kne_added) { 0 };
            t->n_added--;
        }
    }
    kne_matcher_free(&m);
    if (st != KNE_OK)
        return st;
    qsort(t->added, (size_t) t->n_added, sizeof *t->added, by_id);
    KNE_TRY(kne_finder_build(&t->raw, t->added, t->n_added, false, err));
    return kne_finder_build(&t->normal, t->added, t->n_added, true, err);
}

static kne_status
template_add(kne_tokenizer *t, int32_t id, size_t *cap, kne_err *err)
{
    if ((size_t) t->n_template == *cap)
        KNE_TRY(kne_tok_grow((void **) &t->template_id, cap, *cap, sizeof *t->template_id, err));
    t->template_id[t->n_template++] = id;
    return KNE_OK;
}

/* {"SpecialToken": {"id": "<s>"}} or {"Sequence": {"id": "A"}} */
static kne_status
load_piece(kne_tokenizer *t, cJSON *piece, cJSON *tokens, size_t *cap, kne_err *err)
{
    cJSON      *special = kne_tokjson_get(piece, "SpecialToken");
    cJSON      *sequence = kne_tokjson_get(piece, "Sequence");
    const char *name = cJSON_GetStringValue(kne_tokjson_get(special ? special : sequence, "id"));
    cJSON      *ids, *item;

    if (!special && name && strcmp(name, "A") == 0)
        return template_add(t, -1, cap, err);
    if (!special || !name)
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's TemplateProcessing is malformed");
    ids = kne_tokjson_get(kne_tokjson_get(tokens, name), "ids");
    if (!cJSON_IsArray(ids))
        return kne_error(err, KNE_ERR_FORMAT,
                         "tokenizer's TemplateProcessing does not define the token \"%.*s\"",
                         kne_u8_prefix(name, strlen(name), 60), name);
    cJSON_ArrayForEach(item, ids)
    {
        int32_t id;

        if (!kne_tokjson_to_int(item, t->bpe.n_id, &id) || t->bpe.token[id].at == 0)
            return kne_error(err, KNE_ERR_FORMAT,
                             "tokenizer's TemplateProcessing has an id outside the vocabulary");
        KNE_TRY(template_add(t, id, cap, err));
    }
    return KNE_OK;
}

static kne_status
load_post_processor(kne_tokenizer *t, cJSON *json, int depth, kne_err *err)
{
    const char *type;
    cJSON      *list, *item;
    size_t      cap = 0;

    if (!json)
        return KNE_OK;
    type = kne_tokjson_type(json);
    if (type && strcmp(type, "ByteLevel") == 0)
        return KNE_OK; /* changes offsets only, and none are kept here */
    if (type && strcmp(type, "Sequence") == 0)
    {
        list = kne_tokjson_get(json, "processors");
        if (!list || !cJSON_IsArray(list) || depth == KNE_TOK_MAX_DEPTH)
            return kne_error(err, KNE_ERR_FORMAT,
                             "tokenizer's post-processor Sequence is malformed");
        cJSON_ArrayForEach(item, list)
            KNE_TRY(load_post_processor(t, item, depth + 1, err));
        return KNE_OK;
    }
    if (!type || strcmp(type, "TemplateProcessing") != 0)
        return kne_tok_unsupported(err, "post-processor", type);
    if (t->template_id)
        return kne_error(err, KNE_ERR_UNSUPPORTED,
                         "tokenizer has more than one TemplateProcessing, which is not supported");
    list = kne_tokjson_get(json, "single");
    if (!list || !cJSON_IsArray(list))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer's TemplateProcessing is malformed");
    KNE_TRY(kne_tok_grow((void **) &t->template_id, &cap, 0, sizeof *t->template_id, err));
    cJSON_ArrayForEach(item, list)
        KNE_TRY(load_piece(t, item, kne_tokjson_get(json, "special_tokens"), &cap, err));
    return KNE_OK;
}

static kne_status
load(kne_tokenizer *t, cJSON *root, size_t file_n, kne_err *err)
{
    cJSON      *version = kne_tokjson_get(root, "version");
    cJSON      *model = kne_tokjson_get(root, "model");
    cJSON      *added = kne_tokjson_get(root, "added_tokens");
    const char *type = kne_tokjson_type(model);

    if (version && (!cJSON_IsString(version) || strcmp(version->valuestring, "1.0") != 0))
        return kne_error(err, KNE_ERR_UNSUPPORTED, "tokenizer.json is not of version 1.0");
    if (!model || !cJSON_IsObject(model))
        return kne_error(err, KNE_ERR_FORMAT, "tokenizer.json has no model");
    if (type ? strcmp(type, "BPE") != 0 : !kne_tokjson_get(model, "merges")) /* old: no type */
        return kne_tok_unsupported(err, "model", type);
    if (added && !cJSON_IsArray(added))
        return kne_error(err, KNE_ERR_FORMAT, "\"added_tokens\" in tokenizer.json is no array");

    KNE_TRY(kne_normalizer_load(&t->norm, kne_tokjson_get(root, "normalizer"), err));
    KNE_TRY(kne_pretokenizer_load(&t->pre, kne_tokjson_get(root, "pre_tokenizer"), err));
    KNE_TRY(kne_decoder_load(&t->dec, kne_tokjson_get(root, "decoder"), err));
    KNE_TRY(kne_bpe_load(&t->bpe, model, added, file_n, t->pre.byte_level, err));
    KNE_TRY(load_added(t, added, err));
    return load_post_processor(t, kne_tokjson_get(root, "post_processor"), 0, err);
}

kne_status
kne_tokenizer_parse(const char *json, size_t len, kne_tokenizer **out, kne_err *err)
{
    kne_tokenizer *t;
    cJSON         *root;
    kne_status     st;

    *out = NULL;
    KNE_TRY(kne_tokjson_parse(json, len, &root, err));
    t = calloc(1, sizeof *t);
    st = t ? load(t, root, len, err)
           : kne_error(err, KNE_ERR_NOMEM, "out of memory in the tokenizer");
    cJSON_Delete(root);
    if (st == KNE_OK)
        *out = t;
    else
        kne_tokenizer_free(t);
    return st;
}

static kne_status
read_file(const char *path, kne_tokbuf *out, kne_err *err)
{
    int         fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not block */
    FILE       *f = fd < 0 ? NULL : fdopen(fd, "rb");
    struct stat info;
    kne_status  st = KNE_OK;

    if (!f)
    {
        st = kne_error(err, KNE_ERR_IO, "could not open \"%s\": %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return st;
    }
    if (fstat(fileno(f), &info) != 0)
        st = kne_error(err, KNE_ERR_IO, "could not stat \"%s\": %s", path, strerror(errno));
    else if (!S_ISREG(info.st_mode))
        st = kne_error(err, KNE_ERR_IO, "\"%s\" is not a regular file", path);
    else if ((uint64_t) info.st_size > KNE_TOK_MAX_TEXT)
        st = kne_error(err, KNE_ERR_LIMIT, "\"%s\" is too large", path);
    else
        st = kne_tokbuf_reserve(out, (size_t) info.st_size + 1, err);
    if (st == KNE_OK)
    {
        out->n = fread(out->s, 1, (size_t) info.st_size, f);
        if (out->n != (size_t) info.st_size)
            st = kne_error(err, KNE_ERR_IO, "could not read \"%s\": %s", path,
                           ferror(f) ? strerror(errno) : "it became shorter");
    }
    fclose(f);
    return st;
}

kne_status
kne_tokenizer_open(const char *path, kne_tokenizer **out, kne_err *err)
{
    kne_tokbuf text = { 0 };
    kne_status st;

    *out = NULL;
    st = read_file(path, &text, err);
    if (st == KNE_OK)
        st = kne_tokenizer_parse(text.s, text.n, out, err);
    kne_tokbuf_free(&text);
    return st;
}

void
kne_tokenizer_free(kne_tokenizer *t)
{
    if (!t)
        return;
    for (int32_t i = 0; i < t->n_added; i++)
    {
        if (t->added[i].normal != t->added[i].text)
            free(t->added[i].normal);
        free(t->added[i].text);
    }
    free(t->added);
    kne_finder_free(&t->raw);
    kne_finder_free(&t->normal);
    kne_normalizer_free(&t->norm);
    kne_pretokenizer_free(&t->pre);
    kne_decoder_free(&t->dec);
    kne_bpe_free(&t->bpe);
    free(t->template_id);
    free(t);
}
