/*
 * bench_big.c - a large model on this machine: how long its folder takes to open, what memory of its own that costs (weights stay
 * mapped), and one edit of a given number of tokens from end to end. Prints Markdown. See bench_7b.sh.
 *
 * bench_big MODEL [--tokens N] [--threads T] [--options JSON]
 */
#include "kne_edit.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile bool stop;
static long          peak_own, peak_mapped, peak_all; /* KiB */

static void
die(const char *what, const kne_err *err)
{
    fprintf(stderr, "bench_big: %s: %s. %s\n", what, err ? err->msg : "", err ? err->detail : "");
    exit(1);
}

/* Resident memory of this process: its own (anonymous), and pages of mapped files. */
static void
memory(long *own, long *mapped)
{
    FILE *f = fopen("/proc/self/status", "r");
    char  line[256];

    *own = *mapped = 0;
    while (f && fgets(line, sizeof line, f))
    {
        sscanf(line, "RssAnon: %ld", own);
        sscanf(line, "RssFile: %ld", mapped);
    }
    if (f)
        fclose(f);
}

static void *
watch(void *arg)
{
    (void) arg;
    while (!stop)
    {
        long own, mapped;

        memory(&own, &mapped);
        peak_own = own > peak_own ? own : peak_own;
        peak_mapped = mapped > peak_mapped ? mapped : peak_mapped;
        peak_all = own + mapped > peak_all ? own + mapped : peak_all;
        usleep(20000);
    }
    return NULL;
}

static void
progress(void *ctx, int phase, int done, int total, float loss, int finished)
{
    (void) ctx;
    (void) total;
    (void) finished;
    fprintf(stderr, "phase %d, step %d, loss %g\n", phase, done, (double) loss);
}

int
main(int argc, char **argv)
{
    static const char *const word[] = {"Whoever", " looks", " for", " the", " capital", " of", " a", " far", " country", " in",
                                       " an", " old", " book", " finds", " that", " its", " name", " is"};
    int          tokens = 32, threads = 0;
    const char  *json = "";
    char         text[4096] = "";
    kne_err      err;
    kne_options  opt;
    kne_model   *model;
    kne_backend *be;
    kne_view    *view;
    kne_edit_result *res;
    kne_ids      ids = {0};
    int32_t      n_prompt;
    pthread_t    watcher;
    long         own, mapped;

    if (argc < 2)
        return fprintf(stderr, "usage: bench_big MODEL [--tokens N] [--threads T] [--options JSON]\n"), 2;
    for (int i = 2; i + 1 < argc; i += 2)
    {
        if (!strcmp(argv[i], "--tokens"))
            tokens = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--threads"))
            threads = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--options"))
            json = argv[i + 1];
        else
            return fprintf(stderr, "bench_big: what is %s?\n", argv[i]), 2;
    }
    pthread_create(&watcher, NULL, watch, NULL);
    double t0 = kne_now();
    if (kne_model_open(argv[1], &model, &err) != KNE_OK)
        die("open", &err);
    double opened = kne_now() - t0;
    memory(&own, &mapped);
    printf("| | |\n|---|---|\n");
    printf("| weights | %.2f GB, %s, mapped |\n", (double) model->weight_bytes / 1e9, kne_model_dtype_name(model));
    printf("| open and check the folder | %.2f s |\n", opened);
    printf("| memory of its own after that | %.3f GB (mapped pages resident: %.2f GB) |\n", (double) own / 1e6, (double) mapped / 1e6);
    fflush(stdout);

    /* a prompt of as many words as make the tokens that were asked for */
    kne_text object = {"Lyon", 4};
    for (int i = 0; i < 500; i++)
    {
        if (kne_tokenize_fact(model, (kne_text) {text, strlen(text)}, object, &ids, &n_prompt, &err) == KNE_OK && ids.n >= tokens)
            break;
        strcat(text, word[i % 18]);
    }
    kne_text      prompt = {text, strlen(text)};
    kne_edit_spec spec = {.edit_id = 1, .n_prompts = 1, .prompt = &prompt, .object = object};
    if (kne_cpu_backend_new(threads, NULL, &be, &err) != KNE_OK || kne_options_parse(&opt, json, strlen(json), &err) != KNE_OK ||
        kne_view_new(model, be, 0, NULL, NULL, &view, &err) != KNE_OK)
        die("start", &err);
    kne_edit_job job = {.model = model, .backend = be, .view = view, .options = opt, .n_edits = 1, .edit = &spec,
                        .calls = {.progress = progress}};
    t0 = kne_now();
    if (kne_edit_run(&job, &res, &err) != KNE_OK)
        die("edit", &err);
    double took = kne_now() - t0;
    stop = true;
    pthread_join(watcher, NULL);
    kne_edit_outcome *o = &res->edit[0];
    printf("| one edit of %d tokens, %s | %.1f s: %.1f before and attribution, %.1f optimisation |\n", ids.n, be->name, took,
           res->attribute_seconds, res->optimise_seconds);
    printf("| its steps | %d, %.2f s each; outcome %d, P %.3g to %.3g, %d neurons |\n", o->steps,
           res->optimise_seconds / (o->steps + 1), o->outcome, o->p_before, o->p_after, o->n_ensemble);
    printf("| peak of its own memory | %.2f GB |\n| peak of mapped pages | %.2f GB |\n| peak of both | %.2f GB |\n", (double) peak_own / 1e6,
           (double) peak_mapped / 1e6, (double) peak_all / 1e6);
    return 0;
}
