// How probable a proposal is: a small logistic model for each set of drafters that agree on it, learning as it goes.

#pragma once

#include "entmtp.h"

#include <cstdint>
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

  private:
    static void inputs(uint32_t sources, const proposal_signals & s, float * x);

    bool               adapt;
    std::vector<float> w;       // [n_sets][n_inputs]
    std::vector<float> squares; // of the gradients, the same
};

} // namespace entmtp
