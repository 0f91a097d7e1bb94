/*
 * kne_safetensors.c - reading and checking safetensors files (see kne_safetensors.h).
 *
 * Format: 8 bytes little-endian length, that many bytes of JSON
 * {"name": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...,
 * "__metadata__": {string: string}}, then the data. Offsets count from the end
 * of the header. The header is read with cJSON, whose numbers are doubles: exact
 * to 2^53, and anything above is refused.
 */
#include "kne_safetensors.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_HEADER ((uint64_t) 100000000) /* the format's own limit */
#define MAX_INDEX ((size_t) 64 << 20)
#define MAX_SHARDS 4096
/* A value costs cJSON some 80 bytes, so two bytes of a file ("1,") would cost forty times their
 * number. 150,000 tensors fit in this many values; the largest models have 100,000, in shards. */
#define MAX_JSON_VALUES 2000000
#define MAX_EXACT 9007199254740992.0 /* 2^53 */

static const struct
{
    const char *name;
    int         bits;
    int         type; /* kne_dtype or -1 */
} dtypes[] = {
    {"F32", 32, KNE_F32}, {"F16", 16, KNE_F16}, {"BF16", 16, KNE_BF16}, {"F64", 64, -1},
    {"I64", 64, -1},      {"U64", 64, -1},      {"C64", 64, -1},        {"I32", 32, -1},
    {"U32", 32, -1},      {"I16", 16, -1},      {"U16", 16, -1},        {"I8", 8, -1},
    {"U8", 8, -1},        {"BOOL", 8, -1},      {"F8_E4M3", 8, -1},     {"F8_E5M2", 8, -1},
    {"F8_E8M0", 8, -1},   {"F6_E2M3", 6, -1},   {"F6_E3M2", 6, -1},     {"F4", 4, -1},
};

kne_quoted
kne_quote(const char *text)
{
    kne_quoted q;
    size_t     n = 0;

    for (; n < sizeof q.s - 4 && text[n]; n++)
        q.s[n] = text[n] >= 0x20 && text[n] < 0x7f ? text[n] : '?';
    if (text[n])
        n += (size_t) (stpcpy(q.s + n, "...") - (q.s + n));
    q.s[n] = '\0';
    return q;
}

/* Open for reading without waiting for a FIFO's writer; only regular files will do. */
static kne_status
open_regular(const char *path, const char *label, int *fd, struct stat *st, kne_err *err)
{
    int e;

    if ((*fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)) < 0)
    {
        e = errno;
        kne_error(err, KNE_ERR_IO, "cannot open %s: %s", label, strerror(e));
        return KNE_ERR_IO;
    }
    if (fstat(*fd, st) != 0)
    {
        e = errno;
        close(*fd);
        return kne_error(err, KNE_ERR_IO, "cannot examine %s: %s", label, strerror(e));
    }
    if (!S_ISREG(st->st_mode))
    {
        close(*fd);
        return kne_error(err, KNE_ERR_IO, "%s is not a regular file", label);
    }
    return KNE_OK;
}

kne_status
kne_file_read(const char *path, const char *label, size_t max, char **buf, size_t *len,
              kne_err *err)
{
    struct stat st;
    int         fd;
    size_t      size, got = 0;
    ssize_t     r = 1;
    char       *p;

    KNE_TRY(open_regular(path, label, &fd, &st, err));
    if ((uint64_t) st.st_size > max)
    {
        close(fd);
        return kne_error(err, KNE_ERR_FORMAT, "%s is too large: %lld bytes, at most %zu are read",
                         label, (long long) st.st_size, max);
    }
    size = (size_t) st.st_size;
    if (!(p = malloc(size + 1)))
    {
        close(fd);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory reading %s", label);
    }
    while (got < size && ((r = read(fd, p + got, size - got)) > 0 || (r < 0 && errno == EINTR)))
        got += r > 0 ? (size_t) r : 0;
    if (r < 0)
        kne_error(err, KNE_ERR_IO, "cannot read %s: %s", label, strerror(errno));
    close(fd);
    if (r < 0)
    {
        free(p);
        return KNE_ERR_IO;
    }
    p[got] = '\0'; /* a file that shrank meanwhile is taken as it is now */
    *buf = p;
    *len = got;
    return KNE_OK;
}

