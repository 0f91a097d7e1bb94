/*
 * bench_eval.c - edits, and what became of the model: how many succeed, carry over to other phrasings and leave the
 * rest alone, and what they cost. What each figure means is in docs/quality.md.
 *
 * bench_eval MODEL FACTS.tsv RELATIONS.tsv [options]    facts that the model knows, as models/atlas
 * bench_eval MODEL SUITE.json - [options]               the same as JSON, or CounterFact, zsRE (MEND), KnowEdit
 *   --mode MODE[:EDITS],...        single: one at a time from the unedited model; batch: --batch N together; shared: the same with
 *                                  one delta for each batch; sequence: one on top of another; consolidated: a sequence, and once
 *                                  more all of it together from the unedited model (what fails keeps what it had)
 *   --edits N, --batch N, --seed S,..., --threads T, --options JSON (as kne_edit's), --fluency N (texts, 0)
 *   --variant "NAME {OPTIONS}"     instead of --options, as often as there are methods to compare
 *   --tsv SUITE                    lines of suite, mode, variant, seed, metric, value, probes; otherwise a Markdown table
 *   --relation NAME, --object TEXT edits of one relation only; one new object for all
 *   --verbose
 *
 * Facts: edits are counterfactual, the object of another fact of the relation. A random third of the facts is never shown to
 * the editor, and what must not change is judged on that third. Cases: what must not change are their own locality probes; the known
 * facts that protect the model are old answers and locality probes of cases that are not edited, as far as the model gives them.
 */
#include "eval_score.h"
#include "eval_shared.h"

#include <time.h>

#define KNOWN_CASES 512
#define MAX_VARIANTS 64
#define ONE_IN 32 /* one at a time: so many of the untouched facts are asked after an edit */

enum metric
{
    SUCCESS, SUCCESS_TOKENS, TRAINED, PHRASINGS, PHRASINGS_TOKENS, SAME_RELATION, SAME_SUBJECT, UNTOUCHED, SHOWN, PORTABILITY, LOCALITY,
    FLUENCY_BEFORE, FLUENCY_AFTER, ES, PS, NS, SCORE, STEPS, FAILED, NEURONS, KIB, CPU_SECONDS, N_METRICS
};

static const char *const metric_name[N_METRICS] = {
    "success", "success (tokens)", "trained phrasings", "phrasings", "phrasings (tokens)", "same relation", "same subject", "untouched", "shown",
    "portability", "locality", "fluency before", "fluency", "ES", "PS", "NS", "S", "steps", "failed", "neurons", "KiB",
    "CPU s",
};

typedef struct figures
{
    double sum[N_METRICS];
    double n[N_METRICS]; /* probes, edits */
} figures;

static struct
{
    const char *modes, *seeds, *variant[MAX_VARIANTS], *tsv, *relation, *object;
    int         n_variants, most_edits, batch, threads, fluency;
    bool        verbose;
} arg = {.modes = "single", .seeds = "1", .most_edits = 200, .batch = 64};

static device      dev;
static suite      *su;
static kne_options opt;
static kne_view   *base;
static kase       *asked; /* (n_edits) */
static int         n_edits;
static uint64_t    seed, rng;
static struct kne_ref_cache *cache;

static kne_known *known;      /* shown to the editor */
static int       *known_fact; /* fact of each, -1: a case's */
static int        n_known;
static bool       many;       /* several edits in the model at once */

static void
add(figures *f, int metric, double value, double n)
{
    f->sum[metric] += value;
    f->n[metric] += n;
}

static void
shuffle_known(void)
{
    for (int i = n_known - 1; i > 0; i--)
    {
        int       j = (int) (kne_random_next(&rng) % (uint64_t) (i + 1)), t = known_fact[i];
        kne_known k = known[i];

        known[i] = known[j];
        known[j] = k;
        known_fact[i] = known_fact[j];
        known_fact[j] = t;
    }
}

static void
show(kne_text prompt, kne_text object, int of)
{
    known[n_known] = (kne_known) {prompt, object, 0};
    known_fact[n_known++] = of;
}

/* ---- suites of facts ---- */

