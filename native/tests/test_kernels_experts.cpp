// Products of experts (GGML_OP_MUL_MAT_ID) through ggml's graphs: against sums in double, each row as it is alone, and
// whatever the number of threads.

#include "check.h"
#include "hook.h"
#include "kernel_sets.h"
#include "pack.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace entmtp;

// all that have panels, and some that have none
static const ggml_type TYPES[] = {
    GGML_TYPE_Q4_0,  GGML_TYPE_Q4_1,   GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,  GGML_TYPE_IQ4_NL,
    GGML_TYPE_MXFP4, GGML_TYPE_Q2_K,   GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,  GGML_TYPE_Q6_K,
    GGML_TYPE_F16,   GGML_TYPE_IQ4_XS, GGML_TYPE_BF16, GGML_TYPE_F32,  GGML_TYPE_TQ2_0, GGML_TYPE_IQ3_S,
};

struct experts {
    ggml_type          type;
    int64_t            k, n_out, n_expert;
    std::vector<float> values; // what the weights mean, [n_expert][n_out][k]

    ggml_context *        ctx    = nullptr;
    ggml_tensor *         w      = nullptr;
    ggml_backend_buffer_t buffer = nullptr;

    // packed: as a model's weights are held; else as an adapter's
    experts(ggml_type type, int64_t k, int64_t n_out, int64_t n_expert, std::mt19937 & rng, bool packed = true) :
        type(type), k(k), n_out(n_out), n_expert(n_expert), values(k * n_out * n_expert) {
        std::normal_distribution<float> normal(0.0f, 0.05f);
        for (float & v : values) {
            v = normal(rng);
        }
        const int64_t            n_rows = n_out * n_expert;
        const std::vector<float> ones(k, 1.0f); // some types must know what each weight counts
        std::vector<uint8_t>     data(ggml_row_size(type, k) * n_rows);
        ggml_quantize_chunk(type, values.data(), data.data(), 0, n_rows, k, ones.data());
        for (int64_t r = 0; type != GGML_TYPE_F32 && r < n_rows; ++r) {
            ggml_get_type_traits(type)->to_float(data.data() + r * ggml_row_size(type, k), &values[r * k], k);
        }
        ctx    = ggml_init({ ggml_tensor_overhead(), nullptr, true });
        w      = ggml_new_tensor_3d(ctx, type, k, n_out, n_expert);
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, packed ? ggml_cpu_hook_buffer_type()
                                                                      : ggml_backend_cpu_buffer_type());
        CHECK(buffer != nullptr);
        ggml_backend_tensor_set(w, data.data(), 0, data.size());
    }

    experts(const experts &) = delete;

    ~experts() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }
};

// y of a graph over x (and ids, of which each row begins with its part of `rows`); frees the graph
static std::vector<float> compute(ggml_context *               ctx,
                                  ggml_tensor *                y,
                                  ggml_tensor *                x,
                                  const std::vector<float> &   values,
                                  int                          n_threads,
                                  ggml_tensor *                ids  = nullptr,
                                  const std::vector<int32_t> & rows = {}) {
    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, y);
    ggml_backend_t        cpu    = ggml_backend_cpu_init();
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, cpu);
    CHECK(ggml_backend_supports_op(cpu, y));
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
    const size_t n = ids ? rows.size() / ids->ne[1] : 0;
    for (int64_t t = 0; ids && t < ids->ne[1]; ++t) {
        ggml_backend_tensor_set(ids, &rows[t * n], t * ids->nb[1], n * sizeof(int32_t));
    }
    ggml_backend_graph_compute(cpu, gf);
    std::vector<float> out(ggml_nelements(y));
    ggml_backend_tensor_get(y, out.data(), 0, out.size() * sizeof(float));
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(cpu);
    ggml_free(ctx);
    return out;
}

// x: [n_tokens][n_x][k], ids: [n_tokens][n_used] -> [n_tokens][n_used][n_out]
static std::vector<float> product(const experts &              m,
                                  const std::vector<float> &   x,
                                  int                          n_x,
                                  const std::vector<int32_t> & ids,
                                  int                          n_used,
                                  int                          n_threads) {
    const int64_t  n_tokens = (int64_t) ids.size() / n_used;
    ggml_context * ctx      = ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  xs       = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, m.k, n_x, n_tokens);
    // the chosen of all experts in order, as a router gives them: a view of longer rows
    ggml_tensor *  all      = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, m.n_expert + 1, n_tokens);
    ggml_tensor *  to       = ggml_view_2d(ctx, all, n_used, n_tokens, all->nb[1], 0);
    return compute(ctx, ggml_mul_mat_id(ctx, m.w, xs, to), xs, x, n_threads, all, ids);
}

