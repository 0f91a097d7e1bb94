/*
 * kne_arch.c - the table of model families and the reading of config.json
 * (see kne_arch.h). A new family is a new row; a new key that changes what is
 * computed is either a column or a row of `fixed`.
 *
 * Defaults for absent keys are those of the families' reference
 * implementation in transformers (configuration_<family>.py).
 */
#include "kne_arch.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kne_safetensors.h"

#define BIT(slot) (1u << (slot))

typedef enum window_rule
{
    WINDOW_NONE,     /* the family knows none */
    WINDOW_IF_GIVEN, /* sliding_window, all layers; default_window where the key is absent */
    WINDOW_SWITCHED  /* use_sliding_window, sliding_window, max_window_layers, layer_types */
} window_rule;

typedef struct family
{
    const char *model_type;
    /* keys of config.json */
    const char *k_layers, *k_d, *k_heads, *k_kv_heads, *k_head_dim, *k_ffn, *k_ctx, *k_eps, *k_act;
    const char *k_theta, *k_partial;
    double      partial;      /* rotary_dim / head_dim where the config says nothing */
    bool        rotates_part; /* knows a partial other than 1 */
    int32_t     rotary_dim;   /* GPT-J: key rotary_dim, this where absent; other families 0 */
    int32_t     head_dim;     /* where k_head_dim is absent; 0: d / heads */
    bool        ffn_4d;       /* an absent or null k_ffn means 4 d */
    bool        tied;         /* where tie_word_embeddings is absent */
    bool        attention_bias, mlp_bias; /* where the key of that name is absent */
    window_rule window;
    int32_t     default_window;

    kne_norm_kind     norm;
    kne_block_kind    block;
    bool              block_by_config; /* use_parallel_residual false: sequential */
    kne_position_kind position;
    kne_qkv_layout    qkv;
    bool              gated, conv1d, qk_norm;

    /* tensors */
    uint32_t           if_attention_bias, if_mlp_bias; /* slots there only if the config says so */
    const char        *prefix;
    const char        *name[KNE_SLOT_COUNT];
    const char *const *ignored;
} family;

static const char *const no_buffers[] = {".rotary_emb.inv_freq", NULL};
static const char *const gpt_buffers[] = {".attn.bias", ".attn.masked_bias",
                                          ".attn.embed_positions", NULL};
static const char *const neox_buffers[] = {".attention.bias", ".attention.masked_bias",
                                           ".attention.rotary_emb.inv_freq", NULL};

/* What Llama and those after it share. */
#define LLAMA_KEYS                                                                               \
    .k_layers = "num_hidden_layers", .k_d = "hidden_size", .k_heads = "num_attention_heads",     \
    .k_kv_heads = "num_key_value_heads", .k_head_dim = "head_dim", .k_ffn = "intermediate_size", \
    .k_ctx = "max_position_embeddings", .k_eps = "rms_norm_eps", .k_act = "hidden_act",          \
    .k_theta = "rope_theta", .k_partial = "partial_rotary_factor", .partial = 1.0,               \
    .norm = KNE_RMSNORM, .block = KNE_BLOCK_SEQUENTIAL, .position = KNE_POS_ROPE_HALF,           \
    .gated = true, .prefix = "model.", .ignored = no_buffers
#define LLAMA_FRAME                                                   \
    [KNE_SLOT_EMBED] = "embed_tokens.weight",                         \
    [KNE_SLOT_FINAL_NORM_W] = "norm.weight",                          \
    [KNE_SLOT_HEAD] = "lm_head.weight",                               \
    [KNE_SLOT_NORM1_W] = "layers.%d.input_layernorm.weight",          \
    [KNE_SLOT_NORM2_W] = "layers.%d.post_attention_layernorm.weight", \
    [KNE_SLOT_O] = "layers.%d.self_attn.o_proj.weight",               \
    [KNE_SLOT_DOWN] = "layers.%d.mlp.down_proj.weight"
#define LLAMA_QKV                                       \
    [KNE_SLOT_Q] = "layers.%d.self_attn.q_proj.weight", \
    [KNE_SLOT_K] = "layers.%d.self_attn.k_proj.weight", \
    [KNE_SLOT_V] = "layers.%d.self_attn.v_proj.weight"
#define LLAMA_QKV_B                                     \
    [KNE_SLOT_Q_B] = "layers.%d.self_attn.q_proj.bias", \
    [KNE_SLOT_K_B] = "layers.%d.self_attn.k_proj.bias", \
    [KNE_SLOT_V_B] = "layers.%d.self_attn.v_proj.bias"
