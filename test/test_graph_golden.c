/*
 * test_graph_golden.c - the graph against another implementation of every
 * family: logits, loss, gradients of all FFN matrices and the losses of ten
 * SGD steps, as test/golden/README.md describes them.
 *
 * The SGD steps run through an overlay of all neurons: what the base computes
 * plus the delta must follow what changed weights give.
 */
#include "kne_graph.h"
#include "kne_safetensors.h"
#include "kne_test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N_SEQ = 3, N_ROWS = 4 + 11 + 17, N_LOSS = N_ROWS - N_SEQ, MAX_LAYERS = 4, STEPS = 10 };

static kne_backend *be;

/* Gradients of the FFN matrices as maths: down as value vectors (f, d), gate and up (f, d). */
typedef struct grads
{
    const kne_arch *a;
    float          *down[MAX_LAYERS], *gate[MAX_LAYERS], *up[MAX_LAYERS];
} grads;

typedef struct batch
{
    kne_batch b;
    kne_seq   seq[N_SEQ];
    int32_t   id[N_ROWS], pos[N_ROWS], out[N_ROWS], target[N_ROWS];
    float     coef[N_ROWS];
} batch;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

static void
collect(void *ctx, const kne_ffn_grad *v)
{
    grads  *g = ctx;
    int64_t d = g->a->d_model, f = g->a->d_ff, n = v->n;

    be->matmul_tn(be->ctx, g->down[v->layer], d, v->a, f, v->dy, d, f, d, n, 0);
    be->matmul_tn(be->ctx, g->up[v->layer], d, v->dup, f, v->h, d, f, d, n, 0);
    if (v->dgate)
        be->matmul_tn(be->ctx, g->gate[v->layer], d, v->dgate, f, v->h, d, f, d, n, 0);
}

/* All rows are out rows; the last of a sequence predicts nothing. */
static bool
read_batch(batch *b, const kne_tensors *golden)
{
    int32_t n = 0;

    *b = (batch) {0};
    for (int i = 0; i < N_SEQ; i++)
    {
        char name[24];

        snprintf(name, sizeof name, "ids.%d", i);
        const kne_tensor *t = kne_tensors_find(golden, name);

        if (!t || n + t->n_elem > N_ROWS)
            return false;
        b->seq[i] = (kne_seq) {
            .q0 = n, .q_len = (int32_t) t->n_elem, .kv0 = n, .kv_len = (int32_t) t->n_elem,
        };
        memcpy(b->id + n, t->data, t->bytes);
        for (int32_t k = 0; k < t->n_elem; k++)
        {
            bool last = k + 1 == t->n_elem;

            b->pos[n + k] = k;
            b->out[n + k] = n + k;
            b->target[n + k] = last ? 0 : b->id[n + k + 1];
            b->coef[n + k] = last ? 0 : -1.0f / N_LOSS;
        }
        n += (int32_t) t->n_elem;
    }
    b->b = (kne_batch) {
        .n = n, .n_seq = N_SEQ, .n_out = n, .id = b->id, .pos = b->pos, .seq = b->seq,
        .out_row = b->out,
    };
    return n == N_ROWS;
}

/* Mean over the predictions of -ln P(next); its gradient goes to w->dlogits. */
static double
loss(const kne_model *m, kne_work *w, const batch *b)
{
    float   logp[N_ROWS];
    int32_t best[N_ROWS];
    double  sum = 0;

    be->logprob(be->ctx, logp, best, w->dlogits, w->logits, b->target, b->coef, N_ROWS,
                m->arch.vocab_size);
    for (int i = 0; i < N_ROWS; i++)
        sum += (double) b->coef[i] * logp[i];
    return sum;
}

static double
number(const kne_tensors *golden, const char *name, int64_t i)
{
    const kne_tensor *t = kne_tensors_find(golden, name);

    return t && i < t->n_elem ? kne_load(t->data, KNE_F32, (size_t) i) : NAN;
}

