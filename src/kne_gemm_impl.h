/*
 * kne_gemm_impl.h - the two matrix kernels, written once over kne_vec.h and
 * compiled for each instruction set (KNE_GEMM_TABLE names the result).
 *
 * Contract, on which batch and thread invariance rest: an output element is
 *   nt: VL accumulators over k = lane, lane + VL, ... in order, then vf_sum4; with many rows the same sums come
 *       from W and x turned into panels, a lane after the other (nt_turned);
 *   nn: one accumulator over each block of NN_K k's in order, the blocks added up in order;
 * with fused multiply-add from 0, whatever the tile or the task.
 * Then (+ bias), then beta y + it.
 */
#include "kne_cpu.h"
#include "kne_vec.h"

#if VL == 16
#define NT_R 4 /* outputs x rows of x of one tile, in registers */
#define NT_C 6
#define NN_V 4 /* vectors of outputs x rows of one tile */
#define NN_T 6
#elif VL == 8
#define NT_R 2
#define NT_C 6
#define NN_V 2
#define NN_T 6
#else
#define NT_R 2
#define NT_C 4
#define NN_V 2
#define NN_T 4
#endif

#define NT_L1  (16 * 1024)
#define NT_SHORT 4096 /* bytes of a row of W */
#define UNROLL _Pragma("GCC unroll 16")
/*
 * Several k's a turn: where two threads share a core, it is instructions that are short, and what a loop costs beside its
 * products is taken from them.
 */
#define UNROLL_K _Pragma("GCC unroll 4")

KNE_INLINE float
finish(const kne_gemm *g, float sum, int64_t o, float y)
{
    if (g->bias)
        sum += g->bias[o];
    return g->beta == 0 ? sum : g->beta * y + sum;
}

/* Four outputs of a row at once: the same arithmetic. */
KNE_INLINE void
finish4(const kne_gemm *g, v4 sum, int64_t o, int64_t r)
{
    float *y = g->y + r * g->ldy + o;
    v4     v;

    if (g->bias)
    {
        memcpy(&v, g->bias + o, sizeof(v));
        sum += v;
    }
    if (g->beta != 0)
    {
        memcpy(&v, y, sizeof(v));
        sum = g->beta * v + sum;
    }
    memcpy(y, &sum, sizeof(sum));
}

/* Two outputs each of two rows, r and r + 1. */
KNE_INLINE void
finish2x2(const kne_gemm *g, v4 sum, int64_t o, int64_t r)
{
    float *y = g->y + r * g->ldy + o, *z = y + g->ldy;

    if (g->bias)
        sum += (v4) {g->bias[o], g->bias[o + 1], g->bias[o], g->bias[o + 1]};
    if (g->beta != 0)
        sum = g->beta * (v4) {y[0], y[1], z[0], z[1]} + sum;
    memcpy(y, &sum, 2 * sizeof(float));
    memcpy(z, (const char *) &sum + 2 * sizeof(float), 2 * sizeof(float));
}

/* A row's sums, no outputs from o on, into y: finish(), a vector at a time. */
KNE_INLINE void
finish_row(const kne_gemm *g, const float *sum, int64_t o, int64_t no, int64_t r)
{
    float  *y = g->y + r * g->ldy + o;
    int64_t c = 0;

    for (; c + VL <= no; c += VL)
    {
        vf v = vf_load(sum + c);

        if (g->bias)
            v = vf_add(v, vf_load(g->bias + o + c));
        if (g->beta != 0)
            v = vf_fma(vf_set1(g->beta), vf_load(y + c), v);
        vf_store(y + c, v);
    }
    for (; c < no; c++)
        y[c] = finish(g, sum[c], o + c, y[c]);
}

/* ---- nt: y[r, o] = sum_k x[r, k] w[o, k] ---- */

