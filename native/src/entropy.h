// Entropy of the base model's next-token distribution, and its running estimate.

#pragma once

#include <cstdint>

namespace entmtp {

// what one look at a row of logits tells about softmax(logits / temp)
struct distribution {
    float entropy = 0.0f; // H = -sum p ln p, nats
    float log_sum = 0.0f; // ln sum exp(logit / temp): ln p of a token is its logit / temp less this
    float log_max = 0.0f; // ln p of the most probable token
};

//   logits [n]
distribution describe(const float * logits, int32_t n, float temp = 1.0f);

inline float entropy(const float * logits, int32_t n, float temp = 1.0f) {
    return describe(logits, n, temp).entropy;
}

// Exponential moving average with bias correction, so that the first values count fully
// (Adam, arXiv 1412.6980, section 3). A window of w tokens means decay 1 - 2/(w + 1).
class ema {
  public:
    explicit ema(float window = 8.0f);

    void  add(float x);
    float get() const; // 0 before the first value
    void  reset();

  private:
    float decay;
    float sum    = 0.0f;
    float weight = 0.0f;
};

} // namespace entmtp
