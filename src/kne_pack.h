/*
 * kne_pack.h - packs token sequences into a batch, one after another.
 *
 * A fact of n tokens of which the first n_prompt are its prompt becomes a sequence of
 * n - 1 rows; rows n_prompt - 1 .. n - 2 predict the object and are its out rows. Facts whose prompts begin alike may
 * share the rows of what they have in common, out rows excepted: the rows of a group carry the gradients of all its
 * facts, so a group is what one delta (or one sum of gradients) takes.
 */
#ifndef KNE_PACK_H
#define KNE_PACK_H

#include "kne_graph.h"

typedef struct kne_pack
{
    kne_batch b;          /* points into the arrays below */
    int32_t  *id, *pos;   /* (max_n) */
    kne_seq  *seq;        /* (max_seq) */
    int32_t  *out_row;    /* (max_out) */
    int32_t  *target;     /* (max_out) the token that the row should predict */
    int32_t  *lead;       /* (max_seq) rows before the first out row */
    int32_t  *row, *from, *place, *first; /* kne_batch's; (max_place), (max_n + 1), (max_place), (max_n) */
    int32_t   max_n, max_seq, max_out, max_place;
    int32_t   group;      /* first sequence whose rows the next may share */
    int32_t   n_place;
} kne_pack;

/* Take the arrays from the arena (twice, as every layout). */
void kne_pack_layout(kne_pack *p, kne_arena *arena, int32_t max_n, int32_t max_seq, int32_t max_out);
/* Likewise; facts of a group share rows while there are max_place places. */
void kne_pack_layout_shared(kne_pack *p, kne_arena *arena, int32_t max_n, int32_t max_seq, int32_t max_out,
                            int32_t max_place);
void kne_pack_clear(kne_pack *p);
/* What is added from here on shares nothing with what is there. */
void kne_pack_group(kne_pack *p);
/* Before the batch is run: the places of each row, where any is shared. */
void kne_pack_share(kne_pack *p);
/* Is there room for so much more, nothing shared; for another fact. */
bool kne_pack_room(const kne_pack *p, int32_t rows, int32_t seqs, int32_t outs);
bool kne_pack_fits(const kne_pack *p, int32_t n, int32_t n_prompt);
/* Add a fact that fits. Returns the index of its first out row. */
int32_t kne_pack_add(kne_pack *p, const int32_t *id, int32_t n, int32_t n_prompt);

#endif
