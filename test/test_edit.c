/*
 * test_edit.c - the KNE method: attribution, references and metric (in the
 * headers of the same name), and whole jobs on tiny random models and on a real
 * one where there is one (KNE_TEST_MODEL, models/atlas or the shared folder).
 *
 * Tiny models learn by steps far too large for a real one; what is tested is not
 * how well an edit does but that it is what it says: its own rows, its own
 * probabilities, the same bits every time, and a word for all that can go wrong.
 */
#include "test_edit_nomem.h"
#include "test_edit_ref.h"
#include "test_edit_world.h"

#include <unistd.h>

/* ---- one edit, and a batch ---- */

/* Is the outcome what it claims, in the view that readers will have? */
static bool
is_applied(const world *w, const kne_edit_job *job, const kne_edit_result *r, int i,
           const kne_view *after)
{
    const kne_edit_outcome *o = &r->edit[i];
    const kne_edit_spec    *e = &job->edit[i];
    const kne_arch         *a = &w->t->m.arch;
    uint8_t                 right = 0;
    int                     moved = job->options.matrices == KNE_MATRICES_ALL ? 2 + a->gated : 1;
    double                  norm = 0;

    if (o->outcome != KNE_OUTCOME_APPLIED || !o->delta ||
        o->delta->n_rows != o->n_ensemble * moved || o->edit_id != e->edit_id ||
        !o->answer_before || o->steps < 1 || o->message[0])
        return false;
    if (o->p_after != probability(w, after, e->prompt[0], e->object, &right) || !right)
        return false;
    if (o->p_before != probability(w, job->view, e->prompt[0], e->object, &right) || right)
        return false;
    for (int k = 1; k < o->n_ensemble; k++) /* highest score first */
        if (o->ensemble[k].score > o->ensemble[k - 1].score)
            return false;
    for (int k = 0; k < o->delta->n_rows; k++)
    {
        const kne_delta_row *row = &o->delta->row[k];
        bool                 mine = false;

        for (int n = 0; n < o->n_ensemble; n++)
            mine |= o->ensemble[n].layer == row->layer && o->ensemble[n].neuron == row->neuron;
        if (!mine || row->len != a->d_model)
            return false;
        for (int c = 0; c < row->len; c++)
            norm += (double) row->v[c] * row->v[c];
    }
    return fabs(o->norm - sqrt(norm)) <= 1e-12 * o->norm;
}

static void
test_single(const tiny_spec *spec)
{
    world           *w = world_new(spec, 41);
    kne_edit_job     job = job_of(w, 1);
    kne_edit_result *r = run(&job), *again;
    kne_view        *after = r ? view_after_result(w, NULL, r, -1) : NULL;

    if (!check(r && is_applied(w, &job, r, 0, after), "%s: a single edit is applied", spec->name))
        describe(r);
    check(r && strstr(r->provenance,
                      w->n_known >= 64 ? "\"protected\":true" : "\"protected\":false"),
          "%s: its provenance says whether it is protected (%d known facts)", spec->name,
          w->n_known);
    again = run(&job);
    check(same_result(r, again), "%s: the same job gives the same bits", spec->name);
    kne_edit_result_free(again);

    kne_backend *mine = be, *one = NULL;
    kne_err      err;

    ok(kne_cpu_backend_new(1, getenv("KNE_TEST_ISA"), &one, &err), &err);
    job.backend = one;
    again = run(&job);
    /* the device's name says how many threads it has: the rest is the same */
    check(r && again && same_outcome(&r->edit[0], &again->edit[0]) &&
              r->edit[0].p_after == again->edit[0].p_after,
          "%s: one thread gives the bits of two", spec->name);
    be = mine;
    kne_cpu_backend_free(one);
    kne_edit_result_free(again);
    kne_view_free(after);
    kne_edit_result_free(r);
    world_free(w);
}

