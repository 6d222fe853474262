#include "projection.h"

#include "heads.h"
#include "hook.h"
#include "pack.h"

#include "ggml-cpu.h"

#include <cstring>

namespace entmtp {

static ggml_backend_buffer_type_t buffer_type(const ggml_tensor * t) {
    return ggml_backend_buffer_get_type(t->buffer);
}

static bool is_packed(const ggml_tensor * t) {
    return buffer_type(t) == ggml_cpu_hook_buffer_type();
}

// in host memory, and yet not as in the file: the extra buffer types of the CPU backend
static bool is_repacked(const ggml_tensor * t) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buffer_type(t));
    return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU &&
           !ggml_backend_buft_is_host(buffer_type(t));
}

const ggml_tensor * base_projection(const llama_model * model, int32_t n_embd, int32_t n_vocab) {
    const ggml_tensor * t = llama_model_get_tensor(model, "output.weight");
    if (!t || !t->buffer) {
        heads_fail("the base model has no output projection that heads could share");
    }
    if (t->ne[0] != n_embd || t->ne[1] != n_vocab || t->ne[2] != 1 || t->ne[3] != 1) {
        heads_fail("the base model's output projection has shape [" + std::to_string(t->ne[0]) + ", " +
                   std::to_string(t->ne[1]) + "], which heads of width " + std::to_string(n_embd) + " and " +
                   std::to_string(n_vocab) + " tokens cannot share");
    }
    return t;
}

sharing choose_sharing(const ggml_tensor * projection, ggml_backend_t backend, const std::vector<int32_t> & ids) {
    if (!ids.empty()) {
        return is_repacked(projection) && !is_packed(projection) ? sharing::select : sharing::rows;
    }
    return ggml_backend_supports_buft(backend, buffer_type(projection)) ? sharing::in_place : sharing::copy;
}

bool rows_are_packed(const ggml_tensor * projection) {
    return is_packed(projection) ||
           (kernels_current() && packed_type(projection->type) != W_COUNT && ggml_is_contiguous(projection));
}

void copy_rows(const ggml_tensor * projection, const std::vector<int32_t> & ids, ggml_tensor * rows) {
    if (is_packed(projection)) { // as they are: rows go from panels to panels
        const weight_type type = packed_type(projection->type);
        if (type == W_COUNT) {   // these are not in panels
            for (size_t i = 0; i < ids.size(); ++i) {
                memcpy((char *) rows->data + i * rows->nb[1],
                       (const char *) projection->data + ids[i] * projection->nb[1], projection->nb[1]);
            }
            return;
        }
        copy_packed_rows(type, projection->ne[0], (const uint8_t *) projection->data, ids.data(), (int64_t) ids.size(),
                         (uint8_t *) rows->data);
        return;
    }
    const size_t         size = ggml_row_size(projection->type, projection->ne[0]);
    std::vector<uint8_t> data(size * (size_t) rows->ne[1]);
    for (size_t i = 0; i < ids.size(); ++i) {
        ggml_backend_tensor_get(projection, &data[i * size], (size_t) ids[i] * projection->nb[1], size);
    }
    if (ids.empty()) {
        ggml_backend_tensor_get(projection, data.data(), 0, data.size());
    }
    ggml_backend_tensor_set(rows, data.data(), 0, data.size());
}

} // namespace entmtp
