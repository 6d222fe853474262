#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

// the bank's expectation weighs as much as this many expected tokens that were seen; for a bin, against all bins
static constexpr double prior_all = 12.0;
static constexpr double prior_bin = 16.0;

// memories are long, not endless: texts change
static constexpr double forget_all   = 1.0 - 1.0 / 48.0;
static constexpr double forget_bin   = 1.0 - 1.0 / 96.0;
static constexpr double forget_price = 1.0 - 1.0 / 256.0;

// In company a node costs more than its place in the pass: all wait while one text walks its tree and moves its cells
static constexpr double company_margin = 1.3;

// plain decoding is what must never be lost to: it is timed again after so many steps, whatever it is thought to cost
static constexpr int64_t n_retime = 512;

scheduler::scheduler(const entmtp_policy_params & p, int32_t n_trees) :
    policy(p.policy), static_tree(p.static_tree), score(p.score), criterion(p.criterion), ema_window(p.ema_window),
    adapt(p.adapt), n_trees(n_trees) {
    const auto require = [](bool ok, const char * what) {
        if (!ok) {
            throw std::runtime_error(what);
        }
    };

    require(policy >= ENTMTP_POLICY_OFF && policy <= ENTMTP_POLICY_AUTO, "policy: unknown number");
    require(policy != ENTMTP_POLICY_STATIC || (static_tree >= 0 && static_tree < n_trees),
            "policy: static_tree is not in the bank");

    if (policy <= ENTMTP_POLICY_STATIC) {
        adapt = false;
        return;
    }

    require(ema_window >= 1.0f && ema_window <= 1e6f, "policy: ema_window must be 1 to 1000000 tokens");
    require(p.n_bins >= 1 && p.n_bins <= 1024 && (p.n_bins == 1 || p.bin_edges), "policy: no bins");
    for (int32_t b = 0; b + 1 < p.n_bins; ++b) {
        require(std::isfinite(p.bin_edges[b]) && (b == 0 || p.bin_edges[b] > p.bin_edges[b - 1]),
                "policy: bin_edges must increase");
        edges.push_back(p.bin_edges[b]);
    }

    if (policy == ENTMTP_POLICY_LADDER || policy == ENTMTP_POLICY_HYSTERESIS) {
        const size_t n_rungs = policy == ENTMTP_POLICY_LADDER ? (size_t) p.n_bins : 2;
        require(p.ladder && (policy == ENTMTP_POLICY_LADDER || p.n_bins == 3),
                "policy: a ladder needs a tree per bin, hysteresis two edges");
        for (size_t i = 0; i < n_rungs; ++i) {
            require(p.ladder[i] >= 0 && p.ladder[i] < n_trees,
                    "policy: the ladder names a tree that is not in the bank");
            ladder.push_back(p.ladder[i]);
        }
    }
    require(score >= ENTMTP_SCORE_ENTROPY && score <= ENTMTP_SCORE_PATH, "policy: unknown score");

    if (is_published()) {
        adapt = false;
    }
    if (policy != ENTMTP_POLICY_LADDER && policy != ENTMTP_POLICY_HYSTERESIS) {
        require(p.costs, "policy: no costs");
        now.cost = cost_model(*p.costs, n_trees, adapt);
    }

    if (policy == ENTMTP_POLICY_ENTROPY) {
        require(p.expected, "policy: entropy needs expected acceptance");
        require(criterion == ENTMTP_CRITERION_RATIO || criterion == ENTMTP_CRITERION_PRICE,
                "policy: unknown criterion");
        for (int32_t i = 0; i < p.n_bins * n_trees; ++i) {
            require(p.expected[i] >= 0.0f && std::isfinite(p.expected[i]),
                    "policy: expected acceptance must be a number not below 0");
            table.push_back(p.expected[i]);
        }
        by_bin.resize(p.n_bins);
    }

    if (policy == ENTMTP_POLICY_CONFIDENCE) {
        require(p.calibration, "policy: confidence needs a calibration");
        trees = grower(*p.calibration, adapt);
    }
    if (policy == ENTMTP_POLICY_AUTO) {
        drafters = p.drafters & (from_text | from_rows | from_heads | from_model);
        require(!(drafters & from_heads) || p.calibration, "policy: heads need a calibration to be mixed with others");
        all_drafters = mixer(drafters & from_heads ? p.calibration : nullptr, p.acceptance, adapt);
    }
}

int32_t scheduler::bin_of(float x) const {
    return (int32_t) (std::upper_bound(edges.begin(), edges.end(), x) - edges.begin());
}

double scheduler::expected(int32_t b, int32_t tree) const {
    const double f_all = (prior_all + all.accepted) / (prior_all + all.expected);
    const double f_bin = (prior_bin * f_all + by_bin[b].accepted) / (prior_bin + by_bin[b].expected);
    return f_bin * table[(size_t) b * n_trees + tree];
}

// tokens per time: what the last steps reached, and never less than plain decoding
double scheduler::price() const {
    static constexpr double prior = 16.0; // plain steps
    if (with.n_others > 0) {
        const int32_t n = with.n_others + 1;
        return company_margin * std::max((double) n / now.cost.verify(n), with.price);
    }
    const double plain = now.cost.plain();
    return std::max(1.0 / plain, (prior + tokens_seen) / (prior * plain + time_seen));
}

