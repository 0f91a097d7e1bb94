/*
 * kne_base.c - arena, number formats, digests (see kne_base.h).
 */
#include "kne_base.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

void *
kne_arena_take(kne_arena *arena, size_t count, size_t elem_size)
{
    size_t bytes, end;

    if (__builtin_mul_overflow(count, elem_size, &bytes) ||
        __builtin_add_overflow(bytes, (size_t) 63, &bytes) ||
        __builtin_add_overflow(arena->used, bytes &= ~(size_t) 63, &end))
    {
        arena->used = SIZE_MAX; /* the commit that follows reports it */
        return NULL;
    }
    if (!arena->base)
    {
        arena->used = end;
        return NULL;
    }
    if (end > arena->size)
        return NULL;
    void *p = arena->base + arena->used;
    arena->used = end;
    return p;
}

kne_status
kne_arena_commit(kne_arena *arena, kne_err *err)
{
    size_t size = arena->used;

    /* calloc leaves large blocks untouched, so pages not used cost nothing */
    if (size > SIZE_MAX - 64 || !(arena->raw = calloc(1, size + 64)))
        return kne_error(err, KNE_ERR_NOMEM, "out of memory: %zu bytes asked for", size);
    arena->base = (char *) (((uintptr_t) arena->raw + 63) & ~(uintptr_t) 63);
    arena->size = size;
    arena->used = 0;
    return KNE_OK;
}

void
kne_arena_free(kne_arena *arena)
{
    free(arena->raw);
    *arena = (kne_arena) {0};
}

const char *
kne_dtype_name(kne_dtype t)
{
    static const char *const names[] = {"float32", "float16", "bfloat16"};

    return names[t];
}

float
kne_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t) (h & 0x8000) << 16, exp = h >> 10 & 31, man = h & 1023;
    union { uint32_t u; float f; } v;

    if (exp == 31)
        v.u = sign | 0x7f800000 | man << 13;
    else if (exp)
        v.u = sign | (exp + 112) << 23 | man << 13;
    else
    {
        v.f = (float) man * 0x1p-24f; /* zero and subnormals are exact in float */
        v.u |= sign;
    }
    return v.f;
}

uint16_t
kne_f32_to_f16(float f)
{
    union { float f; uint32_t u; } v = { .f = f };
    uint16_t sign = v.u >> 16 & 0x8000;
    uint32_t a = v.u & 0x7fffffff;

    if (a >= 0x7f800000)
        return sign | 0x7c00 | (a > 0x7f800000 ? 0x200 : 0);
    if (a >= 0x477ff000) /* rounds to 65520 or more */
        return sign | 0x7c00;
    if (a < 0x38800000) /* subnormal: let the FPU round to a multiple of 2^-24 */
    {
        union { float f; uint32_t u; } s = { .u = a };

        s.f += 0.5f; /* ulp(0.5) = 2^-24 */
        return sign | (uint16_t) (s.u - 0x3f000000);
    }
    a += 0xc8000fff + (a >> 13 & 1);
    return sign | (uint16_t) (a >> 13);
}

uint16_t
kne_f32_to_bf16(float f)
{
    union { float f; uint32_t u; } v = { .f = f };

    if ((v.u & 0x7fffffff) > 0x7f800000)
        return (uint16_t) (v.u >> 16 | 0x40);
    return (uint16_t) ((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

float
kne_load(const void *p, kne_dtype t, size_t i)
{
    const char *at = (const char *) p + i * kne_dtype_size(t);
    uint16_t    h;

    if (t == KNE_F32)
    {
        float f;

        memcpy(&f, at, 4);
        return f;
    }
    memcpy(&h, at, 2);
    return t == KNE_BF16 ? kne_bf16_to_f32(h) : kne_f16_to_f32(h);
}

float
kne_round_to(float f, kne_dtype t)
{
    if (t == KNE_F32)
        return f;
    return t == KNE_BF16 ? kne_bf16_to_f32(kne_f32_to_bf16(f)) : kne_f16_to_f32(kne_f32_to_f16(f));
}

double
kne_now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double) ts.tv_sec + 1e-9 * (double) ts.tv_nsec;
}
