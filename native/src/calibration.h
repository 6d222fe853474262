// What the heads' own probabilities are worth, fitted to traces: the tables of struct entmtp_calibration, checked.

#pragma once

#include "entmtp.h"

#include <cmath>
#include <cstdint>
#include <vector>

namespace entmtp {

class calibration {
  public:
    calibration() = default;

    // throws std::runtime_error with one sentence
    explicit calibration(const entmtp_calibration & c);

    // logit of: guess `rank` of head l is right, if the path above it is
    //   above   ln p of that path, as the heads give it
    //   spread  entropy of the head's best guesses
    float logit(
        int32_t l, int32_t rank, float log_p, float above, float spread, const entmtp_signals & s, float running) const;

    // before head l runs: the logit of "its best guess will be right"
    //   path, last  ln p of the greedy path so far, and of its last token
    float foresee(int32_t l, float path, float last, const entmtp_signals & s, float running) const;

    // equally probable scenarios for a foreseen probability: [n_scenarios][n_levels][3]
    const float * foreseen(int32_t l, float p) const;

    // hits: how often the best guess of head 0 was right lately
    void observe(bool hit) { hits += ((hit ? 1.0f : 0.0f) - hits) * hits_rate; }
    void skip() { hits += (hits_start - hits) * hits_rate; } // a step without drafts: what is remembered fades
    void begin_text() { hits = hits_start; }

    int32_t n_levels    = 0;
    int32_t n_scenarios = 0;

  private:
    int32_t n_bins = 0;

    std::vector<float> accept;    // [n_levels][ENTMTP_N_ACCEPT]
    std::vector<float> ahead;     // [n_levels][ENTMTP_N_AHEAD]
    std::vector<float> edges;     // [n_levels][n_bins - 1]
    std::vector<float> scenarios; // [n_levels][n_bins][n_scenarios][n_levels][3]

    float hits_start = 0.5f;
    float hits_rate  = 0.05f;
    float hits       = 0.5f;
};

inline float sigmoid(float z) {
    return 1.0f / (1.0f + std::exp(-z));
}

// entropy of guesses by their ln p [n]
float spread_of(const float * log_p, int32_t n);

} // namespace entmtp
