#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

// the bank's acceptance counts as much as this many observed steps
static constexpr double prior_steps = 16.0;

// a tree is timed this often before its measured cost is trusted over the bank's
static constexpr int64_t n_warmup = 2;

// once in so many steps a tree whose timing is old is tried again: costs drift with the context and the machine
static constexpr int64_t n_retry = 512;

// "promising": as good as the best choice if its cost were lower by this factor
static constexpr double optimism = 1.3;

scheduler::scheduler() = default;

scheduler::scheduler(const entmtp_policy_params & p, int32_t n_trees) :
    policy(p.policy), static_tree(p.static_tree), ema_window(p.ema_window) {
    if (policy < ENTMTP_POLICY_OFF || policy > ENTMTP_POLICY_ENTROPY) {
        throw std::runtime_error("policy: unknown number");
    }
    if (policy == ENTMTP_POLICY_STATIC && (static_tree < 0 || static_tree >= n_trees)) {
        throw std::runtime_error("policy: static_tree is not in the bank");
    }
    if (policy != ENTMTP_POLICY_ENTROPY) {
        return;
    }
    if (p.n_bins < 1 || !p.expected || !p.cost || (p.n_bins > 1 && !p.bin_edges)) {
        throw std::runtime_error("policy: entropy needs bins, expected acceptance and costs");
    }
    if (!(ema_window >= 1.0f && ema_window <= 1e6f)) {
        throw std::runtime_error("policy: ema_window must be 1 to 1000000 tokens");
    }

    for (int32_t b = 0; b + 1 < p.n_bins; ++b) {
        if (!std::isfinite(p.bin_edges[b]) || (b > 0 && p.bin_edges[b] <= p.bin_edges[b - 1])) {
            throw std::runtime_error("policy: bin_edges must increase");
        }
        edges.push_back(p.bin_edges[b]);
    }

    for (int32_t b = 0; b < p.n_bins; ++b) {
        accept.emplace_back();
        for (int32_t t = 0; t < n_trees; ++t) {
            const float e = p.expected[b * n_trees + t];
            if (!(e >= 0.0f) || !std::isfinite(e)) {
                throw std::runtime_error("policy: expected acceptance must be a number not below 0");
            }
            accept.back().push_back({ prior_steps, prior_steps * e });
        }
    }

    for (int32_t t = 0; t < n_trees; ++t) {
        if (!(p.cost[t] > 0.0f) || !std::isfinite(p.cost[t])) {
            throw std::runtime_error("policy: costs must be positive numbers");
        }
        cost.emplace_back();
        cost.back().prior = p.cost[t] / p.cost[0];
    }
}

int32_t scheduler::bin_of(float entropy) const {
    return (int32_t) (std::upper_bound(edges.begin(), edges.end(), entropy) - edges.begin());
}

double scheduler::cost_of(int32_t tree) const {
    if (cost[tree].n >= n_warmup) {
        return cost[tree].mean;
    }
    // not measured: the bank's ratio to the largest tree below it that was. A machine where small trees turn out to be
    // cheaper than the bank says is thereby led on to larger ones
    const timing * nearest = nullptr;
    for (const auto & c : cost) {
        if (c.n >= n_warmup && c.prior <= cost[tree].prior && (!nearest || c.prior > nearest->prior)) {
            nearest = &c;
        }
    }
    return nearest ? cost[tree].prior * nearest->mean / nearest->prior : cost[tree].prior;
}

int32_t scheduler::choose(float entropy, int32_t n_max, const std::vector<int32_t> & n_nodes) {
    if (policy == ENTMTP_POLICY_OFF) {
        return 0;
    }
    if (policy == ENTMTP_POLICY_STATIC) {
        return n_nodes[static_tree] <= n_max ? static_tree : 0;
    }

    ++n_steps;

    bin = bin_of(entropy);

    const int32_t n_trees = (int32_t) cost.size();

    const auto score = [&](int32_t t) {
        const auto & a = accept[bin][t];
        return (1.0 + a.total / a.n) / cost_of(t);
    };

    // plain decoding is timed first: it is the scale of everything else
    if (cost[0].n < n_warmup) {
        return 0;
    }

    int32_t best = 0;
    for (int32_t t = 1; t < n_trees; ++t) {
        if (n_nodes[t] <= n_max && score(t) > score(best)) {
            best = t;
        }
    }

    // try what could be better: a tree that was never timed, or not for long. Plain decoding is what must never be lost
    // to: its timing is kept fresh whatever it says
    for (int32_t t = 0; t < n_trees; ++t) {
        if (t == best || n_nodes[t] > n_max) {
            continue;
        }

        const int64_t age    = n_steps - cost[t].last;
        const bool    is_due = cost[t].n < n_warmup || age > n_retry / 4 * n_trees;

        if (t == 0 ? age > n_retry : is_due && optimism * score(t) > score(best)) {
            return t;
        }
    }

    return best;
}

void scheduler::observe(int32_t tree, int32_t n_accepted, double t_us) {
    if (policy != ENTMTP_POLICY_ENTROPY) {
        return;
    }

    auto & a = accept[bin][tree];

    // a long memory, not an endless one: texts change
    static constexpr double forget = 1.0 - 1.0 / 256.0;

    a.n     = forget * a.n + 1.0;
    a.total = forget * a.total + n_accepted;

    auto & c = cost[tree];

    t_us = std::max(t_us, 1.0); // a mean of 0 would stay 0

    // a step that was interrupted by something else says nothing about the tree
    const double x = c.n >= n_warmup ? std::min(t_us, 2.0 * c.mean) : t_us;

    if (c.n < n_warmup) {
        // the first passes of a shape allocate and build graphs: keep the fastest
        c.mean = c.n == 0 ? x : std::min(c.mean, x);
    } else {
        // a timing that is long past counts for little
        const bool is_old = n_steps - c.last > n_retry / 4;
        c.mean += (x - c.mean) / (is_old ? 2.0 : 16.0);
    }

    c.n += 1;
    c.last = n_steps;
}

} // namespace entmtp
