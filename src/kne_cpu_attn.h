/*
 * kne_cpu_attn.h - RoPE and causal attention (part of kne_cpu_ops_impl.h).
 *
 * A query sees its keys in blocks of KEY_BLOCK from key 0 on, with a running
 * maximum; so its bits depend neither on how many queries run together nor on
 * whether the keys come from a cache. Backward recomputes the probabilities
 * from lse; the sums over queries run head by head of a group, then by query.
 */
#define KEY_BLOCK   256
#define QUERY_BLOCK 32
#define KEY_TILE    64

OP_ARGS(rope, kne_real *x; int64_t ldx; const kne_real *cos; const kne_real *sin;
        const int32_t *pos; int32_t n_heads; int32_t head_dim; int32_t half; bool interleaved;
        kne_real sign;)

static void
rope_rows(const rope_args *a, int64_t r0, int64_t r1, char *scratch)
{
    for (int64_t r = r0; r < r1; r++)
    {
        const kne_real *c = a->cos + (int64_t) a->pos[r] * a->half;
        const kne_real *s = a->sin + (int64_t) a->pos[r] * a->half;

        for (int32_t h = 0; h < a->n_heads; h++)
        {
            kne_real *x = a->x + r * a->ldx + (int64_t) h * a->head_dim;

            if (a->interleaved)
                for (int32_t i = 0; i < a->half; i++)
                {
                    kne_real x0 = x[2 * i], x1 = x[2 * i + 1], si = s[i] * a->sign;

                    x[2 * i] = x0 * c[i] - x1 * si;
                    x[2 * i + 1] = x1 * c[i] + x0 * si;
                }
            else
                FOR_VECTORS(i, a->half)
                {
                    vr x0 = LOAD(x + i, 0), x1 = LOAD(x + a->half + i, 0);
                    vr ci = LOAD(c + i, 0), si = LOAD(s + i, 0) * a->sign;

                    STORE(x + i, x0 * ci - x1 * si);
                    STORE(x + a->half + i, x1 * ci + x0 * si);
                }
        }
    }
}
OP_TASK(rope)

static void
rope(void *ctx, kne_real *x, int64_t ldx, const kne_real *cos, const kne_real *sin,
     const int32_t *pos, int64_t n, int32_t n_heads, int32_t head_dim, int32_t rotary_dim,
     bool interleaved, kne_real sign)
{
    SPLIT(rope, n, 5 + 0.3 * n_heads * rotary_dim, 1, x, ldx, cos, sin, pos, n_heads, head_dim,
          rotary_dim / 2, interleaved, sign);
}

/* s[j] = q . k[j], j < n; d elements, rows of k ldk apart. */
INLINE void
dots(kne_real *s, const kne_real *q, const kne_real *k, int64_t ldk, int64_t n, int64_t d)
{
    int64_t j = 0;

    for (; j + 4 <= n; j += 4, k += 4 * ldk)
    {
        vr a0 = vr_set1(0), a1 = a0, a2 = a0, a3 = a0;

        FOR_VECTORS(i, d)
        {
            vr v = LOAD(q + i, 0);

            a0 += v * LOAD(k + i, 0);
            a1 += v * LOAD(k + ldk + i, 0);
            a2 += v * LOAD(k + 2 * ldk + i, 0);
            a3 += v * LOAD(k + 3 * ldk + i, 0);
        }
        vr_sum4(s + j, a0, a1, a2, a3);
    }
    for (; j < n; j++, k += ldk)
    {
        vr a0 = vr_set1(0);

        FOR_VECTORS(i, d)
            a0 += LOAD(q + i, 0) * LOAD(k + i, 0);
        s[j] = vr_sum(a0);
    }
}

