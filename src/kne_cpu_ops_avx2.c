/* kne_cpu_ops_avx2.c - the ops for AVX2; see kne_cpu_ops_impl.h. */
#if defined(__AVX2__)
#define KNE_OPS_FILL kne_ops_fill_avx2
#include "kne_cpu_ops_impl.h"
#else
typedef int kne_cpu_ops_avx2_absent; /* another architecture */
#endif