kne_status
kne_json_object(const char *text, size_t len, const char *label, cJSON **out, kne_err *err)
{
    const char *end = NULL;
    size_t      values = 0;
    cJSON      *j;

    for (size_t i = 0; i < len; i++)
        values += text[i] == ',' || text[i] == '[' || text[i] == '{' || text[i] == ':';
    if (values > MAX_JSON_VALUES)
        return kne_error(err, KNE_ERR_FORMAT, "%s: more than %d values", label, MAX_JSON_VALUES);
    if (!(j = cJSON_ParseWithLengthOpts(text, len, &end, 0)))
        return kne_error(err, KNE_ERR_FORMAT, "%s: broken JSON at byte %zu", label,
                         end && end >= text ? (size_t) (end - text) : (size_t) 0);
    for (; end < text + len; end++)
        if (*end != ' ' && *end != '\n' && *end != '\r' && *end != '\t')
        {
            cJSON_Delete(j);
            return kne_error(err, KNE_ERR_FORMAT, "%s: text after the JSON object, at byte %zu",
                             label, (size_t) (end - text));
        }
    if (!cJSON_IsObject(j))
    {
        cJSON_Delete(j);
        return kne_error(err, KNE_ERR_FORMAT, "%s: not a JSON object", label);
    }
    *out = j;
    return KNE_OK;
}

/* A whole number from 0 to 2^53. */
static bool
whole(const cJSON *j, int64_t *out)
{
    if (!cJSON_IsNumber(j) || !(j->valuedouble >= 0 && j->valuedouble <= MAX_EXACT) ||
        j->valuedouble != floor(j->valuedouble))
        return false;
    *out = (int64_t) j->valuedouble;
    return true;
}

/* ---- one file ---- */