/* nr <= R outputs from o, C rows from r. ahead: how many bytes further W is asked for; 0: it is not. */
KNE_INLINE void
nt_tile(const kne_gemm *g, const kne_dtype type, const int R, const int C, int64_t o, int nr,
        int64_t r, int64_t ahead)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;
    const char   *w[8];
    const float  *x = g->x + r * g->xs_row;
    vf            acc[8 * NT_C], wv[8];
    float         sum[8 * NT_C + 4] = {0};
    int64_t       k = 0;

    UNROLL
    for (int i = 0; i < R; i++) /* past the last output: the last again, dropped below */
        w[i] = g->w + (o + (i < nr ? i : nr - 1)) * g->ldw * size;
    UNROLL
    for (int i = 0; i < R * C; i++)
        acc[i] = vf_zero();
    UNROLL_K
    for (; k + VL <= g->k; k += VL)
    {
        UNROLL
        for (int i = 0; i < R; i++)
        {
            wv[i] = vf_load_w(w[i] + k * size, type);
            if (ahead)
                __builtin_prefetch(w[i] + k * size + ahead, 0, 2);
        }
        UNROLL
        for (int c = 0; c < C; c++)
        {
            vf xv = vf_load(x + c * g->xs_row + k);

            UNROLL
            for (int i = 0; i < R; i++)
                acc[c * R + i] = vf_fma(wv[i], xv, acc[c * R + i]);
        }
    }
    if (k < g->k)
    {
        int left = (int) (g->k - k);

        UNROLL
        for (int i = 0; i < R; i++)
            wv[i] = vf_load_w_part(w[i] + k * size, type, left);
        UNROLL
        for (int c = 0; c < C; c++)
        {
            vf xv = vf_load_w_part((const char *) (x + c * g->xs_row + k), KNE_F32, left);

            UNROLL
            for (int i = 0; i < R; i++)
                acc[c * R + i] = vf_fma(wv[i], xv, acc[c * R + i]);
        }
    }
    if (nr == R && R % 4 == 0)
    {
        int i = 0;

#ifdef HAVE_VF_SUM16
        UNROLL
        for (; i + 16 <= R * C; i += 16)
        {
            vf s = vf_sum16(acc + i);
            v4 v[4];

            memcpy(v, &s, sizeof(s));
            UNROLL
            for (int j = 0; j < 4; j++)
                finish4(g, v[j], o + (i + 4 * j) % R, r + (i + 4 * j) / R);
        }
#endif
        UNROLL
        for (; i < R * C; i += 4)
            finish4(g, vf_sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]), o + i % R, r + i / R);
        return;
    }
    if (nr == R && R == 2 && C % 2 == 0)
    {
        UNROLL
        for (int i = 0; i < R * C; i += 4)
            finish2x2(g, vf_sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]), o, r + i / 2);
        return;
    }
    UNROLL
    for (int i = 0; i < R * C; i += 4)
    {
        const int last = R * C - 1;
        v4        v = vf_sum4(acc[i], acc[i + 1 <= last ? i + 1 : last], acc[i + 2 <= last ? i + 2 : last],
                              acc[i + 3 <= last ? i + 3 : last]);

        memcpy(sum + i, &v, sizeof(v));
    }
    for (int c = 0; c < C; c++)
    {
        float *y = g->y + (r + c) * g->ldy + o;

        for (int i = 0; i < nr; i++)
            y[i] = finish(g, sum[c * R + i], o + i, y[i]);
    }
}

/* Outputs [o, o1) for the rows of one tile. */
KNE_INLINE void
nt_column(const kne_gemm *g, const kne_dtype type, const int R, const int C, int64_t o, int64_t o1,
          int64_t r, int64_t ahead)
{
    for (; o < o1; o += R)
        nt_tile(g, type, R, C, o, (int) (o1 - o < R ? o1 - o : R), r, ahead);
}

