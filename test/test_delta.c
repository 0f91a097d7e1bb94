/*
 * test_delta.c - what an edit is made of before and after it is solved: its
 * options, its delta rows with their digest, and the view that a set of deltas
 * gives of a model. Views are checked against a forward pass in double over
 * weights that this file edits by itself.
 */
#include "kne_options.h"
#include "kne_pack.h"
#include "kne_test.h"
#include "kne_view.h"
#include "tiny_model.h"

#include <openssl/sha.h>

static kne_backend *be;

static bool
ok(kne_status st, const kne_err *err)
{
    if (st != KNE_OK)
        printf("# %s %s\n", err->msg, err->detail);
    return st == KNE_OK;
}

/* ---- options ---- */

static kne_status
parse(kne_options *o, const char *json, kne_err *err)
{
    memset(err, 0, sizeof *err);
    return kne_options_parse(o, json, strlen(json), err);
}

/* Set an option through JSON and read it back from the struct by its offset. */
static double
set_json(const kne_option *opt, const char *value, kne_status *st, kne_err *err)
{
    char        json[256];
    kne_options o;

    snprintf(json, sizeof json, "{\"%s\": %s}", opt->name, value);
    *st = parse(&o, json, err);
    const void *at = (const char *) &o + opt->offset;
    return opt->kind == KNE_OPT_REAL ? *(const double *) at : *(const int *) at;
}

static bool
refuses(const kne_option *opt, const char *value, const char *says)
{
    kne_status st;
    kne_err    err;

    set_json(opt, value, &st, &err);
    if (st != KNE_ERR_INVALID || !strstr(err.msg, says) || !strstr(err.msg, opt->name))
        printf("# %s: %s: %d %s\n", opt->name, value, st, err.msg);
    return st == KNE_ERR_INVALID && strstr(err.msg, says) && strstr(err.msg, opt->name);
}

/* A number: both ends of its range are taken, the next outside is not, nor is another type. */
static bool
test_number(const kne_option *opt)
{
    double      end[2] = {opt->min, opt->max};
    const char *whole = opt->kind == KNE_OPT_INT ? "whole number" : "number";
    bool        fine = true;
    kne_status  st;
    kne_err     err;
    char        text[64];

    for (int i = 0; i < 2; i++)
    {
        double out = opt->kind == KNE_OPT_INT ? end[i] + (i ? 1 : -1)
                     : nextafter(end[i], i ? INFINITY : -INFINITY);

        snprintf(text, sizeof text, "%.17g", end[i]);
        fine &= set_json(opt, text, &st, &err) == end[i] ||
                strcmp(opt->name, "layer_min") == 0; /* 4096 is above layer_max of nothing */
        fine &= st == KNE_OK;
        snprintf(text, sizeof text, "%.17g", out);
        fine &= refuses(opt, text, "out of range");
    }
    fine &= refuses(opt, "1e999", "");
    fine &= refuses(opt, "-1e999", "");
    fine &= refuses(opt, "\"1\"", whole) && refuses(opt, "true", whole) &&
            refuses(opt, "null", whole) && refuses(opt, "[1]", whole) &&
            refuses(opt, "{\"a\": 1}", whole);
    if (opt->kind == KNE_OPT_INT)
        fine &= refuses(opt, "1.5", whole);
    return fine;
}

static bool
test_word(const kne_option *opt)
{
    bool       fine = true;
    int        index = 0;
    kne_status st;
    kne_err    err;
    char       text[64];

    for (const char *p = opt->values; *p; index++)
    {
        int n = (int) strcspn(p, "|");

        snprintf(text, sizeof text, "\"%.*s\"", n, p);
        fine &= set_json(opt, text, &st, &err) == index && st == KNE_OK;
        snprintf(text, sizeof text, "\"%.*s\"", n - 1, p);
        fine &= refuses(opt, text, "invalid value");
        fine &= strstr(err.detail, opt->values) || !err.detail[0];
        p += n + (p[n] == '|');
    }
    return fine && refuses(opt, "\"\"", "invalid value") && refuses(opt, "1", "a string") &&
           refuses(opt, "true", "a string") && refuses(opt, "\"|\"", "invalid value") &&
           refuses(opt, "\"NONE\"", "invalid value");
}

/* Every option away from its default. */
static void
other_than_default(kne_options *o, int turn)
{
    kne_options_defaults(o);
    for (int i = 0; i < kne_option_count; i++)
    {
        const kne_option *opt = &kne_option_table[i];
        void             *at = (char *) o + opt->offset;

        if (opt->kind == KNE_OPT_REAL)
            *(double *) at = strcmp(opt->name, "seed") == 0 ? 9007199254740991.0
                             : turn ? opt->min + (opt->max - opt->min) / 3 : opt->min;
        else if (opt->kind == KNE_OPT_INT)
            *(int *) at = (int) (turn ? opt->max : opt->min);
        else
            *(int *) at = turn;
    }
    o->layer_min = turn ? 7 : 0;
}

