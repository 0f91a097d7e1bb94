/*
 * kne_model.c - opens a model folder: binds every tensor that kne_arch lists to
 * its place in the kne_model, checks its shape, converts the small ones,
 * and digests the folder (see kne_model.h).
 *
 * Invariant: a model that opened can be run. No pointer that the graph will
 * follow is missing, no matrix has another shape than the descriptor says, and
 * no tensor of the files was left aside without the family's consent.
 */
#include "kne_backend.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kne_arch.h"
#include "kne_safetensors.h"

#define MAX_CONFIG ((size_t) 1 << 20)
#define MAX_TOKENIZER ((size_t) 256 << 20)

/* Where the graph looks for a slot's tensor. */
#define IN_MODEL(member) offsetof(kne_model, member)
#define IN_LAYER(member) offsetof(kne_layer, member)
static const size_t place[KNE_SLOT_COUNT] = {
    [KNE_SLOT_EMBED] = IN_MODEL(embed),
    [KNE_SLOT_POS] = IN_MODEL(pos_embed),
    [KNE_SLOT_FINAL_NORM_W] = IN_MODEL(final_norm_w),
    [KNE_SLOT_FINAL_NORM_B] = IN_MODEL(final_norm_b),
    [KNE_SLOT_HEAD] = IN_MODEL(head),
    [KNE_SLOT_HEAD_B] = IN_MODEL(head_b),
    [KNE_SLOT_NORM1_W] = IN_LAYER(norm1_w),
    [KNE_SLOT_NORM1_B] = IN_LAYER(norm1_b),
    [KNE_SLOT_NORM2_W] = IN_LAYER(norm2_w),
    [KNE_SLOT_NORM2_B] = IN_LAYER(norm2_b),
    [KNE_SLOT_Q] = IN_LAYER(q),
    [KNE_SLOT_K] = IN_LAYER(k),
    [KNE_SLOT_V] = IN_LAYER(v),
    [KNE_SLOT_QKV] = IN_LAYER(q), /* split below, or left whole */
    [KNE_SLOT_O] = IN_LAYER(o),
    [KNE_SLOT_Q_B] = IN_LAYER(q_b),
    [KNE_SLOT_K_B] = IN_LAYER(k_b),
    [KNE_SLOT_V_B] = IN_LAYER(v_b),
    [KNE_SLOT_QKV_B] = IN_LAYER(q_b),
    [KNE_SLOT_O_B] = IN_LAYER(o_b),
    [KNE_SLOT_Q_NORM] = IN_LAYER(q_norm),
    [KNE_SLOT_K_NORM] = IN_LAYER(k_norm),
    [KNE_SLOT_GATE] = IN_LAYER(gate),
    [KNE_SLOT_UP] = IN_LAYER(up),
    [KNE_SLOT_GATE_UP] = IN_LAYER(gate), /* split below */
    [KNE_SLOT_DOWN] = IN_LAYER(down),
    [KNE_SLOT_GATE_B] = IN_LAYER(gate_b),
    [KNE_SLOT_UP_B] = IN_LAYER(up_b),
    [KNE_SLOT_DOWN_B] = IN_LAYER(down_b),
};

typedef struct binder
{
    kne_model             *m;
    const kne_tensor_list *list;
    const char            *prefix;
    uint8_t               *used; /* one per tensor of the files */
    kne_err               *err;
} binder;

static void
tensor_name(const binder *b, kne_slot slot, int32_t layer, char *buf, size_t size)
{
    const char *prefix = slot == KNE_SLOT_HEAD || slot == KNE_SLOT_HEAD_B ? "" : b->prefix;
    const char *name = b->list->name[slot], *at = strstr(name, "%d");

    if (at)
        snprintf(buf, size, "%s%.*s%d%s", prefix, (int) (at - name), name, (int) layer, at + 2);
    else
        snprintf(buf, size, "%s%s", prefix, name);
}

