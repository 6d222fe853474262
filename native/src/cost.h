// What a step costs on this machine: a table measured beforehand, corrected by what this process sees.

#pragma once

#include "graphs.h"

#include "entmtp.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// Times are in microseconds. Two drifts are followed: the speed of the machine as a whole, seen in passes over one token,
// and the cost of larger passes relative to these, by size. Costs that were never seen keep their proportion to those
// that were.
class cost_model {
  public:
    cost_model() = default;

    // throws std::runtime_error with one sentence
    cost_model(const entmtp_costs & c, int32_t n_trees, bool adapt);

    double verify(int32_t n) const;            // a pass over n tokens, with what it costs the pass that follows
    double draft(int32_t tree) const;          // all heads of a tree of the bank, in one graph
    double level(int32_t l, int32_t n) const;  // head l after n paths
    double plain() const { return verify(1); } // a step of plain decoding

    // passes over 1 .. n_max tokens and n_others more, at a price in tokens per us
    void fees(double price, int32_t n_max, std::vector<double> & fee, int32_t n_others = 0) const;

    // tokens of the pass that n are run in: on a device some sizes are as good as a larger one
    int32_t size_of(int32_t n) const { return graphs.round(n); }

    int32_t n_max() const { return (int32_t) table.size(); }
    int32_t n_levels() const { return (int32_t) levels.size(); }

    // a pass over n tokens took t_verify, its drafts took t_draft where `expected` was thought; built: its graph was new
    void observe(int32_t n, double t_verify, double t_draft, double expected, bool built = false);

    // larger passes cost other than they did when a pass over one token was last timed: time one again
    bool wants_plain() const;

    // steps seen since a pass over one token was last timed
    int64_t plain_age() const { return n_seen - last_plain; }

  private:
    struct widths {
        float us[3]; // after 1, 2 and 4 paths
    };

    std::vector<float>  table;  // [n_max] us, as measured beforehand
    std::vector<float>  trees;  // [n_trees] us
    std::vector<widths> levels; // [n_levels]

    bool adapt = false;

    graph_sizes graphs;

    // logarithms of the corrections
    double  speed       = 0.0; // of everything
    double  batched     = 0.0; // of passes over several tokens
    double  drafts      = 0.0; // of drafts
    double  batched_ref = 0.0; // batched, when a pass over one token was last timed
    // A pass over one token that follows a larger one takes longer: caches and graphs changed. That is the larger one's
    // cost, not plain decoding's. Mean over larger passes, us
    double  change      = 0.0;
    int32_t last_n      = 1;          // tokens of the last pass

    std::vector<double> own;          // [n_max] of one size, on top of these

    int32_t              n_again = 0; // passes over one token that are wanted in a row
    std::vector<int64_t> n_timed;     // [n_max] passes seen
    int64_t              n_seen     = 0;
    int64_t              last_plain = 0;
};

// Tokens expected from the best pass over a root and candidates, less what the pass costs.
//   probs  of the candidates' paths, decreasing
//   fee    of passes over 1, 2, .. tokens, in tokens
//   n_best result, if it is not null: tokens of that pass, the root among them
double best_pass(const std::vector<float> & probs, const std::vector<double> & fee, int32_t * n_best = nullptr);

} // namespace entmtp
