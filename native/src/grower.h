// A tree for one step, grown from the heads' own probabilities while the next node still pays its cost.

#pragma once

#include "calibration.h"
#include "cost.h"

#include "entmtp.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace entmtp {

// Paths that head l may be run after, in the order they are taken: the greedy path first, then one other rank on the
// way. Index 0 .. 3; with a prefix of this order on each level, no wider than the one above, every parent is there.
//   path [l] ranks
void    expanded_path(int32_t l, int32_t index, int32_t * path);
int32_t expanded_parent(int32_t l, int32_t index); // its parent's index on level l - 1

class grower {
  public:
    static constexpr int32_t max_width = 4;
    static constexpr int32_t n_guess   = 8; // guesses per expanded path

    struct node {
        int32_t parent; // index among the nodes, 0: the root
        int32_t depth;  // 1 ..
        int32_t column; // index of the expanded path above it
        int32_t rank;
        float   q;      // probability that it is right if its parent is
    };

    // guesses of head l after the first n expanded paths -> ln p [n][n_guess]
    using expand_fn = std::function<const float *(int32_t l, int32_t n)>;

    grower() = default;

    // throws std::runtime_error with one sentence
    grower(const entmtp_calibration & c, bool adapt);

    // The nodes below the root, parents first and breadth first; none: plain decoding.
    //   price   tokens per us: what a token is worth in time
    //   n_max   nodes there is room for, the root among them
    //   n_heads heads there are
    //   forced  draft at least one token, whatever it is expected to pay
    const std::vector<node> & grow(const entmtp_signals & s,
                                   float                  running,
                                   const cost_model &     cost,
                                   double                 price,
                                   int32_t                n_max,
                                   int32_t                n_heads,
                                   bool                   sees_path,
                                   bool                   forced,
                                   const expand_fn &      expand);

    double draft_cost() const { return t_draft; } // of the last tree, as believed
    bool   drafted() const { return n_expanded > 0; }

    // the walk took these of the nodes, from the root on
    //   hit  the best guess of head 0 was right: 1, 0, or -1 where the text ends
    void observe(const std::vector<int32_t> & path, int32_t hit);

    // a step that drafted nothing: what is remembered of hits fades
    void skip();

    void begin_text() { cal.begin_text(); }

  private:
    struct candidate {
        int32_t depth;
        int32_t column;
        int32_t rank;
        float   q;
        float   p;    // of the whole path
        int32_t node; // index in the tree, -1: not taken
    };

    void add_level(int32_t l, int32_t n, const float * log_p, int32_t stride, const entmtp_signals & s, float running);
    double look_ahead(int32_t l, int32_t to, const entmtp_signals & s, float running);

    bool        adapt = false;
    calibration cal;
    int32_t     n_levels = 0;

    std::vector<float> bias; // [n_levels] learned on the way: added to the logit

    // of the tree that is being grown
    std::vector<candidate> found; // level by level, each expanded path with its n_guess guesses
    std::vector<int32_t>   first; // [n_levels + 1] first candidate of a level
    std::vector<int32_t>   width; // [n_levels]
    std::vector<float>     probs; // of the candidates, decreasing
    std::vector<float>     trial;
    std::vector<double>    fee;   // [n_max] price of a pass over 1 .. n_max tokens, in tokens
    std::vector<float>     raw;   // ln p of the candidates' paths as the heads give them
    std::vector<node>      nodes;
    std::vector<int32_t>   order;
    double                 t_draft    = 0.0;
    int32_t                n_expanded = 0;
};

} // namespace entmtp
