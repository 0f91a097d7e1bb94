/*
 * kne_base.h - what every file of the engine shares: status codes, the error
 * record, the arena, number formats, digests.
 *
 * Invariant: no function of the engine exits, aborts or prints on bad input.
 * A function that can fail returns a kne_status and fills the caller's
 * kne_err; the message goes up unchanged to one place that shows it.
 */
#ifndef KNE_BASE_H
#define KNE_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum kne_status
{
    KNE_OK = 0,
    KNE_ERR_INVALID,     /* an argument or option the caller got wrong */
    KNE_ERR_FORMAT,      /* a file that breaks its own format */
    KNE_ERR_UNSUPPORTED, /* well-formed, but a feature this engine lacks */
    KNE_ERR_IO,          /* the operating system said no */
    KNE_ERR_NOMEM,
    KNE_ERR_LIMIT,       /* over the context length, message size, ... */
    KNE_ERR_CANCELLED,
    KNE_ERR_NOT_REACHED, /* an edit that does not reach its object */
    KNE_ERR_PROTOCOL,    /* a message that breaks the protocol */
    KNE_ERR_DEVICE,      /* the accelerator failed */
    KNE_ERR_INTERNAL
} kne_status;

/* msg: lower case, no full stop; detail and hint: sentences, may be empty. */
typedef struct kne_err
{
    kne_status code;
    char       msg[512];
    char       detail[512];
    char       hint[512];
} kne_err;

/* Fill *err (may be NULL) and return code. Clears detail and hint. A macro, so that whoever checks the caller sees what it returns. */
#define kne_error(err, code, ...)               \
    ({                                          \
        kne_error_set(err, code, __VA_ARGS__);  \
        (code);                                 \
    })
void kne_error_set(kne_err *err, kne_status code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void kne_error_detail(kne_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void kne_error_hint(kne_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define KNE_TRY(call)                 \
    do                                \
    {                                 \
        kne_status try_st_ = (call);  \
        if (try_st_ != KNE_OK)        \
            return try_st_;           \
    } while (0)

/*
 * Arena: one allocation handed out in 64-byte aligned pieces. A layout
 * function runs twice: with base NULL it only adds up sizes, then for real.
 * kne_arena_take never fails when the second run asks what the first did.
 */
typedef struct kne_arena
{
    char  *base; /* NULL: counting */
    void  *raw;  /* what the allocator gave; base is this, aligned */
    size_t size;
    size_t used;
} kne_arena;

void *kne_arena_take(kne_arena *arena, size_t count, size_t elem_size); /* NULL while counting or when over */
kne_status kne_arena_commit(kne_arena *arena, kne_err *err); /* allocate what was counted (zeroed), reset used */
void kne_arena_free(kne_arena *arena);

/* Formats of weights. Activations are always float. */
typedef enum kne_dtype
{
    KNE_F32,
    KNE_F16,
    KNE_BF16
} kne_dtype;

static inline size_t
kne_dtype_size(kne_dtype t)
{
    return t == KNE_F32 ? 4 : 2;
}
const char *kne_dtype_name(kne_dtype t); /* "float32", "float16", "bfloat16" */

float    kne_f16_to_f32(uint16_t h);
uint16_t kne_f32_to_f16(float f); /* round to nearest even */
static inline float
kne_bf16_to_f32(uint16_t h)
{
    union { uint32_t u; float f; } v = { .u = (uint32_t) h << 16 };
    return v.f;
}
uint16_t kne_f32_to_bf16(float f); /* round to nearest even; NaN stays NaN */

/* Element i of an array of the given format; the pointer may be unaligned. */
float kne_load(const void *p, kne_dtype t, size_t i);
/* The nearest value of the format, as float. */
float kne_round_to(float f, kne_dtype t);

/* SHA-256 (FIPS 180-4), by libcrypto. */
#define KNE_DIGEST_LEN 32
typedef struct kne_sha256 kne_sha256;
kne_sha256 *kne_sha256_new(void); /* NULL: out of memory */
void        kne_sha256_add(kne_sha256 *h, const void *data, size_t len);
void        kne_sha256_end(kne_sha256 *h, uint8_t out[KNE_DIGEST_LEN]); /* also frees h */

/* Small deterministic generator (SplitMix64): the same seed, the same stream. */
static inline uint64_t
kne_random_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

double kne_now(void); /* monotonic seconds */

#endif
