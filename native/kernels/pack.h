// From the layouts of ggml to panels of 16 rows.

#pragma once

#include "kernels.h"

#include "ggml.h"

namespace entmtp {

// W_COUNT if there are no kernels for the type
weight_type packed_type(ggml_type type);

// bytes of n_rows packed rows of k weights, rows padded to whole panels and floats to whole blocks
size_t packed_size(weight_type type, int64_t k, int64_t n_rows);

// panels p0 to p1
//   src [n_rows] rows of k weights in ggml's layout. Rows past the last become zeros
void pack_panels(weight_type type, const void * src, int64_t k, int64_t n_rows, int64_t p0, int64_t p1, uint8_t * dst);

// The rows `ids` of a packed matrix as a packed matrix of their own
//   src, dst: packed_size(type, k, n) bytes, of as many rows as the largest id wants, and of n_ids rows
void copy_packed_rows(
    weight_type type, int64_t k, const uint8_t * src, const int32_t * ids, int64_t n_ids, uint8_t * dst);

// row `from` of a packed matrix in place of row `to` of another
void copy_packed_row(weight_type type, int64_t k, const uint8_t * src, int64_t from, uint8_t * dst, int64_t to);

} // namespace entmtp
