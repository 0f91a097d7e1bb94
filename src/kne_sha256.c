/*
 * kne_sha256.c - SHA-256, which is libcrypto's; apart from kne_base.c so that a program without it can have the rest.
 */
#include "kne_base.h"

#include <openssl/evp.h>

/* kne_sha256 is libcrypto's EVP_MD_CTX under another name. */
kne_sha256 *
kne_sha256_new(void)
{
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();

    if (ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) != 1)
    {
        EVP_MD_CTX_free(ctx);
        ctx = NULL;
    }
    return (kne_sha256 *) ctx;
}

void
kne_sha256_add(kne_sha256 *h, const void *data, size_t len)
{
    EVP_DigestUpdate((EVP_MD_CTX *) h, data, len);
}

void
kne_sha256_end(kne_sha256 *h, uint8_t out[KNE_DIGEST_LEN])
{
    EVP_DigestFinal_ex((EVP_MD_CTX *) h, out, NULL);
    EVP_MD_CTX_free((EVP_MD_CTX *) h);
}
