/*
 * graph.cu - a sequence of ops recorded as a CUDA graph the second time it is asked for, and launched as one from then on: a step of
 * an edit is some two thousand launches otherwise.
 *
 * Invariant: a graph holds addresses, so none outlives the release of any memory (kne_cu_drop_graphs). While recording nothing is
 * a failure: whatever goes wrong ends the recording, and the ops are asked for once more, plainly, where it would show again.
 */
#include "kne_cuda.h"

#include <stdlib.h>
#include <string.h>

#define GRAPHS 64

typedef struct slot
{
    uint64_t        key; /* 0: free */
    uint64_t        used;
    bool            plain; /* it could not be recorded */
    cudaGraphExec_t exec;  /* NULL: seen once */
} slot;

struct kne_graphs
{
    slot     slots[GRAPHS];
    slot    *at; /* of the sequence between begin and end; NULL: none */
    uint64_t clock;
};

kne_graphs *
kne_graphs_new(void)
{
    return (kne_graphs *) calloc(1, sizeof(kne_graphs));
}

void
kne_cu_drop_graphs(kne_cu *cu)
{
    for (slot *s = cu->graphs->slots; s < cu->graphs->slots + GRAPHS; s++)
        if (s->exec)
            cudaGraphExecDestroy(s->exec); /* one that runs is freed when it is through */
    memset(cu->graphs->slots, 0, sizeof cu->graphs->slots);
    cu->graphs->at = NULL;
}

/* The key's slot, or the one longest unused, made free. */
static slot *
slot_of(kne_graphs *g, uint64_t key)
{
    slot *oldest = g->slots;

    for (slot *s = g->slots; s < g->slots + GRAPHS; s++)
    {
        if (s->key == key)
            return s;
        if (s->used < oldest->used)
            oldest = s;
    }
    if (oldest->exec)
        cudaGraphExecDestroy(oldest->exec);
    memset(oldest, 0, sizeof *oldest);
    return oldest;
}

static bool
begin(void *ctx, uint64_t key)
{
    kne_cu     *cu = (kne_cu *) ctx;
    kne_graphs *g = cu->graphs;
    slot       *s = slot_of(g, key);
    bool        seen = s->key == key;

    cu->last.x = NULL;
    g->at = NULL;
    if (!kne_cu_ready(cu))
        return false;
    s->key = key;
    s->used = ++g->clock;
    if (s->exec)
    {
        kne_cu_check(cu, cudaGraphLaunch(s->exec, cu->stream), "cudaGraphLaunch");
        return true;
    }
    if (!seen || s->plain)
        return false;
    if (cudaStreamBeginCapture(cu->stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess)
    {
        cudaGetLastError();
        s->plain = true;
        return false;
    }
    g->at = s;
    cu->recording = true;
    cu->broken = false;
    return false;
}

static bool
end(void *ctx)
{
    kne_cu     *cu = (kne_cu *) ctx;
    slot       *s = cu->graphs->at;
    cudaGraph_t graph = NULL;

    cu->last.x = NULL;
    if (!cu->recording)
        return true;
    cu->recording = false;
    cu->graphs->at = NULL;
    if (cudaStreamEndCapture(cu->stream, &graph) != cudaSuccess || cu->broken ||
        cudaGraphInstantiate(&s->exec, graph, 0) != cudaSuccess)
    {
        s->exec = NULL;
        s->plain = true;
    }
    cudaGetLastError();
    if (graph)
        cudaGraphDestroy(graph);
    if (s->plain)
        return false;
    kne_cu_check(cu, cudaGraphLaunch(s->exec, cu->stream), "cudaGraphLaunch");
    return true;
}

void
kne_cu_fill_graph(kne_backend *be)
{
    be->begin = begin;
    be->end = end;
}
