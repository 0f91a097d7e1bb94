/* kne_cpu_ops_avx512.c - the ops for AVX512; see kne_cpu_ops_impl.h. */
#if defined(__AVX512F__)
#define KNE_OPS_FILL kne_ops_fill_avx512
#include "kne_cpu_ops_impl.h"
#else
typedef int kne_cpu_ops_avx512_absent; /* another architecture */
#endif
