// From panels back to the layouts of ggml, row by row.

#pragma once

#include "kernels.h"

#include "ggml.h"

namespace entmtp {

// One row of a packed matrix in ggml's layout, bit for bit what was packed
//   type: one that has panels
//   src: as pack_panels() leaves it, k weights a row
//   dst: ggml_row_size(type, k) bytes
void unpack_row(ggml_type type, const uint8_t * src, int64_t k, int64_t row, uint8_t * dst);

} // namespace entmtp
