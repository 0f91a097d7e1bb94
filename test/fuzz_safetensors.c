/*
 * fuzz_safetensors.c - libFuzzer target: any bytes as a safetensors file.
 * Besides not crashing, what is accepted must hold what kne_safetensors.h
 * promises: tensors inside the file, end to end, names in order and unique.
 *
 *   clang -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Isrc \
 *     test/fuzz_safetensors.c src/kne_safetensors.c src/kne_base.c -lcjson -lcrypto -lm -o build/fuzz_st
 *   build/fuzz_st -dict=test/corpus/safetensors.dict new/ test/corpus/safetensors
 */
#include <string.h>

#include "kne_safetensors.h"

#define MUST(condition) \
    if (!(condition))   \
    __builtin_trap()

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kne_tensors     *t = NULL;
    kne_err          err = {0};
    int64_t          bytes = 0;
    volatile uint8_t sum = 0;

    if (kne_tensors_parse(data, size, &t, &err) != KNE_OK)
    {
        MUST(!t && err.code != KNE_OK && err.msg[0]);
        for (const char *p = err.msg; *p; p++) /* messages go to logs and clients */
            MUST(*p >= 0x20 && *p < 0x7f);
        return 0;
    }
    for (int64_t i = 0; i < t->n; i++)
    {
        const kne_tensor *k = &t->tensor[i];
        const uint8_t    *p = k->data;
        int64_t           n = 1;

        MUST(p >= data && k->bytes <= size && p + k->bytes <= data + size);
        if (k->bytes)
            sum = (uint8_t) (sum + p[0] + p[k->bytes - 1]);
        for (int32_t r = 0; r < k->rank; r++)
            n *= k->shape[r];
        MUST(n == k->n_elem && k->rank <= KNE_TENSOR_MAX_RANK);
        MUST(!k->usable || k->bytes == (size_t) n * kne_dtype_size(k->type));
        MUST(!i || strcmp(t->tensor[i - 1].name, k->name) < 0);
        MUST(kne_tensors_find(t, k->name) == k);
        bytes += (int64_t) k->bytes;
    }
    MUST(bytes == t->bytes && (size_t) bytes < size && sum <= 255);
    MUST(kne_tensors_unchanged(t, &err));
    kne_tensors_close(t);
    return 0;
}