#define LLAMA_O_B [KNE_SLOT_O_B] = "layers.%d.self_attn.o_proj.bias"
#define LLAMA_GATE_UP                                   \
    [KNE_SLOT_GATE] = "layers.%d.mlp.gate_proj.weight", \
    [KNE_SLOT_UP] = "layers.%d.mlp.up_proj.weight"
#define QKVO_BIASES (BIT(KNE_SLOT_Q_B) | BIT(KNE_SLOT_K_B) | BIT(KNE_SLOT_V_B) | BIT(KNE_SLOT_O_B))

#define GPT_KEYS                                                                           \
    .k_layers = "n_layer", .k_d = "n_embd", .k_heads = "n_head", .k_ffn = "n_inner",       \
    .k_ctx = "n_positions", .k_eps = "layer_norm_epsilon", .k_act = "activation_function", \
    .ffn_4d = true, .norm = KNE_LAYERNORM, .prefix = "transformer.", .ignored = gpt_buffers

static const family families[] = {
    {
        .model_type = "llama", LLAMA_KEYS,
        .if_attention_bias = QKVO_BIASES,
        .if_mlp_bias = BIT(KNE_SLOT_GATE_B) | BIT(KNE_SLOT_UP_B) | BIT(KNE_SLOT_DOWN_B),
        .name = {LLAMA_FRAME, LLAMA_QKV, LLAMA_QKV_B, LLAMA_O_B, LLAMA_GATE_UP,
                 [KNE_SLOT_GATE_B] = "layers.%d.mlp.gate_proj.bias",
                 [KNE_SLOT_UP_B] = "layers.%d.mlp.up_proj.bias",
                 [KNE_SLOT_DOWN_B] = "layers.%d.mlp.down_proj.bias"},
    },
    {
        .model_type = "mistral", LLAMA_KEYS,
        .window = WINDOW_IF_GIVEN, .default_window = 4096,
        .name = {LLAMA_FRAME, LLAMA_QKV, LLAMA_GATE_UP},
    },
    {
        .model_type = "qwen2", LLAMA_KEYS,
        .window = WINDOW_SWITCHED, .default_window = 4096,
        .name = {LLAMA_FRAME, LLAMA_QKV, LLAMA_QKV_B, LLAMA_GATE_UP},
    },
    {
        .model_type = "qwen3", LLAMA_KEYS,
        .window = WINDOW_SWITCHED, .default_window = 4096,
        .head_dim = 128, .qk_norm = true,
        .if_attention_bias = QKVO_BIASES,
        .name = {LLAMA_FRAME, LLAMA_QKV, LLAMA_QKV_B, LLAMA_O_B, LLAMA_GATE_UP,
                 [KNE_SLOT_Q_NORM] = "layers.%d.self_attn.q_norm.weight",
                 [KNE_SLOT_K_NORM] = "layers.%d.self_attn.k_norm.weight"},
    },
    {
        .model_type = "phi3", LLAMA_KEYS,
        .window = WINDOW_IF_GIVEN, .rotates_part = true, .qkv = KNE_QKV_THIRDS,
        .name = {LLAMA_FRAME,
                 [KNE_SLOT_QKV] = "layers.%d.self_attn.qkv_proj.weight",
                 [KNE_SLOT_GATE_UP] = "layers.%d.mlp.gate_up_proj.weight"},
    },
    {
        .model_type = "gpt2", GPT_KEYS,
        .tied = true, .block = KNE_BLOCK_SEQUENTIAL, .position = KNE_POS_LEARNED,
        .qkv = KNE_QKV_THIRDS, .conv1d = true,
        .name = {[KNE_SLOT_EMBED] = "wte.weight",
                 [KNE_SLOT_POS] = "wpe.weight",
                 [KNE_SLOT_FINAL_NORM_W] = "ln_f.weight",
                 [KNE_SLOT_FINAL_NORM_B] = "ln_f.bias",
                 [KNE_SLOT_HEAD] = "lm_head.weight",
                 [KNE_SLOT_NORM1_W] = "h.%d.ln_1.weight",
                 [KNE_SLOT_NORM1_B] = "h.%d.ln_1.bias",
                 [KNE_SLOT_NORM2_W] = "h.%d.ln_2.weight",
                 [KNE_SLOT_NORM2_B] = "h.%d.ln_2.bias",
                 [KNE_SLOT_QKV] = "h.%d.attn.c_attn.weight",
                 [KNE_SLOT_QKV_B] = "h.%d.attn.c_attn.bias",
                 [KNE_SLOT_O] = "h.%d.attn.c_proj.weight",
                 [KNE_SLOT_O_B] = "h.%d.attn.c_proj.bias",
                 [KNE_SLOT_UP] = "h.%d.mlp.c_fc.weight",
                 [KNE_SLOT_UP_B] = "h.%d.mlp.c_fc.bias",
                 [KNE_SLOT_DOWN] = "h.%d.mlp.c_proj.weight",
                 [KNE_SLOT_DOWN_B] = "h.%d.mlp.c_proj.bias"},
    },
    {
        .model_type = "gptj", GPT_KEYS,
        .rotary_dim = 64,
        .block = KNE_BLOCK_PARALLEL_ONE_NORM, .position = KNE_POS_ROPE_INTERLEAVED,
        .name = {[KNE_SLOT_EMBED] = "wte.weight",
                 [KNE_SLOT_FINAL_NORM_W] = "ln_f.weight",
                 [KNE_SLOT_FINAL_NORM_B] = "ln_f.bias",
                 [KNE_SLOT_HEAD] = "lm_head.weight",
                 [KNE_SLOT_HEAD_B] = "lm_head.bias",
                 [KNE_SLOT_NORM1_W] = "h.%d.ln_1.weight",
                 [KNE_SLOT_NORM1_B] = "h.%d.ln_1.bias",
                 [KNE_SLOT_Q] = "h.%d.attn.q_proj.weight",
                 [KNE_SLOT_K] = "h.%d.attn.k_proj.weight",
                 [KNE_SLOT_V] = "h.%d.attn.v_proj.weight",
                 [KNE_SLOT_O] = "h.%d.attn.out_proj.weight",
                 [KNE_SLOT_UP] = "h.%d.mlp.fc_in.weight",
                 [KNE_SLOT_UP_B] = "h.%d.mlp.fc_in.bias",
                 [KNE_SLOT_DOWN] = "h.%d.mlp.fc_out.weight",
                 [KNE_SLOT_DOWN_B] = "h.%d.mlp.fc_out.bias"},
    },
    {
        .model_type = "gpt_neox",
        .k_layers = "num_hidden_layers", .k_d = "hidden_size", .k_heads = "num_attention_heads",
        .k_ffn = "intermediate_size", .k_ctx = "max_position_embeddings",
        .k_eps = "layer_norm_eps", .k_act = "hidden_act",
        .k_theta = "rotary_emb_base", .k_partial = "rotary_pct", .partial = 0.25,
        .rotates_part = true,
        .attention_bias = true,
        .norm = KNE_LAYERNORM,
        .block = KNE_BLOCK_PARALLEL_TWO_NORMS, .block_by_config = true,
        .position = KNE_POS_ROPE_HALF, .qkv = KNE_QKV_PER_HEAD,
        .if_attention_bias = BIT(KNE_SLOT_QKV_B) | BIT(KNE_SLOT_O_B),
        .prefix = "gpt_neox.", .ignored = neox_buffers,
        .name = {[KNE_SLOT_EMBED] = "embed_in.weight",
                 [KNE_SLOT_FINAL_NORM_W] = "final_layer_norm.weight",
                 [KNE_SLOT_FINAL_NORM_B] = "final_layer_norm.bias",
                 [KNE_SLOT_HEAD] = "embed_out.weight",
                 [KNE_SLOT_NORM1_W] = "layers.%d.input_layernorm.weight",
                 [KNE_SLOT_NORM1_B] = "layers.%d.input_layernorm.bias",
                 [KNE_SLOT_NORM2_W] = "layers.%d.post_attention_layernorm.weight",
                 [KNE_SLOT_NORM2_B] = "layers.%d.post_attention_layernorm.bias",
                 [KNE_SLOT_QKV] = "layers.%d.attention.query_key_value.weight",
                 [KNE_SLOT_QKV_B] = "layers.%d.attention.query_key_value.bias",
                 [KNE_SLOT_O] = "layers.%d.attention.dense.weight",
                 [KNE_SLOT_O_B] = "layers.%d.attention.dense.bias",
                 [KNE_SLOT_UP] = "layers.%d.mlp.dense_h_to_4h.weight",
                 [KNE_SLOT_UP_B] = "layers.%d.mlp.dense_h_to_4h.bias",
                 [KNE_SLOT_DOWN] = "layers.%d.mlp.dense_4h_to_h.weight",
                 [KNE_SLOT_DOWN_B] = "layers.%d.mlp.dense_4h_to_h.bias"},
    },
};
#define N_FAMILIES (sizeof families / sizeof *families)

