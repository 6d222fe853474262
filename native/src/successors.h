// What came after a token when the model last saw it: its most probable successors, from rows that were computed anyway.
// Token Recycling (arXiv 2408.08696), with the probabilities kept.

#pragma once

#include <cstdint>
#include <vector>

namespace entmtp {

class successors {
  public:
    static constexpr int32_t k = 8;

    struct row {
        int32_t n = 0; // that are known
        int32_t token[k];
        float   log_p[k];
    };

    // The distribution after a token, over the model's whole vocabulary of n_vocab
    //   best [n], log_p [n]  the most probable tokens, the best first
    void see(int32_t n_vocab, int32_t token, const int32_t * best, const float * log_p, int32_t n);

    // null: the token was not seen
    const row * after(int32_t token) const;

    void forget();

  private:
    std::vector<int32_t> index; // [n_vocab] of a token's row, -1: none
    std::vector<row>     rows;
};

} // namespace entmtp
