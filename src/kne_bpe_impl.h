/*
 * kne_bpe_impl.h - the hash functions that kne_bpe.c (which fills the tables)
 * and kne_bpe_merge.c (which reads them) have to agree on.
 */
#ifndef KNE_BPE_IMPL_H
#define KNE_BPE_IMPL_H

#include "kne_tokenizer_impl.h"

#define KNE_JOIN_BITS (1u << 18)

/* Where the search for a pair begins: the top bits of a product hold all of it. */
static inline uint32_t
kne_merge_hash(const kne_bpe *bpe, uint32_t left, uint32_t right)
{
    uint64_t key = (uint64_t) left << 32 | right;

    key = (key ^ key >> 29) * 0x9E3779B97F4A7C15ull;
    return (uint32_t) (key >> (64 - bpe->merge_bits));
}

static inline uint16_t
kne_char_hash(uint32_t cp)
{
    return (uint16_t) (cp * 0x9E3779B1u >> 16);
}

/*
 * The bit that says whether any merge joins something that ends like left with
 * something that begins like right. Where it is not set, no merge can ever
 * reach over, and a long text may be cut there. It may be set without need.
 */
static inline uint32_t
kne_join_bit(const kne_bpe *bpe, int32_t left, int32_t right)
{
    uint32_t h = (uint32_t) bpe->last_char[left] << 16 | bpe->first_char[right];

    return (h * 0x85EBCA6Bu ^ h >> 15) % KNE_JOIN_BITS;
}

#endif
