#include "hook.h"

#include "cache_ops.h"
#include "experts.h"
#include "memory.h"
#include "pack.h"
#include "work.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace entmtp {

static std::atomic<const kernel_set *> g_set     = { nullptr }; // computes what is packed, also after kernels_disable()
static std::atomic<bool>               g_enabled = { false };
static std::atomic<uint64_t>           g_missed  = { 0 };

const kernel_set & kernels() {
    return *g_set.load(std::memory_order_relaxed);
}

// -- packed weights --

// ggml multiplies rows of this type by tokens, one by one
static bool is_row_product(ggml_type type) {
    const ggml_type_traits_cpu * t = ggml_get_type_traits_cpu(type);
    return t->vec_dot &&
           (t->vec_dot_type == GGML_TYPE_F32 || ggml_get_type_traits_cpu(t->vec_dot_type)->from_float != nullptr);
}

static size_t hook_packed_size(const ggml_tensor * t) {
    const weight_type type = packed_type(t->type);
    return type == W_COUNT ? ggml_nbytes(t) : packed_size(type, t->ne[0], t->ne[1]) * t->ne[2];
}

static void pack(ggml_tensor * t, const void * data) {
    const weight_type type = packed_type(t->type);
    if (type == W_COUNT) {
        memcpy(t->data, data, ggml_nbytes(t));
        return;
    }
    // the panels of all matrices, matrix after matrix
    const int64_t n_panels = (t->ne[1] + PANEL - 1) / PANEL, n_all = n_panels * t->ne[2];
    const int64_t n_tasks = std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), n_all / 64 + 1);
    const size_t  size    = packed_size(type, t->ne[0], t->ne[1]);

    const auto some = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin, n; p < end; p += n) {
            const int64_t i = p / n_panels, p0 = p % n_panels;
            n = std::min(n_panels - p0, end - p);
            pack_panels(type, (const uint8_t *) data + i * t->nb[2], t->ne[0], t->ne[1], p0, p0 + n,
                        (uint8_t *) t->data + i * size);
        }
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < n_tasks; ++i) {
        threads.emplace_back(some, n_all * i / n_tasks, n_all * (i + 1) / n_tasks);
    }
    some(0, n_all / n_tasks);
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static void hook_pack(ggml_tensor * t, const void * data) {
    ask_large_pages(ggml_backend_buffer_get_base(t->buffer), ggml_backend_buffer_get_size(t->buffer));
    pack(t, data);
    give_back_file(data, ggml_nbytes(t));
}

// llama.cpp asks by the operator that a tensor's part of the model is for. A matrix's ".scale" (NVFP4, Gemma 4's experts)
// has its matrix's, though it is multiplied by element; and RWKV-6 reshapes one matrix, which no panel can follow.
static bool is_matrix(const ggml_tensor * w) {
    const size_t n = strlen(w->name), n_end = strlen(".weight");
    const bool   is_weight = n >= n_end && strcmp(w->name + n - n_end, ".weight") == 0;
    return (w->ne[1] > 1 || is_weight) && !(w->ne[2] > 1 && strstr(w->name, "time_mix_w2"));
}

// Weights that are loaded stay ours; whether new ones (without data yet) become ours is for the switch to say.
static bool hook_supports_op(const ggml_tensor * op) {
    const ggml_tensor * w = op->src[0];
    const bool is_product = op->op == GGML_OP_MUL_MAT_ID || (op->op == GGML_OP_MUL_MAT && op->op_params[1] == 0);
    return (g_enabled || w->data) && is_product && (packed_type(w->type) != W_COUNT || is_row_product(w->type)) &&
           w->ne[3] == 1 && ggml_is_contiguous(w) && (w->data || is_matrix(w)) && op->src[1]->type == GGML_TYPE_F32;
}

