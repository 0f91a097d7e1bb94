/*
 * known.c - the facts that protect: what the knowledge base says a model should know, chosen for one batch of
 * edits.
 *
 * They serve the engine three ways (docs/method): as anchors of each edit (its neighbours), as the reference
 * of the contrast, and as what the protected step must not disturb. So a choice has both: neighbours of the
 * batch first, and a sample of everything else. The same rows and the same seed give the same choice in the
 * same order: the order is by a hash of the fact's text, never by time or row number. A fact being edited is
 * not among them, and of two rows for one (subject, relation) the one that an edit made counts.
 */
#include "kne_sql.h"

#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/numeric.h"

/* With fewer than this many known facts the general list joins them. */
#define FEW_FACTS 64

/* $1 the template or NULL: one expression, so that every prompt of a fact is made alike. */
#define PROMPT(subject, relation) \
    "coalesce(replace(r.prompt, '{}', " subject "), " subject " || ' ' || " relation ")"

/* ---------------------------------------------------------------- prompts */

char *
kne_prompt(const char *subject, const char *relation)
{
    static KnePlan plan = {
        "SELECT " PROMPT("$1", "$2") " FROM (SELECT) one LEFT JOIN kne.relation r ON r.relation = $2",
        2,
        {TEXTOID, TEXTOID}};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum values[2];
    char *prompt;

    values[0] = CStringGetTextDatum(subject);
    values[1] = CStringGetTextDatum(relation);
    kne_spi_connect();
    kne_spi(&plan, KNE_READ, values, NULL);
    prompt = kne_spi_text(0, 1, mcxt);
    kne_spi_finish();
    return prompt;
}

int
kne_paraphrases(const char *subject, const char *relation, int max, char ***out)
{
    static KnePlan plan = {
        "SELECT replace(p, '{}', $1) FROM kne.relation r, unnest(r.paraphrases) WITH ORDINALITY u (p, n)"
        " WHERE r.relation = $2 AND position('{}' IN p) > 0 ORDER BY n LIMIT $3",
        3,
        {TEXTOID, TEXTOID, INT4OID}};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum values[3];
    int n;

    values[0] = CStringGetTextDatum(subject);
    values[1] = CStringGetTextDatum(relation);
    values[2] = Int32GetDatum(max);
    kne_spi_connect();
    n = (int) kne_spi(&plan, KNE_READ, values, NULL);
    *out = MemoryContextAlloc(mcxt, sizeof(char *) * Max(n, 1));
    for (int i = 0; i < n; i++)
        (*out)[i] = kne_spi_text(i, 1, mcxt);
    kne_spi_finish();
    return n;
}

/* ---------------------------------------------------------------- the choice */

static Datum
text_array(char **s, int n)
{
    Datum *d = palloc(sizeof(Datum) * Max(n, 1));

    for (int i = 0; i < n; i++)
        d[i] = CStringGetTextDatum(s[i]);
    return PointerGetDatum(construct_array(d, n, TEXTOID, -1, false, TYPALIGN_INT));
}

/*
 * Run one of the queries below and add its rows to (*list, n). Two rows of one (subject, relation) have the
 * same hash, so they come together, and the first is the one that counts.
 */
static int
collect(KnePlan *plan, Datum *values, MemoryContext mcxt, KneKnown **list)
{
    uint64 rows;
    int n = 0;

    kne_spi_connect();
    rows = kne_spi(plan, KNE_READ, values, NULL);
    *list = MemoryContextAlloc(mcxt, sizeof(KneKnown) * Max(rows, 1));
    for (uint64 i = 0; i < rows; i++)
    {
        KneKnown *k = &(*list)[n];
        bool isnull;
        Datum edit_id;

        k->subject = kne_spi_text(i, 1, mcxt);
        k->relation = kne_spi_text(i, 2, mcxt);
        if (n > 0 && k->relation[0] && strcmp(k->subject, k[-1].subject) == 0 &&
            strcmp(k->relation, k[-1].relation) == 0)
            continue;
        k->object = kne_spi_text(i, 3, mcxt);
        k->prompt = kne_spi_text(i, 4, mcxt);
        edit_id = kne_spi_datum(i, 5, &isnull);
        k->edit_id = isnull ? 0 : DatumGetInt64(edit_id);
        n++;
    }
    kne_spi_finish();
    return n;
}

/* The same words can be split into subject and relation in more than one way. */
static bool
is_asked(char **prompt, int n, const char *known)
{
    for (int i = 0; i < n; i++)
        if (strcmp(prompt[i], known) == 0)
            return true;
    return false;
}