/* Every way to do it, each from the same start. */
static void
test_variants(const tiny_spec *spec)
{
    static const char *const variants[] = {
        "{\"matrices\": \"all\"}",
        "{\"matrices\": \"all\", \"step\": \"adam\", \"lr\": 0.01}",
        "{\"step\": \"adam\", \"lr\": 0.03}",
        "{\"select\": \"random\"}",
        "{\"select\": \"random\", \"seed\": 5}",
        "{\"select\": \"all\"}",
        "{\"select\": \"attribution\"}",
        "{\"select\": \"all\", \"layer_min\": 1}",
        "{\"tokens\": \"current\"}",
        "{\"path\": \"layer\", \"points\": 3}",
        "{\"points\": 5, \"quadrature\": \"midpoint\"}",
        "{\"score\": \"p\", \"points\": 2}",
        "{\"signed\": true}",
        "{\"beta\": 0}",
        "{\"anchors\": 0}",
        "{\"select\": \"attribution\", \"contrast\": 0}",
        "{\"protect\": 0}",
        "{\"momentum\": 0}",
        "{\"alpha\": 1, \"lr\": 0.3}",
        "{\"layer_max\": 0}",
        "{\"layer_min\": 1, \"layer_max\": 1, \"fraction\": 1}",
        "{\"max_neurons\": 9}",
    };
    world           *w = world_new(spec, 43);
    kne_edit_result *plain, *result[sizeof variants / sizeof *variants] = {NULL};
    kne_edit_job     job = job_of(w, 2);
    kne_err          err;

    w->edit[0].n_prompts = 2; /* a phrasing trains too */
    plain = run(&job);
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
    {
        kne_edit_job var = job;
        kne_options  o;

        /* the variant's names, and job_of's values for the rest */
        ok(kne_options_parse(&o, variants[i], strlen(variants[i]), &err), &err);
        if (!strstr(variants[i], "\"fraction\""))
            o.fraction = job.options.fraction;
        if (!strstr(variants[i], "\"lr\""))
            o.lr = job.options.lr;
        if (!strstr(variants[i], "\"beta\""))
            o.beta = job.options.beta;
        o.max_steps = job.options.max_steps;
        o.reference = job.options.reference;
        o.probability = job.options.probability;
        var.options = o;
        result[i] = run(&var);
        kne_view *after = result[i] ? view_after_result(w, NULL, result[i], -1) : NULL;
        bool      fine = result[i] != NULL;
        int       done = 0, top = o.layer_max < 0 ? spec->a.n_layers - 1 : o.layer_max;

        for (int e = 0; e < 2 && fine; e++)
        {
            kne_edit_outcome *out = &result[i]->edit[e];

            done += out->outcome == KNE_OUTCOME_APPLIED;
            fine &= out->outcome == KNE_OUTCOME_APPLIED ? is_applied(w, &var, result[i], e, after)
                    : out->outcome == KNE_OUTCOME_FAILED && !out->delta && out->message[0];
            fine &= out->n_ensemble == kne_ensemble_size(&spec->a, &o);
            for (int k = 0; k < out->n_ensemble; k++)
                fine &= out->ensemble[k].layer >= o.layer_min && out->ensemble[k].layer <= top;
        }
        fine &= done > 0 && !same_result(plain, result[i]);
        if (!check(fine, "%s: %s (%d of 2 applied)", spec->name, variants[i], done))
            describe(result[i]);
        kne_view_free(after);
    }
    /* seeds: another ensemble; signed: the highest scores are not below zero while some are */
    check(result[3] && result[4] && !same_outcome(&result[3]->edit[0], &result[4]->edit[0]),
          "%s: another seed is another random ensemble", spec->name);
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        kne_edit_result_free(result[i]);
    kne_edit_result_free(plain);
    world_free(w);
}

static void
test_batch(const tiny_spec *spec)
{
    world           *w = world_new(spec, 47);
    kne_edit_job     job = job_of(w, 4);
    kne_edit_result *r = run(&job), *again, *turned;
    kne_view        *after = r ? view_after_result(w, NULL, r, -1) : NULL;
    bool             fine = r != NULL;

    for (int i = 0; i < 4 && fine; i++)
        fine &= is_applied(w, &job, r, i, after) && r->edit[i].p_after >= 0.84 * job.options.probability;
    if (!check(fine, "%s: a batch of four holds together", spec->name))
        describe(r);
    again = run(&job);
    check(same_result(r, again), "%s: it has the same bits again", spec->name);
    kne_edit_result_free(again);

    /* each has its own rows: a view without one has exactly the others' */
    fine = r != NULL;
    for (int i = 0; i < 4 && fine; i++)
    {
        kne_view *v = view_after_result(w, NULL, r, r->edit[i].edit_id);
        uint8_t   right;
        double    p = probability(w, v, job.edit[i].prompt[0], job.edit[i].object, &right);

        fine &= v && v->n_edits == 3 && p < r->edit[i].p_after;
        kne_view_free(v);
    }
    check(fine, "%s: each of them can be reverted alone", spec->name);

    /* attribution and ensembles are each edit's own, whatever it runs with */
    fine = r != NULL;
    for (int i = 0; i < 4 && fine; i++)
    {
        kne_edit_job     one = job;
        kne_edit_result *located = NULL;
        kne_err          err;

        one.n_edits = 1;
        one.edit = &job.edit[i];
        fine &= ok(kne_locate_run(&one, &located, &err), &err) &&
                located->edit[0].n_ensemble == r->edit[i].n_ensemble;
        for (int k = 0; fine && k < r->edit[i].n_ensemble; k++)
            fine &= located->edit[0].ensemble[k].layer == r->edit[i].ensemble[k].layer &&
                    located->edit[0].ensemble[k].neuron == r->edit[i].ensemble[k].neuron &&
                    located->edit[0].ensemble[k].score == r->edit[i].ensemble[k].score;
        kne_edit_result_free(located);
    }
    check(fine, "%s: locating gives the ensemble that the batch took", spec->name);

    /* the order of the batch */
    kne_edit_spec spec4[4];

    for (int i = 0; i < 4; i++)
        spec4[i] = w->edit[3 - i];
    job.edit = spec4;
    turned = run(&job);
    fine = r && turned;
    for (int i = 0; i < 4 && fine; i++)
        fine &= turned->edit[i].edit_id == r->edit[3 - i].edit_id &&
                turned->edit[i].outcome == KNE_OUTCOME_APPLIED;
    check(fine, "%s: the other way round they are applied too", spec->name);
    kne_edit_result_free(turned);

    /* an anchor holds back the whole batch, whichever edit brought it */
    static const int32_t anchors[3] = {5, 9, 13};
    kne_edit_result     *bare, *first, *last;

    for (int i = 0; i < 4; i++)
        spec4[i].n_anchors = 0;
    bare = run(&job);
    spec4[0].n_anchors = 3;
    spec4[0].anchor = anchors;
    first = run(&job);
    spec4[0].n_anchors = 0;
    spec4[3].n_anchors = 3;
    spec4[3].anchor = anchors;
    last = run(&job);
    check(same_deltas(first, last), "%s: anchors are the batch's, whichever edit brought them", spec->name);
    check(bare && first && bare->edit[3].norm != first->edit[3].norm, "%s: and do something", spec->name);
    kne_edit_result_free(bare);
    kne_edit_result_free(first);
    kne_edit_result_free(last);
    kne_view_free(after);
    kne_edit_result_free(r);
    world_free(w);
}