KNE_INLINE void
nt_block(const kne_gemm *g, const kne_dtype type, int64_t o0, int64_t o1, int64_t r0, int64_t r1)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;
    int64_t n = r1 - r0, pairs = (n + 1) / 2, tiles = (pairs + NT_C / 2 - 1) / (NT_C / 2);
    int64_t step = n <= 2 ? 8 : NT_R;
    /* as many rows of W as stay in half of a first-level cache while the rows of x pass by */
    int64_t fit = NT_L1 / ((g->k + 1) * size) / step * step;

    step = fit > step ? fit : step;
    /* the next of them, where rows are too short for the processor to see that they are read in a row */
    int64_t next = n > 2 && g->k * size <= NT_SHORT ? step * g->ldw * size : 0;

    for (int64_t o = o0; o < o1; o += step)
    {
        int64_t oe = o1 - o < step ? o1 : o + step;

        for (int64_t t = 0; t < tiles; t++)
        {
            /* tiles of nearly equal and even width: none is narrow, and rows go in pairs */
            int64_t r = r0 + pairs * t / tiles * 2, re = r0 + pairs * (t + 1) / tiles * 2;
            int64_t ahead = t == 0 && oe + step <= o1 ? next : 0;

            switch ((int) ((re < r1 ? re : r1) - r))
            {
                case 1: nt_column(g, type, 8, 1, o, oe, r, ahead); break;
                case 2:
                    if (n == 2)
                        nt_column(g, type, 8, 2, o, oe, r, ahead);
                    else
                        nt_column(g, type, NT_R, 2, o, oe, r, ahead);
                    break;
                case 3: nt_column(g, type, NT_R, 3, o, oe, r, ahead); break;
                case 4: nt_column(g, type, NT_R, 4, o, oe, r, ahead); break;
#if NT_C > 4
                case 5: nt_column(g, type, NT_R, 5, o, oe, r, ahead); break;
                case 6: nt_column(g, type, NT_R, 6, o, oe, r, ahead); break;
#endif
            }
        }
    }
}

/*
 * ---- nt of many rows: the same sums, but a vector holds 16 outputs instead of 16 lanes of one ----
 *
 * W is turned into panels of TURN_W outputs, lane by lane, once for all rows; then every load of W is a plain load
 * of floats, and the sum over lanes is additions of whole vectors.
 */
#define TURN_V    NN_V /* vectors of outputs x rows of one tile */
#define TURN_T    NN_T
#define TURN_W    (TURN_V * VL)
#define TURN_K    (VL == 16 ? 1024 : 2048) /* k of a panel; of longer sums the lanes so far are put aside */
#define TURN_ROWS 256  /* rows whose lanes can be put aside */
#define TURN_PACKED (512 * 1024) /* floats of x that lie packed */
#define TURN_TILE (TURN_T * TURN_W)
#define TURN_U    4 /* terms of a lane come in multiples of these, the last of them 0 */
#define TURN_TERMS(nk) (((nk) + TURN_U * VL - 1) / (TURN_U * VL) * TURN_U)

/* The lanes in the order in which vf_sum4 comes to pair them: sums of two, of two of these, and so on. */
#if VL == 16
static const uint8_t turn_order[VL] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
#elif VL == 8
static const uint8_t turn_order[VL] = {0, 4, 1, 5, 2, 6, 3, 7};
#else
static const uint8_t turn_order[VL] = {0, 2, 1, 3};
#endif

/* One step of turn_square: rows s apart exchange halves of s lanes. s is a constant, so that the masks are. */
KNE_INLINE void
turn_step(vf *r, const int s)
{
    typedef int vi __attribute__((vector_size(4 * VL)));
    vi low = {0}, high = {0}; /* every lane is set below */

    UNROLL
    for (int x = 0; x < VL; x++)
    {
        low[x] = x & s ? VL + x - s : x;
        high[x] = x & s ? VL + x : x + s;
    }
    UNROLL
    for (int i = 0; i < VL; i++)
        if (!(i & s))
        {
            vf a = r[i], b = r[i + s];

            r[i] = (vf) __builtin_shuffle(a, b, low);
            r[i + s] = (vf) __builtin_shuffle(a, b, high);
        }
}

