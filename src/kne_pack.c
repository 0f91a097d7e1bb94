/*
 * kne_pack.c - see kne_pack.h.
 */
#include "kne_pack.h"

#include <string.h>

void
kne_pack_layout_shared(kne_pack *p, kne_arena *arena, int32_t max_n, int32_t max_seq, int32_t max_out,
                       int32_t max_place)
{
    p->id = kne_arena_take(arena, (size_t) max_n, sizeof *p->id);
    p->pos = kne_arena_take(arena, (size_t) max_n, sizeof *p->pos);
    p->seq = kne_arena_take(arena, (size_t) max_seq, sizeof *p->seq);
    p->out_row = kne_arena_take(arena, (size_t) max_out, sizeof *p->out_row);
    p->target = kne_arena_take(arena, (size_t) max_out, sizeof *p->target);
    if (max_place)
    {
        p->lead = kne_arena_take(arena, (size_t) max_seq, sizeof *p->lead);
        p->row = kne_arena_take(arena, (size_t) max_place, sizeof *p->row);
        p->from = kne_arena_take(arena, (size_t) max_n + 1, sizeof *p->from);
        p->place = kne_arena_take(arena, (size_t) max_place, sizeof *p->place);
        p->first = kne_arena_take(arena, (size_t) max_n, sizeof *p->first);
    }
    p->max_n = max_n;
    p->max_seq = max_seq;
    p->max_out = max_out;
    p->max_place = max_place;
    kne_pack_clear(p);
}

void
kne_pack_layout(kne_pack *p, kne_arena *arena, int32_t max_n, int32_t max_seq, int32_t max_out)
{
    kne_pack_layout_shared(p, arena, max_n, max_seq, max_out, 0);
}

void
kne_pack_clear(kne_pack *p)
{
    p->b = (kne_batch) {.id = p->id, .pos = p->pos, .seq = p->seq, .out_row = p->out_row,
                        .row = p->row, .from = p->from, .place = p->place, .first = p->first};
    p->group = p->n_place = 0;
}

void
kne_pack_group(kne_pack *p)
{
    p->group = p->b.n_seq;
}

bool
kne_pack_room(const kne_pack *p, int32_t rows, int32_t seqs, int32_t outs)
{
    return p->b.n + rows <= p->max_n && p->b.n_seq + seqs <= p->max_seq && p->b.n_out + outs <= p->max_out &&
           (!p->max_place || p->n_place + rows <= p->max_place);
}

bool
kne_pack_fits(const kne_pack *p, int32_t n, int32_t n_prompt)
{
    return kne_pack_room(p, n - 1, 1, n - n_prompt);
}

/* How many rows the sequence has in common with one of its group, and which: the longest, of these the first. */
static int32_t
common(const kne_pack *p, const int32_t *id, int32_t lead, int32_t *with)
{
    int32_t most = 0;

    for (int32_t s = p->group; s < p->b.n_seq; s++)
    {
        const int32_t *row = p->row + p->seq[s].q0;
        int32_t        k = 0, end = lead < p->lead[s] ? lead : p->lead[s];

        while (k < end && p->id[row[k]] == id[k])
            k++;
        if (k > most)
        {
            most = k;
            *with = s;
        }
    }
    return most;
}

int32_t
kne_pack_add(kne_pack *p, const int32_t *id, int32_t n, int32_t n_prompt)
{
    kne_batch *b = &p->b;
    int32_t    row = b->n, out = b->n_out, q0 = row, with = 0, shared = 0;

    if (p->max_place)
    {
        shared = common(p, id, n_prompt - 1, &with);
        q0 = p->n_place;
        for (int32_t i = 0; i < n - 1; i++)
            p->row[q0 + i] = i < shared ? p->row[p->seq[with].q0 + i] : row + i - shared;
        p->lead[b->n_seq] = n_prompt - 1;
    }
    memcpy(p->id + row, id + shared, (size_t) (n - 1 - shared) * sizeof *id);
    for (int32_t i = shared; i < n - 1; i++)
        p->pos[row + i - shared] = i;
    p->seq[b->n_seq++] = (kne_seq) {q0, n - 1, q0, n - 1};
    for (int32_t i = n_prompt; i < n; i++)
    {
        p->target[b->n_out] = id[i];
        p->out_row[b->n_out++] = row + i - shared - 1;
    }
    b->n += n - 1 - shared;
    p->n_place += n - 1;
    return out;
}

void
kne_pack_share(kne_pack *p)
{
    kne_batch *b = &p->b;

    b->n_place = p->max_place && p->n_place > b->n ? p->n_place : 0; /* nothing in common: places are rows */
    if (!b->n_place)
        return;
    memset(p->from, 0, ((size_t) b->n + 1) * sizeof *p->from);
    for (int32_t i = 0; i < b->n_place; i++)
        p->from[p->row[i] + 1]++;
    for (int32_t r = 0; r < b->n; r++)
        p->from[r + 1] += p->from[r];
    memcpy(p->first, p->from, (size_t) b->n * sizeof *p->first); /* until all are placed: where the next one goes */
    for (int32_t i = 0; i < b->n_place; i++)
        p->place[p->first[p->row[i]]++] = i;
    for (int32_t r = 0; r < b->n; r++)
        p->first[r] = p->place[p->from[r]];
}