const char *
kne_arch_families(void)
{
    return "llama, mistral, qwen2, qwen3, phi3, gpt2, gptj, gpt_neox";
}

/* Switches of some family's reference code that this engine knows in one position only. */
static const struct
{
    const char *key;
    bool        value;
} fixed[] = {
    {"scale_attn_weights", true},
    {"scale_attn_by_inverse_layer_idx", false},
    {"add_cross_attention", false},
    {"is_encoder_decoder", false},
};

/* Keys that must be absent or null: each changes what is computed. */
static const struct
{
    const char *key, *what;
} refused[] = {
    {"quantization_config", "quantised weights"},
    {"compression_config", "compressed weights"},
    {"attn_logit_softcapping", "soft-capped attention"},
    {"final_logit_softcapping", "soft-capped logits"},
};

static const struct
{
    const char  *name;
    kne_act_kind kind;
} activations[] = {
    {"silu", KNE_ACT_SILU},           {"swish", KNE_ACT_SILU},
    {"gelu", KNE_ACT_GELU_ERF},       {"gelu_python", KNE_ACT_GELU_ERF},
    {"gelu_new", KNE_ACT_GELU_TANH},  {"gelu_pytorch_tanh", KNE_ACT_GELU_TANH},
    {"gelu_fast", KNE_ACT_GELU_TANH},
};

