#include "hook.h"

#include "cache_ops.h"
#include "embeddings.h"
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

static std::atomic<const kernel_set *> g_set        = { nullptr }; // of what is packed, also after kernels_disable()
static std::atomic<bool>               g_enabled    = { false };
static std::atomic<uint64_t>           g_missed     = { 0 };
static std::atomic<bool>               g_embeddings = { false }; // token embeddings are packed, too
static std::atomic<bool>               g_locked     = { false }; // what is packed is locked in memory
static std::atomic<uint64_t>           g_unlocked   = { 0 };     // bytes that should have been

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

constexpr int64_t GIVEN_BACK = 4 << 20; // bytes of a file at a time

static void pack(ggml_tensor * t, const void * data, bool is_mapped) {
    const weight_type type = packed_type(t->type);
    if (type == W_COUNT) {
        memcpy(t->data, data, ggml_nbytes(t));
        return;
    }
    // the panels of all matrices, matrix after matrix
    const int64_t n_panels = (t->ne[1] + PANEL - 1) / PANEL, n_all = n_panels * t->ne[2];
    const int64_t n_tasks = std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), n_all / 64 + 1);
    const size_t  size    = packed_size(type, t->ne[0], t->ne[1]);

    // as many panels at a time as are worth giving the file's pages back
    const int64_t some_panels = std::max<int64_t>(1, GIVEN_BACK / (PANEL * t->nb[1]));

    const auto some = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin, n; p < end; p += n) {
            const int64_t i = p / n_panels, p0 = p % n_panels;
            n                    = std::min({ n_panels - p0, end - p, some_panels });
            const uint8_t * rows = (const uint8_t *) data + i * t->nb[2];
            pack_panels(type, rows, t->ne[0], t->ne[1], p0, p0 + n, (uint8_t *) t->data + i * size);
            if (is_mapped) {
                const int64_t n_rows = std::min(t->ne[1] - p0 * PANEL, n * PANEL);
                give_back(rows + p0 * PANEL * t->nb[1], n_rows * t->nb[1]);
            }
        }
    };
    std::vector<std::thread> threads;
    int64_t                  n_begun = 1;
    try {
        for (; n_begun < n_tasks; ++n_begun) {
            threads.emplace_back(some, n_all * n_begun / n_tasks, n_all * (n_begun + 1) / n_tasks);
        }
    } catch (const std::exception &) {
        some(n_all * n_begun / n_tasks, n_all); // the system gives no more threads
    }
    some(0, n_all / n_tasks);
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static void hook_pack(ggml_tensor * t, const void * data) {
    void *       base = ggml_backend_buffer_get_base(t->buffer);
    const size_t size = ggml_backend_buffer_get_size(t->buffer);
    ask_large_pages(base, size);
    if (g_locked && !lock_memory(base, size)) { // all of it: where the kind of memory changes, no large page can lie
        g_unlocked += hook_packed_size(t);
    }
    const bool is_mapped = is_of_file(data, ggml_nbytes(t));
    pack(t, data, is_mapped);
    if (is_mapped) { // the pages that two pieces share
        give_back(data, ggml_nbytes(t));
    }
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
    if (op->op == GGML_OP_GET_ROWS) {
        return (w->data || (g_enabled && g_embeddings && strcmp(w->name, "token_embd.weight") == 0)) && is_lookup(op);
    }
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

    const size_t panel_bytes = (size_t) work.n_blocks * l.panel_bytes;
    share_panels(task, (n_rows + PANEL - 1) / PANEL, panel_bytes, alone, [&](int64_t p0, int64_t p1) {
        for (int64_t g = 0; g < n_groups; ++g) {
            const int64_t first = group_start(g);
            const int     n     = (int) (group_start(g + 1) - first);
            float *       to[16];
            for (int i = 0; i < n; ++i) {
                to[i] = row_of(op, first + i);
            }
            multiply_panels(set, type, (const uint8_t *) w->data, work.n_blocks, n_rows, p0, p1, n,
                            activations_at(type, work, base + first * work.token, n), to);
        }
    });
}

