/*
 * lt.cu - cuBLASLt behind one function. A shape's descriptors and the algorithm that the library's heuristic chose are
 * kept: asking costs tens of microseconds, more than a small product takes.
 */
#include "kne_cuda.h"

#include <cublasLt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PLANS     1024                  /* shapes kept; a power of two */
#define WORKSPACE ((size_t) 32 << 20)   /* what the library recommends for Hopper */

typedef struct plan_key
{
    int64_t m, n, k, lda, ldb, ldc;
    int32_t align_a, align_b, align_c;
    uint8_t ta, tb, type;
} plan_key;

typedef struct plan
{
    plan_key               key;
    bool                   used, none; /* none: the library has no such product */
    cublasLtMatmulDesc_t   op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t   algo;
} plan;

struct kne_lt
{
    cublasLtHandle_t handle;
    void            *workspace;
    int              n;
    plan             plans[PLANS];
};

static void
plan_free(plan *p)
{
    if (p->a)
        cublasLtMatrixLayoutDestroy(p->a);
    if (p->b)
        cublasLtMatrixLayoutDestroy(p->b);
    if (p->c)
        cublasLtMatrixLayoutDestroy(p->c);
    if (p->op)
        cublasLtMatmulDescDestroy(p->op);
    memset(p, 0, sizeof *p);
}

kne_status
kne_lt_new(kne_lt **out, kne_err *err)
{
    kne_lt        *lt = (kne_lt *) calloc(1, sizeof *lt);
    cublasStatus_t rc = CUBLAS_STATUS_ALLOC_FAILED;

    if (lt)
        rc = cublasLtCreate(&lt->handle);
    if (lt && rc == CUBLAS_STATUS_SUCCESS && cudaMalloc(&lt->workspace, WORKSPACE) != cudaSuccess)
        rc = CUBLAS_STATUS_ALLOC_FAILED;
    if (rc == CUBLAS_STATUS_SUCCESS)
    {
        *out = lt;
        return KNE_OK;
    }
    kne_lt_free(lt);
    if (err)
    {
        memset(err, 0, sizeof *err);
        err->code = rc == CUBLAS_STATUS_ALLOC_FAILED ? KNE_ERR_NOMEM : KNE_ERR_DEVICE;
        snprintf(err->msg, sizeof err->msg, "cuBLASLt cannot be started: %s", cublasLtGetStatusString(rc));
    }
    return rc == CUBLAS_STATUS_ALLOC_FAILED ? KNE_ERR_NOMEM : KNE_ERR_DEVICE;
}

void
kne_lt_free(kne_lt *lt)
{
    if (!lt)
        return;
    for (int i = 0; i < PLANS; i++)
        plan_free(&lt->plans[i]);
    cudaFree(lt->workspace);
    if (lt->handle)
        cublasLtDestroy(lt->handle);
    free(lt);
}

/* The largest power of two up to 256 that divides the address and the distance of columns. */
static int32_t
alignment(const void *p, int64_t ld, size_t elem)
{
    uint64_t v = (uint64_t) (uintptr_t) p | (uint64_t) ld * elem | 256;

    return (int32_t) (v & (~v + 1));
}

static uint64_t
key_hash(const plan_key *key)
{
    const unsigned char *p = (const unsigned char *) key;
    uint64_t             h = 1469598103934665603ull;

    for (size_t i = 0; i < sizeof *key; i++)
        h = (h ^ p[i]) * 1099511628211ull;
    return h ^ h >> 32;
}