int
kne_known_facts(KneModel *model, int n_edits, char **subject, char **relation, int most, uint64 seed,
                KneKnown **out)
{
/* $1 model, $2 subjects, $3 relations of the batch, pairwise, $4 seed, $5 limit */
#define FACTS                                                                                    \
    "SELECT f.subject, f.relation, f.object, " PROMPT("f.subject", "f.relation") ", f.edit_id"   \
    " FROM kne.fact f LEFT JOIN kne.relation r ON r.relation = f.relation"                       \
    " WHERE f.model_id = $1 AND f.valid_to IS NULL"
#define RELATED "(f.relation = ANY ($3) OR f.subject = ANY ($2))"
#define EDITED "EXISTS (SELECT FROM unnest($2, $3) e (s, r) WHERE e.s = f.subject AND e.r = f.relation)"
#define ORDER                                                                                               \
    " ORDER BY hashtextextended((f.subject || E'\\n' || f.relation) COLLATE \"C\", $4), f.edit_id IS NULL," \
    " f.edit_id DESC, f.object COLLATE \"C\" LIMIT $5"
#define TYPES                                                 \
    5,                                                        \
    {                                                         \
        INT4OID, TEXTARRAYOID, TEXTARRAYOID, INT8OID, INT4OID \
    }
    static KnePlan related = {FACTS " AND " RELATED " AND NOT " EDITED ORDER, TYPES};
    static KnePlan by_edits = {FACTS " AND NOT " RELATED " AND f.edit_id IS NOT NULL" ORDER, TYPES};
    static KnePlan others = {FACTS " AND NOT " RELATED
                                   " AND f.edit_id IS NULL AND NOT EXISTS (SELECT FROM kne.fact e"
                                   " WHERE e.model_id = $1 AND e.valid_to IS NULL AND e.edit_id IS NOT NULL"
                                   " AND e.subject = f.subject AND e.relation = f.relation)" ORDER,
                             TYPES};
    /* The prompts of the general list are free text: what names a subject being edited, as a word, stays out. */
    static KnePlan general = {
        "SELECT '', '', g.object, g.prompt, NULL::bigint FROM kne.general_fact g WHERE $1 IS NOT NULL"
        " AND $3 IS NOT NULL AND NOT EXISTS (SELECT FROM unnest($2) e (s)"
        " WHERE lower(g.prompt) ~ ('(^|[^[:alnum:]])'"
        " || regexp_replace(lower(e.s), '[^[:alnum:][:space:]]', E'\\\\\\\\\\\\&', 'g') || '([^[:alnum:]]|$)'))"
        " ORDER BY hashtextextended(g.prompt COLLATE \"C\", $4), g.prompt COLLATE \"C\" LIMIT $5",
        TYPES};
    MemoryContext mcxt = CurrentMemoryContext;
    Datum values[5];
    KneKnown *list[4];
    char **prompt;
    int have[4], take[4];
    int n = 0;

    *out = palloc(sizeof(KneKnown) * Max(most, 1));
    if (most <= 0)
        return 0;
    prompt = palloc(sizeof(char *) * Max(n_edits, 1));
    for (int i = 0; i < n_edits; i++)
        prompt[i] = kne_prompt(subject[i], relation[i]);
    values[0] = Int32GetDatum(model->model_id);
    values[1] = text_array(subject, n_edits);
    values[2] = text_array(relation, n_edits);
    values[3] = Int64GetDatum((int64) seed);
    values[4] = Int32GetDatum(most);
    have[0] = collect(&related, values, mcxt, &list[0]);
    have[1] = collect(&by_edits, values, mcxt, &list[1]);
    have[2] = collect(&others, values, mcxt, &list[2]);

    /* Neighbours may take half, earlier edits a quarter; what one group leaves the others take. */
    take[0] = Min(have[0], Max(most / 2, most - have[1] - have[2]));
    take[1] = Min(have[1], Max(most / 4, most - take[0] - have[2]));
    take[2] = Min(have[2], most - take[0] - take[1]);
    take[1] = Min(have[1], most - take[0] - take[2]);
    take[3] = 0;
    if (take[0] + take[1] + take[2] < FEW_FACTS)
    {
        have[3] = collect(&general, values, mcxt, &list[3]);
        take[3] = Min(have[3], most - take[0] - take[1] - take[2]);
    }
    for (int g = 0; g < 4; g++)
        for (int i = 0; i < take[g]; i++)
            if (!is_asked(prompt, n_edits, list[g][i].prompt))
                (*out)[n++] = list[g][i];
    return n;
}

/* ---------------------------------------------------------------- anchors */

static bool
is_near(const KneKnown *k, int how, const char *subject, const char *relation)
{
    bool same_relation = strcmp(k->relation, relation) == 0, same_subject = strcmp(k->subject, subject) == 0;

    if (same_relation && same_subject)
        return false; /* the fact itself */
    return how == 0   ? same_relation
           : how == 1 ? same_subject && !same_relation
                      : k->edit_id != 0 && !same_subject && !same_relation;
}