/* V vectors of y from i on: P accumulators each, j = 0, P, ... and so on, added up at the end. */
INLINE void
weighted_part(const int V, const int P, kne_real *y, kne_real scale, const kne_real *p, int64_t ldp,
              const kne_real *m, int64_t ldm, int64_t n, int64_t left)
{
    vr      acc[8];
    int64_t j = 0;

    for (int i = 0; i < V * P; i++)
        acc[i] = vr_set1(0);
    for (; j + P <= n; j += P)
        for (int h = 0; h < P; h++, m += ldm)
            for (int i = 0; i < V; i++)
                acc[h * V + i] += (V > 1 ? vr_load(m + i * LANES) : LOAD(m, 0)) * p[(j + h) * ldp];
    for (; j < n; j++, m += ldm)
        for (int i = 0; i < V; i++)
            acc[i] += (V > 1 ? vr_load(m + i * LANES) : LOAD(m, 0)) * p[j * ldp];
    for (int i = 0; i < V; i++)
    {
        for (int h = 1; h < P; h++)
            acc[i] += acc[h * V + i];
        if (V > 1)
            vr_store(y + i * LANES, vr_load(y + i * LANES) * scale + acc[i]);
        else
            STORE(y, LOAD(y, 0) * scale + acc[i]);
    }
}

/* y[0..d) = y * scale + sum over j < n of p[j * ldp] m[j, :], in an order that n and d fix. */
INLINE void
weighted_sum(kne_real *y, kne_real scale, const kne_real *p, int64_t ldp, const kne_real *m,
             int64_t ldm, int64_t n, int64_t d)
{
    int64_t i = 0;

    for (; i + 4 * LANES <= d; i += 4 * LANES)
        weighted_part(4, 2, y + i, scale, p, ldp, m + i, ldm, n, 0);
    for (; i + 2 * LANES <= d; i += 2 * LANES)
        weighted_part(2, 4, y + i, scale, p, ldp, m + i, ldm, n, 0);
    for (; i < d; i += LANES)
        weighted_part(1, 4, y + i, scale, p, ldp, m + i, ldm, n, d - i);
}

OP_ARGS(attention, kne_real *o; kne_real *lse; const kne_real *q; const kne_real *k;
        const kne_real *v; const kne_attn_shape *sh;)

/*
 * ni queries of one head, the first of which sees `seen` keys and each next one more. In
 * phases over the tile, for what one phase stores is then out of the way of the next.
 */
INLINE void
attention_tile(kne_real *o, kne_real *lse, const kne_real *q, const kne_real *k, const kne_real *v,
               int64_t ni, int64_t seen, int64_t hd, int64_t ldq, int64_t ldkv, int64_t n_heads,
               kne_real scale, kne_real *s)
{
    kne_real max[QUERY_BLOCK], c[QUERY_BLOCK];
    double   sum[QUERY_BLOCK];

    for (int64_t i = 0; i < ni; i++)
    {
        max[i] = -INFINITY;
        sum[i] = 0;
        memset(o + i * ldq, 0, (size_t) hd * sizeof(kne_real));
    }
    for (int64_t j = 0; j < seen + ni - 1; j += KEY_BLOCK)
    {
        int64_t first = j < seen ? 0 : j - seen + 1; /* queries before it see no key of the block */

        for (int64_t i = first; i < ni; i++)
        {
            int64_t nj = seen + i - j < KEY_BLOCK ? seen + i - j : KEY_BLOCK;

            dots(s + i * KEY_BLOCK, q + i * ldq, k + j * ldkv, ldkv, nj, hd);
        }
        for (int64_t i = first; i < ni; i++)
        {
            int64_t   nj = seen + i - j < KEY_BLOCK ? seen + i - j : KEY_BLOCK;
            kne_real *si = s + i * KEY_BLOCK, m;
            vr        acc = vr_set1(0), top = vr_set1(max[i]);

            FOR_VECTORS(e, nj)
            {
                vr x = LOAD(si + e, -INFINITY) * scale;

                top = vr_max(x, top);
                STORE(si + e, x);
            }
            m = vr_max_lane(top);
            c[i] = j == 0 ? 0 : (kne_real) exp((double) (max[i] - m));
            max[i] = m;
            FOR_VECTORS(e, nj)
            {
                vr x = vr_exp(LOAD(si + e, -INFINITY) - m);

                acc += x;
                STORE(si + e, x);
            }
            sum[i] = sum[i] * (double) c[i] + (double) vr_sum(acc);
        }
        for (int64_t i = first; i < ni; i++)
        {
            int64_t nj = seen + i - j < KEY_BLOCK ? seen + i - j : KEY_BLOCK;

            weighted_sum(o + i * ldq, c[i], s + i * KEY_BLOCK, 1, v + j * ldkv, ldkv, nj, hd);
        }
    }
    for (int64_t i = 0; i < ni; i++)
    {
        kne_real r = (kne_real) (1.0 / sum[i]);

        FOR_VECTORS(e, hd)
            STORE(o + i * ldq + e, LOAD(o + i * ldq + e, 0) * r);
        if (lse)
            lse[i * n_heads] = (kne_real) ((double) max[i] + log(sum[i]));
    }
}

