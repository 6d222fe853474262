// The draft heads: weights from a heads file, and one prebuilt graph per topology.

#pragma once

#include "entmtp.h"
#include "prefix.h"
#include "transfer.h"
#include "tree.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama.h"

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

namespace entmtp {

// x -> R(x) + silu(W x + b), with R the identity unless res_weight is there
struct res_block {
    ggml_tensor * weight     = nullptr; // [n_in, n_embd]
    ggml_tensor * bias       = nullptr; // [n_embd]
    ggml_tensor * res_weight = nullptr; // [n_in, n_embd]
    ggml_tensor * res_bias   = nullptr; // [n_embd]
};

struct head {
    std::vector<res_block> blocks;
    ggml_tensor *          output      = nullptr; // [n_embd, n_vocab_draft], or the base model's (see select)
    ggml_tensor *          output_bias = nullptr; // [n_vocab_draft]
};

// a graph that turns a hidden state and the root token into the guesses of one topology
struct draft_graph {
    ggml_context_ptr ctx;
    ggml_gallocr_ptr alloc;

    int32_t n_threads = 1; // on the CPU, that it is worth

    ggml_cgraph * gf     = nullptr;
    ggml_tensor * h      = nullptr; // [n_embd, 1]
    ggml_tensor * root   = nullptr; // i32 [1], grounded heads only
    ggml_tensor * logits = nullptr; // [n_vocab_draft, 1], only in the graph of a single head
    ggml_tensor * paths  = nullptr; // i32 [(l + 1)*n], only in the graph of one level, grounded heads
    ggml_tensor * probs  = nullptr; // [k, n] of the guesses, only in the graph of one level

    // guesses per level: base token ids, best first. i32 [k, n_expand] (one column for heads that do not see the path)
    std::vector<ggml_tensor *>        guesses;
    std::vector<std::vector<int32_t>> result; // host copies of guesses
};

class heads {
  public:
    // throws std::runtime_error with one sentence
    heads(const char * path, const llama_model * model, int32_t n_threads);

    entmtp_heads_info info() const;

    void set_threads(int32_t n); // CPU threads to draft with, at most

    // guesses for a topology
    //   h                one hidden state (with a prefix layer: its output)
    //   tokens [n_nodes] result; tokens[0] is the root and given
    void draft(const tree & topology, const states & h, std::vector<int32_t> & tokens);

    // the k best guesses of head l after each of n paths, best first
    //   paths  [n][l + 1]  tokens after the hidden state's, the root first; heads that do not see the path want n = 1
    //   tokens [n][k], log_p [n][k]  results; k is at most n_draft()
    // Graphs are kept per (l, n, k).
    void
    expand(int32_t l, const states & h, const int32_t * paths, int32_t n, int32_t k, int32_t * tokens, float * log_p);

    bool    sees_path() const { return grounded; }
    int32_t n_vocab_draft() const { return n_draft; }

    // logits of one head
    //   path [i + 1], logits [n_vocab_draft]
    void logits(int32_t i, const float * h, const int32_t * path, float * logits);

    prefix_layer * prefix() { return prefix_impl.get(); } // null without a prefix layer
    void           reserve_prefix(int32_t n_ctx) { prefix_impl->reserve(backend.get(), n_ctx); }

    entmtp_traffic traffic() const;

    int32_t n_heads() const { return (int32_t) layers.size(); }

    // graphs are kept per topology: drop them when the bank changes
    void forget_graphs() { graphs.clear(); }

  private:
    struct loader; // heads_load.cpp

    void use_device(ggml_backend_dev_t dev);
    void load_weights(const char * path, const llama_model * model);
    void compute(const draft_graph & g, bool wait = true) const;

    std::unique_ptr<draft_graph> new_graph() const;
    void                         finish_graph(draft_graph & g, const std::vector<ggml_tensor *> & outputs) const;

    std::unique_ptr<draft_graph> build_graph(const tree & topology) const;

    ggml_tensor * build_head(ggml_context * ctx, int32_t i, ggml_tensor * x) const;
    ggml_tensor * build_guesses(ggml_context * ctx, ggml_tensor * logits, int32_t k) const;
    ggml_tensor * build_top_k(ggml_context * ctx, ggml_tensor * logits, int32_t k) const;
    ggml_tensor * build_base_tokens(ggml_context * ctx, ggml_tensor * ids) const;

    std::unique_ptr<draft_graph> build_level(int32_t l, int32_t n, int32_t k) const;
    ggml_tensor *                build_embd(ggml_context * ctx, ggml_tensor * tokens) const;

    int32_t n_embd   = 0;
    int32_t n_vocab  = 0;
    int32_t n_draft  = 0; // draft vocabulary
    bool    is_hydra = false;
    bool    grounded = false;

    int32_t                      n_threads     = 1;       // at most
    ggml_backend_set_n_threads_t set_n_threads = nullptr; // the backend's, if it has threads

    ggml_backend_ptr        backend;
    ggml_context_ptr        ctx_weights;
    ggml_backend_buffer_ptr buf_weights;
    ggml_context_ptr        ctx_packed; // matrices that the CPU kernels hold, if they are on
    ggml_backend_buffer_ptr buf_packed;

    std::vector<head> layers;
    ggml_tensor *     d2t      = nullptr; // i32 [1, n_vocab_draft] base token of a draft token
    bool              select   = false;   // outputs are the base model's whole: the draft tokens' logits are taken out
    ggml_tensor *     tok_embd = nullptr; // [n_embd, n_vocab] of the base model, grounded heads only

    std::unique_ptr<prefix_layer> prefix_impl;

    mutable entmtp_traffic moved = {};

    std::map<const tree *, std::unique_ptr<draft_graph>>                          graphs;
    std::map<std::tuple<int32_t, int32_t, int32_t>, std::unique_ptr<draft_graph>> levels; // by (l, n, k)
};

// throws std::runtime_error("heads: ...")
[[noreturn]] void heads_fail(const std::string & what);

uint64_t vocab_fingerprint(const llama_model * model);

} // namespace entmtp
