/* kne_gemm.c - the matrix kernels for any machine; see kne_gemm_impl.h. */
#define KNE_GEMM_TABLE kne_gemm_portable
#include "kne_gemm_impl.h"
