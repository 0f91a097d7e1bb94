/*
 * attention.cu - RoPE, and causal attention forward and backward over packed sequences.
 *
 * A warp has one query (forward, dq) or one key (dk, dv) of one head, and goes through the others 32 at a time:
 * first each lane has one of them and forms its score, then each lane has head_dim / 32 columns of the sum. So
 * every sum has one owner and one order. Facts are tens of tokens: what counts is to be few launches.
 */
#include "kne_cuda.h"

#define WARPS 4
#define PARTS (KNE_HEAD_MAX / 32) /* columns of a head that a lane has at most */

/* x[r, h, :] of n rows rotated in place; cos, sin [n_ctx, half]; a thread a pair. */
static __global__ void
rope_kernel(float *x, int64_t ldx, const float *cos_, const float *sin_, const int32_t *pos, int64_t n,
            int32_t n_heads, int32_t head_dim, int32_t half, bool interleaved, float sign)
{
    KNE_STRIDE(at, n * n_heads * half)
    {
        const int32_t i = (int32_t) (at % half), h = (int32_t) (at / half % n_heads);
        const int64_t r = at / half / n_heads, angle = (int64_t) pos[r] * half + i;
        float        *p = x + r * ldx + (int64_t) h * head_dim + (interleaved ? 2 * i : i);
        float        *q = p + (interleaved ? 1 : half);
        const float   c = cos_[angle], s = sin_[angle] * sign, a = *p, b = *q;

        *p = a * c - b * s;
        *q = b * c + a * s;
    }
}

/* a . b of hd elements, by one lane */
static __device__ __forceinline__ float
dot(const float *a, const float *b, int32_t hd)
{
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int   i = 0;

    for (; i + 4 <= hd; i += 4)
    {
        s0 += a[i] * b[i];
        s1 += a[i + 1] * b[i + 1];
        s2 += a[i + 2] * b[i + 2];
        s3 += a[i + 3] * b[i + 3];
    }
    for (; i < hd; i++)
        s0 += a[i] * b[i];
    return (s0 + s1) + (s2 + s3);
}

/* acc[i] += sum over the 32 lanes' weight p of row m[j, lane + 32 i]; n rows, ld apart; all lanes together */
static __device__ __forceinline__ void
add_rows(float *acc, float p, const float *m, int64_t ld, int32_t n, int32_t hd, int lane)
{
    for (int32_t j = 0; j < n; j++)
    {
        const float w = __shfl_sync(0xffffffffu, p, j);

#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (lane + 32 * i < hd)
                acc[i] += w * m[j * ld + lane + 32 * i];
    }
}

static __device__ __forceinline__ void
copy_row(float *to, const float *from, int32_t hd, int lane)
{
    for (int32_t i = lane; i < hd; i += 32)
        to[i] = from[i];
}

/* Blocks (queries / WARPS, sequence, head). o [n, H hd], lse [n, H], q [n, H hd], k and v [kv rows, Hkv hd]. */
static __global__ void __launch_bounds__(WARPS * 32)
attention_kernel(float *o, float *lse, const float *q, const float *k, const float *v, const kne_seq *seqs,
                 int32_t n_heads, int32_t n_kv, int32_t hd, float scale)
{
    KNE_DYNAMIC_SHARED(float, shared); /* [WARPS, hd] */
    const kne_seq seq = seqs[blockIdx.y];
    const int     warp = (int) threadIdx.x / 32, lane = (int) threadIdx.x % 32;
    const int32_t i = (int32_t) blockIdx.x * WARPS + warp, h = (int32_t) blockIdx.z;
    const int64_t ldq = (int64_t) n_heads * hd, ldk = (int64_t) n_kv * hd;
    float        *mine = shared + warp * hd, acc[PARTS], max = -INFINITY, sum = 0;

    if (i >= seq.q_len)
        return; /* a whole warp; no block barrier below */
    const int64_t row = seq.q0 + i, at = row * ldq + (int64_t) h * hd;
    const int64_t kv = (int64_t) seq.kv0 * ldk + (int64_t) (h / (n_heads / n_kv)) * hd;
    const int32_t seen = seq.kv_len - seq.q_len + i + 1;

    copy_row(mine, q + at, hd, lane);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        acc[c] = 0;
    for (int32_t j = 0; j < seen; j += 32)
    {
        const int32_t n = seen - j < 32 ? seen - j : 32;
        const float   s = lane < n ? dot(mine, k + kv + (j + lane) * ldk, hd) * scale : -INFINITY;
        const float   top = fmaxf(max, kne_warp_max(s));
        const float   fade = j == 0 ? 0.0f : expf(max - top), p = lane < n ? expf(s - top) : 0.0f;

        max = top;
        sum = sum * fade + kne_warp_sum(p);
#pragma unroll
        for (int c = 0; c < PARTS; c++)
            acc[c] *= fade;
        add_rows(acc, p, v + kv + j * ldk, ldk, n, hd, lane);
    }
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        if (lane + 32 * c < hd)
            o[at + lane + 32 * c] = acc[c] / sum;
    if (lse && lane == 0)
        lse[row * n_heads + h] = max + logf(sum);
}

