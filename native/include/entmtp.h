// EntMTP: tree speculation for llama.cpp with multi-token-prediction heads.
//
// C ABI of libentmtp. A decoder wraps a llama_context and stands in for the two calls of a plain decode loop,
// "evaluate tokens" and "sample the next one". Between them it drafts a tree of guesses with the heads and lets the
// base model check the whole tree in one pass, so most tokens need no pass of their own.
//
//     entmtp_decoder_eval(dec, prompt, n, 0, false);
//     for (;;) {
//         entmtp_decoder_sample(dec, sampler, &token);     // the user's whole sampler chain, one draw per token
//         entmtp_decoder_eval(dec, &token, 1, n++, false); // follows the verified tree, or drafts and verifies the next
//     }
//
// No function throws. Functions that can fail return a negative status (or NULL) and leave one sentence in
// entmtp_last_error(), which belongs to the calling thread.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    if defined(ENTMTP_BUILD)
#        define ENTMTP_API __declspec(dllexport)
#    else
#        define ENTMTP_API __declspec(dllimport)
#    endif
#else
#    define ENTMTP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct llama_model;
struct llama_sampler;

struct entmtp_heads;
struct entmtp_decoder;

enum entmtp_status {
    ENTMTP_OK           = 0,
    ENTMTP_ERROR        = -1, // see entmtp_last_error()
    ENTMTP_CONTEXT_FULL = -2, // no room for another token
    ENTMTP_CANCELLED    = -3, // entmtp_decoder_cancel() was called; the decoder holds what was settled before
    ENTMTP_SERVER_LOST  = -4, // an RPC server that holds a part of the model is gone: the model must be loaded anew
};

ENTMTP_API const char * entmtp_version(void);

// the reason of the last failure in this thread, one sentence
ENTMTP_API const char * entmtp_last_error(void);

//
// heads
//

// Load a heads file (docs/heads-gguf.md) for a base model. Every key is checked against the model.
// The weights go to the device that holds the model's output layer. NULL on failure.
ENTMTP_API struct entmtp_heads *
entmtp_heads_load(const char * path, const struct llama_model * model, int32_t n_threads);
ENTMTP_API void entmtp_heads_free(struct entmtp_heads * heads);

struct entmtp_heads_info {
    int32_t n_heads;
    int32_t n_blocks;      // residual blocks per head
    int32_t n_embd;
    int32_t n_vocab;       // base vocabulary
    int32_t n_vocab_draft; // tokens the heads can propose
    int32_t hydra;         // 0: Medusa, 1: Hydra
    int32_t grounded;      // heads see the tokens drafted before
    int32_t prefix;        // Hydra++ decoder layer
    int64_t n_bytes;       // size of the weights
    char    device[64];
};

ENTMTP_API void entmtp_heads_get_info(const struct entmtp_heads * heads, struct entmtp_heads_info * info);

// Logits of one head, for tests and tuning.
//   h      [n_embd]         hidden state; with a prefix layer, its output
//   path   [head + 1]       the tokens after the hidden state's (read by grounded heads only)
//   logits [n_vocab_draft]  result
ENTMTP_API int32_t
entmtp_heads_logits(struct entmtp_heads * heads, int32_t head, const float * h, const int32_t * path, float * logits);

// The k best guesses of one head after each of n paths, best first. Heads that do not see the path want n = 1.
//   h      [n_embd]       hidden state; with a prefix layer, its output
//   paths  [n][head + 1]  the tokens after the hidden state's (read by grounded heads only)
//   tokens [n][k]         results: base tokens
//   log_p  [n][k]         and their ln p
ENTMTP_API int32_t entmtp_heads_expand(struct entmtp_heads * heads,
                                       int32_t               head,
                                       const float *         h,
                                       const int32_t *       paths,
                                       int32_t               n,
                                       int32_t               k,
                                       int32_t *             tokens,
                                       float *               log_p);

// The Hydra++ decoder layer over n hidden states at positions pos0 .. pos0 + n - 1, continuing what was run before.
//   h   [n][n_embd]
//   out [n_embd]      result for the last one
ENTMTP_API int32_t
entmtp_heads_prefix(struct entmtp_heads * heads, const float * h, int32_t n, int32_t pos0, float * out);