static void
test_options(void)
{
    kne_options  o, p;
    kne_err      err;
    char         buf[4096], deep[4096];
    kne_status   st;

    kne_options_defaults(&o);
    check(parse(&p, "{}", &err) == KNE_OK && memcmp(&o, &p, sizeof o) == 0 &&
          kne_options_parse(&p, NULL, 0, &err) == KNE_OK && memcmp(&o, &p, sizeof o) == 0,
          "no options are the defaults");
    for (int i = 0; i < kne_option_count; i++)
    {
        const kne_option *opt = &kne_option_table[i];
        bool fine = opt->about && opt->about[0] && opt->kind <= KNE_OPT_ENUM;

        if (opt->kind == KNE_OPT_ENUM)
            fine &= test_word(opt);
        else if (opt->kind == KNE_OPT_BOOL)
        {
            fine &= set_json(opt, "true", &st, &err) == 1 && st == KNE_OK;
            fine &= set_json(opt, "false", &st, &err) == 0 && st == KNE_OK;
            fine &= refuses(opt, "1", "true or false") &&
                    refuses(opt, "\"true\"", "true or false") &&
                    refuses(opt, "null", "true or false");
        }
        else
            fine &= test_number(opt);
        check(fine, "option %s: type and range", opt->name);
    }

    st = parse(&o, "{\"pionts\": 3}", &err);
    bool named = st == KNE_ERR_INVALID && strstr(err.msg, "pionts");
    for (int i = 0; i < kne_option_count; i++)
        named &= strstr(err.hint, kne_option_table[i].name) != NULL;
    check(named, "an unknown option is refused, and the hint names every one there is");
    check(parse(&o, "{\"Points\": 3}", &err) == KNE_ERR_INVALID &&
          parse(&o, "{\"\": 3}", &err) == KNE_ERR_INVALID, "names are exact");
    check(kne_option_set(&o, "lr", KNE_JSON_NUMBER, NAN, NULL, &err) == KNE_ERR_INVALID &&
          kne_option_set(&o, "points", KNE_JSON_NUMBER, NAN, NULL, &err) == KNE_ERR_INVALID &&
          kne_option_set(&o, "points", KNE_JSON_NUMBER, INFINITY, NULL, &err) == KNE_ERR_INVALID,
          "NaN and infinity are refused");
    check(parse(&o, "{\"layer_min\": 3, \"layer_max\": 2}", &err) == KNE_ERR_INVALID &&
          parse(&o, "{\"layer_max\": 2, \"layer_min\": 3}", &err) == KNE_ERR_INVALID &&
          parse(&o, "{\"layer_max\": 3, \"layer_min\": 3}", &err) == KNE_OK &&
          parse(&o, "{\"layer_max\": -1, \"layer_min\": 3}", &err) == KNE_OK,
          "layer_min over layer_max is refused in either order");
    check(parse(&o, "{\"seed\": 0.5}", &err) == KNE_ERR_INVALID, "a seed is a whole number");
    check(parse(&o, "{\"points\": 2, \"points\": 5}", &err) == KNE_OK && o.points == 5,
          "the last of two wins");

    static const char *const not_objects[] = {
        "", "[]", "1", "null", "\"{}\"", "{", "{\"points\"}", "}", " ", "{\"points\": 1,}", "true",
        "\xff", "{} {}", "{\"points\": 2} x", "nul",
    };
    bool refused = true;
    for (size_t i = 1; i < sizeof not_objects / sizeof *not_objects; i++)
        if (*not_objects[i] && parse(&o, not_objects[i], &err) != KNE_ERR_INVALID)
        {
            printf("# taken: %s\n", not_objects[i]);
            refused = false;
        }
    check(refused, "what is not one JSON object is refused");
    for (size_t i = 0; i < sizeof deep; i++)
        deep[i] = "[{\"a\":"[i % 6];
    check(kne_options_parse(&o, deep, sizeof deep, &err) == KNE_ERR_INVALID,
          "deep JSON is refused");
    memset(deep, '[', sizeof deep);
    memcpy(deep, "{\"lr\":", 6);
    check(kne_options_parse(&o, deep, sizeof deep, &err) == KNE_ERR_INVALID,
          "deep arrays are refused");

    for (int turn = 0; turn < 2; turn++)
    {
        other_than_default(&o, turn);
        kne_options_print(&o, buf, sizeof buf);
        check(ok(parse(&p, buf, &err), &err) && memcmp(&o, &p, sizeof o) == 0,
              "printed options read back the same (%zu bytes)", strlen(buf));
    }
    kne_options_defaults(&o);
    kne_options_print(&o, buf, sizeof buf);
    check(parse(&p, buf, &err) == KNE_OK && memcmp(&o, &p, sizeof o) == 0 &&
          !strstr(buf, "00000") && strstr(buf, "\"path\":\"joint\"") &&
          strstr(buf, "\"signed\":false"), "printed defaults read back the same, and read well");
    bool inside = true;
    for (size_t size = 0; size <= strlen(buf) + 1; size++)
    {
        memset(deep, 'x', sizeof deep);
        kne_options_print(&o, deep, size);
        inside &= deep[size] == 'x' && (size == 0 || memchr(deep, '\0', size));
    }
    check(inside, "printing stays within its buffer");
}

