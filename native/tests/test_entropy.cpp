// Entropy against a double-precision reference, and the running estimate against its closed form.

#include "entropy.h"

#include "check.h"

#include <algorithm>
#include <random>
#include <vector>

static double reference(const std::vector<float> & logits, double temp) {
    const double max = *std::max_element(logits.begin(), logits.end());

    double sum = 0.0;
    for (const float l : logits) {
        sum += std::exp((l - max) / temp);
    }
    double h = 0.0;
    for (const float l : logits) {
        const double p = std::exp((l - max) / temp) / sum;
        h -= p > 0.0 ? p * std::log(p) : 0.0;
    }
    return h;
}

static void test_random() {
    std::mt19937 rng(1);

    std::vector<int32_t> sizes = { 4096, 32000, 128000, 128256, 151937 };
    for (int32_t n = 1; n <= 40; ++n) {
        sizes.push_back(n);
    }

    for (const int32_t n : sizes) {
        for (const float scale : { 0.01f, 1.0f, 4.0f, 30.0f, 1000.0f }) {
            std::normal_distribution<float> normal(-3.0f, scale);

            std::vector<float> logits(n);
            for (auto & l : logits) {
                l = normal(rng);
            }
            for (const float temp : { 0.2f, 0.7f, 1.0f, 1.5f, 10.0f }) {
                CHECK_NEAR(entmtp::entropy(logits.data(), n, temp), reference(logits, temp), 2e-4);
            }

            // tokens that are ruled out
            for (int32_t i = 0; i < n; i += 3) {
                if (n > 1) {
                    logits[(i + 1) % n] = -INFINITY;
                }
            }
            CHECK_NEAR(entmtp::entropy(logits.data(), n), reference(logits, 1.0), 2e-4);
        }
    }
}

static void test_special() {
    for (int32_t n : { 1, 2, 15, 16, 17, 40, 4096, 128000 }) {
        std::vector<float> logits(n, 7.5f);
        CHECK_NEAR(entmtp::entropy(logits.data(), n), std::log((double) n), 1e-4);

        // all but one at -inf, at any place
        for (int32_t i : { 0, n / 2, n - 1 }) {
            std::vector<float> one_hot(n, -INFINITY);
            one_hot[i] = -2.0f;
            CHECK_NEAR(entmtp::entropy(one_hot.data(), n), 0.0, 1e-6);
            one_hot.assign(n, -1000.0f);
            one_hot[i] = 1000.0f;
            CHECK_NEAR(entmtp::entropy(one_hot.data(), n), 0.0, 1e-6);
        }

        // two equal ones
        if (n > 1) {
            std::vector<float> two(n, -INFINITY);
            two[0]     = 3.0f;
            two[n - 1] = 3.0f;
            CHECK_NEAR(entmtp::entropy(two.data(), n), std::log(2.0), 1e-6);
        }

        // nothing to tell: a number, not nan
        std::vector<float> none(n, -INFINITY);
        CHECK_NEAR(entmtp::entropy(none.data(), n), 0.0, 0.0);
        none[n / 2] = NAN;
        (void) entmtp::entropy(none.data(), n); // any value, but no undefined behaviour
        none[0] = INFINITY;
        CHECK_NEAR(entmtp::entropy(none.data(), n), 0.0, 0.0);
    }

    // a low temperature sharpens, a high one flattens
    const std::vector<float> logits = { 1.0f, 2.0f, 3.0f };
    CHECK(entmtp::entropy(logits.data(), 3, 0.5f) < entmtp::entropy(logits.data(), 3, 1.0f));
    CHECK(entmtp::entropy(logits.data(), 3, 2.0f) > entmtp::entropy(logits.data(), 3, 1.0f));
}

static void test_ema() {
    std::mt19937                          rng(2);
    std::uniform_real_distribution<float> uniform(0.0f, 3.0f);

    for (const float window : { 1.0f, 2.0f, 4.0f, 8.0f, 64.0f, 1000.0f }) {
        const double decay = 1.0 - 2.0 / (window + 1.0);

        entmtp::ema e(window);
        CHECK_NEAR(e.get(), 0.0, 0.0);

        std::vector<double> xs;
        for (int i = 0; i < 300; ++i) {
            const float x = uniform(rng);
            e.add(x);
            xs.push_back(x);

            // sum_j decay^(n-1-j) x_j / sum_j decay^(n-1-j)
            double sum    = 0.0;
            double weight = 0.0;
            for (size_t j = 0; j < xs.size(); ++j) {
                const double w = std::pow(decay, (double) (xs.size() - 1 - j));
                sum += w * xs[j];
                weight += w;
            }
            CHECK_NEAR(e.get(), sum / weight, 1e-4);
        }

        e.reset();
        CHECK_NEAR(e.get(), 0.0, 0.0);
        e.add(1.25f);
        CHECK_NEAR(e.get(), 1.25, 1e-6); // the first value counts fully
    }

    // a window below one token is one token
    entmtp::ema e(0.0f);
    e.add(1.0f);
    e.add(2.0f);
    CHECK_NEAR(e.get(), 2.0, 1e-6);
}

int main() {
    test_random();
    test_special();
    test_ema();
    return check_result("test_entropy");
}
