/*
 * test_tokenizer.c - tests of kne_tokenizer.h (TAP), and, called with options,
 * the other end of test/compare_tokenizers.py and a stopwatch:
 *
 *   test_tokenizer --encode tokenizer.json < records   one line of ids each
 *   test_tokenizer --decode tokenizer.json < ids       one record each line
 *   test_tokenizer --bench tokenizer.json text         MB/s
 *   test_tokenizer --cases DIR                         seeds for fuzz_tokenizer.c
 *
 * A record is its length in decimal, a newline, that many bytes, a newline.
 */
#include <cjson/cJSON.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kne_test.h"
#include "kne_tokenizer.h"
#include "tokenizer_broken.h"

static const char *
source_dir(void) /* where test/ is */
{
    const char *dir = getenv("KNE_SOURCE");

    return dir ? dir : ".";
}

static const char *
shared_dir(void)
{
    const char *dir = getenv("KNE_SHARED");

    return dir ? dir : "../shared";
}

/* The whole of a file, NUL-terminated; NULL: cannot be read. */
static char *
slurp(const char *path, size_t *n)
{
    FILE  *f = fopen(path, "rb");
    char  *s = NULL;
    size_t cap = 0, got;

    *n = 0;
    if (!f)
        return NULL;
    do
    {
        if (cap - *n < 4096)
        {
            char *grown = realloc(s, cap = cap ? 2 * cap : 65536);

            if (!grown)
                break;
            s = grown;
        }
        got = fread(s + *n, 1, cap - *n - 1, f);
        *n += got;
    } while (got > 0);
    fclose(f);
    if (s)
        s[*n] = '\0';
    return s;
}

/* ids against a line of numbers */
static int
same_ids(const kne_ids *ids, const char *line)
{
    int32_t n = 0;
    char   *end;

    for (;; line = end, n++)
    {
        long id = strtol(line, &end, 10);

        if (end == line || memchr(line, '\n', (size_t) (end - line)))
            break;
        if (n >= ids->n || ids->id[n] != id)
            return 0;
    }
    return n == ids->n;
}

static void
show(const kne_ids *ids)
{
    printf("#  ");
    for (int32_t i = 0; i < ids->n; i++)
        printf(" %d", ids->id[i]);
    putchar('\n');
}

/* ---- real tokenizers with vectors ---- */

#define SEPARATOR "\n__ggml_vocab_test__\n"

static void
test_vectors(const char *name)
{
    char           path[1024];
    kne_tokenizer *t = NULL;
    kne_err        err = { 0 };
    char          *in, *out, *text, *line;
    size_t         in_n, out_n;
    int            count = 0, wrong = 0, lost = 0;

    snprintf(path, sizeof path, "%s/tokenizers/%s/vectors.inp", shared_dir(), name);
    in = slurp(path, &in_n);
    snprintf(path, sizeof path, "%s/tokenizers/%s/vectors.out", shared_dir(), name);
    out = slurp(path, &out_n);
    snprintf(path, sizeof path, "%s/tokenizers/%s/tokenizer.json", shared_dir(), name);
    if (!in || !out)
    {
        skip(name, "no vectors in the shared folder");
        goto done;
    }
    if (!check(kne_tokenizer_open(path, &t, &err) == KNE_OK, "%s: loads", name))
    {
        printf("# %s\n", err.msg);
        goto done;
    }
    for (text = in, line = out; text && *line; count++)
    {
        char   *next = strstr(text, SEPARATOR), *eol = strchr(line, '\n'), *back;
        size_t  n = next ? (size_t) (next - text) : strlen(text), back_n;
        kne_ids ids = { 0 };

        if (kne_tokenizer_encode(t, text, n, false, &ids, &err) != KNE_OK || !same_ids(&ids, line))
        {
            wrong++;
            printf("# %s, test %d: got, instead of %.*s\n", name, count,
                   (int) (eol ? eol - line : 0), line);
            show(&ids);
        }
        if (kne_tokenizer_decode(t, ids.id, ids.n, false, &back, &back_n, &err) != KNE_OK ||
            back_n != n || memcmp(back, text, n) != 0)
            lost++;
        free(back);
        kne_ids_free(&ids);
        text = next ? next + strlen(SEPARATOR) : NULL;
        line = eol ? eol + 1 : line + strlen(line);
    }
    check(count > 40 && wrong == 0, "%s: %d vectors, %d differ", name, count, wrong);
    check(lost == 0, "%s: decode(encode(x)) = x, %d differ", name, lost);
done:
    kne_tokenizer_free(t);
    free(in);
    free(out);
}