/* ---- reading keys; the first error stays, and later reads give defaults ---- */

typedef struct reader
{
    kne_err   *err;
    kne_status st;
    char       where[40]; /* "config.json" or "config.json: rope_parameters" */
} reader;

__attribute__((format(printf, 3, 4))) static void
fail(reader *r, kne_status code, const char *fmt, ...)
{
    char    msg[400];
    va_list ap;

    if (r->st != KNE_OK)
        return;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    r->st = kne_error(r->err, code, "%s: %s", r->where, msg);
}

/* The value of a key; NULL where absent (a null too, if null_is_absent). Twice is an error. */
static const cJSON *
get(reader *r, const cJSON *obj, const char *key, bool null_is_absent)
{
    const cJSON *c, *found = NULL;

    if (!key || r->st != KNE_OK)
        return NULL;
    cJSON_ArrayForEach(c, obj)
        if (!strcmp(c->string, key))
        {
            if (found)
                fail(r, KNE_ERR_FORMAT, "key %s occurs twice", key);
            found = c;
        }
    return found && null_is_absent && cJSON_IsNull(found) ? NULL : found;
}

#define REQUIRED INT64_MIN

static int32_t
get_int(reader *r, const cJSON *obj, const char *key, int64_t min, int64_t max, int64_t absent)
{
    const cJSON *c = get(r, obj, key, true);
    double       v;

    if (r->st != KNE_OK)
        return (int32_t) min;
    if (!c)
    {
        if (absent == REQUIRED)
            fail(r, KNE_ERR_FORMAT, "%s is missing", key);
        return absent == REQUIRED ? (int32_t) min : (int32_t) absent;
    }
    v = cJSON_IsNumber(c) ? c->valuedouble : NAN;
    if (!(v >= (double) min && v <= (double) max) || v != floor(v))
    {
        if (cJSON_IsNumber(c))
            fail(r, KNE_ERR_FORMAT, "%s is %g, must be a whole number from %lld to %lld", key, v,
                 (long long) min, (long long) max);
        else
            fail(r, KNE_ERR_FORMAT, "%s is not a number", key);
        return (int32_t) min;
    }
    return (int32_t) v;
}

static double
get_real(reader *r, const cJSON *obj, const char *key, double min, double max, double absent)
{
    const cJSON *c = get(r, obj, key, true);
    double       v;

    if (r->st != KNE_OK)
        return 1;
    if (!c)
    {
        if (isnan(absent))
            fail(r, KNE_ERR_FORMAT, "%s is missing", key);
        return absent;
    }
    v = cJSON_IsNumber(c) ? c->valuedouble : NAN;
    if (!(v >= min && v <= max))
    {
        if (cJSON_IsNumber(c))
            fail(r, KNE_ERR_FORMAT, "%s is %g, must be from %g to %g", key, v, min, max);
        else
            fail(r, KNE_ERR_FORMAT, "%s is not a number", key);
        return 1;
    }
    return v;
}

static bool
get_bool(reader *r, const cJSON *obj, const char *key, bool absent)
{
    const cJSON *c = get(r, obj, key, true);

    if (!c)
        return absent;
    if (!cJSON_IsBool(c))
        fail(r, KNE_ERR_FORMAT, "%s is neither true nor false", key);
    return cJSON_IsTrue(c);
}

