// Topology of a token tree: who is whose parent, and which guess of the head a node is.

#pragma once

#include <cstdint>
#include <vector>

namespace entmtp {

struct tree {
    // nodes in breadth-first order, the root first
    std::vector<int32_t> parent; // [n_nodes] -1 for the root
    std::vector<int32_t> rank;   // [n_nodes] place in the head's top-k, 0 for the root
    std::vector<int32_t> depth;  // [n_nodes] 0 for the root

    // what the heads have to compute: level d holds the guesses of head d, for every node of depth d that has children
    struct level {
        std::vector<int32_t> expand; // [n_expand] nodes of depth d with children
        int32_t              k = 0;  // guesses per expanded node
    };

    std::vector<level>   levels; // [depth of the tree]
    std::vector<int32_t> slot;   // [n_nodes] place of the node in its level's expand, -1 for leaves

    int32_t n_nodes() const { return (int32_t) parent.size(); }

    // child of node that carries token, -1 if there is none
    //   tokens [n_nodes]
    int32_t find_child(int32_t node, const std::vector<int32_t> & tokens, int32_t token) const;
};

// Build and check a topology. Throws std::runtime_error with one sentence.
tree make_tree(const int32_t * parent, const int32_t * rank, int32_t n_nodes);

} // namespace entmtp