/* "Rows" are (sequence, head) pairs. */
static void
attention_rows(const attention_args *a, int64_t r0, int64_t r1, char *scratch)
{
    const kne_attn_shape *sh = a->sh;
    int64_t hd = sh->head_dim, ldq = sh->n_heads * hd, ldkv = sh->n_kv_heads * hd;
    int32_t group = sh->n_heads / sh->n_kv_heads;

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_seq  *seq = &sh->seq[r / sh->n_heads];
        int64_t         h = r % sh->n_heads;
        const kne_real *k = a->k + seq->kv0 * ldkv + h / group * hd;
        const kne_real *v = a->v + seq->kv0 * ldkv + h / group * hd;

        for (int64_t i = 0; i < seq->q_len; i += QUERY_BLOCK)
        {
            int64_t row = seq->q0 + i, ni = seq->q_len - i < QUERY_BLOCK ? seq->q_len - i : QUERY_BLOCK;

            attention_tile(a->o + row * ldq + h * hd, a->lse ? a->lse + row * sh->n_heads + h : NULL,
                           a->q + row * ldq + h * hd, k, v, ni, seq->kv_len - seq->q_len + i + 1, hd,
                           ldq, ldkv, sh->n_heads, (kne_real) sh->scale, (kne_real *) scratch);
        }
    }
}
OP_TASK(attention)

/* Pairs of query and key seen, on average over sequences. */
INLINE double
attention_pairs(const kne_attn_shape *sh)
{
    double pairs = 0;

    for (int32_t i = 0; i < sh->n_seq; i++)
        pairs += (double) sh->seq[i].q_len * (sh->seq[i].kv_len - 0.5 * sh->seq[i].q_len);
    return pairs / (sh->n_seq > 0 ? sh->n_seq : 1);
}

static void
attention(void *ctx, kne_real *o, kne_real *lse, const kne_real *q, const kne_real *k,
          const kne_real *v, const kne_attn_shape *shape)
{
    SPLIT(attention, (int64_t) shape->n_seq * shape->n_heads,
          attention_pairs(shape) * (3 + 0.1 * shape->head_dim), 1, o, lse, q, k, v, shape);
}

OP_ARGS(attention_bwd, kne_real *dq; kne_real *dk; kne_real *dv; const kne_real *do_;
        const kne_real *o; const kne_real *lse; const kne_real *q; const kne_real *k;
        const kne_real *v; const kne_attn_shape *sh;)

/* One query tile against one key tile of one head; rows of q and k are ldq and ldkv apart. */
INLINE void
attention_bwd_tile(kne_real *dq, kne_real *dk, kne_real *dv, const kne_real *do_,
                   const kne_real *lse, const kne_real *dsum, const kne_real *q, const kne_real *k,
                   const kne_real *v, int64_t i0, int64_t ni, int64_t j0, int64_t nj, int64_t hd,
                   int64_t ldq, int64_t ldkv, int64_t n_heads, kne_real scale, kne_real *p,
                   kne_real *ds)
{
    for (int64_t i = 0; i < ni; i++)
    {
        int64_t   seen = i0 + i + 1 - j0;
        int64_t   n = seen < nj ? (seen > 0 ? seen : 0) : nj;
        kne_real *pi = p + i * KEY_TILE, *di = ds + i * KEY_TILE;
        kne_real  l = lse[i * n_heads], sum = dsum[i];

        dots(pi, q + i * ldq, k, ldkv, n, hd);
        dots(di, do_ + i * ldq, v, ldkv, n, hd);
        FOR_VECTORS(j, n)
        {
            vr e = vr_exp(LOAD(pi + j, 0) * scale - l);

            STORE(pi + j, e);
            STORE(di + j, e * (LOAD(di + j, 0) - sum) * scale);
        }
        weighted_sum(dq + i * ldq, 1, di, 1, k, ldkv, n, hd);
    }
    for (int64_t j = 0; j < nj; j++)
    {
        /* the first query of the tile that sees key j */
        int64_t i = j0 + j > i0 ? j0 + j - i0 : 0;

        if (i >= ni)
            break;
        weighted_sum(dv + j * ldkv, 1, p + i * KEY_TILE + j, KEY_TILE, do_ + i * ldq, ldq, ni - i, hd);
        weighted_sum(dk + j * ldkv, 1, ds + i * KEY_TILE + j, KEY_TILE, q + i * ldq, ldq, ni - i, hd);
    }
}

