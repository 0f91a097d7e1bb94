/*
 * bench_edit.c - counterfactual edits on a model that knows its facts: how many succeed, carry over to
 * other phrasings and leave the rest alone, and what they cost. Quality is exact match: every object token the argmax
 * (which is what greedy decoding would give); a failed edit is a miss.
 *
 * A random third of the facts is never shown to the editor (it is not in kne.fact, so to speak); what must
 * not change is judged on that third. Prints a Markdown table.
 *
 * bench_edit MODEL FACTS RELATIONS [--edits N] [--batch N] [--mode single|batch|sequence] [--seed S]
 *            [--options JSON] [--threads T] [--relation NAME] [--object NAME] [--verbose]
 * --relation, --object: edits of one relation only; one new object for all.
 * FACTS, RELATIONS: tab-separated as models/atlas; or a facts.json and "-".
 */
#include "kne_edit.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEMPLATES 16

typedef struct relation
{
    char *name;
    int   n;
    char *template_[MAX_TEMPLATES];
} relation;

typedef struct fact
{
    char *subject, *object;
    int   rel;
    bool  hidden; /* never shown to the editor */
    bool  known;  /* the unedited model answers it in every phrasing */
    char *new_object;
} fact;

static relation rels[256];
static fact    *facts;
static int      n_rels, n_facts, cap_facts;

static void
die(const char *what, const kne_err *err)
{
    fprintf(stderr, "bench_edit: %s: %s\n", what, err ? err->msg : "");
    exit(1);
}

static char *
slurp(const char *path)
{
    FILE  *f = fopen(path, "rb");
    char  *p;
    size_t n, cap = 1 << 20, at = 0;

    if (!f)
        die(path, NULL);
    p = malloc(cap + 1);
    while ((n = fread(p + at, 1, cap - at, f)) > 0)
        if ((at += n) == cap)
            p = realloc(p, (cap *= 2) + 1);
    p[at] = '\0';
    fclose(f);
    return p;
}

static int
relation_of(const char *name)
{
    for (int i = 0; i < n_rels; i++)
        if (strcmp(rels[i].name, name) == 0)
            return i;
    rels[n_rels].name = strdup(name);
    return n_rels++;
}

static void
add_fact(const char *subject, const char *rel, const char *object)
{
    if (n_facts == cap_facts)
        facts = realloc(facts, (size_t) (cap_facts = cap_facts * 2 + 64) * sizeof *facts);
    facts[n_facts++] = (fact) {strdup(subject), strdup(object), relation_of(rel), false, false, NULL};
}

/* {"a","b c"}: a PostgreSQL array literal in COPY text (backslashes doubled). */
static void
add_paraphrases(relation *r, char *p)
{
    for (p = strchr(p, '"'); p && r->n < MAX_TEMPLATES; p = strchr(p, '"'))
    {
        char *out = ++p, *start = out, *in = p;

        while (*in && *in != '"')
        {
            while (*in == '\\' && in[1])
                in++;
            *out++ = *in++;
        }
        p = *in ? in + 1 : in;
        *out = '\0';
        r->template_[r->n++] = strdup(start);
    }
}

static void
read_tsv(const char *facts_path, const char *relations_path)
{
    char *text = slurp(relations_path), *save, *line;

    for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
    {
        char *name = strsep(&line, "\t"), *prompt = strsep(&line, "\t"), *para = strsep(&line, "\t");
        relation *r = &rels[relation_of(name)];

        r->template_[r->n++] = strdup(prompt);
        if (para)
            add_paraphrases(r, para);
    }
    text = slurp(facts_path);
    for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
    {
        char *s = strsep(&line, "\t"), *r = strsep(&line, "\t"), *o = strsep(&line, "\t");

        if (o)
            add_fact(s, r, o);
    }
}

