/*
 * kne_export.c - a state of the model as files (see kne_export.h).
 */
#include "kne_export.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "kne_arch.h"
#include "kne_safetensors.h"

#define MAX_OTHER ((size_t) 256 << 20) /* of a file that is not weights */
#define BLOCK ((size_t) 1 << 20)

/* What the edits make of one matrix. */
typedef struct patch
{
    const kne_mat *mat;
    int32_t        layer, matrix; /* enum kne_matrix */
    bool           by_column;     /* as stored: neuron k is column k, not row k */
    int32_t        n;
    int32_t       *neuron;        /* (n) ascending */
    float         *eff;           /* (n, d) effective rows */
} patch;

typedef struct exporter
{
    kne_model  *m; /* on the host */
    const char *from;
    kne_outdir *o;
    patch      *patch;
    int32_t     n_patches;
    int64_t     n_rows;
    kne_wbuf    skipped; /* n_skipped * str */
    uint32_t    n_skipped;
    kne_err    *err;
} exporter;

static kne_status
no_memory(exporter *x)
{
    return kne_error(x->err, KNE_ERR_NOMEM, "out of memory");
}

/* ---- the rows ---- */

static float
base_at(const patch *p, int32_t neuron, int32_t j)
{
    size_t at = p->by_column ? (size_t) j * (size_t) p->mat->ld + (size_t) neuron
                             : (size_t) neuron * (size_t) p->mat->ld + (size_t) j;

    return kne_load(p->mat->data, p->mat->type, at);
}

/* The patch of one matrix of one layer, from the refs [from, to) of the layer; nothing when none is of the matrix. */
static kne_status
make_patch(exporter *x, int32_t layer, int matrix, const kne_row_ref *from, const kne_row_ref *to)
{
    const kne_layer *y = &x->m->layer[layer];
    const kne_mat   *mat[3] = {&y->down, &y->gate, &y->up};
    const int32_t    d = x->m->arch.d_model;
    patch           *p = &x->patch[x->n_patches];
    size_t           n = 0;
    int32_t          last = -1;

    for (const kne_row_ref *r = from; r < to; r++)
        if (r->row->matrix == matrix && r->row->neuron != last)
        {
            last = r->row->neuron;
            n++;
        }
    if (n == 0)
        return KNE_OK;
    *p = (patch) {.mat = mat[matrix], .layer = layer, .matrix = matrix,
                  .by_column = (matrix == KNE_MATRIX_DOWN) != mat[matrix]->transposed,
                  .neuron = malloc(n * sizeof *p->neuron), .eff = malloc(n * (size_t) d * sizeof *p->eff)};
    x->n_patches++;
    if (!p->neuron || !p->eff)
        return no_memory(x);
    if (p->mat->ld != p->mat->cols)
        return kne_error(x->err, KNE_ERR_UNSUPPORTED, "a matrix of layer %d cannot be exported: its rows are not whole", layer);
    for (const kne_row_ref *r = from; r < to; r++)
    {
        float *eff;

        if (r->row->matrix != matrix)
            continue;
        if (p->n == 0 || p->neuron[p->n - 1] != r->row->neuron)
        {
            eff = p->eff + (size_t) p->n * (size_t) d;
            for (int32_t j = 0; j < d; j++)
                eff[j] = base_at(p, r->row->neuron, j);
            p->neuron[p->n++] = r->row->neuron;
        }
        eff = p->eff + (size_t) (p->n - 1) * (size_t) d;
        for (int32_t j = 0; j < d; j++)
            eff[j] += r->row->v[j];
    }
    for (size_t i = 0; i < n * (size_t) d; i++)
        p->eff[i] = kne_round_to(p->eff[i], p->mat->type);
    x->n_rows += p->n;
    return KNE_OK;
}

static int
patch_order(const void *a, const void *b)
{
    const char *pa = ((const patch *) a)->mat->data, *pb = ((const patch *) b)->mat->data;

    return (pa > pb) - (pa < pb);
}