/* Find the tensor of a slot and check it against config.json. */
static kne_status
find(binder *b, kne_slot slot, int32_t layer, const kne_tensor **out)
{
    const kne_arch   *a = &b->m->arch;
    const kne_tensor *t;
    char              name[128];
    int64_t           rows, cols;
    int32_t           rank;

    tensor_name(b, slot, layer, name, sizeof name);
    if (!(t = kne_tensors_find(b->m->tensors, name)))
    {
        kne_error(b->err, KNE_ERR_FORMAT, "tensor %s is missing", name);
        kne_error_detail(b->err,
                         "A %s model with %d layers as config.json describes it has this tensor.",
                         a->family, a->n_layers);
        return KNE_ERR_FORMAT;
    }
    if (!t->usable)
    {
        kne_error(b->err, KNE_ERR_UNSUPPORTED, "tensor %s has dtype %s", name, t->type_name);
        kne_error_hint(b->err, "Weights must be F32, F16 or BF16.");
        return KNE_ERR_UNSUPPORTED;
    }
    kne_arch_shape(a, b->list, slot, &rows, &cols, &rank);
    if (t->rank != rank || t->shape[0] != rows || (rank == 2 && t->shape[1] != cols))
    {
        char shape[64] = "a scalar";

        if (t->rank == 1)
            snprintf(shape, sizeof shape, "shape [%lld]", (long long) t->shape[0]);
        else if (t->rank == 2)
            snprintf(shape, sizeof shape, "shape [%lld, %lld]", (long long) t->shape[0],
                     (long long) t->shape[1]);
        else if (t->rank > 2)
            snprintf(shape, sizeof shape, "%d dimensions", (int) t->rank);
        if (rank == 1)
            kne_error(b->err, KNE_ERR_FORMAT, "tensor %s has %s, config.json says [%lld]", name,
                      shape, (long long) rows);
        else
            kne_error(b->err, KNE_ERR_FORMAT, "tensor %s has %s, config.json says [%lld, %lld]",
                      name, shape, (long long) rows, (long long) cols);
        return KNE_ERR_FORMAT;
    }
    b->used[t - b->m->tensors->tensor] = 1;
    *out = t;
    return KNE_OK;
}

static kne_mat
as_matrix(const kne_arch *a, const kne_tensor *t, kne_slot slot)
{
    return (kne_mat) {
        .data = t->data,
        .type = t->type,
        .transposed = a->conv1d && slot >= KNE_SLOT_FIRST_OF_LAYER,
        .rows = t->shape[0],
        .cols = t->shape[1],
        .ld = t->shape[1],
    };
}

/* Outputs [from, from + n) of a matrix, as a view: rows, or columns where stored transposed. */
static kne_mat
outputs(const kne_mat *w, int64_t from, int64_t n)
{
    kne_mat v = *w;

    v.data = (const char *) w->data +
             (size_t) (w->transposed ? from : from * w->ld) * kne_dtype_size(w->type);
    *(w->transposed ? &v.cols : &v.rows) = n;
    return v;
}

/* A vector's floats in the arena; NULL in the counting run. */
static kne_status
as_floats(binder *b, const kne_tensor *t, const float **out)
{
    float *p = kne_arena_take(&b->m->arena, (size_t) t->n_elem, sizeof *p);

    for (int64_t i = 0; p && i < t->n_elem; i++)
    {
        p[i] = kne_load(t->data, t->type, (size_t) i);
        if (!isfinite(p[i]))
            return kne_error(b->err, KNE_ERR_FORMAT, "tensor %s holds %s at %lld", t->name,
                             isnan(p[i]) ? "NaN" : "infinity", (long long) i);
    }
    *out = p;
    return KNE_OK;
}

/* Bind slots [first, last) into the struct at base (model or layer). */
static kne_status
bind_slots(binder *b, int first, int last, int32_t layer, char *base)
{
    const kne_tensor *t = NULL;

    for (int s = first; s < last; s++)
    {
        if (!b->list->name[s] || (s == KNE_SLOT_HEAD && b->m->arch.tied_head))
            continue;
        KNE_TRY(find(b, (kne_slot) s, layer, &t));
        if (t->rank == 2)
            *(kne_mat *) (base + place[s]) = as_matrix(&b->m->arch, t, (kne_slot) s);
        else
            KNE_TRY(as_floats(b, t, (const float **) (base + place[s])));
    }
    return KNE_OK;
}