static void compute_packed(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const kernel_set &    set  = kernels();
    const ggml_tensor *   w    = op->src[0];
    const ggml_tensor *   x    = op->src[1];
    const weight_type     type = packed_type(w->type);
    const weight_layout & l    = LAYOUTS[type];
    const work_layout     work(type, op);

    const int64_t k = w->ne[0], n_rows = w->ne[1], n_tokens = work.n_tokens;
    const int64_t group    = l.bits == 0 ? set.group_float : set.group;
    const int64_t n_groups = (n_tokens + group - 1) / group;
    const bool    alone    = work.alone(task->nth, op);

    uint8_t * base = (uint8_t *) task->wdata + (alone ? task->ith * (size_t) n_tokens * work.token : 0);

    // groups of nearly equal size
    const auto group_start = [&](int64_t g) {
        return n_tokens * g / n_groups;
    };

    for (int64_t g = 0; g < n_groups; ++g) {
        const int64_t first = group_start(g);
        const int     n     = (int) (group_start(g + 1) - first);
        const float * rows[16];
        for (int i = 0; i < n; ++i) {
            rows[i] = row_of(x, first + i);
        }
        const int64_t b0 = alone ? 0 : work.n_blocks * task->ith / task->nth;
        const int64_t b1 = alone ? work.n_blocks : work.n_blocks * (task->ith + 1) / task->nth;
        set.quantize(type, rows, n, k, b0, b1, activations_at(type, work, base + first * work.token, n));
    }

    const int64_t n_panels    = (n_rows + PANEL - 1) / PANEL;
    const size_t  panel_bytes = (size_t) work.n_blocks * l.panel_bytes;

    // enough chunks for threads of unequal speed
    int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(CHUNK_BYTES / panel_bytes, n_panels / (task->nth * 4)));
    if (alone) {
        chunk = (n_panels + task->nth - 1) / task->nth;
    }
    const int64_t n_chunks = (n_panels + chunk - 1) / chunk;

    if (!alone) {
        if (task->ith == 0) {
            ggml_cpu_hook_chunk_set(task, task->nth);
        }
        ggml_cpu_hook_barrier(task);
    }

    for (int64_t c = task->ith; c < n_chunks; c = alone ? n_chunks : ggml_cpu_hook_chunk_add(task, 1)) {
        // with one thread a chunk could be the whole matrix: groups of tokens still go by in steps of the cache
        const int64_t end  = std::min((c + 1) * chunk, n_panels);
        const int64_t step = n_groups == 1 ? chunk : std::max<int64_t>(1, CHUNK_BYTES / panel_bytes);
        for (int64_t p0 = c * chunk; p0 < end; p0 += step) {
            for (int64_t g = 0; g < n_groups; ++g) {
                const int64_t     first = group_start(g);
                const int         n     = (int) (group_start(g + 1) - first);
                const activations a     = activations_at(type, work, base + first * work.token, n);
                for (int64_t p = p0; p < std::min(p0 + step, end); ++p) {
                    float out[16 * PANEL];
                    set.matmul(type, (const uint8_t *) w->data + p * panel_bytes, work.n_blocks, n, a, out);
                    const size_t bytes = std::min<int64_t>(PANEL, n_rows - p * PANEL) * sizeof(float);
                    for (int i = 0; i < n; ++i) {
                        memcpy(row_of(op, first + i) + p * PANEL, out + PANEL * i, bytes);
                    }
                }
            }
        }
    }
}

// -- types without panels --
//
// Rows stay as ggml lays them out, and each row's product with each token is ggml's own product of one token: as fast with
// one token as ggml, slower than panels with several, and the same bits whatever else is in the pass.

static void compute_rows(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor * w   = op->src[0];
    const auto          dot = ggml_get_type_traits_cpu(w->type)->vec_dot;

    const int64_t n_rows = w->ne[1], n_tokens = ggml_nrows(op->src[1]);
    const size_t  token     = row_activations(w->type, w->ne[0]);
    uint8_t *     quantised = (uint8_t *) task->wdata; // [n_tokens]

    quantize_rows(task, op, quantised);
    ggml_cpu_hook_barrier(task);

    for (int64_t r = n_rows * task->ith / task->nth; r < n_rows * (task->ith + 1) / task->nth; ++r) {
        for (int64_t i = 0; i < n_tokens; ++i) { // the row stays in the first cache
            dot((int) w->ne[0], row_of(op, i) + r, 0, (const char *) w->data + r * w->nb[1], 0, quantised + i * token,
                0, 1);
        }
    }
}

