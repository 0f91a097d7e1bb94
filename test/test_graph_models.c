/*
 * test_graph_models.c - the graph on models from elsewhere: the golden folders
 * (made by another implementation, see test/golden/README.md) and the trained
 * models of the shared folder, skipped where that is absent.
 */
#include "kne_graph.h"
#include "kne_test.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static kne_backend *be;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

/* A file of a model of the shared folder; static storage. */
static const char *
shared(const char *model, const char *file)
{
    static char path[4096];
    const char *root = getenv("KNE_SHARED");

    snprintf(path, sizeof path, "%s/models/%s%s%s", root ? root : "../shared", model,
             *file ? "/" : "", file);
    return path;
}

static char *
slurp(const char *path, size_t *len)
{
    FILE *f = fopen(path, "rb");
    char *text = NULL;

    *len = 0;
    if (!f)
        return NULL;
    if (fseek(f, 0, SEEK_END) == 0)
    {
        long size = ftell(f);

        rewind(f);
        text = malloc((size_t) size + 1);
        *len = fread(text, 1, (size_t) size, f);
        text[*len] = '\0';
    }
    fclose(f);
    return text;
}

static kne_model *
open_shared(const char *name)
{
    kne_model *m = NULL;
    kne_err    err;

    if (access(shared(name, "config.json"), R_OK) != 0)
    {
        skip(name, "the shared models are not here");
        return NULL;
    }
    return check(ok(kne_model_open(shared(name, ""), &m, &err), &err), "%s opens", name) ? m : NULL;
}

static double
nmse(const float *x, const float *ref, int64_t n)
{
    double num = 0, den = 0;

    for (int64_t i = 0; i < n; i++)
    {
        num += ((double) x[i] - ref[i]) * ((double) x[i] - ref[i]);
        den += (double) ref[i] * ref[i];
    }
    return num / (den + 1e-300);
}

static void
test_stories(void)
{
    kne_model *m = open_shared("stories260K-fp32");
    kne_ids    out = {0};
    kne_err    err;
    int32_t    bos = 1;
    size_t     n_expect, n_text;
    char      *expect, *text = NULL;

    if (!m)
        return;
    expect = slurp(shared("stories260K-fp32", "golden_greedy_200_steps.txt"), &n_expect);
    bool fine =
        ok(kne_generate(m, be, NULL, &bos, 1, 200, NULL, NULL, &out, &err), &err) &&
        ok(kne_tokenizer_decode(m->tokenizer, out.id, out.n, true, &text, &n_text, &err), &err);

    fine = fine && expect && n_text == n_expect && !memcmp(text, expect, n_text);
    if (!fine && text)
        printf("# %d ids: %s\n", out.n, text);
    check(fine, "stories260K tells its story, character for character");
    free(text);
    free(expect);
    kne_ids_free(&out);
    kne_model_close(m);
}

static void
test_capital(void)
{
    static const int32_t best[5] = {897, 459, 262, 785, 330};
    static const double  logit[5] = {15.483, 6.306, 5.582, 5.321, 5.225};
    static const char    prompt[] = "The capital city of France is";
    kne_model *m = open_shared("lre-llama-5m");
    kne_ids    ids = {0}, out = {0};
    kne_work  *w = NULL;
    kne_err    err;
    int32_t    pos[64];

    if (!m)
        return;
    for (int32_t i = 0; i < 64; i++)
        pos[i] = i;
    if (ok(kne_tokenizer_encode(m->tokenizer, prompt, strlen(prompt), true, &ids, &err), &err) &&
        ok(kne_work_new(m, (kne_work_shape) {.max_n = ids.n, .max_out = 1}, &w, &err), &err))
    {
        int32_t   last = ids.n - 1;
        kne_seq   seq = {.q_len = ids.n, .kv_len = ids.n};
        kne_batch b = {
            .n = ids.n, .n_seq = 1, .n_out = 1, .id = ids.id, .pos = pos, .seq = &seq,
            .out_row = &last,
        };
        double    worst = 0;
        int       above = 0;

        ok(kne_forward(m, be, w, &b, NULL, NULL, 0, &err), &err);
        for (int i = 0; i < 5; i++)
            worst = fmax(worst, fabs(w->logits[best[i]] - logit[i]));
        for (int32_t i = 0; i < m->arch.vocab_size; i++)
            above += w->logits[i] >= w->logits[best[4]];
        check(worst <= 6e-4 && above == 5, "the capital of France: the five largest logits (%.1e)",
              worst);
        ok(kne_generate(m, be, NULL, ids.id, ids.n, 1, NULL, NULL, &out, &err), &err);
        check(out.n == 1 && out.id[0] == 897, "the capital of France is token 897");
    }
    else
        check(0, "the capital of France");
    kne_ids_free(&ids);
    kne_ids_free(&out);
    kne_work_free(w);
    kne_model_close(m);
}

