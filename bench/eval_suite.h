/*
 * eval_suite.h - what is edited and what is asked afterwards, read from files.
 *
 * Two kinds. Facts: everything a model is known to know, by relation (tab-separated as models/atlas, or JSON with
 * "relations" and "facts"); edits are drawn from them. Cases: benchmark records that bring their own probes, in the
 * published forms of CounterFact (ROME's, EasyEdit's), zsRE (MEND's) and KnowEdit. Nothing is freed: this is a benchmark.
 */
#ifndef EVAL_SUITE_H
#define EVAL_SUITE_H

#include "kne_edit.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TEMPLATES 16
#define MAX_RELATIONS 1024

static void
die(const char *what, const kne_err *err)
{
    fprintf(stderr, "bench_eval: %s%s%s\n", what, err ? ": " : "", err ? err->msg : "");
    exit(1);
}

static void *
take(size_t n, size_t size)
{
    void *p = calloc(n + 1, size);

    if (!p)
        die("out of memory", NULL);
    return p;
}

static kne_text
text_of(const char *s)
{
    return (kne_text) {s, strlen(s)};
}

/* Questions with their answers. group: which key of the record they stand under. */
typedef struct probes
{
    int       n, cap;
    kne_text *prompt, *answer;
    int      *group;
} probes;

static void
probe(probes *p, kne_text prompt, kne_text answer, int group)
{
    if (p->n == p->cap)
    {
        p->cap = p->cap * 2 + 16;
        p->prompt = realloc(p->prompt, (size_t) p->cap * sizeof *p->prompt);
        p->answer = realloc(p->answer, (size_t) p->cap * sizeof *p->answer);
        p->group = realloc(p->group, (size_t) p->cap * sizeof *p->group);
        if (!p->prompt || !p->answer || !p->group)
            die("out of memory", NULL);
    }
    p->prompt[p->n] = prompt;
    p->answer[p->n] = answer;
    p->group[p->n++] = group;
}

/* One edit and what belongs to it. */
typedef struct kase
{
    int      n_prompts;     /* [0] is edited on, the others train too */
    kne_text prompt[MAX_TEMPLATES];
    kne_text object, old;   /* old: empty where the record has none */
    int      fact;          /* facts: which one */
    probes   rephrase, portability, locality, neighbour;
} kase;

typedef struct relation
{
    char *name;
    int   n, inverse; /* -1: none */
    char *template_[MAX_TEMPLATES], *inverse_name;
} relation;

typedef struct fact
{
    char *subject, *object, *new_object;
    int   rel;
    bool  hidden; /* never shown to the editor */
    bool  known;  /* the unedited model answers it in every phrasing */
} fact;

typedef struct suite
{
    bool     is_facts;
    relation rel[MAX_RELATIONS];
    fact    *fact;
    kase    *kase;
    int      n_rels, n_facts, n_cases, cap_facts, cap_cases;
} suite;

static char *
slurp(const char *path)
{
    FILE  *f = fopen(path, "rb");
    char  *p;
    size_t n, cap = 1 << 20, at = 0;

    if (!f)
        die(path, NULL);
    p = take(cap, 1);
    while ((n = fread(p + at, 1, cap - at, f)) > 0)
        if ((at += n) == cap && !(p = realloc(p, (cap *= 2) + 1)))
            die("out of memory", NULL);
    p[at] = '\0';
    fclose(f);
    return p;
}

/* ---- facts ---- */

static int
relation_of(suite *s, const char *name)
{
    for (int i = 0; i < s->n_rels; i++)
        if (strcmp(s->rel[i].name, name) == 0)
            return i;
    if (s->n_rels == MAX_RELATIONS)
        die("too many relations", NULL);
    s->rel[s->n_rels] = (relation) {.name = strdup(name), .inverse = -1};
    return s->n_rels++;
}

static void
add_fact(suite *s, const char *subject, const char *rel, const char *object)
{
    if (s->n_facts == s->cap_facts)
        s->fact = realloc(s->fact, (size_t) (s->cap_facts = s->cap_facts * 2 + 64) * sizeof *s->fact);
    if (!s->fact)
        die("out of memory", NULL);
    s->fact[s->n_facts++] = (fact) {.subject = strdup(subject), .object = strdup(object), .rel = relation_of(s, rel)};
}

