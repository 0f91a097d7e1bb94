/*
 * kne_edit_impl.h - the state of a batch of edits while it runs; shared by
 * kne_edit.c (the job), kne_edit_plan.c (tokens, facts, ensembles),
 * kne_edit_rows.c (what moves) and kne_edit_step.c (the optimiser).
 */
#ifndef KNE_EDIT_IMPL_H
#define KNE_EDIT_IMPL_H

#include "kne_device.h"
#include "kne_edit.h"
#include "kne_pack.h"
#include "kne_ref.h"

#define N_MATRICES 3 /* enum kne_matrix */

typedef enum edit_state
{
    EDIT_ACTIVE,  /* steps go on */
    EDIT_REACHED, /* its prompts give the object in the last pass that ran them */
    EDIT_ENDED    /* outcome is set: holds, failed or cancelled; it has no delta */
} edit_state;

/* The neurons of one edit, ascending by (layer, neuron), and what moves of them. */
typedef struct edit
{
    const kne_edit_spec *spec;
    kne_edit_outcome    *out;
    edit_state           state;
    kne_tokens          *prompt;   /* (spec->n_prompts) */
    int32_t              n_anchors;
    int32_t             *anchor;   /* (n_anchors) indices into job.known_at of tokens */
    int32_t              n;        /* neurons */
    int32_t             *index;    /* (n) layer * f + neuron, ascending */
    float               *score;    /* (n) in the order of index */
    float               *token_score; /* (n, tokens of the object) */
    int32_t             *from;     /* (L + 1) where each layer's neurons begin in index */
    int32_t             *place;    /* (n) row in the union overlay */
    int32_t             *mine;     /* (n) row in the anchors' gradient */
    int32_t              row;      /* its rows among those of the batch: [row, row + n) */
    const float         *delta[N_MATRICES]; /* (n, d) at the end, of the host; NULL: does not move */
    uint8_t              rest, pause; /* arrived: rounds left to sit out, and how many it sat out last */
    bool                 cleared;  /* it has ended, and its delta is zero again */
    double               w_norm;   /* Frobenius norm of the ensemble's base rows that move */
    int32_t              row0, row1, out0; /* its rows and first out row in the current pass */
    int32_t              n_rows, n_outs;   /* of its prompts */
    double               loss, last_loss; /* of the last pass, of the one before the last step */
    double               pace;     /* factor of a protected step's length */
} edit;

/* The union of all neurons that the view or the batch edits, per layer, as the overlay of the passes. eff to base are of the device. */
typedef struct shared_rows
{
    int32_t *from;               /* (L + 1) */
    int32_t *neuron, *dev_neuron; /* (n) ascending within a layer */
    float   *host;               /* (n, d) scratch */
    float   *base[N_MATRICES];   /* (n, d) the file's rows */
    float   *before[N_MATRICES]; /* (n, d) base + the view's deltas */
    float   *eff[N_MATRICES];    /* (n, d) what the graph takes: difference for down, effective for keys */
    int32_t  n, max_layer;
    kne_overlay_layer *layer;    /* (L) */
    kne_overlay        overlay;
} shared_rows;

/*
 * What moves: N rows, those of the batch's edits one after another. All of it is on the device, where it stays; a step brings
 * over no more than the movers.
 */
typedef struct moving_rows
{
    int32_t           n;         /* N */
    float            *delta[N_MATRICES], *grad[N_MATRICES], *mean[N_MATRICES], *var[N_MATRICES]; /* (N, d) or NULL */
    double           *norm;      /* (matrices that move, N) */
    int32_t          *owner, *mine; /* (N) index of its edit; its row in the anchors' gradient */
    int32_t          *from, *place; /* (rows of the union + 1), (N) which deltas each row of the union takes */
    double           *metric;    /* of each block, as be->solve wants it; n_metric numbers */
    int64_t           n_metric;
    kne_metric_block *block;     /* (n_block) an edit's neurons in a layer, layer by layer, edits in order */
    float            *activation; /* (known rows, widest) of known facts in one layer */
    kne_mover        *mover;     /* (n_edits) */
    kne_grad_row     *grad_row;  /* (N) of the current pass, layer by layer */
    /* of the host */
    int32_t           n_block, max_block, *block_from, *grad_from; /* (L + 1) */
    kne_metric_block *host_block;
    kne_mover        *host_mover;
    kne_grad_row     *host_grad_row;
    int32_t          *host_int;  /* (N + rows of the union + 1) scratch */
    float            *host_delta[N_MATRICES]; /* (N, d) where the host has no other */
    float            *host_activation;
    double           *column;    /* (max_block, KNE_METRIC_COLUMNS); NULL: the device wants none */
} moving_rows;

