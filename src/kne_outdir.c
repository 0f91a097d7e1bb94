/*
 * kne_outdir.c - a folder that appears whole or not at all (see kne_outdir.h).
 */
#include "kne_outdir.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BUFFER ((size_t) 1 << 20)

/* The folder is for others to read, as what COPY TO writes is. */
#define FOLDER_MODE 0755
#define FILE_MODE 0644

static kne_status
failed(const kne_outdir *o, const char *doing, const char *name, kne_err *err)
{
    int why = errno;

    kne_error(err, KNE_ERR_IO, "cannot %s \"%s\": %s", doing, name, strerror(why));
    if (name != o->path)
        kne_error_detail(err, "Nothing was written to \"%s\".", o->path);
    return KNE_ERR_IO;
}

/* "a/b" -> "a", a slash at least. malloc'ed; NULL: out of memory. */
static char *
parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash && slash != path ? strndup(path, (size_t) (slash - path)) : strdup("/");
}

kne_status
kne_outdir_new(const char *path, kne_outdir **out, kne_err *err)
{
    kne_outdir *o = calloc(1, sizeof *o);
    char       *parent = parent_of(path);
    const char *name = strrchr(path, '/');
    kne_status  st = KNE_OK;

    if (o)
    {
        o->fd = -1;
        o->path = strdup(path);
        o->buffer = malloc(BUFFER);
    }
    if (!o || !parent || !o->path || !o->buffer ||
        asprintf(&o->temp, "%s/.%s.kne-XXXXXX", parent[1] ? parent : "", name ? name + 1 : path) < 0)
    {
        st = kne_error(err, KNE_ERR_NOMEM, "out of memory");
        if (o)
            o->temp = NULL;
    }
    else if (!mkdtemp(o->temp))
    {
        st = failed(o, "make a folder beside", o->path, err);
        free(o->temp);
        o->temp = NULL;
    }
    free(parent);
    if (st == KNE_OK)
        *out = o;
    else
        kne_outdir_free(o);
    return st;
}

static char *
in_temp(const kne_outdir *o, const char *name)
{
    char *p;

    return asprintf(&p, "%s/%s", o->temp, name) < 0 ? NULL : p;
}

kne_status
kne_outdir_open(kne_outdir *o, const char *name, kne_err *err)
{
    char        *path = in_temp(o, name);
    kne_outfile *more = realloc(o->file, ((size_t) o->n_files + 1) * sizeof *more);

    if (more)
        o->file = more;
    if (!path || !more || !(o->digest = kne_sha256_new()))
    {
        free(path);
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    }
    o->fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    free(path);
    if (o->fd < 0 || fchmod(o->fd, FILE_MODE) != 0) /* whatever the umask is */
        return failed(o, "create file", name, err);
    o->file[o->n_files] = (kne_outfile) {.name = strdup(name)};
    if (!o->file[o->n_files].name)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    o->n_files++;
    o->used = 0;
    return KNE_OK;
}

static kne_status
flush(kne_outdir *o, kne_err *err)
{
    kne_outfile *f = &o->file[o->n_files - 1];

    kne_sha256_add(o->digest, o->buffer, o->used);
    f->bytes += (int64_t) o->used;
    for (size_t at = 0; at < o->used;)
    {
        ssize_t n = write(o->fd, o->buffer + at, o->used - at);

        if (n > 0)
            at += (size_t) n;
        else if (n == 0 || errno != EINTR)
        {
            if (n == 0)
                errno = ENOSPC;
            return failed(o, "write file", f->name, err);
        }
    }
    o->used = 0;
    if (o->yield && o->yield(o->ctx))
        return kne_error(err, KNE_ERR_CANCELLED, "cancelled");
    return KNE_OK;
}

kne_status
kne_outdir_put(kne_outdir *o, const void *data, size_t len, kne_err *err)
{
    const uint8_t *p = data;

    while (len)
    {
        size_t n = len < BUFFER - o->used ? len : BUFFER - o->used;

        memcpy(o->buffer + o->used, p, n);
        o->used += n;
        p += n;
        len -= n;
        if (o->used == BUFFER)
            KNE_TRY(flush(o, err));
    }
    return KNE_OK;
}

kne_status
kne_outdir_close(kne_outdir *o, kne_err *err)
{
    kne_outfile *f = &o->file[o->n_files - 1];
    int          fd = o->fd;

    KNE_TRY(flush(o, err));
    kne_sha256_end(o->digest, f->sha256);
    o->digest = NULL;
    if (fsync(fd) != 0)
        return failed(o, "flush file", f->name, err);
    o->fd = -1;
    if (close(fd) != 0)
        return failed(o, "close file", f->name, err);
    return KNE_OK;
}

static kne_status
sync_folder(const kne_outdir *o, const char *path, kne_err *err)
{
    int        fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    kne_status st = KNE_OK;

    /* Some file systems have no fsync for folders: then there is nothing to flush. */
    if (fd < 0 || (fsync(fd) != 0 && errno != EINVAL && errno != EBADF))
        st = failed(o, "flush folder", path, err);
    if (fd >= 0)
        close(fd);
    return st;
}

kne_status
kne_outdir_commit(kne_outdir *o, kne_err *err)
{
    char      *parent = parent_of(o->path);
    kne_status st;

    if (!parent)
        return kne_error(err, KNE_ERR_NOMEM, "out of memory");
    if (chmod(o->temp, FOLDER_MODE) != 0)
        st = failed(o, "change the mode of folder", o->temp, err);
    else
        st = sync_folder(o, o->temp, err);
    if (st == KNE_OK && rename(o->temp, o->path) != 0) /* takes the place of an empty folder, of nothing else */
        st = failed(o, "put the folder in its place at", o->path, err);
    if (st == KNE_OK)
    {
        free(o->temp);
        o->temp = NULL;
        st = sync_folder(o, parent, err);
    }
    free(parent);
    return st;
}

void
kne_outdir_free(kne_outdir *o)
{
    uint8_t unused[KNE_DIGEST_LEN];

    if (!o)
        return;
    if (o->fd >= 0)
        close(o->fd);
    if (o->digest)
        kne_sha256_end(o->digest, unused);
    for (int32_t i = 0; i < o->n_files; i++)
    {
        char *path = o->temp ? in_temp(o, o->file[i].name) : NULL;

        if (path)
            unlink(path);
        free(path);
        free(o->file[i].name);
    }
    if (o->temp)
        rmdir(o->temp);
    free(o->file);
    free(o->temp);
    free(o->path);
    free(o->buffer);
    free(o);
}
