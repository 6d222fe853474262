// Several sequences of one context that share its passes.

#pragma once

#include "entmtp.h"

#ifdef __cplusplus
extern "C" {
#endif

// Decoders of the sequences 0 .. n_seq - 1 of one context (n_seq_max, kv_unified) that share its passes: each is called
// from a thread of its own, and a pass begins when every active one has said what it wants evaluated. Nobody is waited for
// much longer than a pass takes. What a decoder computes does not depend on the others, bit for bit where the kernels
// compute (docs/serve.md). Decoders belong to the group; cancel stops one of them after the pass that runs.
struct entmtp_group;

//   heads  shared by all, or NULL
//   n_ctx  positions that each may take
ENTMTP_API struct entmtp_group *
entmtp_group_init(struct llama_context * ctx, struct entmtp_heads * heads, int32_t n_seq, int32_t n_ctx);
ENTMTP_API void                    entmtp_group_free(struct entmtp_group * group);
ENTMTP_API struct entmtp_decoder * entmtp_group_decoder(struct entmtp_group * group, int32_t i);

// Passes wait for those that are active. Of one that is not, nothing is needed from the last pass any more.
ENTMTP_API void entmtp_group_set_active(struct entmtp_group * group, int32_t i, bool active);

// While others wait, a prompt is evaluated in pieces that take about so long. Until then 200 ms.
ENTMTP_API void entmtp_group_set_stall(struct entmtp_group * group, double us);

// Passes so far, how many sequences' parts they had in all, and how many tokens.
ENTMTP_API void
entmtp_group_get_passes(struct entmtp_group * group, int64_t * n_passes, int64_t * n_parts, int64_t * n_tokens);

// Forget the text, and give its cells back to the others.
ENTMTP_API int32_t entmtp_decoder_clear(struct entmtp_decoder * dec);

// How many of n tokens the decoder's memory begins with, of those that are settled.
ENTMTP_API int32_t entmtp_decoder_in_common(const struct entmtp_decoder * dec, const int32_t * tokens, int32_t n);

// Cells of the memory that the decoder's sequence takes, whether or not its text can be gone on with.
ENTMTP_API int32_t entmtp_decoder_n_held(const struct entmtp_decoder * dec);

// Begin with as many of n tokens as another decoder of the group has evaluated, without evaluating them; what was in the
// decoder's own sequence is forgotten. Returns how many, or a negative status. 0: there are none, or layers with a sliding
// window forget them (swa_full = false), and the decoder keeps its text.
ENTMTP_API int32_t entmtp_decoder_share(struct entmtp_decoder *       dec,
                                        const struct entmtp_decoder * from,
                                        const int32_t *               tokens,
                                        int32_t                       n);

#ifdef __cplusplus
}
#endif