// What kernels make of a row of activations, as numbers: integers times their scale, or the floats themselves
static std::vector<float> as_quantised(const experts & m, const float * row) {
    const weight_type  type = packed_type(m.type);
    std::vector<float> x(row, row + m.k);
    if (type == W_COUNT) { // ggml's own: blocks of 256 with a float scale
        std::vector<uint8_t> q(ggml_row_size(GGML_TYPE_Q8_K, m.k));
        ggml_get_type_traits_cpu(GGML_TYPE_Q8_K)->from_float(row, q.data(), m.k);
        for (int64_t i = 0; i < m.k; ++i) {
            const uint8_t * block = q.data() + i / 256 * ggml_type_size(GGML_TYPE_Q8_K);
            float           d;
            memcpy(&d, block, 4);
            x[i] = d * (float) (int8_t) block[4 + i % 256];
        }
    } else if (LAYOUTS[type].bits != 0) {
        const int64_t        n_blocks = m.k / LAYOUTS[type].block;
        std::vector<int8_t>  q(m.k);
        std::vector<float>   d(n_blocks);
        std::vector<int32_t> s(n_blocks * 16);
        portable().quantize(type, &row, 1, m.k, 0, n_blocks, { q.data(), nullptr, d.data(), s.data() });
        for (int64_t i = 0; i < m.k; ++i) {
            x[i] = d[i / LAYOUTS[type].block] * (float) q[i];
        }
    }
    return x;
}

struct pass {
    int                  n_tokens, n_x, n_used;
    std::vector<float>   x;
    std::vector<int32_t> ids;
};

static pass make_pass(const experts & m, int n_tokens, int n_x, int n_used, std::mt19937 & rng) {
    pass                            p = { n_tokens, n_x, n_used, std::vector<float>(n_tokens * n_x * m.k), {} };
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (float & v : p.x) {
        v = normal(rng);
    }
    std::vector<int32_t> order(m.n_expert);
    for (int32_t e = 0; e < m.n_expert; ++e) {
        order[e] = e;
    }
    for (int t = 0; t < n_tokens; ++t) {
        std::shuffle(order.begin(), order.end() - (t % 3 == 0 ? 0 : 1), rng); // the last is rarely chosen
        p.ids.insert(p.ids.end(), order.begin(), order.begin() + n_used);
    }
    return p;
}

static void check_experts(ggml_type type, int64_t k, int64_t n_out, int64_t n_expert, int n_x, std::mt19937 & rng) {
    const int     n_used = 2;
    const experts m(type, k, n_out, n_expert, rng);
    const pass    p = make_pass(m, 64, n_x, n_used, rng);

    std::vector<float> alone;
    for (int t = 0; t < p.n_tokens; ++t) {
        const std::vector<float>   x(p.x.begin() + t * n_x * k, p.x.begin() + (t + 1) * n_x * k);
        const std::vector<int32_t> ids(p.ids.begin() + t * n_used, p.ids.begin() + (t + 1) * n_used);
        const std::vector<float>   y = product(m, x, n_x, ids, n_used, 1);
        alone.insert(alone.end(), y.begin(), y.end());
    }

    double worst = 0.0, size = 0.0;
    for (int i = 0; i < p.n_tokens * n_used; ++i) {
        const std::vector<float> x = as_quantised(m, &p.x[(i / n_used * n_x + i % n_used % n_x) * k]);
        for (int64_t r = 0; r < n_out; ++r) {
            double exact = 0.0, sum = 0.0;
            for (int64_t j = 0; j < k; ++j) {
                const double product = (double) m.values[(p.ids[i] * n_out + r) * k + j] * x[j];
                exact += product;
                sum += std::fabs(product);
            }
            worst = std::max(worst, std::fabs(alone[i * n_out + r] - exact));
            size  = std::max(size, sum);
        }
    }
    // what is added has at most a rounding for each block, and scales and mins one each
    if (!CHECK(worst <= 1e-6 * size)) {
        fprintf(stderr, "%s %d x %d: %g of %g\n", ggml_type_name(type), (int) n_out, (int) k, worst, size);
    }

    for (int n : { 1, 2, 3, 5, 8, 16, 17, 33, 64 }) {
        for (int n_threads : { 1, 2, 3 }) {
            const std::vector<float>   x(p.x.begin(), p.x.begin() + n * n_x * k);
            const std::vector<int32_t> ids(p.ids.begin(), p.ids.begin() + n * n_used);
            const std::vector<float>   want(alone.begin(), alone.begin() + n * n_used * n_out);
            if (!CHECK(same_bits(product(m, x, n_x, ids, n_used, n_threads), want))) {
                fprintf(stderr, "%s %d x %d, %d tokens, %d threads\n", ggml_type_name(type), (int) n_out, (int) k, n,
                        n_threads);
                return;
            }
        }
    }
}

