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
    ENTMTP_POLICY_OFF     = 0, // plain decoding
    ENTMTP_POLICY_STATIC  = 1, // always tree static_tree
    ENTMTP_POLICY_ENTROPY = 2, // argmax over the bank of (1 + expected accepted | entropy bin) / cost
};

struct entmtp_policy_params {
    int32_t       policy;
    int32_t       static_tree;
    float         ema_window; // tokens
    int32_t       n_bins;     // entropy bins, at least 1
    const float * bin_edges;  // [n_bins - 1], nats, increasing
    const float * expected;   // [n_bins][n_trees] expected accepted draft tokens per step
    const float * cost;       // [n_trees] cost of a step relative to plain decoding's
};

// call after set_trees
ENTMTP_API int32_t entmtp_decoder_set_policy(struct entmtp_decoder * dec, const struct entmtp_policy_params * params);

// Evaluate n tokens after the first n_past ones; later ones are forgotten. At most n_batch tokens.
// One token that follows what was evaluated before is a decode step: it may already be verified.
//   all_outputs   logits of every token, not only of the last, can be read with llama_get_logits(). Of a single token
//                 that may have been verified already: read them with entmtp_decoder_logits()
ENTMTP_API int32_t
entmtp_decoder_eval(struct entmtp_decoder * dec, const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs);

// Sample the next token through the sampler chain, and accept it there.
ENTMTP_API int32_t entmtp_decoder_sample(struct entmtp_decoder * dec, struct llama_sampler * sampler, int32_t * token);

// Typical acceptance (lossy): follow the longest path whose tokens all have p > min(epsilon, alpha * exp(-H)) under the
// base model at temperature temp, then take the most probable token. Medusa (arXiv 2401.10774), section 2.3.1.
ENTMTP_API int32_t
entmtp_decoder_sample_typical(struct entmtp_decoder * dec, float temp, float epsilon, float alpha, int32_t * token);

// Leave in the memory exactly what plain decoding would have there: the evaluated tokens, no drafts.
ENTMTP_API int32_t entmtp_decoder_settle(struct entmtp_decoder * dec);

// Forget the state after n_past tokens (the memory was changed from outside, for example by loading a state).
ENTMTP_API void entmtp_decoder_invalidate(struct entmtp_decoder * dec, int32_t n_past);

// Logits [n_vocab] and hidden state [n_embd] of the last evaluated token, NULL if there is none.
// Valid until the next call that evaluates.
ENTMTP_API const float * entmtp_decoder_logits(struct entmtp_decoder * dec);
ENTMTP_API const float * entmtp_decoder_hidden(struct entmtp_decoder * dec);

// Stop the evaluation that is running, or the next one. May be called from any thread.
ENTMTP_API void entmtp_decoder_cancel(struct entmtp_decoder * dec);

// Take back a cancellation that came too late to stop anything.
ENTMTP_API void entmtp_decoder_resume(struct entmtp_decoder * dec);

//
// statistics
//

struct entmtp_step {
    float   entropy; // running estimate when the tree was chosen, nats
    int32_t tree;    // index in the bank
    int32_t n_nodes; // tokens in the verify pass, the root among them
    int32_t n_accepted;
    int32_t t_draft_us;
    int32_t t_verify_us;
    int32_t t_sample_us;
    int32_t t_host_us; // everything else of ours: entropy, choice, batch, commit
};

// off by default: then nothing is timed or kept
ENTMTP_API void   entmtp_decoder_set_stats(struct entmtp_decoder * dec, bool enabled);
ENTMTP_API size_t entmtp_decoder_n_steps(const struct entmtp_decoder * dec);
ENTMTP_API size_t entmtp_decoder_get_steps(const struct entmtp_decoder * dec,
                                           struct entmtp_step *          steps,
                                           size_t                        first,
                                           size_t                        n);
ENTMTP_API void   entmtp_decoder_reset_stats(struct entmtp_decoder * dec);

#ifdef __cplusplus
}
#endif
