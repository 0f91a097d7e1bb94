/*
 * evaluate.c - measuring an edit by its probes, and a model by texts: kne_evaluate, kne_health.
 *
 * An evaluation is four messages to the engine, whatever the number of probes: the answers' tokens in the model that the caller's
 * snapshot sees, those of locality probes in the unedited model too, greedy continuations, and one sampled text. What the figures
 * are is in docs/reference.md; they are those of the field (KnowEdit, CounterFact).
 */
#include "kne_sql.h"

#include <math.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(kne_evaluate);
PG_FUNCTION_INFO_V1(kne_health);

#define FLUENCY_TOKENS 100
#define FLUENCY_TOP_K 5
#define MAX_GENERATED 64 /* tokens of a greedy continuation */

/* In the order of the rows. */
typedef enum Kind { EDIT, PARAPHRASE, PORTABILITY, LOCALITY, KINDS } Kind;

/* The answer's tokens under one model. */
typedef struct Scored
{
    double logp;
    int n;
    int32 *token, *likeliest;
} Scored;

typedef struct Probe
{
    Kind kind;
    char *prompt, *answer, *versus; /* versus: an answer that should be less likely, or NULL */
    Scored score, other, base;      /* of answer; of versus; of answer in the unedited model */
    char *text;                     /* greedy continuation */
} Probe;

/* ---------------------------------------------------------------- what is asked */

static int
probes_of(int64 edit_id, KneModel **model, Probe **out)
{
    /* The edit's own prompt first; the relation's paraphrases that did not train; then the rows of kne.probe. */
    static KnePlan plan = {
        "WITH e AS (SELECT r.edit_id, r.subject, r.object, r.model_id,"
        "   coalesce(replace(t.prompt, '{}', r.subject), r.subject || ' ' || r.relation) AS prompt, t.paraphrases,"
        "   coalesce((SELECT (s.provenance #>> '{options,phrasings}')::int FROM kne.solution s WHERE s.edit_id = r.edit_id"
        "    ORDER BY s.generation DESC LIMIT 1), (r.options ->> 'phrasings')::numeric::int, $2) AS trained"
        "   FROM kne.edit_request r LEFT JOIN kne.relation t ON t.relation = r.relation WHERE r.edit_id = $1),"
        " p AS (SELECT CASE kind WHEN 'paraphrase' THEN 1 WHEN 'portability' THEN 2 WHEN 'locality' THEN 3 ELSE 0 END AS kind,"
        "   prompt, answer, versus, probe_id FROM kne.probe WHERE edit_id = $1)"
        " SELECT e.model_id, 0 AS kind, e.prompt, e.object, (SELECT p.versus FROM p WHERE p.kind = 0 LIMIT 1) AS versus, 0 AS n FROM e"
        " UNION ALL SELECT NULL, 1, q.prompt, e.object, NULL, n FROM e,"
        "   LATERAL (SELECT replace(u.p, '{}', e.subject) AS prompt, row_number() OVER (ORDER BY u.n) AS n"
        "    FROM unnest(e.paraphrases) WITH ORDINALITY u (p, n) WHERE position('{}' IN u.p) > 0) q"
        "   WHERE q.n > e.trained AND q.prompt <> e.prompt AND NOT EXISTS (SELECT FROM p WHERE p.kind = 1 AND p.prompt = q.prompt)"
        " UNION ALL SELECT NULL, p.kind, p.prompt, p.answer, p.versus, p.probe_id FROM p WHERE p.kind > 0"
        " ORDER BY 2, 6",
        2,
        {INT8OID, INT4OID}};
    MemoryContext mcxt = CurrentMemoryContext;
    kne_options defaults;
    Datum values[2];
    int32 model_id = 0;
    int n;

    kne_options_defaults(&defaults);
    values[0] = Int64GetDatum(edit_id);
    values[1] = Int32GetDatum(defaults.phrasings);
    kne_spi_connect();
    n = (int) kne_spi(&plan, KNE_READ, values, NULL);
    if (n == 0)
        kne_no_such_edit(edit_id);
    *out = MemoryContextAllocZero(mcxt, sizeof(Probe) * n);
    for (int i = 0; i < n; i++)
    {
        Probe *p = &(*out)[i];

        p->kind = (Kind) kne_spi_int4(i, 2);
        p->prompt = kne_spi_text(i, 3, mcxt);
        p->answer = kne_spi_text(i, 4, mcxt);
        p->versus = kne_spi_text(i, 5, mcxt);
        if (p->kind == EDIT)
            model_id = kne_spi_int4(i, 1);
    }
    kne_spi_finish();
    *model = kne_model_by_id(model_id);
    return n;
}

