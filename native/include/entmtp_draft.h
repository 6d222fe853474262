// A model that drafts for a decoder: a smaller one, an EAGLE-3 layer, or the model's own layers for multi-token prediction.

#pragma once

#include "entmtp.h"

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context_params;

struct entmtp_draft_model;

// A drafter with a context of its own, made here.
//   ctx     of the model that is drafted for, which outlives this
//   model   a smaller one with the same vocabulary, not owned; NULL: the layers for multi-token prediction (NextN) that the
//           model itself was loaded with (llama_model_params.load_mtp)
//   params  struct llama_context_params of ctx; sizes are chosen here
//   n_draft_vocab  tokens that it can propose: those that the text brought last and the first of the vocabulary. 0: all; -1:
//           an eighth of large vocabularies
// NULL on failure.
ENTMTP_API struct entmtp_draft_model * entmtp_draft_model_init(struct llama_context *              ctx,
                                                               struct llama_model *                model,
                                                               const struct llama_context_params * params,
                                                               int32_t                             n_draft_vocab);
ENTMTP_API void                        entmtp_draft_model_free(struct entmtp_draft_model * draft);

// why it does not draft any more, one sentence; empty: it does
ENTMTP_API const char * entmtp_draft_model_broken(const struct entmtp_draft_model * draft);

// tokens that it can propose: all, too, where llama.cpp's graph or how its weights lie in memory allow no fewer
ENTMTP_API int32_t entmtp_draft_model_vocab(const struct entmtp_draft_model * draft);

// us of drafting one token
ENTMTP_API double entmtp_draft_model_cost(const struct entmtp_draft_model * draft);

// The model that drafts from now on, under the auto policy if it names ENTMTP_SOURCE_MODEL. It outlives the decoder, and
// serves no other. NULL: none does.
ENTMTP_API int32_t entmtp_decoder_set_draft_model(struct entmtp_decoder * dec, struct entmtp_draft_model * draft);

// What an EAGLE-3 layer is trained on: the inputs of a layer of the model, which this context gives with every pass from now
// on. The model's graph must have them (llama's has).
ENTMTP_API int32_t entmtp_follow_layer(struct llama_context * ctx, int32_t layer);

// those of the last pass over tokens, of a layer that was followed then: [n_tokens][n_embd] in the order of its batch. One
// that was not ends the process (llama.cpp's check); null: there is no such layer
ENTMTP_API const float * entmtp_layer_inputs(struct llama_context * ctx, int32_t layer);

#ifdef __cplusplus
}
#endif
