// The C boundary of drawing a token without a decoder.

#include "api.h"
#include "llama.h"

#include <cstring>

int32_t entmtp_sample(llama_context * ctx, llama_sampler * sampler, int32_t i, int32_t * token) {
    return entmtp::guarded([&] {
        if (!ctx || !sampler || !token) {
            return entmtp::fail("a pointer is missing");
        }
        // llama.cpp ends the process over both
        if (llama_get_sampled_token_ith(ctx, i) == LLAMA_TOKEN_NULL && !llama_get_logits_ith(ctx, i)) {
            return entmtp::fail("there are no logits to sample from");
        }
        if (std::strcmp(llama_sampler_name(sampler), "chain") == 0 && llama_sampler_chain_n(sampler) == 0) {
            return entmtp::fail("the sampler chain is empty");
        }
        *token = llama_sampler_sample(sampler, ctx, i);
        return (int32_t) ENTMTP_OK;
    });
}