/* ---- small cases, each one component ---- */

static int
same_array(const kne_ids *ids, const cJSON *want)
{
    int32_t n = 0;
    cJSON  *item;

    cJSON_ArrayForEach(item, want)
    {
        if (n >= ids->n || ids->id[n] != item->valueint)
            return 0;
        n++;
    }
    return n == ids->n;
}

/* want: [text, ids, ids without special tokens, decoded, decoded without them] */
static int
case_text(const kne_tokenizer *t, const char *name, const cJSON *want)
{
    const char *text = cJSON_GetArrayItem(want, 0)->valuestring;
    kne_err     err = { 0 };
    int         good = 1;

    for (int special = 1; special >= 0; special--)
    {
        kne_ids ids = { 0 };

        if (kne_tokenizer_encode(t, text, strlen(text), special, &ids, &err) != KNE_OK ||
            !same_array(&ids, cJSON_GetArrayItem(want, special ? 1 : 2)))
        {
            char *line = cJSON_PrintUnformatted(want);

            good = 0;
            printf("# %s: special %d, got (%s), of %s\n", name, special, err.msg, line);
            show(&ids);
            free(line);
        }
        for (int skip_special = 0; special && skip_special < 2; skip_special++)
        {
            const char *back = cJSON_GetArrayItem(want, 3 + skip_special)->valuestring;
            char       *got;
            size_t      n;

            if (kne_tokenizer_decode(t, ids.id, ids.n, skip_special, &got, &n, &err) != KNE_OK ||
                n != strlen(back) || memcmp(got, back, n) != 0)
            {
                good = 0;
                printf("# %s: decoded (%s) %s, not %s\n", name, err.msg, got ? got : "", back);
            }
            free(got);
        }
        kne_ids_free(&ids);
    }
    return good;
}

/* seeds: a folder to write the cases to instead, as fuzz_tokenizer.c reads them. */
static void
test_cases(const char *seeds)
{
    char   path[1024];
    size_t n;
    char  *json;
    cJSON *root, *item, *part, *text;
    int    count = 0;

    snprintf(path, sizeof path, "%s/test/tokenizer/cases.json", source_dir());
    json = slurp(path, &n);
    root = json ? cJSON_Parse(json) : NULL;
    check(root != NULL, "cases.json is there");
    cJSON_ArrayForEach(item, cJSON_GetObjectItem(root, "cases"))
    {
        const char    *name = cJSON_GetObjectItem(item, "name")->valuestring;
        const char    *model = cJSON_GetObjectItem(item, "model")->valuestring;
        cJSON         *whole = cJSON_CreateObject();
        kne_tokenizer *t = NULL;
        kne_err        err = { 0 };
        char          *made;
        int            good;

        cJSON_AddStringToObject(whole, "version", "1.0");
        cJSON_AddItemReferenceToObject(
            whole, "model",
            cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItem(root, "models"), model));
        cJSON_ArrayForEach(part, cJSON_GetObjectItem(item, "parts"))
            cJSON_AddItemReferenceToObject(whole, part->string, part);
        made = cJSON_PrintUnformatted(whole);
        if (seeds)
        {
            FILE *f;

            snprintf(path, sizeof path, "%s/%d", seeds, count++);
            f = fopen(path, "wb");
            text = cJSON_GetObjectItem(item, "texts")->child;
            if (f && text)
                fwrite(made, 1, strlen(made) + 1, f), fputs(text->child->valuestring, f);
            if (f)
                fclose(f);
        }
        good = made && kne_tokenizer_parse(made, strlen(made), &t, &err) == KNE_OK;
        if (!good)
            printf("# %s\n", err.msg);
        if (good)
            cJSON_ArrayForEach(text, cJSON_GetObjectItem(item, "texts"))
                good &= case_text(t, name, text);
        check(good, "case %s", name);
        kne_tokenizer_free(t);
        free(made);
        cJSON_Delete(whole);
    }
    cJSON_Delete(root);
    free(json);
}

/* ---- files that are wrong ---- */

