/*
 * kne_device.h - memory of the device that computes: arenas of it, and a model's weights in it.
 *
 * Invariant: what an op is given lives in the backend's memory, and host code touches that
 * through put, get and zero alone. Where the backend is the CPU they are the same memory.
 * be NULL everywhere here: the host.
 */
#ifndef KNE_DEVICE_H
#define KNE_DEVICE_H

#include "kne_backend.h"

/* As kne_arena_commit and kne_arena_free, in the device's memory. KNE_ERR_NOMEM says how much is free. */
kne_status kne_device_commit(kne_arena *arena, kne_backend *be, kne_err *err);
void       kne_device_free(kne_arena *arena, kne_backend *be);

static inline void
kne_device_put(kne_backend *be, void *to, const void *from_host, size_t bytes)
{
    if (bytes == 0)
        return;
    if (be)
        be->put(be->ctx, to, from_host, bytes);
    else
        __builtin_memcpy(to, from_host, bytes);
}

/*
 * The backend of a setting "auto", "cpu", "cuda" or "cuda:N"; its close ends it. auto takes the first GPU where
 * kne_cuda.so lies beside the program and a driver is there, else the CPU, and note says why; cuda never falls back.
 * threads: of the CPU. KNE_ERR_INVALID: no such setting; KNE_ERR_DEVICE and others: the device cannot be had.
 */
kne_status kne_device_open(const char *setting, int threads, kne_backend **out, char *note, size_t note_size,
                           kne_err *err);

/* A few products, a norm and a loss on the device, against the CPU's: KNE_ERR_DEVICE where they differ by more than rounding. */
kne_status kne_device_self_test(kne_backend *be, kne_backend *cpu, kne_err *err);

/*
 * Move the weights of an open model into the device's memory, in their own format, and point the model there; on
 * the CPU nothing moves. KNE_ERR_NOMEM, with the need and what is free, before anything is copied.
 * The device must outlive the model; kne_model_close gives the memory back.
 */
kne_status kne_model_bind(kne_model *m, kne_backend *be, kne_err *err);
/* Bytes that kne_model_bind takes. */
size_t     kne_model_device_bytes(const kne_model *m);

#endif
