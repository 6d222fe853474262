// Which tree for this step: a policy over a bank, what is expected of its trees, and what they cost here.

#pragma once

#include "cost.h"
#include "grower.h"
#include "guard.h"
#include "mixer.h"

#include "entmtp.h"

#include <array>
#include <cstdint>
#include <map>
#include <vector>

namespace entmtp {

class scheduler {
  public:
    // the step's tree is grown from the heads' probabilities instead of taken from the bank
    static constexpr int32_t grow_tree = -1;

    // plain decoding only
    scheduler() = default;

    // the sizes of p are n_trees and p.n_bins; throws std::runtime_error with one sentence
    scheduler(const entmtp_policy_params & p, int32_t n_trees);

    // others that share the passes: their tokens in the next one, and what all earn, in tokens per us (0: not known)
    struct company {
        int32_t n_others = 0;
        double  price    = 0.0;
    };

    // before a step
    void meet(company c) { with = c; }

    // the tree of the next step, or grow_tree
    //   s        of the distribution the root was drawn from
    //   running  entropy, nats
    //   path     product of the heads' top-1 probabilities down the greedy path; only if needs_path()
    //   n_max    nodes there is room for
    //   n_nodes, depth [n_trees]
    int32_t choose(const entmtp_signals &       s,
                   float                        running,
                   float                        path,
                   int32_t                      n_max,
                   const std::vector<int32_t> & n_nodes,
                   const std::vector<int32_t> & depth);

    // after grow_tree: see grower::grow
    const std::vector<grower::node> & grow(const entmtp_signals &    s,
                                           float                     running,
                                           int32_t                   n_max,
                                           int32_t                   n_heads,
                                           bool                      sees_path,
                                           const grower::expand_fn & expand);

    // the same where the policy mixes drafters
    const std::vector<mixer::node> & mix(const text_index &         text,
                                         const successors &         rows,
                                         const entmtp_signals &     s,
                                         float                      running,
                                         int32_t                    n_max,
                                         int32_t                    n_heads,
                                         bool                       sees_path,
                                         const mixer::expand_fn &   expand,
                                         const mixer::asked_model & model);

    // of the tree that was mixed these nodes are left
    void drop_nodes(const std::vector<int32_t> & kept) { all_drafters.drop_nodes(kept); }

    // price of a pass over n tokens, in tokens
    // tokens that a pass over a grown tree of n nodes is filled up to
    int32_t pass_size(int32_t n) const { return now.cost.n_max() == 0 ? n : now.cost.size_of(n); }

    double fee(int32_t n) const { return now.cost.n_max() == 0 ? 0.0 : price() * now.cost.verify(n); }

    // what that step did
    struct outcome {
        const std::vector<int32_t> & path; // [1 + n_accepted] the nodes that were taken, the root first
        int32_t hit;              // the best guess of head 0 was right: 1, 0; -1: the text ended, or it did not run
        int32_t next;             // token that left the tree; -1: not known
        double  t_draft;          // us, of the heads
        double  t_verify;         // us
        int32_t n_others = 0;     // tokens of others in the pass
        bool    timed    = true;  // t_verify is that of a pass over so many tokens
        bool    built    = false; // it built its graph
    };

    void observe(int32_t tree, int32_t n_nodes, const outcome & o);

    // Passes and drafts are computed on n threads from now on. The first call says what number the policy's costs are of;
    // later ones give those of a number that is new, or null: they are thought to be as they were. Throws
    // std::runtime_error with one sentence
    void set_threads(int32_t n, const entmtp_costs * costs, int32_t n_trees);

    // a new text: what the policy remembers of the last steps is void, what it learned stays
    void begin_text();

    bool needs_signals() const { return policy > ENTMTP_POLICY_STATIC; }
    bool needs_timing() const { return adapt; }
    bool needs_path() const { return is_published() && score == ENTMTP_SCORE_PATH; }
    bool is_static() const { return policy == ENTMTP_POLICY_STATIC; }
    bool mixes() const { return policy == ENTMTP_POLICY_AUTO; }

    const acceptance & learned() const { return all_drafters.learned(); }
    acceptance &       learned() { return all_drafters.learned(); }

    float window() const { return ema_window; }

    void draft_chains() { chain = true; } // the memory holds no trees

  private:
    bool is_published() const { return policy >= ENTMTP_POLICY_LADDER && policy <= ENTMTP_POLICY_BEST_DEPTH; }

    int32_t bin_of(float x) const;
    int32_t choose_entropy(float running, int32_t n_max, const std::vector<int32_t> & n_nodes);
    int32_t
    choose_published(float x, int32_t n_max, const std::vector<int32_t> & n_nodes, const std::vector<int32_t> & depth);
    void   observe_each(int32_t n_nodes, const std::vector<int32_t> & path, double t_heads, int32_t n_others);
    double expected(int32_t bin, int32_t tree) const;
    double step_cost(int32_t tree, int32_t n) const {
        return now.cost.verify(n) + (tree > 0 ? now.cost.draft(tree) : 0.0);
    }
    double price() const; // tokens per us

    int32_t policy      = ENTMTP_POLICY_OFF;
    int32_t static_tree = 0;
    int32_t score       = ENTMTP_SCORE_ENTROPY;
    int32_t criterion   = ENTMTP_CRITERION_RATIO;
    float   ema_window  = 8.0f;
    bool    adapt       = false;

    int32_t              n_trees = 1;
    std::vector<float>   edges;  // [n_bins - 1]
    std::vector<float>   table;  // [n_bins][n_trees] expected accepted tokens
    std::vector<int32_t> ladder; // [n_bins]

    // what depends on the number of threads
    struct pace {
        cost_model                   cost;
        guard                        keep;
        std::array<guard, n_sources> keep_each; // one that loses does not stop the others
    };

    int32_t                 n_threads = 0; // 0: not told
    pace                    now;
    std::map<int32_t, pace> others;

    grower   trees;
    mixer    all_drafters;
    bool     chain    = false;
    uint32_t drafters = 0; // that there are
    uint32_t allowed  = 0; // of them, in this step

    // tokens that were accepted, and that should have been: their ratio corrects the bank's expectation
    struct tally {
        double accepted = 0.0;
        double expected = 0.0;
    };

    tally              all;
    std::vector<tally> by_bin; // [n_bins]

    double tokens_seen = 0.0;  // both forget
    double time_seen   = 0.0;

    company        with;
    guard::verdict verdict = guard::verdict::free;
    uint32_t       forced  = 0; // drafters that must guess in this step
    int32_t        bin     = 0; // of the last choice
    int32_t        rung    = 0; // hysteresis: index in ladder
    int64_t        n_steps = 0;
};

} // namespace entmtp
