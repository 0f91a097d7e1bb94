/*
 * gpu_bench.c - the engine on a GPU, in the shapes of real models with random bfloat16 weights made in memory: passes of 32
 * tokens, whole edits alone and in batches, with the defaults and with each of them off, beside what the device reaches
 * in the same run. Prints Markdown, and beside each figure the floor: the weights' bytes at the measured bandwidth, or the
 * operations at the measured rate, whichever takes longer. Links nothing but libc and libm (see kernels/kernels.mk).
 *
 * gpu_bench [DEVICE [SHAPE]]   DEVICE: cuda; SHAPE: part of a name below, all of them without
 * With KNE_FIGURES in the environment, also writes `SHAPE<TAB>WHAT<TAB>NUMBER` to the file it names: milliseconds of step, edit, six
 * and batch; and of the edit that gpu_peer_torch.py does, "plain", its milliseconds, its steps, P before and loss of the last step.
 */
#include "kne_attrib.h"
#include "kne_device.h"
#include "plain_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TOKENS 32
#define STEPS  25
#define BATCH  32
#define KNOWN  96

#define LLAMA(L, d, H, Hkv, hd, f, V, theta, bound)                                                             \
    {.n_layers = L, .d_model = d, .n_heads = H, .n_kv_heads = Hkv, .head_dim = hd, .d_ff = f, .vocab_size = V,  \
     .n_ctx = 512, .norm = KNE_RMSNORM, .norm_eps = 1e-5f, .block = KNE_BLOCK_SEQUENTIAL,                       \
     .position = KNE_POS_ROPE_HALF, .rotary_dim = hd, .rope_theta = theta, .act = KNE_ACT_SILU, .gated = true,  \
     .qkv = KNE_QKV_SEPARATE, .tied_head = bound, .bos_id = -1, .eos_id = -1}

#define GPT2(L, d, H, f, V)                                                                                     \
    {.n_layers = L, .d_model = d, .n_heads = H, .n_kv_heads = H, .head_dim = d / H, .d_ff = f, .vocab_size = V, \
     .n_ctx = 512, .norm = KNE_LAYERNORM, .norm_eps = 1e-5f, .block = KNE_BLOCK_SEQUENTIAL,                     \
     .position = KNE_POS_LEARNED, .act = KNE_ACT_GELU_TANH, .conv1d = true, .qkv = KNE_QKV_THIRDS,              \
     .tied_head = true, .bos_id = -1, .eos_id = -1}

static const struct { const char *name; kne_arch a; } shapes[] = {
    {"Llama-2-7B", LLAMA(32, 4096, 32, 32, 128, 11008, 32000, 1e4, false)},
    {"Llama-3-8B", LLAMA(32, 4096, 32, 8, 128, 14336, 128256, 5e5, false)},
    {"GPT-2 XL", GPT2(48, 1600, 25, 6400, 50257)},
    {"smoke", LLAMA(3, 64, 4, 2, 16, 160, 64, 1e4, true)}, /* to see that this program works; only by name */
    {"smoke, GPT-2", GPT2(3, 64, 4, 640, 80)},
};

static kne_backend *be;
static FILE        *figures; /* may be NULL */
static const char  *shape_name;

static void
figure(const char *what, double number)
{
    if (figures)
        fprintf(figures, "%s\t%s\t%.6g\n", shape_name, what, number);
}

static void
need(kne_status st, const kne_err *err)
{
    if (st == KNE_OK)
        return;
    fprintf(stderr, "gpu_bench: %s. %s\n", err->msg, err->detail);
    exit(1);
}

/* False, said in the table: the device has no room for it. Other failures end the program. */
static bool
fits(kne_status st, const kne_err *err, const char *what)
{
    if (st == KNE_ERR_NOMEM)
        printf("| %s | does not fit | | %s |\n", what, err->detail);
    else
        need(st, err);
    return st == KNE_OK;
}

static int
by_value(const void *a, const void *b)
{
    return (*(const double *) a > *(const double *) b) - (*(const double *) a < *(const double *) b);
}

/* ---- a model of one random buffer: every matrix points into it ---- */

static char *random_bytes; /* of small bfloat16 numbers */

