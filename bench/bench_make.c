/*
 * bench_make.c - what the other benchmarks need and nobody should download: model folders of a known shape with random
 * weights, and a list of edits.
 *
 *   bench_make gpt2 DIR FACTS RELATIONS       GPT-2 small, float32, 0.5 GB, with a byte-level tokenizer in which the
 *                                             words of the two tables are one token each
 *   bench_make llama2-7b DIR TOKENIZER.JSON   Llama-2-7B, bfloat16, three shards and an index, 13.5 GB
 *   bench_make edits FACTS RELATIONS N        N edits on stdout, as bench_peer, bench_phases and peer_torch.py read them:
 *                                             edit <tab> object <tab> prompt ... / anchor <tab> object <tab> prompt
 *
 * FACTS, RELATIONS: as models/atlas. Everything is seeded: the same call, the same bytes.
 */
#include "kne_base.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MAX_ROWS      20000
#define MAX_TENSORS   512
#define N_PHRASINGS   3
#define N_ANCHORS     8

static void __attribute__((noreturn, format(printf, 1, 2)))
die(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    fprintf(stderr, "bench_make: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    exit(1);
}

static FILE *
create(const char *dir, const char *name)
{
    char  path[4096];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (!(f = fopen(path, "wb")))
        die("%s: %s", path, strerror(errno));
    return f;
}

static char *
slurp(const char *path)
{
    FILE  *f = fopen(path, "rb");
    char  *p = calloc(1, (64 << 20) + 1);
    size_t n;

    if (!f || !p)
        die("%s: %s", path, strerror(errno));
    n = fread(p, 1, 64 << 20, f);
    p[n] = '\0';
    fclose(f);
    return p;
}

/* ---- tables ---- */

typedef struct fact
{
    char *subject, *relation, *object;
} fact;

typedef struct relation
{
    char *name, *phrasing[N_PHRASINGS];
    int   n;
} relation;

static fact     facts[MAX_ROWS];
static relation relations[256];
static int      n_facts, n_relations;

static void
read_tables(const char *facts_path, const char *relations_path)
{
    char *text = slurp(relations_path), *save, *line;

    for (line = strtok_r(text, "\n", &save); line && n_relations < 256; line = strtok_r(NULL, "\n", &save))
    {
        relation *r = &relations[n_relations++];
        char     *more;

        r->name = strsep(&line, "\t");
        r->phrasing[r->n++] = strsep(&line, "\t");
        /* {"a","b"}; one with a quote of its own is left out */
        for (more = strsep(&line, "\t"); more && r->n < N_PHRASINGS && (more = strchr(more, '"'));)
        {
            char *end = strchr(++more, '"');

            if (!end)
                break;
            *end = '\0';
            if (!strchr(more, '\\') && strstr(more, "{}"))
                r->phrasing[r->n++] = more;
            more = end + 1;
        }
    }
    text = slurp(facts_path);
    for (line = strtok_r(text, "\n", &save); line && n_facts < MAX_ROWS; line = strtok_r(NULL, "\n", &save))
    {
        fact *f = &facts[n_facts];

        f->subject = strsep(&line, "\t");
        f->relation = strsep(&line, "\t");
        f->object = strsep(&line, "\t");
        n_facts += f->object != NULL;
    }
    if (!n_facts || !n_relations)
        die("no facts or no relations");
}

static const relation *
relation_of(const fact *f)
{
    for (int i = 0; i < n_relations; i++)
        if (strcmp(relations[i].name, f->relation) == 0)
            return &relations[i];
    return NULL;
}

static void
print_prompt(FILE *out, const char *phrasing, const char *subject)
{
    const char *at = strstr(phrasing, "{}");

    fprintf(out, "\t%.*s%s%s", (int) (at - phrasing), phrasing, subject, at + 2);
}

/* Another fact of the relation, by chance; -1 after many tries. */
static int
other_fact(const fact *f, uint64_t *rng, bool same_subject_too)
{
    for (int try = 0; try < 10000; try++)
    {
        int         i = (int) (kne_random_next(rng) % (uint64_t) n_facts);
        const fact *g = &facts[i];

        if (strcmp(g->relation, f->relation) == 0 && strcmp(g->object, f->object) != 0 &&
            (same_subject_too || strcmp(g->subject, f->subject) != 0))
            return i;
    }
    return -1;
}

static void
make_edits(FILE *out, int n)
{
    uint64_t rng = 7;

    for (int done = 0, tries = 0; done < n && tries < 100 * n; tries++)
    {
        const fact     *f = &facts[kne_random_next(&rng) % (uint64_t) n_facts];
        const relation *r = relation_of(f);
        int             o = r ? other_fact(f, &rng, true) : -1;

        if (o < 0)
            continue;
        fprintf(out, "edit\t%s", facts[o].object);
        for (int k = 0; k < r->n; k++)
            print_prompt(out, r->phrasing[k], f->subject);
        fprintf(out, "\n");
        for (int k = 0; k < N_ANCHORS; k++)
        {
            int a = other_fact(f, &rng, false);

            if (a < 0)
                break;
            fprintf(out, "anchor\t%s", facts[a].object);
            print_prompt(out, r->phrasing[0], facts[a].subject);
            fprintf(out, "\n");
        }
        done++;
    }
}

/* ---- tokenizer ---- */

/* The character that byte-level BPE writes for a byte, as UTF-8. */
static int
byte_char(int b, char *out)
{
    int c = b, n = 0;

    if (!((b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff)))
    {
        for (int k = 0; k < b; k++)
            n += !((k >= '!' && k <= '~') || (k >= 0xa1 && k <= 0xac) || (k >= 0xae && k <= 0xff));
        c = 256 + n;
    }
    if (c < 0x80)
    {
        out[0] = (char) c;
        return 1;
    }
    out[0] = (char) (0xc0 | c >> 6);
    out[1] = (char) (0x80 | (c & 0x3f));
    return 2;
}

static char words[MAX_ROWS][64];
static int  n_words;

/* Words of letters become tokens, with and without the space before them. */
static void
add_words(const char *text)
{
    while (*text)
    {
        char   w[64] = "";
        size_t n = 0;

        while (*text && !((*text | 32) >= 'a' && (*text | 32) <= 'z'))
            text++;
        while (((*text | 32) >= 'a' && (*text | 32) <= 'z') && n < sizeof w - 1)
            w[n++] = *text++;
        bool known = n == 0;
        for (int i = 0; i < n_words && !known; i++)
            known = strcmp(words[i], w) == 0;
        if (!known && n_words < MAX_ROWS)
            strcpy(words[n_words++], w);
    }
}

static void
make_tokenizer(const char *dir)
{
    FILE *f = create(dir, "tokenizer.json");
    int   id = 0;

    for (int i = 0; i < n_facts; i++)
    {
        add_words(facts[i].subject);
        add_words(facts[i].object);
    }
    for (int i = 0; i < n_relations; i++)
        for (int k = 0; k < relations[i].n; k++)
            add_words(relations[i].phrasing[k]);
    fprintf(f, "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[{\"id\":0,\"content\":"
               "\"<|endoftext|>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
               "\"special\":true}],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\","
               "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,"
               "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,"
               "\"use_regex\":true},\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
               "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,"
               "\"byte_fallback\":false,\"ignore_merges\":true,\"vocab\":{\"<|endoftext|>\":%d", id++);
    for (int b = 0; b < 256; b++)
    {
        char c[3] = "";

        byte_char(b, c);
        fprintf(f, ",\"%s%s\":%d", b == '"' || b == '\\' ? "\\" : "", c, id++);
    }
    for (int i = 0; i < n_words; i++)
    {
        if (words[i][1])
            fprintf(f, ",\"%s\":%d", words[i], id++);
        fprintf(f, ",\"\xc4\xa0%s\":%d", words[i], id++);
    }
    fprintf(f, "},\"merges\":[]}}\n");
    if (fclose(f) != 0)
        die("cannot write tokenizer.json");
}

/* ---- weights ---- */

typedef enum fill { MATRIX, BIAS, NORM } fill;

typedef struct tensor
{
    char    name[96];
    int64_t rows, cols; /* rows 0: a vector */
    fill    fill;
    float   std;
    int     shard;
} tensor;

static tensor tensors[MAX_TENSORS];
static int    n_tensors, shard;

static void __attribute__((format(printf, 5, 6)))
add(int64_t rows, int64_t cols, fill how, double std, const char *fmt, ...)
{
    tensor *t = &tensors[n_tensors++];
    va_list ap;

    *t = (tensor) {.rows = rows, .cols = cols, .fill = how, .std = (float) std, .shard = shard};
    va_start(ap, fmt);
    vsnprintf(t->name, sizeof t->name, fmt, ap);
    va_end(ap);
}

static int64_t
size_of(const tensor *t)
{
    return (t->rows ? t->rows : 1) * t->cols;
}

/* Normal numbers to draw from, scaled while they are written. */
static float normal[1 << 16];

static void
write_tensor(FILE *f, const tensor *t, kne_dtype type, uint64_t *rng)
{
    static uint16_t half[1 << 16], out16[1 << 16];
    static float    single[1 << 16], out32[1 << 16];
    int64_t         left = size_of(t);

    for (int i = 0; i < 1 << 16; i++)
    {
        single[i] = normal[i] * t->std + (t->fill == NORM ? 1 : 0);
        half[i] = kne_f32_to_bf16(single[i]);
    }
    while (left > 0)
    {
        int64_t n = left < 1 << 16 ? left : 1 << 16;

        for (int64_t i = 0; i < n; i += 4)
        {
            uint64_t z = kne_random_next(rng);

            for (int k = 0; k < 4; k++, z >>= 16)
            {
                out16[i + k] = half[z & 0xffff];
                out32[i + k] = single[z & 0xffff];
            }
        }
        if (fwrite(type == KNE_F32 ? (void *) out32 : out16, kne_dtype_size(type), (size_t) n, f) != (size_t) n)
            die("cannot write %s: %s", t->name, strerror(errno));
        left -= n;
    }
}

static void
write_weights(const char *dir, kne_dtype type, int n_shards)
{
    uint64_t rng = 1;
    char     name[64];

    for (int i = 0; i < 1 << 16; i++) /* Box-Muller */
    {
        double u = ((double) (kne_random_next(&rng) >> 11) + 1) / 9007199254740993.0;
        double v = (double) (kne_random_next(&rng) >> 11) / 9007199254740992.0;

        normal[i] = (float) (sqrt(-2 * log(u)) * cos(2 * M_PI * v));
    }
    for (int s = 0; s < n_shards; s++)
    {
        static char header[1 << 17];
        size_t      at = (size_t) sprintf(header, "{\"__metadata__\":{\"format\":\"pt\"}");
        int64_t     off = 0;
        FILE       *f;

        for (int i = 0; i < n_tensors; i++)
        {
            const tensor *t = &tensors[i];
            int64_t       bytes = size_of(t) * (int64_t) kne_dtype_size(type);

            if (t->shard != s)
                continue;
            at += (size_t) sprintf(header + at, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, type == KNE_F32 ? "F32" : "BF16");
            at += t->rows ? (size_t) sprintf(header + at, "%lld,%lld", (long long) t->rows, (long long) t->cols)
                          : (size_t) sprintf(header + at, "%lld", (long long) t->cols);
            at += (size_t) sprintf(header + at, "],\"data_offsets\":[%lld,%lld]}", (long long) off, (long long) (off + bytes));
            off += bytes;
        }
        header[at++] = '}';
        while (at % 8)
            header[at++] = ' ';
        if (n_shards == 1)
            strcpy(name, "model.safetensors");
        else
            snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, n_shards);
        f = create(dir, name);
        uint64_t len = at;
        if (fwrite(&len, 8, 1, f) != 1 || fwrite(header, 1, at, f) != at)
            die("cannot write %s", name);
        for (int i = 0; i < n_tensors; i++)
            if (tensors[i].shard == s)
                write_tensor(f, &tensors[i], type, &rng);
        if (fclose(f) != 0)
            die("cannot write %s: %s", name, strerror(errno));
    }
    if (n_shards == 1)
        return;
    FILE *f = create(dir, "model.safetensors.index.json");
    fprintf(f, "{\"metadata\":{},\"weight_map\":{");
    for (int i = 0; i < n_tensors; i++)
        fprintf(f, "%s\"%s\":\"model-%05d-of-%05d.safetensors\"", i ? ",\n" : "\n", tensors[i].name, tensors[i].shard + 1, n_shards);
    fprintf(f, "}}\n");
    fclose(f);
}

