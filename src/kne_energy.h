/*
 * kne_energy.h - what a step in the metric of known facts would move: the energy of each neuron.
 *
 *     energy(l, k) = || (G C^-1)[:, k] ||^2,   C = E[a a^T] + ridge * (mean diagonal) * I
 *
 * G: gradient of log P(object) at the value vectors of a layer, over all training prompts of an edit; C: over the whole
 * layer, not the ensemble. A neuron ranks high when the edit wants it and known facts leave it alone, where "it" is the part
 * of its activation that other neurons do not share. Source: this project (docs/method.md).
 */
#ifndef KNE_ENERGY_H
#define KNE_ENERGY_H

#include "kne_ref.h"

typedef struct kne_energy_of
{
    const kne_tokens *prompt; /* (n_prompts), each with the object */
    int32_t           n_prompts;
    float            *score;  /* (L, f), overwritten */
} kne_energy_of;

/*
 * C is taken from at most KNE_ENERGY_ROWS activations of the facts in ref, evenly spread, and inverted through them
 * (Woodbury), so it costs rows^2 f and not f^3. Without facts C = I.
 */
#define KNE_ENERGY_ROWS 256

kne_status kne_energy(const kne_model *m, kne_backend *be, const kne_view *view, const kne_ref *const *ref,
                      int32_t n_ref, double ridge, const kne_energy_of *of, int32_t n, const kne_job_calls *calls,
                      kne_err *err);

#endif
