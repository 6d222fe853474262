#include "candidates.h"

#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace entmtp {

// which sampler it is: by its functions, as names may be anyone's
struct known_samplers {
    const llama_sampler_i * none;
    const llama_sampler_i * greedy;
    const llama_sampler_i * top_k;
    const llama_sampler_i * penalties;

    known_samplers() :
        none(of(llama_sampler_init_top_k(0))), greedy(of(llama_sampler_init_greedy())),
        top_k(of(llama_sampler_init_top_k(1))), penalties(of(llama_sampler_init_penalties(1, 1, 2.0f, 0.0f, 0.0f))) {}

    static const llama_sampler_i * of(llama_sampler * s) {
        const llama_sampler_i * res = s->iface;
        llama_sampler_free(s);
        return res;
    }
};

// what top-k leaves of `most` tokens
static int32_t kept_by(llama_sampler * top_k, int32_t most) {
    std::vector<llama_token_data> tokens(most);
    for (int32_t i = 0; i < most; ++i) {
        tokens[i] = { i, (float) -i, 0.0f };
    }
    llama_token_data_array array = { tokens.data(), tokens.size(), -1, false };
    llama_sampler_apply(top_k, &array);
    return (int32_t) array.size;
}

int32_t candidates_needed(llama_sampler * chain, int32_t most) {
    static const known_samplers known;

    const bool    is_chain = llama_sampler_chain_get(chain, -1) != nullptr;
    const int32_t n        = is_chain ? llama_sampler_chain_n(chain) : 1;

    for (int32_t i = 0; i < n; ++i) {
        llama_sampler * s = is_chain ? llama_sampler_chain_get(chain, i) : chain;
        if (s->iface == known.none) {
            continue;
        }
        if (s->iface == known.greedy && i == n - 1) {
            return 1;
        }
        if (s->iface == known.top_k) {
            const int32_t k = kept_by(s, most);
            return k < most ? k + 1 : 0;
        }
        return 0;
    }
    return 0;
}

bool candidates_suffice(std::vector<llama_token_data> & candidates, int32_t needed, int32_t n_row) {
    if (std::any_of(candidates.begin(), candidates.end(), [](const auto & c) { return std::isnan(c.logit); })) {
        return false;
    }
    const bool is_all = (int32_t) candidates.size() == n_row;
    if (!is_all) {
        // one more than are kept, also where one is kept
        needed = std::max(needed, 2);
        if ((int32_t) candidates.size() < needed) {
            return false;
        }
        std::sort(candidates.begin(), candidates.end(),
                  [](const auto & a, const auto & b) { return a.logit > b.logit; });
        for (int32_t i = 0; i + 1 < needed; ++i) {
            if (!(candidates[i].logit > candidates[i + 1].logit)) {
                return false;
            }
        }
    }
    std::sort(candidates.begin(), candidates.end(), [](const auto & a, const auto & b) { return a.id < b.id; });
    return true;
}

static float after(llama_sampler * s, float logit) {
    llama_token_data       token = { 0, logit, 0.0f };
    llama_token_data_array array = { &token, 1, -1, false };
    llama_sampler_apply(s, &array);
    return token.logit;
}

// Whether penalties make no token more probable: tried out on a copy, whose numbers cannot be asked for. Far from 0 only the
// factor counts, at 0 only what is taken off: once for a token that was seen, and once more each time
static bool only_lower(const llama_sampler * penalties) {
    const std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)> s(llama_sampler_clone(penalties),
                                                                          llama_sampler_free);
    constexpr float                                                     far = 1e30f;

    llama_sampler_reset(s.get());
    llama_sampler_accept(s.get(), 0);
    const float once = after(s.get(), 0.0f);
    if (!(after(s.get(), far) <= far && after(s.get(), -far) <= -far && once <= 0.0f)) {
        return false;
    }
    llama_sampler_accept(s.get(), 0);
    return after(s.get(), 0.0f) <= once;
}

static bool any_nan(const float * x, int32_t n) {
    int any = 0;
    for (int32_t i = 0; i < n; ++i) {
        any |= x[i] != x[i];
    }
    return any != 0;
}

// tokens that penalties may take out of the largest
static constexpr int32_t n_spare = 64;

bool shortlist(llama_sampler * chain, const float * row, int32_t n_row, std::vector<llama_token_data> & tokens) {
    static const known_samplers known;

    if (!llama_sampler_chain_get(chain, -1)) {
        return false;
    }
    llama_sampler * penalties = nullptr;
    int32_t         k         = 0;
    const int32_t   n         = llama_sampler_chain_n(chain);
    for (int32_t i = 0; i < n && k == 0; ++i) {
        llama_sampler * s = llama_sampler_chain_get(chain, i);
        if (s->iface == known.penalties && !penalties) {
            penalties = s;
        } else if (s->iface == known.greedy && i == n - 1) {
            k = 1;
        } else if (s->iface == known.top_k) {
            k = kept_by(s, n_spare + 1);
        } else if (s->iface != known.none) {
            return false;
        }
    }
    const int32_t n_short = k + 1 + (penalties ? n_spare : 0);
    if (k == 0 || k > n_spare || n_row < 8 * n_short || any_nan(row, n_row) || (penalties && !only_lower(penalties))) {
        return false;
    }
    int32_t ids[2 * n_spare + 1];
    top_k(row, n_row, n_short, ids);
    const float least = row[ids[n_short - 1]]; // no other token has more, before penalties and after them

    tokens.resize(n_short);
    std::sort(ids, ids + n_short);
    for (int32_t i = 0; i < n_short; ++i) {
        tokens[i] = { ids[i], row[ids[i]], 0.0f };
    }
    std::vector<llama_token_data> seen = tokens;
    if (penalties) {
        llama_token_data_array array = { seen.data(), seen.size(), -1, false };
        llama_sampler_apply(penalties, &array);
    }
    // those that are kept are apart from each other and from the rest: every way of sorting gives one order
    std::partial_sort(seen.begin(), seen.begin() + k + 1, seen.end(),
                      [](const auto & a, const auto & b) { return a.logit > b.logit; });
    for (int32_t i = 0; i < k; ++i) {
        if (!(seen[i].logit > seen[i + 1].logit)) {
            return false;
        }
    }
    return seen[k - 1].logit > least;
}

} // namespace entmtp
