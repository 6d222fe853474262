#include "acceptance.h"

#include "calibration.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace entmtp {

// AdaGrad: a weight moves less the more it has moved
static constexpr float rate        = 0.08f;
static constexpr float start       = 4.0f;    // squares that the shipped weights are worth
static constexpr float keep        = 0.9995f; // texts change
static constexpr float weights_max = 12.0f;

// inputs: 1, length, share, rank, ln p and ln(1 - p) of the row, head, entropy, depth, hits of text, rows, heads; ln p and
// ln(1 - p) of the model, its hits
// Learned from 260 answers of SmolLM2-135M-Instruct to made prompts (docs/make_prompts.py), half of them at temperature 0.8
static constexpr float learned_before[acceptance::n_sets][acceptance::n_inputs] = {
    {},
    { 0.29f, 0.64f, 1.08f, -1.21f, 0, 0, 0, 0.02f, 0.19f, 1.48f, 0, 0 },                        // text
    { -1.55f, 0, 0, 0, 0.40f, -0.15f, 0, 0.02f, -0.78f, 0, 0.18f, 0 },                          // rows
    { 0.57f, 0.68f, 1.33f, -0.73f, 0.01f, -0.37f, 0, 0.05f, -0.13f, 0.75f, 0.63f, 0 },          // text, rows
    { 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0 },                                                     // heads: as calibrated
    { 0.70f, 0.21f, 0.54f, -0.53f, 0, 0, 0.55f, 0.32f, -0.01f, 0.56f, 0, 0.07f },               // text, heads
    { 0.20f, 0, 0, 0, 0.21f, -0.17f, 0.61f, -0.09f, -0.17f, 0, 0.36f, -0.08f },                 // rows, heads
    { 0.92f, 0.38f, 0.35f, -0.42f, -0.03f, -0.12f, 0.51f, 0.06f, -0.07f, 0.39f, 0.17f, 0.02f }, // text, rows, heads
    // with a model that drafts
    { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0 }, // as it says
    { 0.20f, 0.30f, 0.50f, -0.50f, 0, 0, 0, 0, 0, 0.50f, 0, 0, 0.70f, -0.70f, 0 },
    { 0, 0, 0, 0, 0.20f, -0.10f, 0, 0, 0, 0, 0, 0, 0.80f, -0.80f, 0 },
    { 0.30f, 0.30f, 0.50f, -0.30f, 0.10f, -0.10f, 0, 0, 0, 0.50f, 0, 0, 0.60f, -0.60f, 0 },
    { 0, 0, 0, 0, 0, 0, 0.30f, 0, 0, 0, 0, 0, 0.70f, -0.70f, 0 },
    { 0.30f, 0.20f, 0.30f, -0.30f, 0, 0, 0.30f, 0, 0, 0.30f, 0, 0, 0.50f, -0.50f, 0 },
    { 0, 0, 0, 0, 0.10f, -0.10f, 0.30f, 0, 0, 0, 0, 0, 0.60f, -0.60f, 0 },
    { 0.40f, 0.20f, 0.20f, -0.20f, 0, -0.10f, 0.30f, 0, 0, 0.30f, 0, 0, 0.50f, -0.50f, 0 },
};

acceptance::acceptance(const float * weights, bool adapt) : adapt(adapt) {
    set(weights ? weights : shipped());
}

const float * acceptance::shipped() {
    return &learned_before[0][0];
}

void acceptance::set(const float * weights) {
    if (!std::all_of(weights, weights + n_sets * n_inputs, [](float x) { return std::isfinite(x); })) {
        throw std::runtime_error("acceptance: a weight is no number");
    }
    w.assign(weights, weights + n_sets * n_inputs);
    squares.assign(w.size(), start);
}

void acceptance::study(uint32_t left_out, witness_fn witness) {
    without = left_out;
    sees    = std::move(witness);
}

uint32_t acceptance::set_of(uint32_t sources) const {
    return without >> n_inputs & 1 ? sources & (0u - sources) : sources;
}

void acceptance::inputs(uint32_t set, const proposal_signals & s, float * x) const {
    const bool text = set & from_text, rows = set & from_rows;
    const bool heads = set & from_heads, model = set & from_model;

    x[0]  = 1.0f;
    x[1]  = text ? std::log2(std::max(s.length, 1.0f)) - 2.0f : 0.0f;
    x[2]  = text ? std::log(std::max(s.share, 1e-3f)) : 0.0f;
    x[3]  = text ? std::log1p(s.rank) : 0.0f;
    x[4]  = rows ? std::max(s.row, -9.0f) : 0.0f;
    x[5]  = rows ? std::log1p(-std::min(std::exp(s.row), 0.999f)) : 0.0f;
    x[6]  = heads ? std::clamp(s.head, -7.0f, 7.0f) : 0.0f;
    x[7]  = s.entropy;
    x[8]  = std::log(std::max(s.depth, 1.0f));
    x[9]  = text ? s.hits[0] - 0.5f : 0.0f;
    x[10] = rows ? s.hits[1] - 0.5f : 0.0f;
    x[11] = heads ? s.hits[2] - 0.5f : 0.0f;
    x[12] = model ? std::max(s.model, -9.0f) : 0.0f;
    x[13] = model ? std::log1p(-std::min(std::exp(s.model), 0.999f)) : 0.0f;
    x[14] = model ? s.hits[3] - 0.5f : 0.0f;
    for (int32_t i = 0; i < n_inputs; ++i) {
        x[i] = without >> i & 1 ? 0.0f : x[i];
    }
}

float acceptance::probability(uint32_t sources, const proposal_signals & s) const {
    const uint32_t set = set_of(sources);
    float          x[n_inputs];
    inputs(set, s, x);
    const float * v = &w[(size_t) set * n_inputs];

    float z = 0.0f;
    for (int32_t i = 0; i < n_inputs; ++i) {
        z += v[i] * x[i];
    }
    return sigmoid(z);
}

void acceptance::observe(uint32_t sources, const proposal_signals & s, bool right) {
    if ((!adapt && !sees) || sources == 0) {
        return;
    }
    const float    p   = probability(sources, s);
    const uint32_t set = set_of(sources);
    float          x[n_inputs];
    inputs(set, s, x);
    if (sees) {
        sees(set, x, p, right);
    }
    if (!adapt) {
        return;
    }
    if (!std::isfinite(p) || !std::all_of(x, x + n_inputs, [](float v) { return std::isfinite(v); })) {
        return; // of logits that were none: no later text is to pay for it
    }
    const float e = (right ? 1.0f : 0.0f) - p;
    float *     v = &w[(size_t) set * n_inputs];
    float *     g = &squares[(size_t) set * n_inputs];
    for (int32_t i = 0; i < n_inputs; ++i) {
        const float step = e * x[i];
        g[i]             = keep * g[i] + step * step;
        v[i]             = std::clamp(v[i] + rate * step / std::sqrt(g[i]), -weights_max, weights_max);
    }
}

} // namespace entmtp
