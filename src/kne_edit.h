/*
 * kne_edit.h - the KNE method (arXiv 2412.20637 as docs/method.md gives it):
 * locate an ensemble of FFN neurons by gradient attribution, move only these.
 */
#ifndef KNE_EDIT_H
#define KNE_EDIT_H

#include "kne_options.h"
#include "kne_view.h"

/* Text as it arrives, not NUL-terminated. */
typedef struct kne_text
{
    const char *p;
    size_t      len;
} kne_text;

/* A fact the model should know: for the contrast, the protected step and the anchors. */
typedef struct kne_known
{
    kne_text prompt, object;
    int64_t  edit_id; /* of the edit that made it so, 0: none */
} kne_known;

typedef struct kne_edit_spec
{
    int64_t        edit_id;
    int32_t        n_prompts; /* >= 1; [0] is the prompt edited on, the others train with it */
    const kne_text *prompt;
    kne_text       object;
    bool           solve;     /* even if it holds already */
    int32_t        n_anchors;
    const int32_t *anchor;    /* indices into known, nearest first */
} kne_edit_spec;

/*
 * Calls between two passes. yield: serve others; non-zero stops the whole job (KNE_ERR_CANCELLED).
 * cancelled: has this edit been cancelled. progress: for the client. Any may be NULL.
 */
typedef struct kne_job_calls
{
    void *ctx;
    int  (*yield)(void *ctx);
    bool (*cancelled)(void *ctx, int64_t edit_id);
    void (*progress)(void *ctx, int phase, int done, int total, float loss, int finished);
} kne_job_calls;

typedef struct kne_edit_job
{
    const kne_model   *model;
    kne_backend       *backend;
    const kne_view    *view;
    kne_options        options;
    int32_t            n_known;
    const kne_known   *known;
    int32_t            n_edits;
    const kne_edit_spec *edit;
    int32_t            n_texts;
    const kne_text    *text;    /* for the option max_damage */
    kne_job_calls      calls;
    struct kne_ref_cache *cache; /* contrast and activations of known facts, kept between jobs; may be NULL */
} kne_edit_job;

typedef struct kne_ensemble_row
{
    int32_t      layer, neuron;
    float        score;
    const float *token_score; /* (n_tokens of the object) */
} kne_ensemble_row;

typedef struct kne_edit_outcome
{
    int64_t           edit_id;
    int               outcome;  /* enum kne_outcome */
    bool              undone;   /* failed: it held already, but not with the others of the batch */
    char              message[512];
    char             *answer_before; /* what the model said: greedy, see kne_protocol.h */
    int32_t           steps, n_tokens;
    double            p_before, p_after, norm;
    int32_t           n_ensemble;
    kne_ensemble_row *ensemble; /* highest score first */
    kne_delta        *delta;    /* NULL: no rows */
} kne_edit_outcome;

typedef struct kne_edit_result
{
    int32_t           n_edits;
    kne_edit_outcome *edit;       /* (n_edits) in the order of the job */
    int32_t           n_disturbed;
    int32_t          *disturbed;  /* indices into known */
    double            attribute_seconds, optimise_seconds;
    char             *provenance; /* JSON */
    void             *impl;
} kne_edit_result;

/*
 * Run a batch. One edit's trouble is its outcome; a status other than KNE_OK means that nothing was
 * computed for any (out of memory, cancelled as a whole, no such layer range).
 */
kne_status kne_edit_run(const kne_edit_job *job, kne_edit_result **out, kne_err *err);
/* Attribution and selection only, for a job of one edit; outcome[0].ensemble is filled. */
kne_status kne_locate_run(const kne_edit_job *job, kne_edit_result **out, kne_err *err);
void       kne_edit_result_free(kne_edit_result *r);

/* Cache of what depends on (model, known facts, options) alone. One a loaded model. */
kne_status kne_ref_cache_new(struct kne_ref_cache **out, kne_err *err);
void       kne_ref_cache_free(struct kne_ref_cache *c);

/*
 * Tokenise prompt and object in context: encode prompt, and prompt + " " + object (no space is put
 * where prompt ends in white space), special tokens as the post-processor says, and split where they part.
 * KNE_ERR_LIMIT over the model's context, KNE_ERR_INVALID for an empty object or invalid UTF-8.
 * ids: all tokens; *n_prompt: where the object begins (>= 1).
 */
kne_status kne_tokenize_fact(const kne_model *m, kne_text prompt, kne_text object, kne_ids *ids,
                             int32_t *n_prompt, kne_err *err);

/*
 * Log-probability and teacher-forced argmax of n facts in one packed pass at a time (at most max_rows rows).
 * logp[i]: sum over the object's tokens; right[i]: every token is the argmax. Either may be NULL.
 * Facts that cannot be tokenised get the first such error as the status.
 */
kne_status kne_score_facts(const kne_model *m, kne_backend *be, const kne_view *view, const kne_text *prompt,
                           const kne_text *object, int32_t n, double *logp, uint8_t *right,
                           int (*yield)(void *), void *yield_ctx, kne_err *err);

/*
 * Log-probability of n texts, each given its first token: logp[i], over tokens[i] tokens. What is over the context is cut off; a
 * text without a second token counts nothing.
 */
kne_status kne_score_texts(const kne_model *m, kne_backend *be, const kne_view *view, const kne_text *text, int32_t n,
                           double *logp, int32_t *tokens, int (*yield)(void *), void *yield_ctx, kne_err *err);

#endif