static kne_status
make_patches(exporter *x, const kne_view *view)
{
    size_t       n;
    kne_row_ref *refs = kne_row_refs(view->n_edits, view->delta, &n);
    kne_status   st = KNE_OK;

    x->patch = calloc((size_t) x->m->arch.n_layers * 3, sizeof *x->patch);
    if (!refs || !x->patch)
        st = no_memory(x);
    for (size_t from = 0, to; from < n && st == KNE_OK; from = to)
    {
        for (to = from; to < n && refs[to].row->layer == refs[from].row->layer;)
            to++;
        for (int k = 0; k < 3 && st == KNE_OK; k++)
            st = make_patch(x, refs[from].row->layer, k, refs + from, refs + to);
    }
    free(refs);
    return st;
}

/* ---- files that every folder has ---- */

static kne_status
whole_file(exporter *x, const char *name, const void *data, size_t len)
{
    KNE_TRY(kne_outdir_open(x->o, name, x->err));
    KNE_TRY(kne_outdir_put(x->o, data, len, x->err));
    return kne_outdir_close(x->o, x->err);
}

/* In the format of sha256sum -c. */
static kne_status
checksums(exporter *x)
{
    int32_t n = x->o->n_files;

    KNE_TRY(kne_outdir_open(x->o, "SHA256SUMS", x->err));
    for (int32_t i = 0; i < n; i++)
    {
        const kne_outfile *f = &x->o->file[i];
        char               hex[2 * KNE_DIGEST_LEN + 3];

        for (int k = 0; k < KNE_DIGEST_LEN; k++)
            snprintf(hex + 2 * k, 3, "%02x", f->sha256[k]);
        memcpy(hex + 2 * KNE_DIGEST_LEN, "  ", 3);
        KNE_TRY(kne_outdir_put(x->o, hex, sizeof hex - 1, x->err));
        KNE_TRY(kne_outdir_put(x->o, f->name, strlen(f->name), x->err));
        KNE_TRY(kne_outdir_put(x->o, "\n", 1, x->err));
    }
    return kne_outdir_close(x->o, x->err);
}

/* ---- a folder ---- */

static void
store(void *p, kne_dtype t, size_t i, float f)
{
    char    *at = (char *) p + i * kne_dtype_size(t);
    uint16_t h;

    if (t == KNE_F32)
    {
        memcpy(at, &f, 4);
        return;
    }
    h = t == KNE_BF16 ? kne_f32_to_bf16(f) : kne_f32_to_f16(f);
    memcpy(at, &h, 2);
}

/* A matrix with its patch, some whole stored rows at a time. */
static kne_status
patched(exporter *x, const patch *p)
{
    const int32_t d = x->m->arch.d_model;
    const size_t  cols = (size_t) p->mat->cols, row = cols * kne_dtype_size(p->mat->type);
    const int64_t step = row < BLOCK ? (int64_t) (BLOCK / row) : 1;
    char         *buf = malloc((size_t) step * row);
    kne_status    st = buf ? KNE_OK : no_memory(x);

    for (int64_t r0 = 0, i = 0; r0 < p->mat->rows && st == KNE_OK; r0 += step)
    {
        int64_t n = p->mat->rows - r0 < step ? p->mat->rows - r0 : step;

        memcpy(buf, (const char *) p->mat->data + (size_t) r0 * row, (size_t) n * row);
        if (p->by_column)
            for (int64_t r = 0; r < n; r++)
                for (int32_t k = 0; k < p->n; k++)
                    store(buf + (size_t) r * row, p->mat->type, (size_t) p->neuron[k], p->eff[(size_t) k * (size_t) d + (size_t) (r0 + r)]);
        else
            for (; i < p->n && p->neuron[i] < r0 + n; i++)
                for (int32_t j = 0; j < d; j++)
                    store(buf + (size_t) (p->neuron[i] - r0) * row, p->mat->type, (size_t) j, p->eff[(size_t) i * (size_t) d + (size_t) j]);
        st = kne_outdir_put(x->o, buf, (size_t) n * row, x->err);
    }
    free(buf);
    return st;
}

