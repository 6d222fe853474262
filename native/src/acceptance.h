// How probable a proposal is: a small logistic model for each set of drafters that agree on it, learning as it goes.

#pragma once

#include "entmtp.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace entmtp {

using source = entmtp_source;

static constexpr source from_text  = ENTMTP_SOURCE_TEXT;
static constexpr source from_rows  = ENTMTP_SOURCE_ROWS;
static constexpr source from_heads = ENTMTP_SOURCE_HEADS;
static constexpr source from_model = ENTMTP_SOURCE_MODEL;

static constexpr int32_t n_sources = ENTMTP_N_SOURCES;

// the first of some drafters, by its index
inline int32_t first_of(uint32_t sources) {
    return sources & from_text ? 0 : sources & from_rows ? 1 : sources & from_heads ? 2 : 3;
}

// what is known of a proposal; what a drafter that did not propose it would say stays 0
struct proposal_signals {
    float length = 0.0f;          // text: tokens that match, the path among them
    float share  = 0.0f;          // text: of the places that match, how many go on like this
    float rank   = 0.0f;          // text: 0: the longest match goes on like this
    float row    = 0.0f;          // rows: ln p when the token before was last seen
    float head   = 0.0f;          // heads: calibrated logit
    float model  = 0.0f;          // model: ln p

    float entropy         = 0.0f; // running, nats
    float depth           = 0.0f; // 1 ..
    float hits[n_sources] = {};   // how often the best guess of each drafter was right lately
};

class acceptance {
  public:
    static constexpr int32_t n_sets   = ENTMTP_N_SETS;
    static constexpr int32_t n_inputs = ENTMTP_N_INPUTS;

    // weights [n_sets][n_inputs], null: those that come with the library
    explicit acceptance(const float * weights = nullptr, bool adapt = true);

    float probability(uint32_t sources, const proposal_signals & s) const;

    // it was right, or was not, as its place was reached
    void observe(uint32_t sources, const proposal_signals & s, bool right);

    const std::vector<float> & get() const { return w; }

    void set(const float * weights); // [n_sets][n_inputs]; throws std::runtime_error with one sentence

    static const float * shipped();  // [n_sets][n_inputs]

    // for studies: who sees every sample, as it was judged before it is learned from, and what is left out
    //   without  bits of the inputs that are 0; bit n_inputs: a proposal counts for the first of its drafters alone
    using witness_fn = std::function<void(uint32_t sources, const float * x, float p, bool right)>;
    void study(uint32_t without, witness_fn sees);

  private:
    uint32_t set_of(uint32_t sources) const;
    void     inputs(uint32_t set, const proposal_signals & s, float * x) const;

    bool               adapt;
    uint32_t           without = 0;
    witness_fn         sees;
    std::vector<float> w;       // [n_sets][n_inputs]
    std::vector<float> squares; // of the gradients, the same
};

} // namespace entmtp
