#include "bandwidth.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace entmtp {

double device_bandwidth(ggml_backend_dev_t dev) {
    constexpr int64_t n        = 64 << 20; // floats: more than any cache holds
    constexpr int     n_passes = 8;
    constexpr int     n_runs   = 5;

    ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    ggml_context_ptr ctx(ggml_init({ 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    if (!backend) {
        throw std::runtime_error(std::string("cannot use device ") + ggml_backend_dev_name(dev));
    }

    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_tensor * x  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n);
    for (int i = 0; i < n_passes; ++i) {
        x = ggml_scale_inplace(ctx.get(), x, 1.0f);
    }
    ggml_build_forward_expand(gf, x);

    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buf) {
        throw std::runtime_error(std::string("no memory to measure ") + ggml_backend_dev_name(dev) + " with");
    }
    ggml_backend_buffer_clear(buf.get(), 0);

    int64_t best = INT64_MAX;
    for (int i = 0; i <= n_runs; ++i) {
        const int64_t t0 = ggml_time_us();
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error(std::string(ggml_backend_dev_name(dev)) + " could not be measured");
        }
        if (i > 0) { // the first one warms up
            best = std::min(best, ggml_time_us() - t0);
        }
    }
    return 2.0 * n_passes * n * sizeof(float) / (1e-6 * (double) std::max<int64_t>(best, 1));
}

} // namespace entmtp
