// What a model that drafts will probably say, before it is asked: what it said lately in the same situation.

#pragma once

#include <array>
#include <cstdint>

namespace entmtp {

// Scenarios: the acceptance of the three best children that it had, by how sure things were. After the root that is told by
// the running entropy, further down by the acceptance of the node itself.
class foresight {
  public:
    static constexpr int32_t n_bins      = 4;
    static constexpr int32_t n_scenarios = 8;

    using scenario  = std::array<float, 3>; // decreasing
    using scenarios = std::array<scenario, n_scenarios>;

    foresight();

    static int32_t bin(bool is_root, float running, float q);

    const scenarios & of(bool is_root, int32_t bin) const { return (is_root ? root : below)[bin]; }

    void see(bool is_root, int32_t bin, const scenario & s); // in place of the oldest

  private:
    std::array<scenarios, n_bins>   root;
    std::array<scenarios, n_bins>   below;
    std::array<int32_t, 2 * n_bins> next = {};
};

} // namespace entmtp
