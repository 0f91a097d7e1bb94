/*
 * kne_energy.h - what a step in the metric of known facts would gain: the energy of each neuron.
 *
 *     energy(l, k) = < (G C^-1)[:, k], G[:, k] >,   C = E[a a^T] + ridge * (mean diagonal) * I
 *
 * G: gradient of a log-probability at the value vectors of a layer, over some prompts; C: over the whole layer, not the
 * ensemble. The sum over k is what the log-probability gains by a unit step in the metric, so this is each neuron's part in it: high
 * where the edit wants it and known facts leave it alone. Source: this project (docs/method.md).
 */
#ifndef KNE_ENERGY_H
#define KNE_ENERGY_H

#include "kne_ref.h"

typedef struct kne_energy_of
{
    const kne_tokens *prompt; /* (n_prompts), each with the object */
    int32_t           n_prompts;
    float            *score;  /* (L, f), overwritten */
    int32_t          *top;    /* instead, where asked for: (n) layer * f + neuron of the most energy first */
    float            *attribution; /* NULL or (L, f) of the device, added to: what kne_attribute gives with one point for the
                                    * log-probability of the first prompt's object of one token, of which it is the same pass */
} kne_energy_of;

typedef struct kne_energy_top
{
    int32_t layer_min, layer_max, n;
} kne_energy_top;

/*
 * C is taken from at most KNE_ENERGY_ROWS activations of the facts in ref, evenly spread, and inverted through them
 * (Woodbury), so it costs rows^2 f and not f^3. Without facts C = I. kept (may be NULL): what depends on facts and ridge alone, on the
 * device, from call to call. want NULL: scores; else what is on top.
 */
#define KNE_ENERGY_ROWS 256

kne_status kne_energy(const kne_model *m, kne_backend *be, const kne_view *view, struct kne_energy_known **kept,
                      const kne_ref *const *ref, int32_t n_ref, double ridge, const kne_energy_of *of, int32_t n,
                      const kne_energy_top *want, const kne_job_calls *calls, kne_err *err);

#endif
