// What a model that drafts will probably say, before it is asked: what it said lately in the same situation.

#pragma once

#include <array>
#include <cstdint>

namespace entmtp {

// Scenarios: the acceptance of the three best children that it had, by how sure things were. After the root that is told by
// the running entropy, further down by the acceptance of the node itself. A guess is among them until it was asked often.
class foresight {
  public:
    static constexpr int32_t n_bins = 4;
    static constexpr int32_t most   = 16;  // scenarios that are remembered

    using scenario = std::array<float, 3>; // decreasing

    struct bin {
        std::array<scenario, most> seen; // the guess is the first
        int32_t                    n    = 1;
        int64_t                    next = 1;

        const scenario * begin() const { return seen.data(); }
        const scenario * end() const { return seen.data() + n; }
    };

    foresight();

    static int32_t after_root(float running) {
        return running < 0.5f ? 0 : running < 1.2f ? 1 : running < 2.2f ? 2 : 3;
    }
    static int32_t after_node(float q) { return n_bins + (q > 0.9f ? 0 : q > 0.7f ? 1 : q > 0.4f ? 2 : 3); }

    const bin & of(int32_t i) const { return bins[i]; }

    void see(int32_t i, const scenario & s);

  private:
    std::array<bin, 2 * n_bins> bins;
};

} // namespace entmtp
