// Rows of packed weights: bit for bit what was packed, and as floats (GGML_OP_GET_ROWS) what ggml makes of the same rows.

#include "check.h"
#include "hook.h"
#include "kernel_sets.h"
#include "pack.h"
#include "unpack.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstring>
#include <random>
#include <vector>

using namespace entmtp;

static const ggml_type TYPES[] = {
    GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,  GGML_TYPE_IQ4_NL,
    GGML_TYPE_MXFP4,  GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,  GGML_TYPE_Q6_K,
    GGML_TYPE_IQ4_XS, GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_F32,  GGML_TYPE_IQ3_S, // the last has no panels
};

// every byte there is, so that no bit may go astray
static std::vector<uint8_t> random_bytes(size_t n, std::mt19937 & rng) {
    std::vector<uint8_t> bytes(n);
    for (uint8_t & b : bytes) {
        b = (uint8_t) rng();
    }
    return bytes;
}

static void test_unpack(ggml_type type, int64_t k, int64_t n_rows, std::mt19937 & rng) {
    const weight_type          as    = packed_type(type);
    const size_t               size  = ggml_row_size(type, k);
    const std::vector<uint8_t> data  = random_bytes(size * n_rows, rng);
    const int64_t              n_all = (n_rows + PANEL - 1) / PANEL;
    std::vector<uint8_t>       panels(packed_size(as, k, n_rows));
    pack_panels(as, data.data(), k, n_rows, 0, n_all, panels.data());

    std::vector<uint8_t> row(size + 1, 0xab);
    for (int64_t r = 0; r < n_rows; ++r) {
        unpack_row(type, panels.data(), k, r, row.data());
        if (!CHECK(memcmp(row.data(), data.data() + r * size, size) == 0)) {
            fprintf(stderr, "%s, row %d of %d\n", ggml_type_name(type), (int) r, (int) n_rows);
            return;
        }
    }
    CHECK(row[size] == 0xab);
}

// rows `ids` of w, which lies in a buffer of `buft`
static std::vector<float> look_up(ggml_backend_buffer_type_t   buft,
                                  ggml_type                    type,
                                  int64_t                      k,
                                  int64_t                      n_rows,
                                  const std::vector<uint8_t> & data,
                                  const std::vector<int32_t> & ids,
                                  int                          n_threads) {
    ggml_context *        weights = ggml_init({ ggml_tensor_overhead(), nullptr, true });
    ggml_tensor *         w       = ggml_new_tensor_2d(weights, type, k, n_rows);
    ggml_backend_buffer_t held    = ggml_backend_alloc_ctx_tensors_from_buft(weights, buft);
    ggml_backend_tensor_set(w, data.data(), 0, data.size());

    ggml_context * ctx = ggml_init({ 4 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    ggml_tensor *  at  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) ids.size());
    ggml_tensor *  y   = ggml_get_rows(ctx, w, at);
    ggml_cgraph *  gf  = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, y);
    ggml_backend_t        cpu    = ggml_backend_cpu_init();
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, cpu);
    CHECK(ggml_backend_supports_op(cpu, y));
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    ggml_backend_tensor_set(at, ids.data(), 0, ids.size() * sizeof(int32_t));
    ggml_backend_graph_compute(cpu, gf);
    std::vector<float> out(ggml_nelements(y));
    ggml_backend_tensor_get(y, out.data(), 0, out.size() * sizeof(float));
    ggml_backend_buffer_free(buffer);
    ggml_backend_free(cpu);
    ggml_free(ctx);
    ggml_backend_buffer_free(held);
    ggml_free(weights);
    return out;
}

static void test_lookup(ggml_type type, std::mt19937 & rng) {
    const int64_t                   k = ggml_blck_size(type) == 1 ? 77 : 512, n_rows = 50;
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<float>              values(k * n_rows);
    for (float & v : values) {
        v = normal(rng);
    }
    const std::vector<float> ones(k, 1.0f);
    std::vector<uint8_t>     data(ggml_row_size(type, k) * n_rows);
    ggml_quantize_chunk(type, values.data(), data.data(), 0, n_rows, k, ones.data());

    const std::vector<int32_t> ids  = { 0, 49, 17, 16, 15, 17, 48, 3 };
    const std::vector<float>   want = look_up(ggml_backend_cpu_buffer_type(), type, k, n_rows, data, ids, 1);
    for (int n_threads : { 1, 3 }) {
        const auto got = look_up(ggml_cpu_hook_buffer_type(), type, k, n_rows, data, ids, n_threads);
        if (!CHECK(same_bits(got, want))) {
            fprintf(stderr, "%s, %d threads\n", ggml_type_name(type), n_threads);
        }
    }
}

// which embeddings a model may hold in panels: those of tokens, and only if it is asked for
static void test_hold() {
    ggml_context *        ctx    = ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true });
    ggml_tensor *         w      = ggml_new_tensor_2d(ctx, GGML_TYPE_Q8_0, 64, 32);
    ggml_tensor *         at     = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2);
    ggml_tensor *         y      = ggml_get_rows(ctx, w, at);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_cpu_hook_buffer_type(), 0);
    w->buffer                    = buffer; // without data, as llama.cpp asks
    ggml_backend_dev_t cpu       = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    const auto is_taken = [&](const char * name) {
        ggml_set_name(w, name);
        return ggml_backend_dev_supports_op(cpu, y);
    };
    CHECK(!is_taken("token_embd.weight"));
    kernels_hold(true, false);
    CHECK(is_taken("token_embd.weight"));
    CHECK(!is_taken("per_layer_token_embd.weight")); // which is never multiplied by
    kernels_disable();
    CHECK(!is_taken("token_embd.weight"));
    CHECK(kernels_enable(nullptr));
    kernels_hold(false, false);
    CHECK(!is_taken("token_embd.weight"));

    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

int main() {
    ggml_cpu_init();
    std::mt19937 rng(1);
    CHECK(kernels_enable(nullptr));
    for (const ggml_type type : TYPES) {
        if (packed_type(type) != W_COUNT) {
            test_unpack(type, ggml_blck_size(type) == 1 ? 77 : 512, 37, rng);
            test_unpack(type, ggml_blck_size(type) == 1 ? 32 : 256, 1, rng);
        }
        test_lookup(type, rng);
    }
    test_hold();
    return check_result("test_kernels_embeddings");
}