int32_t scheduler::choose_entropy(float running, int32_t n_max, const std::vector<int32_t> & n_nodes) {
    bin = bin_of(running);

    const double per_us = price();

    int32_t best       = -1;
    double  best_score = 0.0;
    for (int32_t t = 0; t < n_trees; ++t) {
        const bool is_plain = n_nodes[t] == 1;
        if (n_nodes[t] > n_max || (is_plain ? verdict == guard::verdict::must : verdict == guard::verdict::must_not)) {
            continue;
        }
        const double gain = 1.0 + expected(bin, t);
        const double time = step_cost(t, n_nodes[t]);
        const double x    = criterion == ENTMTP_CRITERION_RATIO ? gain / time : gain - time * per_us;
        if (best < 0 || x > best_score) {
            best       = t;
            best_score = x;
        }
    }
    return std::max(best, 0);
}

int32_t scheduler::choose_published(float                        x,
                                    int32_t                      n_max,
                                    const std::vector<int32_t> & n_nodes,
                                    const std::vector<int32_t> & depth) {
    int32_t tree = 0;
    if (policy == ENTMTP_POLICY_LADDER) {
        tree = ladder[bin_of(x)];
    } else if (policy == ENTMTP_POLICY_HYSTERESIS) {
        if (x < edges[0]) {
            rung = 0;
        } else if (x > edges[1]) {
            rung = 1;
        }
        tree = ladder[rung];
    } else {
        double best = 0.0;
        for (int32_t t = 0; t < n_trees; ++t) {
            double accept = score == ENTMTP_SCORE_ENTROPY ? std::exp(-x) : 1.0 - x;
            if (score == ENTMTP_SCORE_PATH && depth.back() > 0) {
                accept = std::pow(accept, 1.0 / *std::max_element(depth.begin(), depth.end()));
            }
            double tokens = 1.0;
            for (int32_t d = 1; d <= depth[t]; ++d) {
                tokens += std::pow(accept, d);
            }
            const double gain = tokens / step_cost(t, n_nodes[t]);
            if (n_nodes[t] <= n_max && gain > best) {
                best = gain;
                tree = t;
            }
        }
    }
    return n_nodes[tree] <= n_max ? tree : 0;
}

int32_t scheduler::choose(const entmtp_signals &       s,
                          float                        running,
                          float                        path,
                          int32_t                      n_max,
                          const std::vector<int32_t> & n_nodes,
                          const std::vector<int32_t> & depth) {
    if (policy == ENTMTP_POLICY_OFF) {
        return 0;
    }
    if (policy == ENTMTP_POLICY_STATIC) {
        return n_nodes[static_tree] <= n_max ? static_tree : 0;
    }
    if (is_published()) {
        const float x = score == ENTMTP_SCORE_ENTROPY ? running
                        : score == ENTMTP_SCORE_TOP1  ? 1.0f - s.top1
                                                      : 1.0f - path;
        return choose_published(x, n_max, n_nodes, depth);
    }

    ++n_steps;
    verdict = guard::verdict::free;
    if (adapt) {
        // two plain steps: the first one may find its graph gone. In company no step is one
        if (with.n_others == 0 && (now.cost.wants_plain() || now.cost.plain_age() > n_retime || n_steps <= 2)) {
            return 0;
        }
        verdict = mixes() ? guard::verdict::free : now.keep.next();
    }

    if (mixes()) {
        allowed = drafters;
        forced  = 0;
        for (int32_t i = 0; i < n_sources && adapt; ++i) {
            const guard::verdict v = now.keep_each[i].next();
            allowed &= v == guard::verdict::must_not ? ~(1u << i) : ~0u;
            // what costs nothing is judged whether it is verified or not: it needs no trial
            const bool costs = (1u << i) & (from_heads | from_model);
            forced |= v == guard::verdict::must && costs ? drafters & (1u << i) : 0u;
        }
        return n_max < 2 ? 0 : grow_tree;
    }
    if (policy == ENTMTP_POLICY_CONFIDENCE) {
        return verdict == guard::verdict::must_not || n_max < 2 ? 0 : grow_tree;
    }
    return choose_entropy(running, n_max, n_nodes);
}

const std::vector<grower::node> & scheduler::grow(const entmtp_signals &    s,
                                                  float                     running,
                                                  int32_t                   n_max,
                                                  int32_t                   n_heads,
                                                  bool                      sees_path,
                                                  const grower::expand_fn & expand) {
    return trees.grow(s, running, now.cost, price(), n_max, n_heads, sees_path, verdict == guard::verdict::must,
                      expand);
}

const std::vector<mixer::node> & scheduler::mix(const text_index &         text,
                                                const successors &         rows,
                                                const entmtp_signals &     s,
                                                float                      running,
                                                int32_t                    n_max,
                                                int32_t                    n_heads,
                                                bool                       sees_path,
                                                const mixer::expand_fn &   expand,
                                                const mixer::asked_model & model) {
    return all_drafters.grow(
        { text, rows, s, running, now.cost, price(), n_max, n_heads, sees_path, allowed, forced, with.n_others, chain },
        expand, model);
}

