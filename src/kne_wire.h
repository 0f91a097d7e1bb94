/*
 * kne_wire.h - the encoding of messages between PostgreSQL and the engine.
 * Compiled into both sides; includes no PostgreSQL header.
 *
 * A frame is a 12-byte header (u32 length of the body, u16 type, u16 zero, u32 request id) and a body.
 * Numbers are little-endian; text and bytes are a u32 length and the content, no NUL.
 * Invariant: a reader never looks outside its body; after the first bad length
 * everything reads as zero and `bad` is set, so one check at the end suffices.
 */
#ifndef KNE_WIRE_H
#define KNE_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KNE_FRAME_HEADER 12
#define KNE_FRAME_MAX (1u << 30) /* longest body either side accepts */

/* Grows p to hold cap bytes; the engine passes realloc, the server side repalloc. NULL: out of memory. */
typedef void *(*kne_wire_grow)(void *p, size_t cap);

typedef struct kne_wbuf
{
    uint8_t      *p;
    size_t        len, cap;
    kne_wire_grow grow;
    bool          bad; /* out of memory or over KNE_FRAME_MAX */
} kne_wbuf;

typedef struct kne_rbuf
{
    const uint8_t *p;
    size_t         len, at;
    bool           bad;
} kne_rbuf;

static inline void
kne_put(kne_wbuf *w, const void *data, size_t n)
{
    if (w->bad || n > KNE_FRAME_MAX + KNE_FRAME_HEADER - w->len)
    {
        w->bad = true;
        return;
    }
    if (w->len + n > w->cap)
    {
        size_t cap = (w->len + n) * 2 + 256;
        void  *p = w->grow(w->p, cap);

        if (!p)
        {
            w->bad = true;
            return;
        }
        w->p = (uint8_t *) p;
        w->cap = cap;
    }
    if (n)
        memcpy(w->p + w->len, data, n);
    w->len += n;
}

#define KNE_WIRE_NUMBER(name, type)                                                            \
    static inline void kne_put_##name(kne_wbuf *w, type v) { kne_put(w, &v, sizeof v); }       \
    static inline type kne_get_##name(kne_rbuf *r)                                             \
    {                                                                                          \
        type v = 0;                                                                            \
        if (r->bad || !r->p || r->len - r->at < sizeof v)                                      \
            r->bad = true;                                                                     \
        else                                                                                   \
        {                                                                                      \
            memcpy(&v, r->p + r->at, sizeof v);                                                \
            r->at += sizeof v;                                                                 \
        }                                                                                      \
        return v;                                                                              \
    }
KNE_WIRE_NUMBER(u8, uint8_t)
KNE_WIRE_NUMBER(u16, uint16_t)
KNE_WIRE_NUMBER(u32, uint32_t)
KNE_WIRE_NUMBER(i32, int32_t)
KNE_WIRE_NUMBER(u64, uint64_t)
KNE_WIRE_NUMBER(i64, int64_t)
KNE_WIRE_NUMBER(f32, float)
KNE_WIRE_NUMBER(f64, double)
#undef KNE_WIRE_NUMBER

static inline void
kne_put_bytes(kne_wbuf *w, const void *data, size_t n)
{
    kne_put_u32(w, (uint32_t) n);
    kne_put(w, data, n);
}

static inline void
kne_put_str(kne_wbuf *w, const char *s)
{
    kne_put_bytes(w, s, strlen(s));
}

/* n raw bytes, in place; NULL (and bad) when the body is shorter. */
static inline const void *
kne_get(kne_rbuf *r, size_t n)
{
    const void *p = r->p + r->at;

    if (r->bad || r->len - r->at < n)
    {
        r->bad = true;
        return NULL;
    }
    r->at += n;
    return p;
}

/* Text or bytes in place, not NUL-terminated; "" when bad. */
static inline const char *
kne_get_bytes(kne_rbuf *r, size_t *n)
{
    const char *p;

    *n = kne_get_u32(r);
    p = (const char *) kne_get(r, *n);
    if (!p)
    {
        *n = 0;
        return "";
    }
    return p;
}

/* A count of items of at least min_size bytes each: 0 (and bad) when the body cannot hold so many. */
static inline uint32_t
kne_get_count(kne_rbuf *r, size_t min_size)
{
    uint32_t n = kne_get_u32(r);

    if (r->bad || (uint64_t) n * min_size > r->len - r->at)
    {
        r->bad = true;
        return 0;
    }
    return n;
}

/* The whole body was read, nothing over. */
static inline bool
kne_get_done(const kne_rbuf *r)
{
    return !r->bad && r->at == r->len;
}

/* Begin a frame in an empty or used buffer; returns where it starts, for kne_frame_end. */
static inline size_t
kne_frame_begin(kne_wbuf *w, uint16_t type, uint32_t id)
{
    size_t at = w->len;

    kne_put_u32(w, 0);
    kne_put_u16(w, type);
    kne_put_u16(w, 0);
    kne_put_u32(w, id);
    return at;
}

static inline void
kne_frame_end(kne_wbuf *w, size_t at)
{
    if (!w->bad)
    {
        uint32_t n = (uint32_t) (w->len - at - KNE_FRAME_HEADER);

        memcpy(w->p + at, &n, 4);
    }
}

#endif