/* What the model knows in every phrasing. */
static void
look_at_facts(void)
{
    probes all = {0};
    span  *s;
    int    at = 0;

    for (int i = 0; i < su->n_facts; i++)
        for (int t = 0; t < su->rel[su->fact[i].rel].n; t++)
            probe(&all, fill(su->rel[su->fact[i].rel].template_[t], su->fact[i].subject), text_of(su->fact[i].object), 0);
    s = score_spans(&dev, base, &all);
    for (int i = 0; i < su->n_facts; i++)
    {
        fact *f = &su->fact[i];

        f->known = true;
        for (int t = 0; t < su->rel[f->rel].n; t++)
            f->known &= is_exact(&s[at++]);
    }
    free_spans(s, all.n);
}

static void
fact_case(int i, kase *k)
{
    const fact     *f = &su->fact[i];
    const relation *r = &su->rel[f->rel];

    *k = (kase) {.object = text_of(f->new_object), .old = text_of(f->object), .fact = i};
    for (int t = 0; t < r->n; t++)
        if (t <= opt.phrasings)
            k->prompt[k->n_prompts++] = fill(r->template_[t], f->subject);
        else
            probe(&k->rephrase, fill(r->template_[t], f->subject), k->object, 0);
    if (r->inverse >= 0)
        probe(&k->portability, fill(su->rel[r->inverse].template_[0], f->new_object), text_of(f->subject), 0);
}

static void
draw_facts(void)
{
    int *of = take((size_t) su->n_facts, sizeof *of), n = 0, want = n_edits;

    n_edits = 0;
    for (int i = 0; i < su->n_facts; i++)
    {
        su->fact[i].hidden = kne_random_next(&rng) % 3 == 0;
        su->fact[i].new_object = NULL;
    }
    for (int i = 0; i < su->n_facts; i++)
        if (su->fact[i].known && (!arg.relation || !strcmp(arg.relation, su->rel[su->fact[i].rel].name)))
            of[n++] = i;
    for (int i = n - 1; i > 0; i--)
    {
        int j = (int) (kne_random_next(&rng) % (uint64_t) (i + 1)), t = of[i];

        of[i] = of[j];
        of[j] = t;
    }
    for (int i = 0; i < n && n_edits < want; i++)
    {
        fact *f = &su->fact[of[i]];

        if (arg.object)
            f->new_object = (char *) arg.object;
        for (int try = 0; try < 1000 && !f->new_object; try++)
        {
            const fact *o = &su->fact[kne_random_next(&rng) % (uint64_t) su->n_facts];

            if (o->rel == f->rel && strcmp(o->object, f->object) != 0)
                f->new_object = o->object;
        }
        if (f->new_object)
            fact_case(of[i], &asked[n_edits++]);
    }
    for (int i = 0; i < su->n_facts; i++) /* what is edited is no longer known; one at a time that is done edit by edit */
        if (!su->fact[i].hidden && !(many && su->fact[i].new_object))
            show(fill(su->rel[su->fact[i].rel].template_[0], su->fact[i].subject), text_of(su->fact[i].object), i);
    free(of);
}

/* How near is fact b to fact a: 0 the same relation, 1 the same subject, 2 neither, -1 the same fact. */
static int
nearness(int a, int b)
{
    const fact *x = &su->fact[a], *y = &su->fact[b];
    bool        same_subject = strcmp(x->subject, y->subject) == 0;

    return x->rel == y->rel ? (same_subject ? -1 : 0) : same_subject ? 1 : 2;
}

/*
 * Anchors as kne_edit takes them: half of the relation, a quarter each of the subject and of earlier edits, the rest to
 * whoever has more; a seeded sample of each.
 */
static int
anchors_of(const kase *k, const int *shown_fact, int n_shown, int32_t *out)
{
    int      most = opt.anchors, n = 0, have[3] = {0}, want[3];
    int32_t *pool[3];
    uint64_t s = seed + (uint64_t) (k - asked) * 977;

    for (int how = 0; how < 3; how++)
        pool[how] = take((size_t) n_shown, sizeof(int32_t));
    for (int i = 0; i < n_shown; i++)
    {
        int how = k->fact >= 0 ? nearness(k->fact, shown_fact[i]) : 0;

        if (how >= 0 && (how < 2 || i >= n_known))
            pool[how][have[how]++] = i;
    }
    want[0] = most / 2, want[1] = most / 4, want[2] = most - want[0] - want[1];
    for (int how = 0; how < 3; how++)
        want[how] = want[how] < have[how] ? want[how] : have[how];
    for (int how = 0; how < 3; how++)
    {
        int left = most - want[0] - want[1] - want[2];

        want[how] += left < have[how] - want[how] ? left : have[how] - want[how];
        for (int i = 0; i < want[how]; i++)
        {
            int     j = i + (int) (kne_random_next(&s) % (uint64_t) (have[how] - i));
            int32_t t = pool[how][i];

            pool[how][i] = pool[how][j];
            pool[how][j] = t;
            out[n++] = pool[how][i];
        }
    }
    for (int how = 0; how < 3; how++)
        free(pool[how]);
    return n;
}