/* r[i][lane] <-> r[lane][i] */
KNE_INLINE void
turn_square(vf *r)
{
#if VL >= 16
    turn_step(r, 8);
#endif
#if VL >= 8
    turn_step(r, 4);
#endif
    turn_step(r, 2);
    turn_step(r, 1);
}

/*
 * T rows of x, side by side at each k: rows that lie a power of two apart would push each other out of the caches.
 * to[k, T], and what lies after it may be written over.
 */
KNE_INLINE void
pack_rows(const int T, float *to, const float *x, int64_t xs_row, int64_t xs_k, int64_t nk)
{
    int64_t k = 0;

#if VL == 8
    if (xs_k == 1)
        for (; k + VL <= nk; k += VL)
        {
            vf r[VL];

            UNROLL
            for (int t = 0; t < VL; t++)
                r[t] = t < T ? vf_load(x + t * xs_row + k) : vf_zero();
            turn_square(r);
            UNROLL
            for (int i = 0; i < VL; i++) /* a whole vector: what is too much is put right by the next k or rows */
                vf_store(to + (k + i) * T, r[i]);
        }
#endif
    for (; xs_row == 1 && k < nk; k++)
        memcpy(to + k * T, x + k * xs_k, (size_t) T * sizeof *to);
    for (; k < nk; k++)
        UNROLL
        for (int t = 0; t < T; t++)
            to[k * T + t] = x[t * xs_row + k * xs_k];
}

/* panel[at][j, TURN_W] = w[o, k0 + j VL + turn_order[at]]; 0 beyond nk and no outputs. */
KNE_INLINE void
turn_panel(float *panel, const kne_gemm *g, const kne_dtype type, int64_t o0, int64_t no, int64_t k0, int64_t nk)
{
    const int64_t size = type == KNE_F32 ? 4 : 2, nj = TURN_TERMS(nk);

    for (int64_t o = 0; o < TURN_W; o += VL)
        for (int64_t j = 0; j < nj; j++)
        {
            vf          r[VL];
            const char *w = g->w + ((o0 + o) * g->ldw + k0 + j * VL) * size;
            const int   left = (int) (nk - j * VL < VL ? nk - j * VL : VL); /* of the last terms less than 1 */

            if (left == VL && o + VL <= no)
                UNROLL
                for (int i = 0; i < VL; i++)
                    r[i] = vf_load_w(w + i * g->ldw * size, type);
            else
                UNROLL
                for (int i = 0; i < VL; i++)
                    r[i] = o + i < no && left > 0 ? vf_load_w_part(w + i * g->ldw * size, type, left) : vf_zero();
            turn_square(r);
            UNROLL
            for (int i = 0; i < VL; i++)
                vf_store(panel + (i * nj + j) * TURN_W + o, r[turn_order[i]]);
        }
}

/* packed[at][j, T] = x[t, j VL + turn_order[at]]; 0 beyond nk. */
KNE_INLINE void
turn_rows(const int T, float *packed, const float *x, int64_t xs_row, int64_t nk)
{
    const int64_t nj = TURN_TERMS(nk);

    for (int64_t j = 0; j < nj; j++)
    {
        vf  r[VL];
        int left = (int) (nk - j * VL < VL ? nk - j * VL : VL);

        if (left == VL)
            UNROLL
            for (int t = 0; t < VL; t++)
                r[t] = t < T ? vf_load(x + t * xs_row + j * VL) : vf_zero();
        else
            UNROLL
            for (int t = 0; t < VL; t++)
                r[t] = t < T && left > 0 ? vf_load_w_part((const char *) (x + t * xs_row + j * VL), KNE_F32, left) : vf_zero();
        turn_square(r);
        if ((nj - j) * T >= VL) /* a whole vector: what is too much is put right as this lane goes on */
            UNROLL
            for (int i = 0; i < VL; i++)
                vf_store(packed + (i * nj + j) * T, r[turn_order[i]]);
        else
            UNROLL
            for (int i = 0; i < VL; i++)
                memcpy(packed + (i * nj + j) * T, &r[turn_order[i]], (size_t) T * sizeof *packed);
    }
}

