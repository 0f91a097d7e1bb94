/*
 * test_export.c - what is exported is what is served: every weight of the folder written is compared, bit for bit, with the base
 * weight or the row computed here; an adapter's B A with the difference of the two. And a folder appears whole or not at all.
 * check_export.py shows the same folders to transformers and peft.
 */
#include "kne_queue.h"
#include "kne_export.h"
#include "kne_safetensors.h"
#include "kne_test.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static kne_backend *be;
static char         tmp[200] = "/tmp/kne-test-export-XXXXXX";
static bool         keep; /* for check_export.py */

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

/* The weight of neuron k, coordinate j, as maths. */
static size_t
place(const kne_mat *m, int matrix, int32_t k, int32_t j)
{
    bool by_column = (matrix == KNE_MATRIX_DOWN) != m->transposed;

    return by_column ? (size_t) j * (size_t) m->ld + (size_t) k : (size_t) k * (size_t) m->ld + (size_t) j;
}

static const kne_mat *
matrix_of(const kne_model *m, int32_t layer, int matrix)
{
    const kne_layer *y = &m->layer[layer];

    return matrix == KNE_MATRIX_DOWN ? &y->down : matrix == KNE_MATRIX_GATE ? &y->gate : &y->up;
}

/* Two edits of some neurons of the first and the last layer; some of them of both. */
static kne_view *
some_view(const kne_model *m, kne_delta *delta[2])
{
    static const int64_t edit_id[2] = {3, 8};
    const int32_t        d = m->arch.d_model, layer[2] = {0, m->arch.n_layers - 1};
    kne_delta_row        row[64];
    kne_view            *v = NULL;
    kne_err              err;
    uint64_t             seed = 5;

    for (int e = 0; e < 2; e++)
    {
        int n = 0;

        for (int l = 0; l < 2; l++)
            for (int32_t k = e; k < 6; k += 1 + e)
                for (uint8_t matrix = 0; matrix < 3; matrix++)
                {
                    float *x;

                    if ((matrix == KNE_MATRIX_GATE && !m->arch.gated) || n == 64 || (matrix && k > 2))
                        continue;
                    x = malloc((size_t) d * sizeof *x);
                    for (int32_t j = 0; j < d; j++)
                        x[j] = ((float) (kne_random_next(&seed) >> 40) * 0x1p-24f - 0.5f) * 0.1f;
                    row[n++] = (kne_delta_row) {layer[l], k, matrix, d, x};
                }
        if (!ok(kne_delta_new(row, n, &delta[e], &err), &err))
            return NULL;
        for (int i = 0; i < n; i++)
            free((void *) row[i].v);
    }
    ok(kne_view_new(m, be, 2, edit_id, delta, &v, &err), &err);
    return v;
}

/* Effective weights of a matrix, as maths (d_ff, d): base, plus both deltas in order, rounded. changed counts the rows that are touched. */
static float *
effective(const kne_model *m, kne_delta *const delta[2], int32_t layer, int matrix, int64_t *changed)
{
    const kne_mat *mat = matrix_of(m, layer, matrix);
    const int32_t  d = m->arch.d_model, f = m->arch.d_ff;
    float         *w = malloc((size_t) f * (size_t) d * sizeof *w);

    for (int32_t k = 0; k < f; k++)
    {
        bool touched = false;

        for (int32_t j = 0; j < d; j++)
            w[(size_t) k * d + j] = kne_load(mat->data, mat->type, place(mat, matrix, k, j));
        for (int e = 0; e < 2; e++)
            for (int32_t i = 0; i < delta[e]->n_rows; i++)
            {
                const kne_delta_row *r = &delta[e]->row[i];

                if (r->layer != layer || r->neuron != k || r->matrix != matrix)
                    continue;
                touched = true;
                for (int32_t j = 0; j < d; j++)
                    w[(size_t) k * d + j] += r->v[j];
            }
        for (int32_t j = 0; touched && j < d; j++)
            w[(size_t) k * d + j] = kne_round_to(w[(size_t) k * d + j], mat->type);
        *changed += touched;
    }
    return w;
}