static void
begin(kne_wbuf *w, const KneView *view)
{
    kne_wbuf_init(w);
    kne_put_view(w, view);
}

static void
expect(KneReply *reply, uint32 n, size_t size)
{
    if (kne_get_count(&reply->body, size) != n)
        reply->body.bad = true;
}

/* Pairs (prompt, answer) -> scores. */
static void
ask_scores(const KneView *view, int n, char **prompt, char **answer, Scored **out)
{
    kne_wbuf w;
    KneReply reply;

    if (n == 0)
        return;
    begin(&w, view);
    kne_put_u32(&w, (uint32) n);
    for (int i = 0; i < n; i++)
    {
        kne_put_text(&w, prompt[i]);
        kne_put_text(&w, answer[i]);
    }
    kne_call_view(view, KNE_MSG_SCORE, &w, NULL, NULL, &reply);
    expect(&reply, (uint32) n, 8 + 4);
    for (int i = 0; i < n && !reply.body.bad; i++)
    {
        Scored *s = out[i];

        s->logp = kne_get_f64(&reply.body);
        s->n = (int) kne_get_count(&reply.body, 8);
        s->token = palloc(sizeof(int32) * Max(s->n, 1));
        s->likeliest = palloc(sizeof(int32) * Max(s->n, 1));
        for (int k = 0; k < s->n; k++)
        {
            s->token[k] = kne_get_i32(&reply.body);
            s->likeliest[k] = kne_get_i32(&reply.body);
        }
    }
    kne_reply_done(&reply);
}

static void
ask_texts(const KneView *view, int n, char **prompt, int max_tokens, int top_k, int64 seed, char ***out)
{
    kne_wbuf w;
    KneReply reply;

    begin(&w, view);
    kne_put_i32(&w, max_tokens);
    kne_put_i32(&w, top_k);
    kne_put_i64(&w, seed);
    kne_put_u32(&w, (uint32) n);
    for (int i = 0; i < n; i++)
        kne_put_text(&w, prompt[i]);
    kne_call_view(view, KNE_MSG_GENERATE, &w, NULL, NULL, &reply);
    expect(&reply, (uint32) n, 4);
    for (int i = 0; i < n; i++) /* an error where one is missing */
        *out[i] = text_to_cstring(DatumGetTextPP(kne_model_text(&reply.body)));
    kne_reply_done(&reply);
}

static void
ask(const KneView *view, Probe *probe, int n)
{
    KneView *unedited = kne_view_base(view->model);
    char **prompt = palloc(sizeof(char *) * 2 * n), **answer = palloc(sizeof(char *) * 2 * n);
    Scored **score = palloc(sizeof(Scored *) * 2 * n);
    char ***text = palloc(sizeof(char **) * n);
    int m = 0, longest = 1;

    for (int i = 0; i < n; i++)
    {
        prompt[m] = probe[i].prompt;
        answer[m] = probe[i].answer;
        score[m++] = &probe[i].score;
        if (probe[i].versus)
        {
            prompt[m] = probe[i].prompt;
            answer[m] = probe[i].versus;
            score[m++] = &probe[i].other;
        }
    }
    ask_scores(view, m, prompt, answer, score);

    m = 0;
    for (int i = 0; i < n; i++)
        if (probe[i].kind == LOCALITY)
        {
            prompt[m] = probe[i].prompt;
            answer[m] = probe[i].answer;
            score[m++] = &probe[i].base;
        }
    ask_scores(unedited, m, prompt, answer, score);

    m = 0;
    for (int i = 0; i < n; i++)
        if (probe[i].kind != LOCALITY)
        {
            longest = Max(longest, probe[i].score.n);
            prompt[m] = probe[i].prompt;
            text[m++] = &probe[i].text;
        }
    /* Free to put it into other tokens than ours, hence some more of them. */
    ask_texts(view, m, prompt, Min(longest + 4, MAX_GENERATED), 1, 0, text);
}

