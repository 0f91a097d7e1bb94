/*
 * bench_peer.c - kne's side of bench/peer_torch.py: the edits of a list, each alone, then all as one batch, with a fixed
 * number of steps. One JSON object on stdout.
 *
 * bench_peer MODEL EDITS [--from I] [--alone N] [--batch N] [--prompts N] [--anchors N] [--threads T] [--options JSON]
 * --from, --alone: which of the list, and how many, are timed one at a time (after one that is not timed); --batch: how many together (0: none);
 * --prompts, --anchors: at most so many of each edit's
 */
#include "bench_list.h"

#include <time.h>

static edit_list list;
static float     losses[10001];
static int       n_losses;

static double
cpu_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

static void
die(const char *what, const kne_err *err)
{
    fprintf(stderr, "bench_peer: %s: %s. %s\n", what, err ? err->msg : "", err ? err->detail : "");
    exit(1);
}

/* The mean loss of the running edits before step `done`, told one pass later. */
static void
progress(void *ctx, int phase, int done, int total, float loss, int finished)
{
    (void) ctx;
    (void) total;
    (void) finished;
    if (phase == KNE_PHASE_OPTIMISE && done > 0 && done <= 10000)
    {
        losses[done - 1] = loss;
        n_losses = done;
    }
}

int
main(int argc, char **argv)
{
    int          from = 0, alone = 3, batch = 16, threads = 2, prompts = 16, anchors = 64;
    const char  *json = "";
    kne_err      err;
    kne_options  opt;
    kne_model   *model;
    kne_backend *be;
    kne_view    *view;
    kne_edit_result *res;
    struct kne_ref_cache *cache;

    if (argc < 3)
        return fprintf(stderr, "usage: bench_peer MODEL EDITS [--from I] [--alone N] [--batch N] [--threads T] [--options JSON]\n"), 2;
    for (int i = 3; i + 1 < argc; i += 2)
    {
        if (!strcmp(argv[i], "--from"))
            from = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--alone"))
            alone = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--batch"))
            batch = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--prompts"))
            prompts = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--anchors"))
            anchors = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--threads"))
            threads = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--options"))
            json = argv[i + 1];
        else
            return fprintf(stderr, "bench_peer: what is %s?\n", argv[i]), 2;
    }
    if (!list_read(argv[2], &list))
        die("cannot read the edits", NULL);
    for (int i = 0; i < list.n; i++)
    {
        list.edit[i].n_prompts = list.edit[i].n_prompts < prompts ? list.edit[i].n_prompts : prompts;
        list.edit[i].n_anchors = list.edit[i].n_anchors < anchors ? list.edit[i].n_anchors : anchors;
    }
    if (kne_cpu_backend_new(threads, NULL, &be, &err) != KNE_OK || kne_model_open(argv[1], &model, &err) != KNE_OK ||
        kne_options_parse(&opt, json, strlen(json), &err) != KNE_OK || kne_ref_cache_new(&cache, &err) != KNE_OK ||
        kne_view_new(model, be, 0, NULL, NULL, &view, &err) != KNE_OK)
        die("start", &err);

    printf("{\"backend\": \"%s\", \"dtype\": \"%s\", \"alone\": [", be->name, kne_model_dtype_name(model));
    for (int i = -1; i < alone + (batch > 0); i++)
    {
        bool          all = i == alone;
        int           at = (from + (i < 0 ? 0 : i)) % list.n, n = all ? (batch < list.n ? batch : list.n) : 1;
        kne_edit_job  job = {.model = model, .backend = be, .view = view, .options = opt, .n_known = list.n_known, .known = list.known,
                             .n_edits = n, .edit = &list.edit[all ? 0 : at], .calls = {.progress = progress}, .cache = cache};
        double        t0 = kne_now(), c0 = cpu_seconds();
        int           steps = 0, applied = 0;

        n_losses = 0;
        if (kne_edit_run(&job, &res, &err) != KNE_OK)
            die("edit", &err);
        t0 = kne_now() - t0;
        c0 = cpu_seconds() - c0;
        for (int k = 0; k < n; k++)
        {
            steps += res->edit[k].steps;
            applied += res->edit[k].outcome == KNE_OUTCOME_APPLIED;
        }
        if (i >= 0)
        {
            printf("%s{\"edits\": %d, \"seconds\": %.6f, \"cpu\": %.6f, \"attribution\": %.6f, \"optimisation\": %.6f, \"steps\": %d, \"applied\": %d, "
                   "\"p_before\": %.9g, \"p_after\": %.9g, \"losses\": [",
                   all ? "], \"batch\": " : i ? ", " : "", n, t0, c0, res->attribute_seconds, res->optimise_seconds, steps,
                   applied, res->edit[0].p_before, res->edit[0].p_after);
            for (int k = 0; k < n_losses && !all; k++)
                printf("%s%.7g", k ? ", " : "", losses[k]);
            printf("], \"ensemble\": [");
            for (int k = 0; k < res->edit[0].n_ensemble && !all; k++)
                printf("%s%d", k ? ", " : "", res->edit[0].ensemble[k].layer * model->arch.d_ff + res->edit[0].ensemble[k].neuron);
            printf("]}");
        }
        kne_edit_result_free(res);
    }
    printf(batch > 0 ? "}\n" : "]}\n");
    return 0;
}
