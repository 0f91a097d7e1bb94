/*
 * kne_protocol.h - the messages between PostgreSQL (client) and the engine.
 *
 * Every request gets exactly one final answer with its id: KNE_MSG_OK (body by
 * request type), KNE_MSG_ERROR, KNE_MSG_NEED_SET or KNE_MSG_NEED_DELTAS; EDIT
 * and LOCATE may be preceded by KNE_MSG_PROGRESS frames. Notation: str and bytes as in
 * kne_wire.h, digest = 32 raw bytes, n * (...) = u32 count and so many items.
 *
 * Every request that touches a model begins with a *view*:
 *     str path, str fingerprint (64 hex digits), digest set
 * The engine opens the path the first time the fingerprint is asked for, and refuses
 * (KNE_ERR_FORMAT) a folder whose fingerprint differs. The set digest names the edits that the reader sees:
 * SHA-256 over (i64 edit_id, digest) of each pair in ascending edit_id; 32 zero bytes: no edits.
 * An engine that does not hold the set answers NEED_SET; the client sends SET_PUT; the answer to that is OK or
 * NEED_DELTAS; the client sends DELTA_PUT for each and SET_PUT again, then its request again.
 *
 * The digest of a pair is SHA-256 over its rows, ascending by (layer, neuron, matrix):
 *     i32 layer, i32 neuron, u8 matrix, u32 length, length * f32
 */
#ifndef KNE_PROTOCOL_H
#define KNE_PROTOCOL_H

#define KNE_PROTOCOL_VERSION 1
#define KNE_ENGINE_VERSION "0.2.0"
#define KNE_SECRET_LEN 32

enum kne_msg
{
    /* First on every connection. bytes secret, u32 protocol version
     * -> u32 protocol version, str engine version */
    KNE_MSG_HELLO = 1,

    /* str path -> str family, i32 n_layers, d_model, d_ff, vocab_size, n_ctx, str dtype, str fingerprint,
     * i64 weight bytes, u8 gated (the FFN has a gate matrix) */
    KNE_MSG_MODEL_INSPECT = 2,

    /* view, n * (i64 edit_id, digest) ascending -> empty, or NEED_DELTAS. The set digest is recomputed and must match. */
    KNE_MSG_SET_PUT = 3,

    /* digest, n * (i32 layer, i32 neuron, u8 matrix, n * f32) -> empty. Recomputed, must match; rows ascending. */
    KNE_MSG_DELTA_PUT = 4,

    /* -> u64 pid, str device ("cpu: AVX-512, 2 threads"), str device note (why not the GPU; may be empty),
     *    i64 private bytes, i64 mapped bytes, f64 seconds up, u32 requests waiting,
     *    n * (str path, str fingerprint, i64 weight bytes, u32 views cached),
     *    str current work ("idle", "edit: optimise step 12 of 50"), u64 reads served, u64 edits served */
    KNE_MSG_STATUS = 5,

    /* ---- reads; each begins with a view ---- */
    KNE_MSG_COMPLETE = 10,    /* str prompt, i32 max_tokens -> str text */
    KNE_MSG_LOGPROB = 11,     /* n * (str prompt, str continuation) -> n * f64 natural log */
    KNE_MSG_NEXT_TOKENS = 12, /* str prompt, i32 k -> n * (i32 id, str token, f64 probability), likeliest first */
    KNE_MSG_KNOWS = 13,       /* n * (str prompt, str object) -> n * u8 */
    KNE_MSG_TOKENIZE = 14,    /* str text -> n * i32 */
    KNE_MSG_DETOKENIZE = 15,  /* n * i32 -> str text */

    /* n * (str prompt, str answer) -> n * (f64 natural log of the answer's probability,
     *     n * (i32 token, i32 likeliest token there given those before) of the answer) */
    KNE_MSG_SCORE = 16,
    /* i32 max_tokens, i32 top_k (1: greedy; to 64, sampled, not ended by the end-of-text token), i64 seed, n * str prompt
     * -> n * str text */
    KNE_MSG_GENERATE = 17,
    /* n * str text -> n * (f64 natural log of its probability given its first token, i32 tokens after the first); what is
     * over the context is cut off, a text without a second token counts nothing */
    KNE_MSG_TEXTS = 18,

