/* kne_cpu_ops.c - the ops for any machine; see kne_cpu_ops_impl.h. */
#define KNE_OPS_FILL kne_ops_fill_portable
#include "kne_cpu_ops_impl.h"