/* Every tensor but those of the FFN is the same; these are the effective ones. */
static bool
folder_is(const kne_model *m, const kne_model *x, kne_delta *const delta[2], int64_t *changed)
{
    const int32_t d = m->arch.d_model, f = m->arch.d_ff;
    bool          same = m->tensors->n == x->tensors->n;
    int64_t       n_other = 0;

    for (int32_t l = 0; l < m->arch.n_layers; l++)
        for (int k = 0; k < 3; k++)
        {
            const kne_mat *mat = matrix_of(x, l, k);
            float         *w;

            if (k == KNE_MATRIX_GATE && !m->arch.gated)
                continue;
            w = effective(m, delta, l, k, changed);
            for (int32_t i = 0; i < f; i++)
                for (int32_t j = 0; j < d; j++)
                {
                    float is = kne_load(mat->data, mat->type, place(mat, k, i, j));

                    same &= memcmp(&is, &w[(size_t) i * d + j], sizeof is) == 0;
                }
            free(w);
        }
    for (int64_t i = 0; same && i < m->tensors->n; i++)
    {
        const kne_tensor *a = &m->tensors->tensor[i], *b = &x->tensors->tensor[i];

        same = strcmp(a->name, b->name) == 0 && a->bytes == b->bytes && a->type == b->type;
        n_other += same && memcmp(a->data, b->data, a->bytes) == 0;
    }
    /* two layers have edits, each in two or three tensors, or two where gate and up are one */
    return same && m->tensors->n - n_other >= 4 && m->tensors->n - n_other <= 6;
}

/* B A of one module, as maths of one matrix of it: (rows of the module's outputs from `offset`). */
static bool
adapter_is(const kne_model *m, const kne_tensors *ts, kne_delta *const delta[2], int32_t layer, int matrix, const char *module, int64_t offset)
{
    const kne_mat    *mat = matrix_of(m, layer, matrix);
    const int32_t     d = m->arch.d_model, f = m->arch.d_ff;
    char              name[256];
    const kne_tensor *ab[2];
    int64_t           changed = 0, rank;
    float            *w = effective(m, delta, layer, matrix, &changed);
    bool              same = true;

    for (int b = 0; b < 2; b++)
    {
        snprintf(name, sizeof name, "base_model.model.%s.lora_%c.weight", module, "AB"[b]);
        if (!(ab[b] = kne_tensors_find(ts, name)))
        {
            printf("# no %s\n", name);
            free(w);
            return false;
        }
    }
    rank = ab[0]->shape[0];
    same = ab[1]->shape[1] == rank && rank >= changed;
    for (int32_t k = 0; k < f; k++)
        for (int32_t j = 0; j < d; j++)
        {
            int64_t out = matrix == KNE_MATRIX_DOWN ? j : offset + k, in = matrix == KNE_MATRIX_DOWN ? k : j;
            float   base = kne_load(mat->data, mat->type, place(mat, matrix, k, j)), sum = 0;

            for (int64_t r = 0; r < rank; r++)
                sum += kne_load(ab[1]->data, KNE_F32, (size_t) (out * rank + r)) * kne_load(ab[0]->data, KNE_F32, (size_t) (r * ab[0]->shape[1] + in));
            same &= sum == w[(size_t) k * d + j] - base;
        }
    free(w);
    return same;
}

static int
entries(const char *dir)
{
    DIR *h = opendir(dir);
    int  n = 0;

    for (struct dirent *e; h && (e = readdir(h));)
        n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    if (h)
        closedir(h);
    return n;
}

