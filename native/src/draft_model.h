// A model that drafts: a smaller one, an EAGLE-3 layer, the layers for multi-token prediction that a model brings along, or
// Gemma 4's assistant.

#pragma once

#include "draft_vocab.h"
#include "text.h"

#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace entmtp {

// It follows the text only when it is asked: what came since it last was goes through it in one pass, together with the
// token to draft after. What it drafted itself, and was right, a smaller model need not run again.
//
// Prediction layers (NextN; DeepSeek-V3, arXiv 2412.19437, section 2.2) take a token and the hidden state before it: of the
// target for settled tokens, their own for drafted ones. So what they keep of drafts is void once these are settled. An
// EAGLE-3 layer (arXiv 2503.01840) does the same with the inputs of three of the target's layers, put together by a matrix
// of its own; it counts positions by the state, one less than by the token. An assistant takes the same two, but looks at
// the target's keys and values in place of own ones, and from the place of the first token for all of a path.
class draft_model {
  public:
    static constexpr int32_t max_depth = 16;

    // throws std::runtime_error with one sentence
    //   target  context of the text that is drafted for, which outlives this
    //   model   of the same vocabulary, an EAGLE-3 layer or an assistant, not owned; null: the prediction layers of the
    //           target's own
    //   params  of the target's context
    //   n_draft_vocab  tokens that it can propose, 0: all, -1: what pays about. All, too, where the file has a draft vocabulary of
    //           its own, and where llama.cpp's graph, or how the projection lies in memory, allow no other
    draft_model(llama_context * target, llama_model * model, llama_context_params params, int32_t n_draft_vocab);

    bool predicts() const { return kind == what::layers; } // it is the prediction layers of the model itself

    int32_t n_draft_vocab() const { return vocabulary ? vocabulary->size() : n_known; } // tokens that it can propose

    void forget(); // what it keeps of texts, beside its memory

    // drafted tokens that it can go on after. Of several layers that are trained for one depth each, the first is used
    int32_t depth() const { return n_layers > 1 ? 1 : max_depth; }

    // why it does not draft any more, one sentence; empty: it does
    const std::string & broken() const { return why; }

    // the k best tokens after a text and a path below it, best first; false: it cannot tell
    //   path    empty, or that of the call before and one token more
    //   tokens [k], log_p [k]  results
    bool expand(const text_index & text, const std::vector<int32_t> & path, int32_t k, int32_t * tokens, float * log_p);

    // These tokens, from position pos0 on, are settled.
    //   rows [n]  of the target's last pass
    void follow(const std::vector<int32_t> & tokens, int32_t pos0, const std::vector<int32_t> & rows);

    void truncate(int32_t pos); // what follows in the text is other than it was
    void set_threads(int32_t n) { llama_set_n_threads(ctx.get(), n, n); }

    double cost(const text_index & text, int32_t l) const; // us of drafting after a path of l tokens, as believed
    double token_cost() const { return t_pass; }           // us of a pass over one token

  private:
    enum class what { model, layers, eagle3, assistant };

    static bool is_of(const llama_model * model, const char * architecture);

    bool    from_states() const { return kind != what::model; }
    bool    has_memory() const { return kind != what::assistant; }
    int32_t shift() const { return kind == what::eagle3 ? 1 : 0; } // a token's position, less that in its memory

    void                 check_layer(const llama_model * base, const llama_model * model) const;
    void                 follow_layers();
    void                 check_vocabulary() const;
    void                 choose_vocabulary(int32_t n);
    const ggml_tensor *  projection() const;
    std::vector<int32_t> own_tokens(const ggml_tensor * d2t) const;
    const float *        last_logits(int32_t row);
    void                 measure();
    int32_t              n_new(const text_index & text, int32_t l) const;
    void                 observe(int32_t n, double us);
    void                 cut(int32_t pos);
    int32_t              n_states() const { return (int32_t) states.size() / n_state; }
    bool                 read_state(int32_t row);
    bool                 encode(std::vector<float> & rows);
    const float *        run(int32_t pos0, const std::vector<int32_t> & tokens, const float * rows);
    int32_t              in_common(const text_index & text) const;
    const float *        go_on(const text_index & text, const std::vector<int32_t> & path);
    const float *        predict(const text_index & text, const std::vector<int32_t> & path);
    const float *        catch_up(int32_t root);
    const float *        ask(int32_t token, int32_t pos);
    const float *        look(const text_index & text, const std::vector<int32_t> & path);
    void                 drop_old_states();
    bool                 add(int32_t i, int32_t token, int32_t pos, const float * row, bool output);
    bool                 process(int32_t last);

    struct free_context {
        void operator()(llama_context * c) const { llama_free(c); }
    };

    struct free_batch {
        void operator()(llama_batch_ext * b) const { llama_batch_ext_free(b); }
    };

    llama_context * target;
    what            kind;
    int32_t         n_layers  = 0;       // prediction layers
    int32_t         n_embd    = 0;       // of the states that go into its passes
    int32_t         n_state   = 1;       // of those of the target that are kept for it
    const int32_t * inputs_of = nullptr; // EAGLE-3: the layers of the target that it sees the inputs of
    int32_t         n_inputs  = 0;
    int32_t         n_vocab   = 0;       // its own
    int32_t         n_known   = 0;       // tokens that the target knows, too
    int32_t         n_batch   = 0;

    std::unique_ptr<llama_context, free_context> ctx;
    std::unique_ptr<llama_batch_ext, free_batch> batch;

    std::unique_ptr<draft_vocabulary> vocabulary; // null: it proposes any token
    std::vector<float>                fetched;    // [n_draft_vocab] logits that lay on a device
    int32_t                           n_met = 0;  // tokens of the text that the vocabulary has met

    std::vector<int32_t> held;                    // tokens in its memory, by position; -1: before its memory begins
    int32_t              n_final = 0;             // of these, that are the text's and stay

    // prediction layers: settled tokens that they have not seen yet, from position n_final on, and the target's hidden
    // states, of these and of some before
    std::vector<int32_t> waiting;
    std::vector<float>   states;     // [n][n_state]
    int32_t              state0 = 0; // position of the first
    std::vector<float>   own;        // [n_embd] their own state after the last token that they were run over

    std::string why;

    double t_pass  = 0.0; // us of a pass over one token
    double t_token = 0.0; // us of every further one
};

} // namespace entmtp