/* All 729 inputs: six letters in, the same six sorted out. */
static void
test_sort(const kne_model *m)
{
    int sorted = 0;

    for (int i = 0; i < 729; i++)
    {
        int32_t in[6], count[3] = {0}, wrong = 0;
        kne_ids out = {0};
        kne_err err;

        for (int k = 0, x = i; k < 6; k++, x /= 3)
            count[in[k] = x % 3]++;
        if (!ok(kne_generate(m, be, NULL, in, 6, 6, NULL, NULL, &out, &err), &err))
            break;
        for (int k = 0; k < out.n; k++)
            wrong += out.id[k] != (k < count[0] ? 0 : k < count[0] + count[1] ? 1 : 2);
        sorted += out.n == 6 && !wrong;
        kne_ids_free(&out);
    }
    check(sorted == 729, "gpt-nano sorts %d of 729 inputs", sorted);
}

static size_t
base64(const char *in, unsigned char *out)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t   n = 0;
    uint32_t bits = 0;
    int      have = 0;

    for (; *in && *in != '='; in++)
    {
        const char *at = strchr(digits, *in);

        bits = bits << 6 | (uint32_t) (at ? at - digits : 0);
        if ((have += 6) >= 8)
            out[n++] = (unsigned char) (bits >> (have -= 8));
    }
    return n;
}

/* A tensor of the partials file; free it. */
static float *
partial(const cJSON *root, const char *name, int64_t *n)
{
    const char *text = cJSON_GetStringValue(
        cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(root, name), "data"));
    float *x = malloc(text ? strlen(text) + 4 : 4);

    *n = text ? (int64_t) base64(text, (unsigned char *) x) / 4 : 0;
    return x;
}

/* Every stage of the first layer and every layer's output, against PyTorch's. */
static void
test_stages(const kne_model *m)
{
    enum { B = 3, T = 11, N = B * T, D = 48, F = 192 };
    size_t    len;
    char     *text = slurp(shared("gpt-nano-sort", "gpt-nano-sort-t0-partials.json"), &len);
    cJSON    *root = text ? cJSON_Parse(text) : NULL;
    kne_work *w = NULL;
    kne_err   err;
    int32_t   id[N], pos[N], out[N];
    kne_seq   seq[B];
    int64_t   n;
    float    *idx = partial(root, "idx", &n), qkv[N * 3 * D];
    double    worst = 0;

    kne_work_shape shape = {.max_n = N, .max_out = N, .keep = true};

    if (n != N || !ok(kne_work_new(m, shape, &w, &err), &err))
    {
        check(0, "gpt-nano's stages can be read");
        goto out;
    }
    for (int i = 0; i < N; i++)
    {
        id[i] = (int32_t) idx[i];
        pos[i] = i % T;
        out[i] = i;
    }
    for (int i = 0; i < B; i++)
        seq[i] = (kne_seq) {.q0 = i * T, .q_len = T, .kv0 = i * T, .kv_len = T};
    kne_batch b = {
        .n = N, .n_seq = B, .n_out = N, .id = id, .pos = pos, .seq = seq, .out_row = out,
    };

    ok(kne_forward(m, be, w, &b, NULL, NULL, 0, &err), &err);
    kne_saved *s = w->layer;

    for (int r = 0; r < N; r++)
        for (int c = 0; c < D; c++)
        {
            qkv[r * 3 * D + c] = s->q[r * D + c];
            qkv[r * 3 * D + D + c] = s->k[r * D + c];
            qkv[r * 3 * D + 2 * D + c] = s->v[r * D + c];
        }
    struct { const char *name; const float *x; int64_t n; } stage[] = {
        {"x", s[0].x_in, N * D}, {"ln1", s[0].h1, N * D}, {"qkv", qkv, N * 3 * D},
        {"y", s[0].attn, N * D}, {"attnResid", s[0].x_mid, N * D}, {"ln2", s[0].h2, N * D},
        {"fc", s[0].up, N * F}, {"gelu", s[0].a, N * F}, {"mlpResid", s[1].x_in, N * D},
        {"block0", s[1].x_in, N * D}, {"block1", s[2].x_in, N * D}, {"block2", w->x, N * D},
        {"lm_head", w->logits, N * 3},
        {"probs", w->logits, N * 3}, /* last: turned into probabilities in place */
    };

    for (size_t i = 0; i < sizeof stage / sizeof *stage; i++)
    {
        float *ref = partial(root, stage[i].name, &n);

        if (!strcmp(stage[i].name, "probs"))
        {
            be->log_softmax(be->ctx, w->dlogits, w->logits, N, 3);
            for (int k = 0; k < N * 3; k++)
                w->logits[k] = expf(w->dlogits[k]);
        }
        double e = n == stage[i].n ? nmse(stage[i].x, ref, n) : 1;

        if (e > 1e-11)
            printf("# stage %s: NMSE %.1e\n", stage[i].name, e);
        worst = fmax(worst, e);
        free(ref);
    }
    check(worst <= 1e-11, "gpt-nano: 14 stages agree with PyTorch (NMSE %.1e)", worst);
out:
    kne_work_free(w);
    free(idx);
    cJSON_Delete(root);
    free(text);
}

int
main(void)
{
    kne_err    err;
    kne_model *m;

    if (!ok(kne_cpu_backend_new(2, NULL, &be, &err), &err))
        return 1;
    test_stories();
    test_capital();
    if ((m = open_shared("gpt-nano-sort")))
    {
        test_stages(m);
        test_sort(m);
        kne_model_close(m);
    }
    kne_cpu_backend_free(be);
    return kne_test_done();
}
