#include "foresight.h"

#include <algorithm>

namespace entmtp {

// acceptance of the best child: surer texts and surer nodes are followed by surer ones
static constexpr float guess[2 * foresight::n_bins] = { 0.65f, 0.5f, 0.4f, 0.3f, 0.65f, 0.5f, 0.4f, 0.3f };

foresight::foresight() {
    for (size_t i = 0; i < bins.size(); ++i) {
        bins[i].seen[0] = { guess[i], 0.3f * (1.0f - guess[i]), 0.15f * (1.0f - guess[i]) };
    }
}

void foresight::see(int32_t i, const scenario & s) {
    bin & b               = bins[i];
    b.seen[b.next % most] = s; // in place of the guess, then of the oldest
    b.next++;
    b.n = (int32_t) std::min<int64_t>(b.next, most);
}

} // namespace entmtp