/* One header entry into *t; begin and end within the data of data_len bytes. */
static kne_status
read_entry(const cJSON *j, const char *label, size_t data_len, kne_tensor *t, int64_t *begin,
           kne_err *err)
{
    const cJSON *dtype = NULL, *shape = NULL, *offsets = NULL, *c;
    const char  *name = j->string;
    int64_t      end, n = 1, bits;
    size_t       k;

    for (const char *p = name; *p; p++)
        if (*p <= 0x20 || *p >= 0x7f)
            return kne_error(err, KNE_ERR_FORMAT,
                             "%s: tensor name \"%s\" has bytes outside printable ASCII", label,
                             kne_quote(name).s);
    if (!*name)
        return kne_error(err, KNE_ERR_FORMAT, "%s: a tensor without a name", label);
    if (!cJSON_IsObject(j))
        return kne_error(err, KNE_ERR_FORMAT, "%s: entry of tensor %s is not an object", label,
                         kne_quote(name).s);
    cJSON_ArrayForEach(c, j)
    {
        const cJSON **slot = !strcmp(c->string, "dtype")          ? &dtype
                             : !strcmp(c->string, "shape")        ? &shape
                             : !strcmp(c->string, "data_offsets") ? &offsets
                                                                  : NULL;

        if (!slot || *slot)
            return kne_error(err, KNE_ERR_FORMAT, "%s: tensor %s has %s key \"%s\"", label,
                             kne_quote(name).s, slot ? "a second" : "an unknown",
                             kne_quote(c->string).s);
        *slot = c;
    }
    if (!dtype || !cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !offsets || !cJSON_IsArray(offsets))
        return kne_error(err, KNE_ERR_FORMAT, "%s: tensor %s lacks dtype, shape or data_offsets",
                         label, kne_quote(name).s);

    for (k = 0; k < sizeof dtypes / sizeof *dtypes && strcmp(dtypes[k].name, dtype->valuestring);
         k++)
        ;
    if (k == sizeof dtypes / sizeof *dtypes)
        return kne_error(err, KNE_ERR_UNSUPPORTED, "%s: tensor %s has unknown dtype \"%s\"", label,
                         kne_quote(name).s, kne_quote(dtype->valuestring).s);
    t->type_name = dtypes[k].name;
    t->usable = dtypes[k].type >= 0;
    t->type = t->usable ? (kne_dtype) dtypes[k].type : KNE_F32;

    t->rank = 0;
    cJSON_ArrayForEach(c, shape)
    {
        if (t->rank == KNE_TENSOR_MAX_RANK)
            return kne_error(err, KNE_ERR_UNSUPPORTED, "%s: tensor %s has more than %d dimensions",
                             label, kne_quote(name).s, KNE_TENSOR_MAX_RANK);
        if (!whole(c, &t->shape[t->rank]))
            return kne_error(err, KNE_ERR_FORMAT,
                             "%s: tensor %s has a dimension that is not a whole number", label,
                             kne_quote(name).s);
        if (__builtin_mul_overflow(n, t->shape[t->rank++], &n))
            return kne_error(err, KNE_ERR_FORMAT, "%s: size of tensor %s overflows", label,
                             kne_quote(name).s);
    }
    t->n_elem = n;
    if (__builtin_mul_overflow(n, (int64_t) dtypes[k].bits, &bits))
        return kne_error(err, KNE_ERR_FORMAT, "%s: size of tensor %s overflows", label,
                         kne_quote(name).s);

    if (cJSON_GetArraySize(offsets) != 2 || !whole(offsets->child, begin) ||
        !whole(offsets->child->next, &end))
        return kne_error(err, KNE_ERR_FORMAT,
                         "%s: data_offsets of tensor %s are not two whole numbers", label,
                         kne_quote(name).s);
    if (*begin > end || (uint64_t) end > data_len)
    {
        kne_error(err, KNE_ERR_FORMAT, "%s: tensor %s lies at bytes %lld to %lld of %zu", label,
                  kne_quote(name).s, (long long) *begin, (long long) end, data_len);
        kne_error_hint(err, "The file may have been cut off while it was copied.");
        return KNE_ERR_FORMAT;
    }
    if (bits % 8 || end - *begin != bits / 8)
        return kne_error(err, KNE_ERR_FORMAT,
                         "%s: tensor %s occupies %lld bytes, its shape and dtype need %lld", label,
                         kne_quote(name).s, (long long) (end - *begin),
                         (long long) (bits / 8 + (bits % 8 != 0)));
    t->bytes = (size_t) (end - *begin);
    if (!(t->name = strdup(name)))
        return kne_error(err, KNE_ERR_NOMEM, "out of memory reading %s", label);
    return KNE_OK;
}

static int
by_place(const void *a, const void *b)
{
    const kne_tensor *x = a, *y = b;
    uintptr_t         p = (uintptr_t) x->data, q = (uintptr_t) y->data;

    if (p != q)
        return p < q ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty tensors first */
}

static int
by_name(const void *a, const void *b)
{
    return strcmp(((const kne_tensor *) a)->name, ((const kne_tensor *) b)->name);
}

static kne_status
check_metadata(const cJSON *meta, const char *label, kne_err *err)
{
    const cJSON *c;

    if (!cJSON_IsObject(meta))
        return kne_error(err, KNE_ERR_FORMAT, "%s: __metadata__ is not an object", label);
    cJSON_ArrayForEach(c, meta)
        if (!cJSON_IsString(c))
            return kne_error(err, KNE_ERR_FORMAT,
                             "%s: __metadata__ holds a value that is not a string", label);
    return KNE_OK;
}

