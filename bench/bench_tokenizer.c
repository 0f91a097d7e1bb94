/*
 * bench_tokenizer.c - what a tokenizer.json costs: CPU milliseconds to load it, megabytes of text it encodes in a CPU second.
 *
 * bench_tokenizer TEXT TOKENIZER.JSON...
 * The text is repeated to a megabyte; the best of 5 rounds counts.
 */
#include "kne_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ROUNDS 5
#define TEXT_BYTES 1000000

static double
cpu_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

/* The whole file; NULL and a message where it cannot be read. */
static char *
read_all(const char *path, size_t *len)
{
    FILE *f = fopen(path, "rb");
    char *p = NULL;
    long  n;

    if (f && !fseek(f, 0, SEEK_END) && (n = ftell(f)) > 0 && (p = malloc((size_t) n)))
    {
        rewind(f);
        *len = fread(p, 1, (size_t) n, f);
    }
    if (!p)
        fprintf(stderr, "bench_tokenizer: cannot read %s\n", path);
    if (f)
        fclose(f);
    return p;
}

static int
bench_file(const char *path, const char *text, size_t text_n)
{
    double  load = INFINITY, encode = INFINITY, t;
    size_t  len = 0;
    char   *json = read_all(path, &len);
    kne_ids ids = {0};
    kne_err err = {0};

    if (!json)
        return 1;
    for (int r = 0; r < ROUNDS; r++)
    {
        kne_tokenizer *tok;

        t = cpu_seconds();
        if (kne_tokenizer_parse(json, len, &tok, &err) != KNE_OK)
            return fprintf(stderr, "bench_tokenizer: %s: %s\n", path, err.msg), 1;
        load = fmin(load, cpu_seconds() - t);
        ids.n = 0;
        t = cpu_seconds();
        if (kne_tokenizer_encode(tok, text, text_n, false, &ids, &err) != KNE_OK)
            return fprintf(stderr, "bench_tokenizer: %s: %s\n", path, err.msg), 1;
        encode = fmin(encode, cpu_seconds() - t);
        kne_tokenizer_free(tok);
    }
    printf("| %s | %.1f | %.0f | %.1f | %.2f |\n", path, (double) len * 1e-6, load * 1e3, (double) text_n * 1e-6 / encode,
           (double) text_n / ids.n);
    kne_ids_free(&ids);
    free(json);
    return 0;
}

int
main(int argc, char **argv)
{
    size_t n = 0, at = 0;
    char  *piece, *text = malloc(TEXT_BYTES);
    int    bad = 0;

    if (argc < 3 || !text)
        return fprintf(stderr, "usage: bench_tokenizer TEXT TOKENIZER.JSON...\n"), 2;
    if (!(piece = read_all(argv[1], &n)))
        return 1;
    while (at + n <= TEXT_BYTES)
    {
        memcpy(text + at, piece, n);
        at += n;
    }
    if (!at)
        memcpy(text, piece, at = TEXT_BYTES);
    while (at && (text[at - 1] & 0x80)) /* whole characters */
        at--;
    printf("| file | MB | ms to load | MB/s encoded | bytes a token |\n|---|---|---|---|---|\n");
    for (int i = 2; i < argc; i++)
        bad |= bench_file(argv[i], text, at);
    free(piece);
    free(text);
    return bad;
}
