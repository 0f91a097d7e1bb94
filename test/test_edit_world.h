/*
 * test_edit_world.h - part of test_edit.c: a tiny random model with a tokenizer
 * of letters, what it happens to know, and things to teach it; and the
 * comparison of two results.
 */
#ifndef TEST_EDIT_WORLD_H
#define TEST_EDIT_WORLD_H

#include "test_edit_attrib.h"

/* a..p are tokens 0..15, " a".." p" 17..32; an object of one letter is one token. */
#define WORLD_LETTERS "abcdefghijklmnop"
enum { WORLD_KNOWN = 80, WORLD_EDITS = 8, WORLD_TEXT = 12, WORLD_BOS = 34 };

typedef struct world
{
    tiny_model *t;
    kne_view   *base;
    char known_prompt[WORLD_KNOWN + 8][WORLD_TEXT], known_object[WORLD_KNOWN + 8][WORLD_TEXT];
    kne_known   known[WORLD_KNOWN + 8];
    int32_t     n_known;
    char        prompt[WORLD_EDITS][2][WORLD_TEXT], object[WORLD_EDITS][WORLD_TEXT];
    kne_text    prompts[WORLD_EDITS][2];
    int32_t     anchors[WORLD_EDITS][8];
    kne_edit_spec edit[WORLD_EDITS];
} world;

static kne_text
text_of(const char *s)
{
    return (kne_text) {s, strlen(s)};
}

/* Byte-level BPE with a beginning-of-text token before every text. */
static kne_tokenizer *
letters(void)
{
    char           json[4096];
    size_t         n = 0;
    kne_tokenizer *t = NULL;
    kne_err        err;

#define ADD(...) n += (size_t) snprintf(json + n, sizeof json - n, __VA_ARGS__)
    ADD("{\"added_tokens\":[{\"id\":%d,\"content\":\"<s>\",\"special\":true}],"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true},"
        "\"decoder\":{\"type\":\"ByteLevel\"},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
        "{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":"
        "0}}],"
        "\"pair\":[],\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[%d],\"tokens\":[\"<s>\"]}"
        "}},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{",
        WORLD_BOS, WORLD_BOS);
    for (int i = 0; i < 16; i++)
        ADD("\"%c\":%d,\"\\u0120%c\":%d,", WORLD_LETTERS[i], i, WORLD_LETTERS[i], 17 + i);
    ADD("\"\\u0120\":16,\".\":33},\"merges\":[");
    for (int i = 0; i < 16; i++)
        ADD("%s\"\\u0120 %c\"", i ? "," : "", WORLD_LETTERS[i]);
    ADD("]}}");
#undef ADD
    return ok(kne_tokenizer_parse(json, n, &t, &err), &err) ? t : NULL;
}

static void
random_word(char *out, uint64_t *seed)
{
    int n = 3 + (int) (kne_random_next(seed) % 5);

    for (int i = 0; i < n; i++)
        out[i] = WORLD_LETTERS[kne_random_next(seed) % 16];
    if (n > 5)
        out[2] = ' ';
    out[n] = '\0';
}

/* The letter that the model puts after the prompt with most probability; its share of all. */
static int
best_letter(const world *w, const kne_view *view, const char *prompt, bool *is_best)
{
    kne_text    p[16], o[16];
    char        letter[16][2];
    double      logp[16];
    uint8_t     right[16];
    int         best = 0;
    kne_err     err;

    for (int i = 0; i < 16; i++)
    {
        letter[i][0] = WORLD_LETTERS[i];
        letter[i][1] = '\0';
        p[i] = text_of(prompt);
        o[i] = text_of(letter[i]);
    }
    if (!ok(kne_score_facts(&w->t->m, be, view, p, o, 16, logp, right, NULL, NULL, &err), &err))
        return 0;
    for (int i = 1; i < 16; i++)
        if (logp[i] > logp[best])
            best = i;
    *is_best = right[best];
    return best;
}

static world *
world_new(const tiny_spec *spec, uint64_t seed)
{
    world  *w = calloc(1, sizeof *w);
    kne_err err;

    w->t = tiny_new(spec, seed);
    w->t->m.tokenizer = letters();
    ok(kne_view_new(&w->t->m, be, 0, NULL, NULL, &w->base, &err), &err);
    /* what it knows: prompts after which a letter is its answer; and some that it does not */
    for (int tries = 0; tries < 4000 && w->n_known < WORLD_KNOWN; tries++)
    {
        int  i = w->n_known, letter;
        bool knows;

        random_word(w->known_prompt[i], &seed);
        letter = best_letter(w, NULL, w->known_prompt[i], &knows);
        if (!knows && tries < 3900)
            continue;
        snprintf(w->known_object[i], WORLD_TEXT, "%c", WORLD_LETTERS[letter]);
        w->known[i] = (kne_known) {text_of(w->known_prompt[i]), text_of(w->known_object[i]), 0};
        w->n_known++;
    }
    for (int i = 0; i < WORLD_EDITS; i++)
    {
        bool is_best;

        for (int p = 0; p < 2; p++)
        {
            random_word(w->prompt[i][p], &seed);
            w->prompts[i][p] = text_of(w->prompt[i][p]);
        }
        int best = best_letter(w, NULL, w->prompt[i][0], &is_best);
        snprintf(w->object[i], WORLD_TEXT, "%c", WORLD_LETTERS[(best + 1 + i) % 16]);
        for (int k = 0; k < 8; k++)
            w->anchors[i][k] = w->n_known ? (i * 9 + k * 5) % w->n_known : 0;
        w->edit[i] = (kne_edit_spec){
            .edit_id = 100 + i,
            .n_prompts = 1,
            .prompt = w->prompts[i],
            .object = text_of(w->object[i]),
            .n_anchors = w->n_known ? 8 : 0,
            .anchor = w->anchors[i],
        };
    }
    return w;
}

