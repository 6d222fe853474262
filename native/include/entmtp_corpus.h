// Texts to draft from besides the one that is written: the user's own documents or code.

#pragma once

#include "entmtp.h"

#ifdef __cplusplus
extern "C" {
#endif

struct entmtp_corpus;

// tokens [n]  of all texts, one after the other; a negative one ends a text. At most 2^30. 20 bytes of memory each
// NULL on failure.
ENTMTP_API struct entmtp_corpus * entmtp_corpus_init(const int32_t * tokens, int64_t n);
ENTMTP_API void                   entmtp_corpus_free(struct entmtp_corpus * corpus);

// Under the auto policy, where the text drafts (ENTMTP_SOURCE_TEXT), drafts come from there, too. Several decoders may have
// the same corpus, which outlives them. NULL: from the text alone. An error: a token is not in the model's vocabulary.
ENTMTP_API int32_t entmtp_decoder_set_corpus(struct entmtp_decoder * dec, const struct entmtp_corpus * corpus);

#ifdef __cplusplus
}
#endif