// what each drafter saved: its accepted tokens, less its share of the pass and what it took itself; in plain steps, of
// which one more in company is a step of all
void scheduler::observe_each(int32_t n_nodes, const std::vector<int32_t> & path, double t_heads, int32_t n_others) {
    const int32_t * n_by                  = all_drafters.n_nodes_by();
    const double    t_more                = now.cost.verify(n_others + n_nodes) - now.cost.verify(n_others + 1);
    const double    t_plain               = now.cost.verify(n_others + 1) / (n_others + 1);
    int32_t         n_accepted[n_sources] = {};
    for (size_t i = 1; i < path.size(); ++i) {
        n_accepted[first_of(all_drafters.sources_of(path[i]))]++;
    }
    for (int32_t i = 0; i < n_sources; ++i) {
        const bool   is_heads = i == first_of(from_heads), is_model = i == first_of(from_model);
        const double own = is_heads ? t_heads : is_model ? all_drafters.model_cost() : 0.0;
        const bool   drafted =
            n_by[i] > 0 || (is_heads && all_drafters.heads_ran()) || (is_model && all_drafters.model_ran());
        const double t      = t_more * n_by[i] / std::max(n_nodes - 1, 1) + own;
        // one that ran and brought nothing into the tree has lost for certain, not by chance
        const double margin = own > 0.0 && n_by[i] == 0 ? guard::allowance : 0.0;
        now.keep_each[i].observe(drafted, n_accepted[i] - t / t_plain - margin);
    }
}

void scheduler::observe(int32_t tree, int32_t n_nodes, const outcome & o) {
    const auto & [path, hit, next, t_draft, t_verify, n_others, timed, built] = o;
    if (policy != ENTMTP_POLICY_ENTROPY && policy != ENTMTP_POLICY_CONFIDENCE && !mixes()) {
        return;
    }
    if (mixes()) {
        const bool   mixed   = tree == grow_tree;
        const double t_heads = mixed ? all_drafters.draft_cost() : 0.0;

        if (timed) {
            now.cost.observe(n_others + n_nodes, t_verify, t_draft, t_heads, built);
        }
        if (n_others == 0) {
            tokens_seen = forget_price * tokens_seen + (double) path.size();
            time_seen   = forget_price * time_seen + now.cost.verify(n_nodes) + t_heads +
                          (mixed ? all_drafters.model_cost() : 0.0);
        }

        if (!mixed) {
            all_drafters.skip();
            return;
        }
        if (adapt) {
            observe_each(n_nodes, path, t_heads, n_others);
        }
        all_drafters.observe(path, next);
        return;
    }

    const bool   grown    = policy == ENTMTP_POLICY_CONFIDENCE && tree != 0;
    const bool   drafted  = grown ? trees.drafted() : n_nodes > 1;
    const double believed = grown ? trees.draft_cost() : drafted ? now.cost.draft(tree) : 0.0;

    now.cost.observe(n_nodes, t_verify, t_draft, believed, built);

    tokens_seen = forget_price * tokens_seen + (double) path.size();
    time_seen   = forget_price * time_seen + now.cost.verify(n_nodes) + believed;

    if (policy == ENTMTP_POLICY_CONFIDENCE) {
        if (grown) {
            trees.observe(path, hit);
        } else {
            trees.skip();
        }
    }

    if (!adapt) {
        return;
    }

    // by what a pass of this size costs, not by this one's timing: a hiccup of the machine is no verdict on the draft
    now.keep.observe(drafted, (double) path.size() - (now.cost.verify(n_nodes) + believed) / now.cost.plain());

    if (drafted && !grown) {
        const double e   = table[(size_t) bin * n_trees + tree];
        const double got = (double) path.size() - 1.0;

        all.accepted = forget_all * all.accepted + got;
        all.expected = forget_all * all.expected + e;

        by_bin[bin].accepted = forget_bin * by_bin[bin].accepted + got;
        by_bin[bin].expected = forget_bin * by_bin[bin].expected + e;
    }
}

void scheduler::set_threads(int32_t n, const entmtp_costs * costs, int32_t n_trees) {
    if (n == n_threads || now.cost.n_max() == 0) { // a policy without costs
        return;
    }
    if (n_threads > 0) {
        const auto known = others.find(n);
        pace       next  = known != others.end() ? known->second : pace{};
        if (known == others.end()) {
            next.cost = costs ? cost_model(*costs, n_trees, adapt) : now.cost;
        }
        others[n_threads] = std::move(now);
        now               = std::move(next);
    }
    n_threads   = n;
    tokens_seen = 0.0; // per time, with other threads
    time_seen   = 0.0;
}

void scheduler::begin_text() {
    rung = 0;
    now.keep.begin_text();
    for (guard & g : now.keep_each) {
        g.begin_text();
    }
    all_drafters.begin_text();
    trees.begin_text();
}

} // namespace entmtp
