#include "grower.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

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

static float sigmoid(float z) {
    return 1.0f / (1.0f + std::exp(-z));
}

static float dot(const float * w, const float * x, int32_t n) {
    float sum = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        sum += w[i] * x[i];
    }
    return sum;
}

grower::grower(const entmtp_calibration & c, bool adapt) :
    adapt(adapt), n_levels(c.n_levels), n_bins(c.n_bins), n_scenarios(c.n_scenarios) {
    if (n_levels < 1 || n_levels > 64 || n_bins < 1 || n_bins > 64 || n_scenarios < 1 || n_scenarios > 64 ||
        !c.accept || !c.ahead || !c.scenarios || (n_bins > 1 && !c.edges)) {
        throw std::runtime_error("calibration: a table is missing");
    }

    const auto copy = [](std::vector<float> & to, const float * from, size_t n, float low, float high) {
        for (size_t i = 0; i < n; ++i) {
            if (!(from[i] >= low && from[i] <= high)) {
                throw std::runtime_error("calibration: a number is out of range");
            }
            to.push_back(from[i]);
        }
    };
    if (!(c.hits >= 0.0f && c.hits <= 1.0f && c.hits_window >= 1.0f && c.hits_window <= 1e6f)) {
        throw std::runtime_error("calibration: hits are out of range");
    }
    hits_start = hits = c.hits;
    hits_rate         = 2.0f / (c.hits_window + 1.0f);

    copy(accept, c.accept, (size_t) n_levels * ENTMTP_N_ACCEPT, -1e3f, 1e3f);
    copy(ahead, c.ahead, (size_t) n_levels * ENTMTP_N_AHEAD, -1e3f, 1e3f);
    copy(edges, c.edges, (size_t) n_levels * (n_bins - 1), 0.0f, 1.0f);
    copy(scenarios, c.scenarios, (size_t) n_levels * n_bins * n_scenarios * n_levels * 3, 0.0f, 1.0f);

    bias.assign(n_levels, 0.0f);
}

// calibrated probabilities of the guesses of head l after its first n expanded paths; stride 0: the same guesses for all
void grower::add_level(
    int32_t l, int32_t n, const float * log_p, int32_t stride, const entmtp_signals & s, float running) {
    const float * w = &accept[(size_t) l * ENTMTP_N_ACCEPT];

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
        float spread = 0.0f; // entropy of the best guesses
        for (int32_t r = 0; r < n_guess; ++r) {
            const float lp = log_p[c * stride + r];
            spread -= std::exp(lp) * lp;
        }
        for (int32_t r = 0; r < n_guess; ++r) {
            const float lp = log_p[c * stride + r];

            const float x[ENTMTP_N_ACCEPT] = {
                1.0f,      lp,        std::log1p(-std::min(std::exp(lp), 0.9999f)),
                running,   s.entropy, std::log((float) (1 + r)),
                above_raw, hits,      spread,
            };
            const float q = sigmoid(dot(w, x, ENTMTP_N_ACCEPT) + bias[l]);
            found.push_back({ l + 1, c, r, q, above_p * q, -1 });
            raw.push_back(above_raw + lp);
            probs.push_back(above_p * q);
        }
    }
    std::sort(probs.begin(), probs.end(), std::greater<float>());
}

// tokens expected from the best pass over candidates of these probabilities (decreasing), less what the pass costs
double grower::worth(std::vector<float> & p, int32_t * n_best) const {
    double       best = -1e30;
    double       sum  = 1.0;
    const size_t n    = std::min(p.size() + 1, fee.size());
    for (size_t i = 0; i < n; ++i) {
        if (i > 0) {
            sum += p[i - 1];
        }
        if (sum - fee[i] > best) {
            best = sum - fee[i];
            if (n_best) {
                *n_best = (int32_t) i + 1;
            }
        }
    }
    return best;
}

// the same, if heads l .. to - 1 were run down the greedy path first; their cost is not taken off
double grower::look_ahead(int32_t l, int32_t to, const entmtp_signals & s, float running) {
    const candidate * last = l > 0 ? &found[first[l - 1]] : nullptr; // the greedy path so far

    const float x[ENTMTP_N_AHEAD] = {
        1.0f,
        running,
        s.entropy,
        s.log_root,
        hits,
        l > 0 ? raw[first[l - 1]] : 0.0f,
        l > 0 ? raw[first[l - 1]] - (l > 1 ? raw[first[l - 2]] : 0.0f) : 0.0f,
    };
    const float a = sigmoid(dot(&ahead[(size_t) l * ENTMTP_N_AHEAD], x, ENTMTP_N_AHEAD) + bias[l]);

    const float * e   = edges.data() + (size_t) l * (n_bins - 1);
    const int32_t bin = (int32_t) (std::upper_bound(e, e + n_bins - 1, a) - e);
    const float   p   = last ? last->p : 1.0f;

    const size_t  size = (size_t) n_levels * 3;
    const float * row  = &scenarios[((size_t) l * n_bins + bin) * n_scenarios * size];

    double sum = 0.0;
    for (int32_t i = 0; i < n_scenarios; ++i, row += size) {
        trial = probs;
        for (int32_t j = 3 * l; j < 3 * to; ++j) {
            const float x_new = p * row[j];
            trial.insert(std::upper_bound(trial.begin(), trial.end(), x_new, std::greater<float>()), x_new);
        }
        sum += worth(trial, nullptr);
    }
    return sum / n_scenarios;
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

    fee.clear();
    for (int32_t n = 1; n <= std::min(n_max, cost.n_max()); ++n) {
        fee.push_back(price * cost.verify(n));
    }
    if (fee.size() < 2) {
        return nodes;
    }

    n_heads = std::min({ n_heads, n_levels, cost.n_levels() });

    int32_t n_best = 1;
    double  now    = worth(probs, &n_best);

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
        now        = worth(probs, &n_best);
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
    hits += (hits_start - hits) * hits_rate;
}

void grower::observe(const std::vector<int32_t> & path, int32_t hit) {
    if (n_expanded == 0) {
        skip();
        return;
    }
    if (hit >= 0) {
        hits += ((float) hit - hits) * hits_rate;
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