/* ---- answers ---- */

static bool
two_tokens(void *ctx, const kne_ids *ids)
{
    return ids->n >= 2;
}

static int
stop_after(void *ctx)
{
    return --*(int *) ctx < 0;
}

/* Scores and answers of many facts at once are those of each alone. Some objects are what the model says, wholly or to begin with. */
static void
test_answers(const tiny_spec *spec)
{
    enum { N = 90, MOST = 7, LONG = 24 };
    static int32_t   id[N][LONG];
    world           *w = world_new(spec, 61);
    kne_arch        *a = &w->t->m.arch;
    kne_edit_job     job = job_of(w, 2);
    kne_edit_result *r = run(&job);
    kne_view        *view = r ? view_after_result(w, NULL, r, -1) : NULL;
    kne_tokens       fact[N];
    kne_ids          answer[N] = {{0}}, alone = {0};
    double           logp[N], one;
    uint8_t          right[N], is_right;
    uint64_t         seed = 5;
    kne_err          err;
    bool             same = view != NULL;
    int32_t          said = 0, full = 0, ended = 0;

    for (int i = 0; i < N && same; i++)
    {
        const int32_t p = i == 0 ? a->n_ctx - 3 : 2 + i % 7, s = i == 0 ? 3 : 1 + i % 5;

        for (int k = 0; k < p + s && k < LONG; k++)
            id[i][k] = (int32_t) (kne_random_next(&seed) % 33);
        fact[i] = (kne_tokens) {id[i], p + s, p};
        alone.n = 0;
        same &= ok(kne_generate(&w->t->m, be, &view->overlay, id[i], p, i % 3, NULL, NULL, &alone, &err), &err);
        for (int k = 0; k < alone.n && k < s; k++)
            id[i][p + k] = alone.id[k];
        if (i == 3)
            a->eos_id = alone.id[1];
    }
    same &= a->n_ctx <= LONG && ok(kne_answers(&w->t->m, be, view, fact, N, MOST, logp, right, answer, NULL, NULL, NULL, NULL, &err), &err);
    for (int i = 0; i < N && same; i++)
    {
        alone.n = 0;
        same &= ok(kne_generate(&w->t->m, be, &view->overlay, id[i], fact[i].n_prompt, MOST, NULL, NULL, &alone, &err), &err) &&
                alone.n == answer[i].n && !memcmp(alone.id, answer[i].id, (size_t) alone.n * sizeof *alone.id) &&
                ok(kne_score_tokens(&w->t->m, be, view, &fact[i], 1, &one, &is_right, NULL, NULL, NULL, &err), &err) &&
                one == logp[i] && is_right == right[i];
        said += right[i];
        full += alone.n == MOST;
        ended += alone.n < MOST;
        kne_ids_free(&answer[i]);
    }
    check(same && said > 3 && full > 20 && ended > 1,
          "%s: %d answers at once as each alone: %d as the objects, %d ended before %d tokens", spec->name, N, said, ended, MOST);

    same = view && ok(kne_answers(&w->t->m, be, view, fact, N, MOST, logp, right, answer, two_tokens, NULL, NULL, NULL, &err), &err);
    for (int i = 0; i < N && same; i++)
        same &= answer[i].n <= 2;
    for (int i = 0; i < N; i++)
        kne_ids_free(&answer[i]);
    check(same, "%s: and no longer than is enough", spec->name);

    int stop = 0;

    for (kne_status st = KNE_ERR_CANCELLED; view && st == KNE_ERR_CANCELLED; stop++)
    {
        int left = stop;

        st = kne_answers(&w->t->m, be, view, fact, N, MOST, logp, right, answer, NULL, NULL, stop_after, &left, &err);
        same &= st == KNE_OK || st == KNE_ERR_CANCELLED;
        for (int i = 0; i < N; i++)
            kne_ids_free(&answer[i]);
    }
    check(same && stop > MOST, "%s: cancelled at any of %d passes", spec->name, stop - 1);
    kne_ids_free(&alone);
    kne_view_free(view);
    kne_edit_result_free(r);
    world_free(w);
}

/* ---- what ends an edit ---- */

