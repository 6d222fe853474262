#pragma once

#include "llama.h"

#include "../src/llama-ext.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>

namespace entmtp {

// Tokens that a text of this model can have in a context: llama.cpp ends the process where a table of positions (GPT-2's
// kind) has no more rows.
inline int32_t n_positions(const llama_context * ctx) {
    const ggml_tensor * table = llama_model_get_tensor(llama_get_model(ctx), "position_embd.weight");
    const int64_t       n     = llama_n_ctx_seq(ctx);
    return (int32_t) (table ? std::min(n, table->ne[1]) : n);
}

} // namespace entmtp
