/*
 * kne_pack.c - see kne_pack.h.
 */
#include "kne_pack.h"

#include <string.h>

void
kne_pack_layout(kne_pack *p, kne_arena *arena, int32_t max_n, int32_t max_seq, int32_t max_out)
{
    p->id = kne_arena_take(arena, (size_t) max_n, sizeof *p->id);
    p->pos = kne_arena_take(arena, (size_t) max_n, sizeof *p->pos);
    p->seq = kne_arena_take(arena, (size_t) max_seq, sizeof *p->seq);
    p->out_row = kne_arena_take(arena, (size_t) max_out, sizeof *p->out_row);
    p->target = kne_arena_take(arena, (size_t) max_out, sizeof *p->target);
    p->max_n = max_n;
    p->max_seq = max_seq;
    p->max_out = max_out;
    kne_pack_clear(p);
}

void
kne_pack_clear(kne_pack *p)
{
    p->b = (kne_batch) {.id = p->id, .pos = p->pos, .seq = p->seq, .out_row = p->out_row};
}

bool
kne_pack_fits(const kne_pack *p, int32_t n, int32_t n_prompt)
{
    return p->b.n + n - 1 <= p->max_n && p->b.n_seq < p->max_seq && p->b.n_out + n - n_prompt <= p->max_out;
}

int32_t
kne_pack_add(kne_pack *p, const int32_t *id, int32_t n, int32_t n_prompt)
{
    kne_batch *b = &p->b;
    int32_t    row = b->n, out = b->n_out;

    memcpy(p->id + row, id, (size_t) (n - 1) * sizeof *id);
    for (int32_t i = 0; i < n - 1; i++)
        p->pos[row + i] = i;
    p->seq[b->n_seq++] = (kne_seq) {row, n - 1, row, n - 1};
    for (int32_t i = n_prompt; i < n; i++)
    {
        p->target[b->n_out] = id[i];
        p->out_row[b->n_out++] = row + i - 1;
    }
    b->n += n - 1;
    return out;
}
