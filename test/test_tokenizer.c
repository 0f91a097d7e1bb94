/*
 * test_tokenizer.c - tests of kne_tokenizer.h (TAP), and, called with options,
 * the other end of test/compare_tokenizers.py and a stopwatch:
 *
 *   test_tokenizer --encode tokenizer.json < records   one line of ids each
 *   test_tokenizer --decode tokenizer.json < ids       one record each line
 *   test_tokenizer --bench tokenizer.json text         MB/s
 *
 * A record is its length in decimal, a newline, that many bytes, a newline.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "kne_test.h"
#include "kne_tokenizer.h"

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
    test_vectors("gpt2");
    test_vectors("llama2");
    test_vectors("llama3");
    test_vectors("qwen");
    return kne_test_done();
}