/*
 * Take fused matrices apart where a part is a view. GPT-NeoX's rows go head by
 * head (q, k, v of head 0, then of head 1, ...), which no single stride
 * describes: there layer.q and layer.q_b stay whole and k, v stay absent.
 */
static void
split_fused(const binder *b, kne_layer *y)
{
    const kne_arch *a = &b->m->arch;
    int64_t dq = (int64_t) a->n_heads * a->head_dim, dkv = (int64_t) a->n_kv_heads * a->head_dim;

    if (a->qkv == KNE_QKV_THIRDS)
    {
        kne_mat whole = y->q;

        y->q = outputs(&whole, 0, dq);
        y->k = outputs(&whole, dq, dkv);
        y->v = outputs(&whole, dq + dkv, dkv);
        if (y->q_b)
        {
            y->k_b = y->q_b + dq;
            y->v_b = y->k_b + dkv;
        }
    }
    if (b->list->name[KNE_SLOT_GATE_UP])
    {
        kne_mat whole = y->gate;

        y->gate = outputs(&whole, 0, a->d_ff);
        y->up = outputs(&whole, a->d_ff, a->d_ff);
    }
}

/* One walk over all tensors: the first counts the arena, the second fills it. */
static kne_status
bind_all(binder *b)
{
    kne_model *m = b->m;
    kne_arch  *a = &m->arch;
    size_t     n_angles = 0;
    float     *cos_table, *sin_table;

    m->layer = kne_arena_take(&m->arena, (size_t) a->n_layers, sizeof *m->layer);
    KNE_TRY(bind_slots(b, 0, KNE_SLOT_FIRST_OF_LAYER, 0, (char *) m));
    for (int32_t l = 0; l < a->n_layers; l++)
    {
        kne_layer counting = {0}, *y = m->layer ? &m->layer[l] : &counting;

        KNE_TRY(bind_slots(b, KNE_SLOT_FIRST_OF_LAYER, KNE_SLOT_COUNT, l, (char *) y));
        split_fused(b, y);
    }
    if (a->position == KNE_POS_LEARNED)
        m->pos_embed.rows = a->n_ctx;
    else
    {
        n_angles = (size_t) a->n_ctx * (size_t) (a->rotary_dim / 2);
        cos_table = kne_arena_take(&m->arena, n_angles, sizeof(float));
        sin_table = kne_arena_take(&m->arena, n_angles, sizeof(float));
        if (cos_table && sin_table)
            kne_arch_rope(a, cos_table, sin_table);
        m->rope_cos = cos_table;
        m->rope_sin = sin_table;
    }
    if (a->tied_head)
        m->head = m->embed;
    return KNE_OK;
}

/*
 * Some files of tied models repeat the embedding as the head. Fine if it is
 * the same; if it differs, implementations disagree about which one counts.
 */
static kne_status
check_tied_head(binder *b)
{
    const kne_tensors *ts = b->m->tensors;
    const kne_tensor  *head, *embed = NULL;
    char               name[128];

    tensor_name(b, KNE_SLOT_HEAD, 0, name, sizeof name);
    if (!b->m->arch.tied_head || !(head = kne_tensors_find(ts, name)))
        return KNE_OK;
    KNE_TRY(find(b, KNE_SLOT_EMBED, 0, &embed));
    if (strcmp(head->type_name, embed->type_name) || head->bytes != embed->bytes ||
        memcmp(head->data, embed->data, head->bytes))
    {
        kne_error(b->err, KNE_ERR_FORMAT,
                  "tensor %s differs from the embedding, though the head is tied to it", name);
        kne_error_hint(b->err, "Set tie_word_embeddings to false in config.json if the head is "
                               "one of its own.");
        return KNE_ERR_FORMAT;
    }
    b->used[head - ts->tensor] = 1;
    return KNE_OK;
}

/* A tensor that nothing asked for means a model that computes something else. */
static kne_status
check_unused(binder *b)
{
    const kne_tensors *ts = b->m->tensors;

    for (int64_t i = 0; i < ts->n; i++)
    {
        const char        *name = ts->tensor[i].name;
        size_t             len = strlen(name), end;
        const char *const *p = b->list->ignored;

        if (b->used[i])
            continue;
        for (; *p; p++)
            if ((end = strlen(*p)) <= len && !strcmp(name + len - end, *p))
                break;
        if (!*p)
        {
            kne_error(b->err, KNE_ERR_UNSUPPORTED,
                      "tensor %s has no place in a %s model as config.json describes it",
                      kne_quote(name).s, b->m->arch.family);
            kne_error_hint(b->err, "The model would compute something else than its weights were "
                                   "trained for.");
            return KNE_ERR_UNSUPPORTED;
        }
    }
    return KNE_OK;
}

