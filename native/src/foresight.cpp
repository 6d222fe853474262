#include "foresight.h"

#include <algorithm>

namespace entmtp {

// acceptance of the best child: surer texts and surer nodes are followed by surer ones. Hopeful, so that it is asked a few
// times before it is left alone
static constexpr float guess[2 * foresight::n_bins] = { 0.85f, 0.75f, 0.65f, 0.55f, 0.85f, 0.75f, 0.6f, 0.5f };

foresight::foresight() {
    for (size_t i = 0; i < bins.size(); ++i) {
        bins[i].seen[0] = { guess[i], 0.3f * (1.0f - guess[i]), 0.15f * (1.0f - guess[i]) };
    }
}

void foresight::see(int32_t i, const scenario & s) {
    bin & b               = bins[i];
    b.seen[b.next % most] = s; // the guess is the last of the first ones to go, then the oldest
    b.next++;
    b.n = std::min(b.n + 1, most);
}

} // namespace entmtp