static kne_status
shard(exporter *x, const kne_tensor_file *f)
{
    const char *map = f->map, *at = map;

    KNE_TRY(kne_outdir_open(x->o, f->name, x->err));
    for (int32_t i = 0; i < x->n_patches; i++)
    {
        const kne_mat *mat = x->patch[i].mat;
        const char    *data = mat->data;

        if (data < map || data >= map + f->size)
            continue;
        KNE_TRY(kne_outdir_put(x->o, at, (size_t) (data - at), x->err));
        KNE_TRY(patched(x, &x->patch[i]));
        at = data + (size_t) mat->rows * (size_t) mat->cols * kne_dtype_size(mat->type);
    }
    KNE_TRY(kne_outdir_put(x->o, at, (size_t) (map + f->size - at), x->err));
    return kne_outdir_close(x->o, x->err);
}

static bool
ends_in(const char *s, const char *const *ends)
{
    for (; *ends; ends++)
        if (strlen(s) > strlen(*ends) && strcmp(s + strlen(s) - strlen(*ends), *ends) == 0)
            return true;
    return false;
}

/* Is a link's end in the folder, or in the store of blobs of a Hugging Face cache that the folder is a snapshot of? */
static bool
stays_inside(const char *folder, const char *file)
{
    char *blobs, *place[2], *real = realpath(file, NULL);
    bool  inside = false;

    if (asprintf(&blobs, "%s/../../blobs", folder) < 0)
        blobs = NULL;
    place[0] = realpath(folder, NULL);
    place[1] = blobs ? realpath(blobs, NULL) : NULL;
    for (int i = 0; i < 2; i++)
    {
        size_t n = place[i] ? strlen(place[i]) : 0;

        inside |= real && n && strncmp(real, place[i], n) == 0 && real[n] == '/';
        free(place[i]);
    }
    free(blobs);
    free(real);
    return inside;
}

/* One entry of the folder that is no shard. */
static kne_status
other_file(exporter *x, const char *name)
{
    static const char *const weights[] = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", NULL};
    static const char *const made[] = {"/SHA256SUMS", "/README-base.md", NULL}; /* an exported folder exported again */
    char      *path, *data = NULL;
    size_t     len;
    struct stat sb;
    kne_status st = KNE_OK;

    if (asprintf(&path, "%s/%s", x->from, name) < 0)
        return no_memory(x);
    if (ends_in(path, made))
        ;
    else if (name[0] == '.' || ends_in(name, weights) || stat(path, &sb) != 0 || !S_ISREG(sb.st_mode) || !stays_inside(x->from, path))
    {
        kne_put_str(&x->skipped, name);
        x->n_skipped++;
    }
    else
    {
        st = kne_file_read(path, name, MAX_OTHER, &data, &len, x->err);
        if (st == KNE_OK)
            st = whole_file(x, strcmp(name, "README.md") == 0 ? "README-base.md" : name, data, len);
        free(data);
    }
    free(path);
    return st;
}

static int
by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static kne_status
other_files(exporter *x)
{
    struct dirent **entry;
    int             n = scandir(x->from, &entry, NULL, by_name);
    kne_status      st = KNE_OK;

    if (n < 0)
        return kne_error(x->err, KNE_ERR_IO, "cannot read model folder \"%s\"", x->from);
    for (int i = 0; i < n; i++)
    {
        const char *name = entry[i]->d_name;
        bool        done = strcmp(name, ".") == 0 || strcmp(name, "..") == 0;

        for (int32_t k = 0; k < x->m->tensors->n_files && !done; k++)
            done = strcmp(name, x->m->tensors->file[k].name) == 0;
        if (st == KNE_OK && !done)
            st = other_file(x, name);
        free(entry[i]);
    }
    free(entry);
    return st;
}

static kne_status
huggingface(exporter *x)
{
    qsort(x->patch, (size_t) x->n_patches, sizeof *x->patch, patch_order);
    for (int32_t i = 0; i < x->m->tensors->n_files; i++)
        KNE_TRY(shard(x, &x->m->tensors->file[i]));
    return other_files(x);
}

/* ---- an adapter ---- */

/* One module of the adapter: the patches of its matrix; two where gate and up are stored as one. */
typedef struct module
{
    char         name[128]; /* without what comes before the layers */
    const patch *part[2];
    int64_t      offset[2]; /* of the part's rows in the module's outputs */
    int32_t      n_parts, rank;
    int64_t      in, out;
} module;