// -- the hook --

// Matrices that come while a model runs, in memory of their own: adapters (LoRA), and a cache of quantised keys
static bool is_plain_product(const ggml_tensor * op) {
    const ggml_tensor * w      = op->src[0];
    const auto          buffer = w->view_src ? w->view_src->buffer : w->buffer;
    return buffer && ggml_backend_buffer_is_host(buffer) &&
           ggml_backend_buffer_get_usage(buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS && is_row_product(w->type) &&
           w->nb[0] == ggml_type_size(w->type) && w->ne[3] == 1 && op->src[1]->type == GGML_TYPE_F32 &&
           op->src[1]->nb[0] == sizeof(float);
}

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
            if (op->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD) {
                return false; // ggml transforms row by row: what else is in the pass leaves no trace
            }
            takes = is_cache_product(op) || is_plain_product(op);
            break;
        case GGML_OP_FLASH_ATTN_EXT:
            takes = is_attention(op);
            break;
        case GGML_OP_SOFT_MAX:
            takes = is_softmax(op);
            break;
        case GGML_OP_MUL_MAT_ID:
            takes = is_plain_product(op);
            break;
        default:
            return false;
    }
    g_missed += !takes;
    return takes;
}

static bool is_of_many(const ggml_tensor * op) { // matrices in one tensor, and what goes their way: all without panels
    return op->op == GGML_OP_MUL_MAT_ID ||
           (is_packed(op->src[0]) ? op->src[0]->ne[2] > 1 || !has_panels(op->src[0]) : !is_cache_product(op));
}

// The cache, and what passes compute, lie in memory that ggml allocates: it is seen when a pass is planned
static void look_at_memory(const ggml_tensor * t) {
    struct range {
        void * base;
        size_t size;
    };
    static thread_local range seen[8] = {};
    static thread_local int   next    = 0;

    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (!buffer || !ggml_backend_buffer_is_host(buffer) ||
        ggml_backend_buffer_get_usage(buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
        return;
    }
    const range r = { ggml_backend_buffer_get_base(buffer), ggml_backend_buffer_get_size(buffer) };
    for (const range & s : seen) {
        if (s.base == r.base && s.size == r.size) {
            return;
        }
    }
    seen[next] = r;
    next       = (next + 1) % 8;
    make_large_pages(r.base, r.size);
}

static bool hook_work_size(int n_threads, const ggml_tensor * op, size_t * size) {
    look_at_memory(op);
    look_at_memory(op->src[op->op == GGML_OP_FLASH_ATTN_EXT ? 1 : 0]); // the cache
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            if (is_of_many(op)) {
                *size = experts_work_size(n_threads, op);
            } else if (is_packed(op->src[0])) {
                const work_layout work(packed_type(op->src[0]->type), op);
                *size = (size_t) work.n_tokens * work.token * (work.alone(n_threads, op) ? n_threads : 1);
            } else {
                *size = n_threads * ordered_scratch(op);
            }
            break;
        case GGML_OP_GET_ROWS:
            *size = lookup_work_size(n_threads, op);
            break;
        case GGML_OP_FLASH_ATTN_EXT: {
            const ggml_tensor *k = op->src[1], *v = op->src[2];
            *size = n_threads * attention_scratch((int) k->ne[1], (int) k->ne[0], (int) v->ne[0]) * sizeof(float);
            break;
        }
        default:
            *size = 0;
    }
    return true;
}

static bool hook_compute(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            if (is_of_many(op)) {
                compute_experts(kernels(), task, op);
            } else if (!is_packed(op->src[0])) {
                compute_ordered(task, op);
            } else {
                compute_packed(task, op);
            }
            return true;
        case GGML_OP_GET_ROWS:
            compute_lookup(task, op);
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

void kernels_hold(bool embeddings, bool locked) {
    g_embeddings = embeddings;
    g_locked     = locked;
    g_unlocked   = 0;
}

uint64_t kernels_unlocked() {
    return g_unlocked;
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