// FNV-1a 64 of the model's vocabulary, see docs/heads-gguf.md
ENTMTP_API uint64_t entmtp_vocab_fingerprint(const struct llama_model * model);

//
// decoder
//

// heads may be NULL: plain decoding only. The context must outlive the decoder. Sequence 0 is used.
// A context has one decoder, and heads serve one decoder. Contexts with a lowered n_outputs_max cannot hold trees larger
// than that: leave it at its default.
ENTMTP_API struct entmtp_decoder * entmtp_decoder_init(struct llama_context * ctx, struct entmtp_heads * heads);
ENTMTP_API void                    entmtp_decoder_free(struct entmtp_decoder * dec);

// The bank: n_trees topologies, the first of them a lone root (plain decoding).
//   n_nodes [n_trees]     nodes of each tree, the root among them
//   parent  [sum n_nodes] index of the parent in the same tree, lower than the node's own; -1 for the root
//   rank    [sum n_nodes] which of the parent's children the node is in the head's order (0: most probable); 0 for the root
ENTMTP_API int32_t entmtp_decoder_set_trees(struct entmtp_decoder * dec,
                                            int32_t                 n_trees,
                                            const int32_t *         n_nodes,
                                            const int32_t *         parent,
                                            const int32_t *         rank);

enum entmtp_policy {
    ENTMTP_POLICY_OFF        = 0, // plain decoding
    ENTMTP_POLICY_STATIC     = 1, // always tree static_tree
    ENTMTP_POLICY_ENTROPY    = 2, // the tree of the bank that pays most in the bin of the running entropy
    ENTMTP_POLICY_CONFIDENCE = 3, // a tree grown from the heads' calibrated probabilities while the next node pays
    // the published policies, for comparison: they follow a score and know no costs, except best depth
    ENTMTP_POLICY_LADDER     = 4, // tree ladder[bin of the score]
    ENTMTP_POLICY_HYSTERESIS = 5, // ladder[0] from a score below edge 0 on, ladder[1] from a score above edge 1 on
    ENTMTP_POLICY_BEST_DEPTH = 6, // argmax of (1 + a + a^2 + ... + a^depth) / cost, with acceptance a from the score
    // one tree grown from all drafters, the text, rows seen before and heads if there are any, while the next node pays
    ENTMTP_POLICY_AUTO       = 7,
};

// drafters: bits of entmtp_policy_params.drafters, and of what entmtp_decoder_drafted_by() says
enum entmtp_source {
    ENTMTP_SOURCE_TEXT  = 1, // what followed when the last tokens of the text came before
    ENTMTP_SOURCE_ROWS  = 2, // the most probable tokens after a token when the model last saw it (token recycling)
    ENTMTP_SOURCE_HEADS = 4,
    ENTMTP_SOURCE_MODEL = 8, // a smaller model, or the model's own layers for multi-token prediction
};
#define ENTMTP_N_SOURCES 4

// the acceptance model of the auto policy: a logistic model for each set of drafters (its bits are the index)
//   inputs: 1, log2(tokens that match) - 2, ln(share of the places that match), ln(1 + rank of the match), ln p and
//           ln(1 - p) of the row, logit of the heads, running entropy, ln(depth), hits of text, of rows and of heads,
//           ln p and ln(1 - p) of the drafting model, its hits
#define ENTMTP_N_SETS 16
#define ENTMTP_N_INPUTS 15

// what a published policy looks at. For best depth, a is exp(-H), p, and the geometric mean of the p
enum entmtp_score {
    ENTMTP_SCORE_ENTROPY = 0, // running entropy, nats
    ENTMTP_SCORE_TOP1    = 1, // 1 - p of the base model's most probable token
    ENTMTP_SCORE_PATH    = 2, // 1 - product of the heads' top-1 probabilities down the greedy path
};

// how the entropy policy weighs tokens against time
enum entmtp_criterion {
    ENTMTP_CRITERION_RATIO = 0, // argmax of tokens / cost: best where a bin lasts
    ENTMTP_CRITERION_PRICE =
        1, // argmax of tokens - cost * (tokens per time so far): best where the next step's bin is fresh
};