static const char *
get_text(reader *r, const cJSON *obj, const char *key, const char *absent)
{
    const cJSON *c = get(r, obj, key, true);

    if (!c)
        return absent;
    if (!cJSON_IsString(c))
    {
        fail(r, KNE_ERR_FORMAT, "%s is not a string", key);
        return absent;
    }
    return c->valuestring;
}

/* ---- the parts of a config ---- */

/* A token id, or the first of a list; -1 for none and for ids the model cannot produce. */
static int32_t
token_id(reader *r, const cJSON *obj, const char *key, int32_t vocab)
{
    const cJSON *c = get(r, obj, key, true);

    if (cJSON_IsArray(c))
        c = c->child;
    if (!c)
        return -1;
    if (!cJSON_IsNumber(c))
    {
        fail(r, KNE_ERR_FORMAT, "%s is not a token id", key);
        return -1;
    }
    return c->valuedouble >= 0 && c->valuedouble < vocab ? (int32_t) c->valuedouble : -1;
}

/*
 * RoPE. Older files: rope_theta and rope_scaling {type | rope_type, ...} beside
 * the other keys; newer ones: all in rope_parameters. rope_scaling wins where
 * both are there, as in the reference.
 */
static void
read_rope(reader *r, const cJSON *root, const family *f, int32_t max_ctx, kne_arch *a)
{
    static const struct
    {
        const char      *name;
        kne_rope_scaling kind;
    } types[] = {
        {"default", KNE_ROPE_NONE}, {"linear", KNE_ROPE_LINEAR}, {"llama3", KNE_ROPE_LLAMA3}};
    const char  *where = "rope_scaling";
    const cJSON *rope = get(r, root, where, true);
    double       partial;
    const char  *type;
    int32_t      orig;
    size_t       k;
    reader       sub;

    if (!rope || (cJSON_IsObject(rope) && !rope->child))
        rope = get(r, root, where = "rope_parameters", true);
    if (rope && !cJSON_IsObject(rope))
        fail(r, KNE_ERR_FORMAT, "%s is not an object", where);
    if (r->st != KNE_OK)
        return;

    sub = (reader) {.err = r->err, .st = KNE_OK};
    snprintf(sub.where, sizeof sub.where, "config.json: %s", where);
    if (get(&sub, rope, "full_attention", false) || get(&sub, rope, "sliding_attention", false))
        fail(&sub, KNE_ERR_UNSUPPORTED, "parameters that differ between layers are not supported");
    type = get_text(&sub, rope, "rope_type", NULL);
    if (!type)
        type = get_text(&sub, rope, "type", "default");
    for (k = 0; k < sizeof types / sizeof *types && strcmp(types[k].name, type); k++)
        ;
    if (k == sizeof types / sizeof *types && sub.st == KNE_OK)
    {
        fail(&sub, KNE_ERR_UNSUPPORTED, "RoPE type \"%s\" is not supported", kne_quote(type).s);
        kne_error_hint(r->err, "Supported: default, linear, llama3.");
    }
    if (sub.st != KNE_OK)
        goto out;
    a->rope_scaling = types[k].kind;
    if (a->rope_scaling != KNE_ROPE_NONE && !f->k_theta)
    {
        fail(&sub, KNE_ERR_UNSUPPORTED, "RoPE scaling is not known for %s", f->model_type);
        goto out;
    }

    a->rope_theta = 10000.0;
    if (f->k_theta)
        a->rope_theta = get_real(&sub, rope, "rope_theta", 1, 1e12,
                                 get_real(r, root, f->k_theta, 1, 1e12, a->rope_theta));
    partial = get_real(r, root, f->k_partial, 1e-3, 1, f->partial);
    partial = get_real(&sub, rope, "partial_rotary_factor", 1e-3, 1, partial);
    if (f->rotary_dim)
        a->rotary_dim = get_int(r, root, "rotary_dim", 2, a->head_dim, f->rotary_dim);
    else
        a->rotary_dim = (int32_t) (a->head_dim * partial);
    if (a->rotary_dim < 2 || a->rotary_dim % 2 || a->rotary_dim > a->head_dim)
        fail(r, KNE_ERR_FORMAT,
             "rotary dimension %d: must be even and from 2 to the head dimension %d",
             a->rotary_dim, a->head_dim);
    if (partial != 1.0 && !f->rotates_part && !f->rotary_dim)
        fail(r, KNE_ERR_UNSUPPORTED, "partial_rotary_factor %g is not known for %s", partial,
             f->model_type);

    a->rope_factor = 1;
    if (a->rope_scaling != KNE_ROPE_NONE)
        a->rope_factor = get_real(&sub, rope, "factor", 1e-3, 1e6, NAN);
    if (a->rope_scaling == KNE_ROPE_LLAMA3)
    {
        a->rope_low_freq = get_real(&sub, rope, "low_freq_factor", 1e-3, 1e6, NAN);
        a->rope_high_freq = get_real(&sub, rope, "high_freq_factor", 1e-3, 1e6, NAN);
        if (sub.st == KNE_OK && !(a->rope_high_freq > a->rope_low_freq))
            fail(&sub, KNE_ERR_FORMAT, "high_freq_factor %g is not above low_freq_factor %g",
                 a->rope_high_freq, a->rope_low_freq);
        orig = get_int(&sub, rope, "original_max_position_embeddings", 1, 1 << 30, max_ctx);
        a->rope_orig_ctx = get_int(r, root, "original_max_position_embeddings", 1, 1 << 30, orig);
    }
out:
    if (r->st == KNE_OK)
        r->st = sub.st;
}