static double
logits_error(const kne_tensors *golden, const float *logits, int64_t v)
{
    double num = 0, den = 0;
    int64_t row = 0;

    for (int i = 0; i < N_SEQ; i++)
    {
        char name[24];

        snprintf(name, sizeof name, "logits.%d", i);
        const kne_tensor *t = kne_tensors_find(golden, name);

        for (int64_t k = 0; t && k < t->n_elem; k++)
        {
            double ref = kne_load(t->data, KNE_F32, (size_t) k);

            num += (logits[row * v + k] - ref) * (logits[row * v + k] - ref);
            den += ref * ref;
        }
        row += t ? t->n_elem / v : 0;
    }
    return den > 0 ? num / den : 1;
}

static bool
ends(const char *name, const char *suffix)
{
    size_t n = strlen(name), s = strlen(suffix);

    return n >= s && !strcmp(name + n - s, suffix);
}

/* NMSE of one stored gradient; rows of the fused one are gate, then up. */
static double
gradient_error(const kne_tensor *t, const grads *g)
{
    static const char *const down[] = {
        "down_proj.weight", "mlp.c_proj.weight", "fc_out.weight", "dense_4h_to_h.weight",
    };
    int64_t d = g->a->d_model, f = g->a->d_ff;
    int     layer = atoi(t->name + strcspn(t->name, "0123456789"));
    bool    is_down = false, stored_in_out = g->a->conv1d;
    double  num = 0, den = 0;

    if (layer >= g->a->n_layers)
        return 1;
    for (int i = 0; i < 4; i++)
        is_down |= ends(t->name, down[i]);
    bool is_gate = ends(t->name, "gate_proj.weight"), fused = ends(t->name, "gate_up_proj.weight");

    if (t->n_elem != d * f * (1 + fused))
        return 1;
    for (int64_t r = 0; r < t->shape[0]; r++)
        for (int64_t c = 0; c < t->shape[1]; c++)
        {
            /* down is (d, f) as a Linear stores it, the others (f, d); Conv1D turns both */
            bool    by_row = is_down == stored_in_out; /* rows of the file are neurons */
            int64_t k = by_row ? r % f : c, at = k * d + (by_row ? c : r);
            const float *mine = is_down ? g->down[layer]
                                : is_gate || (fused && r < f) ? g->gate[layer] : g->up[layer];
            double  ref = kne_load(t->data, KNE_F32, (size_t) (r * t->shape[1] + c));

            num += (mine[at] - ref) * (mine[at] - ref);
            den += ref * ref;
        }
    return den > 0 ? num / den : 1;
}