/* dq, and dsum[n, H] = do . o for the other half. Blocks as forward's. */
static __global__ void __launch_bounds__(WARPS * 32)
attention_dq_kernel(float *dq, float *dsum, const float *do_, const float *o, const float *lse, const float *q,
                    const float *k, const float *v, const kne_seq *seqs, int32_t n_heads, int32_t n_kv, int32_t hd,
                    float scale)
{
    KNE_DYNAMIC_SHARED(float, shared); /* [WARPS, 2, hd] */
    const kne_seq seq = seqs[blockIdx.y];
    const int     warp = (int) threadIdx.x / 32, lane = (int) threadIdx.x % 32;
    const int32_t i = (int32_t) blockIdx.x * WARPS + warp, h = (int32_t) blockIdx.z;
    const int64_t ldq = (int64_t) n_heads * hd, ldk = (int64_t) n_kv * hd;
    float        *my_q = shared + warp * 2 * hd, *my_do = my_q + hd, acc[PARTS], d = 0;

    if (i >= seq.q_len)
        return;
    const int64_t row = seq.q0 + i, at = row * ldq + (int64_t) h * hd;
    const int64_t kv = (int64_t) seq.kv0 * ldk + (int64_t) (h / (n_heads / n_kv)) * hd;
    const float   l = lse[row * n_heads + h];

    copy_row(my_q, q + at, hd, lane);
    copy_row(my_do, do_ + at, hd, lane);
    for (int32_t c = lane; c < hd; c += 32)
        d += do_[at + c] * o[at + c];
    d = kne_warp_sum(d);
    if (lane == 0)
        dsum[row * n_heads + h] = d;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        acc[c] = 0;
    for (int32_t j = 0; j <= i; j += 32)
    {
        const int32_t n = i + 1 - j < 32 ? i + 1 - j : 32;
        float         ds = 0;

        if (lane < n)
        {
            const float p = expf(dot(my_q, k + kv + (j + lane) * ldk, hd) * scale - l);

            ds = p * (dot(my_do, v + kv + (j + lane) * ldk, hd) - d) * scale;
        }
        add_rows(acc, ds, k + kv + j * ldk, ldk, n, hd, lane);
    }
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        if (lane + 32 * c < hd)
            dq[at + lane + 32 * c] = acc[c];
}

/* dk, dv of one key, over the heads of its group and the queries that see it. Blocks (keys / WARPS, sequence, kv head). */
static __global__ void __launch_bounds__(WARPS * 32)
attention_dkv_kernel(float *dk, float *dv, const float *dsum, const float *do_, const float *lse, const float *q,
                     const float *k, const float *v, const kne_seq *seqs, int32_t n_heads, int32_t n_kv, int32_t hd,
                     float scale)
{
    KNE_DYNAMIC_SHARED(float, shared); /* [WARPS, 2, hd] */
    const kne_seq seq = seqs[blockIdx.y];
    const int     warp = (int) threadIdx.x / 32, lane = (int) threadIdx.x % 32;
    const int32_t j = (int32_t) blockIdx.x * WARPS + warp, group = n_heads / n_kv;
    const int64_t ldq = (int64_t) n_heads * hd, ldk = (int64_t) n_kv * hd;
    float        *my_k = shared + warp * 2 * hd, *my_v = my_k + hd, acc_k[PARTS], acc_v[PARTS];

    if (j >= seq.q_len)
        return;
    const int64_t kv = (seq.kv0 + j) * ldk + (int64_t) blockIdx.z * hd;

    copy_row(my_k, k + kv, hd, lane);
    copy_row(my_v, v + kv, hd, lane);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        acc_k[c] = acc_v[c] = 0;
    for (int32_t h = (int32_t) blockIdx.z * group; h < ((int32_t) blockIdx.z + 1) * group; h++)
        for (int32_t i = j; i < seq.q_len; i += 32)
        {
            const int32_t n = seq.q_len - i < 32 ? seq.q_len - i : 32;
            const int64_t row = seq.q0 + i, at = row * ldq + (int64_t) h * hd;
            float         p = 0, ds = 0;

            if (lane < n)
            {
                const int64_t stat = (row + lane) * n_heads + h;

                p = expf(dot(my_k, q + at + lane * ldq, hd) * scale - lse[stat]);
                ds = p * (dot(my_v, do_ + at + lane * ldq, hd) - dsum[stat]) * scale;
            }
            add_rows(acc_v, p, do_ + at, ldq, n, hd, lane);
            add_rows(acc_k, ds, q + at, ldq, n, hd, lane);
        }
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        if (lane + 32 * c < hd)
        {
            dk[kv + lane + 32 * c] = acc_k[c];
            dv[kv + lane + 32 * c] = acc_v[c];
        }
}