static double
count_exact(const kne_view *view, probes *p)
{
    span  *s = score_spans(&dev, view, p);
    double n = 0;

    for (int i = 0; i < p->n; i++)
        n += is_exact(&s[i]);
    free_spans(s, p->n);
    free(p->prompt), free(p->answer), free(p->group);
    return n;
}

/* What must not change, judged on facts that are known, not edited; hidden but for SHOWN. */
static void
judge_facts(figures *f, const kne_view *view, int from, int to)
{
    probes p[4] = {{0}};
    static const int metric[4] = {SAME_RELATION, SAME_SUBJECT, UNTOUCHED, SHOWN};
    bool  *edited = take((size_t) su->n_facts, 1);

    for (int i = from; i < to; i++)
        edited[asked[i].fact] = true;
    for (int i = 0; i < su->n_facts; i++)
    {
        const fact *x = &su->fact[i];
        bool        near[2] = {false};

        if (!x->known || edited[i])
            continue;
        for (int e = from; e < to; e++)
        {
            int how = nearness(asked[e].fact, i);

            if (how == 0 || how == 1)
                near[how] = true;
        }
        kne_text prompt = fill(su->rel[x->rel].template_[0], x->subject), object = text_of(x->object);
        for (int how = 0; how < 2; how++)
            if (near[how] && x->hidden)
                probe(&p[how], prompt, object, 0);
        if (many || i % ONE_IN == from % ONE_IN) /* one at a time: in turn */
            probe(&p[x->hidden ? 2 : 3], prompt, object, 0);
    }
    for (int k = 0; k < 4; k++)
    {
        int n = p[k].n;

        add(f, metric[k], count_exact(view, &p[k]), n);
    }
    free(edited);
}

/* ---- suites of cases ---- */

static void
draw_cases(void)
{
    int   *of = take((size_t) su->n_cases, sizeof *of), n = su->n_cases;
    probes p = {0};

    for (int i = 0; i < n; i++)
        of[i] = i;
    for (int i = n - 1; i > 0; i--)
    {
        int j = (int) (kne_random_next(&rng) % (uint64_t) (i + 1)), t = of[i];

        of[i] = of[j];
        of[j] = t;
    }
    n_edits = n_edits < n ? n_edits : n;
    for (int i = 0; i < n_edits; i++)
        asked[i] = su->kase[of[i]];
    for (int i = n_edits; i < n && p.n < 8 * KNOWN_CASES; i++)
    {
        const kase *k = &su->kase[of[i]];

        if (k->old.len)
            probe(&p, k->prompt[0], k->old, 0);
        for (int j = 0; j < k->locality.n; j++)
            probe(&p, k->locality.prompt[j], k->locality.answer[j], 0);
    }
    span *s = score_spans(&dev, base, &p);
    for (int i = 0; i < p.n && n_known < KNOWN_CASES; i++)
        if (is_exact(&s[i]))
            show(p.prompt[i], p.answer[i], -1);
    if (arg.verbose)
        printf("%d of %d answers of other cases are known to the model\n", n_known, p.n);
    free_spans(s, p.n);
    free(of);
}

/* ---- figures of any suite ---- */

static double
share_in_groups(const probes *p, const span *s, const span *before)
{
    double all = 0;
    int    groups = 0;

    for (int g = 0, last = p->n ? p->group[p->n - 1] : -1; g <= last; g++)
    {
        double sum = 0;
        int    n = 0;

        for (int i = 0; i < p->n; i++)
            if (p->group[i] == g && s[i].n)
            {
                sum += token_share(&s[i], before ? &before[i] : NULL);
                n++;
            }
        all += n ? sum / n : 0;
        groups += n > 0;
    }
    return groups ? all / groups : -1;
}