// costs of this machine, microseconds
struct entmtp_costs {
    int32_t       n_verify;
    const float * verify; // [n_verify] a pass over 1 .. n_verify tokens
    int32_t       n_levels;
    const float * level;  // [n_levels][3] one head after 1, 2 and 4 paths (confidence)
    const float * tree;   // [n_trees] draft of each tree of the bank
    // that the first passes of a size take longer than later ones, in all, where that is worth mentioning (on a device);
    // 0: grown trees may have any size. Else they are filled up to powers of two
    float         build;
};

// inputs of the calibration's logistic models: numbers of weights
//   accept: 1, ln p, ln(1 - p), running entropy, entropy, ln(1 + rank), ln p of the path above, hits, entropy of the
//           head's best guesses
//   ahead:  1, running entropy, entropy, ln p of the root, hits, ln p of the greedy path so far, ln p of its last token
#define ENTMTP_N_ACCEPT 9
#define ENTMTP_N_AHEAD 7

// what the heads' probabilities are worth (confidence), fitted to traces by python -m entmtp.tune
struct entmtp_calibration {
    int32_t n_levels;

    // Hits: how often the best guess of head 0 was right lately, of all signals the most telling one. Running mean over
    // the steps that ran head 0, with this start and window.
    float hits;
    float hits_window;    // steps

    const float * accept; // [n_levels][ENTMTP_N_ACCEPT] logit of: a guess is right, given that its path is

    // Look-ahead: before head l runs, a logistic model foresees whether its best guess will be right. In each bin of that
    // probability, scenarios (equally probable) hold the acceptance of the best 3 nodes of this level and of the ones
    // below, relative to the node they hang from.
    int32_t       n_bins;
    int32_t       n_scenarios;
    const float * ahead;     // [n_levels][ENTMTP_N_AHEAD]
    const float * edges;     // [n_levels][n_bins - 1] of the foreseen probability, increasing
    const float * scenarios; // [n_levels][n_bins][n_scenarios][n_levels][3]
};

struct entmtp_policy_params {
    int32_t         policy;
    int32_t         static_tree;
    float           ema_window;              // tokens
    int32_t         n_bins;                  // bins of the entropy, or of the score; at least 1
    const float *   bin_edges;               // [n_bins - 1], increasing
    const float *   expected;                // [n_bins][n_trees] expected accepted draft tokens per step (entropy)
    int32_t         criterion;               // (entropy)
    int32_t         score;                   // (published policies)
    const int32_t * ladder;                  // [n_bins] trees (ladder, hysteresis)

    const struct entmtp_costs *       costs; // entropy, confidence, best depth, auto
    const struct entmtp_calibration * calibration; // confidence; auto, if heads draft

    uint32_t      drafters;                        // enum entmtp_source (auto)
    const float * acceptance; // [ENTMTP_N_SETS][ENTMTP_N_INPUTS] to begin with (auto); NULL: what the library has

    bool adapt; // costs and acceptance follow what is seen, and drafting stops where it loses against plain decoding
};

// call after set_trees
ENTMTP_API int32_t entmtp_decoder_set_policy(struct entmtp_decoder * dec, const struct entmtp_policy_params * params);

// Compute on so many CPU threads from now on: passes of any size, and drafts. Costs, and what was learned of them, are kept
// by number of threads; the first call after set_policy says what number the policy's are of.
//   costs  of a number that is new to the policy; NULL: as they are now
ENTMTP_API int32_t entmtp_decoder_set_threads(struct entmtp_decoder *     dec,
                                              int32_t                     n_threads,
                                              const struct entmtp_costs * costs);

// Evaluate n tokens after the first n_past ones; later ones are forgotten. At most n_batch tokens.
// One token that follows what was evaluated before is a decode step: it may already be verified.
//   all_outputs   logits of every token, not only of the last, can be read with llama_get_logits(). Of a single token
//                 that may have been verified already: read them with entmtp_decoder_logits()
ENTMTP_API int32_t
entmtp_decoder_eval(struct entmtp_decoder * dec, const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs);

// Sample the next token through the sampler chain, and accept it there.
ENTMTP_API int32_t entmtp_decoder_sample(struct entmtp_decoder * dec, struct llama_sampler * sampler, int32_t * token);

