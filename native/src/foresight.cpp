#include "foresight.h"

namespace entmtp {

// to begin with: surer texts and surer nodes are followed by surer ones
static constexpr float start[foresight::n_bins] = { 0.85f, 0.7f, 0.5f, 0.35f };

foresight::foresight() {
    for (int32_t b = 0; b < n_bins; ++b) {
        for (int32_t i = 0; i < n_scenarios; ++i) {
            const float q = start[b] * (0.5f + (float) i / (float) n_scenarios);
            const float p = q < 0.95f ? q : 0.95f;
            root[b][i] = below[b][i] = { p, 0.4f * (1.0f - p), 0.2f * (1.0f - p) };
        }
    }
}

int32_t foresight::bin(bool is_root, float running, float q) {
    if (is_root) {
        return running < 0.5f ? 0 : running < 1.2f ? 1 : running < 2.2f ? 2 : 3; // nats
    }
    return q > 0.9f ? 0 : q > 0.7f ? 1 : q > 0.4f ? 2 : 3;
}

void foresight::see(bool is_root, int32_t bin, const scenario & s) {
    int32_t & at                      = next[(is_root ? 0 : n_bins) + bin];
    (is_root ? root : below)[bin][at] = s;
    at                                = (at + 1) % n_scenarios;
}

} // namespace entmtp
