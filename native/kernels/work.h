// What the products of a pass keep in ggml's work buffer.

#pragma once

#include "kernels.h"
#include "pack.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace entmtp {

// Below this many floats every thread quantises all activations for itself, which is faster than meeting the others.
constexpr int64_t QUANTIZE_ALONE = 4096;
constexpr size_t  CHUNK_BYTES    = 256 << 10; // weights that stay in the second cache while groups of tokens go by

inline bool is_packed(const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_get_type(t->buffer) == ggml_cpu_hook_buffer_type();
}

inline bool has_panels(const ggml_tensor * t) {
    return is_packed(t) && packed_type(t->type) != W_COUNT;
}

constexpr size_t lines_of(size_t bytes) { // of the cache
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

// The panels of a product, shared out among the threads in chunks that stay in the second cache and are enough for threads of
// unequal speed. All meet before, unless each has all activations for itself.
//   compute(p0, p1): panels p0 to p1
template <class F>
void share_panels(const ggml_cpu_hook_task * task, int64_t n_panels, size_t panel_bytes, bool alone, F compute) {
    const int64_t step     = std::max<int64_t>(1, CHUNK_BYTES / panel_bytes);
    const int64_t chunk    = alone ? (n_panels + task->nth - 1) / task->nth
                                   : std::max<int64_t>(1, std::min<int64_t>(step, n_panels / (task->nth * 4)));
    const int64_t n_chunks = (n_panels + chunk - 1) / chunk;

    if (!alone) {
        if (task->ith == 0) {
            ggml_cpu_hook_chunk_set(task, task->nth);
        }
        ggml_cpu_hook_barrier(task);
    }
    for (int64_t c = task->ith; c < n_chunks; c = alone ? n_chunks : ggml_cpu_hook_chunk_add(task, 1)) {
        const int64_t end = std::min((c + 1) * chunk, n_panels);
        for (int64_t p = c * chunk; p < end; p += step) {
            compute(p, std::min(p + step, end));
        }
    }
}

// panels p0 to p1 of a matrix of n_rows times n tokens
//   w: the matrix, to: [n] rows of results, [n_rows] each
inline void multiply_panels(const kernel_set &  set,
                            weight_type         type,
                            const uint8_t *     w,
                            int64_t             n_blocks,
                            int64_t             n_rows,
                            int64_t             p0,
                            int64_t             p1,
                            int                 n,
                            const activations & a,
                            float * const *     to) {
    const size_t panel_bytes = (size_t) n_blocks * LAYOUTS[type].panel_bytes;
    for (int64_t p = p0; p < p1; ++p) {
        float out[16 * PANEL];
        set.matmul(type, w + p * panel_bytes, n_blocks, n, a, out);
        const size_t bytes = std::min<int64_t>(PANEL, n_rows - p * PANEL) * sizeof(float);
        for (int i = 0; i < n; ++i) {
            memcpy(to[i] + p * PANEL, out + PANEL * i, bytes);
        }
    }
}

// -- without panels: tokens as ggml's product of one row with one token takes them --

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