// Typical acceptance (lossy): follow the longest path whose tokens all have p > min(epsilon, alpha * exp(-H)) under the
// base model at temperature temp, then draw the token that leaves the tree through the sampler chain. Drafts are not drawn,
// but accepted by the chain. Medusa (arXiv 2401.10774), section 2.3.1.
ENTMTP_API int32_t entmtp_decoder_sample_typical(struct entmtp_decoder * dec,
                                                 struct llama_sampler *  sampler,
                                                 float                   temp,
                                                 float                   epsilon,
                                                 float                   alpha,
                                                 int32_t *               token);

// The same of output i of a context without a decoder: llama_sampler_sample() throws where a grammar leads to too much.
ENTMTP_API int32_t entmtp_sample(struct llama_context * ctx,
                                 struct llama_sampler * sampler,
                                 int32_t                i,
                                 int32_t *              token);

// The token is a draft that was right: it is in the verified tree, after the tokens evaluated so far, so that evaluating it
// next takes no pass.
ENTMTP_API bool entmtp_decoder_is_drafted(const struct entmtp_decoder * dec, int32_t token);

// By which drafters: enum entmtp_source; 0: by none.
ENTMTP_API uint32_t entmtp_decoder_drafted_by(const struct entmtp_decoder * dec, int32_t token);

// The text that is in the memory, where it did not come through entmtp_decoder_eval() (a state was loaded): for drafting
// from it.
ENTMTP_API void entmtp_decoder_set_text(struct entmtp_decoder * dec, const int32_t * tokens, int32_t n);

// Forget all that drafters remember of other texts than the one in the memory, so that not even their speed tells of it.
ENTMTP_API void entmtp_decoder_forget(struct entmtp_decoder * dec);

// Weights [ENTMTP_N_SETS][ENTMTP_N_INPUTS] of the acceptance model as they are now (auto).
ENTMTP_API int32_t entmtp_decoder_get_acceptance(const struct entmtp_decoder * dec, float * weights);

// Leave in the memory exactly what plain decoding would have there: the evaluated tokens, no drafts.
ENTMTP_API int32_t entmtp_decoder_settle(struct entmtp_decoder * dec);

// Forget the state after n_past tokens (the memory was changed from outside, for example by loading a state). At most as
// many as the context holds.
ENTMTP_API void entmtp_decoder_invalidate(struct entmtp_decoder * dec, int32_t n_past);

// Logits [n_vocab] and hidden state [n_embd] of the last evaluated token, NULL if there is none.
// Valid until the next call that evaluates.
ENTMTP_API const float * entmtp_decoder_logits(struct entmtp_decoder * dec);
ENTMTP_API const float * entmtp_decoder_hidden(struct entmtp_decoder * dec);

// Logits [n, n_vocab] of all n tokens of the last entmtp_decoder_eval() that asked for them, NULL if the last one did not.
// Valid until the next.
ENTMTP_API const float * entmtp_decoder_all_logits(struct entmtp_decoder * dec);

// What a policy sees of the distribution that the next token is drawn from.
struct entmtp_signals {
    float entropy;  // nats
    float top1;     // p of the most probable token
    float log_root; // ln p of a token, the root of the next step
};

// of the last evaluated token; `token` is the one drawn after it
ENTMTP_API int32_t entmtp_decoder_signals(struct entmtp_decoder * dec, int32_t token, struct entmtp_signals * signals);

//
// outputs: where the logits of a pass are reduced (docs/gpu.md)
//

enum entmtp_outputs {
    ENTMTP_OUTPUTS_AUTO = 0, // DEVICE if the output layer is on a device with memory of its own, else HOST
    ENTMTP_OUTPUTS_HOST = 1, // every row is copied to the host; llama_get_logits() gives them
    ENTMTP_OUTPUTS_ROWS =
        2, // rows stay where they are, those that are visited are fetched (in host memory: read in place)
    ENTMTP_OUTPUTS_DEVICE = 3, // the device reduces the rows; one that a sampler needs whole is fetched
};

// Until then AUTO. Tokens do not depend on it.
ENTMTP_API int32_t entmtp_decoder_set_outputs(struct entmtp_decoder * dec, int32_t mode);

struct entmtp_outputs_info {
    int32_t mode;       // what is done
    char    device[64]; // of the output layer
    char    note[128];  // why it is not what was asked for; empty if it is
};