static void
test_model(const char *folder, const char *prefix, const char *down, const char *gate, const char *up, int64_t up_offset)
{
    kne_model   *m = NULL, *x = NULL;
    kne_delta   *delta[2] = {NULL, NULL};
    kne_view    *v = NULL;
    kne_tensors *ts = NULL;
    kne_wbuf     answer = {.grow = kne_wire_realloc};
    kne_rbuf     r;
    char         path[256], cmd[512], file[300];
    const char  *fp;
    size_t       n_fp;
    int64_t      changed = 0, said;
    kne_err      err;
    bool         same;

    if (!check(ok(kne_model_open(folder, &m, &err), &err), "%s opens", folder) || !(v = some_view(m, delta)))
        return;
    snprintf(path, sizeof path, "%s/%s-hf", tmp, strrchr(folder, '/') + 1);
    if (!check(ok(kne_export(folder, m->fingerprint, v, KNE_EXPORT_HUGGINGFACE, path, "card\n", 5, NULL, NULL, &answer, &err), &err),
               "%s: exported", folder))
        goto out;
    check(ok(kne_model_open(path, &x, &err), &err) && folder_is(m, x, delta, &changed), "%s: every weight is the one served", folder);
    r = (kne_rbuf) {.p = answer.p, .len = answer.len};
    fp = kne_get_bytes(&r, &n_fp);
    said = kne_get_i64(&r);
    check(x && n_fp == 64 && memcmp(fp, x->fingerprint, 64) == 0 && strcmp(x->fingerprint, m->fingerprint) != 0 && said == changed && changed > 8,
          "%s: the answer has the fingerprint and %lld changed rows", folder, (long long) changed);
    snprintf(cmd, sizeof cmd, "cd %s && sha256sum --quiet -c SHA256SUMS && test $(wc -l < SHA256SUMS) = $(($(ls | wc -l) - 1)) && grep -q card README.md", path);
    check(system(cmd) == 0, "%s: its checksums are right, and of every file", folder);

    answer.len = 0;
    snprintf(path, sizeof path, "%s/%s-peft", tmp, strrchr(folder, '/') + 1);
    snprintf(file, sizeof file, "%s/adapter_model.safetensors", path);
    check(ok(kne_export(folder, m->fingerprint, v, KNE_EXPORT_PEFT, path, "card\n", 5, NULL, NULL, &answer, &err), &err) &&
          ok(kne_tensors_open_file(file, &ts, &err), &err), "%s: an adapter", folder);
    same = ts != NULL;
    for (int l = 0; l < 2 && same; l++)
    {
        int32_t layer = l ? m->arch.n_layers - 1 : 0;
        const char *suffix[3] = {down, gate, up};

        for (int k = 0; k < 3 && same; k++)
        {
            char module[128];

            if (!suffix[k])
                continue;
            snprintf(module, sizeof module, "%s%d.%s", prefix, layer, suffix[k]);
            same = adapter_is(m, ts, delta, layer, k, module, k == KNE_MATRIX_UP ? up_offset : 0);
        }
    }
    check(same, "%s: its B A is what the edits add, to the last bit", folder);
out:
    kne_tensors_close(ts);
    kne_model_close(x);
    kne_view_free(v);
    kne_delta_release(delta[0]);
    kne_delta_release(delta[1]);
    kne_model_close(m);
    free(answer.p);
    if (keep)
        return;
    snprintf(cmd, sizeof cmd, "rm -rf %s/*-hf %s/*-peft", tmp, tmp);
    check(system(cmd) == 0 && entries(tmp) == 0, "%s: nothing else is left", folder);
}

static int
stop_at(void *ctx)
{
    return --*(int *) ctx <= 0;
}