static kne_status
bind_tensors(kne_model *m, const kne_tensor_list *list, kne_err *err)
{
    binder     b = {.m = m, .list = list, .prefix = list->prefix, .err = err};
    char       name[128];
    kne_status st;

    tensor_name(&b, KNE_SLOT_EMBED, 0, name, sizeof name);
    if (!kne_tensors_find(m->tensors, name) &&
        kne_tensors_find(m->tensors, list->name[KNE_SLOT_EMBED])) /* the bare model's names */
        b.prefix = "";
    if (!(b.used = calloc((size_t) m->tensors->n + 1, 1)))
        return kne_error(err, KNE_ERR_NOMEM, "out of memory opening the model");
    if ((st = bind_all(&b)) == KNE_OK && (st = check_tied_head(&b)) == KNE_OK &&
        (st = check_unused(&b)) == KNE_OK && (st = kne_arena_commit(&m->arena, err)) == KNE_OK)
        st = bind_all(&b);
    free(b.used);
    if (st == KNE_OK)
    {
        m->dtype = m->layer[0].down.type;
        m->weight_bytes = m->tensors->bytes;
    }
    return st;
}

static kne_status
check_tokenizer(const kne_model *m, kne_err *err)
{
    int32_t n = kne_tokenizer_vocab_size(m->tokenizer);

    if (n > m->arch.vocab_size)
    {
        kne_error(err, KNE_ERR_FORMAT,
                  "tokenizer.json gives token ids up to %d, but the embedding has %d rows", n - 1,
                  m->arch.vocab_size);
        kne_error_hint(err, "The tokenizer belongs to another model, or tokens were added without "
                            "resizing the embedding.");
        return KNE_ERR_FORMAT;
    }
    return KNE_OK;
}

/* ---- fingerprint ---- */

#define EDGE ((size_t) 64 << 10)
#define STEP ((size_t) 1 << 20)
#define SAMPLE ((size_t) 4 << 10)

/* Each item with its length before it, so that no two folders run together to the same bytes. */
static void
digest_item(void *h, const void *data, size_t len)
{
    uint8_t le[8];

    for (int i = 0; i < 8; i++)
        le[i] = (uint8_t) ((uint64_t) len >> 8 * i);
    kne_sha256_add(h, le, sizeof le);
    if (len)
        kne_sha256_add(h, data, len);
}

/* Start reading a range without waiting for it. Only a hint: failure costs time, nothing else. */
static void
want_range(void *page_size, const void *data, size_t len)
{
    uintptr_t from = (uintptr_t) data & ~(uintptr_t) (*(size_t *) page_size - 1);

    if (len)
        madvise((void *) from, (uintptr_t) data + len - from, MADV_WILLNEED);
}

/* Show use() the parts of a tensor that count for the fingerprint. */
static void
each_part(const kne_tensor *t, void (*use)(void *ctx, const void *data, size_t len), void *ctx)
{
    const char *p = t->data;

    if (t->bytes <= STEP)
    {
        use(ctx, p, t->bytes);
        return;
    }
    use(ctx, p, EDGE);
    for (size_t at = STEP; at + SAMPLE <= t->bytes - EDGE; at += STEP)
        use(ctx, p + at, SAMPLE);
    use(ctx, p + t->bytes - EDGE, EDGE);
}

