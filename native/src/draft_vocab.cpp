#include "draft_vocab.h"

#include "projection.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace entmtp {

static constexpr int32_t least = 4096;

int32_t draft_vocabulary::usual(int32_t n_vocab) {
    const int32_t n = std::max(least, n_vocab / 8 / 16 * 16); // whole panels of the CPU kernels
    return n < n_vocab / 2 ? n : n_vocab;
}

// where rows of it lie: beside it, packed if it is
static ggml_backend_buffer_type_t home(const ggml_tensor * projection) {
    if (is_packed(projection)) {
        return ggml_cpu_hook_buffer_type();
    }
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(projection->buffer));
    return dev ? ggml_backend_dev_buffer_type(dev) : ggml_backend_cpu_buffer_type();
}

draft_vocabulary::draft_vocabulary(const ggml_tensor * projection, int32_t n) :
    all(projection), ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true })), ids(n), is_here(projection->ne[1]),
    next(n / 2) {
    some = ggml_new_tensor_2d(ctx.get(), projection->type, projection->ne[0], n);
    ggml_set_name(some, "draft_vocabulary");
    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), home(projection)));
    if (!buffer) {
        throw std::runtime_error("draft model: no memory for the rows of its draft vocabulary");
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    std::iota(ids.begin(), ids.end(), 0);
    std::fill_n(is_here.begin(), n, true);
    copy_rows(all, ids, some);
}

draft_vocabulary::draft_vocabulary(const ggml_tensor * projection, std::vector<int32_t> tokens) :
    all(projection), some(const_cast<ggml_tensor *>(projection)), ids(std::move(tokens)), next(0) {}

void draft_vocabulary::put(int32_t row, int32_t token) {
    ids[row] = token;
    copy_row(all, token, some, row);
}

void draft_vocabulary::meet(int32_t token) {
    if (token < 0 || token >= (int32_t) is_here.size() || is_here[token]) {
        return;
    }
    is_here[ids[next]] = false;
    is_here[token]     = true;
    put(next, token);
    next = next + 1 < size() ? next + 1 : size() / 2;
}

void draft_vocabulary::forget() {
    if (is_here.empty()) {
        return;
    }
    for (int32_t row = size() / 2; row < size(); ++row) {
        if (ids[row] != row) {
            put(row, row);
        }
    }
    std::fill(is_here.begin(), is_here.end(), false);
    std::fill_n(is_here.begin(), size(), true);
    next = size() / 2;
}

} // namespace entmtp
