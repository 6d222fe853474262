// The auto policy over recorded texts, and the weights of its acceptance model.

#pragma once

#include "entmtp.h"

#ifdef __cplusplus
extern "C" {
#endif

// Texts that were decoded plainly, with what the drafters look at. The auto policy drafts from the text and from rows of
// logits, so it can be run over them without the model; heads that draft are asked. A model that drafts is not.
struct entmtp_texts {
    int32_t         n_texts;
    const int32_t * n_prompt; // [n_texts] tokens of the prompt
    const int32_t * n_tokens; // [n_texts] tokens generated
    const int32_t * tokens;   // text after text: the prompt, then what was generated

    // per generated token, texts one after the other: the distribution that it was drawn from
    const struct entmtp_signals * signals; // [n]
    int32_t                       n_best;
    const int32_t *               best;    // [n][n_best] most probable tokens, the best first; -1: no more are known
    const float *                 log_p;   // [n][n_best]
    const float * states; // [n][n_embd] the hidden state; with a prefix layer, its output. NULL: heads do not draft
};

// A proposal of the drafters at a place that the text went through.
struct entmtp_proposal {
    int32_t  step;
    uint32_t sources; // enum entmtp_source: who made it
    int32_t  right;   // 1: the text went on like this
    float    p;       // that it is right, as it was believed before this was learned from
    float    inputs[ENTMTP_N_INPUTS];
};

// proposals at one place, at most
#define ENTMTP_MAX_SAMPLES 40

// tokens of texts are below it, where no heads tell how large the vocabulary is; no model's is as large
#define ENTMTP_MAX_VOCAB (1 << 24)

// One text after the other, as a fresh prompt each; rows that were seen, and what the policy learned, are kept.
//   heads    NULL: they do not draft, whatever params->drafters says. Theirs are the tokens and hidden states of `texts`
//   truth    what steps really cost; NULL: params->costs
//   without  inputs that the acceptance model is not given, bits; bit ENTMTP_N_INPUTS: where several drafters agree, only
//            the first of them counts
//   steps    [n_max] results; times are the true costs
//   samples  [n tokens][ENTMTP_MAX_SAMPLES] results; NULL: none
//   n_samples  how many
// Returns the number of steps, or a negative status: also for a token that is not in the heads' vocabulary.
ENTMTP_API int64_t entmtp_replay_texts(const struct entmtp_texts *         texts,
                                       struct entmtp_heads *               heads,
                                       const struct entmtp_policy_params * params,
                                       const struct entmtp_costs *         truth,
                                       uint32_t                            without,
                                       struct entmtp_step *                steps,
                                       int64_t                             n_max,
                                       struct entmtp_proposal *            samples,
                                       int64_t *                           n_samples);

// The k (at most 8) most probable tokens after the last evaluated one, and their ln p, the best first: what is recycled.
// Returns how many are known (all but on some devices), or a negative status.
ENTMTP_API int32_t entmtp_decoder_best(struct entmtp_decoder * dec, int32_t k, int32_t * tokens, float * log_p);

// Weights [ENTMTP_N_SETS][ENTMTP_N_INPUTS] that the acceptance model begins with, unless others are given.
ENTMTP_API void entmtp_acceptance_shipped(float * weights);

// The acceptance model of a decoder goes on from these weights (auto); entmtp_decoder_get_acceptance() tells those of now.
ENTMTP_API int32_t entmtp_decoder_set_acceptance(struct entmtp_decoder * dec, const float * weights);

#ifdef __cplusplus
}
#endif
