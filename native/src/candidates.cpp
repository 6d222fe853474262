#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace entmtp {

// which sampler it is: by its functions, as names may be anyone's
struct known_samplers {
    const llama_sampler_i * none;
    const llama_sampler_i * greedy;
    const llama_sampler_i * top_k;

    known_samplers() :
        none(of(llama_sampler_init_top_k(0))), greedy(of(llama_sampler_init_greedy())),
        top_k(of(llama_sampler_init_top_k(1))) {}

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

} // namespace entmtp
