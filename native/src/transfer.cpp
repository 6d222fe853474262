#include "transfer.h"

#include "ggml-cpp.h"

namespace entmtp {

static ggml_backend_dev_t device_of(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src ? t->view_src : t;
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(owner->buffer));
}

static bool on_host(const ggml_tensor * t) {
    const ggml_tensor * owner = t->view_src ? t->view_src : t;
    return ggml_backend_buffer_is_host(owner->buffer);
}

void send(entmtp_traffic & t, ggml_tensor * dst, const void * src) {
    ggml_backend_tensor_set(dst, src, 0, ggml_nbytes(dst));
    t.to_device += (int64_t) ggml_nbytes(dst);
    t.n_syncs++;
}

void fetch(entmtp_traffic & t, const ggml_tensor * src, void * dst, size_t offset, size_t size) {
    ggml_backend_tensor_get(src, dst, offset, size);
    t.to_host += (int64_t) size;
    t.n_syncs++;
}

void copy(entmtp_traffic & t, const ggml_tensor * src, ggml_tensor * dst) {
    ggml_backend_tensor_copy(const_cast<ggml_tensor *>(src), dst);
    t.n_syncs++;

    // buffers in host memory may be of several types, all of them the CPU's
    const int64_t size = (int64_t) ggml_nbytes(dst);
    if (device_of(src) == device_of(dst) || (on_host(src) && on_host(dst))) {
        t.on_device += size;
        return;
    }
    t.to_host += on_host(src) ? 0 : size;
    t.to_device += on_host(dst) ? 0 : size;
}

void send(entmtp_traffic & t, ggml_tensor * dst, const states & src) {
    const size_t row_size = ggml_row_size(dst->type, dst->ne[0]);

    // neighbouring rows go together
    for (size_t i = 0, n = 0; i < src.rows.size(); i += n) {
        for (n = 1; i + n < src.rows.size() && src.rows[i + n] == src.rows[i] + (int32_t) n;) {
            ++n;
        }
        if (src.host) {
            ggml_backend_tensor_set(dst, src.host + (size_t) src.rows[i] * dst->ne[0], i * row_size, n * row_size);
            t.to_device += (int64_t) (n * row_size);
            t.n_syncs++;
            continue;
        }

        ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));

        const auto view = [&](const ggml_tensor * x, size_t row) {
            auto *        whole = const_cast<ggml_tensor *>(x);
            ggml_tensor * part  = ggml_view_2d(ctx.get(), whole, x->ne[0], (int64_t) n, x->nb[1], row * x->nb[1]);
            ggml_backend_view_init(part);
            return part;
        };
        copy(t, view(src.tensor, (size_t) src.rows[i]), view(dst, i));
    }
}

void add(entmtp_traffic & sum, const entmtp_traffic & t) {
    sum.n_passes += t.n_passes;
    sum.n_outputs += t.n_outputs;
    sum.to_host += t.to_host;
    sum.to_device += t.to_device;
    sum.on_device += t.on_device;
    sum.n_rows += t.n_rows;
    sum.n_syncs += t.n_syncs;
    sum.n_graphs += t.n_graphs;
    sum.n_draft_graphs += t.n_draft_graphs;
}

} // namespace entmtp
