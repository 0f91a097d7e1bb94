/*
 * test_ops_elem.h - sums, gathers, embeddings, and the gradient checks of the
 * ops in double (part of test_ops.c).
 */
static void
test_gathers(void)
{
    enum { N = 300, D = 90, COLS = 7 };
    static const int32_t col[COLS] = {0, 3, 4, 17, 60, 88, 89};
    float  *x = random_floats(N * D), *y[2], *z[2], *sum[2];
    bool    same = true;
    kne_backend *be[2] = {be1, be2};

    for (int t = 0; t < 2; t++)
    {
        y[t] = floats(N * COLS, NAN);
        z[t] = floats(N * D, 1);
        sum[t] = floats(N * D, 1);
        be[t]->gather_cols(be[t]->ctx, y[t], x, D, col, N, COLS);
        be[t]->scatter_cols(be[t]->ctx, z[t], D, y[t], col, N, COLS, false);
        be[t]->scatter_cols(be[t]->ctx, sum[t], D, y[t], col, N, COLS, true);
    }
    for (int r = 0; r < N; r++)
        for (int i = 0; i < D; i++)
        {
            bool hit = false;

            for (int c = 0; c < COLS; c++)
                if (col[c] == i)
                {
                    hit = true;
                    same &= y[0][r * COLS + c] == x[r * D + i];
                }
            same &= z[0][r * D + i] == (hit ? x[r * D + i] : 1);
            same &= sum[0][r * D + i] == (hit ? 1 + x[r * D + i] : 1);
        }
    check(same, "%s: gather_cols and scatter_cols", isa);
    check(same_bits(y[0], y[1], N * COLS) && same_bits(z[0], z[1], N * D) &&
              same_bits(sum[0], sum[1], N * D),
          "%s: gather_cols and scatter_cols: threads", isa);
    for (int t = 0; t < 2; t++)
    {
        free(y[t]);
        free(z[t]);
        free(sum[t]);
    }
    free(x);
}

static void
test_add_and_score(void)
{
    enum { N = 333, F = 517 };
    float  *a = random_floats(N * F), *u = random_floats(N * F), *coef = random_floats(N);
    float  *s1 = floats(F, 1), *s3 = floats(F, 1), *y1 = random_floats(N * F);
    float  *y3 = floats(N * F, 0);
    double *want = need(F * sizeof(double));
    bool    same = true;

    memcpy(y3, y1, N * F * sizeof(float));
    for (int f = 0; f < F; f++)
    {
        want[f] = 1;
        for (int r = 0; r < N; r++)
            want[f] += (double) coef[r] * a[r * F + f] * u[r * F + f];
    }
    be1->score(be1->ctx, s1, a, u, coef, N, F);
    be3->score(be3->ctx, s3, a, u, coef, N, F);
    check(nmse(s1, want, F) <= 1e-12 && same_bits(s1, s3, F), "%s: score adds up rows", isa);
    be1->add(be1->ctx, y1, a, N * F);
    be3->add(be3->ctx, y3, a, N * F);
    for (int i = 0; i < N * F; i++)
        same &= y1[i] == y3[i];
    check(same, "%s: add", isa);
    free(a);
    free(u);
    free(coef);
    free(s1);
    free(s3);
    free(y1);
    free(y3);
    free(want);
}

static void
test_embed_and_neurons(kne_dtype type)
{
    enum { V = 50, D = 35, CTX = 20, N = 400 };
    linear_case   ct = {.in = D, .out = V, .type = type, .pad = 2}, cp = {.in = D, .out = CTX, .type = type};
    char         *raw_t, *raw_p;
    kne_mat       tok = make_mat(&ct, &raw_t), pos_table = make_mat(&cp, &raw_p), none = {0};
    int32_t       id[N], pos[N];
    float        *x = floats(N * D, NAN), *z = floats(N * D, NAN), *rows = floats(3 * D, NAN);
    float        *cols = floats(3 * V, NAN);
    bool          same = true;
    const int32_t rix[3] = {0, 7, V - 1}, cix[3] = {0, 9, D - 1};

    for (int i = 0; i < N; i++)
    {
        id[i] = (int32_t) (kne_random_next(&seed) % V);
        pos[i] = (int32_t) (kne_random_next(&seed) % CTX);
    }
    be2->embed(be2->ctx, x, &tok, &pos_table, id, pos, N);
    be1->embed(be1->ctx, z, &tok, &none, id, pos, N);
    for (int r = 0; r < N; r++)
        for (int i = 0; i < D; i++)
        {
            float t = kne_load(tok.data, type, (size_t) (id[r] * tok.ld + i));

            same &= z[r * D + i] == t;
            same &= x[r * D + i] == t + kne_load(pos_table.data, type, (size_t) (pos[r] * D + i));
        }
    be1->embed(be1->ctx, z, &tok, NULL, id, pos, 1);
    check(same, "%s: embed from %s", isa, kne_dtype_name(type));
    be1->gather_neurons(be1->ctx, rows, &tok, false, rix, 3);
    be1->gather_neurons(be1->ctx, cols, &tok, true, cix, 3);
    same = true;
    for (int j = 0; j < 3; j++)
    {
        for (int i = 0; i < D; i++)
            same &= rows[j * D + i] == kne_load(tok.data, type, (size_t) (rix[j] * tok.ld + i));
        for (int i = 0; i < V; i++)
            same &= cols[j * V + i] == kne_load(tok.data, type, (size_t) (i * tok.ld + cix[j]));
    }
    check(same, "%s: gather_neurons from %s", isa, kne_dtype_name(type));
    free(x);
    free(z);
    free(rows);
    free(cols);
    free(raw_t);
    free(raw_p);
}