static kne_mat
matrix(const kne_arch *a, int64_t out, int64_t in, size_t *at)
{
    const bool turned = a->conv1d && out != a->vocab_size && out != a->n_ctx;

    *at = (*at + 32) % 4096; /* not the same address twice in a row: an embedding would be taken for the head's */
    return (kne_mat) {.data = random_bytes + *at, .type = KNE_BF16, .transposed = turned, .rows = turned ? in : out,
                      .cols = turned ? out : in, .ld = turned ? out : in};
}

static kne_model *
model_new(const kne_arch *a)
{
    kne_model    *m = calloc(1, sizeof *m);
    const int64_t d = a->d_model, f = a->d_ff, k = (int64_t) a->n_heads * a->head_dim,
                  kv = (int64_t) a->n_kv_heads * a->head_dim, half = a->rotary_dim / 2;
    const int64_t widest = f > a->vocab_size ? f : a->vocab_size;
    const size_t  most = (size_t) (widest * d) * 2 + 8192;
    float        *ones = malloc((size_t) widest * sizeof *ones), *zeros = calloc((size_t) widest, sizeof *zeros);
    float        *co = malloc((size_t) (a->n_ctx * half + 1) * sizeof *co), *si = malloc((size_t) (a->n_ctx * half + 1) * sizeof *si);
    uint64_t      seed = 1;
    size_t        at = 0;
    bool          ln = a->norm == KNE_LAYERNORM;

    random_bytes = malloc(most);
    for (size_t i = 0; i < most / 2; i += 4) /* +- 0.01 to 0.03 */
    {
        uint64_t r = kne_random_next(&seed);

        for (size_t j = i; j < i + 4 && j < most / 2; j++, r >>= 16)
            ((uint16_t *) random_bytes)[j] = (uint16_t) ((r & 0x807f) | 0x3c00);
    }
    for (int64_t i = 0; i < widest; i++)
        ones[i] = 1;
    for (int64_t p = 0; p < a->n_ctx; p++)
        for (int64_t i = 0; i < half; i++)
        {
            co[p * half + i] = (float) cos((double) p * pow(a->rope_theta, -2.0 * (double) i / a->rotary_dim));
            si[p * half + i] = (float) sin((double) p * pow(a->rope_theta, -2.0 * (double) i / a->rotary_dim));
        }
    m->arch = *a;
    m->dtype = KNE_BF16;
    m->tokenizer = (kne_tokenizer *) m; /* plain_tokenizer.h never looks into it */
    m->embed = matrix(a, a->vocab_size, d, &at);
    m->head = a->tied_head ? m->embed : matrix(a, a->vocab_size, d, &at);
    if (a->position == KNE_POS_LEARNED)
        m->pos_embed = matrix(a, a->n_ctx, d, &at);
    else
    {
        m->rope_cos = co;
        m->rope_sin = si;
    }
    m->final_norm_w = ones;
    m->final_norm_b = ln ? zeros : NULL;
    m->layer = calloc((size_t) a->n_layers, sizeof *m->layer);
    for (int32_t l = 0; l < a->n_layers; l++)
    {
        kne_layer *t = &m->layer[l];

        t->norm1_w = t->norm2_w = ones;
        t->norm1_b = t->norm2_b = ln ? zeros : NULL;
        t->q = matrix(a, k, d, &at);
        t->k = matrix(a, kv, d, &at);
        t->v = matrix(a, kv, d, &at);
        t->o = matrix(a, d, k, &at);
        if (a->gated)
            t->gate = matrix(a, f, d, &at);
        t->up = matrix(a, f, d, &at);
        t->down = matrix(a, d, f, &at);
        if (ln)
        {
            t->q_b = t->k_b = t->v_b = t->o_b = t->down_b = zeros;
            t->up_b = zeros;
        }
    }
    return m; /* the program's for good, as all it points to */
}

/* ---- what the device reaches ---- */

static double bandwidth = 1, arithmetic = 1; /* bytes a second, operations a second */

