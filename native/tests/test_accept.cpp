// Typical acceptance against a brute-force search over all paths.

#include "accept.h"

#include "check.h"
#include "random_tree.h"

using entmtp::tree;
using entmtp::typical_params;

struct distribution {
    std::vector<double> p;
    double              entropy = 0.0;
};

static distribution softmax(const std::vector<float> & logits, double temp) {
    const double max = *std::max_element(logits.begin(), logits.end());

    distribution d;
    double       sum = 0.0;
    for (const float l : logits) {
        d.p.push_back(std::exp((l - max) / temp));
        sum += d.p.back();
    }
    for (double & p : d.p) {
        p /= sum;
        d.entropy -= p > 0.0 ? p * std::log(p) : 0.0;
    }
    return d;
}

// every path from the root, checked token by token. false if rounding could decide
static bool brute_force(const tree &                            t,
                        const std::vector<int32_t> &            tokens,
                        const std::vector<std::vector<float>> & logits,
                        const typical_params &                  p,
                        std::vector<int32_t> &                  best) {
    double best_p = 1.0;
    best          = { 0 };

    for (int32_t leaf = 1; leaf < t.n_nodes(); ++leaf) {
        std::vector<int32_t> path;
        for (int32_t i = leaf; i >= 0; i = t.parent[i]) {
            path.insert(path.begin(), i);
        }

        bool   is_typical = true;
        double path_p     = 1.0;
        for (size_t i = 1; i < path.size(); ++i) {
            const distribution d = softmax(logits[path[i - 1]], p.temp);

            const double q         = d.p[tokens[path[i]]];
            const double threshold = std::min((double) p.epsilon, p.alpha * std::exp(-d.entropy));
            if (std::fabs(q - threshold) < 1e-4 * threshold) {
                return false;
            }
            is_typical = is_typical && q > threshold;
            path_p *= q;
        }

        const bool is_longer = path.size() > best.size();
        const bool is_equal  = path.size() == best.size();
        if (!is_typical || path.size() < best.size()) {
            continue;
        }
        if (is_equal && std::fabs(path_p - best_p) < 1e-4 * best_p) {
            return false;
        }
        if (is_longer || (is_equal && path_p > best_p)) {
            best   = path;
            best_p = path_p;
        }
    }
    return true;
}

static void test_random() {
    constexpr int32_t n_vocab = 17;

    std::mt19937 rng(1);
    int          n_compared = 0;
    size_t       n_accepted = 0;

    for (int round = 0; round < 2000; ++round) {
        const tree t = random_tree(rng, 1 + (int32_t) (rng() % 24)).make();

        std::normal_distribution<float> normal(0.0f, 0.2f + (float) (rng() % 40) / 10.0f);

        std::vector<int32_t>            tokens(t.n_nodes());
        std::vector<std::vector<float>> logits(t.n_nodes(), std::vector<float>(n_vocab));
        for (int32_t i = 0; i < t.n_nodes(); ++i) {
            tokens[i] = (int32_t) (rng() % n_vocab);
            for (auto & l : logits[i]) {
                l = rng() % 20 ? normal(rng) : -INFINITY;
            }
            logits[i][0] = normal(rng); // never all at -inf
        }

        typical_params p;
        p.temp = 0.2f + (float) (rng() % 20) / 10.0f;
        if (round % 2) {
            p.epsilon = 0.01f + (float) (rng() % 50) / 100.0f;
            p.alpha   = 0.05f + (float) (rng() % 90) / 100.0f;
        }

        std::vector<bool> asked(t.n_nodes());
        const auto        path = entmtp::typical_path(t, tokens, n_vocab, p, [&](int32_t node) {
            asked[node] = true;
            return logits[node].data();
        });

        std::vector<int32_t> expected;
        if (!brute_force(t, tokens, logits, p, expected)) {
            continue;
        }
        CHECK(path == expected);
        n_compared++;
        n_accepted += path.size() - 1;

        // leaves are never asked for their logits
        for (int32_t i = 0; i < t.n_nodes(); ++i) {
            CHECK(!asked[i] || t.slot[i] >= 0);
        }
    }

    CHECK(n_compared > 1000); // siblings with equal tokens are not compared
    CHECK(n_accepted > 1000);
}

static void test_edges() {
    const std::vector<int32_t> parent = { -1, 0, 0 };
    const std::vector<int32_t> rank   = { 0, 0, 1 };
    const tree                 t      = entmtp::make_tree(parent.data(), rank.data(), 3);

    const std::vector<float> logits = { 0.0f, 10.0f, 9.0f, -INFINITY };
    const auto               row    = [&](int32_t) {
        return logits.data();
    };

    // temperature 0 stands for the most probable token alone
    typical_params p;
    p.temp = 0.0f;
    CHECK(entmtp::typical_path(t, { 0, 2, 1 }, 4, p, row) == (std::vector<int32_t>{ 0, 2 }));
    CHECK(entmtp::typical_path(t, { 0, 2, 0 }, 4, p, row) == (std::vector<int32_t>{ 0 }));

    // no threshold: everything that is possible at all
    p         = {};
    p.epsilon = 0.0f;
    CHECK(entmtp::typical_path(t, { 0, 0, 3 }, 4, p, row) == (std::vector<int32_t>{ 0, 1 }));
    CHECK(entmtp::typical_path(t, { 0, 3, 3 }, 4, p, row) == (std::vector<int32_t>{ 0 }));

    // equal tokens: the first
    CHECK(entmtp::typical_path(t, { 0, 1, 1 }, 4, {}, row) == (std::vector<int32_t>{ 0, 1 }));
}

int main() {
    test_random();
    test_edges();
    return check_result("test_accept");
}