ENTMTP_API void entmtp_decoder_get_outputs(const struct entmtp_decoder * dec, struct entmtp_outputs_info * info);

// What crossed between host and device since the decoder was made. llama.cpp's own inputs of a pass (tokens, positions,
// attention mask) are not among it.
struct entmtp_traffic {
    int64_t n_passes;       // of the model
    int64_t n_outputs;      // tokens with outputs in them
    int64_t to_host;        // bytes
    int64_t to_device;      // bytes
    int64_t on_device;      // bytes, from one tensor to another of the same device
    int64_t n_rows;         // rows of logits that the host read whole
    int64_t n_syncs;        // times that the host waited
    int64_t n_graphs;       // graphs of the model that were built or allocated anew
    int64_t n_draft_graphs; // graphs of the heads
};

ENTMTP_API void entmtp_decoder_get_traffic(const struct entmtp_decoder * dec, struct entmtp_traffic * traffic);

// Number of evaluated tokens, the last of which can be sampled after; -1 where there is none: nothing was evaluated yet,
// or the last evaluation failed or was cancelled, and the text must be evaluated again.
ENTMTP_API int32_t entmtp_decoder_n_evaluated(const struct entmtp_decoder * dec);

// Evaluation can go on after the first n_past tokens: they are evaluated, and the memory still holds all that a token
// there attends to. Where layers have a sliding window and their cache is no larger (swa_full = false), it forgets what
// lies before it. A state goes back by a few tokens of the last pass, where llama_context_params.n_rs_seq asks for that.
ENTMTP_API bool entmtp_decoder_can_continue(const struct entmtp_decoder * dec, int32_t n_past);

// The memory of the model can hold a token tree; recurrent and hybrid memories cannot.
ENTMTP_API bool entmtp_decoder_can_tree(const struct entmtp_decoder * dec);

// It can hold drafts one after the other, and be cut back by them: also memories with states to go back to
// (llama_context_params.n_rs_seq). Then only the auto policy drafts, without branches.
ENTMTP_API bool entmtp_decoder_can_chain(const struct entmtp_decoder * dec);

// Stop the evaluation that is running, or the next one. May be called from any thread.
ENTMTP_API void entmtp_decoder_cancel(struct entmtp_decoder * dec);

// Take back a cancellation that came too late to stop anything.
ENTMTP_API void entmtp_decoder_resume(struct entmtp_decoder * dec);

//
// statistics
//

struct entmtp_step {
    float   entropy; // running estimate when the tree was chosen, nats
    int32_t tree;    // index in the bank, 0 if nothing was drafted; n_trees: grown for this step
    int32_t n_nodes; // tokens in the verify pass, the root among them
    int32_t n_accepted;
    int32_t t_draft_us;
    int32_t t_verify_us;
    int32_t t_sample_us;
    int32_t t_host_us;              // everything else of ours: entropy, choice, batch, commit
    int32_t n_by[ENTMTP_N_SOURCES]; // accepted tokens by drafter: what several proposed counts for the first of them
};

// of steps that have no record any more
struct entmtp_step_sums {
    int64_t n_steps;
    int64_t n_nodes;
    int64_t n_accepted;
    double  entropy;
    int64_t t_draft_us;
    int64_t t_verify_us;
    int64_t t_sample_us;
    int64_t t_host_us;
    int64_t n_by[ENTMTP_N_SOURCES];
};

// Off by default: then nothing is timed or kept. The latest 65,536 steps since the last reset have a record each, older
// ones are summed up. Other trees start anew.
ENTMTP_API void   entmtp_decoder_set_stats(struct entmtp_decoder * dec, bool enabled);
ENTMTP_API size_t entmtp_decoder_n_steps(const struct entmtp_decoder * dec);
ENTMTP_API size_t entmtp_decoder_get_steps(const struct entmtp_decoder * dec,
                                           struct entmtp_step *          steps,
                                           size_t                        first,
                                           size_t                        n);
// by_tree [n_trees]  how many of the older steps had each tree
ENTMTP_API void   entmtp_decoder_get_older_steps(const struct entmtp_decoder * dec,
                                                 struct entmtp_step_sums *     sums,
                                                 int64_t *                     by_tree,
                                                 int32_t                       n_trees);
ENTMTP_API void   entmtp_decoder_reset_stats(struct entmtp_decoder * dec);