/* ---- deltas ---- */

enum { D = 5, N_ROWS = 4 };

static float values[N_ROWS][D];

static void
make_rows(kne_delta_row *row)
{
    uint64_t seed = 3;

    for (int i = 0; i < N_ROWS; i++)
        for (int c = 0; c < D; c++)
            values[i][c] = (float) tiny_uniform(&seed);
    values[1][2] = -0.0f;
    values[2][0] = 1e-42f; /* subnormal */
    row[0] = (kne_delta_row) {0, 2, KNE_MATRIX_DOWN, D, values[0]};
    row[1] = (kne_delta_row) {0, 2, KNE_MATRIX_UP, D, values[1]};
    row[2] = (kne_delta_row) {0, 7, KNE_MATRIX_DOWN, D, values[2]};
    row[3] = (kne_delta_row) {2, 0, KNE_MATRIX_GATE, D, values[3]};
}

/* The bytes that kne_protocol.h says the digest is of, put together by hand. */
static size_t
digest_bytes(uint8_t *out, const kne_delta_row *row, int n)
{
    size_t at = 0;

    for (int i = 0; i < n; i++)
    {
        uint32_t head[2] = {(uint32_t) row[i].layer, (uint32_t) row[i].neuron};

        for (int k = 0; k < 2; k++)
            for (int b = 0; b < 4; b++)
                out[at++] = (uint8_t) (head[k] >> 8 * b);
        out[at++] = row[i].matrix;
        for (int b = 0; b < 4; b++)
            out[at++] = (uint8_t) ((uint32_t) row[i].len >> 8 * b);
        for (int c = 0; c < row[i].len; c++)
        {
            uint32_t u;

            memcpy(&u, &row[i].v[c], 4);
            for (int b = 0; b < 4; b++)
                out[at++] = (uint8_t) (u >> 8 * b);
        }
    }
    return at;
}

static void *
grow(void *p, size_t cap)
{
    return realloc(p, cap);
}

static bool
same_delta(const kne_delta *a, const kne_delta *b)
{
    bool same = a->n_rows == b->n_rows && !memcmp(a->digest, b->digest, KNE_DIGEST_LEN);

    for (int i = 0; same && i < a->n_rows; i++)
        same = a->row[i].layer == b->row[i].layer && a->row[i].neuron == b->row[i].neuron &&
               a->row[i].matrix == b->row[i].matrix && a->row[i].len == b->row[i].len &&
               !memcmp(a->row[i].v, b->row[i].v, (size_t) a->row[i].len * sizeof(float));
    return same;
}

static void
test_digest(void)
{
    kne_delta_row row[N_ROWS], other[N_ROWS];
    kne_delta    *d = NULL, *e = NULL;
    uint8_t       bytes[1024], md[SHA256_DIGEST_LENGTH], set[KNE_DIGEST_LEN];
    kne_err       err;

    make_rows(row);
    check(ok(kne_delta_new(row, N_ROWS, &d, &err), &err) && d->refs == 1 && d->n_rows == N_ROWS,
          "a delta of four rows");
    SHA256(bytes, digest_bytes(bytes, row, N_ROWS), md);
    check(memcmp(md, d->digest, sizeof md) == 0, "its digest is SHA-256 of its rows as documented");
    check(d->row[0].v != row[0].v && !memcmp(d->row[2].v, values[2], sizeof values[2]),
          "its values are copies");

    bool differs = true;
    for (int k = 0; k < 5; k++)
    {
        float v[D];

        memcpy(other, row, sizeof row);
        memcpy(v, values[3], sizeof v);
        other[3].v = v;
        if (k == 0)
            other[3].layer++;
        else if (k == 1)
            other[3].neuron++;
        else if (k == 2)
            other[3].matrix++;
        else if (k == 3)
            v[D - 1] = nextafterf(v[D - 1], 1);
        else
            other[3].len--;
        differs &= ok(kne_delta_new(other, N_ROWS, &e, &err), &err) &&
                   memcmp(e->digest, d->digest, KNE_DIGEST_LEN) != 0;
        kne_delta_release(e);
    }
    memcpy(other, row, sizeof row);
    other[1].v = (float[D]) {values[1][0], values[1][1], 0.0f, values[1][3], values[1][4]};
    differs &= kne_delta_new(other, N_ROWS, &e, &err) == KNE_OK &&
               memcmp(e->digest, d->digest, KNE_DIGEST_LEN) != 0;
    kne_delta_release(e);
    check(differs, "whatever changes in a row changes the digest, the sign of a zero too");

    check(ok(kne_delta_new(NULL, 0, &e, &err), &err) && e->n_rows == 0, "a delta without rows");
    SHA256(bytes, 0, md);
    check(!memcmp(md, e->digest, sizeof md), "has the digest of nothing");

    int64_t id[2] = {-5, 1ll << 40};
    uint8_t digests[2][KNE_DIGEST_LEN];
    size_t  at = 0;

    memcpy(digests[0], d->digest, KNE_DIGEST_LEN);
    memcpy(digests[1], e->digest, KNE_DIGEST_LEN);
    for (int i = 0; i < 2; i++)
    {
        for (int b = 0; b < 8; b++)
            bytes[at++] = (uint8_t) ((uint64_t) id[i] >> 8 * b);
        memcpy(bytes + at, digests[i], KNE_DIGEST_LEN);
        at += KNE_DIGEST_LEN;
    }
    SHA256(bytes, at, md);
    check(kne_set_digest(id, (const uint8_t (*)[KNE_DIGEST_LEN]) digests, 2, set, &err) == KNE_OK &&
          !memcmp(set, md, sizeof md), "a set's digest is SHA-256 of ids and digests");
    memset(md, 0, sizeof md);
    check(kne_set_digest(NULL, NULL, 0, set, &err) == KNE_OK && !memcmp(set, md, sizeof md),
          "the empty set's digest is zero");
    kne_delta_release(d);
    kne_delta_release(e);
    kne_delta_release(NULL);
}