/* Whose columns (value vectors) an adapter's A picks out with ones; else B does with rows (keys). */
static bool
is_value(const module *m)
{
    return m->part[0]->matrix == KNE_MATRIX_DOWN;
}

/* n: (layers * 3) modules of the patches, in order of layer. */
static kne_status
make_modules(exporter *x, const kne_tensor_list *list, module *mod, int32_t *n)
{
    static const kne_slot slot_of[3] = {KNE_SLOT_DOWN, KNE_SLOT_GATE, KNE_SLOT_UP};
    const kne_arch       *a = &x->m->arch;

    *n = 0;
    for (int32_t i = 0; i < x->n_patches; i++)
    {
        const patch *p = &x->patch[i];
        bool         fused = p->matrix != KNE_MATRIX_DOWN && list->name[KNE_SLOT_GATE_UP];
        const char  *name = list->name[fused ? KNE_SLOT_GATE_UP : slot_of[p->matrix]], *at = strstr(name, "%d");
        char         made[sizeof mod->name];
        char        *end;
        module      *m = *n ? &mod[*n - 1] : NULL;

        if (!at)
            return kne_error(x->err, KNE_ERR_INTERNAL, "tensor %s is of no layer", name);
        snprintf(made, sizeof made, "%.*s%d%s", (int) (at - name), name, (int) p->layer, at + 2);
        end = strstr(made, ".weight");
        if (!end)
            return kne_error(x->err, KNE_ERR_UNSUPPORTED, "an adapter cannot change tensor %s", made);
        *end = '\0';
        if (!m || strcmp(m->name, made) != 0)
        {
            m = &mod[(*n)++];
            *m = (module) {.in = a->d_model, .out = fused ? 2 * (int64_t) a->d_ff : a->d_ff};
            if (p->matrix == KNE_MATRIX_DOWN)
                m->in = a->d_ff, m->out = a->d_model;
            memcpy(m->name, made, sizeof made);
        }
        m->part[m->n_parts] = p;
        m->offset[m->n_parts++] = fused && p->matrix == KNE_MATRIX_UP ? a->d_ff : 0;
        m->rank += p->n;
    }
    return KNE_OK;
}

/* Row i of the module's changes: its neuron as an index of the module's inputs or outputs, and the change itself. */
static void
change(const exporter *x, const module *m, int32_t i, int64_t *index, float *delta)
{
    const int32_t d = x->m->arch.d_model;
    int           k = i >= m->part[0]->n;
    const patch  *p = m->part[k];

    i -= k ? m->part[0]->n : 0;
    *index = m->offset[k] + p->neuron[i];
    for (int32_t j = 0; delta && j < d; j++)
        delta[j] = p->eff[(size_t) i * (size_t) d + (size_t) j] - base_at(p, p->neuron[i], j);
}

/* A is (rank, in), B is (out, rank). The factor of changes, and the factor of ones. */
static kne_status
factor(exporter *x, const module *m, bool b)
{
    const int32_t d = x->m->arch.d_model;
    const int64_t rows = b ? m->out : m->rank, cols = b ? m->rank : m->in;
    int64_t      *index = malloc((size_t) m->rank * sizeof *index);
    float        *delta = malloc((size_t) m->rank * (size_t) d * sizeof *delta);
    float        *row = malloc((size_t) cols * sizeof *row);
    kne_status    st = index && delta && row ? KNE_OK : no_memory(x);

    for (int32_t i = 0; i < m->rank && st == KNE_OK; i++)
        change(x, m, i, &index[i], delta + (size_t) i * (size_t) d);
    for (int64_t r = 0; r < rows && st == KNE_OK; r++)
    {
        memset(row, 0, (size_t) cols * sizeof *row);
        if (is_value(m) && b)
            for (int32_t i = 0; i < m->rank; i++)
                row[i] = delta[(size_t) i * (size_t) d + (size_t) r];
        else if (is_value(m))
            row[index[r]] = 1;
        else if (!b)
            memcpy(row, delta + (size_t) r * (size_t) d, (size_t) d * sizeof *row);
        else
            for (int32_t i = 0; i < m->rank; i++)
                row[i] = index[i] == r;
        st = kne_outdir_put(x->o, row, (size_t) cols * sizeof *row, x->err);
    }
    free(index);
    free(delta);
    free(row);
    return st;
}