static kne_status
make_fingerprint(kne_model *m, const char *config, size_t config_len, const char *tok,
                 size_t tok_len, kne_err *err)
{
    const kne_tensors *ts = m->tensors;
    kne_sha256        *h = kne_sha256_new();
    size_t             page_size = (size_t) sysconf(_SC_PAGESIZE);
    uint8_t            digest[KNE_DIGEST_LEN];

    if (!h)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory computing the fingerprint");

    /* Reading ahead around each sample would read the whole file: ask for the samples alone. */
    for (int32_t i = 0; i < ts->n_files; i++)
        madvise(ts->file[i].map, ts->file[i].size, MADV_RANDOM);
    for (int64_t i = 0; i < ts->n; i++)
        each_part(&ts->tensor[i], want_range, &page_size);

    digest_item(h, config, config_len);
    digest_item(h, tok, tok_len);
    for (int64_t i = 0; i < ts->n; i++)
    {
        const kne_tensor *t = &ts->tensor[i];

        digest_item(h, t->name, strlen(t->name));
        digest_item(h, t->type_name, strlen(t->type_name));
        digest_item(h, t->shape, (size_t) t->rank * sizeof t->shape[0]);
        each_part(t, digest_item, h);
    }
    kne_sha256_end(h, digest);
    for (int32_t i = 0; i < ts->n_files; i++)
        madvise(ts->file[i].map, ts->file[i].size, MADV_NORMAL);
    for (int i = 0; i < KNE_DIGEST_LEN; i++)
        snprintf(m->fingerprint + 2 * i, 3, "%02x", digest[i]);
    return KNE_OK;
}

/* ---- open and close ---- */

static kne_status
read_in(const char *dir, const char *name, size_t max, char **buf, size_t *len, kne_err *err)
{
    char      *path;
    kne_status st;

    if (asprintf(&path, "%s/%s", dir, name) < 0)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory opening the model");
    st = kne_file_read(path, name, max, buf, len, err);
    free(path);
    return st;
}

static kne_status
check_folder(const char *path, kne_err *err)
{
    struct stat st;

    if (stat(path, &st) != 0)
        return kne_error(err, KNE_ERR_IO, "cannot open model folder \"%s\": %s", path,
                         strerror(errno));
    if (!S_ISDIR(st.st_mode))
    {
        kne_error(err, KNE_ERR_IO, "\"%s\" is not a folder", path);
        kne_error_hint(err, "Give the folder that holds config.json, the weights and "
                            "tokenizer.json.");
        return KNE_ERR_IO;
    }
    return KNE_OK;
}

kne_status
kne_model_open(const char *path, kne_model **out, kne_err *err)
{
    char           *config = NULL, *tok = NULL;
    size_t          config_len = 0, tok_len = 0;
    kne_tensor_list list;
    kne_err         scratch;
    kne_model      *m;
    kne_status      st;

    if (!err)
        err = &scratch;
    KNE_TRY(check_folder(path, err));
    if (!(m = calloc(1, sizeof *m)))
        return kne_error(err, KNE_ERR_NOMEM, "out of memory opening the model");
    if ((st = read_in(path, "config.json", MAX_CONFIG, &config, &config_len, err)) != KNE_OK ||
        (st = kne_arch_parse(config, config_len, &m->arch, &list, err)) != KNE_OK)
        goto out;
    if ((st = read_in(path, "tokenizer.json", MAX_TOKENIZER, &tok, &tok_len, err)) != KNE_OK)
    {
        if (st == KNE_ERR_IO)
            kne_error_hint(err, "A tokenizer in another format (tokenizer.model, vocab.json) "
                                "must be saved as tokenizer.json first.");
        goto out;
    }
    if ((st = kne_tensors_open(path, &m->tensors, err)) != KNE_OK ||
        (st = bind_tensors(m, &list, err)) != KNE_OK ||
        (st = kne_tokenizer_parse(tok, tok_len, &m->tokenizer, err)) != KNE_OK ||
        (st = check_tokenizer(m, err)) != KNE_OK)
        goto out;
    st = make_fingerprint(m, config, config_len, tok, tok_len, err);
out:
    free(config);
    free(tok);
    if (st == KNE_OK)
        *out = m;
    else
    {
        kne_model_close(m);
        if (!err->detail[0])
            kne_error_detail(err, "The model folder is \"%s\".", path);
    }
    return st;
}

void
kne_model_close(kne_model *m)
{
    if (!m)
        return;
    kne_tokenizer_free(m->tokenizer);
    kne_tensors_close(m->tensors);
    if (m->device)
        m->device->release(m->device->ctx, m->device_block);
    kne_arena_free(&m->arena);
    free(m);
}