/*
 * The anchors of all edits of the batch, each once: every edit is held back by what any of them must not disturb.
 * Their gradient is taken once, for all neurons that move.
 */
typedef struct anchor_set
{
    int32_t  n, n_rows, n_outs;
    int32_t *known;            /* (n) indices in batch.known, the nearest of every edit first */
    float  **logp;             /* (n) -> (tokens of its object, V), the reference; of the device, one after another */
    double   outs_an_edit;     /* positions that an edit brought along, on average: what a mean over anchors means */
    int32_t  n_neurons, widest; /* in all layers, in one */
    int32_t *from, *neuron;    /* (L + 1), (n_neurons) ascending within a layer */
    int32_t *dev_neuron;       /* again, on the device */
    float   *grad[N_MATRICES]; /* (n_neurons, d) of the device: of the sum of their divergences */
    int32_t *turn, n_turn;     /* (n) those in the current pass, whose rows and out rows come first */
    int32_t  rows;
    uint8_t *rest, *pause;     /* (n) rounds left to sit out, and how many it sat out last */
    double   loss;             /* sum of the divergences in this round */
} anchor_set;

typedef struct batch
{
    const kne_edit_job *job;
    kne_options         opt;     /* layer_max resolved */
    kne_edit_result    *result;
    kne_arena           text, run, dev; /* tokens; the optimiser's state; what of it is on the device */
    kne_arena           plan;      /* ensembles: the result keeps it */
    kne_ref_cache      *cache;     /* where the job brings none */
    edit               *edit;
    int32_t             n_known; /* known facts that have tokens */
    kne_tokens         *known;   /* (n_known) */
    int32_t            *known_at; /* (n_known) index in job->known; (inverse: known_of) */
    int32_t            *known_of; /* (job->n_known) index in known, -1: no tokens */
    kne_ref           **ref;     /* (n_known) on the base */
    const kne_ref     **protect; /* (n_protect) those behind the metric */
    int32_t             n_protect;
    bool                is_protected, locate_only; /* locate: what holds already is attributed too */
    uint8_t            *held;    /* (n_known) edits' facts and anchors that held before */
    shared_rows         rows;
    moving_rows         moving;
    anchor_set          anchors;
    bool                moves[N_MATRICES];
    kne_pack            pack;
    kne_work           *work;
    float              *logp, *coef, *kl; /* (max_out) */
    int32_t            *best;
    float              *gathered; /* (max rows of a pass, largest layer share of an ensemble) of the device */
    edit              **turn;    /* (n_edits) the edits of the current pass */
    int32_t             n_turn;
    bool                more;    /* edits follow the current pass that may want the anchors' gradient */
    uint64_t            pass_key, last_key; /* of the sequences packed now, and of the pass before; 0: none */
    int32_t             lowest;  /* layer in which anything moves */
} batch;

kne_status kne_batch_plan(batch *b, kne_err *err);      /* tokens, before, references, ensembles */
kne_status kne_batch_optimise(batch *b, kne_err *err);

/* Rows that move (kne_edit_rows.c): where they lie, with mark (L, f) as scratch; their contents; overlay from deltas; deltas to the host. */
void       kne_rows_layout(batch *b, int32_t *mark);
void       kne_rows_fill(batch *b, int32_t *mark);
void       kne_rows_compose(batch *b);
kne_status kne_rows_fetch(batch *b, kne_err *err);

/* yield between passes; KNE_ERR_CANCELLED when the job must stop. Marks single edits that were cancelled. */
kne_status kne_batch_pause(batch *b, kne_err *err);
void       kne_edit_end(edit *e, int outcome, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

#endif
