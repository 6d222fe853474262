// How much of a row a sampler chain has to see to choose the token that it would choose from the whole row.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// The number of largest logits that decide, at most `most`; 0: the whole row is needed.
//
// Two rules, for a chain that begins with any number of samplers without effect ("?top-p" and their kin):
//   greedy     takes the largest logit: 1
//   top-k      keeps the k largest, sorted, whatever comes after it: k, and one more that shows that no other ties with them
// Everything else may look at, or raise, any token of the row: penalties, logit bias, grammars, mirostat, samplers of the
// caller's own, and every sampler before a top-k.
int32_t candidates_needed(llama_sampler * chain, int32_t most);

// The candidates can stand in for the row they were taken from: `needed` of them are apart from each other and from the
// rest, so that every way of sorting gives one order. They are left in the order of the row.
//   n_row   tokens in the row
bool candidates_suffice(std::vector<llama_token_data> & candidates, int32_t needed, int32_t n_row);

// The same of a row in the host's memory, which may be looked at again: the tokens that stand in for it, in the order of the
// row, are left in `tokens`; false: it takes the whole row. Besides the rules above, penalties that make no token more
// probable may come first: then the largest logits and some more decide, as long as they are above all others afterwards.
bool shortlist(llama_sampler * chain, const float * row, int32_t n_row, std::vector<llama_token_data> & tokens);

} // namespace entmtp