static void
add_template(relation *r, const char *text)
{
    if (r->n < MAX_TEMPLATES && strstr(text, "{}"))
        r->template_[r->n++] = strdup(text);
}

/* {"a","b c"}: a PostgreSQL array literal in COPY text (backslashes doubled). */
static void
add_paraphrases(relation *r, char *p)
{
    for (p = strchr(p, '"'); p; p = strchr(p, '"'))
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
        add_template(r, start);
    }
}

static void
read_tsv(suite *s, const char *facts_path, const char *relations_path)
{
    char *text = slurp(relations_path), *save, *line;

    for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
    {
        char     *name = strsep(&line, "\t"), *prompt = strsep(&line, "\t"), *para = strsep(&line, "\t");
        char     *inverse = strsep(&line, "\t");
        relation *r = &s->rel[relation_of(s, name)];

        if (prompt)
            add_template(r, prompt);
        if (para)
            add_paraphrases(r, para);
        if (inverse && inverse[0] && strcmp(inverse, "\\N") != 0)
            r->inverse_name = strdup(inverse);
    }
    for (int i = 0; i < s->n_rels; i++)
        for (int k = 0; s->rel[i].inverse_name && k < s->n_rels; k++)
            if (strcmp(s->rel[k].name, s->rel[i].inverse_name) == 0)
                s->rel[i].inverse = k;
    text = slurp(facts_path);
    for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
    {
        char *subject = strsep(&line, "\t"), *rel = strsep(&line, "\t"), *object = strsep(&line, "\t");

        if (object)
            add_fact(s, subject, rel, object);
    }
}

static void
read_facts_json(suite *s, cJSON *root)
{
    cJSON *c;

    cJSON_ArrayForEach(c, cJSON_GetObjectItem(root, "relations"))
    {
        relation *r = &s->rel[relation_of(s, c->string)];
        cJSON    *t;

        cJSON_ArrayForEach(t, c)
            add_template(r, t->valuestring);
    }
    cJSON_ArrayForEach(c, cJSON_GetObjectItem(root, "facts"))
    {
        const char *v[3];
        static const char *const key[3] = {"subject", "relation", "object"};

        for (int i = 0; i < 3; i++)
            v[i] = cJSON_GetStringValue(cJSON_IsArray(c) ? cJSON_GetArrayItem(c, i) : cJSON_GetObjectItem(c, key[i]));
        if (v[0] && v[1] && v[2])
            add_fact(s, v[0], v[1], v[2]);
    }
}

/* Template with the subject in place of {}. */
static kne_text
fill(const char *template_, const char *subject)
{
    const char *at = strstr(template_, "{}");
    char       *out = take(strlen(template_) + strlen(subject), 1);

    sprintf(out, "%.*s%s%s", (int) (at - template_), template_, subject, at + 2);
    return text_of(out);
}

/* ---- cases ---- */

/* The first string at or below a node: "x", ["x", ...], [["x"]], {"str": "x"}. Of an answer's aliases the first counts. */
static const char *
first_string(const cJSON *c)
{
    const cJSON *child;

    if (!c || cJSON_IsString(c))
        return c ? c->valuestring : NULL;
    if (cJSON_IsObject(c))
        return first_string(cJSON_GetObjectItem(c, "str"));
    cJSON_ArrayForEach(child, c)
    {
        const char *s = first_string(child);

        if (s && s[0])
            return s;
    }
    return NULL;
}

static const char *
member(const cJSON *c, const char *const *names)
{
    for (; *names; names++)
    {
        const char *s = first_string(cJSON_GetObjectItem(c, *names));

        if (s && s[0])
            return s;
    }
    return NULL;
}

static void
probe_strings(probes *p, const char *prompt, const char *answer, int group)
{
    if (prompt && prompt[0] && answer && answer[0])
        probe(p, text_of(prompt), text_of(answer), group);
}

