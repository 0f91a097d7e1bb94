/*
 * bench_list.h - a list of edits (bench_make edits) as a job for kne_edit_run. Nothing is freed: these are benchmarks.
 */
#ifndef BENCH_LIST_H
#define BENCH_LIST_H

#include "kne_edit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIST_MAX 4096

typedef struct edit_list
{
    int32_t       n, n_known;
    kne_edit_spec edit[LIST_MAX];
    kne_known     known[LIST_MAX];
} edit_list;

static kne_text
list_text(const char *s)
{
    return (kne_text) {s, s ? strlen(s) : 0};
}

/* false: no such file, or a broken one. */
static bool
list_read(const char *path, edit_list *list)
{
    FILE  *f = fopen(path, "r");
    char  *line = NULL;
    size_t cap = 0;

    if (!f)
        return false;
    while (getline(&line, &cap, f) > 0 && list->n < LIST_MAX && list->n_known < LIST_MAX)
    {
        char *s = strdup(line), *kind, *object, *prompt;

        s[strcspn(s, "\n")] = '\0';
        kind = strsep(&s, "\t");
        object = strsep(&s, "\t");
        if (!object || !s)
            return false;
        if (strcmp(kind, "edit") == 0)
        {
            kne_edit_spec *e = &list->edit[list->n++];
            kne_text      *p = calloc(16, sizeof *p);

            *e = (kne_edit_spec) {.edit_id = list->n, .prompt = p, .object = list_text(object), .anchor = calloc(64, sizeof(int32_t))};
            while ((prompt = strsep(&s, "\t")) && e->n_prompts < 16)
                p[e->n_prompts++] = list_text(prompt);
        }
        else if (list->n)
        {
            kne_edit_spec *e = &list->edit[list->n - 1];

            if (e->n_anchors < 64)
                ((int32_t *) e->anchor)[e->n_anchors++] = list->n_known;
            list->known[list->n_known++] = (kne_known) {list_text(s), list_text(object), 0};
        }
    }
    fclose(f);
    free(line);
    return list->n > 0;
}

#endif