static void
rope(void *ctx, float *x, int64_t ldx, const float *cos_, const float *sin_, const int32_t *pos, int64_t n,
     int32_t n_heads, int32_t head_dim, int32_t rotary_dim, bool interleaved, float sign)
{
    const int64_t pairs = n * n_heads * (rotary_dim / 2);

    if (pairs > 0)
        KNE_LAUNCH((kne_cu *) ctx, rope_kernel, kne_blocks(pairs, KNE_BLOCK), KNE_BLOCK, 0, x, ldx, cos_, sin_, pos,
                   n, n_heads, head_dim, rotary_dim / 2, interleaved, sign);
}

static bool
fits(kne_cu *cu, const kne_attn_shape *s)
{
    if (s->head_dim > KNE_HEAD_MAX)
        kne_cu_fail(cu, KNE_ERR_UNSUPPORTED, "the GPU backend has heads of at most %d, not %d", KNE_HEAD_MAX,
                    s->head_dim);
    return s->head_dim <= KNE_HEAD_MAX && s->n_seq > 0 && s->max_q > 0;
}

static void
attention(void *ctx, float *o, float *lse, const float *q, const float *k, const float *v, const kne_attn_shape *s)
{
    kne_cu *cu = (kne_cu *) ctx;

    if (!fits(cu, s))
        return;
    dim3 grid((unsigned) (s->max_q + WARPS - 1) / WARPS, (unsigned) s->n_seq, (unsigned) s->n_heads);

    KNE_LAUNCH(cu, attention_kernel, grid, WARPS * 32, (size_t) WARPS * s->head_dim * sizeof(float), o, lse, q, k, v,
               s->seq, s->n_heads, s->n_kv_heads, s->head_dim, s->scale);
}

static void
attention_bwd(void *ctx, float *dq, float *dk, float *dv, const float *do_, const float *o, const float *lse,
              const float *q, const float *k, const float *v, const kne_attn_shape *s)
{
    kne_cu      *cu = (kne_cu *) ctx;
    const size_t smem = (size_t) WARPS * 2 * s->head_dim * sizeof(float);
    float       *dsum;

    if (!fits(cu, s))
        return;
    dsum = (float *) kne_cu_reserve(cu, &cu->row, (size_t) s->n_rows * s->n_heads * sizeof(float));
    dim3 by_query((unsigned) (s->max_q + WARPS - 1) / WARPS, (unsigned) s->n_seq, (unsigned) s->n_heads);
    dim3 by_key(by_query.x, (unsigned) s->n_seq, (unsigned) s->n_kv_heads);

    KNE_LAUNCH(cu, attention_dq_kernel, by_query, WARPS * 32, smem, dq, dsum, do_, o, lse, q, k, v, s->seq,
               s->n_heads, s->n_kv_heads, s->head_dim, s->scale);
    KNE_LAUNCH(cu, attention_dkv_kernel, by_key, WARPS * 32, smem, dk, dv, dsum, do_, lse, q, k, v, s->seq,
               s->n_heads, s->n_kv_heads, s->head_dim, s->scale);
}

void
kne_cu_fill_attention(kne_backend *be)
{
    be->rope = rope;
    be->attention = attention;
    be->attention_bwd = attention_bwd;
}
