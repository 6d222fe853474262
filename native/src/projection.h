// The base model's output projection, for heads that share it.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// How the heads' graphs multiply with the base model's projection
enum class sharing {
    in_place, // with the model's own tensor, where it lies
    rows,     // with a copy of the rows of the draft vocabulary
    select,   // in place, and the rows are taken from the logits: ggml holds the weights in an order only it knows
    copy,     // with a copy: it lies on a device that the heads cannot use
};

// the projection [n_embd, n_vocab], also where it is the token embeddings
// throws std::runtime_error if there is none of this shape
const ggml_tensor * base_projection(const llama_model * model, int32_t n_embd, int32_t n_vocab);

// ids: the draft vocabulary, empty for all tokens
sharing choose_sharing(const ggml_tensor * projection, ggml_backend_t backend, const std::vector<int32_t> & ids);

// whether rows of it belong into a buffer of the CPU kernels
bool rows_are_packed(const ggml_tensor * projection);

// whether it lies in a buffer of the CPU kernels; whether single rows of it can be read at all; whether on another machine
bool is_packed(const ggml_tensor * projection);
bool has_rows(const ggml_tensor * projection);
bool is_remote(const ggml_tensor * projection);

// row `from` of the projection, in its type, in place of row `to` of `rows`, which lies in a buffer of the same kind
void copy_row(const ggml_tensor * projection, int32_t from, ggml_tensor * rows, int32_t to);

// fill `rows`, which choose_sharing() asked for: the rows `ids` of the projection (empty: all), in its type
void copy_rows(const ggml_tensor * projection, const std::vector<int32_t> & ids, ggml_tensor * rows);

} // namespace entmtp