static void
read_json(const char *path)
{
    cJSON *root = cJSON_Parse(slurp(path)), *c;

    cJSON_ArrayForEach(c, cJSON_GetObjectItem(root, "relations"))
    {
        relation *r = &rels[relation_of(c->string)];
        cJSON    *t;

        cJSON_ArrayForEach(t, c)
            if (r->n < MAX_TEMPLATES)
                r->template_[r->n++] = strdup(t->valuestring);
    }
    cJSON_ArrayForEach(c, cJSON_GetObjectItem(root, "facts"))
    {
        cJSON *s = cJSON_IsArray(c) ? cJSON_GetArrayItem(c, 0) : cJSON_GetObjectItem(c, "subject");
        cJSON *r = cJSON_IsArray(c) ? cJSON_GetArrayItem(c, 1) : cJSON_GetObjectItem(c, "relation");
        cJSON *o = cJSON_IsArray(c) ? cJSON_GetArrayItem(c, 2) : cJSON_GetObjectItem(c, "object");

        add_fact(s->valuestring, r->valuestring, o->valuestring);
    }
}

static kne_text
text(const char *s)
{
    return (kne_text) {s, strlen(s)};
}

/* Template with the subject in place of {}; from a ring, leaked on purpose: this is a benchmark. */
static kne_text
fill(const char *template_, const char *subject)
{
    const char *at = strstr(template_, "{}");
    char       *out = malloc(strlen(template_) + strlen(subject) + 1);

    sprintf(out, "%.*s%s%s", (int) (at - template_), template_, subject, at + 2);
    return text(out);
}

/* ---- scoring ---- */

typedef struct probes
{
    int      n, cap;
    kne_text *prompt, *object;
} probes;

static void
probe(probes *p, kne_text prompt, const char *object)
{
    if (p->n == p->cap)
    {
        p->cap = p->cap * 2 + 256;
        p->prompt = realloc(p->prompt, (size_t) p->cap * sizeof *p->prompt);
        p->object = realloc(p->object, (size_t) p->cap * sizeof *p->object);
    }
    p->prompt[p->n] = prompt;
    p->object[p->n++] = text(object);
}

static kne_model   *model;
static kne_backend *be;

static int
count_right(const probes *p, const kne_view *view, uint8_t *right)
{
    kne_err  err;
    uint8_t *r = right ? right : malloc((size_t) p->n + 1);
    int      n = 0;

    if (kne_score_facts(model, be, view, p->prompt, p->object, p->n, NULL, r, NULL, NULL, &err) != KNE_OK)
        die("scoring", &err);
    for (int i = 0; i < p->n; i++)
        n += r[i];
    if (!right)
        free(r);
    return n;
}

static void
probe_phrasings(probes *p, int f, const char *object, int skip)
{
    const relation *r = &rels[facts[f].rel];

    for (int t = 1 + skip; t < r->n; t++)
        probe(p, fill(r->template_[t], facts[f].subject), object);
}

/* ---- jobs ---- */

static kne_known *known_list;
static int       *known_fact; /* fact of each known */
static int        n_known;

/* Anchors of one edit: same relation, same subject, in an order fixed by the seed. */
static int
anchors_of(int f, int32_t *out, int most, uint64_t seed)
{
    int n = 0, half = most - most / 4;

    for (int turn = 0; turn < 2; turn++) /* 0: same subject, at most a quarter; 1: same relation */
    {
        int32_t *pool = malloc((size_t) n_known * sizeof *pool);
        int      m = 0, take = turn == 0 ? most / 4 : most - n;
        uint64_t s = seed + (uint64_t) f * 977;

        (void) half;
        for (int i = 0; i < n_known; i++)
        {
            const fact *k = &facts[known_fact[i]];
            bool same_s = strcmp(k->subject, facts[f].subject) == 0, same_r = k->rel == facts[f].rel;

            if (known_fact[i] != f && !(same_s && same_r) && (turn == 0 ? same_s : same_r && !same_s))
                pool[m++] = i;
        }
        for (int i = 0; i < m && i < take; i++)
        {
            int j = i + (int) (kne_random_next(&s) % (uint64_t) (m - i));
            int32_t t = pool[i];

            pool[i] = pool[j];
            pool[j] = t;
            out[n++] = pool[i];
        }
        free(pool);
    }
    return n;
}

static int
by_double(const void *a, const void *b)
{
    double x = *(const double *) a, y = *(const double *) b;

    return (x > y) - (x < y);
}