static void
ceilings(void)
{
    const int64_t n = be->host ? 1 << 20 : 1 << 28, r = be->host ? 256 : 8192;
    float        *x = be->alloc(be->ctx, (size_t) n * 4), *y = be->alloc(be->ctx, (size_t) n * 4), one;
    kne_mat       w = {.data = x, .type = KNE_BF16, .rows = r, .cols = r, .ld = r};
    uint16_t     *some = malloc((size_t) (r * r) * 2);
    uint64_t      seed = 3;
    kne_err       err;

    for (int64_t i = 0; i < r * r; i++)
        some[i] = (uint16_t) ((kne_random_next(&seed) & 0x807f) | 0x3c00);
    if (!x || !y)
        need(kne_error(&err, KNE_ERR_NOMEM, "no room for two buffers of %lld MB", (long long) n >> 18), &err);
    for (int rep = 0; rep < 6; rep++)
    {
        double t0 = kne_now(), t;

        for (int i = 0; i < 4; i++)
            be->add(be->ctx, y, x, n);
        be->get(be->ctx, &one, y, sizeof one);
        t = 4 * 3 * 4.0 * (double) n / (kne_now() - t0);
        bandwidth = t > bandwidth ? t : bandwidth;
    }
    be->put(be->ctx, x, some, (size_t) (r * r) * 2);
    for (int rep = 0; rep < 6; rep++)
    {
        double t0 = kne_now(), t;

        for (int i = 0; i < 4; i++)
            be->linear(be->ctx, y, r, (float *) (void *) ((char *) y + n * 2), r, &w, NULL, r, 0);
        be->get(be->ctx, &one, y, sizeof one);
        t = 4 * 2.0 * (double) r * (double) r * (double) r / (kne_now() - t0);
        arithmetic = t > arithmetic ? t : arithmetic;
    }
    free(some);
    be->release(be->ctx, x);
    be->release(be->ctx, y);
    need(be->status(be->ctx, &err), &err);
    printf("Ceilings of this run: %.0f GB/s (y += x over 3 GB), %.1f TFLOP/s (a bfloat16 product of %lld cubed, its cast included).\n\n",
           bandwidth * 1e-9, arithmetic * 1e-12, (long long) r);
}

/* ---- passes ---- */

/* Operations of one direction over n rows with n_out logits; attention itself is little at this length. */
static double
pass_flop(const kne_model *m, double n, double n_out)
{
    const double head = (double) m->arch.vocab_size * m->arch.d_model;
    const double weights = (double) kne_model_device_bytes(m) / 2 - head * (m->arch.tied_head ? 1 : 2);

    return 2 * (n * weights + n_out * head);
}

/* Least seconds of one direction. */
static double
pass_floor(const kne_model *m, double n, double n_out)
{
    return fmax((double) kne_model_device_bytes(m) / bandwidth, pass_flop(m, n, n_out) / arithmetic);
}

static void
passes(const kne_model *m, int n_seq)
{
    const kne_arch *a = &m->arch;
    const int32_t   n = n_seq * TOKENS;
    int32_t        *id = malloc((size_t) n * 4), *pos = malloc((size_t) n * 4), *out = malloc((size_t) n_seq * 4), *target = malloc((size_t) n_seq * 4);
    float          *coef = malloc((size_t) n_seq * 4), *logp = malloc((size_t) n_seq * 4);
    kne_seq        *seq = malloc((size_t) n_seq * sizeof *seq);
    kne_work       *w = NULL;
    kne_err         err;
    double          t[15], flop, bytes = (double) kne_model_device_bytes(m);
    uint64_t        seed = 5;

    for (int32_t i = 0; i < n; i++)
    {
        id[i] = (int32_t) (kne_random_next(&seed) % (uint64_t) a->vocab_size);
        pos[i] = i % TOKENS;
    }
    for (int32_t i = 0; i < n_seq; i++)
    {
        seq[i] = (kne_seq) {i * TOKENS, TOKENS, i * TOKENS, TOKENS};
        out[i] = i * TOKENS + TOKENS - 1;
        target[i] = i;
        coef[i] = 1;
    }
    kne_batch b = {.n = n, .n_seq = n_seq, .n_out = n_seq, .id = id, .pos = pos, .seq = seq, .out_row = out};

    const bool room = fits(kne_work_new(m, (kne_work_shape) {n, n_seq, 0, true}, &w, &err), &err, "forward + backward");

    for (int i = 0; i < 15 && room; i++)
    {
        t[i] = kne_now();
        need(kne_forward(m, be, w, &b, NULL, NULL, 0, &err), &err);
        kne_work_logprob(be, w, 0, n_seq, a->vocab_size, target, coef, NULL, NULL);
        need(kne_backward(m, be, w, &b, NULL, NULL, 0, NULL, NULL, &err), &err);
        be->get(be->ctx, logp, w->logp, (size_t) n_seq * 4);
        need(be->status(be->ctx, &err), &err);
        t[i] = kne_now() - t[i];
    }
    if (room)
        qsort(t + 3, 12, sizeof *t, by_value);
    flop = 2 * pass_flop(m, n, n_seq);
    if (room)
        printf("| forward + backward, %d x %d tokens | %.2f ms | %.2f ms | %.0f %% of bandwidth, %.0f %% of arithmetic |\n", n_seq, TOKENS,
           t[9] * 1e3, fmax(2 * bytes / bandwidth, flop / arithmetic) * 1e3, 200 * bytes / t[9] / bandwidth,
           100 * flop / t[9] / arithmetic);
    kne_work_free(w);
    free(id);
    free(pos);
    free(out);
    free(target);
    free(coef);
    free(logp);
    free(seq);
}

