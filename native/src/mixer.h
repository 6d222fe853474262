// One tree for a step from all drafters: the text, the model's own rows, and the heads, priced together.

#pragma once

#include "acceptance.h"
#include "calibration.h"
#include "cost.h"
#include "foresight.h"
#include "successors.h"
#include "text.h"

#include "entmtp.h"

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace entmtp {

// What costs nothing goes in first: places in the text and rows seen before, best first, until no further node could pay.
// So the tree has a price when the question comes whether the next head is worth its time. After each head its guesses
// are merged with what is there by parent and token, and all is judged anew. Of the merged nodes the most probable ones
// are the paths that the next head is run after. A model that drafts comes last, token by token down the most probable
// path, for as long as its next pass is worth its time.
class mixer {
  public:
    static constexpr int32_t n_guess   = 8; // guesses of a head after a path
    static constexpr int32_t n_rows    = 4; // successors that are proposed
    static constexpr int32_t max_width = 4; // paths that a head is run after
    static constexpr int32_t max_found = 160;
    static constexpr int32_t max_depth = 24;

    struct node {
        int32_t  parent;  // index among the nodes, 0: the root
        int32_t  depth;   // 1 ..
        int32_t  token;
        uint32_t sources; // who proposed it
        float    p;       // chance that it is reached
    };

    // guesses of head l after n paths [n][l + 1] -> tokens and ln p, [n][n_guess]. One path for heads that do not see it
    using expand_fn =
        std::function<void(int32_t l, const std::vector<int32_t> & paths, int32_t n, int32_t * tokens, float * log_p)>;

    // a model that drafts: its guesses after a path below the root [n_guess], and what they cost after one of l tokens, us
    struct asked_model {
        int32_t                                                                                 depth = 0; // 0: none
        std::function<double(int32_t l)>                                                        cost;
        std::function<bool(const std::vector<int32_t> & path, int32_t * tokens, float * log_p)> guess;
    };

    // what a step brings along
    struct situation {
        const text_index & text; // the root is its last token
        const successors & rows;
        entmtp_signals     signals;
        float              running; // entropy, nats
        const cost_model & cost;
        double             price;   // tokens per us
        int32_t            n_max;   // nodes there is room for
        int32_t            n_heads;
        bool               sees_path;
        uint32_t           allowed;          // sources whose nodes may enter the tree: the others only learn
        uint32_t           forced;           // of these the first guess is wanted, whatever it is expected to bring
        int32_t            n_others = 0;     // tokens of others in the pass
        bool               chain    = false; // one token after the other: the memory can hold no more
    };

    mixer() = default;

    // throws std::runtime_error with one sentence
    //   heads    null: there are none
    //   weights  of the acceptance model, null: the shipped ones
    mixer(const entmtp_calibration * heads, const float * weights, bool adapt);

    // the nodes below the root, parents first and breadth first; none: plain decoding
    const std::vector<node> & grow(const situation & now, const expand_fn & expand, const asked_model & model);

    // The walk took these of the nodes, from the root on; `next` left the tree, -1: not known.
    void observe(const std::vector<int32_t> & path, int32_t next);

    void drop_nodes(const std::vector<int32_t> & kept); // only these are left, the root (0) among them

    void skip(); // a step that drafted nothing, for another reason than the mixer's
    void begin_text();

    double draft_cost() const { return t_heads; } // of the heads that ran, as believed
    double model_cost() const { return t_model; } // of the model that drafts
    bool   heads_ran() const { return n_levels_run > 0; }
    bool   model_ran() const { return n_model_run > 0; }

    // of the last tree: nodes of each source, those of several counted for the first of them
    const int32_t * n_nodes_by() const { return by_source; }

    // who proposed a node of the last tree
    uint32_t sources_of(int32_t i) const { return nodes[i - 1].sources; }

    const acceptance & learned() const { return accept; }
    acceptance &       learned() { return accept; }

  private:
    struct candidate {
        int32_t          token;
        int32_t          parent; // candidate, -1: the root
        int32_t          depth;
        uint32_t         sources;
        proposal_signals signals;
        float            raw;    // heads: ln p of the path; without a head's word, of the path as believed
        float            q;      // probability that it is right if its parent is
        float            p;      // of the whole path
        int32_t          first;  // child, -1: none
        int32_t          next;   // sibling, -1: none
        int32_t          places; // its first place in the text, in `pool`
        int32_t          n_places;
        bool             open;   // its children were looked for
    };

    int32_t propose(int32_t parent, int32_t token, source from);
    void    from_places(int32_t parent, const std::vector<text_index::place> & places, const text_index & text);
    void    open(int32_t at, const situation & now);
    void    grow_cheap(const situation & now);
    void    judge(const situation & now);
    void    judge_children(int32_t first, float above, const situation & now);
    void    path_to(int32_t at, std::vector<int32_t> & tokens) const;
    float   covered(int32_t at) const;
    bool    pays(int32_t l, int32_t at, int32_t n_heads, const situation & now);
    int32_t width(int32_t l, const std::vector<int32_t> & front, const situation & now) const;
    void    merge_guesses(int32_t l, const std::vector<int32_t> & front, int32_t n, const situation & now);
    void    sort_probs();
    void    weigh();
    void    ask_heads(const situation & now, const expand_fn & expand);
    void    ask_model(const situation & now, const asked_model & model);
    bool    model_pays(int32_t at, int32_t l, const situation & now, const asked_model & model) const;
    int32_t first_child(int32_t at) const { return at < 0 ? root_first : found[at].first; } // -1: of the root
    int32_t best_child(int32_t at) const;
    int32_t bin_of(int32_t at, const situation & now) const;                                // of what is foreseen there
    void    use(const situation & now);

    calibration heads;
    bool        has_heads = false;
    acceptance  accept;

    float hits[n_sources]; // how often the best guess of each drafter at the root was right lately

    foresight ahead;       // of the model that drafts

    // of the tree that is being grown
    std::vector<candidate>                 found;
    int32_t                                root_first = -1;
    bool                                   root_open  = false;
    std::vector<text_index::place>         pool;
    std::vector<text_index::place>         places;
    std::vector<std::pair<float, int32_t>> queue; // candidates to open, a heap
    std::vector<float>                     probs;
    mutable std::vector<float>             trial;
    std::vector<double>                    fee;
    std::vector<int32_t>                   tail;
    std::vector<int32_t>                   guess;
    std::vector<float>                     log_p;
    std::vector<int32_t>                   order;
    std::vector<node>                      nodes;
    std::vector<int32_t>                   candidate_of;                // [n_nodes + 1] -1 for the root
    float                                  least                = 0.0f; // no node below this can pay
    int32_t                                n_best               = 1;    // nodes of the best pass over what was found
    double                                 worth                = 0.0;  // and what it brings, in tokens
    double                                 t_heads              = 0.0;
    double                                 t_model              = 0.0;
    int32_t                                n_levels_run         = 0;
    int32_t                                n_model_run          = 0;
    int32_t                                by_source[n_sources] = {};
    int32_t                                best_of[n_sources]   = {}; // at the root
};

} // namespace entmtp