static void
make_gpt2(const char *dir)
{
    const int L = 12, d = 768, f = 3072, V = 50257, ctx = 1024;
    FILE     *c = create(dir, "config.json");

    fprintf(c, "{\"architectures\":[\"GPT2LMHeadModel\"],\"model_type\":\"gpt2\",\"activation_function\":\"gelu_new\","
               "\"n_embd\":%d,\"n_layer\":%d,\"n_head\":12,\"n_inner\":%d,\"n_positions\":%d,\"n_ctx\":%d,"
               "\"vocab_size\":%d,\"layer_norm_epsilon\":1e-05,\"bos_token_id\":0,\"eos_token_id\":0,"
               "\"tie_word_embeddings\":true,\"torch_dtype\":\"float32\",\"attn_pdrop\":0.0,\"embd_pdrop\":0.0,"
               "\"resid_pdrop\":0.0}\n", d, L, f, ctx, ctx, V);
    fclose(c);
    make_tokenizer(dir);
    add(V, d, MATRIX, 0.05, "transformer.wte.weight");
    add(ctx, d, MATRIX, 0.02, "transformer.wpe.weight");
    for (int l = 0; l < L; l++)
    {
        for (int k = 1; k <= 2; k++)
        {
            add(0, d, NORM, 0.1, "transformer.h.%d.ln_%d.weight", l, k);
            add(0, d, BIAS, 0.02, "transformer.h.%d.ln_%d.bias", l, k);
        }
        add(d, 3 * d, MATRIX, 0.05, "transformer.h.%d.attn.c_attn.weight", l);
        add(0, 3 * d, BIAS, 0.02, "transformer.h.%d.attn.c_attn.bias", l);
        add(d, d, MATRIX, 0.02, "transformer.h.%d.attn.c_proj.weight", l);
        add(0, d, BIAS, 0.02, "transformer.h.%d.attn.c_proj.bias", l);
        add(d, f, MATRIX, 0.05, "transformer.h.%d.mlp.c_fc.weight", l);
        add(0, f, BIAS, 0.02, "transformer.h.%d.mlp.c_fc.bias", l);
        add(f, d, MATRIX, 0.02, "transformer.h.%d.mlp.c_proj.weight", l);
        add(0, d, BIAS, 0.02, "transformer.h.%d.mlp.c_proj.bias", l);
    }
    add(0, d, NORM, 0.1, "transformer.ln_f.weight");
    add(0, d, BIAS, 0.02, "transformer.ln_f.bias");
    write_weights(dir, KNE_F32, 1);
}

