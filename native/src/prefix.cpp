#include "prefix.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace entmtp {

static constexpr int32_t n_pad    = 64; // cache rows per attention are rounded up, so that graphs are used again
static constexpr size_t  n_graphs = 32; // that are kept: lengths of accepted paths, at one or two cache sizes
static constexpr int32_t n_wait   = 64; // hidden states that wait at most

// Lengths of runs: short ones as they come, long ones in few sizes, so that graphs are used again.
static int32_t run_length(int32_t n) {
    return n <= 8 ? n : n < 16 ? 8 : n < 32 ? 16 : n < 64 ? 32 : 64;
}

void prefix_layer::reserve(ggml_backend_t b, int32_t n_ctx) {
    const int32_t head_dim  = params.n_embd / params.n_head;
    const int32_t n_embd_kv = head_dim * params.n_head_kv;

    valid.clear(); // nothing can run if there is no memory
    n_waiting = 0;

    backend = b;
    n_ctx   = GGML_PAD(n_ctx, n_pad);

    graphs.clear();
    ctx_kv.reset(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));

    // as exact as the weights are
    const ggml_type type = attn_k->type == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    k_cache = ggml_new_tensor_2d(ctx_kv.get(), type, n_embd_kv, n_ctx);
    v_cache = ggml_new_tensor_2d(ctx_kv.get(), type, n_embd_kv, n_ctx);
    out     = ggml_new_tensor_2d(ctx_kv.get(), GGML_TYPE_F32, params.n_embd, 1);
    waiting = ggml_new_tensor_2d(ctx_kv.get(), GGML_TYPE_F32, params.n_embd, n_wait);

    buf_kv.reset(ggml_backend_alloc_ctx_tensors(ctx_kv.get(), backend));
    if (!buf_kv) {
        throw std::runtime_error("heads: no memory for the cache of the prefix layer (" + std::to_string(n_ctx) +
                                 " positions)");
    }
    ggml_backend_buffer_clear(buf_kv.get(), 0);

    valid.assign(n_ctx, false);
}

void prefix_layer::truncate(int32_t pos) {
    if (pos < size()) {
        std::fill(valid.begin() + std::max(pos, 0), valid.end(), false);
    }
    n_waiting = std::clamp(pos - waiting_pos, 0, n_waiting);
}

prefix_layer::graph prefix_layer::build(int32_t n, int32_t n_kv) const {
    graph g;

    const int32_t n_embd    = params.n_embd;
    const int32_t n_head    = params.n_head;
    const int32_t n_head_kv = params.n_head_kv;
    const int32_t head_dim  = n_embd / n_head;

    g.ctx.reset(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_context * ctx = g.ctx.get();

    g.gf   = ggml_new_graph(ctx);
    g.inp  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, n);
    g.pos  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    g.last = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    g.rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
    g.mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, 1);
    for (ggml_tensor * t : { g.inp, g.pos, g.last, g.rows, g.mask }) {
        ggml_set_input(t);
    }

    const auto norm = [&](ggml_tensor * x, ggml_tensor * w) {
        return ggml_mul(ctx, ggml_rms_norm(ctx, x, params.rms_eps), w);
    };
    const auto rope = [&](ggml_tensor * x, ggml_tensor * p) {
        return ggml_rope_ext(ctx, x, p, nullptr, head_dim, GGML_ROPE_TYPE_NEOX, 0, params.rope_base, 1.0f, 0.0f, 1.0f,
                             0.0f, 0.0f);
    };

    ggml_tensor * x = norm(g.inp, attn_norm); // [n_embd, n]

    // keys and values of all new positions
    {
        ggml_tensor * k = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, attn_k, x), head_dim, n_head_kv, n);
        k               = ggml_reshape_2d(ctx, rope(k, g.pos), head_dim * n_head_kv, n);

        ggml_tensor * v = ggml_mul_mat(ctx, attn_v, x);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, k_cache, k, g.rows));
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, v_cache, v, g.rows));
    }

    // only the last position is asked for its output
    const size_t  offset   = (size_t) (n - 1) * n_embd * sizeof(float);
    ggml_tensor * x_last   = ggml_view_2d(ctx, x, n_embd, 1, x->nb[1], offset);
    ggml_tensor * inp_last = ggml_view_2d(ctx, g.inp, n_embd, 1, g.inp->nb[1], offset);

    ggml_tensor * q = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, attn_q, x_last), head_dim, n_head, 1);
    q               = ggml_permute(ctx, rope(q, g.last), 0, 2, 1, 3); // [head_dim, 1, n_head]

    const size_t ts = ggml_type_size(k_cache->type);

    ggml_tensor * k = ggml_view_3d(ctx, k_cache, head_dim, n_kv, n_head_kv, k_cache->nb[1], head_dim * ts, 0);
    ggml_tensor * v = ggml_view_3d(ctx, v_cache, head_dim, n_kv, n_head_kv, v_cache->nb[1], head_dim * ts, 0);

    ggml_tensor * kq =
        ggml_soft_max_ext(ctx, ggml_mul_mat(ctx, k, q), g.mask, 1.0f / std::sqrt((float) head_dim), 0.0f);

    v = ggml_cont(ctx, ggml_permute(ctx, v, 1, 0, 2, 3)); // [n_kv, head_dim, n_head_kv]

    ggml_tensor * kqv = ggml_mul_mat(ctx, v, kq);         // [head_dim, 1, n_head]
    kqv               = ggml_reshape_2d(ctx, ggml_cont(ctx, kqv), n_embd, 1);

    ggml_tensor * cur = ggml_add(ctx, ggml_mul_mat(ctx, attn_output, kqv), inp_last);

    x   = norm(cur, ffn_norm);
    x   = ggml_mul(ctx, ggml_silu(ctx, ggml_mul_mat(ctx, ffn_gate, x)), ggml_mul_mat(ctx, ffn_up, x));
    cur = ggml_add(ctx, ggml_mul_mat(ctx, ffn_down, x), cur);
    cur = norm(cur, output_norm);

    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, cur, out)); // where it stays when other graphs run

    g.alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    if (!ggml_gallocr_alloc_graph(g.alloc.get(), g.gf)) {
        throw std::runtime_error("heads: no memory for the graph of the prefix layer");
    }
    return g;
}