    /* ---- edits ----
     * view (of which the superseded edits are left out by the client),
     * str options (JSON object, see kne_options.h),
     * known facts: n * (str prompt, str object, i64 edit_id or 0),
     * edits: n * (i64 edit_id,
     *             n * str prompt        the first is the one edited on; others train too
     *             str object,
     *             n * i32               indices of known facts: its anchors, nearest first)
     * -> EDIT:   str provenance (JSON: options resolved, seed, reference and protection facts' digest, device, version),
     *            f64 seconds of attribution, f64 seconds of optimisation,
     *            n * (i64 edit_id, u8 outcome, str message, i32 steps,
     *                 f64 probability before, f64 probability after (of the whole object), f64 norm of all deltas,
     *                 str answer before (greedy, up to 8 tokens, cut at the first full stop or line end),
     *                 n * (i32 layer, i32 neuron, f32 score, n * f32 score of each object token)   the ensemble
     *                 digest (zeros without rows), n * (i32 layer, i32 neuron, u8 matrix, n * f32)) the delta rows, ascending
     *            n * i32: indices of known facts that held before this batch and no longer do
     * -> LOCATE: n * (i32 layer, i32 neuron, f32 score, n * f32): the ensemble of its only edit, highest score first
     * A bad option or prompt of one edit fails that edit (outcome), what is wrong with the whole message is an ERROR.
     */
    KNE_MSG_EDIT = 20,
    KNE_MSG_LOCATE = 21,
    /* u32 id of the EDIT request on the same connection, i64 edit_id (0: all) -> empty; between two steps the
     * edit stops: outcome KNE_OUTCOME_CANCELLED. A client that hangs up cancels all it asked for. */
    KNE_MSG_CANCEL = 22,

    /* view, str path (absolute; its parent is there, itself it is not, or is an empty folder), u8 enum kne_export_format,
     * str card (README.md) -> str fingerprint of the folder written (empty: an adapter), i64 weight rows that differ from
     * the base, n * (str file, i64 bytes, digest), n * str file of the model's folder left out.
     * Nothing is at path before all of it is. */
    KNE_MSG_EXPORT = 30,

    /* ---- answers ---- */
    KNE_MSG_OK = 100,
    KNE_MSG_ERROR = 101,       /* u32 kne_status, str message, str detail, str hint */
    KNE_MSG_NEED_SET = 102,    /* empty */
    KNE_MSG_NEED_DELTAS = 103, /* n * digest */
    KNE_MSG_PROGRESS = 104     /* u32 phase, u32 done, u32 total, f32 loss, u32 edits finished */
};

enum kne_outcome
{
    KNE_OUTCOME_APPLIED = 0,
    KNE_OUTCOME_HOLDS = 1,     /* the model answers so already: no rows */
    KNE_OUTCOME_FAILED = 2,    /* the message says why */
    KNE_OUTCOME_CANCELLED = 3
};

enum kne_export_format
{
    KNE_EXPORT_HUGGINGFACE = 0, /* the model's folder, edited */
    KNE_EXPORT_PEFT = 1         /* what the edits add to it, as a LoRA adapter */
};

enum kne_phase
{
    KNE_PHASE_LOAD = 0,
    KNE_PHASE_ATTRIBUTE = 1,
    KNE_PHASE_OPTIMISE = 2,
    KNE_PHASE_CHECK = 3
};

/* How the engine's process ends; anything else, or a signal, is a crash. */
enum kne_exit
{
    KNE_EXIT_OK = 0,       /* SIGTERM */
    KNE_EXIT_FAILED = 1,   /* could not start or go on: the log says why */
    KNE_EXIT_USAGE = 2,    /* options, socket or secret: starting it again changes nothing */
    KNE_EXIT_DEVICE = 3,   /* the device asked for is not there: nor does this */
    KNE_EXIT_FILE_LOST = 4, /* a model file was truncated while mapped */
    KNE_EXIT_DEVICE_LOST = 5 /* the device failed for good in this process: the next start begins afresh */
};

/* kne.weight_delta.matrix as text: the FFN's W_gate, W_up (GPT-2's c_fc) rows and W_down (c_proj) columns. */
enum kne_matrix
{
    KNE_MATRIX_DOWN = 0,
    KNE_MATRIX_GATE = 1,
    KNE_MATRIX_UP = 2
};

#endif
