// Graphs of a device: what it costs to run a pass of a size that has none yet.

#pragma once

#include <cstdint>

namespace entmtp {

// The first pass of a size builds its graph, and CUDA captures it in the second: of a small model each of these two takes
// as long as several passes, and both come again when the cache that attention reads has grown. So only sizes that are
// powers of two are run, a new one is run only where it pays for its graph, and what such passes take is no cost of the size.
class graph_sizes {
  public:
    graph_sizes() = default;

    // us that the first passes of a size take longer than later ones; 0: not worth mentioning, any size will do
    explicit graph_sizes(double build) : build(build) {}

    // the size of the pass that n tokens are run in
    int32_t round(int32_t n) const;

    // share of building its graph that a pass over n tokens is charged with, us
    double charge(int32_t n) const;

    // A pass over n tokens was run, and built its graph or not. Returns whether its time is what such a pass takes
    bool see(int32_t n, bool built);

  private:
    static constexpr int32_t n_sizes = 8;  // 1, 2, 4 .. 64, and whatever is larger
    static constexpr int32_t n_first = 2;  // passes that are not like later ones
    static constexpr double  n_usual = 16; // passes that a graph is thought to serve until that is known

    struct size {
        int32_t n_runs = -1;      // passes since its graph was built; -1: it has none
        double  usual  = n_usual; // passes that its graphs served
    };

    static int32_t index(int32_t n);

    double build          = 0.0;
    size   sizes[n_sizes] = {};
};

} // namespace entmtp
