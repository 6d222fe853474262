// The batch of a pass: token trees and texts of one or several sequences, and what stays of them in the memory.

#pragma once

#include "llama.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace entmtp {

// what a sequence wants evaluated
struct part {
    int32_t              seq  = 0;
    int32_t              pos0 = 0;
    std::vector<int32_t> tokens;
    std::vector<int32_t>
        parent;                 // [n] of a tree, the root's is -1, parents come first; empty: one token after the other
    std::vector<int32_t> depth; // [n] of a tree
    std::vector<float>   p;   // [n] chance that a node is reached, no child's above its parent's; empty: all are wanted

    int32_t first_output = 0; // tokens from this one on have outputs
    bool    is_prompt    = false;
    bool    to_host      = false;
    bool    timed        = false;

    std::function<double(int32_t)>
        fee;           // price of a pass over n tokens, in tokens; null: no node is worth less than it costs

    int64_t asked = 0; // when, in turns

    // what came of it
    int32_t              status = 0;          // of llama_process()
    std::vector<int32_t> at;                  // [n] index in the pass
    std::vector<int32_t> kept;                // [n] nodes by their former index, where some were dropped; else empty
    int32_t              n_others    = 0;
    bool                 with_prompt = false; // a prompt of another was in the pass
    double               t_us        = 0.0;
    bool                 built       = false; // a graph was built for the pass

    // a tree of several nodes, but fewer than n: with siblings of the last one that nobody asks for. No node may be less deep
    // than those before it
    void fill(int32_t n) {
        while ((int32_t) tokens.size() < n) {
            tokens.push_back(tokens[0]);
            parent.push_back(parent.back());
            depth.push_back(depth.back());
            if (!p.empty()) {
                p.push_back(0.0f);
            }
        }
    }

    // drop nodes that are not wanted, and those below them
    template <typename F>
    void keep(F && wanted) {
        std::vector<int32_t> place(tokens.size(), -1);
        size_t               n = 0;
        kept.clear(); // of an earlier try, which left the root alone
        for (size_t i = 0; i < tokens.size(); ++i) {
            if ((i > 0 && place[parent[i]] < 0) || !wanted(i)) {
                continue;
            }
            place[i]  = (int32_t) n;
            tokens[n] = tokens[i];
            parent[n] = parent[i] < 0 ? -1 : place[parent[i]];
            depth[n]  = depth[i];
            p[n]      = p[i];
            kept.push_back((int32_t) i);
            ++n;
        }
        tokens.resize(n);
        parent.resize(n);
        depth.resize(n);
        p.resize(n);
    }
};

class verifier {
  public:
    // throws std::runtime_error where the context keeps more states than a pass has tokens
    explicit verifier(llama_context * ctx);
    ~verifier();

    verifier(const verifier &)             = delete;
    verifier & operator=(const verifier &) = delete;

    // the memory of the context can hold a tree (recurrent and hybrid memories cannot)
    bool can_tree() const { return tree_ok; }

    // it holds one token after the other, and can be cut back by a few (recurrent and hybrid memories that keep states)
    bool can_chain() const { return tree_ok || n_back > 0; }

    // tokens that a tree may have, the root among them
    int32_t most_nodes() const { return tree_ok ? 1 << 30 : 1 + n_back; }

    // what to tell the user where it cannot
    const char * why_no_tree() const;

    // evaluate all parts in one batch; returns the status of llama_process()
    //   first_output  result: tokens of the batch before this one have no outputs, those after it have
    int32_t decode(const std::vector<part *> & parts, int32_t * first_output);

    // keep a path of a sequence's tree in the last batch (indices in the batch, the root first), drop the rest of it
    //   pos0  of the root
    bool commit(int32_t seq, const std::vector<int32_t> & path, int32_t pos0);

    // forget the positions of a sequence from pos on; false: it cannot be cut back there, and nothing is changed
    bool truncate(int32_t seq, int32_t pos);

    // the sequence was changed by others, as when a state was loaded
    void changed(int32_t seq);

    // the first n positions of a sequence can be those of another, too, which then goes on by itself
    bool can_share(int32_t from, int32_t n) const;

    // give a sequence that is empty the first n positions of another
    void share(int32_t from, int32_t to, int32_t n);

    // the memory holds all that a token of the sequence at position pos depends on
    bool can_continue(int32_t seq, int32_t pos) const;

    // it is a state, in part at least
    bool recurrent() const { return is_state; }

    // tokens that layers with a sliding window attend to, the token itself among them; 0: there are none
    int32_t window() const { return n_swa; }

    // positions that the memory has of a sequence, whether or not a text knows of them
    int32_t length(int32_t seq) const { return llama_memory_seq_pos_max(mem, seq) + 1; }

  private:
    bool has_state(int32_t seq, int32_t pos) const; // or needs none

    llama_context *   ctx;
    llama_memory_t    mem;
    llama_batch_ext * batch;
    const int32_t     n_swa;
    const int32_t     n_back; // tokens that a recurrent memory can be cut back by, at most
    const bool        is_state;
    bool              tree_ok;

    // [n_seq] of a recurrent memory, tokens that it can be cut back by now: a pass keeps the states after its own tokens, and
    // the next one of fewer leaves older ones in their places. -1: a pass failed, and the state is nobody knows whose
    std::vector<int32_t> back;
};

} // namespace entmtp
