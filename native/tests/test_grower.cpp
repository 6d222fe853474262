// Trees grown from probabilities: against brute force, and against the rules every tree obeys.

#include "grower.h"

#include "check.h"
#include "policies.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <set>

using entmtp::cost_model;
using entmtp::grower;

static constexpr int32_t n_levels = 4;
static constexpr int32_t k        = grower::n_guess;

// guesses of random heads: [level][column][k] ln p, decreasing in each column
struct random_heads {
    std::vector<float> log_p = std::vector<float>((size_t) n_levels * grower::max_width * k);

    random_heads(std::mt19937 & rng, float sharpness) {
        std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
        for (size_t i = 0; i < log_p.size(); i += k) {
            float rest = 1.0f;
            for (int32_t r = 0; r < k; ++r) {
                const float p = rest * std::pow(uniform(rng), 1.0f / sharpness);
                log_p[i + r]  = std::log(std::max(p, 1e-6f));
                rest -= p;
            }
            std::sort(log_p.begin() + i, log_p.begin() + i + k, std::greater<float>());
        }
    }
    const float * level(int32_t l) const { return &log_p[(size_t) l * grower::max_width * k]; }
};

static void test_paths() {
    for (int32_t l = 1; l < 6; ++l) {
        std::set<std::vector<int32_t>> seen;
        for (int32_t c = 0; c < grower::max_width; ++c) {
            std::vector<int32_t> path(l);
            entmtp::expanded_path(l, c, path.data());
            CHECK(seen.insert(path).second);
            const int32_t up = entmtp::expanded_parent(l, c);
            CHECK(up <= c); // a prefix of the order holds every parent
            if (l > 1) {
                std::vector<int32_t> parent(l - 1);
                entmtp::expanded_path(l - 1, up, parent.data());
                CHECK(std::equal(parent.begin(), parent.end(), path.begin()));
            }
        }
    }
}

static void test_rules() {
    std::mt19937            rng(3);
    const plain_calibration cal(n_levels);
    for (int i = 0; i < 2000; ++i) {
        policy_bank b;
        b.set_costs(1000.0f, 20.0f + (float) (rng() % 400), 1.0f + (float) (rng() % 200));
        const cost_model   cost(*b.costs(), 1, false);
        const random_heads heads(rng, 1.0f + (float) (rng() % 5));
        const bool         sees  = rng() % 2;
        const bool         force = rng() % 4 == 0;
        const int32_t      n_max = 1 + (int32_t) (rng() % 40);

        grower       g(cal.params(), true);
        int32_t      n_run[n_levels] = {};
        double       t_draft         = 0.0;
        const auto & nodes =
            g.grow({ 1.0f, 0.5f, -1.0f }, 1.0f, cost, 1e-3, n_max, n_levels, sees, force, [&](int32_t l, int32_t n) {
                CHECK(n == 1 || n == 2 || n == 4);
                CHECK(n_run[l] == 0 && (l == 0 || n_run[l - 1] > 0)); // in order, once
                CHECK(l != 0 || n == 1);
                CHECK(sees || n == 1);
                CHECK(l < 2 || !sees || n <= n_run[l - 1]);
                n_run[l] = n;
                t_draft += cost.level(l, n);
                return heads.level(l);
            });
        CHECK_NEAR(g.draft_cost(), t_draft, 1e-6);
        CHECK((int32_t) nodes.size() < n_max || nodes.empty());
        CHECK(!force || n_max < 2 || !nodes.empty());

        std::set<std::vector<int32_t>>    seen;
        std::vector<std::vector<int32_t>> paths = { {} };
        for (size_t j = 0; j < nodes.size(); ++j) {
            CHECK(nodes[j].parent <= (int32_t) j);
            auto path = paths[nodes[j].parent];
            CHECK_EQ(nodes[j].depth, path.size() + 1);
            CHECK(j == 0 || nodes[j].depth >= nodes[j - 1].depth);
            // it hangs from the expanded path that its column names
            std::vector<int32_t> above(path.size());
            entmtp::expanded_path((int32_t) path.size(), nodes[j].column, above.data());
            CHECK(path == above);
            path.push_back(nodes[j].rank);
            CHECK(seen.insert(path).second);
            paths.push_back(path);
        }
    }
}