static cublasStatus_t
plan_make(kne_lt *lt, plan *p, const plan_key *key)
{
    const cudaDataType_t            type = key->type == KNE_F32 ? CUDA_R_32F : key->type == KNE_BF16 ? CUDA_R_16BF : CUDA_R_16F;
    const cublasOperation_t         ta = key->ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb = key->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint32_t                  align[3] = {(uint32_t) key->align_a, (uint32_t) key->align_b, (uint32_t) key->align_c};
    const size_t                    workspace = WORKSPACE;
    cublasLtMatmulPreference_t      pref = NULL;
    cublasLtMatmulHeuristicResult_t found;
    int                             n_found = 0;
    cublasStatus_t                  rc;

#define DO(call)                            \
    if ((rc = (call)) != CUBLAS_STATUS_SUCCESS) \
        goto out
    DO(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    DO(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
    DO(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
    DO(cublasLtMatrixLayoutCreate(&p->a, type, (uint64_t) (key->ta ? key->k : key->m),
                                  (uint64_t) (key->ta ? key->m : key->k), key->lda));
    DO(cublasLtMatrixLayoutCreate(&p->b, type, (uint64_t) (key->tb ? key->n : key->k),
                                  (uint64_t) (key->tb ? key->k : key->n), key->ldb));
    DO(cublasLtMatrixLayoutCreate(&p->c, CUDA_R_32F, (uint64_t) key->m, (uint64_t) key->n, key->ldc));
    DO(cublasLtMatmulPreferenceCreate(&pref));
    DO(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                            sizeof workspace));
    DO(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align[0],
                                            sizeof align[0]));
    DO(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align[1],
                                            sizeof align[1]));
    DO(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &align[2],
                                            sizeof align[2]));
    DO(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &align[2],
                                            sizeof align[2]));
    DO(cublasLtMatmulAlgoGetHeuristic(lt->handle, p->op, p->a, p->b, p->c, p->c, pref, 1, &found, &n_found));
    rc = n_found > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED;
    if (rc == CUBLAS_STATUS_SUCCESS)
        p->algo = found.algo;
#undef DO
out:
    if (pref)
        cublasLtMatmulPreferenceDestroy(pref);
    return rc;
}

static bool
has_none(cublasStatus_t rc)
{
    return rc == CUBLAS_STATUS_NOT_SUPPORTED || rc == CUBLAS_STATUS_INVALID_VALUE || rc == CUBLAS_STATUS_ARCH_MISMATCH;
}

/* The plan of a shape, made at the first call; NULL after a recorded failure. */
static plan *
plan_of(kne_cu *cu, const plan_key *key)
{
    kne_lt        *lt = cu->lt;
    uint64_t       i = key_hash(key) & (PLANS - 1);
    cublasStatus_t rc;

    for (; lt->plans[i].used; i = (i + 1) & (PLANS - 1))
        if (memcmp(&lt->plans[i].key, key, sizeof *key) == 0)
            return &lt->plans[i];
    if (lt->n >= PLANS / 2) /* many shapes: begin again */
    {
        for (int j = 0; j < PLANS; j++)
            plan_free(&lt->plans[j]);
        lt->n = 0;
        i = key_hash(key) & (PLANS - 1);
    }
    rc = plan_make(lt, &lt->plans[i], key);
    if (has_none(rc))
    {
        plan_free(&lt->plans[i]);
        lt->plans[i].none = true;
    }
    else if (rc != CUBLAS_STATUS_SUCCESS)
    {
        plan_free(&lt->plans[i]);
        kne_cu_fail(cu, rc == CUBLAS_STATUS_ALLOC_FAILED ? KNE_ERR_NOMEM : KNE_ERR_DEVICE,
                    "cuBLASLt failed to plan a product of %lld x %lld x %lld: %s", (long long) key->m, (long long) key->n,
                    (long long) key->k, cublasLtGetStatusString(rc));
        return NULL;
    }
    lt->plans[i].key = *key;
    lt->plans[i].used = true;
    lt->n++;
    return &lt->plans[i];
}

bool
kne_lt_matmul(kne_cu *cu, bool ta, bool tb, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
              const void *b, int64_t ldb, kne_dtype type, float *c, int64_t ldc, float beta)
{
    const float    one = 1.0f;
    const size_t   elem = kne_dtype_size(type);
    plan_key       key;
    plan          *p;
    cublasStatus_t rc;

    if (!kne_cu_ready(cu))
        return true;
    memset(&key, 0, sizeof key); /* padding is part of what is hashed */
    key.m = m;
    key.n = n;
    key.k = k;
    key.lda = lda;
    key.ldb = ldb;
    key.ldc = ldc;
    key.align_a = alignment(a, lda, elem);
    key.align_b = alignment(b, ldb, elem);
    key.align_c = alignment(c, ldc, sizeof(float));
    key.ta = ta;
    key.tb = tb;
    key.type = (uint8_t) type;
    p = plan_of(cu, &key);
    if (!p || p->none)
        return !p;
    rc = cublasLtMatmul(cu->lt->handle, p->op, &one, a, p->a, b, p->b, &beta, c, p->c, c, p->c, &p->algo,
                        cu->lt->workspace, WORKSPACE, cu->stream);
    if (has_none(rc)) /* what it has chosen itself */
        p->none = true;
    else if (rc != CUBLAS_STATUS_SUCCESS)
        kne_cu_fail(cu, KNE_ERR_DEVICE, "a product failed: %s", cublasLtGetStatusString(rc));
    return !p->none;
}