//
// replay
//

// Texts that were decoded plainly, with what the policies would have seen and the heads would have guessed. Under lossless
// acceptance a tree accepts the longest prefix of the real tokens whose rank path it contains, so a policy can be run over
// traces without a model: python/entmtp/measure/rollouts.py records them, the scheduler of the decoder is what is replayed.
struct entmtp_trace {
    int32_t         n_texts;
    const int32_t * n_tokens; // [n_texts] tokens generated

    int32_t n_heads;
    int32_t n_guess; // guesses per expanded path (k)

    // per token, texts one after the other: the state before token i, i being the root
    const struct entmtp_signals * signals; // [n] entropy and top1 of the distribution that token i was drawn from
    const int32_t *               rank;    // [n][n_heads] rank that head h gave to token i + 1 + h; -1: the text ends
    // [n][n_paths][n_guess] ln p of the guesses after each expanded path: 1 for head 0, 4 for each other head; 1 for all
    // heads if they do not see the path. NULL: the confidence policy and the path score cannot be replayed
    const float *                 log_p;
    bool                          sees_path;
};

// One text after the other, as a fresh prompt each; the policy keeps what it learned. Times are those of params->costs
// unless `truth` says what steps really cost.
//   steps   [n_max] results; t_draft_us and t_verify_us are the true costs
// Returns the number of steps, or a negative status.
ENTMTP_API int64_t entmtp_replay(const struct entmtp_trace *         trace,
                                 int32_t                             n_trees,
                                 const int32_t *                     n_nodes,
                                 const int32_t *                     parent,
                                 const int32_t *                     rank,
                                 const struct entmtp_policy_params * params,
                                 const struct entmtp_costs *         truth,
                                 struct entmtp_step *                steps,
                                 int64_t                             n_max);

//
// CPU kernels
//

// Kernels for passes of few tokens take part in models and heads that are loaded from now on, and in attention on the CPU.
// A token's results then do not depend on how many tokens its pass has. docs/kernels.md
//   name: one of entmtp_kernels_name(), NULL for the best of this processor
ENTMTP_API int32_t entmtp_kernels_enable(const char * name);

// Later models are computed by ggml, and attention of all; matrices that were packed stay so. Not while a pass runs.
ENTMTP_API void entmtp_kernels_disable(void);

// NULL while disabled
ENTMTP_API const char * entmtp_kernels_current(void);

// kernels that this processor can run, best first; NULL after the last
ENTMTP_API const char * entmtp_kernels_name(int32_t i);

// How weights of models that are loaded from now on are held while kernels are on, by default 0 and 0.
//   embeddings: 1: token embeddings are packed, too, and looked up there. Where they are also the output projection, they are
//               then held once. Otherwise they stay in ggml's layout, which costs nothing where the file is mapped
//   locked:     1: the system must keep packed weights in memory
ENTMTP_API void entmtp_kernels_hold(int32_t embeddings, int32_t locked);

// bytes since then that should be locked in memory, and that the system did not lock
ENTMTP_API uint64_t entmtp_kernels_unlocked(void);

// How products with matrices of a ggml_type are computed while kernels are on: 2: from panels, cheap for a few tokens;
// 1: row by row with ggml's own product of one token, the same bits for any number of them; 0: by ggml, in its own ways.
ENTMTP_API int32_t entmtp_kernels_of(int32_t type);

// Products on the CPU that ggml computed itself since the start of the process, because the kernels do not know the type
// or the op. A model whose passes leave it unchanged gives equal bits in passes of any size.
ENTMTP_API uint64_t entmtp_kernels_missed(void);

// What the machine can do, for judging kernels: bytes per second read from memory and int8 multiply-adds per second, by
// n_threads threads, the best of a few runs of some ms. multiply-adds are 0 where no kernel set but the portable one runs.
ENTMTP_API int32_t entmtp_machine_peaks(int32_t n_threads, double * bytes_per_s, double * macs_per_s);

// Bytes per second that the device of the model's output layer reads and writes in an op on every element of a large tensor.
// Takes half a second and 256 MB of its memory.
ENTMTP_API int32_t entmtp_device_bandwidth(const struct llama_model * model, double * bytes_per_s);

#ifdef __cplusplus
}
#endif
