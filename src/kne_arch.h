/*
 * kne_arch.h - config.json read into a kne_arch and the list of tensors that
 * such a model has: everything in which model families differ, as data.
 *
 * Invariant: what config.json says is read or refused, never assumed. A value
 * that is absent is taken only where the family's reference implementation
 * has one agreed default; a feature that this engine would not compute as the
 * reference does is an error that names it.
 */
#ifndef KNE_ARCH_H
#define KNE_ARCH_H

#include "kne_model.h"

/* Longest sequence with RoPE, whatever the model allows: bounds the tables of angles. */
#define KNE_ROPE_MAX_CTX 32768

/* The places where a model can have a tensor. */
typedef enum kne_slot
{
    KNE_SLOT_EMBED,
    KNE_SLOT_POS,
    KNE_SLOT_FINAL_NORM_W,
    KNE_SLOT_FINAL_NORM_B,
    KNE_SLOT_HEAD,
    KNE_SLOT_HEAD_B,
    /* from here on: one a layer, "%d" in the name */
    KNE_SLOT_NORM1_W,
    KNE_SLOT_NORM1_B,
    KNE_SLOT_NORM2_W,
    KNE_SLOT_NORM2_B,
    KNE_SLOT_Q,
    KNE_SLOT_K,
    KNE_SLOT_V,
    KNE_SLOT_QKV, /* fused */
    KNE_SLOT_O,
    KNE_SLOT_Q_B,
    KNE_SLOT_K_B,
    KNE_SLOT_V_B,
    KNE_SLOT_QKV_B,
    KNE_SLOT_O_B,
    KNE_SLOT_Q_NORM,
    KNE_SLOT_K_NORM,
    KNE_SLOT_GATE,
    KNE_SLOT_UP,
    KNE_SLOT_GATE_UP, /* fused */
    KNE_SLOT_DOWN,
    KNE_SLOT_GATE_B,
    KNE_SLOT_UP_B,
    KNE_SLOT_DOWN_B,
    KNE_SLOT_COUNT
} kne_slot;
#define KNE_SLOT_FIRST_OF_LAYER KNE_SLOT_NORM1_W

/* Which tensors the model must have: no more, no fewer. */
typedef struct kne_tensor_list
{
    const char        *prefix;   /* of all names but the head's; files of the bare model lack it */
    const char        *name[KNE_SLOT_COUNT]; /* NULL: this model has none */
    const char *const *ignored;  /* NULL-terminated: ends of names that may be there, unused */
    int32_t            pos_rows; /* learned positions in the file */
} kne_tensor_list;

/* KNE_ERR_FORMAT, _UNSUPPORTED or _NOMEM, naming the key of config.json. */
kne_status kne_arch_parse(const char *json, size_t len, kne_arch *arch, kne_tensor_list *list,
                          kne_err *err);

/* Rank (1 or 2), rows and columns (1 for a vector) of a slot's tensor as stored. */
void kne_arch_shape(const kne_arch *arch, const kne_tensor_list *list, kne_slot slot, int64_t *rows,
                    int64_t *cols, int32_t *rank);

/* Fill (n_ctx, rotary_dim / 2) tables: cos and sin of position x scaled inverse frequency. */
void kne_arch_rope(const kne_arch *arch, float *cos_table, float *sin_table);

/* "llama, mistral, ...": the families there are. */
const char *kne_arch_families(void);

#endif