// a matrix for each head: [n_head][n_tokens][k] -> [n_head][n_tokens][n_out]; two heads share one
static void test_heads() {
    std::mt19937 rng(3);
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_F16, GGML_TYPE_IQ3_S }) {
        const experts m(type, 256, 50, 3, rng);
        for (int n_tokens : { 1, 7, 40 }) {
            const int            n_head = 6;
            // the same rows, sent to a matrix by their place or by a number
            const pass           p      = make_pass(m, n_tokens * n_head, 1, 1, rng);
            std::vector<int32_t> ids;
            for (int i = 0; i < n_tokens * n_head; ++i) {
                ids.push_back(i / n_tokens / 2);
            }
            ggml_context * ctx = ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
            ggml_tensor *  x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, m.k, n_tokens, n_head);
            CHECK(same_bits(compute(ctx, ggml_mul_mat(ctx, m.w, x), x, p.x, 2), product(m, p.x, 1, ids, 1, 1)));
        }
    }
}

static void test_experts() {
    std::mt19937 rng(1);
    for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
        CHECK(kernels_enable((*set)->name));
        for (const ggml_type type : TYPES) {
            const int64_t block = ggml_blck_size(type);
            check_experts(type, block == 1 ? 77 : std::max<int64_t>(block, 96), 40, 4, 1,
                          rng); // all quantise for themselves
            check_experts(type, 512, 50, 8, 2, rng);
        }
    }
}

// all rows at one expert, and rows that are sent to one twice
static void test_crowds() {
    std::mt19937  rng(2);
    const experts m(GGML_TYPE_Q4_K, 256, 33, 5, rng);
    for (const std::vector<int32_t> & pattern : std::vector<std::vector<int32_t>>{ { 4 }, { 3, 3, 0, 3 }, { 0, 4 } }) {
        pass p = make_pass(m, 40, 1, 2, rng);
        for (size_t i = 0; i < p.ids.size(); ++i) {
            p.ids[i] = pattern[i % pattern.size()];
        }
        const std::vector<float> y = product(m, p.x, 1, p.ids, 2, 2);
        for (int t = 0; t < p.n_tokens; ++t) {
            const std::vector<float> x(p.x.begin() + t * m.k, p.x.begin() + (t + 1) * m.k);
            const std::vector<float> row(y.begin() + t * 2 * m.n_out, y.begin() + (t + 1) * 2 * m.n_out);
            CHECK(same_bits(product(m, x, 1, { p.ids[2 * t], p.ids[2 * t + 1] }, 2, 1), row));
        }
    }
}

// matrices of an adapter, which are not packed: each row as it is alone, near to what is exact
static void test_adapters() {
    std::mt19937   rng(4);
    const uint64_t missed = kernels_missed();
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
        const experts m(type, 96, 20, 5, rng, false);
        const pass    p    = make_pass(m, 40, 1, 2, rng);
        const auto    rows = product(m, p.x, 1, p.ids, 2, 2);
        for (int i = 0; i < p.n_tokens * 2; ++i) {
            const std::vector<float> x(p.x.begin() + i / 2 * m.k, p.x.begin() + (i / 2 + 1) * m.k);
            const std::vector<float> row(rows.begin() + i * m.n_out, rows.begin() + (i + 1) * m.n_out);
            CHECK(same_bits(product(m, x, 1, { p.ids[i] }, 1, 1), row));
            for (int64_t r = 0; r < m.n_out; ++r) {
                double exact = 0.0;
                for (int64_t j = 0; j < m.k; ++j) {
                    exact += (double) m.values[(p.ids[i] * m.n_out + r) * m.k + j] * x[j];
                }
                CHECK(std::fabs(row[r] - exact) < 0.02); // of 0.5: activations have 8 bits, or those of bf16
            }
        }
    }
    CHECK(kernels_missed() == missed);
}

int main() {
    ggml_cpu_init();
    test_experts();
    test_crowds();
    test_heads();
    test_adapters();
    return check_result("test_kernels_experts");
}