/* ---------------------------------------------------------------- figures */

#define MAX_FIGURES 16

typedef struct Figures
{
    int n;
    const char *metric[MAX_FIGURES];
    double value[MAX_FIGURES];
    int probes[MAX_FIGURES];
} Figures;

static void
put(Figures *f, const char *metric, double sum, int probes)
{
    if (probes == 0)
        return;
    f->metric[f->n] = metric;
    f->value[f->n] = sum / probes;
    f->probes[f->n++] = probes;
}

/* Share of the first list's tokens that the second has in the same place. */
static double
agreement(const int32 *a, const int32 *b, int n)
{
    int same = 0;

    for (int i = 0; i < n; i++)
        same += a[i] == b[i];
    return n > 0 ? (double) same / n : 0;
}

/* Does the continuation begin with the answer, white space before it aside? */
static bool
begins_with(const char *text, const char *answer)
{
    text += strspn(text, " \t\r\n");
    answer += strspn(answer, " \t\r\n");
    return strncmp(text, answer, strlen(answer)) == 0;
}

static int
cstring_order(const void *a, const void *b)
{
    return strcmp(*(char *const *) a, *(char *const *) b);
}

/* Entropy in bits of the word n-grams of a text: n words each, joined. */
static double
ngram_entropy(char **word, int n_words, int n)
{
    int total = n_words - n + 1;
    char **gram;
    double h = 0;

    if (total < 1)
        return 0;
    gram = palloc(sizeof(char *) * total);
    for (int i = 0; i < total; i++)
    {
        StringInfoData s;

        initStringInfo(&s);
        for (int k = 0; k < n; k++)
            appendStringInfo(&s, "%s ", word[i + k]);
        gram[i] = s.data;
    }
    qsort(gram, total, sizeof *gram, cstring_order);
    for (int i = 0, from = 0; i < total; i++)
        if (i + 1 == total || strcmp(gram[i], gram[i + 1]) != 0)
        {
            double p = (double) (i + 1 - from) / total;

            h -= p * log2(p);
            from = i + 1;
        }
    return h;
}

static bool
in_word(unsigned char c)
{
    return c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '\'';
}

/* (2/3 H2 + 4/3 H3) / 2 of a text's words (runs of letters, digits and apostrophes, and single marks), times 100. */
static double
fluency(const char *text)
{
    char **word = palloc(sizeof(char *) * (strlen(text) + 1));
    int n = 0;

    while (*(text += strspn(text, " \t\r\n")))
    {
        size_t len = 1;

        while (in_word(text[0]) && in_word(text[len]))
            len++;
        word[n++] = pnstrdup(text, len);
        text += len;
    }
    return 100 * (2.0 / 3 * ngram_entropy(word, n, 2) + 4.0 / 3 * ngram_entropy(word, n, 3)) / 2;
}

static void
figures_of(const Probe *probe, int n, Figures *f)
{
    static const char *const names[KINDS][3] = {
        {"edit_success", "edit_success_exact", "edit_success_generated"},
        {"generality", "generality_exact", "generality_generated"},
        {"portability", "portability_exact", "portability_generated"},
        {"locality", "locality_exact", NULL}};
    double sum[KINDS][3] = {{0}}, likelier[KINDS] = {0};
    int probes[KINDS] = {0}, pairs[KINDS] = {0};

    for (int i = 0; i < n; i++)
    {
        const Probe *p = &probe[i];
        double share = p->kind == LOCALITY ? agreement(p->score.likeliest, p->base.likeliest, p->score.n)
                                           : agreement(p->score.likeliest, p->score.token, p->score.n);

        probes[p->kind]++;
        sum[p->kind][0] += share;
        sum[p->kind][1] += share == 1;
        sum[p->kind][2] += p->text && begins_with(p->text, p->answer);
        if (p->versus)
        {
            pairs[p->kind]++;
            /* by the mean over tokens, as the field's figures are */
            likelier[p->kind] += p->score.logp / Max(p->score.n, 1) > p->other.logp / Max(p->other.n, 1);
        }
    }
    for (int k = 0; k < KINDS; k++)
        for (int i = 0; i < 3; i++)
            if (names[k][i])
                put(f, names[k][i], sum[k][i], probes[k]);
    put(f, "es", likelier[EDIT], pairs[EDIT]);
    put(f, "ps", likelier[PARAPHRASE], pairs[PARAPHRASE]);
    put(f, "ns", likelier[LOCALITY], pairs[LOCALITY]);
    if (pairs[EDIT] && pairs[PARAPHRASE] && pairs[LOCALITY])
    {
        double e = likelier[EDIT] / pairs[EDIT], p = likelier[PARAPHRASE] / pairs[PARAPHRASE],
               l = likelier[LOCALITY] / pairs[LOCALITY];

        put(f, "s", e > 0 && p > 0 && l > 0 ? 3 / (1 / e + 1 / p + 1 / l) : 0, 1);
    }
}

