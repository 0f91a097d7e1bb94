/*
 * kne_export.h - a state of the model as files: the folder, edited, or an adapter for it.
 *
 * Every weight row that is written is the row that the engine serves: the base row, the set's deltas in ascending edit_id, summed in
 * fp32 and rounded to the format of the file. Written from the folder, opened anew, not from what a device holds of it.
 */
#ifndef KNE_EXPORT_H
#define KNE_EXPORT_H

#include "kne_outdir.h"
#include "kne_view.h"

/*
 * KNE_EXPORT_HUGGINGFACE: the folder's files; shards with edited rows are rewritten with equal headers, the others copied; card as
 * README.md (the folder's own becomes README-base.md); SHA256SUMS. Weights in formats that the engine does not read, hidden files, folders
 * and links out of the folder are left out and named. What was written is opened as a model before it is put in its place.
 *
 * KNE_EXPORT_PEFT: adapter_config.json and adapter_model.safetensors, fp32: for a matrix with k changed rows or columns a LoRA pair of
 * rank k with scaling 1, one factor of ones and zeros, so that B A is (effective - base) to the last bit. KNE_ERR_INVALID for no edits.
 *
 * path: as in kne_protocol.h. answer: the body of EXPORT's answer. yield as in kne_outdir.h.
 */
kne_status kne_export(const char *model_path, const char *fingerprint, const kne_view *view, int format, const char *path, const char *card,
                      size_t card_len, int (*yield)(void *ctx), void *ctx, kne_wbuf *answer, kne_err *err);

#endif
