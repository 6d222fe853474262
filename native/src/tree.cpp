#include "tree.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace entmtp {

static constexpr int32_t max_rank = 1 << 26;

static std::runtime_error invalid(int32_t node, const char * what) {
    return std::runtime_error("tree: node " + std::to_string(node) + " " + what);
}

tree make_tree(const int32_t * parent, const int32_t * rank, int32_t n_nodes) {
    if (n_nodes < 1) {
        throw std::runtime_error("tree: no root");
    }
    if (parent[0] != -1) {
        throw invalid(0, "is the root and cannot have a parent");
    }

    tree res;
    res.parent.assign(parent, parent + n_nodes);
    res.rank.assign(rank, rank + n_nodes);
    res.depth.assign(n_nodes, 0);
    res.slot.assign(n_nodes, -1);

    std::set<std::pair<int32_t, int32_t>> seen; // (parent, rank)

    for (int32_t i = 1; i < n_nodes; ++i) {
        if (parent[i] < 0 || parent[i] >= i) {
            throw invalid(i, "must come after its parent");
        }
        if (rank[i] < 0) {
            throw invalid(i, "has a negative rank");
        }
        if (rank[i] >= max_rank) {
            throw invalid(i, "has a rank beyond any vocabulary");
        }
        if (!seen.insert({ parent[i], rank[i] }).second) {
            throw invalid(i, "is there twice");
        }

        res.depth[i] = res.depth[parent[i]] + 1;

        if (res.depth[i] < res.depth[i - 1]) {
            throw invalid(i, "breaks the breadth-first order");
        }

        const int32_t l = res.depth[i] - 1;
        if (l >= (int32_t) res.levels.size()) {
            res.levels.emplace_back();
        }

        auto & level = res.levels[l];

        level.k = std::max(level.k, rank[i] + 1);

        if (res.slot[parent[i]] < 0) {
            res.slot[parent[i]] = (int32_t) level.expand.size();
            level.expand.push_back(parent[i]);
        }
    }

    return res;
}

int32_t tree::find_child(int32_t node, const std::vector<int32_t> & tokens, int32_t token) const {
    for (int32_t i = node + 1; i < n_nodes(); ++i) {
        if (parent[i] == node && tokens[i] == token) {
            return i;
        }
    }
    return -1;
}

} // namespace entmtp