/* Append the tensors of one file's bytes to *t. */
static kne_status
add_image(kne_tensors *t, const char *image, size_t len, int32_t file, const char *label,
          kne_err *err)
{
    uint64_t    header_len = 0;
    size_t      data_len;
    const char *data;
    cJSON      *root = NULL;
    kne_tensor *first, *grown;
    int64_t     count = 0, had = t->n;
    bool        metadata = false;
    kne_status  st;

    for (int i = 0; i < 8 && len >= 8; i++)
        header_len |= (uint64_t) (uint8_t) image[i] << 8 * i;
    if (len < 10) /* the length and {} */
        return kne_error(err, KNE_ERR_FORMAT, "%s: %zu bytes are too few for a safetensors file",
                         label, len);
    if (header_len > MAX_HEADER || header_len > len - 8)
    {
        kne_error(err, KNE_ERR_FORMAT, "%s: header length %llu, but the file has %zu bytes", label,
                  (unsigned long long) header_len, len);
        kne_error_hint(err, "This is not a safetensors file, or it was cut off while it was "
                            "copied.");
        return KNE_ERR_FORMAT;
    }
    if (image[8] != '{')
        return kne_error(err, KNE_ERR_FORMAT, "%s: the header does not begin with {", label);
    data = image + 8 + header_len;
    data_len = len - 8 - (size_t) header_len;
    KNE_TRY(kne_json_object(image + 8, (size_t) header_len, label, &root, err));

    for (const cJSON *c = root->child; c; c = c->next)
        count++;
    if (!(grown = realloc(t->tensor, (size_t) (had + count + 1) * sizeof *grown)))
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory reading %s", label);
        goto out;
    }
    t->tensor = grown;
    first = t->tensor + had;
    st = KNE_OK;
    for (const cJSON *c = root->child; c; c = c->next)
    {
        kne_tensor *k = &t->tensor[t->n];
        int64_t     begin = 0;

        if (!strcmp(c->string, "__metadata__"))
        {
            if (metadata)
                st = kne_error(err, KNE_ERR_FORMAT, "%s: __metadata__ occurs twice", label);
            else
                st = check_metadata(c, label, err);
            metadata = true;
            if (st != KNE_OK)
                goto out;
            continue;
        }
        *k = (kne_tensor) {.file = file};
        if ((st = read_entry(c, label, data_len, k, &begin, err)) != KNE_OK)
            goto out;
        k->data = data + begin;
        t->n++;
    }

    /* In order of place they must follow each other from the first byte to the last. */
    count = t->n - had;
    if (count)
        qsort(first, (size_t) count, sizeof *first, by_place);
    for (int64_t i = 0; i < count; i++)
    {
        if ((const char *) first[i].data != data)
        {
            st = kne_error(err, KNE_ERR_FORMAT, "%s: tensor %s %s", label,
                           kne_quote(first[i].name).s,
                           (const char *) first[i].data < data ? "overlaps the one before it"
                                                               : "leaves a hole before it");
            goto out;
        }
        data += first[i].bytes;
        t->bytes += (int64_t) first[i].bytes;
    }
    if (data != image + len)
        st = kne_error(err, KNE_ERR_FORMAT, "%s: %zu bytes after the last tensor", label,
                       (size_t) (image + len - data));
out:
    cJSON_Delete(root);
    return st;
}

/* Order by name and refuse a name that occurs twice. */
static kne_status
finish(kne_tensors *t, kne_err *err)
{
    if (t->n)
        qsort(t->tensor, (size_t) t->n, sizeof *t->tensor, by_name);
    for (int64_t i = 1; i < t->n; i++)
        if (!strcmp(t->tensor[i - 1].name, t->tensor[i].name))
            return kne_error(err, KNE_ERR_FORMAT, "tensor %s occurs twice, in %s and %s",
                             kne_quote(t->tensor[i].name).s,
                             kne_quote(t->file[t->tensor[i - 1].file].name).s,
                             kne_quote(t->file[t->tensor[i].file].name).s);
    return KNE_OK;
}

/* ---- folders ---- */

static char *
path_in(const char *dir, const char *name)
{
    char *path;

    if (!*dir)
        return strdup(name);
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

static kne_status
map_file(kne_tensors *t, int32_t file, kne_err *err)
{
    kne_tensor_file *f = &t->file[file];
    const char      *label = f->name;
    char            *path = path_in(t->dir, f->name);
    struct stat      st;
    int              fd, e;
    kne_status       status;

    if (!path)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory opening %s", label);
    status = open_regular(path, label, &fd, &st, err);
    free(path);
    KNE_TRY(status);
    f->size = (size_t) st.st_size;
    f->dev = (uint64_t) st.st_dev;
    f->ino = (uint64_t) st.st_ino;
    f->mtime_s = (int64_t) st.st_mtim.tv_sec;
    f->mtime_ns = (int64_t) st.st_mtim.tv_nsec;
    if (f->size)
        f->map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fd, 0);
    e = errno;
    close(fd);
    if (f->map == MAP_FAILED)
    {
        f->map = NULL;
        return kne_error(err, KNE_ERR_IO, "cannot map %s: %s", label, strerror(e));
    }
    return add_image(t, f->map ? f->map : "", f->size, file, label, err);
}

