/*
 * test_model.c - model folders: what opens, how it is bound, and what every
 * broken folder is told. Broken ones are the golden llama (test/golden/llama)
 * with one thing changed, made on the spot in a temporary folder, so each
 * error has one possible culprit, which the message must name.
 *
 * Run from the repository's root. KNE_GOLDEN and KNE_SHARED override the
 * folders of golden and of real models.
 */
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kne_arch.h"
#include "kne_model.h"
#include "kne_safetensors.h"
#include "kne_test.h"

static char        temp[256]; /* everything made here lies below */
static const char *golden;

/* ---- bytes and folders ---- */

typedef struct bytes
{
    char  *p;
    size_t n;
} bytes;

static bytes
slurp(const char *dir, const char *name)
{
    char    path[1024];
    bytes   b = {0};
    kne_err err;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (kne_file_read(path, name, (size_t) 1 << 30, &b.p, &b.n, &err) != KNE_OK)
        b = (bytes) {calloc(1, 1), 0};
    return b;
}

static void
spit(const char *dir, const char *name, bytes b)
{
    char  path[1024];
    FILE *f;

    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (!(f = fopen(path, "wb")) || fwrite(b.p, 1, b.n, f) != b.n || fclose(f) != 0)
        check(0, "write %s", path);
}

static void
empty_folder(const char *dir)
{
    char           path[1024];
    DIR           *d = opendir(dir);
    struct dirent *e;

    while (d && (e = readdir(d)))
        if (e->d_name[0] != '.')
        {
            snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
            if (unlink(path) != 0)
                rmdir(path);
        }
    if (d)
        closedir(d);
}

/* text with the first find replaced; check that it was there */
static bytes
replaced(bytes text, const char *find, const char *by)
{
    size_t nf = strlen(find), nb = strlen(by);
    char  *at = memmem(text.p, text.n, find, nf);
    bytes  r = {malloc(text.n + nb + 1), 0};

    if (!at)
        check(0, "\"%s\" is there to be replaced", find);
    else
    {
        size_t before = (size_t) (at - text.p);

        memcpy(r.p, text.p, before);
        memcpy(r.p + before, by, nb);
        memcpy(r.p + before + nb, at + nf, text.n - before - nf);
        r.n = text.n - nf + nb;
    }
    r.p[r.n] = '\0';
    return r;
}

static bytes
replaced_everywhere(bytes text, const char *find, const char *by)
{
    bytes r = {malloc(text.n + 1), text.n};

    memcpy(r.p, text.p, text.n + 1);
    while (memmem(r.p, r.n, find, strlen(find)))
    {
        bytes next = replaced(r, find, by);

        free(r.p);
        r = next;
    }
    return r;
}

static bytes
header_of(bytes file)
{
    uint64_t len;
    bytes    h;

    memcpy(&len, file.p, 8);
    h = (bytes) {malloc(len + 1), len};
    memcpy(h.p, file.p + 8, len);
    h.p[len] = '\0';
    return h;
}

static bytes
with_header(bytes file, bytes header, long grow)
{
    uint64_t len, now = header.n;
    size_t   data;
    bytes    r;

    memcpy(&len, file.p, 8);
    data = file.n - 8 - len;
    r.n = 8 + header.n + data + (grow > 0 ? (size_t) grow : 0);
    r.p = calloc(1, r.n + 1);
    memcpy(r.p, &now, 8);
    memcpy(r.p + 8, header.p, header.n);
    memcpy(r.p + 8 + header.n, file.p + 8 + len, data);
    if (grow < 0)
        r.n -= (size_t) -grow;
    return r;
}

/* A variation of a golden folder. NULL: leave as it is. */
typedef struct variation
{
    const char *what;
    const char *find, *by;               /* in config.json */
    const char *header_find, *header_by; /* in the header of model.safetensors */
    long        grow;                    /* bytes added to the data, or cut off */
    const char *without;                 /* a file left out */
    kne_status  want;
    const char *culprit; /* must be in the message */
} variation;

static char *
make(const char *family, const variation *v)
{
    static char              dir[512];
    static const char *const files[] = {"config.json", "tokenizer.json", "model.safetensors"};
    char                     from[512];

    snprintf(dir, sizeof dir, "%s/model", temp);
    mkdir(dir, 0700);
    empty_folder(dir);
    snprintf(from, sizeof from, "%s/%s", golden, family);
    for (int i = 0; i < 3; i++)
    {
        bytes b = slurp(from, files[i]), r;

        if (v->without && !strcmp(v->without, files[i]))
        {
            free(b.p);
            continue;
        }
        if (i == 0 && v->find)
        {
            r = replaced(b, v->find, v->by);
            free(b.p);
            b = r;
        }
        if (i == 2 && (v->header_find || v->grow))
        {
            bytes h = header_of(b),
                  h2 = v->header_find ? replaced(h, v->header_find, v->header_by) : h;

            r = with_header(b, h2, v->grow);
            if (h2.p != h.p)
                free(h2.p);
            free(h.p);
            free(b.p);
            b = r;
        }
        spit(dir, files[i], b);
        free(b.p);
    }
    return dir;
}

static void
expect(const char *what, const char *dir, kne_status want, const char *culprit)
{
    kne_model *m = NULL;
    kne_err    err = {0};
    kne_status st = kne_model_open(dir, &m, &err);

    if (want == KNE_OK)
        check(st == KNE_OK && m, "%s: opens%s%s", what, st ? ": " : "", st ? err.msg : "");
    else if (!check(st == want && !m && strstr(err.msg, culprit), "%s: refused, naming %s", what,
                    culprit))
        printf("# status %d, message \"%s\"\n", st, err.msg);
    kne_model_close(m);
}

/* ---- broken and odd folders ---- */

#define NORM \
    "\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[32],\"data_offsets\":[126208,126336]}"
#define META "\"__metadata__\":{\"format\":\"pt\"}"
#define ROPE \
    "\"rope_parameters\": {\n    \"rope_theta\": 10000.0,\n    \"rope_type\": \"default\"\n  }"
#define ROPE_OF(body) "\"rope_parameters\": {" body "}"