/* "Rows" are (sequence, key head) pairs: dk and dv of a group have one owner. */
static void
attention_bwd_rows(const attention_bwd_args *a, int64_t r0, int64_t r1, char *scratch)
{
    const kne_attn_shape *sh = a->sh;
    int64_t   hd = sh->head_dim, ldq = sh->n_heads * hd, ldkv = sh->n_kv_heads * hd;
    int64_t   group = sh->n_heads / sh->n_kv_heads;
    kne_real *p = (kne_real *) scratch, *ds = p + QUERY_BLOCK * KEY_TILE;
    kne_real  dsum[QUERY_BLOCK];

    for (int64_t r = r0; r < r1; r++)
    {
        const kne_seq *seq = &sh->seq[r / sh->n_kv_heads];
        int64_t        kvh = r % sh->n_kv_heads, kv = seq->kv0 * ldkv + kvh * hd, t = seq->q_len;

        for (int64_t j = 0; j < t; j++)
        {
            memset(a->dk + kv + j * ldkv, 0, (size_t) hd * sizeof(kne_real));
            memset(a->dv + kv + j * ldkv, 0, (size_t) hd * sizeof(kne_real));
        }
        for (int64_t h = kvh * group; h < (kvh + 1) * group; h++)
            for (int64_t i0 = 0; i0 < t; i0 += QUERY_BLOCK)
            {
                int64_t ni = t - i0 < QUERY_BLOCK ? t - i0 : QUERY_BLOCK;
                int64_t qi = (seq->q0 + i0) * ldq + h * hd;

                for (int64_t qr = 0; qr < ni; qr++)
                {
                    double dot;

                    memset(a->dq + qi + qr * ldq, 0, (size_t) hd * sizeof(kne_real));
                    BLOCK_SUM(dot, hd, LOAD(a->do_ + qi + qr * ldq + i, 0) *
                                           LOAD(a->o + qi + qr * ldq + i, 0));
                    dsum[qr] = (kne_real) dot;
                }
                for (int64_t j0 = 0; j0 < i0 + ni; j0 += KEY_TILE)
                {
                    int64_t nj = i0 + ni - j0 < KEY_TILE ? i0 + ni - j0 : KEY_TILE;

                    attention_bwd_tile(a->dq + qi, a->dk + kv + j0 * ldkv, a->dv + kv + j0 * ldkv,
                                       a->do_ + qi, a->lse + (seq->q0 + i0) * sh->n_heads + h, dsum,
                                       a->q + qi, a->k + kv + j0 * ldkv, a->v + kv + j0 * ldkv, i0,
                                       ni, j0, nj, hd, ldq, ldkv, sh->n_heads,
                                       (kne_real) sh->scale, p, ds);
                }
            }
    }
}
OP_TASK(attention_bwd)

static void
attention_bwd(void *ctx, kne_real *dq, kne_real *dk, kne_real *dv, const kne_real *do_,
              const kne_real *o, const kne_real *lse, const kne_real *q, const kne_real *k,
              const kne_real *v, const kne_attn_shape *shape)
{
    SPLIT(attention_bwd, (int64_t) shape->n_seq * shape->n_kv_heads,
          attention_pairs(shape) * shape->n_heads / shape->n_kv_heads * (6 + 0.3 * shape->head_dim),
          1, dq, dk, dv, do_, o, lse, q, k, v, shape);
}
