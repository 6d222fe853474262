// The tokens that a model that drafts can propose: some of its vocabulary, so that it multiplies with some of its projection.

#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// Rows of an output projection: all of one that has few, or a copy of n rows of a large one. Half of these are the first
// of the vocabulary, which are its most frequent tokens; the others are those that the text brought last, at first the
// next ones.
class draft_vocabulary {
  public:
    // what pays about: an eighth, at least 4096; all where that is not less than half
    static int32_t usual(int32_t n_vocab);

    // throws std::runtime_error with one sentence
    //   projection  [n_embd, n_vocab], which outlives this; single rows of it can be read (projection.h)
    draft_vocabulary(const ggml_tensor * projection, int32_t n);

    // all rows of a projection, and which tokens they are: they stay that
    draft_vocabulary(const ggml_tensor * projection, std::vector<int32_t> tokens);

    ggml_tensor * rows() const { return some; } // [n_embd, n]
    int32_t       size() const { return (int32_t) ids.size(); }
    int32_t       token(int32_t row) const { return ids[row]; }

    void meet(int32_t token); // it came in the text, so it can be proposed from now on
    void forget();            // what came

  private:
    void put(int32_t row, int32_t token);

    const ggml_tensor * all;
    ggml_tensor *       some;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;

    std::vector<int32_t> ids;     // [n] token of a row
    std::vector<bool>    is_here; // [n_vocab]; empty: rows stay what they are
    int32_t              next;    // the row that the next token takes
};

} // namespace entmtp
