/*
 * fuzz_json.c - libFuzzer target: any bytes as a JSON object, as an edit's options and as the index of shards
 * (model.safetensors.index.json, beside two real shards). Options that are accepted must survive
 * being printed and read again; an accepted index must name exactly what the shards hold.
 *
 *   clang -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Isrc \
 *     test/fuzz_json.c src/kne_options.c src/kne_options_json.c src/kne_safetensors.c src/kne_base.c \
 *     src/kne_error.c -lcjson -lcrypto -lm -o build/fuzz_json
 *   build/fuzz_json -dict=test/corpus/json.dict new/ test/corpus/json
 */
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kne_options.h"
#include "kne_safetensors.h"

#define MUST(condition) \
    if (!(condition))   \
    __builtin_trap()

static char folder[256];
static char index_path[300];

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void
put(const char *name, const void *data, size_t size)
{
    char  path[300];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", folder, name);
    f = fopen(path, "wb");
    MUST(f && fwrite(data, 1, size, f) == size);
    fclose(f);
}

/* One tensor of four bytes. */
static void
put_shard(const char *file, const char *tensor)
{
    char     image[256] = {0};
    uint64_t n = (uint64_t) snprintf(image + 8, sizeof image - 8,
                                     "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", tensor);

    memcpy(image, &n, sizeof n);
    put(file, image, 8 + n + 4);
}

static void
clean_up(void)
{
    static const char *const name[] = {"a.safetensors", "b.safetensors", "model.safetensors.index.json"};
    char path[300];

    for (int i = 0; i < 3; i++)
    {
        snprintf(path, sizeof path, "%s/%s", folder, name[i]);
        unlink(path);
    }
    rmdir(folder);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *tmp = getenv("TMPDIR");

    (void) argc;
    (void) argv;
    snprintf(folder, sizeof folder, "%.200s/fuzz_json.XXXXXX", tmp && *tmp ? tmp : "/tmp");
    MUST(mkdtemp(folder));
    atexit(clean_up);
    snprintf(index_path, sizeof index_path, "%s/model.safetensors.index.json", folder);
    put_shard("a.safetensors", "x");
    put_shard("b.safetensors", "y");
    return 0;
}

static void
must_be_plain(const kne_err *err)
{
    MUST(err->code != KNE_OK && err->msg[0]);
    MUST(strlen(err->msg) < sizeof err->msg && strlen(err->detail) < sizeof err->detail &&
         strlen(err->hint) < sizeof err->hint);
}

static void
try_options(const char *text, size_t size)
{
    kne_options a, b;
    kne_err     err = {0};
    char        printed[4096], again[4096];

    if (kne_options_parse(&a, text, size, &err) != KNE_OK)
    {
        must_be_plain(&err);
        return;
    }
    MUST(kne_options_check(&a, &err) == KNE_OK);
    kne_options_print(&a, printed, sizeof printed);
    MUST(strlen(printed) < 2048); /* what the provenance has room for */
    MUST(kne_options_parse(&b, printed, strlen(printed), &err) == KNE_OK);
    kne_options_print(&b, again, sizeof again);
    MUST(strcmp(printed, again) == 0);
}

static void
try_index(const uint8_t *data, size_t size)
{
    kne_tensors *t = NULL;
    kne_err      err = {0};

    put("model.safetensors.index.json", data, size);
    if (kne_tensors_open(folder, &t, &err) != KNE_OK)
    {
        MUST(!t);
        must_be_plain(&err);
        for (const char *p = err.msg; *p; p++) /* messages go to logs and clients */
            MUST(*p >= 0x20 && *p < 0x7f);
        return;
    }
    MUST(t->n >= 1 && t->n <= 2 && t->n_files >= 1 && t->n_files <= 2);
    for (int64_t i = 0; i < t->n; i++)
        MUST(t->tensor[i].bytes == 4 && (!strcmp(t->tensor[i].name, "x") || !strcmp(t->tensor[i].name, "y")));
    kne_tensors_close(t);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char    *text = malloc(size ? size : 1); /* no NUL after the end */
    cJSON   *root = NULL;
    kne_err  err = {0};

    memcpy(text, data, size);
    try_options(text, size);
    if (kne_json_object(text, size, "input", &root, &err) == KNE_OK)
    {
        MUST(cJSON_IsObject(root));
        if (cJSON_GetObjectItemCaseSensitive(root, "weight_map"))
            try_index(data, size);
        cJSON_Delete(root);
    }
    else
        must_be_plain(&err);
    free(text);
    return 0;
}