/* c[T, NN_V] += x[T] w[NN_V vectors]: one term of each sum of a tile. */
KNE_INLINE void
add_products(const int T, vf *c, const float *x, const char *w, const kne_dtype type)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;
    vf            wv[NN_V];

    UNROLL
    for (int i = 0; i < NN_V; i++)
        wv[i] = vf_load_w(w + i * VL * size, type);
    UNROLL
    for (int t = 0; t < T; t++)
    {
        vf xv = vf_set1(x[t]);

        UNROLL
        for (int i = 0; i < NN_V; i++)
            c[t * NN_V + i] = vf_fma(wv[i], xv, c[t * NN_V + i]);
    }
}

/*
 * T packed rows of x times a panel. aside: (VL, T, TURN_W) what earlier panels came to (first: none did); last: the lanes are
 * added up into y (T, TURN_W).
 */
KNE_INLINE void
turn_tile(const int T, float *y, const float *x, const float *panel, int64_t nk, float *aside, bool first, bool last)
{
    const int64_t nj = TURN_TERMS(nk);
    float         part[4][TURN_TILE] __attribute__((aligned(64)));

    UNROLL
    for (int at = 0; at < VL; at++)
    {
        float *mine = aside + at * T * TURN_W;
        vf     c[TURN_T * TURN_V];

        UNROLL
        for (int i = 0; i < T * TURN_V; i++)
            c[i] = first ? vf_zero() : vf_load(mine + i * VL);
        for (int64_t j = 0; j < nj; j += TURN_U)
            UNROLL
            for (int u = 0; u < TURN_U; u++, panel += TURN_W, x += T)
                add_products(T, c, x, (const char *) panel, KNE_F32);
        if (!last)
        {
            UNROLL
            for (int i = 0; i < T * TURN_V; i++)
                vf_store(mine + i * VL, c[i]);
            continue;
        }
        int level = 0;

        UNROLL
        for (; at >> level & 1; level++)
            UNROLL
            for (int i = 0; i < T * TURN_V; i++)
                c[i] = vf_add(vf_load(part[level] + i * VL), c[i]);
        float *to = at + 1 == VL ? y : part[level];

        UNROLL
        for (int i = 0; i < T * TURN_V; i++)
            vf_store(to + i * VL, c[i]);
    }
}

/* TILES(call) is call with the constant T that the T rows of a tile have. */
#define TILE_CASE(i, call) \
    case i:                \
    {                      \
        enum { T = i };    \
        call;              \
        break;             \
    }
#if NN_T > 4
#define TILE_CASES_ABOVE_4(call) TILE_CASE(5, call) TILE_CASE(6, call)
#else
#define TILE_CASES_ABOVE_4(call)
#endif
#define TILES(n, call)                                                                                                   \
    switch ((int) (n))                                                                                                   \
    {                                                                                                                    \
        TILE_CASE(1, call)                                                                                               \
        TILE_CASE(2, call)                                                                                               \
        TILE_CASE(3, call)                                                                                               \
        TILE_CASE(4, call)                                                                                               \
        TILE_CASES_ABOVE_4(call)                                                                                         \
    }

/* For any type of W, so compiled once. */
static __attribute__((noinline)) void
turn_rows_any(int64_t n, float *packed, const float *x, int64_t xs_row, int64_t nk)
{
    TILES(n, turn_rows(T, packed, x, xs_row, nk))
}

static __attribute__((noinline)) void
turn_tile_any(int64_t n, float *y, const float *x, const float *panel, int64_t nk, float *aside, bool first, bool last)
{
    TILES(n, turn_tile(T, y, x, panel, nk, aside, first, last))
}

static __attribute__((noinline)) void
pack_rows_any(int64_t n, float *to, const float *x, int64_t xs_row, int64_t xs_k, int64_t nk)
{
    TILES(n, pack_rows(T, to, x, xs_row, xs_k, nk))
}

