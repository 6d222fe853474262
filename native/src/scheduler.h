// Which tree for this step: argmax over the bank of expected tokens per cost, from table lookups.

#pragma once

#include "entmtp.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// The bank says what a tree is expected to accept in each entropy bin and what a step with it costs relative to a plain
// step. Both are starting points: acceptance is a running mean that the bank's figure enters as a few steps' worth of
// evidence, and costs are replaced by what steps take in this process as soon as they have been seen.
class scheduler {
  public:
    // the sizes of p are n_trees and n_bins; throws std::runtime_error with one sentence
    scheduler(const entmtp_policy_params & p, int32_t n_trees);

    // policy off: plain decoding only
    scheduler();

    // the tree of the next step
    //   entropy   running estimate, nats
    //   n_max     largest number of nodes there is room for
    //   n_nodes   [n_trees]
    int32_t choose(float entropy, int32_t n_max, const std::vector<int32_t> & n_nodes);

    // what the step that choose() was asked for did
    void observe(int32_t tree, int32_t n_accepted, double t_us);

    bool needs_entropy() const { return policy == ENTMTP_POLICY_ENTROPY; }
    bool needs_timing() const { return policy == ENTMTP_POLICY_ENTROPY; }

    float window() const { return ema_window; }

  private:
    int32_t bin_of(float entropy) const;
    double  cost_of(int32_t tree) const; // us, or in units of a plain step before anything was measured

    int32_t policy      = ENTMTP_POLICY_OFF;
    int32_t static_tree = 0;
    float   ema_window  = 8.0f;

    std::vector<float> edges; // [n_bins - 1]

    struct arm {
        double n     = 0; // steps' worth of evidence
        double total = 0; // accepted tokens
    };

    std::vector<std::vector<arm>> accept; // [n_bins][n_trees]

    struct timing {
        double  prior = 1.0; // relative to plain decoding
        double  mean  = 0.0; // us
        int64_t n     = 0;
        int64_t last  = 0;   // step of the last measurement
    };

    std::vector<timing> cost; // [n_trees]

    int64_t n_steps = 0;
    int32_t bin     = 0; // of the last choice
};

} // namespace entmtp
