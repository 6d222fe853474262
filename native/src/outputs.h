// The results of a pass - logits and hidden states of its nodes - and how the host reads them: as little as it needs.

#pragma once

#include "entropy.h"
#include "reduce.h"
#include "transfer.h"

#include "entmtp.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace entmtp {

// the device of the model's output layer: logits and hidden states lie there
ggml_backend_dev_t output_device(const llama_model * model);

// Three ways, enum entmtp_outputs. HOST: llama.cpp copies every row. ROWS: all stays where it was computed, and rows that
// are asked for are fetched (in host memory: read in place). DEVICE: as ROWS, and reductions in the graph tell of every row
// what most callers want to know, so that hardly a row is fetched.
class outputs {
  public:
    outputs(llama_context * ctx, bool want_hidden);
    ~outputs();

    outputs(const outputs &)             = delete;
    outputs & operator=(const outputs &) = delete;

    // one of enum entmtp_outputs; not while results are still to be read
    void set_mode(int32_t mode);

    entmtp_outputs_info info() const;

    // around llama_process(): n tokens, of which those from first_output on have outputs
    //   to_host  llama_get_logits() shall give the rows of this pass
    void begin(bool to_host);
    void end(int32_t n, int32_t first_output);

    // of a token of the pass, by its index there, or of one that was kept. Pointers are valid until the next pass; null: no
    // such row
    const float * logits(int32_t i); // [n_vocab]
    const float * hidden(int32_t i); // [n_embd]
    states        hidden_states(std::vector<int32_t> tokens);
    distribution  describe(int32_t i);
    float         logit(int32_t i, int32_t token);

    // the k largest logits of a row, the largest first, and their tokens; returns how many are known without fetching it
    int32_t best(int32_t i, int32_t k, int32_t * tokens, float * logits);

    static int32_t best(const float * row, int32_t n_vocab, int32_t k, int32_t * tokens, float * logits);

    // the sampler's choice at a token of the pass, accepted by it
    int32_t sample(llama_sampler * sampler, int32_t i);

    // the same of a row that was read; candidates is what it works with
    static int32_t
    sample(llama_sampler * sampler, const float * logits, int32_t n_vocab, std::vector<llama_token_data> & candidates);

    // keep a row when the pass is over, and what it is called then; until it is let go
    int32_t keep(int32_t i);
    void    release(int32_t i);

    // the last pass built its graph anew
    bool built() const { return is_built; }

    entmtp_traffic traffic = {};

  private:
    static constexpr int32_t first_kept = 1 << 30; // no pass has so many tokens

    struct kept_row {
        std::vector<float> logits; // [n_vocab]
        std::vector<float> hidden; // [n_embd], if they are wanted
    };

    bool in_pass(int32_t i) const { return i < first_kept; }

    static constexpr int32_t n_candidates = 65; // top-k samplers keep up to 64: with one more, ties show

    const reduction * reduced();                // of the pass; null: there is none, or it is of no use
    void              use_reductions(int32_t k);
    void              announce(const std::string & why);
    static int32_t    apply(llama_sampler * sampler, std::vector<llama_token_data> & candidates);
    bool              from_candidates(llama_sampler * sampler, int32_t i);

    llama_context *    ctx;
    ggml_backend_dev_t device;

    const int32_t n_vocab;
    const int32_t n_embd;
    const bool    want_hidden;

    int32_t     mode = ENTMTP_OUTPUTS_HOST;
    std::string note; // why the mode is not the one that was asked for

    std::unique_ptr<reducer> reductions;
    int32_t                  most_k    = 0; // that the device can find
    bool                     by_chunks = false;
    int32_t                  wanted_k  = 1;
    int32_t                  n_unused  = 0; // tokens in a row that would have done with less

    std::map<int32_t, kept_row> kept;
    int32_t                     n_kept = 0; // so far

    // of the pass
    bool                 at_host      = true;
    int32_t              first_output = 0;
    int64_t              n_reused     = 0; // graphs, when it began
    bool                 is_built     = false;
    const ggml_tensor *  t_logits     = nullptr;
    const ggml_tensor *  t_hidden     = nullptr;
    bool                 is_read      = false;    // the reductions are in the vectors below
    int32_t              k            = 0;
    std::vector<float>   values;                  // [n][width(k)]
    std::vector<int32_t> ids;                     // [n][k]

    std::map<int32_t, std::vector<float>> rows;   // read whole; empty ones in place
    std::vector<float>                    state;  // fetched hidden state
    std::vector<llama_token_data>         tokens; // for the sampler
};

} // namespace entmtp
