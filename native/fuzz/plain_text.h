// Logits of texts by plain llama.cpp: what every way of drafting must come to.

#pragma once

#include "fuzz.h"
#include "tiny.h"

#include <algorithm>
#include <vector>

class plain_text {
  public:
    // with ggml's flash attention, whose kernel for 64 tokens and more rounds elsewhere, in passes of fewer
    explicit plain_text(llama_model * model, bool flash = false) :
        ctx(tiny::new_context(model, 512, flash)), n_most(flash ? 32 : 100) {}

    // of the last token of a text, [n_vocab]
    const std::vector<float> & logits(const std::vector<int32_t> & text) {
        if (text == at && !row.empty()) {
            return row;
        }
        MUST(!text.empty() && text.size() <= 512);
        size_t n = 0;
        while (n < std::min(text.size() - 1, at.size()) && text[n] == at[n]) {
            ++n;
        }
        if (!llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, (int32_t) n, -1)) { // a state
            llama_memory_clear(llama_get_memory(ctx.get()), true);
            n = 0;
        }
        at = text;
        while (n < text.size()) {
            const auto part = (int32_t) std::min<size_t>(text.size() - n, n_most);
            MUST(llama_decode(ctx.get(), llama_batch_get_one(at.data() + n, part)) == 0);
            n += part;
        }
        const float * last = llama_get_logits_ith(ctx.get(), -1);
        MUST(last);
        row.assign(last, last + tiny::n_vocab);
        return row;
    }

  private:
    tiny::context_ptr    ctx;
    size_t               n_most; // tokens in a pass
    std::vector<int32_t> at;
    std::vector<float>   row;
};
