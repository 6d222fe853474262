// The decode loop: entropy -> topology -> draft -> verify -> accept -> commit.

#pragma once

#include "accept.h"
#include "draft_model.h"
#include "entropy.h"
#include "heads.h"
#include "pass.h"
#include "remote.h"
#include "scheduler.h"
#include "steps.h"
#include "successors.h"
#include "text.h"
#include "tree.h"

#include "entmtp.h"
#include "entmtp_walk.h"
#include "llama.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace entmtp {

// To its user a decoder is a plain loop of "evaluate a token" and "sample the next". A step drafts and verifies a tree;
// the tokens sampled afterwards walk it from the root, one child each, until one leaves the tree: that one is the root
// of the next step. So every draw of the sampler sees what it would see in plain decoding, and a caller who stops
// between two tokens leaves no trace of the guesses behind him (settle).
class decoder {
  public:
    // heads may be null; the context outlives the decoder
    decoder(llama_context * ctx, heads * h);

    // of one of several sequences that share passes; the pass outlives the decoder
    //   n_ctx  positions that the sequence may take
    decoder(llama_context * ctx, heads * h, pass & shared, int32_t seq, int32_t n_ctx) :
        decoder(ctx, h, nullptr, &shared, seq, n_ctx) {}
    ~decoder();

    decoder(const decoder &)             = delete;
    decoder & operator=(const decoder &) = delete;

    void set_trees(std::vector<tree> bank);
    void set_policy(const entmtp_policy_params & p);
    void set_draft_model(draft_model * d);                   // null: none
    void set_threads(int32_t n, const entmtp_costs * costs); // costs: see scheduler
    void set_stats(bool enabled);
    void reset_stats();

    // these return an entmtp_status; `error` says why it is not ENTMTP_OK
    int32_t eval(const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs);
    int32_t sample(llama_sampler * sampler, int32_t * token);
    int32_t sample_typical(llama_sampler * sampler, const typical_params & p, int32_t * token);
    int32_t settle(int32_t next = -1); // next: the token that left the tree, if one did

    // evaluating `token` next would follow the verified tree: a draft of it was right
    bool is_drafted(int32_t token) const {
        return live && tree_id >= 0 && topology(tree_id).find_child(path.back(), tokens, token) >= 0;
    }

    // by which drafters, enum entmtp_source; 0: by none
    uint32_t drafted_by(int32_t token) const;

    int32_t size_of_vocabulary() const { return n_vocab; }

    // what is in the memory, for drafting from it; tokens that are in no vocabulary are not drafted from
    void set_text(const int32_t * tokens, int32_t n);

    void look_in(const text_index * texts) { text.look_in(texts); } // for drafts from them; they outlive the decoder

    // what drafters remember of other texts
    void forget() {
        rows.forget();
        if (drafting) {
            drafting->forget();
        }
        walked.tree = -1;
    }

    // the last step's tree; its first n_max nodes go to `nodes`
    entmtp_walk walk(entmtp_node * nodes, int32_t n_max) const;

    const std::vector<float> & acceptance_weights() const { return policy.learned().get(); }
    void                       set_acceptance_weights(const float * weights) { policy.learned().set(weights); }

    // no pass runs, and none begins, while a caller has this
    pass::hold hold() const { return { shared, seq }; }

    // A pass of others begins, or graphs go: nothing of this one may be needed from the last one any more
    void detach();

    // how many of these tokens the memory begins with, of the settled ones
    int32_t in_common(const int32_t * tokens, int32_t n) const;

    // Begin with what another one that shares the passes has in common with these tokens; returns how many they are
    int32_t share(const decoder & from, const int32_t * tokens, int32_t n);

    void                set_outputs(int32_t mode) { out.set_mode(mode); }
    entmtp_outputs_info outputs_info() const { return out.info(); }
    entmtp_traffic      traffic() const;

    bool can_tree() const { return memory.can_tree(); }
    bool can_chain() const { return memory.can_chain(); }

    // tokens evaluated, the last of which can be sampled after; -1: none
    int32_t n_evaluated() const { return live ? n_past + (int32_t) path.size() : -1; }

    // cells that are taken in the memory: by the text, an unsettled tree, or what was there before it
    int32_t n_held() const {
        return std::max(memory.length(seq), n_past + (tree_id >= 0 ? (int32_t) tokens.size() : 0));
    }

    bool can_continue(int32_t past) const;

    void invalidate(int32_t n_past);
    void clear(); // and free the memory's cells
    void cancel(bool value) { cancelled = value; }