static void
make_llama2(const char *dir, const char *tokenizer)
{
    const int L = 32, d = 4096, f = 11008, V = 32000;
    FILE     *c = create(dir, "config.json");
    char     *text = slurp(tokenizer);

    fprintf(c, "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_act\":\"silu\",\"hidden_size\":%d,"
               "\"intermediate_size\":%d,\"num_hidden_layers\":%d,\"num_attention_heads\":32,\"num_key_value_heads\":32,"
               "\"max_position_embeddings\":4096,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"rope_scaling\":null,"
               "\"vocab_size\":%d,\"bos_token_id\":1,\"eos_token_id\":2,\"tie_word_embeddings\":false,"
               "\"attention_bias\":false,\"torch_dtype\":\"bfloat16\"}\n", d, f, L, V);
    fclose(c);
    c = create(dir, "tokenizer.json");
    fputs(text, c);
    fclose(c);
    add(V, d, MATRIX, 0.02, "model.embed_tokens.weight");
    for (int l = 0; l < L; l++)
    {
        shard = l < 11 ? 0 : l < 22 ? 1 : 2;
        add(0, d, NORM, 0.1, "model.layers.%d.input_layernorm.weight", l);
        add(0, d, NORM, 0.1, "model.layers.%d.post_attention_layernorm.weight", l);
        for (int k = 0; k < 3; k++)
            add(d, d, MATRIX, 0.02, "model.layers.%d.self_attn.%c_proj.weight", l, "qkv"[k]);
        add(d, d, MATRIX, 0.01, "model.layers.%d.self_attn.o_proj.weight", l);
        add(f, d, MATRIX, 0.02, "model.layers.%d.mlp.gate_proj.weight", l);
        add(f, d, MATRIX, 0.02, "model.layers.%d.mlp.up_proj.weight", l);
        add(d, f, MATRIX, 0.01, "model.layers.%d.mlp.down_proj.weight", l);
    }
    add(0, d, NORM, 0.1, "model.norm.weight");
    add(V, d, MATRIX, 0.02, "lm_head.weight");
    write_weights(dir, KNE_BF16, 3);
}

int
main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";

    if (argc == 5 && strcmp(what, "edits") == 0)
    {
        read_tables(argv[2], argv[3]);
        make_edits(stdout, atoi(argv[4]));
        return 0;
    }
    if (!(argc == 5 && strcmp(what, "gpt2") == 0) && !(argc == 4 && strcmp(what, "llama2-7b") == 0))
        return fprintf(stderr, "usage: bench_make gpt2 DIR FACTS RELATIONS | llama2-7b DIR TOKENIZER.JSON | edits FACTS RELATIONS N\n"), 2;
    if (mkdir(argv[2], 0777) != 0 && errno != EEXIST)
        die("%s: %s", argv[2], strerror(errno));
    if (strcmp(what, "gpt2") == 0)
    {
        read_tables(argv[3], argv[4]);
        make_gpt2(argv[2]);
    }
    else
        make_llama2(argv[2], argv[3]);
    return 0;
}
