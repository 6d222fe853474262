// Trees from several drafters: the rules every tree obeys, what is learned, and the acceptance model by itself.

#include "mixer.h"

#include "check.h"
#include "policies.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <vector>

using entmtp::acceptance;
using entmtp::cost_model;
using entmtp::from_heads;
using entmtp::from_model;
using entmtp::from_rows;
using entmtp::from_text;
using entmtp::mixer;
using entmtp::proposal_signals;
using entmtp::successors;
using entmtp::text_index;

static constexpr uint32_t everyone = from_text | from_rows | from_heads | from_model;
static constexpr int32_t  n_vocab  = 50;

// a text, rows, and what heads would guess: all random
struct world {
    policy_bank  bank;
    cost_model   cost;
    text_index   text;
    successors   rows;
    std::mt19937 rng;

    plain_calibration        cal{ 3 };
    const entmtp_calibration cal_params = cal.params();

    world(uint32_t seed, float slope) : rng(seed) {
        bank.set_costs(1000.0f, slope, 60.0f);
        cost = cost_model(*bank.costs(), 1, false);
        for (int32_t i = 0; i < 120; ++i) {
            text.append((int32_t) (rng() % 9));
        }
        for (int32_t t = 0; t < 30; ++t) {
            int32_t best[successors::k];
            float   log_p[successors::k];
            for (int32_t i = 0; i < successors::k; ++i) {
                best[i]  = (t * 7 + i * 3) % n_vocab;
                log_p[i] = -0.3f - (float) i - (float) (rng() % 100) / 100.0f;
            }
            rows.see(n_vocab, t, best, log_p, successors::k);
        }
    }

    mixer::expand_fn heads() {
        return [this](int32_t l, const std::vector<int32_t> & paths, int32_t n, int32_t * tokens, float * log_p) {
            CHECK_EQ((int32_t) paths.size(), n * (l + 1));
            for (int32_t c = 0; c < n; ++c) {
                CHECK_EQ(paths[(size_t) c * (l + 1)], text.back());
                for (int32_t r = 0; r < mixer::n_guess; ++r) {
                    tokens[c * mixer::n_guess + r] = (paths[(size_t) c * (l + 1) + l] * 5 + r * 11 + l) % n_vocab;
                    log_p[c * mixer::n_guess + r]  = -0.2f - 0.9f * (float) r;
                }
            }
        };
    }

    // a model that goes on from every path, at the price of a token and a half
    mixer::asked_model model() {
        return { 6, [](int32_t) { return 60.0; },
                 [this](const std::vector<int32_t> & path, int32_t * tokens, float * log_p) {
                     const int32_t last = path.empty() ? text.back() : path.back();
                     for (int32_t r = 0; r < mixer::n_guess; ++r) {
                         tokens[r] = (last * 3 + r * 7 + (int32_t) path.size()) % n_vocab;
                         log_p[r]  = -0.1f - 1.1f * (float) r;
                     }
                     return true;
                 } };
    }

    mixer::situation now(uint32_t allowed, uint32_t forced = 0, int32_t n_max = 64) {
        return { text, rows, { 1.0f, 0.5f, -0.5f }, 1.0f, cost, 1e-3, n_max, 3, true, allowed, forced };
    }
};

static void check_tree(const std::vector<mixer::node> & nodes, uint32_t allowed, int32_t n_max) {
    CHECK((int32_t) nodes.size() < n_max);
    std::set<std::pair<int32_t, int32_t>> children;
    for (size_t i = 0; i < nodes.size(); ++i) {
        const auto & node = nodes[i];
        CHECK(node.parent >= 0 && node.parent <= (int32_t) i); // parents first
        CHECK_EQ(node.depth, node.parent == 0 ? 1 : nodes[node.parent - 1].depth + 1);
        CHECK(i == 0 || node.depth >= nodes[i - 1].depth);     // breadth first
        CHECK(node.token >= 0 && node.token < n_vocab);
        CHECK(node.sources != 0 && (node.sources & ~allowed) == 0);
        CHECK(children.insert({ node.parent, node.token }).second);
    }
}