static kne_status
new_set(const char *dir, int32_t n_files, kne_tensors **out, kne_err *err)
{
    kne_tensors *t = calloc(1, sizeof *t);

    if (t)
    {
        t->dir = strdup(dir);
        t->file = calloc((size_t) n_files + 1, sizeof *t->file);
        t->n_files = n_files;
    }
    if (!t || !t->dir || !t->file)
    {
        kne_tensors_close(t);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory opening weights");
    }
    *out = t;
    return KNE_OK;
}

/* A file name that cannot leave the folder. */
static bool
name_is_local(const char *name)
{
    for (const char *p = name; *p; p++) /* it is quoted in messages */
        if (*p < 0x20 || *p >= 0x7f)
            return false;
    return *name && *name != '.' && !strchr(name, '/') && !strstr(name, "..");
}

static int
by_string(const void *a, const void *b)
{
    return strcmp(*(char *const *) a, *(char *const *) b);
}

/* Open the shards that the index names; then each tensor must be where the index says. */
static kne_status
open_index(const char *dir, const char *path, kne_tensors **out, kne_err *err)
{
    static const char label[] = "model.safetensors.index.json";
    char             *text = NULL;
    size_t            len;
    cJSON            *root = NULL;
    const cJSON      *map, *c;
    const char      **names = NULL;
    size_t            n = 0, unique = 0;
    kne_tensors      *t = NULL;
    kne_status        st;

    KNE_TRY(kne_file_read(path, label, MAX_INDEX, &text, &len, err));
    if ((st = kne_json_object(text, len, label, &root, err)) != KNE_OK)
        goto out;
    map = cJSON_GetObjectItemCaseSensitive(root, "weight_map");
    if (!cJSON_IsObject(map) || !map->child)
    {
        st = kne_error(err, KNE_ERR_FORMAT, "%s: no weight_map", label);
        goto out;
    }
    cJSON_ArrayForEach(c, map)
        n++;
    if (!(names = malloc(n * sizeof *names)))
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory reading %s", label);
        goto out;
    }
    n = 0;
    cJSON_ArrayForEach(c, map)
    {
        if (!cJSON_IsString(c) || !name_is_local(c->valuestring))
        {
            st = kne_error(err, KNE_ERR_FORMAT,
                           "%s: tensor %s is placed in \"%s\", which is not the name of a file in "
                           "the folder",
                           label, kne_quote(c->string).s,
                           kne_quote(cJSON_IsString(c) ? c->valuestring : "(not a string)").s);
            goto out;
        }
        names[n++] = c->valuestring;
    }
    qsort(names, n, sizeof *names, by_string);
    for (size_t i = 0; i < n; i++)
        if (!i || strcmp(names[i], names[i - 1]))
            names[unique++] = names[i];
    if (unique > MAX_SHARDS)
    {
        st = kne_error(err, KNE_ERR_FORMAT, "%s: names %zu files, at most %d are opened", label,
                       unique, MAX_SHARDS);
        goto out;
    }
    if ((st = new_set(dir, (int32_t) unique, &t, err)) != KNE_OK)
        goto out;
    for (size_t i = 0; i < unique; i++)
    {
        if (!(t->file[i].name = strdup(names[i])))
        {
            st = kne_error(err, KNE_ERR_NOMEM, "out of memory reading %s", label);
            goto out;
        }
        if ((st = map_file(t, (int32_t) i, err)) != KNE_OK)
            goto out;
    }
    if ((st = finish(t, err)) != KNE_OK)
        goto out;
    cJSON_ArrayForEach(c, map)
    {
        const kne_tensor *k = kne_tensors_find(t, c->string);

        if (!k || strcmp(t->file[k->file].name, c->valuestring))
        {
            st = kne_error(err, KNE_ERR_FORMAT, "%s: tensor %s is not in %s", label,
                           kne_quote(c->string).s, kne_quote(c->valuestring).s);
            goto out;
        }
    }