/* {"key": [{"prompt": p, "ground_truth": a}, ...], ...} */
static void
probe_groups(probes *p, const cJSON *groups)
{
    const cJSON *g, *item;
    int          group = 0;

    cJSON_ArrayForEach(g, groups)
    {
        if (cJSON_IsArray(g))
            cJSON_ArrayForEach(item, g)
                probe_strings(p, first_string(cJSON_GetObjectItem(item, "prompt")),
                              first_string(cJSON_GetObjectItem(item, "ground_truth")), group);
        else
            probe_strings(p, first_string(cJSON_GetObjectItem(g, "prompt")),
                          first_string(cJSON_GetObjectItem(g, "ground_truth")), group);
        group++;
    }
}

static void
read_cases(suite *s, cJSON *root)
{
    static const char *const prompts[] = {"prompt", "src", NULL}, *const news[] = {"target_new", "alt", NULL},
                      *const olds[] = {"target_true", "ground_truth", "answers", NULL},
                      *const again[] = {"rephrase_prompt", "rephrase", NULL},
                      *const local[] = {"locality_prompt", "loc", NULL},
                      *const local_answer[] = {"locality_ground_truth", "loc_ans", NULL};
    cJSON *c, *item;

    cJSON_ArrayForEach(c, root)
    {
        const cJSON *r = cJSON_GetObjectItem(c, "requested_rewrite");
        const cJSON *at = r ? r : c;
        const char  *prompt = member(at, prompts), *object = member(at, news), *old = member(at, olds);
        const char  *subject = first_string(cJSON_GetObjectItem(at, "subject"));
        kase         k = {.n_prompts = 1, .fact = -1};

        if (!prompt || !object)
            continue;
        k.prompt[0] = r && subject && strstr(prompt, "{}") ? fill(prompt, subject) : text_of(prompt);
        k.object = text_of(object);
        k.old = text_of(old ? old : "");
        probe_strings(&k.rephrase, member(c, again), object, 0);
        cJSON_ArrayForEach(item, cJSON_GetObjectItem(c, "paraphrase_prompts"))
            probe_strings(&k.rephrase, first_string(item), object, 0);
        cJSON_ArrayForEach(item, cJSON_GetObjectItem(c, "neighborhood_prompts"))
        {
            probe_strings(&k.neighbour, first_string(item), old, 0);
            probe_strings(&k.locality, first_string(item), old, 0);
        }
        const char *loc = member(c, local);
        if (loc && strncmp(loc, "nq question: ", 13) == 0)
            loc += 13;
        probe_strings(&k.locality, loc, member(c, local_answer), 0);
        if (old && member(c, local_answer) && strcmp(old, member(c, local_answer)) == 0) /* EasyEdit's CounterFact: one of ROME's neighbours */
            probe_strings(&k.neighbour, loc, old, 0);
        probe_groups(&k.locality, cJSON_GetObjectItem(c, "locality"));
        probe_groups(&k.portability, cJSON_GetObjectItem(c, "portability"));
        if (s->n_cases == s->cap_cases)
            s->kase = realloc(s->kase, (size_t) (s->cap_cases = s->cap_cases * 2 + 64) * sizeof *s->kase);
        if (!s->kase)
            die("out of memory", NULL);
        s->kase[s->n_cases++] = k;
    }
}

/* FACTS.tsv and RELATIONS.tsv, or one JSON file. */
static suite *
read_suite(const char *path, const char *relations)
{
    suite *s = take(1, sizeof *s);
    cJSON *root;

    if (relations)
        read_tsv(s, path, relations);
    else if (!(root = cJSON_Parse(slurp(path))))
        die("not JSON", NULL);
    else if (cJSON_IsArray(root))
        read_cases(s, root);
    else
        read_facts_json(s, root);
    s->is_facts = s->n_facts > 0;
    if (!s->n_facts && !s->n_cases)
        die("no facts and no cases in the file", NULL);
    for (int i = 0; i < s->n_rels; i++)
        if (s->rel[i].n == 0)
            die("a relation without a template", NULL);
    return s;
}

#endif