static void test_rules() {
    size_t n_drafted = 0;
    for (uint32_t seed = 0; seed < 200; ++seed) {
        world w(seed, seed % 3 ? 20.0f : 300.0f);
        mixer m(&w.cal_params, nullptr, true);
        for (int32_t step = 0; step < 20; ++step) {
            const uint32_t allowed = w.rng() % (everyone + 1);
            const int32_t  n_max   = 2 + (int32_t) (w.rng() % 40);
            auto           now     = w.now(allowed, w.rng() % 5 == 0 ? everyone & allowed : 0u, n_max);
            now.chain              = seed % 4 == 0;
            const auto nodes       = m.grow(now, w.heads(), w.model());
            check_tree(nodes, allowed, n_max);
            for (size_t i = 0; i < nodes.size() && now.chain; ++i) {
                CHECK_EQ(nodes[i].parent, (int32_t) i);
            }
            n_drafted += nodes.size();

            // a walk that a verify pass could have taken
            std::vector<int32_t> path{ 0 };
            for (size_t i = 0; i < nodes.size(); ++i) {
                if (nodes[i].parent == path.back() && w.rng() % 2) {
                    path.push_back((int32_t) i + 1);
                }
            }
            m.observe(path, w.rng() % 4 ? (int32_t) (w.rng() % n_vocab) : -1);
            for (const int32_t at : path) {
                w.text.append(at ? nodes[at - 1].token : (int32_t) (w.rng() % 9));
            }
        }
    }
    CHECK(n_drafted > 1000);
}

static void test_a_repeated_text_is_drafted_and_a_dear_pass_is_not() {
    for (const float slope : { 20.0f, 5000.0f }) {
        world w(1, slope);
        for (int32_t round = 0; round < 3; ++round) {
            for (int32_t i = 10; i < 40; ++i) {
                w.text.append(i);
            }
        }
        w.text.append(10);
        w.text.append(11);
        mixer      m(nullptr, nullptr, true);
        const auto nodes = m.grow(w.now(from_text), w.heads(), {});
        if (slope > 1000.0f) {
            CHECK(nodes.empty());
            continue;
        }
        CHECK(nodes.size() >= 3);
        for (size_t i = 0; i < std::min<size_t>(nodes.size(), 3); ++i) {
            CHECK_EQ(nodes[i].token, 12 + (int32_t) i);
            CHECK_EQ(nodes[i].parent, (int32_t) i);
            CHECK_EQ(nodes[i].sources, (uint32_t) from_text);
        }
    }
}

// planted repeats that always go on in another way: drafts must stop
static void test_a_text_made_to_mislead() {
    world        w(2, 150.0f);
    mixer        m(nullptr, nullptr, true);
    std::mt19937 rng(5);
    int32_t      early = 0, late = 0;
    for (int32_t step = 0; step < 2000; ++step) {
        for (int32_t i = 0; i < 6; ++i) {
            w.text.append(20 + i);
        }
        const auto nodes = m.grow(w.now(from_text), w.heads(), {});
        if (step < 40) {
            early += (int32_t) nodes.size();
        } else if (step >= 1900) {
            late += (int32_t) nodes.size();
        }
        const int32_t next = 1000 + step; // never seen before
        m.observe({ 0 }, next);
        w.text.append(next);
    }
    CHECK(early > 0);
    CHECK_EQ(late, 0);
}