KNE_INLINE void
nt_turned_type(const kne_gemm *g, const kne_dtype type, int64_t o0, int64_t o1, int64_t r0, int64_t r1, float *scratch)
{
    const int64_t n = r1 - r0, tiles = (n + TURN_T - 1) / TURN_T, k_padded = TURN_TERMS(g->k) * VL;
    float        *panel = scratch, *aside = panel + TURN_K * TURN_W, *packed = aside + TURN_ROWS * VL * TURN_W;

    for (int64_t t = 0; t < tiles; t++)
    {
        const int64_t r = n * t / tiles, rows = n * (t + 1) / tiles - r;

        for (int64_t k = 0; k < g->k; k += TURN_K)
        {
            const int64_t nk = g->k - k < TURN_K ? g->k - k : TURN_K;
            const float  *x = g->x + (r0 + r) * g->xs_row + k;
            float        *to = packed + r * k_padded + k * rows;

            turn_rows_any(rows, to, x, g->xs_row, nk);
        }
    }
    for (int64_t o = o0; o < o1; o += TURN_W)
        for (int64_t k = 0; k < g->k; k += TURN_K)
        {
            const int64_t nk = g->k - k < TURN_K ? g->k - k : TURN_K, no = o1 - o < TURN_W ? o1 - o : TURN_W;
            const bool    first = k == 0, last = k + nk == g->k;

            turn_panel(panel, g, type, o, no, k, nk);
            for (int64_t t = 0; t < tiles; t++)
            {
                const int64_t r = n * t / tiles, rows = n * (t + 1) / tiles - r;
                const float  *x = packed + r * k_padded + k * rows;
                float         sum[TURN_TILE] __attribute__((aligned(64)));
                float        *mine = first && last ? aside : aside + r * VL * TURN_W;

                turn_tile_any(rows, sum, x, panel, nk, mine, first, last);
                if (last && no == TURN_W) /* a constant: no loop over the vectors of a row */
                    for (int64_t i = 0; i < rows; i++)
                        finish_row(g, sum + i * TURN_W, o, TURN_W, r0 + r + i);
                else
                    for (int64_t i = 0; i < rows && last; i++)
                        finish_row(g, sum + i * TURN_W, o, no, r0 + r + i);
            }
        }
}

static void
nt_turned(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1, float *scratch)
{
    _Static_assert((TURN_K * TURN_W + TURN_ROWS * VL * TURN_W + TURN_PACKED) * sizeof(float) <= KNE_CPU_SCRATCH, "scratch");
    const int64_t fit = TURN_PACKED / (TURN_TERMS(g->k) * VL), most = g->k <= TURN_K || fit < TURN_ROWS ? fit : TURN_ROWS;
    const int64_t blocks = (r1 - r0 + most - 1) / most;

    for (int64_t b = 0; b < blocks; b++)
    {
        const int64_t r = r0 + (r1 - r0) * b / blocks, re = r0 + (r1 - r0) * (b + 1) / blocks;

        if (g->type == KNE_BF16)
            nt_turned_type(g, KNE_BF16, o0, o1, r, re, scratch);
        else if (g->type == KNE_F16)
            nt_turned_type(g, KNE_F16, o0, o1, r, re, scratch);
        else
            nt_turned_type(g, KNE_F32, o0, o1, r, re, scratch);
    }
}

static void
nt(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1, void *scratch)
{
    if (g->turn && g->k > 0 && g->k <= TURN_PACKED)
        nt_turned(g, o0, o1, r0, r1, scratch);
    else if (g->type == KNE_BF16)
        nt_block(g, KNE_BF16, o0, o1, r0, r1);
    else if (g->type == KNE_F16)
        nt_block(g, KNE_F16, o0, o1, r0, r1);
    else
        nt_block(g, KNE_F32, o0, o1, r0, r1);
}

/* ---- nn: y[r, o] = sum_k x[r, k] w[k, o] ---- */