/* P(new) > P(old), by the mean over the tokens of each. */
static void
compare(figures *f, int metric, const kne_view *view, const probes *p, kne_text new_, kne_text old, bool new_wins)
{
    probes both[2] = {{0}};
    span  *s[2];

    if (!old.len)
        return;
    for (int i = 0; i < p->n; i++)
    {
        probe(&both[0], p->prompt[i], new_, 0);
        probe(&both[1], p->prompt[i], old, 0);
    }
    for (int k = 0; k < 2; k++)
        s[k] = score_spans(&dev, view, &both[k]);
    for (int i = 0; i < p->n; i++)
        if (s[0][i].n && s[1][i].n)
            add(f, metric, new_wins ? s[0][i].logp > s[1][i].logp : s[1][i].logp > s[0][i].logp, 1);
    for (int k = 0; k < 2; k++)
    {
        free_spans(s[k], p->n);
        free(both[k].prompt), free(both[k].answer), free(both[k].group);
    }
}

static void
judge(figures *f, const kne_view *view, int from, int to)
{
    for (int i = from; i < to; i++)
    {
        const kase *k = &asked[i];
        probes      own = {0}, trained = {0};
        span       *s, *before;
        double      share;

        probe(&own, k->prompt[0], k->object, 0);
        s = score_spans(&dev, view, &own);
        add(f, SUCCESS, is_exact(s), 1);
        add(f, SUCCESS_TOKENS, token_share(s, NULL), 1);
        free_spans(s, 1);
        compare(f, ES, view, &own, k->object, k->old, true);
        for (int p = 1; p < k->n_prompts; p++)
            probe(&trained, k->prompt[p], k->object, 0);
        add(f, TRAINED, count_exact(view, &trained), k->n_prompts - 1);
        free(own.prompt), free(own.answer), free(own.group);

        s = score_spans(&dev, view, &k->rephrase);
        for (int p = 0; p < k->rephrase.n; p++)
        {
            add(f, PHRASINGS, is_exact(&s[p]), 1);
            add(f, PHRASINGS_TOKENS, token_share(&s[p], NULL), 1);
        }
        free_spans(s, k->rephrase.n);
        compare(f, PS, view, &k->rephrase, k->object, k->old, true);
        compare(f, NS, view, &k->neighbour, k->object, k->old, false);

        s = score_spans(&dev, view, &k->portability);
        if ((share = share_in_groups(&k->portability, s, NULL)) >= 0)
            add(f, PORTABILITY, share, 1);
        free_spans(s, k->portability.n);

        s = score_spans(&dev, view, &k->locality);
        before = score_spans(&dev, base, &k->locality);
        if ((share = share_in_groups(&k->locality, s, before)) >= 0)
            add(f, LOCALITY, share, 1);
        free_spans(s, k->locality.n);
        free_spans(before, k->locality.n);

        if (i < arg.fluency)
        {
            double was = fluency(&dev, base, k->prompt[0], seed + (uint64_t) i);
            double is = fluency(&dev, view, k->prompt[0], seed + (uint64_t) i);

            if (isfinite(was) && isfinite(is))
            {
                add(f, FLUENCY_BEFORE, was, 1);
                add(f, FLUENCY_AFTER, is, 1);
            }
        }
    }
    if (su->is_facts)
        judge_facts(f, view, from, to);
}

/* ---- jobs ---- */

static double
cpu_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

typedef struct state
{
    int         n;
    int64_t    *id;    /* ascending: number of the edit + 1 */
    kne_delta **delta;
    kne_view   *view;
    int         n_active, *active; /* edits in force: also what held already, which has no delta */
} state;

static void
put_delta(state *s, int64_t id, kne_delta *delta)
{
    int at = s->n++;

    for (; at > 0 && s->id[at - 1] > id; at--)
    {
        s->id[at] = s->id[at - 1];
        s->delta[at] = s->delta[at - 1];
    }
    s->id[at] = id;
    s->delta[at] = delta;
    delta->refs++;
}

