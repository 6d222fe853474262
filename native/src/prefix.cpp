#include "prefix.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

static constexpr int32_t n_pad = 64; // cache rows per attention are rounded up, so that shapes repeat

void prefix_layer::reserve(ggml_backend_t b, int32_t n_ctx) {
    const int32_t head_dim  = params.n_embd / params.n_head;
    const int32_t n_embd_kv = head_dim * params.n_head_kv;

    valid.clear(); // nothing can run if there is no memory

    backend = b;
    n_ctx   = GGML_PAD(n_ctx, n_pad);

    ctx_kv.reset(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));

    // as exact as the weights are
    const ggml_type type = attn_k->type == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    k_cache = ggml_new_tensor_2d(ctx_kv.get(), type, n_embd_kv, n_ctx);
    v_cache = ggml_new_tensor_2d(ctx_kv.get(), type, n_embd_kv, n_ctx);

    buf_kv.reset(ggml_backend_alloc_ctx_tensors(ctx_kv.get(), backend));
    if (!buf_kv) {
        throw std::runtime_error("heads: no memory for the cache of the prefix layer (" + std::to_string(n_ctx) +
                                 " positions)");
    }
    ggml_backend_buffer_clear(buf_kv.get(), 0);

    alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));

    valid.assign(n_ctx, false);
}

void prefix_layer::truncate(int32_t pos) {
    if (pos < size()) {
        std::fill(valid.begin() + std::max(pos, 0), valid.end(), false);
    }
}

void prefix_layer::run(const float * h, int32_t n, int32_t pos0, float * out) {
    if (pos0 < 0 || n < 1 || n > size() || pos0 > size() - n) {
        throw std::runtime_error("heads: " + std::to_string(n) + " positions from " + std::to_string(pos0) + " on" +
                                 " are outside the cache of the prefix layer");
    }

    const int32_t n_embd    = params.n_embd;
    const int32_t n_head    = params.n_head;
    const int32_t n_head_kv = params.n_head_kv;
    const int32_t head_dim  = n_embd / n_head;
    const int32_t n_kv      = std::min<int32_t>(size(), GGML_PAD(pos0 + n, n_pad));

    ggml_context_ptr ctx_ptr(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_context *   ctx = ctx_ptr.get();
    ggml_cgraph *    gf  = ggml_new_graph(ctx);

    const auto input = [&](ggml_tensor * t) {
        ggml_set_input(t);
        return t;
    };

    ggml_tensor * inp     = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n));
    ggml_tensor * pos     = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n));
    ggml_tensor * last    = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1)); // position of the only query
    ggml_tensor * rows    = input(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n));
    ggml_tensor * kq_mask = input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, 1));

    const auto norm = [&](ggml_tensor * x, ggml_tensor * w) {
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, params.rms_eps), w);
    };
    const auto rope = [&](ggml_tensor * x, ggml_tensor * p) {
        return ggml_rope_ext(ctx, x, p, nullptr, head_dim, GGML_ROPE_TYPE_NEOX, 0, params.rope_base, 1.0f, 0.0f, 1.0f,
                             0.0f, 0.0f);
    };

    ggml_tensor * x = norm(inp, attn_norm); // [n_embd, n]

    // keys and values of all new positions
    {
        ggml_tensor * k = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, attn_k, x), head_dim, n_head_kv, n);
        k               = ggml_reshape_2d(ctx, rope(k, pos), head_dim * n_head_kv, n);

        ggml_tensor * v = ggml_mul_mat(ctx, attn_v, x);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, k_cache, k, rows));
        ggml_build_forward_expand(gf, ggml_set_rows(ctx, v_cache, v, rows));
    }

    // only the last position is asked for its output
    const size_t  offset   = (size_t) (n - 1) * n_embd * sizeof(float);
    ggml_tensor * x_last   = ggml_view_2d(ctx, x, n_embd, 1, x->nb[1], offset);
    ggml_tensor * inp_last = ggml_view_2d(ctx, inp, n_embd, 1, inp->nb[1], offset);

    ggml_tensor * q = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, attn_q, x_last), head_dim, n_head, 1);
    q               = ggml_permute(ctx, rope(q, last), 0, 2, 1, 3); // [head_dim, 1, n_head]

    const size_t ts = ggml_type_size(k_cache->type);

    ggml_tensor * k = ggml_view_3d(ctx, k_cache, head_dim, n_kv, n_head_kv, k_cache->nb[1], head_dim * ts, 0);
    ggml_tensor * v = ggml_view_3d(ctx, v_cache, head_dim, n_kv, n_head_kv, v_cache->nb[1], head_dim * ts, 0);

    ggml_tensor * kq =
        ggml_soft_max_ext(ctx, ggml_mul_mat(ctx, k, q), kq_mask, 1.0f / std::sqrt((float) head_dim), 0.0f);

    v = ggml_cont(ctx, ggml_permute(ctx, v, 1, 0, 2, 3)); // [n_kv, head_dim, n_head_kv]

    ggml_tensor * kqv = ggml_mul_mat(ctx, v, kq);         // [head_dim, 1, n_head]
    kqv               = ggml_reshape_2d(ctx, ggml_cont(ctx, kqv), n_embd, 1);

    ggml_tensor * cur = ggml_add(ctx, ggml_mul_mat(ctx, attn_output, kqv), inp_last);

    x   = norm(cur, ffn_norm);
    x   = ggml_mul(ctx, ggml_silu(ctx, ggml_mul_mat(ctx, ffn_gate, x)), ggml_mul_mat(ctx, ffn_up, x));
    cur = ggml_add(ctx, ggml_mul_mat(ctx, ffn_down, x), cur);
    cur = norm(cur, output_norm);

    ggml_set_output(cur);
    ggml_build_forward_expand(gf, cur);

    if (!ggml_gallocr_alloc_graph(alloc.get(), gf)) {
        throw std::runtime_error("heads: no memory for the graph of the prefix layer");
    }

    std::vector<int32_t> pos_data(n);
    std::vector<int64_t> row_data(n);
    for (int32_t i = 0; i < n; ++i) {
        pos_data[i]     = pos0 + i;
        row_data[i]     = pos0 + i;
        valid[pos0 + i] = true;
    }

    mask.assign(n_kv, -INFINITY);
    for (int32_t i = 0; i < pos0 + n; ++i) {
        if (valid[i]) {
            mask[i] = 0.0f;
        }
    }

    ggml_backend_tensor_set(inp, h, 0, ggml_nbytes(inp));
    ggml_backend_tensor_set(pos, pos_data.data(), 0, ggml_nbytes(pos));
    ggml_backend_tensor_set(last, &pos_data[n - 1], 0, ggml_nbytes(last));
    ggml_backend_tensor_set(rows, row_data.data(), 0, ggml_nbytes(rows));
    ggml_backend_tensor_set(kq_mask, mask.data(), 0, ggml_nbytes(kq_mask));

    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("heads: the prefix layer could not be computed");
    }

    ggml_backend_tensor_get(cur, out, 0, n_embd * sizeof(float));
}

} // namespace entmtp