/* ---- edits; set: options, "name=value ..." ---- */

#define PLAIN "select=attribution contrast=0 protect=0"

static void
set_options(kne_options *o, const char *set)
{
    char    name[32], value[32], *end;
    int     used;
    kne_err err;

    for (; set && sscanf(set, " %31[^=]=%31s%n", name, value, &used) == 2; set += used)
    {
        const double number = strtod(value, &end);

        need(kne_option_set(o, name, *end ? KNE_JSON_STRING : KNE_JSON_NUMBER, number, value, &err), &err);
    }
}

static char prompt[BATCH + KNOWN][TOKENS];

/* The loss of the last step. */
static void
keep_loss(void *ctx, int phase, int done, int total, float loss, int reached)
{
    if (phase == KNE_PHASE_OPTIMISE && loss != 0)
        *(double *) ctx = loss;
}

static void
edits(const kne_model *m, const kne_view *view, const char *what, int n, const char *set)
{
    kne_known             known[KNOWN];
    kne_edit_spec         spec[BATCH];
    kne_text              text[BATCH];
    int32_t               anchors[BATCH][8];
    struct kne_ref_cache *cache = NULL;
    kne_edit_result      *r = NULL;
    kne_edit_job          job = {.model = m, .backend = be, .view = view, .n_known = KNOWN, .known = known, .n_edits = n, .edit = spec};
    kne_err               err;
    double                t = 0, attribute = 0, optimise = 0, loss = 0;
    int                   steps = 0;

    for (int i = 0; i < BATCH + KNOWN; i++)
    {
        uint64_t seed = 100 + (uint64_t) i;

        for (int c = 0; c < TOKENS - 2; c++) /* with the token before and the object's: TOKENS */
            prompt[i][c] = (char) ('a' + kne_random_next(&seed) % 16);
    }
    for (int i = 0; i < KNOWN; i++)
        known[i] = (kne_known) {{prompt[BATCH + i], TOKENS - 2}, {"c", 1}, 0};
    for (int i = 0; i < n; i++)
    {
        text[i] = (kne_text) {prompt[i], TOKENS - 2};
        for (int k = 0; k < 8; k++)
            anchors[i][k] = (i * 8 + k) % KNOWN;
        spec[i] = (kne_edit_spec) {.edit_id = i + 1, .n_prompts = 1, .prompt = &text[i], .object = {&"abcdefghijklmnop"[i % 16], 1},
                                   .n_anchors = 8, .anchor = anchors[i]};
    }
    kne_options_defaults(&job.options);
    job.options.max_steps = STEPS;
    job.options.probability = 0.99;
    job.calls = (kne_job_calls) {.ctx = &loss, .progress = keep_loss};
    set_options(&job.options, set);
    need(kne_ref_cache_new(&cache, &err), &err);
    job.cache = cache;
    for (int rep = 0; rep < 2; rep++) /* the first fills the cache of reference facts */
    {
        kne_edit_result_free(r);
        r = NULL;
        t = kne_now();
        if (!fits(kne_edit_run(&job, &r, &err), &err, what))
        {
            kne_ref_cache_free(cache);
            return;
        }
        t = kne_now() - t;
        attribute = r->attribute_seconds;
        optimise = r->optimise_seconds;
    }
    for (int i = 0; i < n; i++)
        steps += r->edit[i].steps;
    /* look before, attribution and energy (forward and backward each), anchors' references, look after; and the steps */
    const double held = job.options.beta > 0 ? fmin(8.0 * n, KNOWN) : 0, seen = n + held;
    const double steps_each = (double) steps / n;
    const double least = pass_floor(m, n * TOKENS, n) * 2 + pass_floor(m, n * TOKENS, n) * 2 * (job.options.select == KNE_SELECT_ENERGY ? 2 : 1) +
                         (held > 0 ? pass_floor(m, held * TOKENS, held) : 0) + 2 * steps_each * pass_floor(m, seen * TOKENS, seen);

    printf("| %s | %.1f ms an edit | %.1f ms | attribution %.0f ms, optimiser %.0f ms in all, %.1f steps an edit, %.2f ms a step |\n", what,
           t * 1e3 / n, least * 1e3 / n, attribute * 1e3, optimise * 1e3, steps_each, steps ? optimise * 1e3 / steps_each : 0);
    if (!set)
        figure(n == 1 ? "edit" : n == BATCH ? "batch" : "six", t * 1e3 / n);
    if (!set && steps)
        figure(n == 1 ? "step" : n == BATCH ? "batch step" : "six step", optimise * 1e3 / steps_each);
    if (set && strcmp(set, PLAIN) == 0)
    {
        figure("plain", t * 1e3);
        figure("steps", steps);
        figure("P before", r->edit[0].p_before);
        figure("loss", loss);
    }
    fflush(stdout);
    kne_edit_result_free(r);
    kne_ref_cache_free(cache);
}

