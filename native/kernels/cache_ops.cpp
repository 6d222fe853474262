#include "cache_ops.h"

#include "half.h"
#include "hook.h"
#include "kernels.h"
#include "sight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace entmtp {

// -- products with the cache, without flash attention --

bool is_cache_product(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    return (a->type == GGML_TYPE_F16 || a->type == GGML_TYPE_F32) && b->type == GGML_TYPE_F32 &&
           op->op_params[1] == 0 && a->nb[0] == ggml_type_size(a->type) && b->nb[0] == sizeof(float) &&
           op->nb[0] == sizeof(float);
}

// of the cells of a cache, where they do not lie in the order of positions (native/patches/0011-cell-order.patch): cells by
// position, then -1; else null
static const int32_t * cell_order(const ggml_tensor * mask) {
    return mask ? (const int32_t *) mask->extra : nullptr;
}

// what a product sums over the cells is weighed by probabilities, whose mask knows of the cells
static const ggml_tensor * mask_of_values(const ggml_tensor * product) {
    const ggml_tensor * b = product->src[1];
    return b->op == GGML_OP_SOFT_MAX ? b->src[1] : nullptr;
}

static constexpr int64_t PRODUCT_ROWS = 64; // of a unit of work

// Values [n_rows] of a token by its probabilities [k], where what came is not finite: cells that it does not see, whose
// probability is 0, leave no trace, though a value of theirs be infinite. Else the bits are those of `matmul_ordered`
static void
add_seen(const uint8_t * at, size_t stride, bool f32, int64_t n_rows, int64_t k, const float * p, float * out) {
    for (int64_t i = 0; i < n_rows; ++i) {
        if (std::isfinite(out[i])) {
            continue;
        }
        const uint8_t * row = at + i * stride;
        float           sum = 0.0f;
        for (int64_t j = 0; j < k; ++j) {
            if (p[j] != 0.0f) {
                sum = std::fma(f32 ? ((const float *) row)[j] : half_to_float(((const uint16_t *) row)[j]), p[j], sum);
            }
        }
        out[i] = sum;
    }
}

size_t ordered_scratch(const ggml_tensor * op) {
    const int64_t k = op->src[0]->ne[0];
    return mask_of_values(op) ? PRODUCT_ROWS * (size_t) k * (ggml_type_size(op->src[0]->type) + sizeof(float)) : 0;
}

void compute_ordered(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor * a = op->src[0]; // [k, m, n_head_kv, ..]
    const ggml_tensor * b = op->src[1]; // [k, n_tokens, n_head, ..]

    const int64_t k = a->ne[0], m = a->ne[1], n_tokens = b->ne[1];
    const int64_t r2 = b->ne[2] / a->ne[2], r3 = b->ne[3] / a->ne[3];
    const size_t  size = ggml_type_size(a->type);

    // rows with their k in the order of positions
    const bool      is_weighed = mask_of_values(op) != nullptr;
    const int32_t * order      = cell_order(mask_of_values(op));
    float *         sorted_b = (float *) ((char *) task->wdata + task->ith * ordered_scratch(op)); // [PRODUCT_ROWS][k]
    uint8_t *       sorted_a = (uint8_t *) (sorted_b + PRODUCT_ROWS * k);                          // the same
    int64_t         n_k      = k;
    if (order) {
        n_k = std::find(order, order + k, -1) - order;
    }
    const auto sort = [&](const void * row, void * to) {
        if (size == 2) {
            for (int64_t j = 0; j < n_k; ++j) {
                ((uint16_t *) to)[j] = ((const uint16_t *) row)[order[j]];
            }
        } else {
            for (int64_t j = 0; j < n_k; ++j) {
                ((float *) to)[j] = ((const float *) row)[order[j]];
            }
        }
    };

    // units of work: some rows of one kv head, for all tokens and heads that read it
    const int64_t n_m = (m + PRODUCT_ROWS - 1) / PRODUCT_ROWS, n_units = n_m * a->ne[2] * a->ne[3];

    for (int64_t u = n_units * task->ith / task->nth; u < n_units * (task->ith + 1) / task->nth; ++u) {
        const int64_t   im = u % n_m, i2 = u / n_m % a->ne[2], i3 = u / n_m / a->ne[2];
        const int64_t   m0 = im * PRODUCT_ROWS, n_rows = std::min(m - m0, PRODUCT_ROWS);
        const uint8_t * at     = (const uint8_t *) a->data + m0 * a->nb[1] + i2 * a->nb[2] + i3 * a->nb[3];
        size_t          stride = a->nb[1];
        if (order) {
            for (int64_t i = 0; i < n_rows; ++i) {
                sort(at + i * stride, sorted_a + i * n_k * size);
            }
            at     = sorted_a;
            stride = n_k * size;
        }
        const float * rows[PRODUCT_ROWS];
        float *       out[PRODUCT_ROWS];
        int           n = 0;
        for (int64_t i = 0; i < n_tokens * r2 * r3; ++i) {
            const int64_t t = i / (r2 * r3), h = i2 * r2 + i % r2, s = i3 * r3 + i / r2 % r3;
            rows[n] = (const float *) ((const char *) b->data + t * b->nb[1] + h * b->nb[2] + s * b->nb[3]);
            out[n]  = (float *) ((char *) op->data + t * op->nb[1] + h * op->nb[2] + s * op->nb[3]) + m0;
            if (order) {
                for (int64_t j = 0; j < n_k; ++j) {
                    sorted_b[n * k + j] = rows[n][order[j]];
                }
                rows[n] = sorted_b + n * k;
            }
            if (++n == PRODUCT_ROWS || i + 1 == n_tokens * r2 * r3) {
                kernels().matmul_ordered(at, stride, a->type == GGML_TYPE_F32, 0, (int) n_rows, (int) n_k, rows, n,
                                         out);
                for (int q = 0; q < n && is_weighed; ++q) {
                    add_seen(at, stride, a->type == GGML_TYPE_F32, n_rows, n_k, rows[q], out[q]);
                }
                n = 0;
            }
        }
    }
}