static void
test_element_ops(void)
{
    test_gathers();
    test_add_and_score();
    test_embed_and_neurons(KNE_F32);
    test_embed_and_neurons(KNE_F16);
    test_embed_and_neurons(KNE_BF16);
}

/* ---- gradients in double ---- */

enum { GN = 3, GD = 13 };
static double gx[GN * GD], gu[GN * GD], gw[GD], gb[GD], gdy[GN * GD], gy[GN * GD], gm[GN], gs[GN];
static double ga[GN * GD], gbk[GN * GD];
static kne_act_kind gkind;
static int32_t gtarget[GN] = {3, 0, GD - 1};

static double
weighted(const double *y, int64_t n)
{
    double sum = 0;

    for (int64_t i = 0; i < n; i++)
        sum += y[i] * gdy[i];
    return sum;
}

static double
loss_rmsnorm(void *arg)
{
    rmsnorm(&dctx, gy, gs, gx, gw, EPS, GN, GD);
    return weighted(gy, GN * GD);
}

static double
loss_layernorm(void *arg)
{
    layernorm(&dctx, gy, gm, gs, gx, gw, gb, EPS, GN, GD);
    return weighted(gy, GN * GD);
}

static double
loss_act(void *arg)
{
    act(&dctx, gy, arg, gu, gkind, GN, GD);
    return weighted(gy, GN * GD);
}

static double
loss_logprob(void *arg)
{
    double logp[GN];

    logprob(&dctx, logp, NULL, NULL, gx, gtarget, NULL, GN, GD);
    return weighted(logp, GN);
}

static double
loss_kl(void *arg)
{
    double k[GN];

    kl(&dctx, k, NULL, gx, gu, NULL, GN, GD);
    return weighted(k, GN);
}

/* Query lengths over one tile, two key tiles, three query heads a key head. */
enum { AH = 3, AKV = 1, AHD = 5, AN = 75 };
static double aq[AN * AH * AHD], ak[AN * AKV * AHD], av[AN * AKV * AHD], ago[AN * AH * AHD];
static double ao[AN * AH * AHD], alse[AN * AH], adq[AN * AH * AHD], adk[AN * AKV * AHD], adv[AN * AKV * AHD];

static double
loss_attention(void *arg)
{
    double sum = 0;

    attention(&dctx, ao, alse, aq, ak, av, arg);
    for (int i = 0; i < AN * AH * AHD; i++)
        sum += ao[i] * ago[i];
    return sum;
}

static void
randomise(double *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = 2 * uniform();
}

static void
check_gradient(const char *what, double *param, int64_t n, const double *grad, double (*loss)(void *),
               void *arg)
{
    double e = gradient_error(param, n, grad, loss, arg);

    check(e < 1e-8, "gradient of %s (error %.1e)", what, e);
}

static void
test_gradients(void)
{
    static const char *const kind_names[] = {"silu", "gelu", "gelu_tanh"};
    kne_seq        seq[2] = {{0, 70, 0, 70}, {70, 5, 70, 5}};
    kne_attn_shape sh = {AH, AKV, AHD, 2, seq, 0.45f, 75, 70};
    char           what[60];

    randomise(gx, GN * GD);
    randomise(gu, GN * GD);
    randomise(gw, GD);
    randomise(gb, GD);
    randomise(gdy, GN * GD);
    memset(ga, 0, sizeof(ga));
    loss_rmsnorm(NULL);
    rmsnorm_bwd(&dctx, ga, gdy, gx, gs, gw, GN, GD);
    check_gradient("rmsnorm", gx, GN * GD, ga, loss_rmsnorm, NULL);
    memset(ga, 0, sizeof(ga));
    loss_layernorm(NULL);
    layernorm_bwd(&dctx, ga, gdy, gx, gm, gs, gw, GN, GD);
    check_gradient("layernorm", gx, GN * GD, ga, loss_layernorm, NULL);
    for (int k = 0; k < 3; k++)
    {
        gkind = k == 0 ? KNE_ACT_SILU : k == 1 ? KNE_ACT_GELU_ERF : KNE_ACT_GELU_TANH;
        act_bwd(&dctx, ga, gbk, gdy, gx, gu, gkind, GN, GD);
        snprintf(what, sizeof(what), "gated %s to the gate", kind_names[k]);
        check_gradient(what, gx, GN * GD, ga, loss_act, gx);
        snprintf(what, sizeof(what), "gated %s to the other", kind_names[k]);
        check_gradient(what, gu, GN * GD, gbk, loss_act, gx);
        act_bwd(&dctx, NULL, gbk, gdy, NULL, gu, gkind, GN, GD);
        check_gradient(kind_names[k], gu, GN * GD, gbk, loss_act, NULL);
    }
    logprob(&dctx, NULL, NULL, ga, gx, gtarget, gdy, GN, GD);
    check_gradient("logprob", gx, GN * GD, ga, loss_logprob, NULL);
    /* the gradient holds where the reference is a distribution */
    log_softmax(&dctx, gu, gu, GN, GD);
    kl(&dctx, gm, ga, gx, gu, gdy, GN, GD);
    check_gradient("kl", gx, GN * GD, ga, loss_kl, NULL);
    randomise(aq, AN * AH * AHD);
    randomise(ak, AN * AKV * AHD);
    randomise(av, AN * AKV * AHD);
    randomise(ago, AN * AH * AHD);
    loss_attention(&sh);
    attention_bwd(&dctx, adq, adk, adv, ago, ao, alse, aq, ak, av, &sh);
    check_gradient("attention to q", aq, AN * AH * AHD, adq, loss_attention, &sh);
    check_gradient("attention to k", ak, AN * AKV * AHD, adk, loss_attention, &sh);
    check_gradient("attention to v", av, AN * AKV * AHD, adv, loss_attention, &sh);
}