static kne_status
adapter_weights(exporter *x, const char *prefix, const module *mod, int32_t n)
{
    kne_wbuf   h = {.grow = x->skipped.grow};
    int64_t    at = 0;
    uint64_t   len;
    kne_status st;

    kne_put(&h, "{\"__metadata__\":{\"format\":\"pt\"}", 31);
    for (int32_t i = 0; i < n; i++)
        for (int b = 0; b < 2; b++)
        {
            int64_t rows = b ? mod[i].out : mod[i].rank, cols = b ? mod[i].rank : mod[i].in, end = at + rows * cols * 4;
            char    text[512];
            int     w = snprintf(text, sizeof text,
                                 ",\"base_model.model.%s%s.lora_%c.weight\":{\"dtype\":\"F32\",\"shape\":[%lld,%lld],\"data_offsets\":[%lld,%lld]}",
                                 prefix, mod[i].name, b ? 'B' : 'A', (long long) rows, (long long) cols, (long long) at, (long long) end);

            kne_put(&h, text, (size_t) w);
            at = end;
        }
    kne_put_u8(&h, '}');
    while (h.len % 8)
        kne_put_u8(&h, ' ');
    if (h.bad)
    {
        free(h.p);
        return no_memory(x);
    }
    len = h.len;
    st = kne_outdir_open(x->o, "adapter_model.safetensors", x->err);
    if (st == KNE_OK)
        st = kne_outdir_put(x->o, &len, sizeof len, x->err);
    if (st == KNE_OK)
        st = kne_outdir_put(x->o, h.p, h.len, x->err);
    free(h.p);
    for (int32_t i = 0; i < n; i++)
        for (int b = 0; b < 2 && st == KNE_OK; b++)
            st = factor(x, &mod[i], b);
    return st == KNE_OK ? kne_outdir_close(x->o, x->err) : st;
}

static kne_status
adapter_config(exporter *x, const module *mod, int32_t n)
{
    cJSON     *c = cJSON_CreateObject();
    cJSON     *targets = cJSON_AddArrayToObject(c, "target_modules");
    cJSON     *ranks = cJSON_AddObjectToObject(c, "rank_pattern"), *alphas = cJSON_AddObjectToObject(c, "alpha_pattern");
    char      *text = NULL;
    bool       whole = c && targets && ranks && alphas;
    kne_status st;

    whole = whole && cJSON_AddStringToObject(c, "peft_type", "LORA") && cJSON_AddStringToObject(c, "task_type", "CAUSAL_LM") &&
            cJSON_AddStringToObject(c, "base_model_name_or_path", x->from) && cJSON_AddNumberToObject(c, "r", mod[0].rank) &&
            cJSON_AddNumberToObject(c, "lora_alpha", mod[0].rank) && cJSON_AddNumberToObject(c, "lora_dropout", 0) &&
            cJSON_AddStringToObject(c, "bias", "none") && cJSON_AddBoolToObject(c, "fan_in_fan_out", x->m->arch.conv1d) &&
            cJSON_AddBoolToObject(c, "inference_mode", true);
    for (int32_t i = 0; i < n && whole; i++)
    {
        cJSON *name = cJSON_CreateString(mod[i].name);

        whole = name && cJSON_AddItemToArray(targets, name) && cJSON_AddNumberToObject(ranks, mod[i].name, mod[i].rank) &&
                cJSON_AddNumberToObject(alphas, mod[i].name, mod[i].rank);
    }
    if (whole)
        text = cJSON_Print(c);
    st = text ? whole_file(x, "adapter_config.json", text, strlen(text)) : no_memory(x);
    cJSON_free(text);
    cJSON_Delete(c);
    return st;
}

