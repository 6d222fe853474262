#include "grower.h"

#include <algorithm>
#include <cmath>

namespace entmtp {

// step of the online correction of a level's logits
static constexpr float bias_rate = 0.02f;
static constexpr float bias_max  = 3.0f;

void expanded_path(int32_t l, int32_t index, int32_t * path) {
    std::fill(path, path + l, 0);
    if (l == 1) {
        path[0] = index;
    } else if (l == 2 && index == 3) {
        path[0] = 2;
    } else if (index > 0) {
        path[index - 1] = 1;
    }
}

int32_t expanded_parent(int32_t l, int32_t index) {
    if (l <= 1) {
        return 0;
    }
    if (l == 2) {
        return index == 1 ? 1 : index == 3 ? 2 : 0;
    }
    // a rank other than 0 in the last place: the parent is the greedy path
    return index == l ? 0 : index;
}

grower::grower(const entmtp_calibration & c, bool adapt) : adapt(adapt), cal(c), n_levels(cal.n_levels) {
    bias.assign(n_levels, 0.0f);
}

// calibrated probabilities of the guesses of head l after its first n expanded paths; stride 0: the same guesses for all
void grower::add_level(
    int32_t l, int32_t n, const float * log_p, int32_t stride, const entmtp_signals & s, float running) {
    const size_t begin = found.size();
    first[l]           = (int32_t) begin;
    width[l]           = n;

    std::vector<int32_t> path(l);

    for (int32_t c = 0; c < n; ++c) {
        // the node that the guesses hang from, among the candidates of the level above
        float above_p   = 1.0f;
        float above_raw = 0.0f;
        if (l > 0) {
            expanded_path(l, c, path.data());
            const int32_t above = first[l - 1] + expanded_parent(l, c) * n_guess + path[l - 1];
            above_p             = found[above].p;
            above_raw           = raw[above];
        }
        const float spread = spread_of(log_p + (ptrdiff_t) c * stride, n_guess);
        for (int32_t r = 0; r < n_guess; ++r) {
            const float lp = log_p[c * stride + r];

            const float q = sigmoid(cal.logit(l, r, lp, above_raw, spread, s, running) + bias[l]);
            found.push_back({ l + 1, c, r, q, above_p * q, -1 });
            raw.push_back(above_raw + lp);
            probs.push_back(above_p * q);
        }
    }
    std::sort(probs.begin(), probs.end(), std::greater<float>());
}

// what the best pass over the candidates is worth, if heads l .. to - 1 were run down the greedy path first; their cost
// is not taken off
double grower::look_ahead(int32_t l, int32_t to, const entmtp_signals & s, float running) {
    const candidate * last = l > 0 ? &found[first[l - 1]] : nullptr; // the greedy path so far

    const float path = l > 0 ? raw[first[l - 1]] : 0.0f;
    const float a    = sigmoid(cal.foresee(l, path, path - (l > 1 ? raw[first[l - 2]] : 0.0f), s, running) + bias[l]);
    const float p    = last ? last->p : 1.0f;

    const float * row = cal.foreseen(l, a);

    double sum = 0.0;
    for (int32_t i = 0; i < cal.n_scenarios; ++i, row += (size_t) n_levels * 3) {
        trial = probs;
        for (int32_t j = 3 * l; j < 3 * to; ++j) {
            const float x_new = p * row[j];
            trial.insert(std::upper_bound(trial.begin(), trial.end(), x_new, std::greater<float>()), x_new);
        }
        sum += best_pass(trial, fee);
    }
    return sum / cal.n_scenarios;
}

const std::vector<grower::node> & grower::grow(const entmtp_signals & s,
                                               float                  running,
                                               const cost_model &     cost,
                                               double                 price,
                                               int32_t                n_max,
                                               int32_t                n_heads,
                                               bool                   sees_path,
                                               bool                   forced,
                                               const expand_fn &      expand) {
    found.clear();
    raw.clear();
    probs.clear();
    nodes.clear();
    first.assign(n_levels + 1, 0);
    width.assign(n_levels, 0);
    t_draft    = 0.0;
    n_expanded = 0;

    cost.fees(price, n_max, fee);
    if (fee.size() < 2) {
        return nodes;
    }

    n_heads = std::min({ n_heads, n_levels, cost.n_levels() });

    int32_t n_best = 1;
    double  now    = best_pass(probs, fee, &n_best);

    for (int32_t l = 0; l < n_heads; ++l) {
        // does it pay to run this head, alone or with the ones below it?
        bool   pays    = forced && l == 0;
        double t_chain = 0.0;
        for (int32_t to = l + 1; to <= n_heads && !pays; ++to) {
            t_chain += price * cost.level(to - 1, 1);
            pays = look_ahead(l, to, s, running) - t_chain > now;
        }
        if (!pays) {
            break;
        }

        // after how many paths? As many as have a guess below them that may enter the tree; they cost nothing to heads that
        // do not see the path
        int32_t n = sees_path || l == 0 ? 1 : max_width;
        if (sees_path && l > 0) {
            const int32_t n_limit = l == 1 ? max_width : width[l - 1];
            const float   a       = found[first[l - 1]].q; // as sure as on the level above
            const double  node    = n_best > 1 ? (fee[n_best - 1] - fee[0]) / (n_best - 1) : fee[1] - fee[0];

            std::vector<int32_t> path(l);
            double               gain = 0.0;
            for (int32_t c = 1; c < n_limit; ++c) {
                expanded_path(l, c, path.data());
                const candidate & above = found[first[l - 1] + expanded_parent(l, c) * n_guess + path[l - 1]];
                gain += std::max(0.0, a * above.p - node);
                if ((c == 1 || c == 3) && gain > price * (cost.level(l, c + 1) - cost.level(l, 1))) {
                    n = c + 1;
                }
            }
        }

        const int32_t n_run = sees_path ? n : 1;
        add_level(l, n, expand(l, n_run), sees_path ? n_guess : 0, s, running);
        t_draft += cost.level(l, n_run);
        n_expanded = l + 1;
        now        = best_pass(probs, fee, &n_best);
    }

    if (forced && n_best == 1 && !found.empty()) {
        n_best = 2;
    }
    if (n_best == 1) {
        return nodes;
    }

    // the n_best - 1 most probable candidates; among equals the upper ones, so that every parent is among them
    order.resize(found.size());
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = (int32_t) i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return found[a].p > found[b].p; });
    order.resize(n_best - 1);
    std::sort(order.begin(), order.end()); // candidates stand level by level

    for (const int32_t i : order) {
        candidate &          c = found[i];
        std::vector<int32_t> path(c.depth - 1);
        int32_t              parent = 0;
        if (c.depth > 1) {
            expanded_path(c.depth - 1, c.column, path.data());
            const int32_t above = first[c.depth - 2] + expanded_parent(c.depth - 1, c.column) * n_guess + path.back();
            parent              = found[above].node;
        }
        nodes.push_back({ parent, c.depth, c.column, c.rank, c.q });
        c.node = (int32_t) nodes.size();
    }
    return nodes;
}

void grower::skip() {
    cal.skip();
}

void grower::observe(const std::vector<int32_t> & path, int32_t hit) {
    if (n_expanded == 0) {
        skip();
        return;
    }
    if (hit >= 0) {
        cal.observe(hit == 1);
    }
    if (!adapt || nodes.empty()) {
        return;
    }
    // guesses below every node of the walk: how many were right, and how many should have been
    for (const int32_t at : path) {
        const int32_t l        = at == 0 ? 0 : nodes[at - 1].depth;
        float         expected = 0.0f, right = 0.0f;
        bool          any = false;
        for (size_t i = 0; i < nodes.size(); ++i) {
            if (nodes[i].parent != at) {
                continue;
            }
            any = true;
            expected += nodes[i].q;
            right += std::find(path.begin(), path.end(), (int32_t) i + 1) != path.end() ? 1.0f : 0.0f;
        }
        if (any) {
            bias[l] = std::clamp(bias[l] + bias_rate * (right - expected), -bias_max, bias_max);
        }
    }
}

} // namespace entmtp
