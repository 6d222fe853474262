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

bool is_packed(const ggml_tensor * t) {
    return buffer_type(t) == ggml_cpu_hook_buffer_type();
}

// in host memory, and yet not as in the file: the extra buffer types of the CPU backend
static bool is_repacked(const ggml_tensor * t) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buffer_type(t));
    return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU &&
           !ggml_backend_buft_is_host(buffer_type(t));
}

// cut into rows that lie on several GPUs: read as a whole only
static bool is_split(const ggml_tensor * t) {
    return strstr(ggml_backend_buft_name(buffer_type(t)), "Split") != nullptr;
}

bool has_rows(const ggml_tensor * t) {
    return is_packed(t) || (!is_repacked(t) && !is_split(t));
}

bool is_remote(const ggml_tensor * t) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buffer_type(t));
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0;
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
        return has_rows(projection) ? sharing::rows : sharing::select;
    }
    return ggml_backend_supports_buft(backend, buffer_type(projection)) ? sharing::in_place : sharing::copy;
}

bool rows_are_packed(const ggml_tensor * projection) {
    return is_packed(projection) ||
           (kernels_current() && packed_type(projection->type) != W_COUNT && ggml_is_contiguous(projection));
}

void copy_row(const ggml_tensor * projection, int32_t from, ggml_tensor * rows, int32_t to) {
    const weight_type type = is_packed(projection) ? packed_type(projection->type) : W_COUNT;
    if (type != W_COUNT) { // from panel to panel
        copy_packed_row(type, projection->ne[0], (const uint8_t *) projection->data, from, (uint8_t *) rows->data, to);
        return;
    }
    const size_t size = ggml_row_size(projection->type, projection->ne[0]);
    if (is_packed(projection)) { // a type without panels
        memcpy((char *) rows->data + to * rows->nb[1], (const char *) projection->data + from * projection->nb[1],
               size);
        return;
    }
    std::vector<uint8_t> row(size);
    ggml_backend_tensor_get(projection, row.data(), (size_t) from * projection->nb[1], size);
    ggml_backend_tensor_set(rows, row.data(), (size_t) to * rows->nb[1], size);
}

void copy_rows(const ggml_tensor * projection, const std::vector<int32_t> & ids, ggml_tensor * rows) {
    if (is_packed(projection)) { // as they are: rows go from panels to panels
        const weight_type type = packed_type(projection->type);
        if (type == W_COUNT) {   // these are not in panels
            for (size_t i = 0; i < ids.size(); ++i) {
                copy_row(projection, ids[i], rows, (int32_t) i);
            }
            return;
        }
        copy_packed_rows(type, projection->ne[0], (const uint8_t *) projection->data, ids.data(), (int64_t) ids.size(),
                         (uint8_t *) rows->data);
        return;
    }
    const size_t         size = ggml_row_size(projection->type, projection->ne[0]);
    std::vector<uint8_t> data(size * (size_t) rows->ne[1]);
    for (size_t i = 0, n = 0; i < ids.size(); i += n) { // rows that lie side by side at once
        for (n = 1; i + n < ids.size() && ids[i + n] == ids[i] + (int32_t) n; ++n) {
        }
        ggml_backend_tensor_get(projection, &data[i * size], (size_t) ids[i] * projection->nb[1], n * size);
    }
    if (ids.empty()) {
        ggml_backend_tensor_get(projection, data.data(), 0, data.size());
    }
    ggml_backend_tensor_set(rows, data.data(), 0, data.size());
}

} // namespace entmtp
