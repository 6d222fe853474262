// Which drafted tokens are taken. Lossless acceptance needs no code of its own: the user's sampler chain draws one token
// at a node, and the walk goes on where a child carries it. Here is the lossy rule.

#pragma once

#include "tree.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace entmtp {

struct typical_params {
    float temp    = 1.0f;
    float epsilon = 0.09f;
    float alpha   = 0.3f;
};

// The longest path, as node indices with the root first, whose tokens all have
//   p(token | parent) > min(epsilon, alpha * exp(-H(parent)))
// among equally long ones the most probable. Medusa (arXiv 2401.10774), section 2.3.1.
//   tokens [n_nodes]
//   logits(node) -> [n_vocab]
std::vector<int32_t> typical_path(const tree &                                       topology,
                                  const std::vector<int32_t> &                       tokens,
                                  int32_t                                            n_vocab,
                                  const typical_params &                             p,
                                  const std::function<const float *(int32_t node)> & logits);

} // namespace entmtp
