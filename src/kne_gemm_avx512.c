/* kne_gemm_avx512.c - the matrix kernels for AVX512; see kne_gemm_impl.h. */
#if defined(__AVX512F__)
#define KNE_GEMM_TABLE kne_gemm_avx512
#include "kne_gemm_impl.h"
#else
typedef int kne_gemm_avx512_absent; /* another architecture */
#endif