int
kne_anchors(const KneKnown *known, int n_known, const char *subject, const char *relation, int most,
            uint64 seed, int32 **out)
{
    int n = 0, have[3] = {0}, take[3];
    uint64 h;

    *out = palloc(sizeof(int32) * Max(Min(most, n_known), 1));
    if (n_known <= 0 || most <= 0)
        return 0;
    for (int i = 0; i < n_known; i++)
        for (int how = 0; how < 3; how++)
            have[how] += is_near(&known[i], how, subject, relation);

    /*
     * Half for the relation, a quarter each for the subject and for earlier edits; the rest to whoever has
     * more.
     */
    take[0] = Min(have[0], Max(most / 2, most - have[1] - have[2]));
    take[1] = Min(have[1], Max(most / 4, most - take[0] - have[2]));
    take[1] = Min(take[1], most - take[0]);
    take[2] = Min(have[2], most - take[0] - take[1]);
    take[0] = Min(have[0], most - take[1] - take[2]);

    /* Each edit of a batch begins elsewhere in the list, so that together they hold more of it. */
    h = hash_combine64(hash_bytes_extended((const unsigned char *) subject, strlen(subject), seed),
                       hash_bytes_extended((const unsigned char *) relation, strlen(relation), seed));
    for (int how = 0; how < 3; how++)
        for (int i = 0, left = take[how]; i < n_known && left > 0; i++)
        {
            int at = (int) ((h + i) % (uint64) n_known);

            if (is_near(&known[at], how, subject, relation))
            {
                (*out)[n++] = at;
                left--;
            }
        }
    return n;
}

/* ---------------------------------------------------------------- the message */

/* Its name is for people; what it says is among the options already. */
static char *
without_profile(const char *options_json)
{
    Datum options = DirectFunctionCall1(jsonb_in, CStringGetDatum(options_json));

    options = DirectFunctionCall2(jsonb_delete, options, CStringGetTextDatum("profile"));
    return DatumGetCString(DirectFunctionCall1(jsonb_out, options));
}

int
kne_put_health_texts(kne_wbuf *w)
{
    static KnePlan plan = {"SELECT text FROM kne.health_text ORDER BY text_id"};
    uint64 n;

    kne_spi_connect();
    n = kne_spi(&plan, KNE_READ, NULL, NULL);
    kne_put_u32(w, (uint32) n);
    for (uint64 i = 0; i < n; i++)
        kne_put_text(w, kne_spi_text(i, 1, CurrentMemoryContext));
    kne_spi_finish();
    return (int) n;
}

void
kne_put_edit_body(kne_wbuf *w, KneModel *model, const char *options_json, int n_edits,
                  const KneEditSpec *edit)
{
    /* The buffer grows in the context of its first byte; what is made here goes at the end. */
    MemoryContext mcxt = AllocSetContextCreate(CurrentMemoryContext, "kne edit body", ALLOCSET_DEFAULT_SIZES);
    MemoryContext old;
    kne_options options;
    char **subject, **relation;
    KneKnown *known;
    int n_known;

    kne_put_str(w, options_json && options_json[0] ? without_profile(options_json) : "{}");
    old = MemoryContextSwitchTo(mcxt);
    kne_options_from_text(options_json, &options);
    subject = palloc(sizeof(char *) * Max(n_edits, 1));
    relation = palloc(sizeof(char *) * Max(n_edits, 1));
    for (int i = 0; i < n_edits; i++)
    {
        subject[i] = edit[i].subject;
        relation[i] = edit[i].relation;
    }
    n_known = kne_known_facts(model, n_edits, subject, relation,
                              Max(Max(options.protect, options.reference), options.anchors),
                              (uint64) options.seed, &known);
    kne_put_u32(w, (uint32) n_known);
    for (int i = 0; i < n_known; i++)
    {
        kne_put_text(w, known[i].prompt);
        kne_put_text(w, known[i].object);
        kne_put_i64(w, known[i].edit_id);
    }
    kne_put_u32(w, (uint32) n_edits);
    for (int i = 0; i < n_edits; i++)
    {
        char **phrasing;
        int32 *anchor;
        int n = kne_paraphrases(edit[i].subject, edit[i].relation, options.phrasings, &phrasing);

        kne_put_i64(w, edit[i].edit_id);
        kne_put_u32(w, (uint32) n + 1);
        kne_put_text(w, kne_prompt(edit[i].subject, edit[i].relation));
        for (int k = 0; k < n; k++)
            kne_put_text(w, phrasing[k]);
        kne_put_text(w, edit[i].object);
        n = kne_anchors(known, n_known, edit[i].subject, edit[i].relation, options.anchors,
                        (uint64) options.seed, &anchor);
        kne_put_u32(w, (uint32) n);
        for (int k = 0; k < n; k++)
            kne_put_i32(w, anchor[k]);
    }
    if (options.max_damage > 0)
        kne_put_health_texts(w);
    MemoryContextSwitchTo(old);
    MemoryContextDelete(mcxt);
}

/* With max_damage 1: whose damage it is must be known. Options of another version are for the engine to refuse. */
int
kne_batch_most(const char *options_json, const KneModel *m)
{
    kne_options o;
    int64 bytes;

    kne_options_known(options_json, &o);
    if (o.max_damage > 0)
        return 1;
    bytes = kne_options_bytes(&o, m->n_layers, m->d_model, m->d_ff, m->gated);
    return (int) Min(PG_INT32_MAX, Max(1, kne_batch_bytes * INT64CONST(1024) / bytes));
}
