#include "accept.h"

#include "entropy.h"

#include <algorithm>
#include <cmath>

namespace entmtp {

static double log_sum_exp(const float * logits, int32_t n, float inv_temp) {
    const float max = *std::max_element(logits, logits + n);
    double      sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        sum += std::exp((double) (logits[i] - max) * inv_temp);
    }
    return (double) max * inv_temp + std::log(sum);
}

std::vector<int32_t> typical_path(const tree &                                       topology,
                                  const std::vector<int32_t> &                       tokens,
                                  int32_t                                            n_vocab,
                                  const typical_params &                             p,
                                  const std::function<const float *(int32_t node)> & logits) {
    const int32_t n        = topology.n_nodes();
    const float   temp     = std::max(p.temp, 1e-3f);
    const float   inv_temp = 1.0f / temp;

    struct state {
        bool   is_open   = false; // every token up to here is typical
        bool   has_norm  = false;
        double log_norm  = 0.0;   // of the node's own distribution
        double threshold = 0.0;   // ln
        double log_p     = 0.0;   // of the path
    };

    std::vector<state> nodes(n);
    nodes[0].is_open = true;

    int32_t best = 0;

    for (int32_t i = 1; i < n; ++i) {
        state & up = nodes[topology.parent[i]];
        if (!up.is_open) {
            continue;
        }
        const float * row = logits(topology.parent[i]);
        if (!up.has_norm) {
            up.has_norm = true;
            up.log_norm = log_sum_exp(row, n_vocab, inv_temp);
            up.threshold =
                std::min(std::log((double) p.epsilon), std::log((double) p.alpha) - entropy(row, n_vocab, temp));
        }

        const double log_p = (double) row[tokens[i]] * inv_temp - up.log_norm;

        nodes[i].is_open = log_p > up.threshold;
        nodes[i].log_p   = up.log_p + log_p;

        const bool deeper = topology.depth[i] > topology.depth[best];
        const bool better = topology.depth[i] == topology.depth[best] && nodes[i].log_p > nodes[best].log_p;
        if (nodes[i].is_open && (deeper || better)) {
            best = i;
        }
    }

    std::vector<int32_t> path;
    for (int32_t i = best; i >= 0; i = topology.parent[i]) {
        path.push_back(i);
    }
    std::reverse(path.begin(), path.end());
    return path;
}

} // namespace entmtp