static void
world_free(world *w)
{
    kne_view_free(w->base);
    kne_tokenizer_free(w->t->m.tokenizer);
    tiny_free(w->t);
    free(w);
}

/* A job of the first n edits; big steps and a large ensemble, as so small a model needs them. */
static kne_edit_job
job_of(const world *w, int n)
{
    kne_edit_job job = {
        .model = &w->t->m, .backend = be, .view = w->base, .n_known = w->n_known, .known = w->known,
        .n_edits = n, .edit = w->edit,
    };

    kne_options_defaults(&job.options);
    job.options.fraction = 0.3;
    job.options.lr = 0.05;
    job.options.beta = 1; /* steps this long would only circle with more */
    job.options.max_steps = 200;
    job.options.reference = 20;
    /* a head of its own has logits too small for more */
    job.options.probability = w->t->m.arch.tied_head ? 0.9 : 0.3;
    return job;
}

static kne_edit_result *
run(const kne_edit_job *job)
{
    kne_edit_result *r = NULL;
    kne_err          err;

    return ok(kne_edit_run(job, &r, &err), &err) ? r : NULL;
}

static bool
same_outcome(const kne_edit_outcome *a, const kne_edit_outcome *b)
{
    if (a->edit_id != b->edit_id || a->outcome != b->outcome || a->steps != b->steps ||
        a->n_tokens != b->n_tokens || a->p_before != b->p_before ||
        a->n_ensemble != b->n_ensemble || !a->delta != !b->delta || a->norm != b->norm ||
        (a->delta && memcmp(a->delta->digest, b->delta->digest, KNE_DIGEST_LEN)))
        return false;
    for (int i = 0; i < a->n_ensemble; i++)
        if (a->ensemble[i].layer != b->ensemble[i].layer ||
            a->ensemble[i].neuron != b->ensemble[i].neuron ||
            memcmp(&a->ensemble[i].score, &b->ensemble[i].score, sizeof(float)) ||
            memcmp(a->ensemble[i].token_score, b->ensemble[i].token_score,
                   (size_t) a->n_tokens * sizeof(float)))
            return false;
    return true;
}

static bool
same_result(const kne_edit_result *a, const kne_edit_result *b)
{
    if (!a || !b || a->n_edits != b->n_edits || a->n_disturbed != b->n_disturbed)
        return false;
    for (int i = 0; i < a->n_edits; i++)
        if (!same_outcome(&a->edit[i], &b->edit[i]) || a->edit[i].p_after != b->edit[i].p_after)
            return false;
    return strcmp(a->provenance, b->provenance) == 0;
}

static bool
same_deltas(const kne_edit_result *a, const kne_edit_result *b)
{
    bool same = a && b && a->n_edits == b->n_edits;

    for (int i = 0; same && i < a->n_edits; i++)
        same = same_outcome(&a->edit[i], &b->edit[i]);
    return same;
}

/* Every applied edit of a result as a view, on top of what another view has. */
static kne_view *
view_after_result(const world *w, const kne_view *before, const kne_edit_result *r, int64_t without)
{
    int64_t    id[64];
    kne_delta *delta[64];
    int        n = 0, b = 0;
    kne_view  *v = NULL;
    kne_err    err;

    for (int i = 0; i <= r->n_edits; i++)
    {
        while (before && b < before->n_edits &&
               (i == r->n_edits || before->edit_id[b] < r->edit[i].edit_id))
        {
            id[n] = before->edit_id[b];
            delta[n++] = before->delta[b++];
        }
        if (i < r->n_edits && r->edit[i].delta && r->edit[i].edit_id != without)
        {
            id[n] = r->edit[i].edit_id;
            delta[n++] = r->edit[i].delta;
        }
    }
    return ok(kne_view_new(&w->t->m, be, n, id, delta, &v, &err), &err) ? v : NULL;
}

/* exp of the log-probability that readers will be given. */
static double
probability(const world *w, const kne_view *v, kne_text prompt, kne_text object, uint8_t *right)
{
    double  logp = NAN;
    kne_err err;

    ok(kne_score_facts(&w->t->m, be, v, &prompt, &object, 1, &logp, right, NULL, NULL, &err), &err);
    return exp(logp);
}

static void
describe(const kne_edit_result *r)
{
    for (int i = 0; r && i < r->n_edits; i++)
        printf("# edit %lld: outcome %d, %d steps, P %.3g -> %.3g, %d neurons, |delta| %.3g%s%s\n",
               (long long) r->edit[i].edit_id, r->edit[i].outcome, r->edit[i].steps,
               r->edit[i].p_before, r->edit[i].p_after, r->edit[i].n_ensemble, r->edit[i].norm,
               r->edit[i].message[0] ? ": " : "", r->edit[i].message);
}

#endif