static bool
new_refuses(kne_delta_row *row, int n, const char *says)
{
    kne_delta *d = NULL;
    kne_err    err;
    kne_status st = kne_delta_new(row, n, &d, &err);

    if (st != KNE_ERR_INVALID)
        kne_delta_release(d);
    return st == KNE_ERR_INVALID && !d && strstr(err.msg, says);
}

static void
test_delta_refusals(void)
{
    static const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    kne_delta_row row[N_ROWS], t;
    bool          fine = true;

    make_rows(row);
    for (int i = 0; i + 1 < N_ROWS; i++)
    {
        t = row[i];
        row[i] = row[i + 1];
        row[i + 1] = t;
        fine &= new_refuses(row, N_ROWS, "order");
        make_rows(row);
    }
    row[1] = row[0];
    check(fine && new_refuses(row, N_ROWS, "order"),
          "rows out of order and equal rows are refused");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    {
        make_rows(row);
        values[i][(i + 4) % D] = bad[i];
        fine &= new_refuses(row, N_ROWS, "finite");
    }
    check(fine, "values that are not finite are refused");
}

/* A delta as the body of a frame at an odd address. */
static kne_status
read_at_odd(const uint8_t *body, size_t len, const uint8_t *digest, kne_delta **out, size_t *left,
            kne_err *err)
{
    uint8_t   *copy = malloc(len + 3); /* exact end, so that a sanitizer sees a read over it */
    kne_rbuf   r = {.p = copy + 3, .len = len};

    if (len)
        memcpy(copy + 3, body, len);
    kne_status st = kne_delta_read(&r, digest, out, err);
    *left = r.len - r.at;
    free(copy);
    return st;
}

static void
test_frames(void)
{
    kne_delta_row row[N_ROWS];
    kne_delta    *d = NULL, *e = NULL;
    kne_wbuf      w = {.grow = grow};
    kne_err       err;
    size_t        left;
    bool          fine = true;

    make_rows(row);
    kne_delta_new(row, N_ROWS, &d, &err);
    kne_delta_write(&w, d);
    check(ok(read_at_odd(w.p, w.len, d->digest, &e, &left, &err), &err) && left == 0 &&
          same_delta(d, e), "written and read back from an odd address it is the same");
    kne_delta_release(e);
    e = NULL;

    for (size_t len = 0; len < w.len && fine; len++)
    {
        kne_status st = read_at_odd(w.p, len, d->digest, &e, &left, &err);

        fine = st == KNE_ERR_PROTOCOL && !e;
    }
    check(fine, "cut at any of its %zu bytes it is malformed", w.len);

    int taken = 0;
    for (size_t i = 0; i < w.len; i++)
        for (int bit = 0; bit < 8; bit++)
        {
            e = NULL;
            w.p[i] ^= (uint8_t) (1 << bit);
            if (read_at_odd(w.p, w.len, d->digest, &e, &left, &err) == KNE_OK)
                taken++;
            else
                fine &= !e;
            kne_delta_release(e);
            w.p[i] ^= (uint8_t) (1 << bit);
        }
    check(fine && taken == 0, "with any bit flipped it is refused (%d taken)", taken);

    static const uint32_t counts[] = {6, 1000, 0x7fffffff, 0x80000000, 0xffffffff};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    {
        e = NULL;
        memcpy(w.p, &counts[i], 4);
        fine &= read_at_odd(w.p, w.len, d->digest, &e, &left, &err) == KNE_ERR_PROTOCOL && !e;
        uint32_t n = N_ROWS;
        memcpy(w.p, &n, 4);
        memcpy(w.p + 4 + 9, &counts[i], 4); /* the first row's length */
        fine &= read_at_odd(w.p, w.len, d->digest, &e, &left, &err) != KNE_OK && !e;
        n = D;
        memcpy(w.p + 4 + 9, &n, 4);
    }
    check(fine, "absurd counts are malformed");
    kne_delta_release(d);

    w.len = 0;
    kne_delta_new(NULL, 0, &d, &err);
    kne_delta_write(&w, d);
    check(w.len == 4 && ok(read_at_odd(w.p, w.len, d->digest, &e, &left, &err), &err) &&
          e->n_rows == 0, "a delta without rows survives a frame");
    kne_delta_release(e);
    kne_delta_release(d);
    free(w.p);
}

