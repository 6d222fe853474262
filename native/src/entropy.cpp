#include "entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace entmtp {

// exp(x) for x <= 0, relative error below 3e-7; branch-free, so that the loops below vectorise
// 2^n * 2^f with n = round(x / ln 2), |f| <= 1/2, and a polynomial for 2^f
static inline float exp_neg(float x) {
    x = x > -87.0f ? x : -87.0f; // nan too

    const float t = x * 1.44269504f;
    const float n = (t + 12582912.0f) - 12582912.0f; // round to nearest: 1.5 * 2^23
    const float f = t - n;

    const float p =
        1.0f +
        f * (0.693147182f +
             f * (0.240226462f + f * (0.0555045344f + f * (0.00961822376f + f * (0.00133365194f + f * 0.000154697f)))));

    const int32_t bits = ((int32_t) n + 127) << 23;
    float         scale;
    std::memcpy(&scale, &bits, sizeof(scale));

    return p * scale;
}

distribution describe(const float * logits, int32_t n, float temp) {
    constexpr int32_t n_lanes = 16; // independent sums let the compiler use vector registers

    float max_lane[n_lanes];
    std::fill(max_lane, max_lane + n_lanes, -INFINITY);

    int32_t i = 0;
    for (; i + n_lanes <= n; i += n_lanes) {
        for (int32_t j = 0; j < n_lanes; ++j) {
            max_lane[j] = std::max(max_lane[j], logits[i + j]);
        }
    }
    float max = *std::max_element(max_lane, max_lane + n_lanes);
    for (; i < n; ++i) {
        max = std::max(max, logits[i]);
    }

    if (!std::isfinite(max)) {
        return {};
    }

    // with d = (logit - max) / temp: H = ln(sum e^d) - sum(d e^d) / sum(e^d)
    const float inv_temp = 1.0f / temp;

    float sum_lane[n_lanes]  = { 0 };
    float dsum_lane[n_lanes] = { 0 };

    for (i = 0; i + n_lanes <= n; i += n_lanes) {
        for (int32_t j = 0; j < n_lanes; ++j) {
            const float d = std::max((logits[i + j] - max) * inv_temp, -87.0f);
            const float e = exp_neg(d);
            sum_lane[j] += e;
            dsum_lane[j] += d * e;
        }
    }

    double sum  = 0.0;
    double dsum = 0.0;
    for (int32_t j = 0; j < n_lanes; ++j) {
        sum += sum_lane[j];
        dsum += dsum_lane[j];
    }
    for (; i < n; ++i) {
        const float d = std::max((logits[i] - max) * inv_temp, -87.0f);
        const float e = exp_neg(d);
        sum += e;
        dsum += d * e;
    }

    const double log_sum = std::log(sum); // at most ln n, at least 0: the largest term is 1

    return { std::max(0.0f, (float) (log_sum - dsum / sum)), max * inv_temp + (float) log_sum, (float) -log_sum };
}

ema::ema(float window) : decay(1.0f - 2.0f / (std::max(window, 1.0f) + 1.0f)) {}

void ema::add(float x) {
    sum    = decay * sum + (1.0f - decay) * x;
    weight = decay * weight + (1.0f - decay);
}

float ema::get() const {
    return weight > 0.0f ? sum / weight : 0.0f;
}

void ema::reset() {
    sum    = 0.0f;
    weight = 0.0f;
}

} // namespace entmtp
