/*
 * kne_ref.h - what the unedited model does on facts it knows: FFN activations
 * (the metric of the protected step) and attribution scores (the contrast).
 *
 * All of it is a function of (model, fact, options), taken from the base and not from the edited model,
 * so it is kept from job to job and an edit can be done again with the same rows.
 */
#ifndef KNE_REF_H
#define KNE_REF_H

#include "kne_attrib.h"

typedef struct kne_ref
{
    uint64_t key;       /* of the fact's tokens */
    uint64_t used;      /* the job that last asked for it */
    bool     right;     /* the base answers it: argmax on every token */
    int32_t  n_rows;    /* rows kept of its activations */
    float   *a;         /* (L, n_rows, f) */
    double  *square;    /* (L): sum of its squares */
    float   *score;     /* (L, f): |sum over tokens| of the attribution; NULL until asked for */
    uint64_t score_key; /* of the options that made the score */
} kne_ref;

typedef struct kne_ref_cache kne_ref_cache;
struct kne_energy_known;

/* Where kne_energy keeps what it makes of the facts. */
struct kne_energy_known **kne_ref_cache_energy(kne_ref_cache *c);
void                      kne_energy_known_free(struct kne_energy_known *k);

/* Half of the bytes go to one job's activations; what earlier jobs left is dropped above the other half. */
void kne_ref_cache_limit(kne_ref_cache *c, size_t bytes);

/* ref[i] for each fact: its activations, computed where the cache lacks them. Valid until the next call of kne_refs
 * on the cache. At most `budget` bytes of activations: long facts keep their last rows. */
kne_status kne_refs(kne_ref_cache *c, const kne_model *m, kne_backend *be, const kne_tokens *fact, int32_t n,
                    kne_ref **ref, const kne_job_calls *calls, kne_err *err);
/* The attribution scores of those in pick (indices into fact and ref). */
kne_status kne_ref_scores(const kne_model *m, kne_backend *be, const kne_options *opt,
                          const kne_tokens *fact, kne_ref *const *ref, const int32_t *pick, int32_t n_pick,
                          const kne_job_calls *calls, kne_err *err);

#endif