static void
test_broken(void)
{
    kne_tokenizer *t;
    kne_err        err;
    char          *deep;

    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++)
    {
        kne_status st;

        err = (kne_err) { 0 };
        st = kne_tokenizer_parse(broken[i].json, strlen(broken[i].json), &t, &err);
        check(st == broken[i].want && strstr(err.msg, broken[i].says) && (st == KNE_OK) == !!t,
              "file: %s: %s", broken[i].name, err.msg);
        kne_tokenizer_free(t);
    }
    /* Sequences in Sequences, below cJSON's limit and far above it; the file's every beginning. */
    for (int depth = 40; depth <= 400000; depth *= 100)
    {
        size_t n = 0;

        deep = malloc((size_t) depth * 64 + 256);
        n += (size_t) sprintf(deep + n, "{\"normalizer\":");
        for (int i = 0; i < depth; i++)
            n += (size_t) sprintf(deep + n, "{\"type\":\"Sequence\",\"normalizers\":[");
        for (int i = 0; i < depth; i++)
            n += (size_t) sprintf(deep + n, "]}");
        n += (size_t) sprintf(deep + n, ",\"model\":{\"vocab\":{},\"merges\":[]}}");
        check(kne_tokenizer_parse(deep, n, &t, &err) == KNE_ERR_FORMAT,
              "file: %d Sequences deep: %s", depth, err.msg);
        free(deep);
    }
    {
        static const char whole[] =
            WITH("\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"a\"},"
                 "\"content\":\"b\"},\"added_tokens\":[{\"id\":3,\"content\":\"x\"}]");
        int accepted = 0;

        for (size_t n = 0; n < sizeof whole - 1; n++)
        {
            accepted += kne_tokenizer_parse(whole, n, &t, &err) == KNE_OK;
            kne_tokenizer_free(t);
        }
        check(accepted == 0, "file: no beginning of a file is a file");
    }
    check(kne_tokenizer_open("/nonexistent/tokenizer.json", &t, &err) == KNE_ERR_IO && !t,
          "file: missing: %s", err.msg);
    check(kne_tokenizer_open("/tmp", &t, &err) == KNE_ERR_IO && !t, "file: a folder: %s", err.msg);
}

/* ---- texts and ids that are wrong or odd ---- */

static void
test_edges(void)
{
    static const char json[] =
        "{\"added_tokens\":[{\"id\":6,\"content\":\"<s>\",\"special\":true}],\"model\":{\"vocab\":{"
        "\"a\":0,\"\\u0000\":1,\"a\\u0000\":2,\"\\\\u0000\":3,\"\xEF\xB7\x90\":4},"
        "\"merges\":[\"a \\u0000\"]}}";
    static const char *const invalid[] = { "\x80", "a\xC3", "\xE2\x82", "\xED\xA0\x80", "\xC0\x80",
                                           "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80",
                                           "01234567\xFF" };
    kne_tokenizer *t = NULL;
    kne_err        err = { 0 };
    kne_ids        ids = { 0 };
    char          *text;
    size_t         n;
    int            wrong = 0;

    if (!check(kne_tokenizer_parse(json, sizeof json - 1, &t, &err) == KNE_OK, "NUL in tokens %s",
               err.msg))
        return;
    check(kne_tokenizer_encode(t, "\0a\0\xEF\xB7\x90", 6, true, &ids, &err) == KNE_OK &&
              ids.n == 3 && ids.id[0] == 1 && ids.id[1] == 2 && ids.id[2] == 4,
          "NUL in text");
    check(kne_tokenizer_decode(t, ids.id, 3, false, &text, &n, &err) == KNE_OK && n == 8 &&
              memcmp(text, "\0 a\0 \xEF\xB7\x90", 9) == 0,
          "NUL decoded");
    free(text);
    check(kne_tokenizer_vocab_size(t) == 7 && kne_tokenizer_token_id(t, "<s>") == 6 &&
              kne_tokenizer_token_id(t, "\\u0000") == 3 && kne_tokenizer_token_id(t, "b") == -1 &&
              strcmp(kne_tokenizer_token(t, 6), "<s>") == 0 && !kne_tokenizer_token(t, 5) &&
              !kne_tokenizer_token(t, 7) && !kne_tokenizer_token(t, -1),
          "tokens by id and by text");
    check(kne_tokenizer_is_special(t, 6) && !kne_tokenizer_is_special(t, 0) &&
              !kne_tokenizer_is_special(t, 5) && !kne_tokenizer_is_special(t, -1) &&
              !kne_tokenizer_is_special(t, 1 << 30),
          "special tokens");
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++)
        wrong += kne_tokenizer_encode(t, invalid[i], strlen(invalid[i]), true, &ids, &err) !=
                     KNE_ERR_INVALID || ids.n != 3;
    check(wrong == 0, "invalid UTF-8 is refused, ids stay: %s", err.msg);
    for (int32_t i = -1; i < 9; i++)
        wrong += (kne_tokenizer_decode(t, &i, 1, false, &text, &n, &err) ==
                  (i < 0 || i == 5 || i > 6 ? KNE_ERR_INVALID : KNE_OK)) == 0 ||
                 (free(text), 0);
    check(wrong == 0, "ids outside the vocabulary are refused: %s", err.msg);
    check(kne_tokenizer_decode(t, NULL, 0, false, &text, &n, &err) == KNE_OK && n == 0 && !*text,
          "no ids, no text");
    free(text);
    kne_ids_free(&ids);
    kne_tokenizer_free(t);
}

