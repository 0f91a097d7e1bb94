/*
 * kne_server.h - the engine as a server on a Unix socket: see kne_server.c.
 */
#ifndef KNE_SERVER_H
#define KNE_SERVER_H

#include "kne_backend.h"
#include "kne_protocol.h"

typedef struct kne_server_config
{
    int          listen_fd;   /* bound and listening; the server's to close */
    uint8_t      secret[KNE_SECRET_LEN];
    kne_backend *backend;     /* used by the compute thread alone; must outlive the server */
    const char  *device_note; /* why not the GPU; "" */
    size_t       cache_bytes; /* of deltas and views */
    void       (*log)(const char *line); /* one line, no newline; may be called from both threads */
} kne_server_config;

typedef struct kne_server kne_server;

/* Starts the compute thread. */
kne_status kne_server_new(const kne_server_config *config, kne_server **out, kne_err *err);
/* Serve until kne_server_stop. A status other than KNE_OK: the server cannot go on. */
kne_status kne_server_run(kne_server *s, kne_err *err);
/* Safe in a signal handler. */
void       kne_server_stop(kne_server *s);
/*
 * False: the compute thread is in a long pass and was not waited for. Nothing
 * was freed then, and the process must end without running destructors (_exit).
 */
bool       kne_server_free(kne_server *s);

#endif
