/*
 * kne_options.c - the table of options and its setter (see kne_options.h).
 * No dependency beyond libc: this file is part of kne.so too.
 */
#include "kne_options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(kne_options, field)

const kne_option kne_option_table[] = {
    {"points", KNE_OPT_INT, AT(points), 1, 1, 64, NULL, "Points of the attribution integral; 1 is gradient times weight."},
    {"path", KNE_OPT_ENUM, AT(path), 0, 0, 0, "joint|layer", "Scale all layers together, or one layer at a time."},
    {"quadrature", KNE_OPT_ENUM, AT(quadrature), 0, 0, 0, "gauss|midpoint", "Rule of the integral."},
    {"score", KNE_OPT_ENUM, AT(score), 0, 0, 0, "logp|p", "Attribute the log-probability, or the probability as the paper does."},
    {"tokens", KNE_OPT_ENUM, AT(tokens), 0, 0, 0, "object|current", "Attribute the new object, or what the model answers now."},
    {"signed", KNE_OPT_BOOL, AT(signed_score), 0, 0, 1, NULL, "Keep the sign of the attribution instead of its absolute value."},
    {"contrast", KNE_OPT_REAL, AT(contrast), 0.1, 0, 100, NULL, "Constant c of the contrast with other facts; 0 turns it off."},
    {"reference", KNE_OPT_INT, AT(reference), 64, 1, 4096, NULL, "Known facts in the reference set of the contrast."},
    {"select", KNE_OPT_ENUM, AT(select), 3, 0, 0, "attribution|random|all|energy", "What ranks the neurons: see docs/method.md."},
    {"fraction", KNE_OPT_REAL, AT(fraction), 0.02, 1e-6, 1, NULL, "Share of all neurons in the ensemble."},
    {"max_neurons", KNE_OPT_INT, AT(max_neurons), 4096, 1, 1 << 24, NULL, "Hard cap on the ensemble."},
    {"max_bytes", KNE_OPT_INT, AT(max_bytes), 4 << 20, 1024, 1 << 30, NULL, "Cap on the ensemble by the bytes of its rows; at least one neuron."},
    {"layer_min", KNE_OPT_INT, AT(layer_min), 0, 0, 4096, NULL, "Lowest layer of the ensemble."},
    {"layer_max", KNE_OPT_INT, AT(layer_max), -1, -1, 4096, NULL, "Highest layer of the ensemble; -1 is the last."},
    {"matrices", KNE_OPT_ENUM, AT(matrices), 0, 0, 0, "down|all", "What moves: value vectors, or keys too."},
    {"step", KNE_OPT_ENUM, AT(step), 0, 0, 0, "protected|adam", "Step in the metric of known facts' activations, or plain Adam."},
    {"lr", KNE_OPT_REAL, AT(lr), 0.02, 1e-9, 10, NULL, "Step size; of a protected step, relative to the ensemble's norm."},
    {"momentum", KNE_OPT_REAL, AT(momentum), 0.5, 0, 0.999, NULL, "Momentum of the protected step."},
    {"ridge", KNE_OPT_REAL, AT(ridge), 0.01, 1e-9, 1e6, NULL, "Ridge of the metric, times its mean diagonal."},
    {"alpha", KNE_OPT_REAL, AT(alpha), 0, 0, 1e6, NULL, "Factor alpha of the update alpha/sqrt(n); 0 takes sqrt(n), so that a step is what lr says."},
    {"max_steps", KNE_OPT_INT, AT(max_steps), 100, 1, 10000, NULL, "Steps after which an edit fails."},
    {"probability", KNE_OPT_REAL, AT(probability), 0.95, 0.01, 0.9999, NULL, "Probability every object token must reach."},
    {"beta", KNE_OPT_REAL, AT(beta), 4, 0, 1000, NULL, "Weight of the anchors' divergence."},
    {"anchors", KNE_OPT_INT, AT(anchors), 8, 0, 4096, NULL, "Most anchor facts of an edit."},
    {"protect", KNE_OPT_INT, AT(protect), 512, 0, 65536, NULL, "Most known facts behind the metric of the protected step."},
    {"phrasings", KNE_OPT_INT, AT(phrasings), 2, 0, 64, NULL, "Paraphrases of the relation that train with its prompt."},
    {"max_damage", KNE_OPT_REAL, AT(max_damage), 0, 0, 1000000, NULL, "Most factor by which perplexity over kne.health_text may rise; 0 does not look."},
    {"seed", KNE_OPT_REAL, AT(seed), 0, 0, 9007199254740991.0, NULL, "Seed of every sample."},
};
const int kne_option_count = sizeof kne_option_table / sizeof kne_option_table[0];

static void
store(kne_options *o, const kne_option *opt, double v)
{
    void *at = (char *) o + opt->offset;

    if (opt->kind == KNE_OPT_REAL)
        *(double *) at = v;
    else
        *(int *) at = (int) v;
}

static double
fetch(const kne_options *o, const kne_option *opt)
{
    const void *at = (const char *) o + opt->offset;

    return opt->kind == KNE_OPT_REAL ? *(const double *) at : *(const int *) at;
}

void
kne_options_defaults(kne_options *o)
{
    memset(o, 0, sizeof *o);
    for (int i = 0; i < kne_option_count; i++)
        store(o, &kne_option_table[i], kne_option_table[i].initial);
}

/* Index of `word` among "a|b|c", -1 when it is none of them. */
static int
enum_index(const char *values, const char *word)
{
    size_t len = strlen(word);
    int    index = 0;

    for (const char *p = values;; index++)
    {
        size_t n = strcspn(p, "|");

        if (n == len && memcmp(p, word, n) == 0)
            return index;
        if (!p[n])
            return -1;
        p += n + 1;
    }
}