static void
compare(const char *family, const kne_model *m, const kne_tensors *golden, kne_work *w,
        const batch *b, float *memory)
{
    const kne_arch   *a = &m->arch;
    int64_t           size = (int64_t) a->d_ff * a->d_model;
    grads             g = {.a = a};
    kne_overlay_layer edit[MAX_LAYERS] = {0};
    kne_overlay       ov = {edit};
    float            *delta[MAX_LAYERS];
    int32_t          *neuron = (int32_t *) memory; /* (f) */
    kne_err           err;
    double            worst = 0, e;
    int               n_grad = 0;

    memory += a->d_ff;
    for (int32_t i = 0; i < a->d_ff; i++)
        neuron[i] = i;
    for (int l = 0; l < a->n_layers; l++, memory += 4 * size)
    {
        g.down[l] = memory;
        g.gate[l] = memory + size;
        g.up[l] = memory + 2 * size;
        delta[l] = memory + 3 * size; /* calloc'ed: zero */
        edit[l] = (kne_overlay_layer) {.n = a->d_ff, .neuron = neuron, .value_diff = delta[l]};
    }

    if (!ok(kne_forward(m, be, w, &b->b, NULL, NULL, 0, &err), &err))
    {
        check(0, "%s: forward", family);
        return;
    }
    e = logits_error(golden, w->logits, a->vocab_size);
    check(e <= 1e-9, "%s: logits (NMSE %.1e)", family, e);
    e = loss(m, w, b) - number(golden, "loss", 0);
    check(fabs(e) <= 2e-6, "%s: loss (%.1e off)", family, e);
    ok(kne_backward(m, be, w, &b->b, NULL, NULL, 0, collect, &g, &err), &err);
    for (int64_t i = 0; i < golden->n; i++)
        if (!strncmp(golden->tensor[i].name, "grad.", 5))
        {
            e = gradient_error(&golden->tensor[i], &g);
            if (e > 1e-9)
                printf("# %s: NMSE %.1e\n", golden->tensor[i].name, e);
            worst = fmax(worst, e);
            n_grad++;
        }
    check(n_grad >= 2 * a->n_layers && worst <= 1e-9,
          "%s: gradients of %d FFN matrices (NMSE %.1e)", family, n_grad, worst);

    float lr = (float) number(golden, "sgd_lr", 0);

    worst = 0;
    for (int step = 0; step < STEPS; step++)
    {
        for (int l = 0; l < a->n_layers; l++)
            for (int64_t i = 0; i < size; i++)
                delta[l][i] -= lr * g.down[l][i];
        ok(kne_forward(m, be, w, &b->b, &ov, NULL, 0, &err), &err);
        worst = fmax(worst, fabs(loss(m, w, b) / number(golden, "sgd_losses", step) - 1));
        ok(kne_backward(m, be, w, &b->b, &ov, NULL, 0, collect, &g, &err), &err);
    }
    check(worst <= 1e-5, "%s: losses of %d SGD steps (%.1e off)", family, STEPS, worst);
}

static void
test_family(const char *family)
{
    char         path[256];
    kne_err      err;
    kne_model   *m = NULL;
    kne_tensors *golden = NULL;
    kne_work    *w = NULL;
    float       *memory = NULL;
    batch        b;

    snprintf(path, sizeof path, "test/golden/%s/golden.safetensors", family);
    if (access(path, R_OK) != 0)
    {
        skip(family, "no golden folder here");
        return;
    }
    bool fine = ok(kne_tensors_open_file(path, &golden, &err), &err);

    snprintf(path, sizeof path, "test/golden/%s", family);
    fine = fine && ok(kne_model_open(path, &m, &err), &err) && m->arch.n_layers <= MAX_LAYERS &&
           read_batch(&b, golden);
    if (fine)
        fine = ok(kne_work_new(m, (kne_work_shape) {N_ROWS, N_ROWS, m->arch.d_ff, true}, &w, &err),
                  &err);
    if (fine)
    {
        size_t size = (size_t) m->arch.d_ff * (size_t) (m->arch.d_model * 4 * m->arch.n_layers + 1);

        memory = calloc(size, sizeof *memory);
        compare(family, m, golden, w, &b, memory);
    }
    else
        check(0, "%s: opens", family);
    free(memory);
    kne_work_free(w);
    kne_model_close(m);
    kne_tensors_close(golden);
}

int
main(void)
{
    static const char *const families[] = {
        "llama", "llama3", "mistral", "qwen2", "qwen3",
        "phi3", "gpt2", "gptj", "gpt_neox", "gpt_neox_seq",
    };
    static const char *const isas[] = {"portable", "avx2", NULL}; /* NULL: this machine's best */

    for (size_t k = 0; k < sizeof isas / sizeof *isas; k++)
    {
        kne_err    err;
        kne_status st = kne_cpu_backend_new(2, isas[k], &be, &err);

        if (st == KNE_ERR_UNSUPPORTED)
            skip(isas[k], "this machine lacks it");
        else if (check(ok(st, &err), "kernels: %s", st == KNE_OK ? be->name : "none"))
        {
            for (size_t i = 0; i < sizeof families / sizeof *families; i++)
                test_family(families[i]);
            kne_cpu_backend_free(be);
        }
    }
    return kne_test_done();
}