// with drafts free of charge and every head run, the tree is the best of all trees over the candidates
static void test_best() {
    std::mt19937            rng(5);
    // sure to go on: heads are foreseen to be right
    const plain_calibration cal(2, { 0.99f, 0.0f, 0.0f });
    for (int i = 0; i < 200; ++i) {
        policy_bank b;
        b.set_costs(1000.0f, 0.0f, 0.0f, 16);
        for (size_t n = 1; n < b.verify.size(); ++n) {
            b.verify[n] = b.verify[n - 1] * (0.9f + 0.4f * (float) (rng() % 100) / 100.0f); // neither flat nor monotone
        }
        const cost_model   cost(*b.costs(), 1, false);
        const random_heads heads(rng, 2.0f);
        const double       price = 0.8e-3;

        grower       g(cal.params(), false);
        const auto & nodes  = g.grow({ 1.0f, 0.5f, -1.0f }, 1.0f, cost, price, 16, 2, false, true,
                                     [&](int32_t l, int32_t) { return heads.level(l); });
        double       tokens = 1.0;
        for (const auto & n : nodes) {
            double p = std::exp(heads.level(0)[n.depth == 1 ? n.rank : n.column]);
            tokens += n.depth == 1 ? p : p * std::exp(heads.level(1)[n.rank]);
        }
        const double got = tokens - price * cost.verify((int32_t) nodes.size() + 1);

        // brute force over shapes: n1 guesses on the first level, and below each of the first 4 of them some guesses
        double best = -1e9;
        for (int32_t n1 = 1; n1 <= k; ++n1) {
            std::vector<double> second;
            for (int32_t c = 0; c < std::min(n1, 4); ++c) {
                for (int32_t r = 0; r < k; ++r) {
                    second.push_back(std::exp(heads.level(0)[c] + heads.level(1)[r]));
                }
            }
            std::sort(second.begin(), second.end(), std::greater<double>());
            double sum = 1.0;
            for (int32_t r = 0; r < n1; ++r) {
                sum += std::exp(heads.level(0)[r]);
            }
            for (int32_t n2 = 0; n1 + n2 < 16; ++n2) {
                best = std::max(best, sum - price * cost.verify(1 + n1 + n2));
                if (n2 < (int32_t) second.size()) {
                    sum += second[n2];
                }
            }
        }
        // the second head runs only if it is foreseen to pay, which here it nearly always is
        if (!nodes.empty() && nodes.back().depth == 2) {
            CHECK_NEAR(got, best, 1e-5);
        }
    }
}

// a head is not run where it cannot pay, and is where it must
static void test_stops() {
    policy_bank b;
    b.set_costs(1000.0f, 100.0f, 50.0f);
    const cost_model   cost(*b.costs(), 1, false);
    std::mt19937       rng(1);
    const random_heads heads(rng, 2.0f);

    const auto n_run = [&](float foreseen) {
        const plain_calibration cal(n_levels, { foreseen, 0.0f, 0.0f });
        grower                  g(cal.params(), false);
        int32_t                 n = 0;
        g.grow({ 1.0f, 0.5f, -1.0f }, 1.0f, cost, 1e-3, 64, n_levels, true, false, [&](int32_t l, int32_t) {
            ++n;
            return heads.level(l);
        });
        return n;
    };
    // one token more costs 0.1 of a token's time, its draft 0.05
    CHECK_EQ(n_run(0.10f), 0);
    CHECK(n_run(0.20f) >= 1);
    // no room, no heads
    const plain_calibration cal(n_levels);
    grower                  g(cal.params(), false);
    const auto              never = [&](int32_t, int32_t) -> const float * {
        check_failed(__FILE__, __LINE__, "a head was run");
        return heads.level(0);
    };
    CHECK(g.grow({}, 1.0f, cost, 1e-3, 1, n_levels, true, true, never).empty());
    CHECK(g.grow({}, 1.0f, cost, 1e-3, 64, 0, true, true, never).empty());
}

// heads that are never right are believed ever less
static void test_bias() {
    policy_bank b;
    b.set_costs(1000.0f, 100.0f, 10.0f);
    const cost_model         cost(*b.costs(), 1, false);
    const plain_calibration  cal(1, { 0.6f, 0.1f, 0.1f });
    grower                   g(cal.params(), true);
    const std::vector<float> guess = { std::log(0.6f), std::log(0.1f), -5, -5, -5, -5, -5, -5 };

    const auto drafts = [&](int n, bool right) {
        int count = 0;
        for (int i = 0; i < n; ++i) {
            const auto & nodes = g.grow({ 1.0f, 0.5f, -1.0f }, 1.0f, cost, 1e-3, 64, 1, true, false,
                                        [&](int32_t, int32_t) { return guess.data(); });
            count += !nodes.empty();
            g.observe(right && !nodes.empty() ? std::vector<int32_t>{ 0, 1 } : std::vector<int32_t>{ 0 }, right);
        }
        return count;
    };
    CHECK_EQ(drafts(20, true), 20);
    drafts(1500, false);
    CHECK_EQ(drafts(20, false), 0);
}

static void test_bad_calibration() {
    const float nan = std::numeric_limits<float>::quiet_NaN();

    plain_calibration cal(2);
    cal.accept[3] = nan;
    CHECK_THROWS(grower(cal.params(), true), "calibration");
    cal              = plain_calibration(2);
    cal.scenarios[1] = 1.5f;
    CHECK_THROWS(grower(cal.params(), true), "calibration");
    cal    = plain_calibration(2);
    auto p = cal.params();
    p.hits = nan;
    CHECK_THROWS(grower(p, true), "hits");
    p       = cal.params();
    p.ahead = nullptr;
    CHECK_THROWS(grower(p, true), "missing");
    p        = cal.params();
    p.n_bins = 2;
    CHECK_THROWS(grower(p, true), "missing");
}

int main() {
    test_paths();
    test_rules();
    test_best();
    test_stops();
    test_bias();
    test_bad_calibration();
    return check_result("test_grower");
}
