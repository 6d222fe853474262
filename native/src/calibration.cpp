#include "calibration.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

static float dot(const float * w, const float * x, int32_t n) {
    float sum = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        sum += w[i] * x[i];
    }
    return sum;
}

float spread_of(const float * log_p, int32_t n) {
    float sum = 0.0f;
    for (int32_t r = 0; r < n; ++r) {
        sum -= std::exp(log_p[r]) * log_p[r];
    }
    return sum;
}

calibration::calibration(const entmtp_calibration & c) :
    n_levels(c.n_levels), n_scenarios(c.n_scenarios), n_bins(c.n_bins) {
    if (n_levels < 1 || n_levels > 64 || n_bins < 1 || n_bins > 64 || n_scenarios < 1 || n_scenarios > 64 ||
        !c.accept || !c.ahead || !c.scenarios || (n_bins > 1 && !c.edges)) {
        throw std::runtime_error("calibration: a table is missing");
    }

    const auto copy = [](std::vector<float> & to, const float * from, size_t n, float low, float high) {
        for (size_t i = 0; i < n; ++i) {
            if (!(from[i] >= low && from[i] <= high)) {
                throw std::runtime_error("calibration: a number is out of range");
            }
            to.push_back(from[i]);
        }
    };
    if (!(c.hits >= 0.0f && c.hits <= 1.0f && c.hits_window >= 1.0f && c.hits_window <= 1e6f)) {
        throw std::runtime_error("calibration: hits are out of range");
    }
    hits_start = hits = c.hits;
    hits_rate         = 2.0f / (c.hits_window + 1.0f);

    copy(accept, c.accept, (size_t) n_levels * ENTMTP_N_ACCEPT, -1e3f, 1e3f);
    copy(ahead, c.ahead, (size_t) n_levels * ENTMTP_N_AHEAD, -1e3f, 1e3f);
    copy(edges, c.edges, (size_t) n_levels * (n_bins - 1), 0.0f, 1.0f);
    copy(scenarios, c.scenarios, (size_t) n_levels * n_bins * n_scenarios * n_levels * 3, 0.0f, 1.0f);
}

float calibration::logit(
    int32_t l, int32_t rank, float log_p, float above, float spread, const entmtp_signals & s, float running) const {
    const float x[ENTMTP_N_ACCEPT] = {
        1.0f,    log_p,     std::log1p(-std::min(std::exp(log_p), 0.9999f)),
        running, s.entropy, std::log((float) (1 + rank)),
        above,   hits,      spread,
    };
    return dot(&accept[(size_t) l * ENTMTP_N_ACCEPT], x, ENTMTP_N_ACCEPT);
}

float calibration::foresee(int32_t l, float path, float last, const entmtp_signals & s, float running) const {
    const float x[ENTMTP_N_AHEAD] = { 1.0f, running, s.entropy, s.log_root, hits, path, last };
    return dot(&ahead[(size_t) l * ENTMTP_N_AHEAD], x, ENTMTP_N_AHEAD);
}

const float * calibration::foreseen(int32_t l, float p) const {
    const float * e   = edges.data() + (size_t) l * (n_bins - 1);
    const int32_t bin = (int32_t) (std::upper_bound(e, e + (n_bins - 1), p) - e);
    return &scenarios[((size_t) l * n_bins + bin) * n_scenarios * n_levels * 3];
}

} // namespace entmtp