static void test_heads_are_not_run_where_the_text_is_sure() {
    world w(3, 20.0f);
    for (int32_t round = 0; round < 6; ++round) {
        for (int32_t i = 10; i < 40; ++i) {
            w.text.append(i);
        }
    }
    w.text.append(10);
    w.text.append(11);
    float sure[acceptance::n_sets][acceptance::n_inputs] = {};
    for (auto & set : sure) {
        set[0] = 6.0f; // whatever is proposed will come
    }
    int32_t    n_runs = 0;
    const auto count  = [&](int32_t l, const std::vector<int32_t> & paths, int32_t n, int32_t * tokens, float * log_p) {
        ++n_runs;
        w.heads()(l, paths, n, tokens, log_p);
    };
    mixer m(&w.cal_params, &sure[0][0], false);
    CHECK(!m.grow(w.now(everyone), count, w.model()).empty());
    CHECK_EQ(n_runs, 0);
    CHECK(!m.heads_ran() && !m.model_ran());
    m.grow(w.now(from_heads), count, w.model()); // nobody else: they are asked
    CHECK(n_runs > 0 && m.heads_ran());
    CHECK(m.draft_cost() > 0.0);
}

// a model is asked token by token down one path, for as long as it is sure enough and its pass is cheap enough
static void test_a_model_is_asked_while_it_pays() {
    float as_it_says[acceptance::n_sets][acceptance::n_inputs] = {};
    for (uint32_t set = 1; set <= everyone; ++set) {
        as_it_says[set][0]  = set & from_model ? 0.0f : -9.0f;
        as_it_says[set][12] = 1.0f; // logit of its p
        as_it_says[set][13] = -1.0f;
    }

    const auto n_asked = [&](float log_p, double us) {
        world              w(4, 20.0f);
        mixer              m(nullptr, &as_it_says[0][0], false);
        int32_t            n = 0;
        mixer::asked_model model{ 8, [us](int32_t) { return us; },
                                  [&](const std::vector<int32_t> & path, int32_t * tokens, float * best) {
                                      CHECK_EQ((int32_t) path.size(), n++);
                                      for (int32_t r = 0; r < mixer::n_guess; ++r) {
                                          tokens[r] = r == 0 ? n : 30 + r;
                                          best[r]   = r == 0 ? log_p : -9.0f;
                                      }
                                      return true;
                                  } };
        for (int32_t i = 0; i < 20; ++i) { // it is known by then what it says
            n                = 0;
            const auto nodes = m.grow(w.now(from_model), w.heads(), model);
            CHECK(nodes.empty() || nodes[0].sources == from_model);
            CHECK(!m.model_ran() || m.model_cost() >= us);
        }
        return n;
    };
    CHECK_EQ(n_asked(-0.01f, 10.0), 8);   // sure, and cheap: as deep as it goes
    CHECK(n_asked(-0.5f, 100.0) < 8);     // p = 0.6: not for long
    CHECK_EQ(n_asked(-0.01f, 5000.0), 0); // a pass of its own is dearer than the model's
    CHECK_EQ(n_asked(-3.0f, 200.0), 0);   // never right
}

//
// the acceptance model
//

static proposal_signals random_signals(std::mt19937 & rng) {
    const auto u = [&] {
        return (float) (rng() % 1000) / 1000.0f;
    };
    proposal_signals s;
    s.length  = 2.0f + 60.0f * u();
    s.share   = 0.05f + 0.95f * u();
    s.rank    = (float) (rng() % 4);
    s.row     = -5.0f * u() - 0.01f;
    s.model   = -4.0f * u() - 0.01f;
    s.head    = 6.0f * u() - 3.0f;
    s.entropy = 4.0f * u();
    s.depth   = 1.0f + (float) (rng() % 6);
    return s;
}