// -- the hook --

static bool hook_takes_op(const ggml_tensor * op, bool packed) {
    if (packed) {
        return true;
    }
    if (!g_enabled) {
        return false;
    }
    bool takes = false;
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            takes = is_cache_product(op);
            break;
        case GGML_OP_FLASH_ATTN_EXT:
            takes = is_attention(op);
            break;
        case GGML_OP_SOFT_MAX:
            takes = is_softmax(op);
            break;
        case GGML_OP_MUL_MAT_ID:
            break;
        default:
            return false;
    }
    g_missed += !takes;
    return takes;
}

static bool is_packed(const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_get_type(t->buffer) == ggml_cpu_hook_buffer_type();
}

static bool is_of_many(const ggml_tensor * op) { // matrices in one tensor
    return is_packed(op->src[0]) && (op->op == GGML_OP_MUL_MAT_ID || op->src[0]->ne[2] > 1);
}

static bool hook_work_size(int n_threads, const ggml_tensor * op, size_t * size) {
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        const ggml_tensor *k = op->src[1], *v = op->src[2];
        *size = n_threads * attention_scratch((int) k->ne[1], (int) k->ne[0], (int) v->ne[0]) * sizeof(float);
    } else if (is_of_many(op)) {
        *size = experts_work_size(n_threads, op);
    } else if (op->op == GGML_OP_MUL_MAT && is_packed(op->src[0])) {
        const ggml_tensor * w    = op->src[0];
        const weight_type   type = packed_type(w->type);
        if (type == W_COUNT) {
            *size = ggml_nrows(op->src[1]) * row_activations(w->type, w->ne[0]);
            return true;
        }
        const work_layout work(type, op);
        *size = (size_t) work.n_tokens * work.token * (work.alone(n_threads, op) ? n_threads : 1);
    } else if (op->op == GGML_OP_MUL_MAT) {
        *size = n_threads * ordered_scratch(op);
    } else {
        *size = 0;
    }
    return true;
}

static bool hook_compute(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            if (is_of_many(op)) {
                compute_experts(kernels(), task, op);
            } else if (!is_packed(op->src[0])) {
                compute_ordered(task, op);
            } else if (packed_type(op->src[0]->type) == W_COUNT) {
                compute_rows(task, op);
            } else {
                compute_packed(task, op);
            }
            return true;
        case GGML_OP_MUL_MAT_ID:
            compute_experts(kernels(), task, op);
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            compute_attention(task, op);
            return true;
        case GGML_OP_SOFT_MAX:
            compute_softmax(task, op);
            return true;
        default:
            return false;
    }
}

bool kernels_enable(const char * name) {
    static const ggml_cpu_hook hook = { hook_supports_op, hook_packed_size, hook_pack,
                                        hook_takes_op,    hook_work_size,   hook_compute };
    for (const kernel_set * const * set = kernel_sets(); *set; ++set) {
        if (name == nullptr || strcmp((*set)->name, name) == 0) {
            g_set     = *set;
            g_enabled = true;
            ggml_cpu_set_hook(&hook);
            return true;
        }
    }
    return false;
}

void kernels_disable() {
    g_enabled = false;
}

int kernels_of(int type) {
    if (type < 0 || type >= GGML_TYPE_COUNT) {
        return 0;
    }
    return packed_type((ggml_type) type) != W_COUNT ? 2 : is_row_product((ggml_type) type) ? 1 : 0;
}

uint64_t kernels_missed() {
    return g_missed;
}

const kernel_set * kernels_current() {
    return g_enabled ? g_set.load() : nullptr;
}

} // namespace entmtp
