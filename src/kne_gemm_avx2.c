/* kne_gemm_avx2.c - the matrix kernels for AVX2; see kne_gemm_impl.h. */
#if defined(__AVX2__)
#define KNE_GEMM_TABLE kne_gemm_avx2
#include "kne_gemm_impl.h"
#else
typedef int kne_gemm_avx2_absent; /* another architecture */
#endif