// -- attention --

static float head_slope(float max_bias, int64_t h, int64_t n_head) { // ALiBi, arXiv 2108.12409
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const uint32_t n_head_log2 = 1u << (uint32_t) std::floor(std::log2((double) n_head));
    return h < n_head_log2
               ? std::pow(std::pow(2.0f, -max_bias / n_head_log2), (float) (h + 1))
               : std::pow(std::pow(2.0f, -max_bias / 2.0f / n_head_log2), (float) (2 * (h - n_head_log2) + 1));
}

static bool is_readable_row(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float) &&
           t->nb[0] == ggml_type_size(t->type);
}

bool is_attention(const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    return q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && is_readable_row(k) && is_readable_row(v) &&
           op->type == GGML_TYPE_F32 && ggml_is_contiguous(op) && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] &&
           (!mask || mask->type == GGML_TYPE_F16) && q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0;
}

// The queries of a kv head, n_rep of each token, in parts that read the cache once: as many as fit, and fewer if threads
// would have none. With a mask, tokens of one sequence keep to themselves: what others see is no work of theirs
static std::vector<std::pair<int64_t, int64_t>>
split_queries(int64_t n_tokens, int64_t n_rep, int64_t n_kv_heads, int64_t n_threads, const ggml_tensor * mask) {
    const auto row_of = [&](int64_t t) {
        return (const uint16_t *) ((const char *) mask->data + t * mask->nb[1]);
    };
    std::vector<int64_t> ends; // of runs of tokens that see the same cells, but for a few
    for (int64_t t = 1; mask && t < n_tokens; ++t) {
        // of two cells that its parent or sibling sees, a token sees one, if its window moves on by one
        const uint16_t * before = row_of(t - 1);
        int64_t          j      = 0;
        bool             sees   = false;
        for (int n = 0; n < 2 && j < mask->ne[0]; ++j) {
            if (before[j] != 0xfc00) {
                sees = sees || row_of(t)[j] != 0xfc00;
                ++n;
            }
        }
        if (!sees) {
            ends.push_back(t);
        }
    }
    ends.push_back(n_tokens);

    std::vector<std::pair<int64_t, int64_t>> parts;

    const int64_t n_runs = (int64_t) ends.size();
    int64_t       begin  = 0;
    for (const int64_t end : ends) {
        const int64_t n = (end - begin) * n_rep;
        const int64_t n_split =
            std::max((n + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES,
                     std::min(n, (2 * n_threads + n_kv_heads * n_runs - 1) / (n_kv_heads * n_runs)));
        for (int64_t i = 0; i < n_split; ++i) {
            parts.push_back({ begin * n_rep + n * i / n_split, begin * n_rep + n * (i + 1) / n_split });
        }
        begin = end;
    }
    return parts;
}

static constexpr int64_t MOST_PARTS = 32; // whose lists of cells are kept, of up to 8 bytes a cell and part

void compute_attention(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];

    float scale, max_bias, softcap;
    memcpy(&scale, op->op_params + 0, 4);
    memcpy(&max_bias, op->op_params + 1, 4);
    memcpy(&softcap, op->op_params + 2, 4);

    attention a         = {};
    a.n_kv              = (int) k->ne[1];
    a.n_dim_k           = (int) k->ne[0];
    a.n_dim_v           = (int) v->ne[0];
    a.k_stride          = k->nb[1];
    a.v_stride          = v->nb[1];
    a.k_type            = k->type;
    a.v_type            = v->type;
    a.softcap           = softcap;
    a.scale             = softcap != 0.0f ? scale / softcap : scale;
    const auto to_float = [](const ggml_tensor * t) {
        return t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits(t->type)->to_float;
    };
    a.k_to_float = to_float(k);
    a.v_to_float = to_float(v);

    const size_t scratch = attention_scratch(a.n_kv, a.n_dim_k, a.n_dim_v);
    a.scratch            = (float *) task->wdata + task->ith * scratch;

    a.order = cell_order(mask);

    // units of work: some of the queries of one kv head
    const int64_t n_tokens = q->ne[1], r2 = q->ne[2] / k->ne[2], r3 = q->ne[3] / k->ne[3];
    const int64_t n_kv_heads = k->ne[2] * q->ne[3];
    const auto    parts      = split_queries(n_tokens, r2, n_kv_heads, task->nth, a.order ? mask : nullptr);
    const int64_t n_split    = (int64_t) parts.size();
    const int64_t n_units    = n_kv_heads * n_split;

    // of each part, the same for all kv heads; not kept where heads have masks of their own, and of the many parts of a prompt
    const bool                             is_one_mask = !mask || (mask->ne[2] == 1 && mask->ne[3] == 1);
    const bool                             are_kept    = is_one_mask && n_split <= MOST_PARTS;
    static thread_local std::vector<sight> sights;
    std::vector<bool>                      is_known(n_split);
    sights.resize(std::max(sights.size(), are_kept ? (size_t) n_split : 1));

    for (int64_t u = n_units * task->ith / task->nth; u < n_units * (task->ith + 1) / task->nth; ++u) {
        const int64_t i2 = u / n_split % k->ne[2], i3 = u / n_split / k->ne[2];
        const auto    part = parts[u % n_split];

        a.k       = (const uint8_t *) k->data + i2 * k->nb[2] + i3 / r3 * k->nb[3];
        a.v       = (const uint8_t *) v->data + i2 * v->nb[2] + i3 / r3 * v->nb[3];
        a.n_query = 0;
        for (int64_t i = part.first; i < part.second; ++i) {
            const int64_t t = i / r2, h = i2 * r2 + i % r2;
            const int     n = a.n_query++;
            a.q[n]          = (const float *) ((const char *) q->data + t * q->nb[1] + h * q->nb[2] + i3 * q->nb[3]);
            a.out[n]        = (float *) op->data + (i3 * op->ne[2] * op->ne[1] + t * op->ne[1] + h) * op->ne[0];
            a.mask[n]       = mask ? (const uint16_t *) ((const char *) mask->data + t * mask->nb[1] +
                                                         h % mask->ne[2] * mask->nb[2] + i3 % mask->ne[3] * mask->nb[3])
                                   : nullptr;
            a.slope[n]      = head_slope(max_bias, h, q->ne[2]);
            a.sink[n]       = sinks ? (const float *) sinks->data + h : nullptr;
        }
        sight & seen = sights[are_kept ? u % n_split : 0];
        if (!is_known[u % n_split]) {
            seen.of(a);
            is_known[u % n_split] = are_kept;
        }
        seen.give(a);
        kernels().attend(a);
    }
}