/* Kept, unless nothing may be written. */
static void
store(int64 edit_id, const Figures *f)
{
    static KnePlan plan = {"INSERT INTO kne.evaluation (edit_id, metric, value, probes, evaluated_at)"
                           " VALUES ($1, $2, $3, $4, $5)",
                           5,
                           {INT8OID, TEXTOID, FLOAT8OID, INT4OID, TIMESTAMPTZOID}};
    Datum values[5];

    if (XactReadOnly || RecoveryInProgress())
        return;
    values[0] = Int64GetDatum(edit_id);
    values[4] = TimestampTzGetDatum(GetCurrentTimestamp());
    kne_spi_connect();
    for (int i = 0; i < f->n; i++)
    {
        values[1] = CStringGetTextDatum(f->metric[i]);
        values[2] = Float8GetDatum(f->value[i]);
        values[3] = Int32GetDatum(f->probes[i]);
        kne_spi(&plan, KNE_WRITE, values, NULL);
    }
    kne_spi_finish();
}

Datum
kne_evaluate(PG_FUNCTION_ARGS)
{
    ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
    Figures figures = {0};
    KneModel *model;
    KneView *view;
    Probe *probe;
    char *text = NULL, **at = &text;
    int n;

    InitMaterializedSRF(fcinfo, 0);
    if (PG_ARGISNULL(0))
        return (Datum) 0;
    kne_require_preload();
    n = probes_of(PG_GETARG_INT64(0), &model, &probe);
    view = kne_view_for_read(model->name, KNE_NOW);
    ask(view, probe, n);
    figures_of(probe, n, &figures);
    ask_texts(view, 1, &probe[0].prompt, FLUENCY_TOKENS, FLUENCY_TOP_K, 0, &at);
    Assert(text != NULL);
    put(&figures, "fluency", fluency(text), 1);
    store(PG_GETARG_INT64(0), &figures);
    for (int i = 0; i < figures.n; i++)
    {
        Datum values[3];
        bool nulls[3] = {false};

        values[0] = CStringGetTextDatum(figures.metric[i]);
        values[1] = Float8GetDatum(figures.value[i]);
        values[2] = Int32GetDatum(figures.probes[i]);
        tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
    }
    return (Datum) 0;
}

/* ---------------------------------------------------------------- health */

Datum
kne_health(PG_FUNCTION_ARGS)
{
    KneView *view = kne_view_args(fcinfo, 0, 1);
    KneReply reply;
    kne_wbuf w;
    double logp = 0, tokens = 0;
    int n;

    begin(&w, view);
    n = kne_put_health_texts(&w);
    if (n == 0)
        PG_RETURN_NULL();
    kne_call_view(view, KNE_MSG_TEXTS, &w, NULL, NULL, &reply);
    expect(&reply, (uint32) n, 8 + 4);
    for (int i = 0; i < n && !reply.body.bad; i++)
    {
        logp += kne_get_f64(&reply.body);
        tokens += kne_get_i32(&reply.body);
    }
    kne_reply_done(&reply);
    if (tokens == 0)
        PG_RETURN_NULL();
    PG_RETURN_FLOAT8(exp(-logp / tokens));
}