static const variation llama_variations[] = {
    {.what = "the folder as it is"},
    /* the file */
    {.what = "truncated weights",
     .grow = -100,
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "weights with a tail", .grow = 4, .want = KNE_ERR_FORMAT, .culprit = "4 bytes after"},
    {.what = "overlapping tensors",
     .header_find = "[80000,91264]",
     .header_by = "[79996,91260]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.1.mlp.down_proj.weight overlaps"},
    {.what = "a hole between tensors",
     .header_find = "[126208,126336]",
     .header_by = "[126212,126340]",
     .grow = 4,
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight leaves a hole"},
    {.what = "a hole at the start",
     .header_find = "\"shape\":[131,32],\"data_offsets\":[0,16768]",
     .header_by = "\"shape\":[130,32],\"data_offsets\":[128,16768]",
     .want = KNE_ERR_FORMAT,
     .culprit = "lm_head.weight leaves a hole"},
    {.what = "a tensor beyond the end",
     .header_find = "[126208,126336]",
     .header_by = "[126208,226336]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "offsets the wrong way round",
     .header_find = "[126208,126336]",
     .header_by = "[126336,126208]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "offsets above 2^53",
     .header_find = "[126208,126336]",
     .header_by = "[126208,9223372036854775808]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "a negative offset",
     .header_find = "[126208,126336]",
     .header_by = "[-128,0]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "three offsets",
     .header_find = "[126208,126336]",
     .header_by = "[126208,126336,1]",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "a fractional dimension",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"shape\":[32.5],\"data_offsets\":[126208",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "a shape whose product overflows",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"shape\":[4294967296,4294967296],\"data_offsets\":[126208",
     .want = KNE_ERR_FORMAT,
     .culprit = "size of tensor model.norm.weight overflows"},
    {.what = "a shape that overflows to the right size",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"shape\":[4503599627370496,4096,32],\"data_offsets\":[126208",
     .want = KNE_ERR_FORMAT,
     .culprit = "size of tensor model.norm.weight overflows"},
    {.what = "a shape of another size",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"shape\":[33],\"data_offsets\":[126208",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight occupies 128 bytes"},
    {.what = "nine dimensions",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"shape\":[1,1,1,1,1,1,1,1,32],\"data_offsets\":[126208",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "model.norm.weight"},
    {.what = "an unknown dtype",
     .header_find = "{\"dtype\":\"F32\"",
     .header_by = "{\"dtype\":\"Q4_K\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "Q4_K"},
    {.what = "a weight of integers",
     .header_find = NORM,
     .header_by = "\"model.norm.weight\":{\"dtype\":\"I32\",\"shape\":[32],\"data_offsets\":["
                  "126208,126336]}",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "model.norm.weight has dtype I32"},
    {.what = "the same tensor twice",
     .header_find = "model.layers.1.mlp.down_proj",
     .header_by = "model.layers.0.mlp.down_proj",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.0.mlp.down_proj.weight occurs twice"},
    {.what = "an entry's key twice",
     .header_find = "\"dtype\":\"F32\"",
     .header_by = "\"dtype\":\"F32\",\"dtype\":\"F32\"",
     .want = KNE_ERR_FORMAT,
     .culprit = "second key"},
    {.what = "an unknown key",
     .header_find = "\"dtype\":\"F32\"",
     .header_by = "\"stride\":1,\"dtype\":\"F32\"",
     .want = KNE_ERR_FORMAT,
     .culprit = "stride"},
    {.what = "an entry without a shape",
     .header_find = "\"shape\":[32],\"data_offsets\":[126208",
     .header_by = "\"data_offsets\":[126208",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "a tensor that is a number",
     .header_find = NORM,
     .header_by = "\"model.norm.weight\":7",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm.weight"},
    {.what = "metadata that is not text",
     .header_find = META,
     .header_by = "\"__metadata__\":{\"a\":1}",
     .want = KNE_ERR_FORMAT,
     .culprit = "__metadata__"},
    {.what = "broken JSON in the header",
     .header_find = META,
     .header_by = META ";",
     .want = KNE_ERR_FORMAT,
     .culprit = "broken JSON"},
    {.what = "a name that is not printable",
     .header_find = "model.norm.weight",
     .header_by = "model.norm\\u000aweight",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.norm?weight"},
    {.what = "no metadata", .header_find = META ",", .header_by = ""},
    {.what = "unaligned data", .header_find = META, .header_by = META " "},
    /* tensors against config.json */
    {.what = "a missing tensor",
     .header_find = "model.layers.1.mlp.down_proj.weight",
     .header_by = "model.layers.1.mlp.down_proj.wait",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.1.mlp.down_proj.weight is missing"},
    {.what = "a transposed tensor",
     .header_find = "\"shape\":[32,88],\"data_offsets\":[80000",
     .header_by = "\"shape\":[88,32],\"data_offsets\":[80000",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.1.mlp.down_proj.weight has shape [88, 32]"},
    {.what = "a tensor of another rank",
     .header_find = "\"shape\":[32,88],\"data_offsets\":[80000",
     .header_by = "\"shape\":[2816],\"data_offsets\":[80000",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.1.mlp.down_proj.weight has shape [2816]"},
    {.what = "a tensor too many",
     .find = "\"num_hidden_layers\": 2",
     .by = "\"num_hidden_layers\": 1",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "model.layers.1."},
    {.what = "a layer too few",
     .find = "\"num_hidden_layers\": 2",
     .by = "\"num_hidden_layers\": 3",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.2.input_layernorm.weight is missing"},
    {.what = "biases that are not there",
     .find = "\"attention_bias\": false",
     .by = "\"attention_bias\": true",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.layers.0.self_attn.q_proj.bias is missing"},
    {.what = "a vocabulary of another size",
     .find = "\"vocab_size\": 131",
     .by = "\"vocab_size\": 132",
     .want = KNE_ERR_FORMAT,
     .culprit = "model.embed_tokens.weight has shape [131, 32]"},
    {.what = "a head that should be the embedding",
     .find = "\"tie_word_embeddings\": false",
     .by = "\"tie_word_embeddings\": true",
     .want = KNE_ERR_FORMAT,
     .culprit = "lm_head.weight differs"},
    /* config.json */
    {.what = "an unknown architecture",
     .find = "\"model_type\": \"llama\"",
     .by = "\"model_type\": \"mamba\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "\"mamba\""},
    {.what = "no architecture",
     .find = "\"model_type\": \"llama\",",
     .by = "",
     .want = KNE_ERR_FORMAT,
     .culprit = "model_type"},
    {.what = "control characters in the architecture",
     .find = "\"model_type\": \"llama\"",
     .by = "\"model_type\": \"ll\\u0007\\n\xc3\xa4\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "\"ll????\""},
    {.what = "quantised weights",
     .find = "\"mlp_bias\"",
     .by = "\"quantization_config\": {\"quant_method\": \"gptq\"}, \"mlp_bias\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "quantization_config"},
    {.what = "a null quantization_config",
     .find = "\"mlp_bias\"",
     .by = "\"quantization_config\": null, \"mlp_bias\""},
    {.what = "an unknown activation",
     .find = "\"silu\"",
     .by = "\"relu2\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "relu2"},
    {.what = "no layers",
     .find = "\"num_hidden_layers\": 2",
     .by = "\"num_hidden_layers\": 0",
     .want = KNE_ERR_FORMAT,
     .culprit = "num_hidden_layers is 0"},
    {.what = "a negative width",
     .find = "\"hidden_size\": 32",
     .by = "\"hidden_size\": -32",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size is -32"},
    {.what = "an absurd width",
     .find = "\"hidden_size\": 32",
     .by = "\"hidden_size\": 1e300",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size"},
    {.what = "a width that is text",
     .find = "\"hidden_size\": 32",
     .by = "\"hidden_size\": \"32\"",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size is not a number"},
    {.what = "a fractional width",
     .find = "\"hidden_size\": 32",
     .by = "\"hidden_size\": 32.5",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size"},
    {.what = "no width",
     .find = "\"hidden_size\": 32,",
     .by = "",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size is missing"},
    {.what = "a width given twice",
     .find = "\"hidden_size\": 32,",
     .by = "\"hidden_size\": 32, \"hidden_size\": 64,",
     .want = KNE_ERR_FORMAT,
     .culprit = "hidden_size occurs twice"},
    {.what = "heads that do not divide",
     .find = "\"num_attention_heads\": 4",
     .by = "\"num_attention_heads\": 5",
     .want = KNE_ERR_FORMAT,
     .culprit = "num_attention_heads 5"},
    {.what = "kv heads that do not divide",
     .find = "\"num_key_value_heads\": 2",
     .by = "\"num_key_value_heads\": 3",
     .want = KNE_ERR_FORMAT,
     .culprit = "num_key_value_heads 3"},
    {.what = "an absurd head",
     .find = "\"head_dim\": 8",
     .by = "\"head_dim\": 100000",
     .want = KNE_ERR_FORMAT,
     .culprit = "head_dim"},
    {.what = "an odd head",
     .find = "\"head_dim\": 8",
     .by = "\"head_dim\": 7",
     .want = KNE_ERR_FORMAT,
     .culprit = "rotary dimension 7"},
    {.what = "a zero epsilon",
     .find = "1e-05",
     .by = "0",
     .want = KNE_ERR_FORMAT,
     .culprit = "rms_norm_eps is 0"},
    {.what = "an epsilon that is 0 as a float",
     .find = "1e-05",
     .by = "1e-050",
     .want = KNE_ERR_FORMAT,
     .culprit = "rms_norm_eps"},
    {.what = "text after config.json's object",
     .find = "\"vocab_size\": 131\n}",
     .by = "\"vocab_size\": 131\n}}",
     .want = KNE_ERR_FORMAT,
     .culprit = "config.json: text after"},
    {.what = "no epsilon",
     .find = "\"rms_norm_eps\": 1e-05,",
     .by = "",
     .want = KNE_ERR_FORMAT,
     .culprit = "rms_norm_eps is missing"},
    {.what = "a switch that is a number",
     .find = "\"tie_word_embeddings\": false",
     .by = "\"tie_word_embeddings\": 0",
     .want = KNE_ERR_FORMAT,
     .culprit = "tie_word_embeddings"},
    {.what = "broken JSON in config.json",
     .find = "\"hidden_size\": 32,",
     .by = "\"hidden_size\": 32",
     .want = KNE_ERR_FORMAT,
     .culprit = "config.json: broken JSON"},
    {.what = "no word about the head", .find = "\"tie_word_embeddings\": false,", .by = ""},
    /* RoPE */
    {.what = "yarn",
     .find = "\"rope_type\": \"default\"",
     .by = "\"rope_type\": \"yarn\", \"factor\": 4",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "\"yarn\""},
    {.what = "dynamic scaling, old form",
     .find = ROPE,
     .by = "\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2.0}",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "rope_scaling: RoPE type \"dynamic\""},
    {.what = "scaling without its factor",
     .find = "\"rope_type\": \"default\"",
     .by = "\"rope_type\": \"linear\"",
     .want = KNE_ERR_FORMAT,
     .culprit = "factor is missing"},
    {.what = "llama3 scaling without a band",
     .find = ROPE,
     .by = ROPE_OF("\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
                   "\"high_freq_factor\": 4"),
     .want = KNE_ERR_FORMAT,
     .culprit = "high_freq_factor"},
    {.what = "RoPE by layer type",
     .find = ROPE,
     .by = ROPE_OF("\"full_attention\": {\"rope_type\": \"default\"}"),
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "rope_parameters"},
    {.what = "partial rotation where the family has none",
     .find = ROPE,
     .by = ROPE_OF("\"partial_rotary_factor\": 0.5"),
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "partial_rotary_factor"},
    {.what = "a negative theta",
     .find = "10000.0",
     .by = "-1",
     .want = KNE_ERR_FORMAT,
     .culprit = "rope_theta"},
    {.what = "RoPE parameters that are a list",
     .find = ROPE,
     .by = "\"rope_parameters\": []",
     .want = KNE_ERR_FORMAT,
     .culprit = "rope_parameters"},
    {.what = "no RoPE parameters", .find = ROPE, .by = "\"rope_parameters\": null"},
    /* layers of another kind */
    {.what = "linear attention",
     .find = "\"mlp_bias\"",
     .by = "\"layer_types\": [\"full_attention\", \"linear_attention\"], \"mlp_bias\"",
     .want = KNE_ERR_UNSUPPORTED,
     .culprit = "linear_attention"},
    /* files */
    {.what = "no config.json",
     .without = "config.json",
     .want = KNE_ERR_IO,
     .culprit = "config.json"},
    {.what = "no tokenizer.json",
     .without = "tokenizer.json",
     .want = KNE_ERR_IO,
     .culprit = "tokenizer.json"},
    {.what = "no weights",
     .without = "model.safetensors",
     .want = KNE_ERR_IO,
     .culprit = "model.safetensors"},
};

static void
test_variations(void)
{
    for (size_t i = 0; i < sizeof llama_variations / sizeof *llama_variations; i++)
    {
        const variation *v = &llama_variations[i];

        expect(v->what, make("llama", v), v->want, v->culprit);
    }
}

/* Files that are broken in ways a changed header cannot show. */
static void
test_files(void)
{
    static const variation same = {.what = "same"};
    static const struct
    {
        const char *what, *file;
        const char *content;
        size_t      n;
        kne_status  want;
        const char *culprit;
    } cases[] = {
        {"empty weights", "model.safetensors", "", 0, KNE_ERR_FORMAT, "model.safetensors"},
        {"nine bytes of weights", "model.safetensors", "\1\0\0\0\0\0\0\0{", 9, KNE_ERR_FORMAT,
         "9 bytes"},
        {"a huge header length", "model.safetensors", "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10,
         KNE_ERR_FORMAT, "header length 18446744073709551615"},
        {"a header length past the end", "model.safetensors", "\3\0\0\0\0\0\0\0{}", 10,
         KNE_ERR_FORMAT, "header length 3"},
        {"a header that is not an object", "model.safetensors", "\2\0\0\0\0\0\0\0[]", 10,
         KNE_ERR_FORMAT, "does not begin with {"},
        {"text after the header's object", "model.safetensors", "\5\0\0\0\0\0\0\0{} {}", 13,
         KNE_ERR_FORMAT, "text after"},
        {"no tensors", "model.safetensors", "\2\0\0\0\0\0\0\0{}", 10, KNE_ERR_FORMAT,
         "model.embed_tokens.weight is missing"},
        {"a Git LFS pointer", "model.safetensors", "version https://git-lfs.github.com/spec/v1\n",
         43, KNE_ERR_FORMAT, "model.safetensors"},
        {"an empty config.json", "config.json", "", 0, KNE_ERR_FORMAT, "config.json"},
        {"a config.json that is a list", "config.json", "[]", 2, KNE_ERR_FORMAT, "config.json"},
        {"a broken tokenizer.json", "tokenizer.json", "{", 1, KNE_ERR_FORMAT, ""},
    };
    char  path[600], *dir;
    bytes deep = {malloc(4000), 4000};

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    {
        dir = make("llama", &same);
        spit(dir, cases[i].file, (bytes) {(char *) cases[i].content, cases[i].n});
        expect(cases[i].what, dir, cases[i].want, cases[i].culprit);
    }

    dir = make("llama", &same);
    memset(deep.p, '[', deep.n);
    spit(dir, "config.json", deep);
    free(deep.p);
    expect("a config.json nested 4,000 deep", dir, KNE_ERR_FORMAT, "config.json");

    dir = make("llama", &same);
    snprintf(path, sizeof path, "%s/config.json", dir);
    expect("a file in place of a folder", path, KNE_ERR_IO, "is not a folder");
    expect("a folder that is not there", "/nonexistent/model", KNE_ERR_IO, "/nonexistent/model");
    unlink(path);
    mkdir(path, 0700);
    expect("a folder in place of a file", dir, KNE_ERR_IO, "config.json is not a regular file");
    rmdir(path);
    mkfifo(path, 0600);
    expect("a FIFO in place of a file", dir, KNE_ERR_IO, "config.json is not a regular file");
    dir = make("llama", &same);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unlink(path);
    mkfifo(path, 0600);
    expect("a FIFO in place of weights", dir, KNE_ERR_IO,
           "model.safetensors is not a regular file");
}

/* ---- shards ---- */

/* Split the golden llama after its first few tensors; index: NULL for the right one. */
static char *
make_sharded(const char *index)
{
    static const variation   same = {.what = "same"};
    static const char *const names[2] = {"a-00001-of-00002.safetensors", "a-00002-of-00002."
                                                                         "safetensors"};
    char                    *dir = make("llama", &same), path[600];
    kne_tensors             *ts = NULL;
    kne_err                  err;
    FILE                    *list, *header;
    bytes                    text = {0}, h = {0};

    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (kne_tensors_open_file(path, &ts, &err) != KNE_OK)
        return dir;
    list = open_memstream(&text.p, &text.n);
    fprintf(list, "{\"metadata\":{\"total_size\":%lld},\"weight_map\":{", (long long) ts->bytes);
    for (int s = 0; s < 2; s++)
    {
        int64_t  from = s ? ts->n / 2 : 0, to = s ? ts->n : ts->n / 2;
        size_t   at = 0;
        uint64_t len;
        FILE    *f;

        header = open_memstream(&h.p, &h.n);
        for (int64_t i = from; i < to; i++)
        {
            const kne_tensor *t = &ts->tensor[i];

            fprintf(header, "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld", i == from ? '{' : ',',
                    t->name, t->type_name, (long long) t->shape[0]);
            if (t->rank == 2)
                fprintf(header, ",%lld", (long long) t->shape[1]);
            fprintf(header, "],\"data_offsets\":[%zu,%zu]}", at, at + t->bytes);
            at += t->bytes;
            fprintf(list, "%s\"%s\":\"%s\"", i ? "," : "", t->name, names[s]);
        }
        fprintf(header, "}");
        fclose(header);
        snprintf(path, sizeof path, "%s/%s", dir, names[s]);
        f = fopen(path, "wb");
        len = h.n;
        fwrite(&len, 8, 1, f);
        fwrite(h.p, 1, h.n, f);
        for (int64_t i = from; i < to; i++)
            fwrite(ts->tensor[i].data, 1, ts->tensor[i].bytes, f);
        fclose(f);
        free(h.p);
    }
    fprintf(list, "}}");
    fclose(list);
    kne_tensors_close(ts);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unlink(path);
    spit(dir, "model.safetensors.index.json",
         index ? (bytes) {(char *) index, strlen(index)} : text);
    free(text.p);
    return dir;
}

static void
test_shards(void)
{
    static const variation same = {.what = "same"};
    kne_model             *one = NULL, *many = NULL;
    kne_err                err;
    bytes                  index, changed;
    char                  *dir, path[600];

    kne_model_open(make("llama", &same), &one, &err);
    kne_model_open(make_sharded(NULL), &many, &err);
    check(one && many && !strcmp(one->fingerprint, many->fingerprint), "two shards are the same "
                                                                       "model as one file");
    kne_model_close(one);
    kne_model_close(many);

    expect("an index that names a file outside",
           make_sharded("{\"weight_map\":{\"a\":\"../../etc/passwd\"}}"), KNE_ERR_FORMAT,
           "../../etc/passwd");
    expect("an index that names an absolute path",
           make_sharded("{\"weight_map\":{\"a\":\"/etc/passwd\"}}"), KNE_ERR_FORMAT,
           "/etc/passwd");
    expect("an index that names a shard that is not there",
           make_sharded("{\"weight_map\":{\"a\":\"b.safetensors\"}}"), KNE_ERR_IO,
           "b.safetensors");
    expect("an index that names no string", make_sharded("{\"weight_map\":{\"a\":1}}"),
           KNE_ERR_FORMAT, "index.json");
    expect("an index without a map", make_sharded("{}"), KNE_ERR_FORMAT, "weight_map");
    expect("an index that is broken", make_sharded("{"), KNE_ERR_FORMAT, "index.json");

    dir = make_sharded(NULL);
    index = slurp(dir, "model.safetensors.index.json");
    changed =
        replaced(index, "\"model.norm.weight\":\"a-00002", "\"model.norm.weight\":\"a-00001");
    spit(dir, "model.safetensors.index.json", changed);
    expect("an index that misplaces a tensor", dir, KNE_ERR_FORMAT,
           "model.norm.weight is not in a-00001");
    free(index.p);
    free(changed.p);

    dir = make_sharded(NULL);
    index = slurp(dir, "a-00001-of-00002.safetensors");
    spit(dir, "a-00002-of-00002.safetensors", index);
    expect("a tensor in two shards", dir, KNE_ERR_FORMAT, "occurs twice");
    index.n -= 8;
    dir = make_sharded(NULL);
    spit(dir, "a-00001-of-00002.safetensors", index);
    expect("a truncated shard", dir, KNE_ERR_FORMAT, "a-00001-of-00002.safetensors");
    free(index.p);

    dir = make_sharded(NULL);
    snprintf(path, sizeof path, "%s/a-00002-of-00002.safetensors", dir);
    unlink(path);
    expect("a missing shard", dir, KNE_ERR_IO, "a-00002-of-00002.safetensors");
}

/* ---- config.json alone ---- */

static void
read_arch(const char *family, const char *find, const char *by, kne_arch *a, kne_tensor_list *list,
          kne_status want, const char *culprit)
{
    char       dir[512];
    bytes      config, changed;
    kne_err    err = {0};
    kne_status st;

    snprintf(dir, sizeof dir, "%s/%s", golden, family);
    config = slurp(dir, "config.json");
    changed = replaced(config, find, by);
    st = kne_arch_parse(changed.p, changed.n, a, list, &err);
    if (want != KNE_OK)
        check(st == want && strstr(err.msg, culprit), "%s with %s: refused, naming %s", family, by,
              culprit);
    else if (st != KNE_OK)
        check(0, "%s with %s: %s", family, by, err.msg);
    free(config.p);
    free(changed.p);
}

/* RoPE tables against transformers 5.23.0: {position, pair, cos, sin} at head_dim 128. */
static void
test_rope(void)
{
    static const struct
    {
        const char *what, *json;
        struct
        {
            int   pos, pair;
            float c, s;
        } want[8];
    } cases[] = {
        {"llama3, rope_parameters",
         ROPE_OF("\"rope_type\": \"llama3\", \"rope_theta\": 500000, \"factor\": 8, "
                 "\"low_freq_factor\": 1, "
                 "\"high_freq_factor\": 4, \"original_max_position_embeddings\": 8192"),
         {{1, 0, 0.5403023f, 0.8414710f},
          {100, 20, -0.0851446f, 0.9963686f},
          {100, 28, 0.9488748f, 0.3156528f},
          {100, 30, 0.9906043f, 0.1367594f},
          {100, 34, 0.9998407f, 0.0178498f},
          {1000, 30, 0.1975938f, 0.9802840f},
          {1000, 34, 0.9841098f, 0.1775613f},
          {1000, 63, 0.9999999f, 0.0003069f}}},
        {"llama3, rope_scaling",
         "\"rope_theta\": 500000, \"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, "
         "\"low_freq_factor\": 1, \"high_freq_factor\": 4, \"original_max_position_embeddings\": "
         "8192}",
         {{1, 0, 0.5403023f, 0.8414710f},
          {100, 20, -0.0851446f, 0.9963686f},
          {100, 28, 0.9488748f, 0.3156528f},
          {100, 30, 0.9906043f, 0.1367594f},
          {100, 34, 0.9998407f, 0.0178498f},
          {1000, 30, 0.1975938f, 0.9802840f},
          {1000, 34, 0.9841098f, 0.1775613f},
          {1000, 63, 0.9999999f, 0.0003069f}}},
        {"linear, rope_scaling",
         "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 4.0}",
         {{1, 0, 0.9689124f, 0.2474040f},
          {1, 63, 1.0f, 0.0000289f},
          {100, 0, 0.9912028f, -0.1323518f},
          {100, 28, 0.9027957f, 0.4300696f},
          {100, 34, 0.9824783f, 0.1863773f},
          {1000, 20, 0.0785542f, 0.9969099f},
          {1000, 40, 0.7034407f, 0.7107540f},
          {1000, 63, 0.9995833f, 0.0288655f}}},
    };
    enum
    {
        N_POS = 1001,
        HALF = 64
    };
    float          *c = malloc(N_POS * HALF * sizeof *c), *s = malloc(N_POS * HALF * sizeof *s);
    kne_arch        a;
    kne_tensor_list list;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    {
        double worst = 0;

        read_arch("llama", ROPE, cases[i].json, &a, &list, KNE_OK, NULL);
        a.head_dim = a.rotary_dim = 2 * HALF;
        a.n_ctx = N_POS;
        kne_arch_rope(&a, c, s);
        for (int k = 0; k < 8; k++)
        {
            int at = cases[i].want[k].pos * HALF + cases[i].want[k].pair;

            worst = fmax(worst, fabs((double) c[at] - cases[i].want[k].c));
            worst = fmax(worst, fabs((double) s[at] - cases[i].want[k].s));
        }
        /* the reference rounds the angle to float: at 1000 radians that is up to 3e-5 */
        check(worst < 4e-5, "RoPE %s: as in transformers (largest difference %.1e)", cases[i].what,
              worst);
    }
    free(c);
    free(s);
}

static void
test_configs(void)
{
    kne_arch        a;
    kne_tensor_list list;

    read_arch("mistral", "\"sliding_window\": 24", "\"sliding_window\": 7", &a, &list, KNE_OK,
              NULL);
    check(a.n_ctx == 7, "mistral: the window bounds the context");
    read_arch("mistral", "\"sliding_window\": 24", "\"sliding_window\": null", &a, &list, KNE_OK,
              NULL);
    check(a.n_ctx == 48, "mistral: no window");
    read_arch("mistral", "\"sliding_window\": 24,", "", &a, &list, KNE_OK, NULL);
    check(a.n_ctx == 48, "mistral: the default window is longer than the context");
    read_arch("mistral", "\"sliding_window\": 24", "\"sliding_window\": 0", &a, &list,
              KNE_ERR_FORMAT, "sliding_window");
    read_arch("qwen2", "\"sliding_window\": null", "\"sliding_window\": 9", &a, &list, KNE_OK,
              NULL);
    check(a.n_ctx == 48, "qwen2: a window that is switched off");
    read_arch("qwen2", "\"use_sliding_window\": false", "\"use_sliding_window\": true", &a, &list,
              KNE_OK, NULL);
    check(a.n_ctx == 48, "qwen2: a window of null");
    read_arch("qwen2", "\"full_attention\"", "\"sliding_attention\"", &a, &list, KNE_ERR_FORMAT,
              "sliding_attention");
    read_arch("llama", "\"max_position_embeddings\": 48", "\"max_position_embeddings\": 1000000",
              &a, &list, KNE_OK, NULL);
    check(a.n_ctx == KNE_ROPE_MAX_CTX, "RoPE tables are bounded");
    read_arch("llama", "\"eos_token_id\": 0", "\"eos_token_id\": [7, 8]", &a, &list, KNE_OK, NULL);
    check(a.eos_id == 7, "the first of several end ids");
    read_arch("llama", "\"eos_token_id\": 0", "\"eos_token_id\": 50256", &a, &list, KNE_OK, NULL);
    check(a.eos_id == -1, "an end id that the model cannot produce is none");
    read_arch("gpt2", "\"n_inner\": 96", "\"n_inner\": null", &a, &list, KNE_OK, NULL);
    check(a.d_ff == 128, "gpt2: a null n_inner is four times the width");
    read_arch("gpt2", "\"scale_attn_weights\": true", "\"scale_attn_weights\": false", &a, &list,
              KNE_ERR_UNSUPPORTED, "scale_attn_weights");
    read_arch("gpt2", "\"scale_attn_by_inverse_layer_idx\": false",
              "\"scale_attn_by_inverse_layer_idx\": true", &a, &list, KNE_ERR_UNSUPPORTED,
              "scale_attn_by_inverse_layer_idx");
    read_arch("gpt2", "\"n_head\": 4", "\"n_head\": 3", &a, &list, KNE_ERR_FORMAT, "n_head 3");
    read_arch("gptj", "\"rotary_dim\": 4", "\"rotary_dim\": 5", &a, &list, KNE_ERR_FORMAT,
              "rotary dimension 5");
    read_arch("gptj", "\"rotary_dim\": 4", "\"rotary_dim\": 10", &a, &list, KNE_ERR_FORMAT,
              "rotary_dim");
    read_arch("gpt_neox", "\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 1.5", &a,
              &list, KNE_ERR_FORMAT, "partial_rotary_factor");
    read_arch("phi3", "\"rope_type\": \"default\"", "\"rope_type\": \"longrope\"", &a, &list,
              KNE_ERR_UNSUPPORTED, "longrope");

    /* GPT-NeoX as older files have it */
    read_arch("gpt_neox", "\"rope_parameters\"",
              "\"rotary_pct\": 0.25, \"rotary_emb_base\": 500, \"x\"", &a, &list, KNE_OK, NULL);
    check(a.rotary_dim == 2 && a.rope_theta == 500, "gpt_neox: rotary_pct and rotary_emb_base");
    read_arch("gpt_neox", "\"rope_parameters\"", "\"x\"", &a, &list, KNE_OK, NULL);
    check(a.rotary_dim == 2 && a.rope_theta == 10000, "gpt_neox: a quarter is rotated where "
                                                      "nothing is said");
}

/* ---- binding ---- */

static kne_model *
open_golden(const char *family)
{
    char       dir[512];
    kne_model *m = NULL;
    kne_err    err = {0};

    snprintf(dir, sizeof dir, "%s/%s", golden, family);
    check(kne_model_open(dir, &m, &err) == KNE_OK, "golden %s opens%s%s", family,
          err.code ? ": " : "", err.msg);
    return m;
}

/* Does element (out, in) of the matrix equal element (row, col) of the named tensor? */
static bool
same_element(const kne_model *m, const kne_mat *w, int64_t out, int64_t in, const char *name,
             int64_t row, int64_t col)
{
    const kne_tensor *t = kne_tensors_find(m->tensors, name);
    int64_t           at = w->transposed ? in * w->ld + out : out * w->ld + in;

    return t && kne_load(w->data, w->type, (size_t) at) ==
                    kne_load(t->data, t->type, (size_t) (row * t->shape[1] + col));
}

static void
test_views(void)
{
    kne_model        *m;
    const kne_tensor *t;

    if ((m = open_golden("gpt2")))
    {
        const char      *name = "transformer.h.1.attn.c_attn.weight";
        const kne_layer *y = &m->layer[1];

        check(y->q.transposed && y->k.rows == 32 && y->k.cols == 32 && y->k.ld == 96 &&
                  same_element(m, &y->q, 5, 7, name, 7, 5) &&
                  same_element(m, &y->k, 5, 7, name, 7, 37) &&
                  same_element(m, &y->v, 31, 31, name, 31, 95),
              "gpt2: q, k and v are thirds of the columns");
        t = kne_tensors_find(m->tensors, "transformer.h.1.attn.c_attn.bias");
        check(y->v_b[3] == kne_load(t->data, t->type, 67) &&
                  y->k_b[3] == kne_load(t->data, t->type, 35),
              "gpt2: so are their biases");
        check(m->arch.tied_head && m->head.data == m->embed.data && m->pos_embed.rows == 48 &&
                  m->layer[0].up.rows == 32 && m->layer[0].up.cols == 96 &&
                  !m->layer[0].gate.data && !m->rope_cos,
              "gpt2: tied head, learned positions, one matrix up");
        kne_model_close(m);
    }
    if ((m = open_golden("phi3")))
    {
        const kne_layer *y = &m->layer[1];
        const char      *qkv = "model.layers.1.self_attn.qkv_proj.weight";
        const char      *gu = "model.layers.1.mlp.gate_up_proj.weight";

        check(y->q.rows == 32 && y->k.rows == 16 && y->v.rows == 16 && !y->q.transposed &&
                  same_element(m, &y->k, 3, 9, qkv, 35, 9) &&
                  same_element(m, &y->v, 15, 31, qkv, 63, 31) &&
                  same_element(m, &y->up, 4, 6, gu, 92, 6) &&
                  same_element(m, &y->gate, 4, 6, gu, 4, 6),
              "phi3: fused rows are taken apart");
        check(m->arch.rotary_dim == 4 && m->arch.head_dim == 8, "phi3: half of each head is "
                                                                "rotated");
        kne_model_close(m);
    }
    if ((m = open_golden("gpt_neox")))
    {
        const kne_layer *y = &m->layer[0];

        check(m->arch.qkv == KNE_QKV_PER_HEAD && y->q.rows == 96 && !y->k.data && !y->v.data &&
                  y->q_b && !y->k_b && m->arch.block == KNE_BLOCK_PARALLEL_TWO_NORMS &&
                  !m->arch.tied_head,
              "gpt_neox: qkv stays whole");
        kne_model_close(m);
    }
    if ((m = open_golden("gpt_neox_seq")))
    {
        check(m->arch.block == KNE_BLOCK_SEQUENTIAL, "gpt_neox: use_parallel_residual is read");
        kne_model_close(m);
    }
    if ((m = open_golden("gptj")))
    {
        check(m->arch.block == KNE_BLOCK_PARALLEL_ONE_NORM && m->head_b && !m->layer[0].norm2_w &&
                  !m->layer[0].q_b && m->layer[0].up_b &&
                  m->arch.position == KNE_POS_ROPE_INTERLEAVED,
              "gptj: one norm, biased FFN and head");
        kne_model_close(m);
    }
    if ((m = open_golden("qwen3")))
    {
        check(m->arch.qk_norm && m->layer[1].q_norm && m->layer[0].o.cols == 48 &&
                  m->arch.head_dim == 12,
              "qwen3: q/k norms, heads wider than the model");
        kne_model_close(m);
    }
    if ((m = open_golden("qwen2")))
    {
        check(m->layer[0].q_b && m->layer[0].v_b && !m->layer[0].o_b, "qwen2: biases on q, k, v "
                                                                      "only");
        kne_model_close(m);
    }
    if ((m = open_golden("llama3")))
    {
        check(m->layer[0].o_b && m->layer[1].gate_b && m->layer[1].down_b &&
                  m->arch.rope_scaling == KNE_ROPE_LLAMA3 && m->head.data == m->embed.data,
              "llama with all its biases and llama3 scaling");
        kne_model_close(m);
    }
    if ((m = open_golden("mistral")))
        kne_model_close(m);
}

/* One vector element replaced by raw bits; the file stays well-formed. */
static void
poke(const char *dir, const char *tensor, size_t at, const void *bits, size_t n)
{
    char         path[600];
    kne_tensors *ts = NULL;
    kne_err      err;
    size_t       offset = 0;
    int          fd;

    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    if (kne_tensors_open_file(path, &ts, &err) == KNE_OK)
        offset = (size_t) ((const char *) kne_tensors_find(ts, tensor)->data -
                           (char *) ts->file[0].map);
    kne_tensors_close(ts);
    fd = open(path, O_WRONLY);
    check(offset && fd >= 0 && pwrite(fd, bits, n, (off_t) (offset + at)) == (ssize_t) n,
          "poke %s", tensor);
    close(fd);
}

/* Change a folder's weights file by a function of its header. */
static void
rename_tensors(const char *dir, const char *find, const char *by)
{
    bytes file = slurp(dir, "model.safetensors"), h = header_of(file),
          h2 = replaced_everywhere(h, find, by);
    bytes file2 = with_header(file, h2, 0);

    spit(dir, "model.safetensors", file2);
    free(file.p);
    free(h.p);
    free(h2.p);
    free(file2.p);
}

static void
test_odd_folders(void)
{
    static const variation same = {.what = "same"};
    static const float     nan_bits = NAN;
    kne_model             *m = NULL, *other = NULL;
    kne_err                err;
    char                  *dir, path[600], link[600];
    bytes                  b, r;

    dir = make("gpt2", &same);
    rename_tensors(dir, "transformer.", "");
    expect("gpt2 without the prefix", dir, KNE_OK, NULL);
    dir = make("llama", &same);
    rename_tensors(dir, "\"model.", "\"");
    expect("llama without the prefix", dir, KNE_OK, NULL);

    dir = make("gpt2", &(variation) {.header_find = "\"transformer.wte.weight\"",
                                    .header_by = "\"transformer.h.0.attn.bias\":{\"dtype\":\"U8\","
                                                 "\"shape\":"
                                                 "[1,1,2,2],\"data_offsets\":[108160,108164]},"
                                                 "\"transformer.wte.weight\"",
                                    .grow = 4});
    b = slurp(dir, "model.safetensors");
    r = header_of(b);
    if (b.n - 8 - r.n == 108164)
        expect("gpt2 with its mask as a buffer", dir, KNE_OK, NULL);
    else
        check(0, "gpt2's data is %zu bytes", b.n - 8 - r.n);
    free(b.p);
    free(r.p);
    dir = make("gpt2", &(variation) {.find = "\"tie_word_embeddings\": true,",
                                    .by = "\"tie_word_embeddings\": false,"});
    expect("gpt2 with a head of its own that is not there", dir, KNE_ERR_FORMAT,
           "lm_head.weight is missing");

    /* mixed formats */
    dir = make("llama", &(variation) {.header_find = NORM,
                                     .header_by = "\"model.norm.weight\":{\"dtype\":\"BF16\","
                                                  "\"shape\":[32],"
                                                  "\"data_offsets\":[126208,126272]}",
                                     .grow = -64});
    kne_model_open(dir, &m, &err);
    check(m &&
              kne_load(kne_tensors_find(m->tensors, "model.norm.weight")->data, KNE_BF16, 9) ==
                  m->final_norm_w[9] &&
              m->dtype == KNE_F32,
          "a bfloat16 norm in a float32 model");
    kne_model_close(m);
    m = NULL;

    dir = make("llama", &same);
    poke(dir, "model.layers.1.input_layernorm.weight", 8, &nan_bits, 4);
    expect("NaN in a norm", dir, KNE_ERR_FORMAT,
           "model.layers.1.input_layernorm.weight holds NaN at 2");

    /* the tokenizer against the embedding: llama with a vocabulary of 100 */
    dir = make("llama", &(variation) {.find = "\"vocab_size\": 131", .by = "\"vocab_size\": 100"});
    rename_tensors(dir, "\"shape\":[131,32],\"data_offsets\":[0,16768]",
                   "\"shape\":[100,32],\"data_offsets\":[0,12800]");
    rename_tensors(dir, "\"shape\":[131,32],\"data_offsets\":[16768,33536]",
                   "\"shape\":[100,32],\"data_offsets\":[12800,25600]");
    b = slurp(dir, "model.safetensors");
    r = header_of(b);
    {
        /* close the gap of 7936 bytes that shorter tensors leave, by shifting every later offset */
        char  *out = NULL, *p = r.p, *at;
        size_t n;
        FILE  *f = open_memstream(&out, &n);

        while ((at = strstr(p, "\"data_offsets\":[")))
        {
            long from = strtol(at + 16, &at, 10), to = strtol(at + 1, NULL, 10);
            long shift = from >= 33536 ? 7936 : 0;

            fwrite(p, 1, (size_t) (strstr(p, "\"data_offsets\":[") + 16 - p), f);
            fprintf(f, "%ld,%ld", from - shift, to - shift);
            p = strchr(at, ']');
        }
        fputs(p, f);
        fclose(f);
        free(r.p);
        r = with_header(b, (bytes) {out, n}, -7936);
        free(out);
    }
    spit(dir, "model.safetensors", r);
    free(b.p);
    free(r.p);
    expect("a tokenizer with more ids than the embedding has rows", dir, KNE_ERR_FORMAT,
           "tokenizer.json");

    /* fingerprints */
    snprintf(path, sizeof path, "%s/llama", golden);
    kne_model_open(path, &m, &err);
    kne_model_open(make("llama", &same), &other, &err);
    check(m && other && !strcmp(m->fingerprint, other->fingerprint) &&
              strlen(m->fingerprint) == 64,
          "equal folders at different paths have equal fingerprints");
    check(kne_tensors_unchanged(other->tensors, &err), "weights are unchanged");
    kne_model_close(other);
    other = NULL;
    dir = make("llama", &same);
    poke(dir, "model.layers.1.mlp.up_proj.weight", 40, "\1", 1);
    kne_model_open(dir, &other, &err);
    check(m && other && strcmp(m->fingerprint, other->fingerprint), "one byte makes another "
                                                                    "fingerprint");
    kne_model_close(m);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    err = (kne_err) {0};
    check(other && truncate(path, 1000) == 0 && !kne_tensors_unchanged(other->tensors, &err) &&
              strstr(err.msg, "model.safetensors"),
          "a truncated file is noticed");
    check(unlink(path) == 0 && !kne_tensors_unchanged(other->tensors, &err), "so is one that is "
                                                                             "gone");
    kne_model_close(other);

    /* links, as download caches lay folders out */
    dir = make("llama", &same);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    snprintf(link, sizeof link, "%s/blob", temp);
    check(rename(path, link) == 0 && symlink("../blob", path) == 0, "a link in place of the "
                                                                    "weights");
    expect("weights behind a link", dir, KNE_OK, NULL);
}

/* ---- real models ---- */

static void
test_real(void)
{
    static const struct
    {
        const char *name, *family, *dtype;
        int         layers, d, f, vocab, ctx;
    } models[] = {
        {"stories260K-fp32", "llama", "float32", 5, 64, 172, 512, 512},
        {"gpt-nano-sort", "gpt2", "float32", 3, 48, 192, 3, 11},
        {"lre-llama-5m", "llama", "bfloat16", 6, 256, 688, 4096, 64},
    };
    const char *shared = getenv("KNE_SHARED") ? getenv("KNE_SHARED") : "../shared";
    char        path[512];
    kne_model  *m = NULL;
    kne_err     err = {0};

    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
    {
        snprintf(path, sizeof path, "%s/models/%s", shared, models[i].name);
        if (access(path, F_OK) != 0)
        {
            skip(models[i].name, "the model is not on this machine");
            continue;
        }
        m = NULL;
        if (!check(kne_model_open(path, &m, &err) == KNE_OK, "%s opens", models[i].name))
            printf("# %s\n", err.msg);
        else
            check(!strcmp(m->arch.family, models[i].family) &&
                      m->arch.n_layers == models[i].layers && m->arch.d_model == models[i].d &&
                      m->arch.d_ff == models[i].f && m->arch.vocab_size == models[i].vocab &&
                      m->arch.n_ctx == models[i].ctx &&
                      !strcmp(kne_model_dtype_name(m), models[i].dtype),
                  "%s is what its config says", models[i].name);
        kne_model_close(m);
    }
    if (access("models/atlas/config.json", F_OK) != 0)
        skip("models/atlas", "the bundled model is not there");
    else
    {
        m = NULL;
        check(kne_model_open("models/atlas", &m, &err) == KNE_OK, "the bundled model opens%s%s",
              m ? "" : ": ", m ? "" : err.msg);
        kne_model_close(m);
    }
}

int
main(void)
{
    char path[300];

    golden = getenv("KNE_GOLDEN") ? getenv("KNE_GOLDEN") : "test/golden";
    snprintf(temp, sizeof temp, "%s/kne-model-XXXXXX",
             getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (access(golden, F_OK) != 0 || !mkdtemp(temp))
        check(0, "golden models are in %s and a temporary folder can be made", golden);
    else
    {
        test_variations();
        test_files();
        test_shards();
        test_configs();
        test_rope();
        test_views();
        test_odd_folders();
        snprintf(path, sizeof path, "%s/model", temp);
        empty_folder(path);
        rmdir(path);
        empty_folder(temp);
        rmdir(temp);
    }
    test_real();
    return kne_test_done();
}
