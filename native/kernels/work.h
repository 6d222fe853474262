// What the products of a pass keep in ggml's work buffer.

#pragma once

#include "kernels.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <cstdint>
#include <cstring>

namespace entmtp {

// Below this many floats every thread quantises all activations for itself, which is faster than meeting the others.
constexpr int64_t QUANTIZE_ALONE = 4096;
constexpr size_t  CHUNK_BYTES    = 256 << 10; // weights that stay in the second cache while groups of tokens go by

constexpr size_t lines_of(size_t bytes) {     // of the cache
    return (bytes + 63) / 64 * 64;
}

// row i of all rows of a tensor of floats
inline float * row_of(const ggml_tensor * t, int64_t i) {
    const int64_t i1 = i % t->ne[1], i2 = i / t->ne[1] % t->ne[2], i3 = i / t->ne[1] / t->ne[2];
    return (float *) ((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

// Activations of the rows of src[1]: groups of up to `group` tokens, each [n_blocks][n]
struct work_layout {
    int64_t n_blocks, n_tokens;
    size_t  token; // bytes per token: q or f, then d, then s

    work_layout(weight_type type, const ggml_tensor * op) {
        const weight_layout & l = LAYOUTS[type];
        n_blocks                = (op->src[0]->ne[0] + l.block - 1) / l.block;
        n_tokens                = ggml_nrows(op->src[1]);
        token                   = lines_of(n_blocks * (l.bits == 0 ? l.block * 4 : l.block + 4 + 4 * l.sums));
    }

    bool alone(int n_threads, const ggml_tensor * op) const {
        return n_threads == 1 || n_tokens * op->src[0]->ne[0] <= QUANTIZE_ALONE;
    }
};

// n tokens at p
inline activations activations_at(weight_type type, const work_layout & w, uint8_t * p, int n) {
    activations a;
    a.q = (int8_t *) p;
    a.f = (float *) p;
    a.d = (float *) (p + w.n_blocks * n * LAYOUTS[type].block);
    a.s = (int32_t *) (a.d + w.n_blocks * n);
    return a;
}

// -- types without panels: tokens as ggml's product of one row with one token takes them --

inline size_t row_activations(ggml_type type, int64_t k) { // bytes of a token
    return lines_of(ggml_row_size(ggml_get_type_traits_cpu(type)->vec_dot_type, k));
}

// this thread's share of all rows of src[1], into [n_tokens]
inline void quantize_rows(const ggml_cpu_hook_task * task, const ggml_tensor * op, uint8_t * to) {
    const ggml_tensor * w    = op->src[0];
    const ggml_type     type = ggml_get_type_traits_cpu(w->type)->vec_dot_type;
    const size_t        size = row_activations(w->type, w->ne[0]);
    for (int64_t i = task->ith; i < ggml_nrows(op->src[1]); i += task->nth) {
        const float * row = row_of(op->src[1], i);
        if (type == GGML_TYPE_F32) {
            memcpy(to + i * size, row, w->ne[0] * sizeof(float));
        } else {
            ggml_get_type_traits_cpu(type)->from_float(row, to + i * size, w->ne[0]);
        }
    }
}

} // namespace entmtp