static kne_status
unknown_option(const char *name, kne_err *err)
{
    char   names[sizeof err->hint - 32];
    size_t at = 0;

    names[0] = '\0';
    for (int i = 0; i < kne_option_count && at < sizeof names; i++)
        at += (size_t) snprintf(names + at, sizeof names - at, "%s%s", i ? ", " : "", kne_option_table[i].name);
    kne_error(err, KNE_ERR_INVALID, "unknown edit option \"%.64s\"", name);
    kne_error_hint(err, "Options are %s.", names);
    return KNE_ERR_INVALID;
}

kne_status
kne_option_set(kne_options *o, const char *name, kne_json_kind kind, double number, const char *string,
               kne_err *err)
{
    static const char *const wanted[] = {"a whole number", "a number", "true or false", "a string"};
    static const kne_json_kind takes[] = {KNE_JSON_NUMBER, KNE_JSON_NUMBER, KNE_JSON_BOOL, KNE_JSON_STRING};
    const kne_option *opt = NULL;

    for (int i = 0; i < kne_option_count && !opt; i++)
        if (strcmp(kne_option_table[i].name, name) == 0)
            opt = &kne_option_table[i];
    if (!opt)
        return unknown_option(name, err);

    if (kind != takes[opt->kind] || (opt->kind == KNE_OPT_INT && number != floor(number)))
    {
        kne_error(err, KNE_ERR_INVALID, "edit option \"%s\" must be %s", name, wanted[opt->kind]);
        if (opt->kind == KNE_OPT_ENUM)
            kne_error_detail(err, "Its values are %s.", opt->values);
        return KNE_ERR_INVALID;
    }
    if (opt->kind == KNE_OPT_ENUM)
    {
        number = enum_index(opt->values, string);
        if (number < 0)
        {
            kne_error(err, KNE_ERR_INVALID, "invalid value for edit option \"%s\": \"%.64s\"", name, string);
            kne_error_detail(err, "Its values are %s.", opt->values);
            return KNE_ERR_INVALID;
        }
    }
    else if (!(number >= opt->min && number <= opt->max)) /* NaN fails too */
    {
        kne_error(err, KNE_ERR_INVALID, "%g is out of range for edit option \"%s\"", number, name);
        kne_error_detail(err, "It goes from %g to %g.", opt->min, opt->max);
        return KNE_ERR_INVALID;
    }
    store(o, opt, number);
    return KNE_OK;
}

kne_status
kne_options_check(const kne_options *o, kne_err *err)
{
    if (o->layer_max >= 0 && o->layer_min > o->layer_max)
        return kne_error(err, KNE_ERR_INVALID, "edit option \"layer_min\" (%d) is above \"layer_max\" (%d)",
                         o->layer_min, o->layer_max);
    if (o->seed != floor(o->seed))
        return kne_error(err, KNE_ERR_INVALID, "edit option \"seed\" must be a whole number");
    return KNE_OK;
}

/* The shortest text that reads back as v: 0.1, not 0.10000000000000001. */
static int
print_number(char *buf, size_t size, double v)
{
    char text[32];
    int  digits = 15;

    do
        snprintf(text, sizeof text, "%.*g", digits, v);
    while (strtod(text, NULL) != v && ++digits <= 17);
    return snprintf(buf, size, "%s", text);
}

void
kne_options_print(const kne_options *o, char *buf, size_t size)
{
    size_t at = 0;

    for (int i = 0; i < kne_option_count && at < size; i++)
    {
        const kne_option *opt = &kne_option_table[i];
        double            v = fetch(o, opt);

        at += (size_t) snprintf(buf + at, size - at, "%s\"%s\":", i ? "," : "{", opt->name);
        if (at >= size)
            break;
        if (opt->kind == KNE_OPT_ENUM)
        {
            const char *p = opt->values;

            for (int k = (int) v; k > 0; k--)
                p += strcspn(p, "|") + 1;
            at += (size_t) snprintf(buf + at, size - at, "\"%.*s\"", (int) strcspn(p, "|"), p);
        }
        else if (opt->kind == KNE_OPT_BOOL)
            at += (size_t) snprintf(buf + at, size - at, v != 0 ? "true" : "false");
        else
            at += (size_t) print_number(buf + at, size - at, v);
    }
    if (at < size)
        snprintf(buf + at, size - at, "}");
}

/* Bytes of a neuron's rows. */
static int64_t
neuron_bytes(const kne_options *o, int32_t d_model, bool gated)
{
    return (o->matrices == KNE_MATRICES_DOWN ? 1 : gated ? 3 : 2) * (int64_t) d_model * (int64_t) sizeof(float);
}

int32_t
kne_options_neurons(const kne_options *o, int32_t n_layers, int32_t d_model, int32_t d_ff, bool gated)
{
    int32_t top = o->layer_max < 0 ? n_layers - 1 : o->layer_max;
    int64_t all = (int64_t) n_layers * d_ff, n;
    int64_t candidates = (int64_t) (top - o->layer_min + 1) * d_ff;
    int64_t cap = o->max_bytes / neuron_bytes(o, d_model, gated);

    n = o->select == KNE_SELECT_ALL ? candidates : (int64_t) llround(o->fraction * (double) all);
    cap = cap < o->max_neurons ? cap : o->max_neurons;
    n = n < cap || o->select == KNE_SELECT_ALL ? n : cap;
    n = n < candidates ? n : candidates;
    return (int32_t) (n < 1 ? 1 : n);
}

int64_t
kne_options_bytes(const kne_options *o, int32_t n_layers, int32_t d_model, int32_t d_ff, bool gated)
{
    return kne_options_neurons(o, n_layers, d_model, d_ff, gated) * neuron_bytes(o, d_model, gated);
}
