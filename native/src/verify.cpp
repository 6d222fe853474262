#include "verify.h"

#include <algorithm>

namespace entmtp {

verifier::verifier(llama_context * ctx) :
    ctx(ctx), mem(llama_get_memory(ctx)), batch(llama_batch_ext_init(ctx)),
    n_swa(llama_model_n_swa(llama_get_model(ctx))) {
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

bool verifier::add(int32_t token, int32_t pos, bool output) {
    const int32_t i = llama_batch_ext_add_token(batch, 0, token);
    return i >= 0 && llama_batch_ext_set_pos(batch, i, &pos) && llama_batch_ext_set_output_logits(batch, i, output);
}

int32_t verifier::decode(const int32_t * tokens, int32_t n, int32_t pos0, bool all_outputs) {
    llama_batch_ext_clear(batch);
    for (int32_t i = 0; i < n; ++i) {
        if (!add(tokens[i], pos0 + i, all_outputs || i == n - 1)) {
            return -1;
        }
    }
    return llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch);
}

int32_t verifier::decode(const tree & topology, const std::vector<int32_t> & tokens, int32_t pos0) {
    llama_batch_ext_clear(batch);
    for (int32_t i = 0; i < topology.n_nodes(); ++i) {
        if (!add(tokens[i], pos0 + topology.depth[i], true)) {
            return -1;
        }
        if (i > 0 && !llama_batch_ext_set_parent(batch, i, topology.parent[i])) {
            return -1;
        }
    }
    return llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch);
}

bool verifier::commit(const std::vector<int32_t> & path) {
    return llama_memory_tree_commit(mem, 0, path.data(), (int32_t) path.size());
}

bool verifier::truncate(int32_t pos) {
    return llama_memory_seq_rm(mem, 0, pos, -1);
}

bool verifier::can_continue(int32_t pos) const {
    if (n_swa == 0 || pos == 0 || !mem || llama_memory_seq_pos_max(mem, 0) + 1 == pos) {
        return true;
    }
    // a token at pos attends to the positions pos - n_swa + 1 .. pos
    return llama_memory_seq_pos_min(mem, 0) <= std::max(pos - n_swa + 1, 0);
}

} // namespace entmtp