static void
test_whole_or_not(void)
{
    const char *folder = "models/atlas";
    kne_model  *m = NULL;
    kne_delta  *delta[2] = {NULL, NULL};
    kne_view   *v;
    kne_wbuf    answer = {.grow = kne_wire_realloc};
    char        path[256], cmd[512];
    kne_err     err;
    int         left = 3;
    struct rlimit limit, small;

    if (!ok(kne_model_open(folder, &m, &err), &err) || !(v = some_view(m, delta)))
        return;
    snprintf(path, sizeof path, "%s/a", tmp);
    check(kne_export(folder, m->fingerprint, v, 0, path, "", 0, stop_at, &left, &answer, &err) == KNE_ERR_CANCELLED && entries(tmp) == 0,
          "a cancelled export leaves nothing");

    /* What a full disk does: a write that ends too early. SIGXFSZ is ignored by main of the engine as here. */
    getrlimit(RLIMIT_FSIZE, &limit);
    small = limit;
    small.rlim_cur = 3 << 20;
    setrlimit(RLIMIT_FSIZE, &small);
    kne_status st = kne_export(folder, m->fingerprint, v, 0, path, "", 0, NULL, NULL, &answer, &err);
    setrlimit(RLIMIT_FSIZE, &limit);
    check(st == KNE_ERR_IO && strstr(err.msg, "write") && entries(tmp) == 0, "a write that fails leaves nothing: %s", err.msg);

    mkdir(path, 0700);
    check(ok(kne_export(folder, m->fingerprint, v, 0, path, "", 0, NULL, NULL, &answer, &err), &err) && entries(path) > 4,
          "an empty folder is taken");
    check(kne_export(folder, m->fingerprint, v, 0, path, "", 0, NULL, NULL, &answer, &err) == KNE_ERR_IO && entries(tmp) == 1,
          "a folder that holds something is not: %s", err.msg);
    snprintf(path, sizeof path, "%s/none/a", tmp);
    check(kne_export(folder, m->fingerprint, v, 0, path, "", 0, NULL, NULL, &answer, &err) == KNE_ERR_IO, "nor one that has no place: %s", err.msg);
    check(kne_export(folder, "0", v, 0, path, "", 0, NULL, NULL, &answer, &err) != KNE_OK, "nor a model that is another");
    kne_view_free(v);
    kne_view_new(m, be, 0, NULL, NULL, &v, &err);
    snprintf(path, sizeof path, "%s/b", tmp);
    check(kne_export(folder, m->fingerprint, v, KNE_EXPORT_PEFT, path, "", 0, NULL, NULL, &answer, &err) == KNE_ERR_INVALID && entries(tmp) == 1,
          "an adapter of nothing is none: %s", err.msg);
    snprintf(cmd, sizeof cmd, "diff -r models/atlas %s/b -x README.md -x README-base.md -x SHA256SUMS", tmp);
    check(ok(kne_export(folder, m->fingerprint, v, 0, path, "", 0, NULL, NULL, &answer, &err), &err) && system(cmd) == 0,
          "without edits the files are the same");
    kne_view_free(v);
    kne_delta_release(delta[0]);
    kne_delta_release(delta[1]);
    kne_model_close(m);
    free(answer.p);
}

/* test_export FOLDER: leave what is exported in FOLDER. */
int
main(int argc, char **argv)
{
    kne_err err;
    char    cmd[300];

    signal(SIGXFSZ, SIG_IGN);
    if (argc > 1 && (keep = strlen(argv[1]) < sizeof tmp))
        strcpy(tmp, argv[1]);
    if ((!keep && !mkdtemp(tmp)) || kne_cpu_backend_new(1, NULL, &be, &err) != KNE_OK)
        return 1;
    test_model("models/atlas", "model.layers.", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", 0);
    test_model("test/golden/llama", "model.layers.", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", 0);
    test_model("test/golden/gpt2", "transformer.h.", "mlp.c_proj", NULL, "mlp.c_fc", 0);
    test_model("test/golden/phi3", "model.layers.", "mlp.down_proj", "mlp.gate_up_proj", "mlp.gate_up_proj", 88);
    test_model("test/golden/gpt_neox", "gpt_neox.layers.", "mlp.dense_4h_to_h", NULL, "mlp.dense_h_to_4h", 0);
    if (keep)
        return kne_test_done();
    test_whole_or_not();
    snprintf(cmd, sizeof cmd, "rm -rf %s", tmp);
    if (system(cmd) != 0)
        return 1;
    return kne_test_done();
}