static void
test_endings(void)
{
    world           *w = world_new(&tiny_specs[0], 53);
    kne_edit_job     job = job_of(w, 1);
    kne_edit_result *r;
    kne_err          err;
    uint8_t          right;
    static const char *const longest =
        "abcdefghijklmnopabcdefghijklmnopabcdefghijklmnop";

    /* holds already: a known fact */
    kne_edit_spec holds = {
        .edit_id = 7, .n_prompts = 1, .prompt = &w->known[0].prompt, .object = w->known[0].object,
    };
    job.edit = &holds;
    r = run(&job);
    check(r && r->edit[0].outcome == KNE_OUTCOME_HOLDS && !r->edit[0].delta &&
              r->edit[0].n_ensemble == 0 && r->edit[0].steps == 0 &&
              r->edit[0].p_before == r->edit[0].p_after &&
              r->edit[0].p_after ==
                  probability(w, w->base, w->known[0].prompt, w->known[0].object, &right) &&
              r->edit[0].answer_before && r->edit[0].message[0],
          "an edit that holds already has no rows");
    check(r && !strncmp(r->edit[0].answer_before, w->known_object[0], 1),
          "and the answer before is its object (\"%s\")", r ? r->edit[0].answer_before : "");
    kne_edit_result_free(r);
    r = NULL;
    check(ok(kne_locate_run(&job, &r, &err), &err) && r->edit[0].n_ensemble > 0,
          "but its ensemble can be looked at");
    kne_edit_result_free(r);

    /* not reached */
    job = job_of(w, 1);
    job.options.max_steps = 1;
    job.options.lr = 1e-6;
    r = run(&job);
    check(r && r->edit[0].outcome == KNE_OUTCOME_FAILED && !r->edit[0].delta &&
              r->edit[0].steps == 1 && r->edit[0].norm == 0 &&
              r->edit[0].p_after == r->edit[0].p_before &&
              strstr(r->edit[0].message, "not reached in 1 step"),
          "an edit that is not reached keeps nothing");
    kne_edit_result_free(r);

    /* not finite: steps that blow the weights up; whatever comes, no delta that is not finite */
    for (int kind = 0; kind < 2; kind++)
    {
        job = job_of(w, 3);
        job.options.step = kind;
        job.options.lr = 10;
        job.options.alpha = 1e6;
        job.options.momentum = 0.999;
        r = run(&job);
        bool fine = r != NULL;
        for (int i = 0; i < 3 && fine; i++)
            fine &= r->edit[i].outcome == KNE_OUTCOME_APPLIED ? r->edit[i].delta != NULL
                    : r->edit[i].outcome == KNE_OUTCOME_FAILED && !r->edit[i].delta;
        check(fine, "absurd steps end each edit by itself (%s)", kind ? "adam" : "protected");
        kne_edit_result_free(r);
    }

    /* what is wrong with a prompt or an object is its edit's outcome; the others go on */
    struct { const char *prompt, *object, *says; } bad[] = {
        {longest, "a", "context"}, {"abc", longest, "context"}, {"abc", "", "empty"},
        {"abc", "\xff\xfe", "UTF-8"}, {"a\xc3", "b", "UTF-8"}, {"abc", "!?", "token"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    {
        kne_text      prompt[2] = {text_of(bad[i].prompt), text_of("ab")};
        kne_edit_spec specs[3] = {w->edit[0], w->edit[1], w->edit[2]};
        bool          fine;

        specs[1].prompt = prompt;
        specs[1].object = text_of(bad[i].object);
        job = job_of(w, 3);
        job.edit = specs;
        r = run(&job);
        fine = r && r->edit[1].outcome == KNE_OUTCOME_FAILED &&
               strstr(r->edit[1].message, bad[i].says) && !r->edit[1].delta &&
               r->edit[1].edit_id == 101 && r->edit[0].outcome == KNE_OUTCOME_APPLIED &&
               r->edit[2].outcome == KNE_OUTCOME_APPLIED;
        check(fine, "a bad prompt or object fails its edit alone: %s",
              r ? r->edit[1].message : "no result");
        kne_edit_result_free(r);

        r = NULL;
        job.edit = &specs[1];
        job.n_edits = 1;
        check(kne_locate_run(&job, &r, &err) == KNE_ERR_INVALID && !r &&
                  strstr(err.msg, bad[i].says),
              "and locating it says so");
        /* a training phrasing that is bad fails it as well */
        prompt[0] = text_of("ab");
        prompt[1] = text_of(bad[i].prompt);
        specs[1].n_prompts = 2;
        r = run(&job);
        check(r && r->edit[0].outcome == KNE_OUTCOME_FAILED, "as its second phrasing, too");
        kne_edit_result_free(r);
    }

    /* a prompt that is empty: this tokenizer begins texts, so there is something to predict from */
    kne_text      empty = {"", 0};
    kne_edit_spec from_nothing = w->edit[0];

    from_nothing.prompt = &empty;
    job = job_of(w, 1);
    job.edit = &from_nothing;
    r = run(&job);
    check(r && r->edit[0].outcome == KNE_OUTCOME_APPLIED,
          "an empty prompt has its beginning of text");
    kne_edit_result_free(r);

    /* layers that are not there */
    for (int k = 0; k < 3; k++)
    {
        job = job_of(w, 1);
        job.options.layer_min = k == 0 ? 3 : 0;
        job.options.layer_max = k == 0 ? -1 : k == 1 ? 3 : 4096;
        r = NULL;
        check(kne_edit_run(&job, &r, &err) == KNE_ERR_INVALID && !r && strstr(err.msg, "layers") &&
                  strstr(err.detail, "0 to 2") &&
                  kne_locate_run(&job, &r, &err) == KNE_ERR_INVALID && !r,
              "layers %d to %d are not in the model", job.options.layer_min, job.options.layer_max);
    }
    job = job_of(w, 0);
    r = run(&job);
    check(r && r->n_edits == 0, "no edits are an empty result");
    kne_edit_result_free(r);
    world_free(w);
}

/* Edits that contradict one another. */
static void
test_quarrel(void)
{
    world           *w = world_new(&tiny_specs[3], 59);
    kne_edit_job     job = job_of(w, 2);
    kne_edit_result *r;
    kne_edit_spec    specs[2] = {w->edit[0], w->edit[0]};
    char             other[2] = {(char) (w->object[0][0] == 'a' ? 'b' : 'a'), '\0'};

    specs[1].edit_id++;
    specs[1].object = text_of(other);
    job.edit = specs;
    for (int steps = 1; steps <= 40; steps += 13)
    {
        job.options.max_steps = steps;
        r = run(&job);
        check(r && (r->edit[0].outcome == KNE_OUTCOME_FAILED ||
                    r->edit[1].outcome == KNE_OUTCOME_FAILED),
              "of two objects for one prompt one fails at least, in %d steps", steps);
        kne_edit_result_free(r);
    }
    world_free(w);
}

/* ---- cancels ---- */

typedef struct cancels
{
    int64_t edit_id;
    int     after, calls, steps, attributions, last_done;
    bool    in_order;
} cancels;

static bool
cancel_one(void *ctx, int64_t edit_id)
{
    cancels *c = ctx;

    return edit_id == c->edit_id && ++c->calls > c->after;
}

static void
count_progress(void *ctx, int phase, int done, int total, float loss, int finished)
{
    cancels *c = ctx;

    if (phase == KNE_PHASE_OPTIMISE)
        c->steps++;
    else
        c->attributions++;
    c->in_order &= done >= 0 && total > 0 && !isnan(loss) && finished >= 0;
}

static void
test_cancel(void)
{
    world           *w = world_new(&tiny_specs[3], 61);
    kne_edit_job     job = job_of(w, 3), alone;
    kne_edit_result *whole = run(&job), *r, *others;
    kne_err          err;
    cancels          c;
    int              max_calls = 0, cancelled = 0;
    bool             fine = whole != NULL;

    /* the second of three is cancelled at once: the others are as if it had not been there */
    kne_edit_spec two[2] = {w->edit[0], w->edit[2]};

    alone = job;
    alone.edit = two;
    alone.n_edits = 2;
    others = run(&alone);
    for (int after = 0; after < 400; after += after < 12 ? 1 : 9)
    {
        c = (cancels) {.edit_id = w->edit[1].edit_id, .after = after, .in_order = true};
        job.calls = (kne_job_calls){.ctx = &c, .cancelled = cancel_one, .progress = count_progress};
        r = run(&job);
        if (!r)
        {
            fine = false;
            break;
        }
        max_calls = c.calls > max_calls ? c.calls : max_calls;
        if (r->edit[1].outcome == KNE_OUTCOME_CANCELLED)
        {
            kne_view *v = view_after_result(w, NULL, r, -1);

            cancelled++;
            fine &= !r->edit[1].delta && r->edit[1].norm == 0;
            fine &= r->edit[1].p_after == r->edit[1].p_before;
            for (int i = 0; i < 3; i += 2) /* the others hold without it */
                fine &= is_applied(w, &job, r, i, v) && r->edit[i].p_after >= 0.84 * job.options.probability;
            kne_view_free(v);
        }
        else
            fine &= same_outcome(&r->edit[0], &whole->edit[0]) &&
                    same_outcome(&r->edit[1], &whole->edit[1]);
        fine &= c.in_order && c.steps > 0;
        if (after == 0)
            check(others && same_outcome(&r->edit[0], &others->edit[0]) &&
                  same_outcome(&r->edit[2], &others->edit[1]),
                  "cancelled before the first step it leaves the others as they are without it");
        bool over = r->edit[1].outcome == KNE_OUTCOME_APPLIED;

        kne_edit_result_free(r);
        if (over)
            break;
    }
    check(fine && cancelled > 2, "one of a batch is cancelled at %d of its %d chances", cancelled,
          max_calls);

    /* all that there is is cancelled */
    c = (cancels) {.edit_id = w->edit[0].edit_id};
    job.n_edits = 1;
    r = run(&job);
    check(r && r->edit[0].outcome == KNE_OUTCOME_CANCELLED && !r->edit[0].delta,
          "the only edit is cancelled");
    kne_edit_result_free(r);

    /* yield stops everything, at each of its calls, and the cache has nothing wrong in it */
    struct kne_ref_cache *cache = NULL;
    int                   stop = 1;

    ok(kne_ref_cache_new(&cache, &err), &err);
    job = job_of(w, 3);
    job.options.path = KNE_PATH_LAYER;
    job.options.points = 2;
    job.options.tokens = KNE_TOKENS_CURRENT;
    kne_edit_result *fresh = run(&job);

    job.cache = cache;
    fine = true;
    for (;; stop += stop < 40 ? 1 : 17)
    {
        int        left = stop;
        kne_status st;

        job.calls = (kne_job_calls) {.ctx = &left, .yield = stop_at};
        r = NULL;
        st = kne_edit_run(&job, &r, &err);
        if (st == KNE_OK)
            break;
        fine &= st == KNE_ERR_CANCELLED && !r;
    }
    check(fine && stop > 10 && same_result(r, fresh),
          "stopped at any of %d yields there is no result", stop);
    kne_edit_result_free(r);
    job.calls = (kne_job_calls) {NULL, NULL, NULL, NULL};
    r = run(&job);
    check(same_result(r, fresh), "and with the cache that is left, the result of a fresh one");
    kne_edit_result_free(r);
    kne_ref_cache_free(cache);
    kne_edit_result_free(fresh);
    kne_edit_result_free(others);
    kne_edit_result_free(whole);
    world_free(w);
}

/* What holds before a batch that takes it away is solved with it. */
static void
test_holds_no_longer(void)
{
    world           *w = world_new(&tiny_specs[3], 83);
    kne_edit_job     job = job_of(w, 2);
    kne_edit_spec    specs[2] = {w->edit[0], w->edit[0]};
    kne_edit_result *r;
    bool             is_best;
    char             now[2] = {0};

    now[0] = WORLD_LETTERS[best_letter(w, NULL, w->prompt[0][0], &is_best)];
    if (!is_best) /* then another prompt's answer will do */
    {
        specs[0].prompt = specs[1].prompt = &w->known[0].prompt;
        now[0] = w->known_object[0][0];
    }
    char other[2] = {(char) (now[0] == 'a' ? 'b' : 'a'), '\0'};

    specs[0].object = text_of(now);
    specs[1].object = text_of(other);
    specs[1].edit_id++;
    job.edit = specs;
    r = run(&job);
    /* the one that held is solved with the one that takes it away; both cannot be */
    int won = r && r->edit[1].outcome == KNE_OUTCOME_APPLIED;

    check(r && r->edit[won].outcome == KNE_OUTCOME_APPLIED && r->edit[won].delta &&
              r->edit[!won].outcome == KNE_OUTCOME_FAILED && !r->edit[!won].delta && r->edit[!won].message[0],
          "of what held and what takes it away in the same batch one is applied, the other failed");
    kne_edit_result_free(r);
    world_free(w);
}

/* ---- known facts ---- */

static void
test_known(void)
{
    world           *w = world_new(&tiny_specs[0], 67);
    kne_edit_job     job = job_of(w, 2);
    kne_edit_result *plain = run(&job), *r;
    kne_edit_spec    specs[2] = {w->edit[0], w->edit[1]};
    kne_known        more[WORLD_KNOWN + 8];
    int32_t          anchors[2][16];
    int              n = 0;

    check(plain && w->n_known >= 64 && strstr(plain->provenance, "\"protected\":true"),
          "%d known facts protect", w->n_known);

    /* facts that cannot be tokenised, between the others: anchors are indices of all */
    static const char bad[] = "abcdefghijklmnopabcdefghijklmnop";
    int               at[WORLD_KNOWN];

    for (int i = 0; i < w->n_known; i++)
    {
        if (i % 20 == 3)
            more[n++] = i < 20 ? (kne_known) {text_of("abc"), {"", 0}, 0}
                        : i < 40 ? (kne_known) {text_of(bad), text_of("a"), 0}
                        : i < 60 ? (kne_known) {text_of("\xff"), text_of("a"), 77}
                                 : (kne_known) {text_of("abc"), text_of("!?"), 0};
        at[i] = n;
        more[n++] = w->known[i];
    }
    for (int e = 0; e < 2; e++)
    {
        specs[e].anchor = anchors[e];
        specs[e].n_anchors = 12;
        for (int k = 0; k < 12; k++)
            anchors[e][k] = k == 3 ? -1 : k == 5 ? n : k == 7 ? INT32_MAX : k == 9 ? INT32_MIN : -2;
        for (int k = 0, i = 0; k < 12 && i < 8; k++)
            if (k != 3 && k != 5 && k != 7 && k != 9)
                anchors[e][k] = at[w->anchors[e][i++]];
    }
    job.edit = specs;
    job.known = more;
    job.n_known = n;
    r = run(&job);
    check(same_deltas(plain, r), "known facts without tokens and anchors out of range change "
                                 "nothing but the digest of the facts");
    kne_edit_result_free(r);

    kne_edit_result *bare;

    job = job_of(w, 2);
    job.options.protect = 0;
    job.options.select = KNE_SELECT_ATTRIBUTION;
    r = run(&job);
    job.options.contrast = 0;
    bare = run(&job);
    check(r && bare && strstr(r->provenance, "\"protecting_facts\":0") &&
              memcmp(&r->edit[0].ensemble[0].score, &bare->edit[0].ensemble[0].score,
                     sizeof(float)),
          "the contrast has its facts even where none protects");
    kne_edit_result_free(bare);
    kne_edit_result_free(r);

    /* only so many anchors as the option says, nearest first */
    job = job_of(w, 2);
    job.options.anchors = 3;
    r = run(&job);
    for (int e = 0; e < 2; e++)
    {
        specs[e] = w->edit[e];
        specs[e].n_anchors = 3;
    }
    job.edit = specs;
    job.options.anchors = 8;
    kne_edit_result *three = run(&job);
    check(same_deltas(r, three) && !same_deltas(r, plain), "the nearest anchors count");
    kne_edit_result_free(three);
    kne_edit_result_free(r);

    /* none at all */
    job = job_of(w, 2);
    job.n_known = 0;
    job.known = NULL;
    r = run(&job);
    check(r && r->edit[0].outcome == KNE_OUTCOME_APPLIED &&
              r->edit[1].outcome == KNE_OUTCOME_APPLIED &&
              strstr(r->provenance, "\"protected\":false") && r->n_disturbed == 0,
          "a first edit on a fresh database just works, and says that nothing is protected");
    kne_edit_result_free(r);
    job = job_of(w, 1);
    job.n_known = 63;
    r = run(&job);
    check(r && strstr(r->provenance, "\"protected\":false") &&
              strstr(r->provenance, "\"protecting_facts\":63"),
          "63 facts are too few");
    kne_edit_result_free(r);
    kne_edit_result_free(plain);
    world_free(w);
}

/* ---- on top of other edits ---- */

static void
test_sequence(const tiny_spec *spec, int matrices)
{
    world           *w = world_new(spec, 71);
    kne_edit_job     job = job_of(w, 2);
    kne_edit_result *first, *second, *again;
    kne_view        *v1, *v2;
    bool             fine;

    job.options.matrices = matrices;
    first = run(&job);
    v1 = first ? view_after_result(w, NULL, first, -1) : NULL;
    if (!v1)
    {
        check(0, "%s: a first batch", spec->name);
        return;
    }
    /* the facts of the first are anchors of the second, and one is edited again under a lower id */
    for (int i = 0; i < 2; i++)
        w->known[w->n_known + i] = (kne_known) {w->prompts[i][0], text_of(w->object[i]), 100 + i};
    kne_edit_spec specs[2] = {w->edit[2], w->edit[3]};
    int32_t       anchors[2] = {w->n_known, w->n_known + 1};

    specs[0].edit_id = 50;
    specs[0].anchor = specs[1].anchor = anchors;
    specs[0].n_anchors = specs[1].n_anchors = 2;
    job.edit = specs;
    job.n_known = w->n_known + 2;
    job.view = v1;
    second = run(&job);
    v2 = second ? view_after_result(w, v1, second, -1) : NULL;
    fine = v2 && v2->n_edits == 4;
    for (int i = 0; i < 2 && fine; i++)
        fine &= is_applied(w, &job, second, i, v2);
    if (!check(fine, "%s: edits on top of edits are what readers will see", spec->name))
        describe(second);
    again = run(&job);
    check(same_result(second, again), "%s: with the same bits again", spec->name);
    kne_edit_result_free(again);
    for (int i = 0; i < 2 && fine; i++)
    {
        uint8_t right;
        bool    told = false;

        probability(w, v2, w->prompts[i][0], text_of(w->object[i]), &right);
        for (int k = 0; k < second->n_disturbed; k++)
            told |= second->disturbed[k] == w->n_known + i;
        fine &= told == !right;
    }
    check(fine, "%s: earlier edits that no longer hold are told", spec->name);
    kne_edit_result_free(second);
    kne_view_free(v2);

    /* another object for the first prompt: that disturbs edit 100 for certain */
    char          other[2] = {(char) (w->object[0][0] == 'a' ? 'b' : 'a'), '\0'};
    kne_edit_spec against = w->edit[0];

    against.edit_id = 200;
    against.object = text_of(other);
    against.n_anchors = 0;
    job.edit = &against;
    job.n_edits = 1;
    second = run(&job);
    check(second && second->edit[0].outcome == KNE_OUTCOME_APPLIED && second->n_disturbed >= 1 &&
              second->disturbed[0] == w->n_known,
          "%s: the edit it contradicts is disturbed", spec->name);
    kne_edit_result_free(second);
    kne_view_free(v1);
    kne_edit_result_free(first);
    world_free(w);
}

/* ---- a real model ---- */

static const char *
real_model(void)
{
    static char path[4096];
    const char *shared = getenv("KNE_SHARED"), *own = getenv("KNE_TEST_MODEL");

    if (own)
        return *own ? own : NULL;
    if (access("models/atlas/model.safetensors", R_OK) == 0)
        return "models/atlas";
    snprintf(path, sizeof path, "%s/models/lre-llama-5m/model.safetensors",
             shared ? shared : "../shared");
    if (access(path, R_OK) != 0)
        return NULL;
    *strrchr(path, '/') = '\0';
    return path;
}

/* The lines "prompt TAB object" of a model's general facts, as known facts; *text holds them. */
static int
general_facts(const char *model, kne_known *known, int most, char **text)
{
    char   path[4200];
    FILE  *f;
    int    n = 0;
    size_t len;

    snprintf(path, sizeof path, "%s/general_facts.tsv", model);
    *text = calloc(1, 1 << 20);
    f = fopen(path, "r");
    if (!f)
        return 0;
    len = fread(*text, 1, (1 << 20) - 1, f);
    fclose(f);
    (*text)[len] = '\0';
    for (char *line = *text, *end; n < most && (end = strchr(line, '\n')); line = end + 1)
    {
        char *tab = memchr(line, '\t', (size_t) (end - line));

        if (tab)
            known[n++] =
                (kne_known){{line, (size_t) (tab - line)}, {tab + 1, (size_t) (end - tab - 1)}, 0};
    }
    return n;
}

static void
test_real(void)
{
    const char      *path = real_model();
    world            w = {0}; /* only its model is used here */
    tiny_model       shell = {0};
    kne_model       *m = NULL;
    kne_edit_result *r, *one_by_one;
    kne_edit_job     job;
    kne_known        known[128];
    char            *text = NULL;
    kne_err          err;
    static const char *const countries[4] = {"France", "Germany", "Italy", "Japan"};
    static const char *const cities[4] = {"Rome", "Paris", "Berlin", "Madrid"};
    char             prompt[4][64];
    kne_text         prompts[4];
    kne_edit_spec    specs[4];
    static const int32_t anchors[4] = {4, 5, 6, 7};

    if (!path)
    {
        skip("edits of a real model", "there is none here");
        return;
    }
    if (!check(ok(kne_model_open(path, &m, &err), &err), "%s opens", path))
        return;
    shell.m = *m;
    w.t = &shell;
    ok(kne_view_new(m, be, 0, NULL, NULL, &w.base, &err), &err);
    job = (kne_edit_job){.model = m,
                         .backend = be,
                         .view = w.base,
                         .n_edits = 4,
                         .edit = specs,
                         .known = known};
    job.n_known = general_facts(path, known, 128, &text);
    kne_options_defaults(&job.options);
    for (int i = 0; i < 4; i++)
    {
        snprintf(prompt[i], sizeof prompt[i], "The capital of %s is", countries[i]);
        prompts[i] = text_of(prompt[i]);
        specs[i] = (kne_edit_spec) {
            .edit_id = i + 1, .n_prompts = 1, .prompt = &prompts[i], .object = text_of(cities[i]),
            .n_anchors = job.n_known > 7 ? 4 : 0, .anchor = anchors,
        };
    }
    double t0 = kne_now();
    r = run(&job);
    printf("# a batch of four with %d known facts: %.2f s\n", job.n_known, kne_now() - t0);
    kne_view *after = r ? view_after_result(&w, NULL, r, -1) : NULL;
    bool      fine = r != NULL;

    int done = 0;

    for (int i = 0; i < 4 && fine; i++)
    {
        bool applied = r->edit[i].outcome == KNE_OUTCOME_APPLIED;

        done += applied;
        fine &= applied ? is_applied(&w, &job, r, i, after)
                : r->edit[i].outcome == KNE_OUTCOME_FAILED && !r->edit[i].delta;
    }
    check(fine && done >= 3, "of four capitals in one batch %d move", done);
    describe(r);
    for (int i = 0; r && i < 4; i++)
        printf("# %s: \"%s\"\n", prompt[i], r->edit[i].answer_before);

    job.n_edits = 1;
    one_by_one = run(&job);
    kne_view_free(after);
    after = one_by_one ? view_after_result(&w, NULL, one_by_one, -1) : NULL;
    check(one_by_one && is_applied(&w, &job, one_by_one, 0, after), "and one alone");
    kne_edit_result_free(r);

    kne_backend *one = NULL;

    ok(kne_cpu_backend_new(1, getenv("KNE_TEST_ISA"), &one, &err), &err);
    job.backend = one;
    r = run(&job);
    check(same_deltas(r, one_by_one), "with the same bits by one thread");
    kne_cpu_backend_free(one);
    job.backend = be;

    /* the tokens after the first stand on activations of their own: they must not take the whole ensemble */
    kne_edit_result *far;

    specs[0].object = text_of("Atlantis");
    far = run(&job);
    check(far && far->edit[0].outcome == KNE_OUTCOME_APPLIED && far->edit[0].n_tokens > 2,
          "an object of %d tokens, which the model never said", far ? far->edit[0].n_tokens : 0);
    describe(far);
    kne_edit_result_free(far);
    kne_edit_result_free(r);
    kne_edit_result_free(one_by_one);
    kne_view_free(after);
    kne_view_free(w.base);
    kne_model_close(m);
    free(text);
}

int
main(void)
{
    kne_err err;

    if (!ok(kne_cpu_backend_new(2, getenv("KNE_TEST_ISA"), &be, &err), &err))
        return 1;
    test_attribution();
    test_references();
    for (int i = 0; i < TINY_N_SPEC; i++)
    {
        test_single(&tiny_specs[i]);
        test_answers(&tiny_specs[i]);
    }
    for (int i = 0; i < 4; i += 3)
    {
        test_variants(&tiny_specs[i]);
        test_batch(&tiny_specs[i]);
        test_sequence(&tiny_specs[i], KNE_MATRICES_DOWN);
        test_sequence(&tiny_specs[i + 1], KNE_MATRICES_ALL);
    }
    test_endings();
    test_quarrel();
    test_holds_no_longer();
    test_cancel();
    test_known();
    for (int i = 0; i < 4; i++)
        test_nomem(i & 1, i & 2);
    test_real();
    kne_cpu_backend_free(be);
    return kne_test_done();
}
