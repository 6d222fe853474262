// A few tokens of a row stand in for it: the same choices, draw after draw, whatever chain follows.

#include "candidates.h"
#include "tiny.h"

#include "check.h"

#include <cmath>
#include <functional>
#include <random>

static constexpr int32_t n_vocab = 3000;

using sampler_maker = std::function<llama_sampler *()>;

static tiny::sampler_ptr chain_of(const std::vector<sampler_maker> & make) {
    tiny::sampler_ptr res(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    for (const auto & m : make) {
        llama_sampler_chain_add(res.get(), m());
    }
    return res;
}

static int32_t choose(llama_sampler * chain, std::vector<llama_token_data> tokens) {
    llama_token_data_array array = { tokens.data(), tokens.size(), -1, false };
    llama_sampler_apply(chain, &array);
    const int32_t token = array.data[array.selected].id;
    llama_sampler_accept(chain, token);
    return token;
}

static std::vector<llama_token_data> all_of(const std::vector<float> & row) {
    std::vector<llama_token_data> res(row.size());
    for (size_t i = 0; i < row.size(); ++i) {
        res[i] = { (int32_t) i, row[i], 0.0f };
    }
    return res;
}

// what texts repeat, penalties find: a few tokens are far more probable than the others
static void test_choices() {
    std::mt19937                    rng(3);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    const auto                      uniform = [&](float a, float b) {
        return std::uniform_real_distribution<float>(a, b)(rng);
    };
    int32_t n_short = 0, n_whole = 0, n_raised = 0;
    for (int32_t round = 0; round < 300; ++round) {
        const float    repeat = uniform(0.9f, 1.6f), freq = uniform(-0.2f, 0.6f), present = uniform(-0.2f, 0.6f);
        const float    p = uniform(0.5f, 1.0f), temp = uniform(0.2f, 2.0f);
        const int32_t  k = 1 + (int32_t) (rng() % 70), last = 1 << (rng() % 8);
        const uint32_t seed = rng();

        std::vector<sampler_maker> make;
        if (round % 3 > 0) {
            make.push_back([=] { return llama_sampler_init_penalties(n_vocab, last, repeat, freq, present); });
        }
        if (round % 5 == 0) {
            make.push_back([] { return llama_sampler_init_greedy(); });
        } else {
            make.push_back([=] { return llama_sampler_init_top_k(k); });
            make.push_back([=] { return llama_sampler_init_typical(p, 1); });
            make.push_back([=] { return llama_sampler_init_top_p(p, 1); });
            make.push_back([=] { return llama_sampler_init_min_p(1.0f - p, 1); });
            make.push_back([=] { return llama_sampler_init_temp(temp); });
            make.push_back([=] { return llama_sampler_init_dist(seed); });
        }
        auto whole = chain_of(make), few = chain_of(make);

        const float        grid = round % 4 == 0 ? 8.0f : 0.0f; // ties, or none
        std::vector<float> base(n_vocab);
        for (float & x : base) {
            x = normal(rng) + (rng() % 50 == 0 ? 6.0f : 0.0f) - (rng() % 90 == 0 ? INFINITY : 0.0f);
        }
        for (int32_t i = 0; i < 40; ++i) {
            std::vector<float> row = base;
            for (float & x : row) {
                x += 0.3f * normal(rng);
                x = grid > 0.0f ? std::round(x * grid) / grid : x;
            }
            std::vector<llama_token_data> tokens;
            const bool                    is_short = entmtp::shortlist(few.get(), row.data(), n_vocab, tokens);
            n_short += is_short;
            n_whole += !is_short;
            n_raised +=
                is_short && round % 3 > 0 && (repeat < 1.0f || freq + present < 0.0f || (freq < 0.0f && last > 1));
            CHECK(!is_short || tokens.size() < 140);
            if (!CHECK_EQ(choose(whole.get(), all_of(row)), choose(few.get(), is_short ? tokens : all_of(row)))) {
                return;
            }
        }
    }
    CHECK(n_short > 5000);
    CHECK(n_whole > 500);
    CHECK_EQ(n_raised, 0); // where a token can become more probable, any of the row may be the one
}

static void test_what_takes_the_whole_row() {
    std::vector<float> row(n_vocab);
    for (int32_t i = 0; i < n_vocab; ++i) {
        row[i] = 0.001f * (float) ((i * 7919) % n_vocab);
    }
    std::vector<llama_token_data> tokens;
    const auto                    is_short = [&](const std::vector<sampler_maker> & make, int32_t n = n_vocab) {
        auto chain = chain_of(make);
        return entmtp::shortlist(chain.get(), row.data(), n, tokens);
    };
    const auto penalties = [](float repeat, float freq, float present) {
        return [=] {
            return llama_sampler_init_penalties(n_vocab, 64, repeat, freq, present);
        };
    };
    const auto top_k = [] {
        return llama_sampler_init_top_k(40);
    };
    const auto dist = [] {
        return llama_sampler_init_dist(1);
    };
    const auto greedy = [] {
        return llama_sampler_init_greedy();
    };
    const auto none = [] {
        return llama_sampler_init_top_p(1.0f, 1);
    };

    CHECK(is_short({ greedy }));
    CHECK_EQ(tokens.size(), 2u);
    CHECK(is_short({ penalties(1.1f, 0.0f, 0.0f), greedy }));
    CHECK(is_short({ penalties(1.0f, 0.2f, 0.2f), none, top_k, dist }));
    CHECK(is_short({ none, top_k, dist }));

    CHECK(!is_short({ penalties(0.99f, 0.0f, 0.0f), greedy }));
    CHECK(!is_short({ penalties(1.1f, -0.1f, 0.0f), greedy }));
    CHECK(!is_short({ penalties(1.1f, 0.0f, -0.1f), greedy }));
    CHECK(!is_short({ penalties(1.1f, -0.1f, 0.2f), greedy })); // the second time makes it more probable
    CHECK(!is_short({ penalties(1.1f, 0.0f, 0.0f), penalties(1.1f, 0.0f, 0.0f), greedy }));
    CHECK(!is_short({ dist }));
    CHECK(!is_short({ [] { return llama_sampler_init_temp(0.5f); }, top_k, dist }));
    CHECK(!is_short({ [] { return llama_sampler_init_top_k(65); }, dist }));
    CHECK(!is_short({ [] { return llama_sampler_init_mirostat_v2(1, 5.0f, 0.1f); } }));
    CHECK(!is_short({ greedy }, 15)); // the whole is hardly more

    row[17] = NAN;
    CHECK(!is_short({ greedy }));
    row[17] = INFINITY;
    CHECK(is_short({ greedy }));
    row[2900] = INFINITY; // two are the largest
    CHECK(!is_short({ greedy }));

    tiny::sampler_ptr alone(llama_sampler_init_greedy());
    CHECK(!entmtp::shortlist(alone.get(), row.data(), n_vocab, tokens));
}

int main() {
    test_choices();
    test_what_takes_the_whole_row();
    return check_result("test_shortlist");
}
