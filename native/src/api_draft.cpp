// The C boundary of models that draft.

#include "api.h"

#include "entmtp_draft.h"

#include "../src/llama-ext.h" // inputs of layers: C++ only so far
#include "llama.h"

using entmtp::fail;
using entmtp::guarded;

entmtp_draft_model * entmtp_draft_model_init(llama_context *              ctx,
                                             llama_model *                model,
                                             const llama_context_params * params,
                                             int32_t                      n_draft_vocab) {
    entmtp_draft_model * res = nullptr;
    guarded([&] {
        if (!ctx || !params) {
            return fail("no context, or no parameters");
        }
        res = new entmtp_draft_model{ { ctx, model, *params, n_draft_vocab } };
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

void entmtp_draft_model_free(entmtp_draft_model * draft) {
    delete draft;
}

const char * entmtp_draft_model_broken(const entmtp_draft_model * draft) {
    return draft ? draft->impl.broken().c_str() : "";
}

double entmtp_draft_model_cost(const entmtp_draft_model * draft) {
    return draft ? draft->impl.token_cost() : 0.0;
}

int32_t entmtp_draft_model_vocab(const entmtp_draft_model * draft) {
    return draft ? draft->impl.n_draft_vocab() : 0;
}

int32_t entmtp_decoder_set_draft_model(entmtp_decoder * dec, entmtp_draft_model * draft) {
    return guarded(dec, [&](entmtp::decoder & d) {
        d.set_draft_model(draft ? &draft->impl : nullptr);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_follow_layer(llama_context * ctx, int32_t layer) {
    return guarded([&] {
        if (!ctx || layer < 0 || layer >= llama_model_n_layer(llama_get_model(ctx))) {
            return fail("no context, or the model has no such layer");
        }
        llama_set_embeddings_layer_inp(ctx, (uint32_t) layer, true);
        return (int32_t) ENTMTP_OK;
    });
}

const float * entmtp_layer_inputs(llama_context * ctx, int32_t layer) {
    if (!ctx || layer < 0 || layer >= llama_model_n_layer(llama_get_model(ctx))) {
        fail("no context, or the model has no such layer");
        return nullptr;
    }
    return llama_get_embeddings_layer_inp(ctx, (uint32_t) layer);
}