/*
 * Attention that reaches back only so far: a sequence within the window is
 * computed the same with and without it, so the window bounds the sequence.
 */
static int32_t
read_window(reader *r, const cJSON *root, const family *f, const kne_arch *a)
{
    const cJSON *types = get(r, root, "layer_types", true), *c;
    bool         sliding = false;
    int32_t      window = INT32_MAX, first;

    if (types && !cJSON_IsArray(types))
        fail(r, KNE_ERR_FORMAT, "layer_types is not a list");
    cJSON_ArrayForEach(c, types)
    {
        if (cJSON_IsString(c) && !strcmp(c->valuestring, "sliding_attention"))
            sliding = true;
        else if (!cJSON_IsString(c) || strcmp(c->valuestring, "full_attention"))
            fail(r, KNE_ERR_UNSUPPORTED, "layer type \"%s\" is not supported",
                 kne_quote(cJSON_IsString(c) ? c->valuestring : "?").s);
    }
    if (f->window == WINDOW_IF_GIVEN)
    {
        c = get(r, root, "sliding_window", false);
        if (c ? !cJSON_IsNull(c) : f->default_window > 0)
            window = get_int(r, root, "sliding_window", 1, INT32_MAX, f->default_window);
    }
    else if (f->window == WINDOW_SWITCHED && get_bool(r, root, "use_sliding_window", false))
    {
        first = get_int(r, root, "max_window_layers", 0, INT32_MAX, 28);
        c = get(r, root, "sliding_window", false);
        if ((types ? sliding : first < a->n_layers) && !(c && cJSON_IsNull(c)))
            window = get_int(r, root, "sliding_window", 1, INT32_MAX, f->default_window);
    }
    if (sliding && window == INT32_MAX)
        fail(r, KNE_ERR_FORMAT, "layer_types has sliding_attention, but no window is switched on");
    return window;
}