static kne_status
peft(exporter *x)
{
    kne_tensor_list list;
    kne_arch        arch;
    char           *path, *config = NULL;
    size_t          len;
    module         *mod = NULL;
    int32_t         n = 0;
    kne_status      st;

    if (x->n_patches == 0)
    {
        kne_error(x->err, KNE_ERR_INVALID, "an adapter without edits cannot be exported");
        kne_error_detail(x->err, "No edit in force changes a weight.");
        return KNE_ERR_INVALID;
    }
    if (asprintf(&path, "%s/config.json", x->from) < 0)
        return no_memory(x);
    st = kne_file_read(path, "config.json", MAX_OTHER, &config, &len, x->err);
    free(path);
    if (st == KNE_OK)
        st = kne_arch_parse(config, len, &arch, &list, x->err);
    free(config);
    if (st == KNE_OK && !(mod = calloc((size_t) x->n_patches + 1, sizeof *mod)))
        st = no_memory(x);
    if (st == KNE_OK)
        st = make_modules(x, &list, mod, &n);
    if (st == KNE_OK)
        st = adapter_config(x, mod, n);
    if (st == KNE_OK)
        st = adapter_weights(x, list.prefix, mod, n);
    free(mod);
    return st;
}

/* ---- all of it ---- */

/* Open what was written as anybody would. */
static kne_status
check_written(exporter *x, char fingerprint[65])
{
    kne_model *m = NULL;

    KNE_TRY(kne_model_open(x->o->temp, &m, x->err));
    memcpy(fingerprint, m->fingerprint, sizeof m->fingerprint);
    kne_model_close(m);
    return KNE_OK;
}

static kne_status
write_all(exporter *x, const char *fingerprint, const kne_view *view, int format, const char *card, size_t card_len, char written[65])
{
    KNE_TRY(kne_model_open(x->from, &x->m, x->err));
    if (strcmp(x->m->fingerprint, fingerprint) != 0)
        return kne_error(x->err, KNE_ERR_FORMAT, "model folder \"%s\" changed since it was loaded", x->from);
    KNE_TRY(make_patches(x, view));
    KNE_TRY(format == KNE_EXPORT_PEFT ? peft(x) : huggingface(x));
    KNE_TRY(whole_file(x, "README.md", card, card_len));
    KNE_TRY(checksums(x));
    if (!kne_tensors_unchanged(x->m->tensors, x->err))
        return x->err->code;
    if (format == KNE_EXPORT_HUGGINGFACE)
        KNE_TRY(check_written(x, written));
    return kne_outdir_commit(x->o, x->err);
}

kne_status
kne_export(const char *model_path, const char *fingerprint, const kne_view *view, int format, const char *path, const char *card,
           size_t card_len, int (*yield)(void *ctx), void *ctx, kne_wbuf *answer, kne_err *err)
{
    exporter   x = {.from = model_path, .err = err, .skipped = {.grow = answer->grow}};
    char       written[65] = "";
    kne_status st = kne_outdir_new(path, &x.o, err);

    if (st == KNE_OK)
    {
        x.o->yield = yield;
        x.o->ctx = ctx;
        st = write_all(&x, fingerprint, view, format, card, card_len, written);
    }
    if (st == KNE_OK && x.skipped.bad)
        st = no_memory(&x);
    if (st == KNE_OK)
    {
        kne_put_str(answer, written);
        kne_put_i64(answer, x.n_rows);
        kne_put_u32(answer, (uint32_t) x.o->n_files);
        for (int32_t i = 0; i < x.o->n_files; i++)
        {
            kne_put_str(answer, x.o->file[i].name);
            kne_put_i64(answer, x.o->file[i].bytes);
            kne_put(answer, x.o->file[i].sha256, KNE_DIGEST_LEN);
        }
        kne_put_u32(answer, x.n_skipped);
        kne_put(answer, x.skipped.p, x.skipped.len);
    }
    for (int32_t i = 0; i < x.n_patches; i++)
    {
        free(x.patch[i].neuron);
        free(x.patch[i].eff);
    }
    free(x.patch);
    free(x.skipped.p);
    kne_model_close(x.m);
    kne_outdir_free(x.o);
    return st;
}
