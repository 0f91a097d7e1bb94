/*
 * kne_vec.h - the vector of floats of the instruction set a file is compiled
 * for (AVX-512, AVX2 + FMA, or the compiler's own 4 lanes), for the matrix
 * kernels: loads from any weight format, unaligned, partial (missing lanes are
 * 0 and not touched), fused multiply-add, and a horizontal sum in one fixed
 * order. Only .c files of one instruction set include it.
 */
#ifndef KNE_VEC_H
#define KNE_VEC_H

#include "kne_base.h"

#include <string.h>

#define KNE_INLINE static inline __attribute__((always_inline, unused))

typedef float v4 __attribute__((vector_size(16)));

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>

#define VL 16
typedef __m512 vf;

KNE_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
KNE_INLINE vf vf_set1(float a) { return _mm512_set1_ps(a); }
KNE_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
KNE_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
KNE_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
KNE_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
KNE_INLINE vf
vf_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

KNE_INLINE vf
vf_load_w(const char *p, const kne_dtype type)
{
    if (type == KNE_F32)
        return _mm512_loadu_ps(p);
    if (type == KNE_BF16)
        return vf_bf16(_mm256_loadu_si256((const __m256i *) p));
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
}

KNE_INLINE vf
vf_load_w_part(const char *p, const kne_dtype type, int n)
{
    __mmask16 m = (__mmask16) ((1u << n) - 1);

    if (type == KNE_F32)
        return _mm512_maskz_loadu_ps(m, p);
    if (type == KNE_BF16)
        return vf_bf16(_mm256_maskz_loadu_epi16(m, p));
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}

/* The sums of the lanes of a, b, c and d. */
KNE_INLINE v4
vf_sum4(vf a, vf b, vf c, vf d)
{
    vf ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    vf cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    /* each 128-bit lane: 4 partial sums of a, b, c, d */
    vf s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));

    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    s = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), s);
    return (v4) _mm512_castps512_ps128(s);
}

/*
 * The sums of 16 vectors, added in vf_sum4's order but with half the shuffles: each
 * level merges two vectors, one half in place and the other crosswise. The result's
 * lanes are put in the order of the arguments.
 */
#define HAVE_VF_SUM16
KNE_INLINE vf
vf_sum16(const vf *a)
{
    const __m512i l2 = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    const __m512i l4 = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
    vf            b[8], c[4], d[2], s;

    /* after level 1: lanes 0..7 hold a[2i], 8..15 a[2i + 1] */
    _Pragma("GCC unroll 8")
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a[2 * i], a[2 * i + 1]),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x4e));
    /* blocks of 4: a[4i], a[4i + 2], a[4i + 1], a[4i + 3] */
    _Pragma("GCC unroll 8")
    for (int i = 0; i < 4; i++)
        c[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, b[2 * i], b[2 * i + 1]),
                             _mm512_permutex2var_ps(b[2 * i], l2, b[2 * i + 1]));
    _Pragma("GCC unroll 8")
    for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, c[2 * i], c[2 * i + 1]),
                             _mm512_shuffle_ps(c[2 * i], c[2 * i + 1], 0x4e));
    s = _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, d[0], d[1]), _mm512_permutex2var_ps(d[0], l4, d[1]));
    /* lane 4 b + e: of block b, vector 0, 8, 4, 12 of it by e = 0, 1, 2, 3 */
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15), s);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#define VL 8
typedef __m256 vf;

KNE_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
KNE_INLINE vf vf_set1(float a) { return _mm256_set1_ps(a); }
KNE_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
KNE_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
KNE_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
KNE_INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }

KNE_INLINE vf
vf_load_w(const char *p, const kne_dtype type)
{
    if (type == KNE_F32)
        return _mm256_loadu_ps((const float *) (const void *) p);
    __m128i h = _mm_loadu_si128((const __m128i *) p);
    if (type == KNE_BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    return _mm256_cvtph_ps(h);
}

KNE_INLINE vf
vf_load_w_part(const char *p, const kne_dtype type, int n)
{
    char buf[32] = {0};

    memcpy(buf, p, (size_t) n * kne_dtype_size(type));
    return vf_load_w(buf, type);
}

KNE_INLINE v4
vf_sum4(vf a, vf b, vf c, vf d)
{
    __m128 s[4];
    vf     v[4] = {a, b, c, d};

    for (int i = 0; i < 4; i++)
        s[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    return (v4) _mm_hadd_ps(_mm_hadd_ps(s[0], s[1]), _mm_hadd_ps(s[2], s[3]));
}

#else

#define VL 4
typedef float vf __attribute__((vector_size(16)));

KNE_INLINE vf vf_zero(void) { return (vf) {0}; }
KNE_INLINE vf vf_set1(float a) { return (vf) {a, a, a, a}; }
KNE_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
KNE_INLINE vf vf_add(vf a, vf b) { return a + b; }
KNE_INLINE vf
vf_load(const float *p)
{
    vf v;

    memcpy(&v, p, sizeof(v));
    return v;
}
KNE_INLINE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof(a)); }

KNE_INLINE vf
vf_load_w(const char *p, const kne_dtype type)
{
    vf v;

    if (type == KNE_F32)
        memcpy(&v, p, sizeof(v));
    else
    {
        uint16_t h[4];

        memcpy(h, p, sizeof(h));
        if (type == KNE_BF16)
        {
            typedef uint32_t vu __attribute__((vector_size(16)));
            v = (vf) ((vu) {h[0], h[1], h[2], h[3]} << 16);
        }
        else
            v = (vf) {kne_f16_to_f32(h[0]), kne_f16_to_f32(h[1]), kne_f16_to_f32(h[2]),
                      kne_f16_to_f32(h[3])};
    }
    return v;
}

KNE_INLINE vf
vf_load_w_part(const char *p, const kne_dtype type, int n)
{
    char buf[16] = {0};

    memcpy(buf, p, (size_t) n * kne_dtype_size(type));
    return vf_load_w(buf, type);
}

KNE_INLINE v4
vf_sum4(vf a, vf b, vf c, vf d)
{
    return (v4) {(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]),
                 (c[0] + c[2]) + (c[1] + c[3]), (d[0] + d[2]) + (d[1] + d[3])};
}

#endif
#endif