    const float * logits();
    const float * hidden();
    const float * all_logits(); // of the last prompt, if they were asked for

    // of the distribution that `token` was drawn from
    entmtp_signals signals(int32_t token);

    // its most probable tokens [k] and their ln p, the best first; returns how many are known
    int32_t best(int32_t k, int32_t * best, float * log_p);

    const int32_t n_vocab;

    const remote_servers servers;

    step_log    steps;
    std::string error;

  private:
    decoder(llama_context * ctx, heads * h, std::unique_ptr<pass> own, pass * shared, int32_t seq, int32_t n_ctx);

    void    set_row(int32_t i);
    int32_t eval_prompt(const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs);
    int32_t advance(int32_t token);
    int32_t step(int32_t token);
    int32_t decode_status(int32_t status);
    int32_t keep_path(int32_t next);
    void    leave_tree();
    void    abandon();
    void    keep_graphs(uint32_t n);

    int32_t verify_tree(int32_t id);
    void    drop_nodes(const std::vector<int32_t> & kept);
    void    run_prefix(const std::vector<int32_t> & rows, int32_t pos0);
    void    begin_token();
    int32_t room() const;

    const tree & topology(int32_t id) const { return id < (int32_t) bank.size() ? bank[id] : grown; }

    states draft_input() {
        return draft_heads->prefix() ? draft_heads->prefix()->output() : out.hidden_states({ row });
    }

    void          look();
    bool          uses_rows() const { return policy.mixes() || (!draft_heads && policy.is_static()); }
    void          draft_from_rows(const tree & topology);
    void          draft_from_model(const tree & topology);
    void          mix(const entmtp_signals & s);
    const float * expand(int32_t l, int32_t n);
    float         greedy_path();
    int32_t       draft(int32_t token);

    llama_context *       ctx;
    heads *               draft_heads;
    draft_model *         drafting = nullptr;
    std::unique_ptr<pass> own; // of a decoder that shares none
    pass &                shared;
    verifier &            memory;
    outputs &             out;
    const int32_t         seq;
    const int32_t         n_ctx;
    uint32_t              n_slots = 0; // sizes of passes whose graphs are kept

    std::vector<tree>    bank;         // bank[0] is a lone root
    std::vector<int32_t> n_nodes;      // [n_trees]
    std::vector<int32_t> depth;        // [n_trees]
    tree                 grown;        // of the step, where the policy grows its own
    scheduler            policy;
    ema                  running;
    text_index           text;            // the settled tokens, and the root of the step that is being made
    successors           rows;            // most probable tokens after those that were seen
    distribution         seen;            // of the last evaluated token's logits
    bool                 is_seen = false; // it was looked at

    int32_t n_past = 0;                   // settled tokens in the memory
    bool    live   = false;               // the outputs of the context belong to the last evaluated token
    int32_t row    = -1;                  // its index in the last pass, or the name of a row that was kept
    part    work;                         // of this sequence in the last pass

    // whose rows entmtp_decoder_all_logits() has: of the token that went on, or of a prompt
    enum class all_of { nothing, token, prompt } all = all_of::nothing;
    std::vector<float> all_rows; // [n, n_vocab] of a prompt in company: the next pass may begin at any time

    // the verified tree, while it is being walked
    int32_t               tree_id = -1; // in the bank; n_trees: the grown one; -1: none
    std::vector<int32_t>  tokens;       // [n_nodes]
    std::vector<float>    reach;        // [n_nodes] chance that a node is reached, where drafters are mixed; else empty
    std::vector<uint32_t> sources;      // [n_nodes] who proposed them, where drafters are mixed; else empty
    std::vector<int32_t>  path;         // visited nodes, the root first
    std::vector<int32_t>  typical;      // path chosen by typical acceptance, empty if none was

    // the same when the walk is over, until the next draft
    struct {
        int32_t              tree = -1; // -1: none
        int32_t              root = 0;  // its position
        std::vector<int32_t> path;
    } walked;

    // guesses of the heads, level by level, while a tree is grown
    std::vector<int32_t> guess; // [n_heads][max_width][n_guess]
    std::vector<float>   log_p; // the same

    bool   stats    = false;
    bool   in_step  = false;                  // a step was verified and is being walked
    bool   in_list  = false;                  // it is the last of steps
    double t_draft  = 0;                      // us
    double t_heads  = 0;                      // us of them, in the heads
    double t_verify = 0;                      // us

    std::vector<llama_token_data> candidates; // for the sampler, in company

    std::atomic<bool> cancelled{ false };
};

} // namespace entmtp
