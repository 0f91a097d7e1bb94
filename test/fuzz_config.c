/*
 * fuzz_config.c - libFuzzer target: any bytes as config.json. What is accepted
 * must be a descriptor that the engine can size buffers by and divide by.
 *
 *   clang -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Isrc \
 *     test/fuzz_config.c src/kne_arch.c src/kne_safetensors.c src/kne_base.c -lcjson -lcrypto -lm \
 *     -o build/fuzz_config
 *   build/fuzz_config -dict=test/corpus/config.dict new/ test/corpus/config
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kne_arch.h"

#define MUST(condition) \
    if (!(condition))   \
    __builtin_trap()

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char           *text = malloc(size ? size : 1); /* no NUL after the end */
    kne_arch        a;
    kne_tensor_list list;
    kne_err         err = {0};
    float           c[64], s[64];

    memcpy(text, data, size);
    if (kne_arch_parse(text, size, &a, &list, &err) != KNE_OK)
    {
        MUST(err.code != KNE_OK && err.msg[0]);
        for (const char *p = err.msg; *p; p++) /* messages go to logs and clients */
            MUST(*p >= 0x20 && *p < 0x7f);
        free(text);
        return 0;
    }
    free(text);
    MUST(a.n_layers > 0 && a.d_model > 0 && a.d_ff > 0 && a.vocab_size > 0 && a.n_ctx > 0);
    MUST(a.n_heads > 0 && a.n_kv_heads > 0 && a.n_heads % a.n_kv_heads == 0 && a.head_dim > 0);
    MUST(a.norm_eps > 0 && a.norm_eps < 1);
    MUST(a.bos_id >= -1 && a.bos_id < a.vocab_size && a.eos_id >= -1 && a.eos_id < a.vocab_size);
    for (int slot = 0; slot < KNE_SLOT_COUNT; slot++)
    {
        int64_t rows, cols;
        int32_t rank;

        kne_arch_shape(&a, &list, (kne_slot) slot, &rows, &cols, &rank);
        MUST((rank == 1 && cols == 1) || rank == 2);
        MUST(!list.name[slot] || (rows > 0 && cols > 0 && rows * cols < (int64_t) 1 << 40));
        MUST(!list.name[slot] || strlen(list.prefix) + strlen(list.name[slot]) < 100);
    }
    if (a.position == KNE_POS_LEARNED)
        return 0;
    MUST(a.rotary_dim >= 2 && a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim);
    MUST(a.n_ctx <= KNE_ROPE_MAX_CTX && a.rope_theta > 0 && a.rope_factor > 0);
    if (a.rotary_dim <= 64)
    {
        a.n_ctx = a.n_ctx < 2 ? a.n_ctx : 2;
        kne_arch_rope(&a, c, s);
        for (int i = 0; i < a.n_ctx * a.rotary_dim / 2; i++)
            MUST(isfinite(c[i]) && isfinite(s[i]));
    }
    return 0;
}