int
main(int argc, char **argv)
{
    const char *device = argc > 1 ? argv[1] : "cuda", *only = argc > 2 ? argv[2] : NULL;
    char        note[512];
    kne_err     err;

    if (kne_device_open(device, 0, &be, note, sizeof note, &err) != KNE_OK)
    {
        printf("gpu_bench: %s: nothing was measured\n", err.msg);
        return 77;
    }
    if (getenv("KNE_FIGURES"))
        figures = fopen(getenv("KNE_FIGURES"), "w");
    printf("## %s\n\n", be->name);
    ceilings();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    {
        kne_view *view = NULL;
        kne_model *m;
        size_t     before, after, total;

        if (only ? !strstr(shapes[i].name, only) : strncmp(shapes[i].name, "smoke", 5) == 0)
            continue;
        shape_name = shapes[i].name;
        m = model_new(&shapes[i].a);
        be->memory(be->ctx, &before, &total);
        if (kne_model_bind(m, be, &err) != KNE_OK)
        {
            printf("### %s: %s. %s\n\n", shapes[i].name, err.msg, err.detail);
            continue;
        }
        need(kne_view_new(m, be, 0, NULL, NULL, &view, &err), &err);
        printf("### Shape of %s, random bfloat16, %d tokens a fact, %d steps\n\n| what | time | floor | |\n|---|---|---|---|\n", shapes[i].name,
               TOKENS, STEPS);
        passes(m, 1);
        passes(m, 6);
        edits(m, view, "one edit, defaults", 1, NULL);
        edits(m, view, "one edit, by attribution and contrast", 1, "select=attribution");
        edits(m, view, "one edit, no anchors", 1, "beta=0");
        edits(m, view, "one edit, plain Adam for the protected step", 1, "step=adam");
        edits(m, view, "one edit, the maths of a plain loop", 1, PLAIN);
        edits(m, view, "six edits together, defaults", 6, NULL);
        be->memory(be->ctx, &after, &total);
        printf("| memory after the batch of six | %.2f GB | %.2f GB | of it weights |\n", ((double) before - (double) after) * 1e-9,
               (double) kne_model_device_bytes(m) * 1e-9);
        edits(m, view, "a batch of 32, defaults", BATCH, NULL);
        edits(m, view, "a batch of 32, no anchors", BATCH, "beta=0");
        be->memory(be->ctx, &after, &total);
        printf("\n%.2f GB of the device in use after it, %.2f of them weights.\n\n", ((double) before - (double) after) * 1e-9,
               (double) kne_model_device_bytes(m) * 1e-9);
        kne_view_free(view);
        if (m->device)
            be->release(be->ctx, m->device_block);
        free(random_bytes);
    }
    if (figures)
        fclose(figures);
    be->close(be);
    return 0;
}