/* Solve edits which[0 .. n) together on top of the state, and put them into it; shared: with one delta for all. */
static void
solve(state *s, const int *which, int n, bool shared, figures *f)
{
    kne_edit_spec   *spec = take((size_t) n, sizeof *spec);
    kne_known       *shown = take((size_t) (n_known + s->n_active), sizeof *shown);
    int             *shown_fact = take((size_t) (n_known + s->n_active), sizeof *shown_fact), n_shown = n_known;
    kne_edit_result *r;
    kne_view        *view;
    kne_err          err;
    double           t0;

    memcpy(shown, known, (size_t) n_known * sizeof *shown);
    memcpy(shown_fact, known_fact, (size_t) n_known * sizeof *shown_fact);
    for (int i = 0; i < n_known && !many; i++) /* the fact that is edited: without tokens it is left out */
        if (shown_fact[i] >= 0 && shown_fact[i] == asked[which[0]].fact)
            shown[i].object.len = 0;
    for (int i = 0; i < s->n_active; i++)
    {
        const kase *k = &asked[s->active[i]];

        shown_fact[n_shown] = k->fact;
        shown[n_shown++] = (kne_known) {k->prompt[0], k->object, s->active[i] + 1};
    }
    for (int i = 0; i < n; i++)
    {
        const kase *k = &asked[which[i]];
        int32_t    *anchor = take((size_t) opt.anchors, sizeof *anchor);

        spec[i] = (kne_edit_spec) {.edit_id = which[i] + 1, .n_prompts = k->n_prompts, .prompt = k->prompt, .object = k->object,
                                   .n_anchors = anchors_of(k, shown_fact, n_shown, anchor), .anchor = anchor};
    }
    kne_edit_job job = {.model = dev.model, .backend = dev.be, .view = s->view, .options = opt, .n_known = n_shown, .known = shown,
                        .n_edits = n, .edit = spec, .cache = cache};

    t0 = cpu_seconds();
    if ((shared ? solve_shared(&job, &r, &err) : kne_edit_run(&job, &r, &err)) != KNE_OK)
        die("edit", &err);
    add(f, CPU_SECONDS, cpu_seconds() - t0, n);
    for (int i = 0; i < n; i++)
    {
        const kne_edit_outcome *o = &r->edit[i];
        const kase             *k = &asked[which[i]];

        add(f, STEPS, o->steps, 1);
        add(f, FAILED, o->outcome == KNE_OUTCOME_FAILED, 1);
        if (arg.verbose)
            printf("%.*s %.*s -> %.*s: outcome %d, %d steps, P %.3g -> %.3g, norm %.3g, was \"%s\" %s\n", (int) k->prompt[0].len,
                   k->prompt[0].p, (int) k->old.len, k->old.p, (int) k->object.len, k->object.p, o->outcome, o->steps,
                   o->p_before, o->p_after, o->norm, o->answer_before ? o->answer_before : "", o->message);
        add(f, NEURONS, o->delta ? o->n_ensemble : 0, o->delta || shared); /* the first of a batch has the shared delta of all */
        add(f, KIB, o->delta ? 4.0 * o->delta->n_rows * dev.model->arch.d_model / 1024 : 0, o->delta || shared);
        if (o->outcome == KNE_OUTCOME_APPLIED || o->outcome == KNE_OUTCOME_HOLDS)
            s->active[s->n_active++] = which[i];
        if (!o->delta)
            continue;
        put_delta(s, o->edit_id, o->delta);
    }
    if (kne_view_new(dev.model, dev.be, s->n, s->id, s->delta, &view, &err) != KNE_OK)
        die("view", &err);
    if (s->view != base)
        kne_view_free(s->view);
    s->view = view;
    kne_edit_result_free(r);
    for (int i = 0; i < n; i++)
        free((void *) spec[i].anchor);
    free(spec), free(shown), free(shown_fact);
}

static void
reset(state *s)
{
    for (int i = 0; i < s->n; i++)
        kne_delta_release(s->delta[i]);
    if (s->view != base)
        kne_view_free(s->view);
    s->view = base;
    s->n = s->n_active = 0;
}

/*
 * All edits in force anew, as kne_consolidate does: those that are not reached together with the others keep the deltas that they
 * have, and the others are solved again on top of those.
 */