#define NN_W      (NN_V * VL)        /* outputs of a tile */
#define NN_K      (VL == 16 ? 128 : 256) /* k of a block: changing it changes bits; with W (NN_K, NN_W) it stays in the first cache */
#define NN_ROWS   256                /* rows of a block, each of which widens W again */
#define NN_ACC    (128 * 1024)       /* floats of accumulators of a block */
#define NN_SUB    256                /* outputs whose part of W is widened at a time */
#define NN_PANEL  (NN_K * NN_W + 64) /* not a power of two: panels are written side by side */
/* Below so many rows W is read where it is: floats need no widening. */
#define NN_DIRECT(type) ((type) == KNE_F32 ? 25 : 7)

/*
 * c[T, NN_V] += x[T, nk] w[nk, NN_W], x packed. ahead (or NULL): the part of W that comes next, ahead_step bytes a row,
 * to be in the cache by then.
 */
KNE_INLINE void
nn_sum(const int T, vf *c, const float *x, const char *w, const kne_dtype type, int64_t ldw, int64_t nk, const char *ahead, int64_t ahead_step)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;

    UNROLL_K
    for (int64_t k = 0; k < nk; k++)
    {
        if (ahead)
            for (int i = 0; i < NN_W * 2; i += 64)
                __builtin_prefetch(ahead + k * ahead_step + i, 0, 2);
        add_products(T, c, x + k * T, w + k * ldw * size, type);
    }
}

/* acc[T, NN_W] += what nn_sum comes to; first: =. */
KNE_INLINE void
nn_tile(const int T, float *acc, int64_t ldacc, bool first, const float *x, const char *w, const kne_dtype type, int64_t ldw, int64_t nk, const char *ahead,
        int64_t ahead_step)
{
    vf c[NN_T * NN_V];

    UNROLL
    for (int i = 0; i < T * NN_V; i++)
        c[i] = vf_zero();
    if (ahead)
        nn_sum(T, c, x, w, type, ldw, nk, ahead, ahead_step);
    else
        nn_sum(T, c, x, w, type, ldw, nk, NULL, 0);
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int i = 0; i < NN_V; i++)
        {
            vf sum = c[t * NN_V + i];

            if (!first)
                sum = vf_add(vf_load(acc + t * ldacc + i * VL), sum);
            vf_store(acc + t * ldacc + i * VL, sum);
        }
}

/* x: packed, (n, nk) */
KNE_INLINE void
nn_rows(int64_t n, float *acc, int64_t ldacc, bool first, const float *x, const char *w, const kne_dtype type, int64_t ldw,
        int64_t nk, const char *ahead, int64_t ahead_step)
{
    int64_t tiles = (n + NN_T - 1) / NN_T;

    for (int64_t t = 0; t < tiles; t++)
    {
        int64_t r = n * t / tiles;

        TILES(n * (t + 1) / tiles - r, nn_tile(T, acc + r * ldacc, ldacc, first, x + r * nk, w, type, ldw, nk, ahead, ahead_step))
        ahead = NULL; /* once is enough */
    }
}

/*
 * panel[o / NN_W][nk, NN_W] = w[nk, nc] as float, missing columns 0. Row by row:
 * W streams in long pieces even where its rows are a power of two apart.
 */
KNE_INLINE void
nn_panels(float *panel, const char *w, const kne_dtype type, int64_t ldw, int64_t nk, int64_t nc)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;

    for (int64_t k = 0; k < nk; k++, w += ldw * size, panel += NN_W)
    {
        float  *to = panel;
        int64_t o = 0;

        for (; o + NN_W <= nc; o += NN_W, to += NN_PANEL)
            UNROLL
            for (int i = 0; i < NN_V; i++)
                vf_store(to + i * VL, vf_load_w(w + (o + i * VL) * size, type));
        if (o < nc)
            for (int i = 0; i < NN_V; i++, o += VL)
            {
                int64_t left = nc - o;

                if (left >= VL)
                    vf_store(to + i * VL, vf_load_w(w + o * size, type));
                else
                    vf_store(to + i * VL,
                             left > 0 ? vf_load_w_part(w + o * size, type, (int) left) : vf_zero());
            }
    }
}

