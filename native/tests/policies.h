// Policies with their tables, for the tests of the scheduler.

#pragma once

#include "entmtp.h"

#include <cmath>
#include <cstdint>
#include <vector>

// a bank: what a policy wants, with its arrays
struct policy_bank {
    std::vector<int32_t> n_nodes  = { 1, 4, 8 };
    std::vector<int32_t> depth    = { 0, 1, 2 };
    std::vector<float>   edges    = {};
    std::vector<float>   expected = {}; // [n_bins][n_trees]
    std::vector<float>   verify   = {}; // [n] us
    std::vector<float>   level    = {}; // [n_levels][3] us
    std::vector<float>   draft    = {}; // [n_trees] us
    std::vector<int32_t> ladder   = {};

    int32_t policy      = ENTMTP_POLICY_ENTROPY;
    int32_t static_tree = 0;
    int32_t criterion   = ENTMTP_CRITERION_RATIO;
    int32_t score       = ENTMTP_SCORE_ENTROPY;
    float   window      = 8.0f;
    bool    adapt       = false;

    uint32_t drafters = 0;

    float build = 0.0f;

    mutable entmtp_costs c = {};

    // a pass over n tokens: base + slope * (n - 1) us; drafts cost `draft_us` a tree
    void set_costs(float base, float slope, float draft_us, int32_t n = 64) {
        verify.clear();
        for (int32_t i = 0; i < n; ++i) {
            verify.push_back(base + slope * (float) i);
        }
        draft.assign(n_nodes.size(), draft_us);
        draft[0] = 0.0f;
        level.assign(4 * 3, draft_us);
    }

    const entmtp_costs * costs() const {
        c = { (int32_t) verify.size(), verify.data(), (int32_t) level.size() / 3, level.data(), draft.data(), build };
        return &c;
    }

    entmtp_policy_params params() const {
        entmtp_policy_params p = {};
        p.policy               = policy;
        p.static_tree          = static_tree;
        p.ema_window           = window;
        p.n_bins               = (int32_t) edges.size() + 1;
        p.bin_edges            = edges.data();
        p.expected             = expected.data();
        p.criterion            = criterion;
        p.score                = score;
        p.ladder               = ladder.data();
        p.costs                = costs();
        p.adapt                = adapt;
        p.drafters             = drafters;
        return p;
    }
};

// A calibration that takes the heads' probabilities as they are: logit p = ln p - ln(1 - p). Before a head runs, its best
// guesses are foreseen to be right with probabilities `best`, on every level.
struct plain_calibration {
    int32_t            n_levels;
    std::vector<float> accept, ahead, scenarios;

    plain_calibration(int32_t n, const std::vector<float> & best = { 0.5f, 0.2f, 0.1f }) : n_levels(n) {
        accept.assign((size_t) n * ENTMTP_N_ACCEPT, 0.0f);
        ahead.assign((size_t) n * ENTMTP_N_AHEAD, 0.0f);
        scenarios.assign((size_t) n * n * 3, 0.0f);
        for (int32_t l = 0; l < n; ++l) {
            accept[l * ENTMTP_N_ACCEPT + 1] = 1.0f;
            accept[l * ENTMTP_N_ACCEPT + 2] = -1.0f;
            for (int32_t below = l; below < n; ++below) {
                for (int32_t j = 0; j < 3; ++j) {
                    scenarios[((size_t) l * n + below) * 3 + j] = best[j] * std::pow(best[0], (float) (below - l));
                }
            }
        }
    }

    entmtp_calibration params() const {
        entmtp_calibration c = {};
        c.n_levels           = n_levels;
        c.hits               = 0.5f;
        c.hits_window        = 32.0f;
        c.accept             = accept.data();
        c.n_bins             = 1;
        c.n_scenarios        = 1;
        c.ahead              = ahead.data();
        c.scenarios          = scenarios.data();
        return c;
    }
};