static void
read_config(reader *r, const cJSON *root, kne_arch *a, kne_tensor_list *list)
{
    const char   *type = get_text(r, root, "model_type", NULL), *act;
    const family *f = NULL;
    int32_t       max_ctx, window;
    bool          attention_bias, mlp_bias;
    size_t        k;

    if (r->st != KNE_OK)
        return;
    if (!type)
    {
        fail(r, KNE_ERR_FORMAT, "model_type is missing");
        return;
    }
    for (k = 0; k < N_FAMILIES && !f; k++)
        if (!strcmp(families[k].model_type, type))
            f = &families[k];
    if (!f)
    {
        fail(r, KNE_ERR_UNSUPPORTED, "architecture \"%s\" is not supported", kne_quote(type).s);
        kne_error_hint(r->err, "Supported model types: %s.", kne_arch_families());
        return;
    }
    for (k = 0; k < sizeof refused / sizeof *refused; k++)
        if (get(r, root, refused[k].key, true))
        {
            fail(r, KNE_ERR_UNSUPPORTED, "%s: %s are not supported", refused[k].key,
                 refused[k].what);
            kne_error_hint(r->err, "Weights must be plain float32, float16 or bfloat16.");
        }
    for (k = 0; k < sizeof fixed / sizeof *fixed; k++)
        if (get_bool(r, root, fixed[k].key, fixed[k].value) != fixed[k].value)
            fail(r, KNE_ERR_UNSUPPORTED, "%s %s is not supported", fixed[k].key,
                 fixed[k].value ? "false" : "true");

    snprintf(a->family, sizeof a->family, "%s", f->model_type);
    a->norm = f->norm;
    a->block = f->block;
    if (f->block_by_config && !get_bool(r, root, "use_parallel_residual", true))
        a->block = KNE_BLOCK_SEQUENTIAL;
    a->position = f->position;
    a->gated = f->gated;
    a->conv1d = f->conv1d;
    a->qkv = f->qkv;
    a->qk_norm = f->qk_norm;

    a->n_layers = get_int(r, root, f->k_layers, 1, 1024, REQUIRED);
    a->d_model = get_int(r, root, f->k_d, 1, 1 << 16, REQUIRED);
    a->n_heads = get_int(r, root, f->k_heads, 1, 1024, REQUIRED);
    a->vocab_size = get_int(r, root, "vocab_size", 1, 1 << 22, REQUIRED);
    a->n_kv_heads = get_int(r, root, f->k_kv_heads, 1, 1024, a->n_heads);
    a->head_dim = get_int(r, root, f->k_head_dim, 1, 1 << 12, f->head_dim);
    a->d_ff =
        get_int(r, root, f->k_ffn, 1, 1 << 20, f->ffn_4d ? 4 * (int64_t) a->d_model : REQUIRED);
    max_ctx = get_int(r, root, f->k_ctx, 1, 1 << 30, REQUIRED);
    a->norm_eps = (float) get_real(r, root, f->k_eps, 1e-12, 0.1, NAN);
    a->tied_head = get_bool(r, root, "tie_word_embeddings", f->tied);
    if (r->st != KNE_OK)
        return;
    if (!a->head_dim)
    {
        if (a->d_model % a->n_heads)
            fail(r, KNE_ERR_FORMAT, "%s %d is not divisible by %s %d", f->k_d, a->d_model,
                 f->k_heads, a->n_heads);
        a->head_dim = a->d_model / a->n_heads;
    }
    if (a->n_heads % a->n_kv_heads)
        fail(r, KNE_ERR_FORMAT, "%s %d is not divisible by %s %d", f->k_heads, a->n_heads,
             f->k_kv_heads, a->n_kv_heads);
    if (a->head_dim < 1 || (int64_t) a->n_heads * a->head_dim > 1 << 20)
        fail(r, KNE_ERR_FORMAT, "%d heads of dimension %d: out of range", a->n_heads, a->head_dim);

    act = get_text(r, root, f->k_act, NULL);
    if (!act)
        fail(r, KNE_ERR_FORMAT, "%s is missing", f->k_act);
    for (k = 0; act && k < sizeof activations / sizeof *activations; k++)
        if (!strcmp(act, activations[k].name))
            break;
    if (r->st == KNE_OK && k == sizeof activations / sizeof *activations)
    {
        fail(r, KNE_ERR_UNSUPPORTED, "%s \"%s\" is not supported", f->k_act, kne_quote(act).s);
        kne_error_hint(r->err, "Supported: silu, gelu, gelu_new, gelu_pytorch_tanh.");
    }
    if (r->st != KNE_OK)
        return;
    a->act = activations[k].kind;

    if (a->position != KNE_POS_LEARNED)
        read_rope(r, root, f, max_ctx, a);
    window = read_window(r, root, f, a);
    a->n_ctx = max_ctx < window ? max_ctx : window;
    if (a->position != KNE_POS_LEARNED && a->n_ctx > KNE_ROPE_MAX_CTX)
        a->n_ctx = KNE_ROPE_MAX_CTX;
    a->bos_id = token_id(r, root, "bos_token_id", a->vocab_size);
    a->eos_id = token_id(r, root, "eos_token_id", a->vocab_size);

    attention_bias = get_bool(r, root, "attention_bias", f->attention_bias);
    mlp_bias = get_bool(r, root, "mlp_bias", f->mlp_bias);
    list->prefix = f->prefix;
    list->ignored = f->ignored;
    list->pos_rows = max_ctx;
    for (k = 0; k < KNE_SLOT_COUNT; k++)
        if ((attention_bias || !(f->if_attention_bias & BIT(k))) &&
            (mlp_bias || !(f->if_mlp_bias & BIT(k))))
            list->name[k] = f->name[k];
}

kne_status
kne_arch_parse(const char *json, size_t len, kne_arch *arch, kne_tensor_list *list, kne_err *err)
{
    reader r = {.err = err, .st = KNE_OK, .where = "config.json"};
    cJSON *root;

    *arch = (kne_arch) {0};
    *list = (kne_tensor_list) {0};
    KNE_TRY(kne_json_object(json, len, r.where, &root, err));
    read_config(&r, root, arch, list);
    cJSON_Delete(root);
    return r.st;
}