KNE_INLINE void
nn_block(const kne_gemm *g, const kne_dtype type, int64_t o0, int64_t o1, int64_t r0, int64_t r1,
         float *scratch)
{
    const int64_t size = type == KNE_F32 ? 4 : 2;
    int64_t       n = r1 - r0, ldacc = (o1 - o0 + NN_W - 1) / NN_W * NN_W, step = g->ldw * size;
    float        *acc = scratch;           /* (n, ldacc) */
    float        *panel = scratch + NN_ACC; /* (NN_SUB / NN_W, NN_PANEL) */
    float        *packed = panel + NN_SUB / NN_W * NN_PANEL; /* (n, NN_K) */
    const int64_t tiles = (n + NN_T - 1) / NN_T;

    if (g->k == 0)
        memset(acc, 0, (size_t) (n * ldacc) * sizeof(float));
    for (int64_t k = 0; k < g->k; k += NN_K)
    {
        int64_t      nk = g->k - k < NN_K ? g->k - k : NN_K;
        const char  *w = g->w + (k * g->ldw + o0) * size, *below = w + NN_K * step;
        int64_t      nc = o1 - o0, o = 0;

        for (int64_t t = 0; t < tiles; t++)
        {
            const int64_t r = n * t / tiles;
            const float  *x = g->x + (r0 + r) * g->xs_row + k * g->xs_k;

            pack_rows_any(n * (t + 1) / tiles - r, packed + r * nk, x, g->xs_row, g->xs_k, nk);
        }
        if (k + 2 * NN_K > g->k) /* the last whole block: nothing comes after it */
            below = NULL;
        if (n < NN_DIRECT(type))
            for (; o + NN_W <= nc; o += NN_W)
                nn_rows(n, acc + o, ldacc, k == 0, packed, w + o * size, type, g->ldw, nk, o + 2 * NN_W <= nc ? w + (o + NN_W) * size : below, step);
        for (; o < nc; o += NN_SUB)
        {
            int64_t sub = nc - o < NN_SUB ? nc - o : NN_SUB;

            nn_panels(panel, w + o * size, type, g->ldw, nk, sub);
            for (int64_t i = 0; i < sub; i += NN_W)
            {
                const char *ahead = o + i + NN_SUB + NN_W <= nc ? w + (o + i + NN_SUB) * size
                                    : below && i + NN_W <= nc   ? below + i * size
                                                                : NULL;

                nn_rows(n, acc + o + i, ldacc, k == 0, packed, (const char *) (panel + i / NN_W * NN_PANEL), KNE_F32, NN_W, nk, ahead, step);
            }
        }
    }
    for (int64_t r = 0; r < n; r++)
        finish_row(g, acc + r * ldacc, o0, o1 - o0, r0 + r);
}

static void
nn(const kne_gemm *g, int64_t o0, int64_t o1, int64_t r0, int64_t r1, void *scratch)
{
    /* blocks of equal size */
    int64_t n = r1 - r0, blocks = (n + NN_ROWS - 1) / NN_ROWS, cols = NN_ACC / ((n + blocks - 1) / blocks) / NN_W * NN_W;

    _Static_assert((NN_ACC + NN_SUB / NN_W * NN_PANEL + NN_ROWS * NN_K + VL) * sizeof(float) <= KNE_CPU_SCRATCH, "scratch");
    for (int64_t o = o0; o < o1; o += cols)
        for (int64_t b = 0; b < blocks; b++)
        {
            int64_t oe = o + cols < o1 ? o + cols : o1, r = r0 + n * b / blocks, re = r0 + n * (b + 1) / blocks;

            if (g->type == KNE_BF16)
                nn_block(g, KNE_BF16, o, oe, r, re, scratch);
            else if (g->type == KNE_F16)
                nn_block(g, KNE_F16, o, oe, r, re, scratch);
            else
                nn_block(g, KNE_F32, o, oe, r, re, scratch);
        }
}

const kne_gemm_kernels KNE_GEMM_TABLE = {.nt = nt, .nn = nn};
