// What the device says about the rows of a pass, so that the rows themselves can stay there.

#pragma once

#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace entmtp {

// reductions of logits [n_vocab, n]
struct reduction {
    int32_t       k         = 0;
    ggml_tensor * ids       = nullptr; // i32 [k, n] tokens with the largest logits, in any order. By chunks [2 k, n]:
                                       // places among the best of all chunks, and tokens within their chunk
    ggml_tensor * values    = nullptr; // f32 [width(k), n] their logits [k], p of the best, -H in nats, and for k = 1:
                                       // minus the number of tokens that are less probable
    bool          by_chunks = false;

    static int32_t width(int32_t k) { return k + (k == 1 ? 3 : 2); }

    // the tokens [n][k], of what was read from `ids`
    void to_tokens(std::vector<int32_t> & read, int32_t n_vocab) const;
};

// A member of a backend-sampler chain (llama_set_sampler) that samples nothing: it adds the reductions of all rows to every
// graph of up to max_rows outputs.
class reducer {
  public:
    static constexpr int64_t max_rows = 64; // a larger pass is a prompt, of which nobody walks the rows

    // by_chunks  find the largest logits by way of those of every 1024: for a device whose TOP_K goes row by row
    explicit reducer(int32_t k, bool by_chunks = false);
    ~reducer();

    reducer(const reducer &)             = delete;
    reducer & operator=(const reducer &) = delete;

    llama_sampler * chain() const { return sampler_chain; }

    // of the graph whose logits these are; null: that graph has none
    const reduction * find(const ggml_tensor * logits) const;

    // The number of candidates that a device can find, by the ops that it supports: k, 1, or 0 if it cannot even do that.
    //   missing  names the op that was in the way; empty for k
    static int32_t most_candidates(const std::function<bool(const ggml_tensor * op)> & supports,
                                   int64_t                                             n_vocab,
                                   int32_t                                             k,
                                   bool                                                by_chunks,
                                   std::string &                                       missing);

    const int32_t k;
    const bool    by_chunks;

    // called by llama.cpp while it builds a graph
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * row);

  private:
    llama_sampler * sampler_chain;

    // by the logits of the graph. A graph that is built anew overwrites its entry
    std::map<const ggml_tensor *, reduction> built;
};

} // namespace entmtp