static void
solve_anew(state *s, figures *f)
{
    const int n_all = s->n_active;
    int      *which = take((size_t) n_all, sizeof *which), *kept = take((size_t) n_all, sizeof *kept);
    int      *lost = take((size_t) n_all, sizeof *lost), n = n_all, n_kept = 0;
    state     old = *s;
    double    cpu = 0;
    kne_err   err;

    s->id = take((size_t) n_edits, sizeof *s->id);
    s->delta = take((size_t) n_edits, sizeof *s->delta);
    memcpy(which, s->active, (size_t) n_all * sizeof *which);
    s->view = base;
    for (;;)
    {
        int left = 0, n_lost = 0;

        reset(s);
        for (int i = 0; i < n_kept; i++)
        {
            s->active[s->n_active++] = kept[i];
            for (int k = 0; k < old.n; k++)
                if (old.id[k] == kept[i] + 1)
                    put_delta(s, old.id[k], old.delta[k]);
        }
        if (kne_view_new(dev.model, dev.be, s->n, s->id, s->delta, &s->view, &err) != KNE_OK)
            die("view", &err);
        memset(f, 0, sizeof *f);
        if (n > 0)
            solve(s, which, n, false, f);
        cpu += f->sum[CPU_SECONDS];
        for (int i = 0, at = n_kept; i < n; i++) /* solve added those that are reached, in their order */
            if (at < s->n_active && s->active[at] == which[i])
                which[left++] = s->active[at++];
            else
                lost[n_lost++] = which[i];
        memcpy(kept + n_kept, lost, (size_t) n_lost * sizeof *kept);
        n_kept += n_lost;
        if (left == n)
            break;
        n = left;
    }
    f->sum[CPU_SECONDS] = cpu;
    f->n[CPU_SECONDS] = n_all;
    f->sum[FAILED] = n_kept;
    f->n[FAILED] = n_all;
    reset(&old);
    free(old.id), free(old.delta), free(which), free(kept), free(lost);
}

static void
report(figures *f, const char *mode, const char *variant)
{
    const int variant_len = (int) strcspn(variant, "{");

    if (f->n[ES] > 0 && f->n[PS] > 0 && f->n[NS] > 0) /* the harmonic mean, of shares that are not 0 */
    {
        double h = f->n[ES] / f->sum[ES] + f->n[PS] / f->sum[PS] + f->n[NS] / f->sum[NS];

        add(f, SCORE, isfinite(h) ? 3 / h : 0, 1);
    }
    if (arg.tsv)
    {
        for (int k = 0; k < N_METRICS; k++)
            if (f->n[k] > 0)
                printf("%s\t%s\t%.*s\t%llu\t%s\t%.6g\t%.0f\n", arg.tsv, mode, variant_len ? variant_len - 1 : 0, variant,
                       (unsigned long long) seed, metric_name[k], f->sum[k] / f->n[k], f->n[k]);
        fflush(stdout);
        return;
    }
    printf("\n| %.*s, seed %llu | edits |", variant_len ? variant_len - 1 : 3, variant_len ? variant : "kne", (unsigned long long) seed);
    for (int k = 0; k < N_METRICS; k++)
        if (f->n[k] > 0)
            printf(" %s |", metric_name[k]);
    printf("\n|---|---|");
    for (int k = 0; k < N_METRICS; k++)
        if (f->n[k] > 0)
            printf("---|");
    printf("\n| %s | %.0f |", mode, f->n[SUCCESS]);
    for (int k = 0; k < N_METRICS; k++)
        if (f->n[k] > 0)
            printf(k < FLUENCY_BEFORE || (k >= ES && k < STEPS) ? " %.4f |" : " %.3g |", f->sum[k] / f->n[k]);
    printf("\n");
}

static void
parse(int argc, char **argv)
{
    for (int i = 4; i < argc; i++)
    {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";

        if (!strcmp(o, "--verbose"))
        {
            arg.verbose = true;
            continue;
        }
        i++;
        if (!strcmp(o, "--edits"))
            arg.most_edits = atoi(v);
        else if (!strcmp(o, "--batch"))
            arg.batch = atoi(v);
        else if (!strcmp(o, "--mode"))
            arg.modes = v;
        else if (!strcmp(o, "--seed"))
            arg.seeds = v;
        else if (!strcmp(o, "--threads"))
            arg.threads = atoi(v);
        else if (!strcmp(o, "--fluency"))
            arg.fluency = atoi(v);
        else if (!strcmp(o, "--tsv"))
            arg.tsv = v;
        else if (!strcmp(o, "--relation"))
            arg.relation = v;
        else if (!strcmp(o, "--object"))
            arg.object = v;
        else if ((!strcmp(o, "--options") || !strcmp(o, "--variant")) && arg.n_variants < MAX_VARIANTS)
            arg.variant[arg.n_variants++] = v;
        else
            die(o, NULL);
    }
    if (arg.n_variants == 0)
        arg.variant[arg.n_variants++] = "{}";
    if (arg.batch < 1)
        die("how many in a batch?", NULL);
}