// it comes to know a probability that is a function of what it sees, and only of the set that was seen
static void test_it_learns() {
    std::mt19937 rng(9);
    acceptance   model;
    acceptance   untouched;
    const auto   truth = [](const proposal_signals & s) {
        return 1.0f /
               (1.0f + std::exp(-(1.5f * std::log(s.share) + 0.4f * std::log2(s.length) + 0.5f - 0.5f * s.entropy)));
    };
    double before = 0.0, after = 0.0;
    for (int32_t i = 0; i < 42000; ++i) {
        const proposal_signals s = random_signals(rng);
        const float            e = std::fabs(model.probability(from_text, s) - truth(s));
        (i < 1000 ? before : after) += i < 1000 || i >= 41000 ? e / 1000.0 : 0.0;
        model.observe(from_text, s, (float) (rng() % 100000) / 100000.0f < truth(s));
        const float p = model.probability(from_text, s);
        CHECK(p >= 0.0f && p <= 1.0f);
    }
    CHECK(before > 0.1);
    CHECK(after < 0.06);
    const proposal_signals s = random_signals(rng);
    CHECK_EQ(model.probability(from_rows, s), untouched.probability(from_rows, s));
    CHECK_EQ(model.probability(everyone, s), untouched.probability(everyone, s));
}

static void test_odd_signals() {
    acceptance       model;
    proposal_signals s;
    s.row = s.model = 0.0f; // p = 1
    s.head          = INFINITY;
    for (uint32_t set = 1; set <= everyone; ++set) {
        for (int32_t i = 0; i < 5000; ++i) {
            model.observe(set, s, i % 2 == 0);
        }
        CHECK(std::isfinite(model.probability(set, s)));
    }
    acceptance frozen(nullptr, false);
    const auto weights = frozen.get();
    frozen.observe(from_text, s, true);
    CHECK(frozen.get() == weights);
}

// other weights than the library's, samples as they were judged, and inputs that are left out
static void test_weights_and_studies() {
    std::vector<float> weights(acceptance::shipped(),
                               acceptance::shipped() + acceptance::n_sets * acceptance::n_inputs);
    acceptance         model;
    CHECK(model.get() == weights);
    for (float & w : weights) {
        w += 0.25f;
    }
    model.set(weights.data());
    CHECK(model.get() == weights);
    CHECK(acceptance(weights.data(), false).get() == weights);
    weights[7] = NAN;
    CHECK_THROWS(model.set(weights.data()), "no number");
    CHECK(std::isfinite(model.get()[7]));

    std::mt19937           rng(3);
    const proposal_signals s    = random_signals(rng);
    float                  said = 0.0f;
    int32_t                n    = 0;
    model.study(0, [&](uint32_t set, const float * x, float p, bool right) {
        float z = 0.0f;
        for (int32_t i = 0; i < acceptance::n_inputs; ++i) {
            z += model.get()[(size_t) set * acceptance::n_inputs + i] * x[i];
        }
        CHECK(std::fabs(p - entmtp::sigmoid(z)) < 1e-6f); // of before it was learned from
        CHECK(right);
        said = p;
        ++n;
    });
    const float before = model.probability(from_text | from_rows, s);
    model.observe(from_text | from_rows, s, true);
    CHECK_EQ(n, 1);
    CHECK_EQ(said, before);
    CHECK(model.probability(from_text | from_rows, s) > before);

    // all inputs but the first: one answer to everything
    model.study((1u << acceptance::n_inputs) - 2, nullptr);
    CHECK_EQ(model.probability(from_text, random_signals(rng)), model.probability(from_text, random_signals(rng)));
    // and no agreement: the first drafter's
    model.study(1u << acceptance::n_inputs, nullptr);
    proposal_signals text = random_signals(rng), both = text;
    text.row  = -1.0f;
    both.row  = -4.0f;
    both.head = 2.0f;
    CHECK_EQ(model.probability(from_text, text), model.probability(everyone, both));
}

int main() {
    test_rules();
    test_a_repeated_text_is_drafted_and_a_dear_pass_is_not();
    test_a_text_made_to_mislead();
    test_heads_are_not_run_where_the_text_is_sure();
    test_a_model_is_asked_while_it_pays();
    test_it_learns();
    test_odd_signals();
    test_weights_and_studies();
    return check_result("test_mixer");
}