/* ---- shapes ---- */

void
kne_arch_shape(const kne_arch *a, const kne_tensor_list *list, kne_slot slot, int64_t *rows,
               int64_t *cols, int32_t *rank)
{
    const int64_t d = a->d_model, f = a->d_ff, v = a->vocab_size, hd = a->head_dim;
    const int64_t dq = a->n_heads * hd, dkv = a->n_kv_heads * hd;
    /* {rows, cols} as [out, in]; cols 0: a vector */
    const int64_t shape[KNE_SLOT_COUNT][2] = {
        [KNE_SLOT_EMBED] = {v, d},
        [KNE_SLOT_POS] = {list->pos_rows, d},
        [KNE_SLOT_FINAL_NORM_W] = {d, 0},
        [KNE_SLOT_FINAL_NORM_B] = {d, 0},
        [KNE_SLOT_HEAD] = {v, d},
        [KNE_SLOT_HEAD_B] = {v, 0},
        [KNE_SLOT_NORM1_W] = {d, 0},
        [KNE_SLOT_NORM1_B] = {d, 0},
        [KNE_SLOT_NORM2_W] = {d, 0},
        [KNE_SLOT_NORM2_B] = {d, 0},
        [KNE_SLOT_Q] = {dq, d},
        [KNE_SLOT_K] = {dkv, d},
        [KNE_SLOT_V] = {dkv, d},
        [KNE_SLOT_QKV] = {dq + 2 * dkv, d},
        [KNE_SLOT_O] = {d, dq},
        [KNE_SLOT_Q_B] = {dq, 0},
        [KNE_SLOT_K_B] = {dkv, 0},
        [KNE_SLOT_V_B] = {dkv, 0},
        [KNE_SLOT_QKV_B] = {dq + 2 * dkv, 0},
        [KNE_SLOT_O_B] = {d, 0},
        [KNE_SLOT_Q_NORM] = {hd, 0},
        [KNE_SLOT_K_NORM] = {hd, 0},
        [KNE_SLOT_GATE] = {f, d},
        [KNE_SLOT_UP] = {f, d},
        [KNE_SLOT_GATE_UP] = {2 * f, d},
        [KNE_SLOT_DOWN] = {d, f},
        [KNE_SLOT_GATE_B] = {f, 0},
        [KNE_SLOT_UP_B] = {f, 0},
        [KNE_SLOT_DOWN_B] = {d, 0},
    };
    bool swap = a->conv1d && slot >= KNE_SLOT_FIRST_OF_LAYER && shape[slot][1];

    *rank = shape[slot][1] ? 2 : 1;
    *rows = shape[slot][swap];
    *cols = shape[slot][1] ? shape[slot][!swap] : 1;
}

/* ---- RoPE ---- */

/*
 * Inverse frequency of pair i, in float as the reference computes it; the
 * angle, its cosine and sine then in double, so that long contexts lose nothing more.
 */
static float
inverse_frequency(const kne_arch *a, int32_t i)
{
    float inv =
        1.0f / (float) pow(a->rope_theta, (double) ((float) (2 * i) / (float) a->rotary_dim));
    double wavelen, smooth;

    if (a->rope_scaling == KNE_ROPE_LINEAR)
        return inv / (float) a->rope_factor;
    if (a->rope_scaling != KNE_ROPE_LLAMA3)
        return inv;
    wavelen = 2 * M_PI / (double) inv;
    if (wavelen > a->rope_orig_ctx / a->rope_low_freq)
        return inv / (float) a->rope_factor;
    if (wavelen < a->rope_orig_ctx / a->rope_high_freq)
        return inv;
    smooth =
        (a->rope_orig_ctx / wavelen - a->rope_low_freq) / (a->rope_high_freq - a->rope_low_freq);
    return (float) ((1 - smooth) * inv / a->rope_factor + smooth * inv);
}

void
kne_arch_rope(const kne_arch *a, float *cos_table, float *sin_table)
{
    int32_t half = a->rotary_dim / 2;

    for (int32_t i = 0; i < half; i++)
    {
        double inv = inverse_frequency(a, i);

        for (int32_t pos = 0; pos < a->n_ctx; pos++)
        {
            cos_table[(int64_t) pos * half + i] = (float) cos(pos * inv);
            sin_table[(int64_t) pos * half + i] = (float) sin(pos * inv);
        }
    }
}
