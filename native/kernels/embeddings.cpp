#include "embeddings.h"

#include "pack.h"
#include "unpack.h"
#include "work.h"

namespace entmtp {

bool is_lookup(const ggml_tensor * op) {
    const ggml_tensor * w = op->src[0];
    return op->op == GGML_OP_GET_ROWS && op->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I32 &&
           w->ne[2] == 1 && w->ne[3] == 1 && ggml_is_contiguous(w) &&
           (w->type == GGML_TYPE_F32 || ggml_get_type_traits(w->type)->to_float);
}

static size_t row_bytes(const ggml_tensor * op) { // a thread's row in ggml's layout
    return lines_of(ggml_row_size(op->src[0]->type, op->src[0]->ne[0]));
}

size_t lookup_work_size(int n_threads, const ggml_tensor * op) {
    return n_threads * row_bytes(op);
}

void compute_lookup(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor *w = op->src[0], *ids = op->src[1];
    uint8_t *          buffer = (uint8_t *) task->wdata + task->ith * row_bytes(op);

    for (int64_t i = task->ith; i < ggml_nrows(op); i += task->nth) {
        const int64_t i0 = i % ids->ne[0], i1 = i / ids->ne[0] % ids->ne[1], i2 = i / ids->ne[0] / ids->ne[1];
        const int32_t row =
            *(const int32_t *) ((const char *) ids->data + i0 * ids->nb[0] + i1 * ids->nb[1] + i2 * ids->nb[2]);
        GGML_ASSERT(row >= 0 && row < w->ne[1]);
        const uint8_t * data = (const uint8_t *) w->data + row * w->nb[1];
        if (packed_type(w->type) != W_COUNT) {
            unpack_row(w->type, (const uint8_t *) w->data, w->ne[0], row, buffer);
            data = buffer;
        }
        if (w->type == GGML_TYPE_F32) {
            memcpy(row_of(op, i), data, w->ne[0] * sizeof(float));
        } else {
            ggml_get_type_traits(w->type)->to_float(data, row_of(op, i), w->ne[0]);
        }
    }
}

} // namespace entmtp