bool is_softmax(const ggml_tensor * op) {
    const ggml_tensor *x = op->src[0], *mask = op->src[1];
    return x->type == GGML_TYPE_F32 && ggml_is_contiguous(op) && x->nb[0] == sizeof(float) &&
           (!mask || mask->type == GGML_TYPE_F16 || mask->type == GGML_TYPE_F32);
}

void compute_softmax(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor *x = op->src[0], *mask = op->src[1], *sinks = op->src[2];

    float scale, max_bias;
    memcpy(&scale, op->op_params + 0, 4);
    memcpy(&max_bias, op->op_params + 1, 4);

    const int64_t n_rows = ggml_nrows(x);
    for (int64_t i = n_rows * task->ith / task->nth; i < n_rows * (task->ith + 1) / task->nth; ++i) {
        const int64_t t = i % x->ne[1], h = i / x->ne[1] % x->ne[2], s = i / x->ne[1] / x->ne[2];
        const void *  m   = mask ? (const char *) mask->data + t * mask->nb[1] + h % mask->ne[2] * mask->nb[2] +
                                       s % mask->ne[3] * mask->nb[3]
                                 : nullptr;
        const bool    f16 = mask && mask->type == GGML_TYPE_F16;
        kernels().softmax((const float *) ((const char *) x->data + t * x->nb[1] + h * x->nb[2] + s * x->nb[3]),
                          f16 ? (const uint16_t *) m : nullptr, f16 ? nullptr : (const float *) m,
                          (float *) op->data + i * op->ne[0], (int) op->ne[0], scale, head_slope(max_bias, h, x->ne[2]),
                          sinks ? (const float *) sinks->data + h : nullptr);
    }
}

} // namespace entmtp
