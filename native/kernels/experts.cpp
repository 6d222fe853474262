#include "experts.h"

#include "pack.h"
#include "work.h"

#include <algorithm>
#include <cstring>

namespace entmtp {

// the matrix that makes row `result` of the results, which are counted as they lie
static int64_t expert_of(const ggml_tensor * op, int64_t result) {
    const ggml_tensor *w = op->src[0], *ids = op->src[2];
    if (op->op == GGML_OP_MUL_MAT) {
        return result / op->ne[1] % op->ne[2] * w->ne[2] / op->ne[2]; // some heads may share one
    }
    const int64_t i = result % ids->ne[0], t = result / ids->ne[0];
    const int32_t e = *(const int32_t *) ((const char *) ids->data + i * ids->nb[0] + t * ids->nb[1]);
    GGML_ASSERT(e >= 0 && e < w->ne[2]);
    return e;
}

// the row of src[1] that it is made from: its own, or the one of its token
static int64_t source_of(const ggml_tensor * op, int64_t result) {
    if (op->op == GGML_OP_MUL_MAT) {
        return result;
    }
    const int64_t n_used = op->src[2]->ne[0], n_rows = op->src[1]->ne[1];
    return result / n_used * n_rows + result % n_used % n_rows;
}

// Results are sorted by their expert. So an expert's weights are read once for all that want them, and each result is what
// it would be alone: the kernels give that in any company.
struct routing {
    int32_t * results; // [n_results] expert after expert, within one in order
    int32_t * first;   // [n_expert + 1] where an expert's results begin
    int32_t * active;  // [n_expert] experts that have any
    int64_t   n_active;

    static size_t size(const ggml_tensor * op) { // bytes
        return lines_of((ggml_nrows(op) + 2 * op->src[0]->ne[2] + 1) * sizeof(int32_t));
    }

