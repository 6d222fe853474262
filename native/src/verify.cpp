#include "verify.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace entmtp {

verifier::verifier(llama_context * ctx) :
    ctx(ctx), mem(llama_get_memory(ctx)), batch(llama_batch_ext_init(ctx)),
    n_swa(llama_model_n_swa(llama_get_model(ctx))), n_back((int32_t) llama_n_rs_seq(ctx)),
    is_state(llama_model_is_recurrent(llama_get_model(ctx)) || llama_model_is_hybrid(llama_get_model(ctx))),
    back(llama_n_seq_max(ctx), 0) {
    // llama.cpp ends the process over the first prompt otherwise
    if (n_back > 0 && (int32_t) llama_n_ubatch(ctx) < n_back + 2) {
        llama_batch_ext_free(batch);
        throw std::runtime_error("a pass of " + std::to_string(llama_n_ubatch(ctx)) +
                                 " tokens (n_ubatch) cannot keep states to go back to by " + std::to_string(n_back) +
                                 " (n_rs_seq); two more than these must fit into it");
    }
    // ask with a tree of two tokens that is never decoded
    tree_ok = llama_n_ubatch(ctx) >= 2 && llama_batch_ext_add_token(batch, 0, 0) == 0 &&
              llama_batch_ext_add_token(batch, 0, 0) == 1 && llama_batch_ext_set_parent(batch, 1, 0);
    llama_batch_ext_clear(batch);
}

const char * verifier::why_no_tree() const {
    return llama_n_ubatch(ctx) < 2
               ? "a pass of one token (n_batch=1 or n_ubatch=1) cannot hold a token tree; create the model with larger "
                 "ones, or with draft=None"
               : "the memory of this model (recurrent, hybrid or of a special kind) cannot hold a token tree; use "
                 "draft=None";
}

verifier::~verifier() {
    llama_batch_ext_free(batch);
}

int32_t verifier::decode(const std::vector<part *> & parts, int32_t * first_output) {
    llama_batch_ext_clear(batch);

    bool is_tree = false;
    for (part * x : parts) {
        is_tree = is_tree || (tree_ok && !x->parent.empty() && x->tokens.size() > 1);
        x->at.resize(x->tokens.size());
    }

    // outputs lie together at the end of the batch
    int32_t n = 0;
    for (const bool outputs : { false, true }) {
        if (outputs) {
            *first_output = n;
        }
        for (part * x : parts) {
            const auto    size  = (int32_t) x->tokens.size();
            const int32_t begin = outputs ? x->first_output : 0, end = outputs ? size : x->first_output;
            for (int32_t i = begin; i < end; ++i) {
                const bool    in_tree = !x->parent.empty();
                const int32_t parent  = in_tree ? x->parent[i] : i - 1;
                const int32_t pos     = x->pos0 + (in_tree ? x->depth[i] : i);
                if (llama_batch_ext_add_token(batch, x->seq, x->tokens[i]) != n ||
                    !llama_batch_ext_set_pos(batch, n, &pos) || !llama_batch_ext_set_output_logits(batch, n, outputs) ||
                    (is_tree && parent >= 0 && !llama_batch_ext_set_parent(batch, n, x->at[parent]))) {
                    return -1;
                }
                x->at[i] = n++;
            }
        }
    }
    const std::vector<int32_t> before = back;
    for (const part * x : parts) {
        back[x->seq] = -1; // also where this throws
    }
    const int32_t status = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch);
    for (const part * x : parts) {
        if (status == 0) {
            back[x->seq] = std::min((int32_t) x->tokens.size() - 1, n_back);
        } else if (status == 1) { // no room, and nothing was computed
            back[x->seq] = before[x->seq];
        }
    }
    return status;
}

bool verifier::commit(int32_t seq, const std::vector<int32_t> & path, int32_t pos0) {
    if (!tree_ok) {
        return truncate(seq, pos0 + (int32_t) path.size());
    }
    return llama_memory_tree_commit(mem, seq, path.data(), (int32_t) path.size());
}

bool verifier::truncate(int32_t seq, int32_t pos) {
    if (!has_state(seq, pos)) {
        return false;
    }
    if (is_state && length(seq) > pos) {
        back[seq] = 0; // llama.cpp goes back once
    }
    return llama_memory_seq_rm(mem, seq, pos, -1);
}

bool verifier::has_state(int32_t seq, int32_t pos) const {
    if (!is_state || pos == 0) {
        return true;
    }
    const int32_t n = length(seq) - pos;
    return n >= 0 && n <= back[seq];
}

void verifier::changed(int32_t seq) {
    back[seq] = 0;
}

bool verifier::can_share(int32_t from, int32_t n) const {
    // llama.cpp takes cells that have left the window from one text, never from two. A cache of a window that has room for all
    // else can be shifted
    return n_swa == 0 || (llama_memory_can_shift(mem) && can_continue(from, n));
}

void verifier::share(int32_t from, int32_t to, int32_t n) {
    llama_memory_seq_cp(mem, from, to, 0, n);
}

bool verifier::can_continue(int32_t seq, int32_t pos) const {
    if (!has_state(seq, pos)) {
        return false;
    }
    if (n_swa == 0 || pos == 0 || !mem || length(seq) == pos) {
        return true;
    }
    // a token at pos attends to the positions pos - n_swa + 1 .. pos
    const int32_t first = llama_memory_seq_pos_min(mem, seq);
    return first >= 0 && first <= std::max(pos - n_swa + 1, 0);
}

} // namespace entmtp