/* One mode of one variant with one seed: mode is NAME or NAME:EDITS. */
static void
run(const char *mode, const char *variant)
{
    const size_t len = strcspn(mode, ":");
    char        *name = strndup(mode, len);
    const bool   shared = !strcmp(name, "shared"), consolidate = !strcmp(name, "consolidated");
    figures      f;
    kne_err      err;

    memset(&f, 0, sizeof f);
    n_edits = mode[len] ? atoi(mode + len + 1) : arg.most_edits;
    if (n_edits < 1 || (strcmp(name, "single") && strcmp(name, "batch") && !shared && strcmp(name, "sequence") && !consolidate))
        die("what mode, how many edits?", NULL);
    if (kne_options_parse(&opt, variant + strcspn(variant, "{"), strlen(variant + strcspn(variant, "{")), &err) != KNE_OK)
        die(variant, &err);
    rng = seed * 7919 + 17;
    many = strcmp(name, "single") != 0;
    asked = take((size_t) n_edits, sizeof *asked);
    n_known = 0;
    if (su->is_facts)
        draw_facts();
    else
        draw_cases();
    shuffle_known(); /* so that the first `protect` are a sample */

    state s = {0, take((size_t) n_edits, sizeof *s.id), take((size_t) n_edits, sizeof *s.delta), base, 0,
               take((size_t) n_edits, sizeof *s.active)};
    int  *which = take((size_t) n_edits, sizeof *which), group = shared || !strcmp(name, "batch") ? arg.batch : 1;

    for (int at = 0; at < n_edits; at += group)
    {
        int n = n_edits - at < group ? n_edits - at : group;

        for (int i = 0; i < n; i++)
            which[i] = at + i;
        solve(&s, which, n, shared, &f);
        if (many)
            continue;
        judge(&f, s.view, at, at + 1);
        reset(&s);
    }
    if (many)
        judge(&f, s.view, 0, n_edits);
    report(&f, consolidate ? "sequence" : name, variant);
    if (consolidate)
    {
        solve_anew(&s, &f);
        judge(&f, s.view, 0, n_edits);
        report(&f, name, variant);
    }
    reset(&s);
    free(s.id), free(s.delta), free(s.active), free(which), free(asked), free(name);
}

int
main(int argc, char **argv)
{
    kne_err err;
    char   *seeds, *s, *save_seed;

    if (argc < 4)
        die("usage: bench_eval MODEL FACTS RELATIONS|- [options]", NULL);
    parse(argc, argv);
    if (kne_cpu_backend_new(arg.threads, NULL, &dev.be, &err) != KNE_OK || kne_model_open(argv[1], &dev.model, &err) != KNE_OK ||
        kne_ref_cache_new(&cache, &err) != KNE_OK || kne_view_new(dev.model, dev.be, 0, NULL, NULL, &base, &err) != KNE_OK)
        die("start", &err);
    su = read_suite(argv[2], strcmp(argv[3], "-") == 0 ? NULL : argv[3]);
    int most = su->is_facts ? su->n_facts : KNOWN_CASES;
    known = take((size_t) most, sizeof *known);
    known_fact = take((size_t) most, sizeof *known_fact);
    if (su->is_facts)
        look_at_facts();
    seeds = strdup(arg.seeds);
    for (s = strtok_r(seeds, ",", &save_seed); s; s = strtok_r(NULL, ",", &save_seed))
        for (int v = 0; v < arg.n_variants; v++)
        {
            char *modes = strdup(arg.modes), *m, *save;

            seed = strtoull(s, NULL, 10);
            for (m = strtok_r(modes, ",", &save); m; m = strtok_r(NULL, ",", &save))
                run(m, arg.variant[v]);
            free(modes);
        }
    free(seeds);
    return 0;
}
