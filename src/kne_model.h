/*
 * kne_model.h - a model folder: config.json, *.safetensors, tokenizer.json.
 *
 * The descriptor (kne_arch) says how families differ; the graph (kne_graph.h)
 * reads only the descriptor and the bound matrices, so a new family is a new
 * row of the table in kne_arch.c. Weights stay where the file maps them:
 * read-only, in the file's own format, never copied whole.
 */
#ifndef KNE_MODEL_H
#define KNE_MODEL_H

#include "kne_base.h"
#include "kne_tokenizer.h"

typedef enum kne_norm_kind { KNE_RMSNORM, KNE_LAYERNORM } kne_norm_kind;
typedef enum kne_block_kind
{
    KNE_BLOCK_SEQUENTIAL,        /* x += attn(norm1 x); x += ffn(norm2 x) */
    KNE_BLOCK_PARALLEL_ONE_NORM, /* x += attn(norm1 x) + ffn(norm1 x): GPT-J */
    KNE_BLOCK_PARALLEL_TWO_NORMS /* x += attn(norm1 x) + ffn(norm2 x): GPT-NeoX */
} kne_block_kind;
typedef enum kne_position_kind
{
    KNE_POS_LEARNED,
    KNE_POS_ROPE_HALF,       /* pairs (i, i + rotary_dim/2): Llama, Mistral, Qwen, NeoX */
    KNE_POS_ROPE_INTERLEAVED /* pairs (2i, 2i + 1): GPT-J */
} kne_position_kind;
typedef enum kne_act_kind { KNE_ACT_SILU, KNE_ACT_GELU_ERF, KNE_ACT_GELU_TANH } kne_act_kind;
typedef enum kne_rope_scaling { KNE_ROPE_NONE, KNE_ROPE_LINEAR, KNE_ROPE_LLAMA3 } kne_rope_scaling;
typedef enum kne_qkv_layout
{
    KNE_QKV_SEPARATE,
    KNE_QKV_THIRDS,   /* fused [q | k | v]: GPT-2; Phi-3 with kv heads of their own count */
    KNE_QKV_PER_HEAD  /* fused [head][q | k | v]: GPT-NeoX */
} kne_qkv_layout;

typedef struct kne_arch
{
    char    family[32];       /* config.json's model_type */
    int32_t n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size;
    int32_t n_ctx;            /* longest sequence */
    kne_norm_kind norm;
    float         norm_eps;
    kne_block_kind    block;
    kne_position_kind position;
    int32_t       rotary_dim; /* <= head_dim; the rest passes through */
    double        rope_theta;
    kne_rope_scaling rope_scaling;
    double        rope_factor, rope_low_freq, rope_high_freq;
    int32_t       rope_orig_ctx;
    kne_act_kind  act;
    bool          gated;      /* a = act(gate h) * (up h), else a = act(up h + b) */
    bool          conv1d;     /* weights stored [in, out]: GPT-2 */
    kne_qkv_layout qkv;
    bool          qk_norm;    /* RMSNorm over head_dim before RoPE: Qwen3 */
    bool          tied_head;
    int32_t       bos_id, eos_id; /* -1: none; eos_id is the first where config.json gives several */
} kne_arch;

/*
 * A weight matrix in its file's format, row-major [rows, cols] as stored.
 * transposed false: y = x W^T, W is [out, in]. true (Conv1D): y = x W, [in, out].
 * Fused matrices are bound as views: data points into the fused tensor.
 */
typedef struct kne_mat
{
    const void *data;  /* may be unaligned; NULL: absent */
    kne_dtype   type;
    bool        transposed;
    int64_t     rows, cols;
    int64_t     ld;    /* elements between rows, >= cols */
} kne_mat;

/* Vectors are small: converted to float once, at load, in the model's arena. NULL: absent. */
typedef struct kne_layer
{
    const float *norm1_w, *norm1_b, *norm2_w, *norm2_b; /* (d) */
    kne_mat      q, k, v, o;                            /* KNE_QKV_PER_HEAD: q and q_b hold all three, k and v absent */
    const float *q_b, *k_b, *v_b, *o_b;
    const float *q_norm, *k_norm;                       /* (head_dim) */
    kne_mat      gate, up, down;                        /* f x d, f x d, d x f (as maths; see transposed) */
    const float *gate_b, *up_b, *down_b;
} kne_layer;

typedef struct kne_model
{
    kne_arch       arch;
    kne_mat        embed;            /* (vocab, d) */
    kne_mat        pos_embed;        /* (n_ctx, d), learned positions only */
    kne_mat        head;             /* (vocab, d); the embedding again where tied */
    const float   *head_b;
    const float   *final_norm_w, *final_norm_b;
    kne_layer     *layer;            /* (L) */
    kne_dtype      dtype;            /* format of the FFN matrices: effective rows are rounded to it */
    kne_tokenizer *tokenizer;
    const float   *rope_cos, *rope_sin; /* (n_ctx, rotary_dim / 2); NULL without RoPE */
    char           fingerprint[65];  /* hex SHA-256, see kne_model_open */
    int64_t        weight_bytes;     /* mapped */
    kne_arena      arena;
    struct kne_tensors *tensors;     /* the maps (kne_safetensors.h) */
    struct kne_backend *device;      /* whose memory all of the above points into (kne_device.h); NULL: the host's */
    void          *device_block;
} kne_model;

/*
 * Open a folder and check everything that a forward pass will rely on: the
 * shapes in config.json against every tensor, the tokenizer's vocabulary
 * against the embedding. Errors: KNE_ERR_IO, _FORMAT, _UNSUPPORTED, _NOMEM with
 * the file or tensor named. fingerprint: SHA-256 of config.json, tokenizer.json
 * and, for each tensor in order of name, its name, type, shape and content
 * (content over 1 MiB: the first and last 64 KiB and 4 KiB of every MiB between),
 * so equal folders at different paths have equal fingerprints.
 */
kne_status kne_model_open(const char *path, kne_model **out, kne_err *err);
void       kne_model_close(kne_model *m);

/* "float32", ... and mixed formats as the FFN's. */
static inline const char *
kne_model_dtype_name(const kne_model *m)
{
    return kne_dtype_name(m->dtype);
}

#endif