int
main(int argc, char **argv)
{
    int         n_edits = 200, batch = 64, verbose = 0, threads = 0;
    uint64_t    seed = 1;
    const char *mode = "single", *json = "", *only = NULL, *same = NULL;
    kne_err     err;
    kne_options opt;
    struct kne_ref_cache *cache;
    kne_view   *base;

    if (argc < 4)
        return fprintf(stderr, "usage: bench_edit MODEL FACTS RELATIONS [options]\n"), 2;
    for (int i = 4; i < argc; i++)
    {
        if (!strcmp(argv[i], "--verbose"))
            verbose = 1;
        else if (i + 1 < argc && !strcmp(argv[i], "--edits"))
            n_edits = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--batch"))
            batch = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--mode"))
            mode = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--seed"))
            seed = strtoull(argv[++i], NULL, 10);
        else if (i + 1 < argc && !strcmp(argv[i], "--threads"))
            threads = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--relation"))
            only = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--object"))
            same = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--options"))
            json = argv[++i];
        else
            return fprintf(stderr, "bench_edit: what is %s?\n", argv[i]), 2;
    }
    if (kne_cpu_backend_new(threads, NULL, &be, &err) != KNE_OK || kne_model_open(argv[1], &model, &err) != KNE_OK ||
        kne_options_parse(&opt, json, strlen(json), &err) != KNE_OK ||
        kne_ref_cache_new(&cache, &err) != KNE_OK || kne_view_new(model, be, 0, NULL, NULL, &base, &err) != KNE_OK)
        die("start", &err);
    if (strcmp(argv[3], "-") == 0)
        read_json(argv[2]);
    else
        read_tsv(argv[2], argv[3]);

    /* What the model knows in every phrasing; a third is hidden. */
    probes   all = {0};
    int     *first = malloc(((size_t) n_facts + 1) * sizeof *first);
    for (int i = 0; i < n_facts; i++)
    {
        first[i] = all.n;
        for (int t = 0; t < rels[facts[i].rel].n; t++)
            probe(&all, fill(rels[facts[i].rel].template_[t], facts[i].subject), facts[i].object);
    }
    first[n_facts] = all.n;
    uint8_t *right = malloc((size_t) all.n);
    count_right(&all, base, right);
    uint64_t rng = seed * 7919 + 17;
    int      n_whole = 0, n_hidden = 0;
    for (int i = 0; i < n_facts; i++)
    {
        facts[i].known = true;
        for (int k = first[i]; k < first[i + 1]; k++)
            facts[i].known &= right[k];
        facts[i].hidden = kne_random_next(&rng) % 3 == 0;
        n_whole += facts[i].known;
        n_hidden += facts[i].known && facts[i].hidden;
    }

    /* The edits: known facts, objects of other facts of the relation. */
    int *edit = malloc((size_t) n_facts * sizeof *edit), n = 0;
    for (int i = 0; i < n_facts; i++)
        if (facts[i].known && (!only || !strcmp(only, rels[facts[i].rel].name)))
            edit[n++] = i;
    for (int i = n - 1; i > 0; i--)
    {
        int j = (int) (kne_random_next(&rng) % (uint64_t) (i + 1)), t = edit[i];

        edit[i] = edit[j];
        edit[j] = t;
    }
    n_edits = n_edits < n ? n_edits : n;
    for (int i = 0, k = 0; i < n && k < n_edits; i++)
    {
        fact *f = &facts[edit[i]];

        if (same)
            f->new_object = (char *) same;
        for (int try = 0; try < 1000 && !f->new_object; try++)
        {
            const fact *o = &facts[kne_random_next(&rng) % (uint64_t) n_facts];

            if (o->rel == f->rel && strcmp(o->object, f->object) != 0)
                f->new_object = o->object;
        }
        if (f->new_object)
            edit[k++] = edit[i];
        else if (i == n - 1)
            n_edits = k;
    }

    /* known facts shown to the editor: in sequence and batch, not those being edited */
    known_list = malloc((size_t) n_facts * 2 * sizeof *known_list);
    known_fact = malloc((size_t) n_facts * 2 * sizeof *known_fact);
    bool many = strcmp(mode, "single") != 0;
    int  group = strcmp(mode, "batch") == 0 ? batch : 1;
    for (int i = 0; i < n_facts; i++)
    {
        bool mine = false;

        for (int k = 0; many && k < n_edits; k++)
            mine |= edit[k] == i;
        if (facts[i].hidden || mine)
            continue;
        known_list[n_known] = (kne_known) {fill(rels[facts[i].rel].template_[0], facts[i].subject), text(facts[i].object), 0};
        known_fact[n_known++] = i;
    }
    /* a seeded order, so that the first `protect` are a sample */
    for (int i = n_known - 1; i > 0; i--)
    {
        int       j = (int) (kne_random_next(&rng) % (uint64_t) (i + 1)), t = known_fact[i];
        kne_known k = known_list[i];

        known_list[i] = known_list[j];
        known_list[j] = k;
        known_fact[i] = known_fact[j];
        known_fact[j] = t;
    }

    int64_t  *ids = malloc(((size_t) n_edits + 1) * sizeof *ids);
    kne_delta **deltas = malloc(((size_t) n_edits + 1) * sizeof *deltas);
    int      n_in = 0, done = 0, success = 0, steps = 0, rows = 0, failed = 0;
    double   bytes = 0, t_attr = 0, t_opt = 0, took = 0, *each = malloc(((size_t) n_edits + 1) * sizeof *each);
    long     ph = 0, ph_ok = 0, sr = 0, sr_ok = 0, ss = 0, ss_ok = 0, un = 0, un_ok = 0, an = 0, an_ok = 0;
    kne_view *view = base;
    bool     once = many; /* figures are of the final state */

    for (int at = 0; at < n_edits; at += group)
    {
        int           m = n_edits - at < group ? n_edits - at : group;
        kne_edit_spec *spec = calloc((size_t) m, sizeof *spec);
        kne_edit_result *res;

        for (int i = 0; i < m; i++)
        {
            fact     *f = &facts[edit[at + i]];
            relation *r = &rels[f->rel];
            int       np = 1 + (opt.phrasings < r->n - 1 ? opt.phrasings : r->n - 1);
            kne_text *prompt = malloc((size_t) np * sizeof *prompt);
            int32_t  *anchor = malloc((size_t) opt.anchors * 2 * sizeof *anchor + 8);

            for (int t = 0; t < np; t++)
                prompt[t] = fill(r->template_[t], f->subject);
            spec[i] = (kne_edit_spec) {at + i + 1, np, prompt, text(f->new_object),
                                       anchors_of(edit[at + i], anchor, opt.anchors, seed), anchor};
        }
        /* the edited fact itself is not among what must stay */
        kne_known *shown = malloc(((size_t) n_known + (size_t) n_edits) * sizeof *shown);
        memcpy(shown, known_list, (size_t) n_known * sizeof *shown);
        if (!many)
            for (int i = 0; i < n_known; i++)
                if (known_fact[i] == edit[at])
                    shown[i].object = (kne_text) {"", 0}; /* has no tokens: left out */
        int n_shown = n_known;
        for (int i = 0; many && i < n_in; i++)
        {
            fact *f = &facts[edit[ids[i] - 1]];

            shown[n_shown++] = (kne_known) {fill(rels[f->rel].template_[0], f->subject), text(f->new_object), ids[i]};
        }
        kne_edit_job job = {model, be, view, opt, n_shown, shown, m, spec, {0}, cache};
        double t0 = kne_now();
        if (kne_edit_run(&job, &res, &err) != KNE_OK)
            die("edit", &err);
        took += kne_now() - t0;
        each[at / group] = kne_now() - t0;
        t_attr += res->attribute_seconds;
        t_opt += res->optimise_seconds;
        for (int i = 0; i < m; i++)
        {
            kne_edit_outcome *o = &res->edit[i];

            steps += o->steps;
            failed += o->outcome == KNE_OUTCOME_FAILED;
            if (verbose)
                printf("%s | %s | %s -> %s: outcome %d, %d steps, P %.3g -> %.3g, norm %.3g, was \"%s\" %s\n",
                       facts[edit[at + i]].subject, rels[facts[edit[at + i]].rel].name, facts[edit[at + i]].object,
                       facts[edit[at + i]].new_object, o->outcome, o->steps, o->p_before, o->p_after, o->norm,
                       o->answer_before ? o->answer_before : "", o->message);
            if (o->delta)
            {
                rows += o->delta->n_rows;
                bytes += 4.0 * o->delta->n_rows * model->arch.d_model;
                deltas[n_in] = o->delta;
                o->delta->refs++;
                ids[n_in++] = o->edit_id;
            }
        }
        if (view != base)
            kne_view_free(view);
        if (!many)
        {
            ids[0] = ids[n_in - (n_in > 0)];
            deltas[0] = n_in ? deltas[n_in - 1] : NULL;
        }
        if (kne_view_new(model, be, n_in, ids, deltas, &view, &err) != KNE_OK)
            die("view", &err);
        done += m;
        kne_edit_result_free(res);
        free(spec);
        free(shown);
        if (once && at + group < n_edits)
            continue;

        /* ---- figures ---- */
        int from = once ? 0 : at, to = once ? n_edits : at + 1;
        probes ps = {0}, pp = {0}, pr = {0}, pj = {0}, pu = {0}, pa = {0};
        bool  *edited = calloc((size_t) n_facts, 1), *in_r = calloc((size_t) n_facts, 1), *in_s = calloc((size_t) n_facts, 1);
        for (int i = from; i < to; i++)
            edited[edit[i]] = true;
        for (int i = from; i < to; i++)
        {
            fact *f = &facts[edit[i]];

            probe(&ps, fill(rels[f->rel].template_[0], f->subject), f->new_object);
            probe_phrasings(&pp, edit[i], f->new_object, opt.phrasings);
            for (int k = 0; k < n_facts; k++)
            {
                if (edited[k] || !facts[k].known)
                    continue;
                in_r[k] |= facts[k].rel == f->rel;
                in_s[k] |= strcmp(facts[k].subject, f->subject) == 0;
            }
        }
        for (int k = 0; k < n_facts; k++)
        {
            kne_text p = fill(rels[facts[k].rel].template_[0], facts[k].subject);

            if (edited[k] || !facts[k].known)
                continue;
            if (!facts[k].hidden)
            {
                if (once || in_r[k] || in_s[k])
                    probe(&pa, p, facts[k].object);
                continue;
            }
            if (in_r[k])
                probe(&pr, p, facts[k].object);
            if (in_s[k])
                probe(&pj, p, facts[k].object);
            if (once || k % 8 == at % 8) /* one at a time: an eighth of the hidden facts each, in turn */
                probe(&pu, p, facts[k].object);
        }
        success += count_right(&ps, view, NULL);
        ph += pp.n, ph_ok += count_right(&pp, view, NULL);
        sr += pr.n, sr_ok += count_right(&pr, view, NULL);
        ss += pj.n, ss_ok += count_right(&pj, view, NULL);
        un += pu.n, un_ok += count_right(&pu, view, NULL);
        an += pa.n, an_ok += count_right(&pa, view, NULL);
        free(edited), free(in_r), free(in_s);
        if (!many)
        {
            kne_view_free(view);
            view = base;
            kne_delta_release(n_in ? deltas[0] : NULL);
            n_in = 0;
        }
    }
    qsort(each, (size_t) (n_edits + group - 1) / (size_t) group, sizeof *each, by_double);
    printf("| mode | edits | success | phrasings | same relation | same subject | untouched | shown | steps | failed | neurons | KiB an edit | s an edit | attribution | optimisation | edits/s |\n");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    printf("| %s | %d | %.3f | %.3f | %.3f | %.3f | %.4f | %.4f | %.1f | %d | %.0f | %.1f | %.3f (median %.3f) | %.3f | %.3f | %.2f |\n", mode, n_edits,
           (double) success / n_edits, (double) ph_ok / (double) (ph ? ph : 1), (double) sr_ok / (double) (sr ? sr : 1),
           (double) ss_ok / (double) (ss ? ss : 1), (double) un_ok / (double) (un ? un : 1),
           (double) an_ok / (double) (an ? an : 1), (double) steps / n_edits, failed, (double) rows / n_edits, bytes / n_edits / 1024,
           took / n_edits, each[(n_edits + group - 1) / group / 2] / group, t_attr / n_edits, t_opt / n_edits, n_edits / took);
    if (verbose)
        printf("facts %d, known in every phrasing %d, hidden %d\n", n_facts, n_whole, n_hidden);
    return 0;
}