/* Bytes that are not UTF-8, made from byte tokens: as String::from_utf8_lossy has it. */
static void
test_lossy(void)
{
    static const struct
    {
        const char *bytes, *want;
    } lossy[] = {
        { "a\x80z", "a\xEF\xBF\xBDz" },
        { "\xE2\x82", "\xEF\xBF\xBD" },
        { "\xE2\x82 ", "\xEF\xBF\xBD " },
        { "\xF0\x9F\x98\xF0\x9F\x98\x80", "\xEF\xBF\xBD\xF0\x9F\x98\x80" },
        { "\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD" },
        { "\xC0\xAF\xFF", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD" },
        { "\xE0\x80\xF5", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD" },
    };
    char           json[16384];
    size_t         n = 0;
    kne_tokenizer *t = NULL;
    kne_err        err;
    int            wrong = 0;

    /* ids 0 to 255 are the bytes, in the byte-level alphabet */
    n += (size_t) sprintf(json, "{\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"vocab\":{");
    for (unsigned b = 0, other = 0x100; b < 256; b++)
    {
        int shown = (b > 32 && b < 127) || (b > 160 && b != 173);

        n += (size_t) sprintf(json + n, "%s\"\\u%04x\":%u", b ? "," : "", shown ? b : other++, b);
    }
    n += (size_t) sprintf(json + n, "},\"merges\":[]}}");
    if (!check(kne_tokenizer_parse(json, n, &t, &err) == KNE_OK, "byte-level alphabet"))
        return;
    for (size_t i = 0; i < sizeof lossy / sizeof *lossy; i++)
    {
        int32_t id[16], count = 0;
        char   *text;

        for (const char *p = lossy[i].bytes; *p; p++)
            id[count++] = (unsigned char) *p;
        wrong += kne_tokenizer_decode(t, id, count, false, &text, &n, &err) != KNE_OK ||
                 n != strlen(lossy[i].want) || memcmp(text, lossy[i].want, n) != 0;
        free(text);
    }
    check(wrong == 0, "bytes that are not UTF-8 become U+FFFD");
    kne_tokenizer_free(t);
}

/* ---- long texts, and several threads ---- */

static char *
repeat(const char *s, size_t n)
{
    size_t len = strlen(s);
    char  *text = malloc(n + 1);

    for (size_t i = 0; text && i < n; i++)
        text[i] = s[i % len];
    if (text)
        text[n] = '\0';
    return text;
}

static void
test_long(const char *name)
{
    static const char *const units[] = { "a", " ", "ab", "-=", "\n", "\xE6\x97\xA5", "q\xCC\x87",
                                         "a1 ", "\xE2\x96\x81", "<|", "zxqj" };
    const size_t   n = 600000; /* a multiple of every unit's length */
    char           path[1024];
    kne_tokenizer *t = NULL;
    kne_err        err = { 0 };
    clock_t        from = clock(); /* the processor's time: a loaded machine is no slow algorithm */
    int            wrong = 0;

    snprintf(path, sizeof path, "%s/tokenizers/%s/tokenizer.json", shared_dir(), name);
    if (kne_tokenizer_open(path, &t, &err) == KNE_ERR_IO)
    {
        skip("long words", "no such tokenizer in the shared folder");
        return;
    }
    for (size_t i = 0; t && i < sizeof units / sizeof *units; i++)
    {
        char   *text = repeat(units[i], n), *back = NULL;
        size_t  back_n;
        kne_ids ids = { 0 };

        if (kne_tokenizer_encode(t, text, n, false, &ids, &err) != KNE_OK ||
            kne_tokenizer_decode(t, ids.id, ids.n, false, &back, &back_n, &err) != KNE_OK)
            wrong++;
        else if (strcmp(name, "qwen") != 0 && strcmp(units[i], "\xE2\x96\x81") != 0)
            wrong += back_n != n || memcmp(back, text, n) != 0;
        free(text);
        free(back);
        kne_ids_free(&ids);
    }
    from = clock() - from;
    check(t && wrong == 0 && from < 60 * CLOCKS_PER_SEC, "%s: long texts without a break", name);
    printf("# %.2f s\n", (double) from / CLOCKS_PER_SEC);
    kne_tokenizer_free(t);
}

typedef struct job
{
    const kne_tokenizer *t;
    const char          *text;
    kne_ids              ids;
    kne_status           st;
} job;

static void *
run_job(void *arg)
{
    job *j = arg;

    for (int i = 0; i < 20 && j->st == KNE_OK; i++)
    {
        j->ids.n = 0;
        j->st = kne_tokenizer_encode(j->t, j->text, strlen(j->text), true, &j->ids, NULL);
    }
    return NULL;
}

static void
test_threads(void)
{
    static const char json[] =
        PRE("\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"(?:a|b)+?b\"}");
    kne_tokenizer *t = NULL;
    kne_err        err;
    char          *text = repeat("aab", 3000);
    job            jobs[4] = { 0 };
    pthread_t      threads[4];
    int            wrong = 0;

    if (!check(kne_tokenizer_parse(json, sizeof json - 1, &t, &err) == KNE_OK, "threads: loads"))
        return;
    for (int i = 0; i < 4; i++)
    {
        jobs[i] = (job) { .t = t, .text = text };
        wrong += pthread_create(&threads[i], NULL, run_job, &jobs[i]) != 0;
    }
    for (int i = 0; i < 4; i++)
        wrong += pthread_join(threads[i], NULL) != 0;
    for (int i = 0; i < 4; i++)
    {
        wrong += jobs[i].st != KNE_OK || jobs[i].ids.n != 2000;
        kne_ids_free(&jobs[i].ids);
    }
    check(wrong == 0, "four threads use one tokenizer");
    free(text);
    kne_tokenizer_free(t);
}

/* A pattern that needs exponential time gives up with a status. */
static void
test_greedy(void)
{
    static const char json[] = SPLIT("(?:a|aa)+x");
    kne_tokenizer *t = NULL;
    kne_err        err = { 0 };
    kne_ids        ids = { 0 };
    char          *text = repeat("a", 400);

    memcpy(text + 398, "bx", 2);
    check(kne_tokenizer_parse(json, sizeof json - 1, &t, &err) == KNE_OK &&
              kne_tokenizer_encode(t, text, 400, true, &ids, &err) == KNE_ERR_LIMIT,
          "a pattern without end: %s", err.msg);
    kne_ids_free(&ids);
    kne_tokenizer_free(t);
    free(text);
}

static void
test_stories(void)
{
    static const char text[] = "Once upon a time, there was a little girl named Lily.\n"
                               "\xC3\xA9\xE2\x82\xAC ";
    char              path[1024];
    kne_tokenizer    *t = NULL;
    kne_err           err = { 0 };
    kne_ids           ids = { 0 };
    char             *back = NULL;
    size_t            n = 0;

    snprintf(path, sizeof path, "%s/models/stories260K-fp32/tokenizer.json", shared_dir());
    if (kne_tokenizer_open(path, &t, &err) == KNE_ERR_IO)
    {
        skip("stories260K", "no such model in the shared folder");
        return;
    }
    check(t && kne_tokenizer_encode(t, text, strlen(text), true, &ids, &err) == KNE_OK &&
              same_ids(&ids, "1 403 407 261 378 432 383 286 261 376 298 315 421 395 317 426 13 485 "
                             "503 410\n"),
          "stories260K: ids %s", err.msg);
    check(t && kne_tokenizer_decode(t, ids.id, ids.n, true, &back, &n, &err) == KNE_OK &&
              n == strlen(text) && memcmp(back, text, n) == 0,
          "stories260K: and back");
    check(t && kne_tokenizer_vocab_size(t) == 512 && kne_tokenizer_is_special(t, 1),
          "stories260K: vocabulary");
    free(back);
    kne_ids_free(&ids);
    kne_tokenizer_free(t);
}

/* ---- command line ---- */

static int
open_or_tell(const char *path, kne_tokenizer **t)
{
    kne_err err;

    if (kne_tokenizer_open(path, t, &err) == KNE_OK)
        return 1;
    fprintf(stderr, "%s\n%s\n", err.msg, err.detail);
    return 0;
}

static int
encode_records(const char *path)
{
    kne_tokenizer *t;
    size_t         n;
    kne_err        err;

    if (!open_or_tell(path, &t))
        return 1;
    while (scanf("%zu", &n) == 1)
    {
        char   *s = malloc(n + 1);
        kne_ids ids = { 0 };

        getchar();
        if (!s || fread(s, 1, n, stdin) != n)
            return 1;
        if (kne_tokenizer_encode(t, s, n, true, &ids, &err) != KNE_OK)
            printf("error: %s", err.msg);
        for (int32_t i = 0; i < ids.n; i++)
            printf(i ? " %d" : "%d", ids.id[i]);
        putchar('\n');
        kne_ids_free(&ids);
        free(s);
    }
    kne_tokenizer_free(t);
    return 0;
}

static int
decode_records(const char *path)
{
    kne_tokenizer *t;
    char          *line = NULL, *text;
    size_t         cap = 0, n;
    kne_err        err;

    if (!open_or_tell(path, &t))
        return 1;
    while (getline(&line, &cap, stdin) > 0)
    {
        kne_ids ids = { 0 };
        char   *p = line, *end;

        for (;;)
        {
            long id = strtol(p, &end, 10);

            if (end == p)
                break;
            p = end;
            if (ids.n == ids.cap)
                ids.id = realloc(ids.id, (size_t) (ids.cap = 2 * ids.cap + 64) * sizeof *ids.id);
            if (!ids.id)
                return 1;
            ids.id[ids.n++] = (int32_t) id;
        }
        for (int skip_special = 0; skip_special < 2; skip_special++)
        {
            if (kne_tokenizer_decode(t, ids.id, ids.n, skip_special, &text, &n, &err) != KNE_OK)
            {
                text = strdup(err.msg);
                n = strlen(text);
            }
            printf("%zu\n", n);
            fwrite(text, 1, n, stdout);
            putchar('\n');
            free(text);
        }
        kne_ids_free(&ids);
    }
    free(line);
    kne_tokenizer_free(t);
    return 0;
}

static int
bench(const char *path, const char *text_path)
{
    kne_tokenizer *t = NULL;
    kne_err        err;
    size_t         n;
    char          *text = slurp(text_path, &n);
    double         best_load = 1e9, best = 1e9;
    kne_ids        ids = { 0 };

    if (!text)
        return 1;
    for (int i = 0; i < 7; i++)
    {
        double from = kne_now();

        kne_tokenizer_free(t);
        if (!open_or_tell(path, &t))
            return 1;
        best_load = kne_now() - from < best_load ? kne_now() - from : best_load;
    }
    for (int i = 0; i < 7; i++)
    {
        double from = kne_now();

        ids.n = 0;
        if (kne_tokenizer_encode(t, text, n, false, &ids, &err) != KNE_OK)
            return 1;
        best = kne_now() - from < best ? kne_now() - from : best;
    }
    printf("%s: load %.1f ms, %zu bytes to %d tokens, %.1f MB/s\n", path, best_load * 1e3, n, ids.n,
           (double) n / best / 1e6);
    kne_ids_free(&ids);
    kne_tokenizer_free(t);
    free(text);
    return 0;
}

int
main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--encode") == 0)
        return encode_records(argv[2]);
    if (argc == 3 && strcmp(argv[1], "--decode") == 0)
        return decode_records(argv[2]);
    if (argc == 4 && strcmp(argv[1], "--bench") == 0)
        return bench(argv[2], argv[3]);
    if (argc == 3 && strcmp(argv[1], "--cases") == 0)
    {
        test_cases(argv[2]);
        return 0;
    }
    test_cases(NULL);
    test_broken();
    test_edges();
    test_lossy();
    test_threads();
    test_greedy();
    test_stories();
    test_long("gpt2");
    test_long("llama2");
    test_long("qwen");
    test_vectors("gpt2");
    test_vectors("llama2");
    test_vectors("llama3");
    test_vectors("qwen");
    return kne_test_done();
}