    routing(const ggml_tensor * op, uint8_t * memory) {
        const int64_t n_expert = op->src[0]->ne[2], n_results = ggml_nrows(op);
        results = (int32_t *) memory;
        first   = results + n_results;
        active  = first + n_expert + 1;

        std::fill(first, first + n_expert + 1, 0);
        for (int64_t r = 0; r < n_results; ++r) {
            first[expert_of(op, r) + 1]++;
        }
        for (int64_t e = 0; e < n_expert; ++e) {
            first[e + 1] += first[e];
            active[e] = first[e]; // for now: where its next result goes
        }
        for (int64_t r = 0; r < n_results; ++r) {
            results[active[expert_of(op, r)]++] = (int32_t) r;
        }
        n_active = 0;
        for (int32_t e = 0; e < n_expert; ++e) {
            if (first[e + 1] > first[e]) {
                active[n_active++] = e;
            }
        }
    }
};

// The work buffer: rows of activations, each by itself, shared or a copy for every thread; then what is a thread's own, its
// routing and a group of rows side by side.
constexpr int MOST = 16; // rows in a group

static size_t own_size(const work_layout & work, const ggml_tensor * op) {
    return routing::size(op) + MOST * work.token;
}

size_t experts_work_size(int n_threads, const ggml_tensor * op) {
    const weight_type type = packed_type(op->src[0]->type);
    if (!has_panels(op->src[0])) {
        return ggml_nrows(op->src[1]) * row_activations(op->src[0]->type, op->src[0]->ne[0]) +
               n_threads * routing::size(op);
    }
    const work_layout work(type, op);
    const size_t      rows = work.n_tokens * work.token * (work.alone(n_threads, op) ? n_threads : 1);
    return rows + n_threads * own_size(work, op);
}

// n rows, each by itself, side by side at `to`
static activations gather(weight_type type, const work_layout & w, const activations * from, int n, uint8_t * to) {
    const weight_layout & l    = LAYOUTS[type];
    const activations     a    = activations_at(type, w, to, n);
    const bool            ints = l.bits != 0;
    const size_t          size = ints ? l.block : l.block * sizeof(float);
    for (int i = 0; i < n; ++i) {
        for (int64_t b = 0; b < w.n_blocks; ++b) {
            memcpy(to + (b * n + i) * size, (const uint8_t *) from[i].q + b * size, size);
        }
        for (int64_t b = 0; ints && b < w.n_blocks; ++b) {
            a.d[b * n + i] = from[i].d[b];
            memcpy(a.s + (b * n + i) * l.sums, from[i].s + b * l.sums, l.sums * sizeof(int32_t));
        }
    }
    return a;
}

static void compute_panels(const kernel_set & set, const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor *   w    = op->src[0];
    const weight_type     type = packed_type(w->type);
    const weight_layout & l    = LAYOUTS[type];
    const work_layout     work(type, op);
    const bool            alone = work.alone(task->nth, op);
    const int             group = l.bits == 0 ? set.group_float : set.group;

    const size_t all  = work.n_tokens * work.token;
    uint8_t *    rows = (uint8_t *) task->wdata + (alone ? task->ith * all : 0);
    uint8_t *    own  = (uint8_t *) task->wdata + all * (alone ? task->nth : 1) + task->ith * own_size(work, op);
    uint8_t *    side = own + routing::size(op); // [MOST] rows

    const auto row_at = [&](int64_t i) {
        return activations_at(type, work, rows + i * work.token, 1);
    };
    // units: the blocks of all rows
    const int64_t n_units = work.n_tokens * work.n_blocks;
    const int64_t u1      = alone ? n_units : n_units * (task->ith + 1) / task->nth;
    for (int64_t u = alone ? 0 : n_units * task->ith / task->nth; u < u1;) {
        const int64_t i = u / work.n_blocks, b0 = u % work.n_blocks, b1 = std::min(work.n_blocks, b0 + u1 - u);
        const float * row = row_of(op->src[1], i);
        set.quantize(type, &row, 1, w->ne[0], b0, b1, row_at(i));
        u += b1 - b0;
    }
    const routing to(op, own);

    // the panels of all experts that have rows
    const int64_t n_panels    = (w->ne[1] + PANEL - 1) / PANEL;
    const size_t  panel_bytes = (size_t) work.n_blocks * l.panel_bytes;
    share_panels(task, to.n_active * n_panels, panel_bytes, alone, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin, p1; p < end; p += p1 - p % n_panels) {
            const int64_t expert = to.active[p / n_panels];
            p1                   = std::min(n_panels, p % n_panels + end - p);
            const int64_t n_rows = to.first[expert + 1] - to.first[expert], n_groups = (n_rows + group - 1) / group;
            for (int64_t g = 0; g < n_groups; ++g) { // of nearly equal size
                const int32_t * results = to.results + to.first[expert] + n_rows * g / n_groups;
                const int       n       = (int) (n_rows * (g + 1) / n_groups - n_rows * g / n_groups);
                activations     from[MOST];
                float *         into[MOST];
                for (int i = 0; i < n; ++i) {
                    from[i] = row_at(source_of(op, results[i]));
                    into[i] = row_of(op, results[i]);
                }
                multiply_panels(set, type, (const uint8_t *) w->data + expert * n_panels * panel_bytes, work.n_blocks,
                                w->ne[1], p % n_panels, p1, n, n == 1 ? from[0] : gather(type, work, from, n, side),
                                into);
            }
        }
    });
}

// Without panels: rows stay as ggml lays them out, and each row's product with each token is ggml's own product of one token:
// as fast with one token as ggml, slower than panels with several, and the same bits whatever else is in the pass.
static void compute_rows(const ggml_cpu_hook_task * task, ggml_tensor * op) {
    const ggml_tensor * w     = op->src[0];
    const size_t        token = row_activations(w->type, w->ne[0]);
    const auto          dot   = ggml_get_type_traits_cpu(w->type)->vec_dot;
    uint8_t *           rows  = (uint8_t *) task->wdata;

    quantize_rows(task, op, rows);
    const routing to(op, rows + ggml_nrows(op->src[1]) * token + task->ith * routing::size(op));
    ggml_cpu_hook_barrier(task);

    const int64_t n_rows = w->ne[1], n_all = to.n_active * n_rows;
    for (int64_t u = n_all * task->ith / task->nth; u < n_all * (task->ith + 1) / task->nth; ++u) {
        const int64_t expert = to.active[u / n_rows], r = u % n_rows;
        for (int64_t i = to.first[expert]; i < to.first[expert + 1];
             ++i) { // the row of weights stays in the first cache
            dot((int) w->ne[0], row_of(op, to.results[i]) + r, 0,
                (const char *) w->data + expert * w->nb[2] + r * w->nb[1], 0,
                rows + source_of(op, to.results[i]) * token, 0, 1);
        }
    }
}

void compute_experts(const kernel_set & set, const ggml_cpu_hook_task * task, ggml_tensor * op) {
    if (has_panels(op->src[0])) {
        compute_panels(set, task, op);
    } else {
        compute_rows(task, op);
    }
}

} // namespace entmtp
