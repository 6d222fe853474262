#include "cost.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace entmtp {

// a timing moves an estimate by this share of the (logarithmic) error
static constexpr double rate = 1.0 / 8.0;

// a step that was interrupted by something else says little: errors are cut to this factor
static const double log_cut = std::log(2.0);

// passes over one token are timed again when larger ones have drifted by this much
static const double log_surprise = std::log(1.3);

static void check(float x, const char * what) {
    if (!(x >= 0.0f) || !std::isfinite(x)) {
        throw std::runtime_error(std::string("costs: ") + what + " must be numbers not below 0");
    }
}

cost_model::cost_model(const entmtp_costs & c, int32_t n_trees, bool adapt) : adapt(adapt), graphs(c.build) {
    check(c.build, "costs of graphs");
    if (c.n_verify < 1 || c.n_verify > 4096 || !c.verify || c.n_levels < 0 || c.n_levels > 64 ||
        (c.n_levels > 0 && !c.level) || (n_trees > 1 && !c.tree)) {
        throw std::runtime_error("costs: a table is missing");
    }
    for (int32_t i = 0; i < c.n_verify; ++i) {
        check(c.verify[i], "costs of passes");
        if (c.verify[i] <= 0.0f) {
            throw std::runtime_error("costs: a pass cannot cost nothing");
        }
        table.push_back(c.verify[i]);
    }
    for (int32_t l = 0; l < c.n_levels; ++l) {
        widths w = {};
        for (int32_t i = 0; i < 3; ++i) {
            check(c.level[3 * l + i], "costs of drafts");
            w.us[i] = c.level[3 * l + i];
        }
        levels.push_back(w);
    }
    for (int32_t t = 0; t < n_trees && c.tree; ++t) {
        check(c.tree[t], "costs of drafts");
        trees.push_back(c.tree[t]);
    }
    own.assign(table.size(), 0.0);
    n_timed.assign(table.size(), 0);
}

double cost_model::verify(int32_t n) const {
    // larger than anything measured: in proportion to the largest
    const int32_t i = std::min(size_of(n), n_max()) - 1;

    double res = table[i] * std::exp(speed + (i > 0 ? batched + own[i] : 0.0)) + (i > 0 ? change : 0.0);
    if (n > n_max()) {
        res *= (double) n / n_max();
    }
    return res;
}

double cost_model::draft(int32_t tree) const {
    return trees.empty() ? 0.0 : trees[tree] * std::exp(speed + drafts);
}

double cost_model::level(int32_t l, int32_t n) const {
    return levels[l].us[n <= 1 ? 0 : n <= 2 ? 1 : 2] * std::exp(speed + drafts);
}

void cost_model::fees(double price, int32_t n_max_pass, std::vector<double> & fee, int32_t n_others) const {
    fee.clear();
    for (int32_t n = 1; n <= std::min(n_max_pass, n_max() - n_others); ++n) {
        fee.push_back(price * (verify(n_others + n) + graphs.charge(n_others + n)));
    }
}

double best_pass(const std::vector<float> & probs, const std::vector<double> & fee, int32_t * n_best) {
    double       best = -1e30;
    double       sum  = 1.0;
    const size_t n    = std::min(probs.size() + 1, fee.size());
    for (size_t i = 0; i < n; ++i) {
        if (i > 0) {
            sum += probs[i - 1];
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

void cost_model::observe(int32_t n, double t_verify, double t_draft, double expected, bool built) {
    n = size_of(n);
    if (!adapt || n < 1 || n > n_max()) {
        return;
    }
    const bool is_usual = graphs.see(n, built);

    ++n_seen;

    const bool follows = last_n > 1;
    last_n             = n;
    if (!is_usual) {
        return;
    }
    if (follows) {
        const double excess = n == 1 ? std::clamp(t_verify - verify(1), 0.0, verify(1)) : 0.0;
        change += (excess - change) / 16.0;
    }

    // the first pass of a size builds its graph, whoever ran it
    if (n_timed[n - 1]++ == 0) {
        return;
    }

    // the first timings of a size say more than the table, which may come from another machine
    const bool is_new = n_timed[n - 1] <= 4;

    const auto error = [&](double t, double predicted) {
        const double cut = is_new ? 2 * log_cut : log_cut;
        return std::clamp(std::log(std::max(t, 1.0) / predicted), -cut, cut);
    };

    if (n == 1 && follows) {
        return;
    }
    if (n == 1) {
        // long not timed: this timing says more than the estimate
        const bool   wanted = wants_plain();
        const double e      = error(t_verify, verify(1));
        const double d      = e * (is_new || plain_age() > 64 || wanted ? 0.5 : rate);
        // larger passes were timed since: they are known, whatever the speed of the machine is now thought to be
        if (plain_age() > 1) {
            batched -= d;
            drafts -= d;
        }
        // far off: once more, and if need be again
        n_again = n_again > 0 ? n_again - 1 : wanted ? 3 : 0;
        n_again = std::fabs(e) > log_surprise / 2 ? n_again : 0;
        speed += d;
        batched_ref = batched;
        last_plain  = n_seen;
        return;
    }

    const double d = error(t_verify, verify(n) - change) * (is_new ? 0.5 : rate);
    batched += d / 2;
    own[n - 1] += d / 2;

    if (expected > 0.0) {
        drafts += error(t_draft, expected) * (is_new ? 0.5 : rate);
    }
}

bool cost_model::wants_plain() const {
    return adapt && (n_again > 0 || (plain_age() > 8 && std::fabs(batched - batched_ref) > log_surprise));
}

} // namespace entmtp
