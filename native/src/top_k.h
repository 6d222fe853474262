// The best guesses of a draft, on the CPU: one node of a graph where ggml's own operations take five.

#pragma once

#include "ggml.h"

#include <cstdint>

namespace entmtp {

// indices of the k largest of n values, the largest first; of equal ones the first comes first
//   k is at most n. Where values are not numbers, indices are valid, and no more is promised
void top_k(const float * x, int32_t n, int32_t k, int32_t * best);

// top_k() of each column of logits [n_vocab, n], as a node that only the CPU backend can compute: i32 [k, n]
//   map: i32 [1, n_vocab], what is given in place of an index; null: the index
ggml_tensor * build_top_k_cpu(ggml_context * ctx, ggml_tensor * logits, ggml_tensor * map, int32_t k);

} // namespace entmtp