void prefix_layer::add(const states & h, int32_t pos0) {
    const int32_t n = (int32_t) h.rows.size();
    if (pos0 < 0 || n < 1 || n > size() || pos0 > size() - n) {
        throw std::runtime_error("heads: " + std::to_string(n) + " positions from " + std::to_string(pos0) + " on" +
                                 " are outside the cache of the prefix layer");
    }
    if (n_waiting > 0 && pos0 != waiting_pos + n_waiting) {
        flush();
    }
    for (int32_t i = 0; i < n;) {
        if (n_waiting == n_wait) {
            flush();
        }
        if (n_waiting == 0) {
            waiting_pos = pos0 + i;
        }
        const int32_t    m = std::min(n - i, n_wait - n_waiting);
        ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        ggml_tensor *    part =
            ggml_view_2d(ctx.get(), waiting, params.n_embd, m, waiting->nb[1], n_waiting * waiting->nb[1]);
        ggml_backend_view_init(part);
        send(traffic, part, states{ h.host, h.tensor, { h.rows.begin() + i, h.rows.begin() + i + m } });
        n_waiting += m;
        i += m;
    }
}

states prefix_layer::output() {
    flush();
    return { nullptr, out, { 0 } };
}

void prefix_layer::flush() {
    for (int32_t first = 0; first < n_waiting;) {
        const int32_t n = run_length(n_waiting - first);
        run(first, n);
        first += n;
    }
    n_waiting = 0;
}

void prefix_layer::run(int32_t first, int32_t n) {
    const int32_t pos0 = waiting_pos + first;

    states h = { nullptr, waiting, std::vector<int32_t>(n) };
    std::iota(h.rows.begin(), h.rows.end(), first);

    const int32_t n_kv = std::min<int32_t>(size(), GGML_PAD(pos0 + n, n_pad));

    auto it = graphs.find({ n, n_kv });
    if (it == graphs.end()) {
        if (graphs.size() >= n_graphs) {
            graphs.clear(); // most are of sizes that the cache has outgrown
        }
        it = graphs.emplace(std::pair(n, n_kv), build(n, n_kv)).first;
        traffic.n_draft_graphs++;
    }
    const graph & g = it->second;

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

    send(traffic, g.inp, h);
    send(traffic, g.pos, pos_data.data());
    send(traffic, g.last, &pos_data[n - 1]);
    send(traffic, g.rows, row_data.data());
    send(traffic, g.mask, mask.data());

    if (ggml_backend_graph_compute(backend, g.gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("heads: the prefix layer could not be computed");
    }
    traffic.n_syncs++;
}

void prefix_layer::read(float * res) {
    flush();
    fetch(traffic, out, res, 0, ggml_nbytes(out));
}

} // namespace entmtp
