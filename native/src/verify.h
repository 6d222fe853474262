// The verify pass: one batch for a whole tree, and what stays in the memory afterwards.

#pragma once

#include "tree.h"

#include "llama.h"

#include <cstdint>
#include <vector>

namespace entmtp {

class verifier {
  public:
    explicit verifier(llama_context * ctx);
    ~verifier();

    verifier(const verifier &)             = delete;
    verifier & operator=(const verifier &) = delete;

    // the memory of the context can hold a tree (recurrent and hybrid memories cannot)
    bool can_tree() const { return tree_ok; }

    // what to tell the user where it cannot
    const char * why_no_tree() const;

    // evaluate n tokens one after the other from position pos0; logits of the last, or of all
    // returns the status of llama_process()
    int32_t decode(const int32_t * tokens, int32_t n, int32_t pos0, bool all_outputs);

    // evaluate a tree whose root is at pos0; every node has logits
    //   tokens [n_nodes]
    int32_t decode(const tree & topology, const std::vector<int32_t> & tokens, int32_t pos0);

    // keep the path (node indices, the root first) of the last decoded tree and drop the rest
    bool commit(const std::vector<int32_t> & path);

    // forget the positions from pos on
    bool truncate(int32_t pos);

    // the memory holds all that a token at position pos attends to
    bool can_continue(int32_t pos) const;

    // tokens that layers with a sliding window attend to, the token itself among them; 0: there are none
    int32_t window() const { return n_swa; }

  private:
    bool add(int32_t token, int32_t pos, bool output);

    llama_context *   ctx;
    llama_memory_t    mem;
    llama_batch_ext * batch;
    const int32_t     n_swa;
    bool              tree_ok;
};

} // namespace entmtp
