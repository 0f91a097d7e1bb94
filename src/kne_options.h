/*
 * kne_options.h - the options of an edit: one table of names, ranges, defaults.
 *
 * Compiled into the engine (which reads the JSON it is sent) and into kne.so (which
 * checks a jsonb before a request is queued), so that both say the same of the same mistake.
 */
#ifndef KNE_OPTIONS_H
#define KNE_OPTIONS_H

#include "kne_base.h"

typedef enum kne_path { KNE_PATH_JOINT, KNE_PATH_LAYER } kne_path;
typedef enum kne_quadrature { KNE_QUAD_GAUSS, KNE_QUAD_MIDPOINT } kne_quadrature;
typedef enum kne_score_kind { KNE_SCORE_LOGP, KNE_SCORE_P } kne_score_kind;
typedef enum kne_tokens_of { KNE_TOKENS_OBJECT, KNE_TOKENS_CURRENT } kne_tokens_of;
typedef enum kne_select { KNE_SELECT_ATTRIBUTION, KNE_SELECT_RANDOM, KNE_SELECT_ALL, KNE_SELECT_ENERGY } kne_select;
typedef enum kne_matrices { KNE_MATRICES_DOWN, KNE_MATRICES_ALL } kne_matrices;
typedef enum kne_step { KNE_STEP_PROTECTED, KNE_STEP_ADAM } kne_step;

typedef struct kne_options
{
    /* locate (KNE.md 2) */
    int points, path, quadrature, score, tokens;
    int signed_score;
    double contrast;     /* c of the contrast; 0: none */
    int reference;       /* facts in the reference set */
    /* select (3) */
    int select;
    double fraction;     /* p */
    int max_neurons, max_bytes;
    int layer_min, layer_max; /* -1: the last layer */
    /* edit (4) */
    int matrices, step;
    double lr, momentum, ridge, alpha;
    int max_steps;
    double probability;  /* tau */
    double beta;         /* weight of the anchors' KL */
    int anchors;         /* most anchors of an edit */
    int protect;         /* most facts in C */
    int phrasings;       /* of the relation's paraphrases, how many train with the prompt */
    double max_damage;   /* most factor on the perplexity of the health texts; 0: not looked at */
    double seed;         /* whole number below 2^53 */
} kne_options;

typedef struct kne_option
{
    const char *name;
    enum { KNE_OPT_INT, KNE_OPT_REAL, KNE_OPT_BOOL, KNE_OPT_ENUM } kind;
    size_t      offset;          /* in kne_options: int, double, int, int */
    double      initial, min, max;
    const char *values;          /* ENUM: "joint|layer", the index is the value */
    const char *about;           /* one sentence, shown in documentation */
} kne_option;

extern const kne_option kne_option_table[];
extern const int        kne_option_count;

void kne_options_defaults(kne_options *o);

/* What a JSON value is, for the setter. */
typedef enum kne_json_kind { KNE_JSON_NUMBER, KNE_JSON_STRING, KNE_JSON_BOOL, KNE_JSON_OTHER } kne_json_kind;

/* Set one option. KNE_ERR_INVALID for an unknown name (hint lists the names), a wrong type or a value out of range. */
kne_status kne_option_set(kne_options *o, const char *name, kne_json_kind kind, double number,
                          const char *string, kne_err *err);
/* What no single option shows: layer_min over layer_max and the like. */
kne_status kne_options_check(const kne_options *o, kne_err *err);

/* How many neurons the options ask for of a model of this shape, at least 1. */
int32_t kne_options_neurons(const kne_options *o, int32_t n_layers, int32_t d_model, int32_t d_ff, bool gated);
/* Most bytes that the rows of such an edit take. */
int64_t kne_options_bytes(const kne_options *o, int32_t n_layers, int32_t d_model, int32_t d_ff, bool gated);

/* Engine only (cJSON): defaults, then a JSON object, then the check. len 0: defaults. */
kne_status kne_options_parse(kne_options *o, const char *json, size_t len, kne_err *err);
/* All options as a JSON object, written into buf; for the provenance. */
void kne_options_print(const kne_options *o, char *buf, size_t size);

#endif
