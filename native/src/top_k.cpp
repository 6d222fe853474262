#include "top_k.h"

#include <algorithm>

namespace entmtp {

// values that are looked at together: where none is large enough, none is looked at alone
constexpr int32_t LANES = 16;
constexpr int32_t BLOCK = 4 * LANES;

static bool any_above(const float * x, float least) {
    float top[LANES];
    std::copy(x, x + LANES, top);
    for (int32_t i = LANES; i < BLOCK; i += LANES) {
        for (int32_t j = 0; j < LANES; ++j) {
            top[j] = top[j] < x[i + j] ? x[i + j] : top[j];
        }
    }
    int any = 0;
    for (const float t : top) {
        any |= t > least;
    }
    return any != 0;
}

void top_k(const float * x, int32_t n, int32_t k, int32_t * best) {
    int32_t count = 0;

    const auto offer = [&](int32_t i) {
        if (count == k && !(x[i] > x[best[k - 1]])) {
            return;
        }
        int32_t at = count < k ? count++ : k - 1;
        for (; at > 0 && x[i] > x[best[at - 1]]; --at) {
            best[at] = best[at - 1];
        }
        best[at] = i;
    };

    int32_t i = 0;
    for (; i < std::min(n, k); ++i) {
        offer(i);
    }
    for (; i + BLOCK <= n; i += BLOCK) {
        if (any_above(x + i, x[best[k - 1]])) {
            for (int32_t j = i; j < i + BLOCK; ++j) {
                offer(j);
            }
        }
    }
    for (; i < n; ++i) {
        offer(i);
    }
}

static void compute_top_k(ggml_tensor * dst, int ith, int nth, void * /*unused*/) {
    const ggml_tensor * logits = dst->src[0];
    const ggml_tensor * map    = dst->src[1];

    for (int64_t i = ith; i < dst->ne[1]; i += nth) {
        int32_t * best = (int32_t *) ((char *) dst->data + i * dst->nb[1]);
        top_k((const float *) ((const char *) logits->data + i * logits->nb[1]), (int32_t) logits->ne[0],
              (int32_t) dst->ne[0], best);
        for (int64_t j = 0; j < dst->ne[0] && map; ++j) {
            best[j] = ((const int32_t *) map->data)[best[j]];
        }
    }
}

ggml_tensor * build_top_k_cpu(ggml_context * ctx, ggml_tensor * logits, ggml_tensor * map, int32_t k) {
    ggml_tensor * args[] = { logits, map };
    return ggml_custom_4d(ctx, GGML_TYPE_I32, k, logits->ne[1], 1, 1, args, map ? 2 : 1, compute_top_k,
                          GGML_N_TASKS_MAX, nullptr);
}

} // namespace entmtp