static void
test_check(void)
{
    tiny_model   *gated = tiny_new(&tiny_specs[0], 1), *plain = tiny_new(&tiny_specs[3], 1);
    float         v[32] = {0};
    kne_err       err;

    struct { int32_t layer, neuron; int matrix, len; bool gated, plain; } cases[] = {
        {0, 0, KNE_MATRIX_DOWN, 0, true, true}, {2, 36, KNE_MATRIX_DOWN, 0, true, true},
        {0, 36, KNE_MATRIX_UP, 0, true, true}, {0, 36, KNE_MATRIX_GATE, 0, true, false},
        {3, 0, KNE_MATRIX_DOWN, 0, false, false}, {-1, 0, KNE_MATRIX_DOWN, 0, false, false},
        {0, 37, KNE_MATRIX_DOWN, 0, false, true}, {0, 50, KNE_MATRIX_DOWN, 0, false, false},
        {0, -1, KNE_MATRIX_DOWN, 0, false, false}, {0, 0, 3, 0, false, false},
        {0, 0, 255, 0, false, false}, {0, 0, KNE_MATRIX_DOWN, -1, false, false},
        {0, 0, KNE_MATRIX_DOWN, 1, false, false}, {INT32_MAX, 0, 0, 0, false, false},
        {INT32_MIN, INT32_MIN, 0, 0, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    {
        bool fine = true;

        for (int m = 0; m < 2; m++)
        {
            const tiny_model *t = m ? plain : gated;
            kne_delta_row     row = {cases[i].layer, cases[i].neuron, (uint8_t) cases[i].matrix,
                                     t->m.arch.d_model + cases[i].len, v};
            kne_delta        *d = NULL;
            kne_view         *view = NULL;
            int64_t           id = 1;

            fine &= kne_delta_new(&row, 1, &d, &err) == KNE_OK;
            kne_status want = (m ? cases[i].plain : cases[i].gated) ? KNE_OK : KNE_ERR_INVALID;
            fine &= kne_delta_check(d, &t->m, &err) == want;
            fine &= kne_view_new(&t->m, be, 1, &id, &d, &view, &err) == want &&
                    (view != NULL) == (want == KNE_OK);
            kne_view_free(view);
            fine &= d->refs == 1;
            kne_delta_release(d);
        }
        check(fine, "layer %d neuron %d matrix %d: fits or not, and a view says the same",
              cases[i].layer, cases[i].neuron, cases[i].matrix);
    }
    tiny_free(gated);
    tiny_free(plain);
}

/* ---- views ---- */

enum { N_EDITS = 5, SEQ = 9 };

/* Some edits whose neurons overlap: neuron l * 3 of each layer is in all of them. */
static void
make_deltas(const tiny_model *t, bool keys, double scale, uint64_t seed, kne_delta **out)
{
    const kne_arch *a = &t->m.arch;
    kne_delta_row   row[64];
    float          *v = malloc((size_t) (64 * a->d_model) * sizeof *v);
    kne_err         err;

    for (int e = 0; e < N_EDITS; e++)
    {
        int n = 0;

        for (int32_t l = 0; l < a->n_layers; l++)
            for (int32_t k = 0; k < 3; k++)
                for (int mat = 0; mat < 3; mat++)
                {
                    /* edit 3 has keys alone, edit 4 leaves the second layer alone */
                    if ((mat == KNE_MATRIX_GATE && !a->gated) || (mat && !keys) ||
                        (keys && e == 3 && mat == KNE_MATRIX_DOWN) || (e == 4 && l == 1))
                        continue;
                    int32_t neuron = k == 0 ? l * 3 : k * 9 + e;
                    float  *at = v + n * a->d_model;

                    for (int32_t c = 0; c < a->d_model; c++)
                        at[c] = (float) (scale * tiny_uniform(&seed));
                    row[n++] = (kne_delta_row) {l, neuron, (uint8_t) mat, a->d_model, at};
                }
        out[e] = NULL;
        if (kne_delta_new(row, n, &out[e], &err) != KNE_OK)
            printf("# %s\n", err.msg);
    }
    free(v);
}

static void
release_deltas(kne_delta **d)
{
    for (int e = 0; e < N_EDITS; e++)
        kne_delta_release(d[e]);
}

static const int64_t ids[N_EDITS] = {-3, 0, 4, 5, 1000000007};

/* What a row should be: base, then each delta in order, each sum a float, then the format. */
static void
plain_row(const tiny_model *t, kne_delta *const *d, int n, int32_t l, int32_t k, int mat,
          float *base, float *eff)
{
    const kne_arch   *a = &t->m.arch;
    const tiny_layer *r = &t->layer[l];
    const kne_layer  *y = &t->m.layer[l];
    kne_dtype         type = mat == 0 ? y->down.type : mat == 1 ? y->gate.type : y->up.type;

    for (int32_t c = 0; c < a->d_model; c++)
    {
        volatile float sum = (float) (mat == 0 ? r->down[c * a->d_ff + k]
                                      : (mat == 1 ? r->gate : r->up)[k * a->d_model + c]);

        base[c] = sum;
        for (int e = 0; e < n; e++)
            for (int i = 0; i < d[e]->n_rows; i++)
                if (d[e]->row[i].layer == l && d[e]->row[i].neuron == k &&
                    d[e]->row[i].matrix == mat)
                    sum = sum + d[e]->row[i].v[c];
        eff[c] = kne_round_to(sum, type);
    }
}

/* Every neuron of the view against plain_row, and which it has against those of the deltas. */
static bool
view_is(const tiny_model *t, const kne_view *v, kne_delta *const *d, int n)
{
    const kne_arch *a = &t->m.arch;
    float           base[32], eff[32];
    bool            same = true;
    int32_t         most = 0;

    for (int32_t l = 0; l < a->n_layers; l++)
    {
        const kne_overlay_layer *o = &v->layer[l];
        int32_t at = 0;

        most = o->n > most ? o->n : most;
        for (int32_t k = 0; k < a->d_ff; k++)
        {
            bool edited = false;

            for (int e = 0; e < n; e++)
                for (int i = 0; i < d[e]->n_rows; i++)
                    edited |= d[e]->row[i].layer == l && d[e]->row[i].neuron == k;
            if (edited != (at < o->n && o->neuron[at] == k))
                return false;
            if (!edited)
                continue;
            for (int mat = 0; mat < 3; mat++)
            {
                const float *row = mat == 0 ? o->value_diff : mat == 1 ? o->gate : o->up;

                if (mat == 1 && !a->gated)
                    continue;
                plain_row(t, d, n, l, k, mat, base, eff);
                for (int32_t c = 0; c < a->d_model; c++)
                {
                    float want = mat == 0 ? eff[c] - base[c] : eff[c];

                    same &= row ? row[at * a->d_model + c] == want : eff[c] == base[c];
                }
            }
            at++;
        }
        same &= at == o->n;
    }
    return same && v->max_overlay == most && v->overlay.layer == v->layer;
}

static int32_t *
tokens_of(const kne_arch *a, uint64_t seed)
{
    static int32_t id[SEQ];

    for (int i = 0; i < SEQ; i++)
        id[i] = (int32_t) (kne_random_next(&seed) % (uint64_t) a->vocab_size);
    return id;
}

/* logits (SEQ - 1, V) of one sequence in a view; the caller frees them. */
static float *
run_view(const tiny_model *t, const kne_view *v)
{
    const kne_arch *a = &t->m.arch;
    kne_pack        pack = {0};
    kne_arena       arena = {0};
    kne_work       *w = NULL;
    kne_err         err;
    size_t          bytes = (size_t) (SEQ - 1) * (size_t) a->vocab_size * sizeof(float);
    float          *logits = calloc(1, bytes);

    kne_pack_layout(&pack, &arena, SEQ, 1, SEQ);
    kne_arena_commit(&arena, &err);
    kne_pack_layout(&pack, &arena, SEQ, 1, SEQ);
    kne_pack_add(&pack, tokens_of(a, 5), SEQ, 1);
    if (ok(kne_work_new(&t->m, (kne_work_shape){SEQ, SEQ, v ? v->max_overlay : 0, false}, &w, &err),
           &err) &&
        ok(kne_forward(&t->m, be, w, &pack.b, v ? &v->overlay : NULL, NULL, 0, &err), &err))
        memcpy(logits, w->logits, bytes);
    kne_work_free(w);
    kne_arena_free(&arena);
    return logits;
}

/* Edit the doubles of the model as the view should, run them, restore. */
static double
distance_to_doubles(tiny_model *t, const kne_view *v, kne_delta *const *d, int n)
{
    const kne_arch *a = &t->m.arch;
    float           base[32], eff[32], *logits = run_view(t, v);
    double         *ref = malloc((size_t) (SEQ * a->vocab_size) * sizeof *ref), worst = 0, size = 0;

    for (int turn = 0; turn < 2; turn++)
    {
        for (int32_t l = 0; l < a->n_layers; l++)
            for (int32_t i = 0; i < v->layer[l].n; i++)
                for (int mat = 0; mat < 3; mat++)
                {
                    int32_t     k = v->layer[l].neuron[i];
                    tiny_layer *r = &t->layer[l];

                    if (mat == 1 && !a->gated)
                        continue;
                    /* the second turn puts back what the weights' own file says */
                    const kne_mat *w = mat == 0 ? &t->m.layer[l].down
                                       : mat == 1 ? &t->m.layer[l].gate : &t->m.layer[l].up;

                    if (turn == 0)
                        plain_row(t, d, n, l, k, mat, base, eff);
                    else
                        be->gather_neurons(be->ctx, eff, w, (mat == 0) != w->transposed, &k, 1);
                    for (int32_t c = 0; c < a->d_model; c++)
                        *(mat == 0 ? &r->down[c * a->d_ff + k]
                          : &(mat == 1 ? r->gate : r->up)[k * a->d_model + c]) = eff[c];
                }
        if (turn == 0)
            ref_forward(t, ref, tokens_of(a, 5), SEQ - 1, NULL);
    }
    for (int32_t i = 0; i < (SEQ - 1) * a->vocab_size; i++)
    {
        worst = fmax(worst, fabs(ref[i] - logits[i]));
        size = fmax(size, fabs(ref[i]));
    }
    free(ref);
    free(logits);
    return worst / size;
}

static kne_view *
view_of(const tiny_model *t, int n, kne_delta *const *d)
{
    kne_view *v = NULL;
    kne_err   err;

    return ok(kne_view_new(&t->m, be, n, ids, d, &v, &err), &err) ? v : NULL;
}

static bool
same_logits(const tiny_model *t, const kne_view *a, const kne_view *b)
{
    float *x = run_view(t, a), *y = run_view(t, b);
    bool   same = !memcmp(x, y, (size_t) (SEQ - 1) * (size_t) t->m.arch.vocab_size * sizeof *x);

    free(x);
    free(y);
    return same;
}

static void
test_view(const tiny_spec *spec, bool keys)
{
    tiny_model *t = tiny_new(spec, 71);
    const char *what = keys ? "keys and values" : "values";
    kne_delta  *d[N_EDITS], *zero[N_EDITS], *some[2];
    kne_view   *v = NULL, *w, *none;
    kne_err     err;
    bool        fine = true;
    double      far;

    make_deltas(t, keys, 0.1, 17, d);
    make_deltas(t, keys, 0, 17, zero);
    for (int n = 0; n <= N_EDITS; n++)
    {
        w = view_of(t, n, d);
        fine &= w && view_is(t, w, d, n) && w->n_edits == n;
        kne_view_free(w);
    }
    check(fine, "%s, %s: effective rows are the rounded sum in order of edit id", spec->name, what);

    v = view_of(t, N_EDITS, d);
    far = distance_to_doubles(t, v, d, N_EDITS);
    check(far < 3e-5, "%s, %s: logits agree with edited weights in double (%.1e)", spec->name, what,
          far);

    none = view_of(t, 0, d);
    check(same_logits(t, none, NULL), "%s: the empty view is the base, bit for bit", spec->name);
    check(!same_logits(t, v, NULL), "%s, %s: the edits move the logits", spec->name, what);
    w = view_of(t, N_EDITS, zero);
    if (keys && spec->a.conv1d) /* its products run over columns, the overlay's over rows */
    {
        far = distance_to_doubles(t, w, zero, N_EDITS);
        check(far < 3e-5, "%s, %s: deltas of zero give the base's logits but for rounding (%.1e)",
              spec->name, what, far);
    }
    else
        check(same_logits(t, w, NULL), "%s, %s: deltas of zero give the base's logits, bit for bit",
              spec->name, what);
    kne_view_free(w);
    kne_view_free(none);

    /* apply and remove: 0 and 4 with and without 2 in between */
    some[0] = d[0];
    some[1] = d[4];
    kne_view *two = NULL, *again = NULL;
    ok(kne_view_new(&t->m, be, 2, (int64_t[]) {ids[0], ids[4]}, some, &two, &err), &err);
    kne_view *three = NULL;
    ok(kne_view_new(&t->m, be, 3, (int64_t[]){ids[0], ids[2], ids[4]},
                    (kne_delta *[]){d[0], d[2], d[4]}, &three, &err),
       &err);
    ok(kne_view_new(&t->m, be, 2, (int64_t[]) {ids[0], ids[4]}, some, &again, &err), &err);
    check(two && three && again && same_logits(t, two, again) && !same_logits(t, two, three),
          "%s, %s: an edit applied and reverted leaves no bit behind", spec->name, what);
    kne_view_free(three);
    kne_view_free(again);
    kne_view_free(two);

    fine = kne_view_new(&t->m, be, 2, (int64_t[]) {4, 3}, some, &w, &err) == KNE_ERR_INVALID &&
           kne_view_new(&t->m, be, 2, (int64_t[]) {4, 4}, some, &w, &err) == KNE_ERR_INVALID;
    check(fine && d[0]->refs == 2 && d[4]->refs == 2,
          "%s: ids out of order are refused, and a view that is not made holds nothing",
          spec->name);
    release_deltas(d);
    check(v->delta[4]->refs == 1 && view_is(t, v, v->delta, N_EDITS),
          "%s: a view outlives its deltas' owner", spec->name);
    kne_view_free(v);
    release_deltas(zero);
    tiny_free(t);
}

/* Many edits on the same few neurons: the sum is in order, where order shows in the last bits. */
static void
test_pile(void)
{
    enum { N = 300 };
    tiny_model    *t = tiny_new(&tiny_specs[0], 3);
    const int32_t  d = t->m.arch.d_model;
    kne_delta     *delta[N], *back[N];
    int64_t        id[N];
    float          v[2][32];
    uint64_t       seed = 4;
    kne_view      *view = NULL, *other = NULL;
    kne_err        err;

    for (int e = 0; e < N; e++)
    {
        for (int c = 0; c < d; c++)
        {
            v[0][c] = (float) (tiny_uniform(&seed) * pow(10, 3 * tiny_uniform(&seed)));
            v[1][c] = (float) tiny_uniform(&seed);
        }
        kne_delta_row row[2] = {{1, 4, 0, d, v[0]}, {1, 5, 2, d, v[1]}};

        ok(kne_delta_new(row, 2, &delta[e], &err), &err);
        id[e] = e * 7;
        back[N - 1 - e] = delta[e];
    }
    check(ok(kne_view_new(&t->m, be, N, id, delta, &view, &err), &err) &&
              view_is(t, view, delta, N),
          "%d edits on the same neurons", N);
    check(ok(kne_view_new(&t->m, be, N, id, back, &other, &err), &err) &&
          view_is(t, other, back, N) && !view_is(t, other, delta, N),
          "the order of ids is the order of the sum");
    kne_view_free(view);
    kne_view_free(other);
    for (int e = 0; e < N; e++)
        kne_delta_release(delta[e]);
    tiny_free(t);
}

/* ---- packing ---- */

static void
test_pack(void)
{
    static const int32_t one[5] = {10, 11, 12, 13, 14}, two[2] = {20, 21};
    kne_pack  p = {0};
    kne_arena arena = {0};
    kne_err   err;

    kne_pack_layout(&p, &arena, 6, 3, 3);
    kne_arena_commit(&arena, &err);
    kne_pack_layout(&p, &arena, 6, 3, 3);
    check(kne_pack_fits(&p, 5, 3) && !kne_pack_fits(&p, 8, 7) && kne_pack_fits(&p, 7, 6) &&
          kne_pack_fits(&p, 4, 1) && !kne_pack_fits(&p, 5, 1), "room is rows and out rows");
    check(kne_pack_add(&p, one, 5, 3) == 0 && kne_pack_add(&p, two, 2, 1) == 2,
          "a fact's first out row is told");
    static const int32_t id[5] = {10, 11, 12, 13, 20}, pos[5] = {0, 1, 2, 3, 0};
    static const int32_t out[3] = {2, 3, 4}, target[3] = {13, 14, 21};

    check(p.b.n == 5 && p.b.n_seq == 2 && p.b.n_out == 3 && !memcmp(p.id, id, sizeof id) &&
          !memcmp(p.pos, pos, sizeof pos) && !memcmp(p.out_row, out, sizeof out) &&
          !memcmp(p.target, target, sizeof target) && p.seq[1].q0 == 4 && p.seq[1].q_len == 1 &&
          p.seq[0].kv_len == 4 && p.b.id == p.id, "two facts lie one after the other");
    check(!kne_pack_fits(&p, 2, 1), "full is full");
    kne_pack_clear(&p);
    check(p.b.n == 0 && p.b.n_seq == 0 && p.b.n_out == 0 && kne_pack_fits(&p, 4, 1),
          "cleared it is empty");
    kne_arena_free(&arena);
}

int
main(void)
{
    kne_err err;

    if (!ok(kne_cpu_backend_new(2, getenv("KNE_TEST_ISA"), &be, &err), &err))
        return 1;
    test_options();
    test_digest();
    test_delta_refusals();
    test_frames();
    test_check();
    for (int i = 0; i < TINY_N_SPEC; i++)
    {
        test_view(&tiny_specs[i], false);
        test_view(&tiny_specs[i], true);
    }
    test_pile();
    test_pack();
    kne_cpu_backend_free(be);
    return kne_test_done();
}
