// Logits of texts by plain llama.cpp: what every way of drafting must come to.

#pragma once

#include "fuzz.h"
#include "tiny.h"

#include <algorithm>
#include <vector>

class plain_text {
  public:
    explicit plain_text(llama_model * model) : ctx(tiny::new_context(model, 512)) {}

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
        llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, (int32_t) n, -1);
        at = text;
        while (n < text.size()) {
            const auto part = (int32_t) std::min<size_t>(text.size() - n, 100);
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
    std::vector<int32_t> at;
    std::vector<float>   row;
};