out:
    if (st == KNE_OK)
        *out = t;
    else
        kne_tensors_close(t);
    free(names);
    cJSON_Delete(root);
    free(text);
    return st;
}

static kne_status
open_single(const char *dir, const char *name, kne_tensors **out, kne_err *err)
{
    kne_tensors *t = NULL;
    kne_status   st;

    KNE_TRY(new_set(dir, 1, &t, err));
    if (!(t->file[0].name = strdup(name)))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory opening weights");
    else if ((st = map_file(t, 0, err)) == KNE_OK)
        st = finish(t, err);
    if (st == KNE_OK)
        *out = t;
    else
        kne_tensors_close(t);
    return st;
}

kne_status
kne_tensors_open_file(const char *path, kne_tensors **out, kne_err *err)
{
    return open_single("", path, out, err);
}

kne_status
kne_tensors_open(const char *dir, kne_tensors **out, kne_err *err)
{
    char      *single = path_in(dir, "model.safetensors");
    char      *index = path_in(dir, "model.safetensors.index.json");
    kne_status st;

    if (!single || !index)
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory opening weights");
    else if (access(single, F_OK) == 0)
        st = open_single(dir, "model.safetensors", out, err);
    else if (access(index, F_OK) == 0)
        st = open_index(dir, index, out, err);
    else
    {
        st = kne_error(err, KNE_ERR_IO,
                       "no model.safetensors and no model.safetensors.index.json in the folder");
        kne_error_hint(err, "Weights in other formats (pytorch_model.bin, GGUF) must be saved as "
                            "safetensors first.");
    }
    free(single);
    free(index);
    return st;
}

kne_status
kne_tensors_parse(const void *image, size_t len, kne_tensors **out, kne_err *err)
{
    kne_tensors *t = NULL;
    kne_status   st;

    KNE_TRY(new_set("", 1, &t, err));
    if (!(t->file[0].name = strdup("memory")))
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory reading weights");
    else if ((st = add_image(t, image, len, 0, "memory", err)) == KNE_OK)
        st = finish(t, err);
    if (st == KNE_OK)
        *out = t;
    else
        kne_tensors_close(t);
    return st;
}

void
kne_tensors_close(kne_tensors *t)
{
    if (!t)
        return;
    for (int64_t i = 0; i < t->n; i++)
        free(t->tensor[i].name);
    for (int32_t i = 0; t->file && i < t->n_files; i++)
    {
        if (t->file[i].map)
            munmap(t->file[i].map, t->file[i].size);
        free(t->file[i].name);
    }
    free(t->tensor);
    free(t->file);
    free(t->dir);
    free(t);
}

const kne_tensor *
kne_tensors_find(const kne_tensors *t, const char *name)
{
    int64_t lo = 0, hi = t->n;

    while (lo < hi)
    {
        int64_t mid = lo + (hi - lo) / 2;
        int     c = strcmp(name, t->tensor[mid].name);

        if (!c)
            return &t->tensor[mid];
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

bool
kne_tensors_unchanged(const kne_tensors *t, kne_err *err)
{
    for (int32_t i = 0; i < t->n_files; i++)
    {
        const kne_tensor_file *f = &t->file[i];
        char                  *path;
        struct stat            st;
        int                    r;

        if (!f->map)
            continue;
        if (!(path = path_in(t->dir, f->name)))
        {
            kne_error(err, KNE_ERR_NOMEM, "out of memory looking at %s", f->name);
            return false;
        }
        r = stat(path, &st);
        free(path);
        if (r != 0 || (uint64_t) st.st_dev != f->dev || (uint64_t) st.st_ino != f->ino ||
            (size_t) st.st_size != f->size || (int64_t) st.st_mtim.tv_sec != f->mtime_s ||
            (int64_t) st.st_mtim.tv_nsec != f->mtime_ns)
        {
            kne_error(err, KNE_ERR_IO,
                      "%s was changed, replaced or removed since the model was loaded", f->name);
            kne_error_hint(err, "A registered model's files must not change; register the new "
                                "weights as another model.");
            return false;
        }
    }
    return true;
}
