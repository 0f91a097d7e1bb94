/*
 * kne_safetensors.h - the weights of a model folder as read-only maps: one
 * model.safetensors, or the shards that model.safetensors.index.json names.
 *
 * Invariant: once a set is open, every tensor's data lies wholly inside its
 * map, tensors neither overlap nor leave holes, and no name occurs twice, in
 * whatever shard. What a file says is checked before it is used.
 *
 * The maps are MAP_SHARED: nothing is copied, and pages are shared with every
 * other process that reads the file. The price: a file that is truncated while
 * mapped raises SIGBUS at the first touch of a lost page, in whatever code
 * touches it. The files of a registered model must not be changed in place
 * (write a new file and rename it). kne_tensors_unchanged tells whether they
 * were; the engine's main installs a SIGBUS handler that ends the engine with
 * a message that says this, and the server restarts it.
 */
#ifndef KNE_SAFETENSORS_H
#define KNE_SAFETENSORS_H

#include "kne_base.h"

#define KNE_TENSOR_MAX_RANK 8

typedef struct kne_tensor
{
    char       *name;      /* printable ASCII */
    const char *type_name; /* as the file says: "F32", "I64", ... */
    bool        usable;    /* F32, F16 or BF16: type holds. Others are there, but only as bytes */
    kne_dtype   type;
    int32_t     rank;
    int64_t     shape[KNE_TENSOR_MAX_RANK];
    int64_t     n_elem;
    const void *data;      /* may be unaligned */
    size_t      bytes;
    int32_t     file;      /* index of its shard */
} kne_tensor;

typedef struct kne_tensor_file
{
    char    *name; /* in the folder */
    void    *map;
    size_t   size;
    uint64_t dev, ino;
    int64_t  mtime_s, mtime_ns;
} kne_tensor_file;

typedef struct kne_tensors
{
    char            *dir;    /* "": file names are whole paths */
    int32_t          n_files;
    kne_tensor_file *file;
    int64_t          n;
    kne_tensor      *tensor; /* in order of name (bytes) */
    int64_t          bytes;  /* data of all tensors */
} kne_tensors;

/* The weights of a folder. KNE_ERR_IO, _FORMAT, _UNSUPPORTED or _NOMEM, naming file and tensor. */
kne_status kne_tensors_open(const char *dir, kne_tensors **out, kne_err *err);
/* One safetensors file on its own. */
kne_status kne_tensors_open_file(const char *path, kne_tensors **out, kne_err *err);
/* The same over a file's bytes in memory, which must outlive the set. */
kne_status kne_tensors_parse(const void *image, size_t len, kne_tensors **out, kne_err *err);
void       kne_tensors_close(kne_tensors *t);

const kne_tensor *kne_tensors_find(const kne_tensors *t, const char *name); /* NULL: none */

/*
 * Are the files still the ones that were opened (size, mtime, inode)? If not,
 * err (may be NULL) names the file. A look, not a lock: it cannot rule out a
 * change between it and the next read.
 */
bool kne_tensors_unchanged(const kne_tensors *t, kne_err *err);

/*
 * Read a regular file of at most max bytes whole; *buf is malloc'ed and ends
 * in a NUL that *len does not count. label: how messages call the file.
 */
kne_status kne_file_read(const char *path, const char *label, size_t max, char **buf, size_t *len,
                         kne_err *err);

/*
 * Parse one JSON object that fills the text but for white space, with a bound
 * on the number of its values. For cJSON_Delete.
 */
struct cJSON;
kne_status kne_json_object(const char *text, size_t len, const char *label, struct cJSON **out,
                           kne_err *err);

/* A copy for messages of text that a file holds: cut, and anything but printable ASCII as '?'. */
typedef struct kne_quoted
{
    char s[80];
} kne_quoted;
kne_quoted kne_quote(const char *text);

#endif
