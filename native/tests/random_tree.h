// Random topologies for property tests.

#pragma once

#include "tree.h"

#include <algorithm>
#include <random>
#include <vector>

struct random_tree {
    std::vector<int32_t> parent = { -1 };
    std::vector<int32_t> rank   = { 0 };

    // n nodes in breadth-first order; ranks of siblings differ and need not be dense
    random_tree(std::mt19937 & rng, int32_t n) {
        std::vector<std::vector<int32_t>> levels = { { 0 } };
        while ((int32_t) parent.size() < n) {
            const auto & up   = levels.back();
            const int    left = n - (int32_t) parent.size();
            const int    size = 1 + (int) (rng() % std::min(left, 6));

            std::vector<int32_t>              level;
            std::vector<std::vector<int32_t>> used(up.size());
            for (int i = 0; i < size; ++i) {
                const size_t u = rng() % up.size();
                int32_t      r = 0;
                do {
                    r = (int32_t) (rng() % 12);
                } while (std::count(used[u].begin(), used[u].end(), r));
                used[u].push_back(r);
                level.push_back((int32_t) parent.size());
                parent.push_back(up[u]);
                rank.push_back(r);
            }
            levels.push_back(level);
        }
    }

    int32_t n_nodes() const { return (int32_t) parent.size(); }

    entmtp::tree make() const { return entmtp::make_tree(parent.data(), rank.data(), n_nodes()); }
};
