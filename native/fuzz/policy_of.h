// Parameters of policies out of decisions: tables of the right sizes, in which most numbers are good.

#pragma once

#include "entmtp.h"

#include "fuzz.h"

#include <cmath>
#include <vector>

struct policy_of {
    entmtp_policy_params params      = {};
    entmtp_costs         costs       = {};
    entmtp_calibration   calibration = {};

    // sources: those that can draft
    policy_of(decisions & d, int32_t n_trees, int32_t n_heads, uint32_t sources) : d(d), spoilt(d.byte() % 4 == 3) {
        params.policy      = d.between(0, spoilt ? 8 : 7);
        params.static_tree = bad() ? 99 : d.between(0, n_trees - 1);
        params.ema_window  = number(1.0f, 16.0f);
        params.n_bins      = bad() ? 0 : d.between(1, 3);
        params.bin_edges   = edges.data();
        params.criterion   = d.between(0, spoilt ? 2 : 1);
        params.score       = d.between(0, spoilt ? 3 : 2);
        params.drafters    = d.byte() & (spoilt ? 255 : sources);
        params.adapt       = d.flag();
        fill(edges, 2, 1.0f);
        edges[1] += edges[0] + 0.1f;
        params.bin_edges = edges.data();
        fill(expected, 3 * n_trees, 3.0f);
        params.expected = bad() ? nullptr : expected.data();
        for (int32_t i = 0; i < 3; ++i) {
            ladder.push_back(bad() ? n_trees : d.between(0, n_trees - 1));
        }
        params.ladder = bad() ? nullptr : ladder.data();

        costs.n_verify = bad() ? d.between(0, 2) : 32;
        // a model that drafts costs what it takes here, and is asked where that is little beside a pass
        fill(verify, 32, 2.0f, params.drafters & ENTMTP_SOURCE_MODEL ? 1e5f : 100.0f);
        costs.verify   = bad() ? nullptr : verify.data();
        costs.n_levels = bad() ? d.between(0, 2) : n_heads;
        fill(level, 3 * 3, 5.0f);
        costs.level = level.data();
        fill(tree, n_trees, 5.0f);
        costs.tree   = tree.data();
        costs.build  = d.flag() ? 0.0f : number(0.0f, 50.0f);
        params.costs = bad() ? nullptr : &costs;

        calibration.n_levels    = bad() ? d.between(0, 2) : n_heads;
        calibration.hits        = number(0.0f, 1.0f);
        calibration.hits_window = number(1.0f, 20.0f);
        calibration.n_bins      = d.between(1, 2);
        calibration.n_scenarios = d.between(1, 2);
        const int32_t n         = 3;
        fill(accept, n * ENTMTP_N_ACCEPT, 2.0f);
        fill(ahead, n * ENTMTP_N_AHEAD, 2.0f);
        fill(cal_edges, n, 0.5f);
        fill(scenarios, n * 2 * 2 * n * 3, 0.5f);
        calibration.accept    = accept.data();
        calibration.ahead     = ahead.data();
        calibration.edges     = cal_edges.data();
        calibration.scenarios = scenarios.data();
        params.calibration    = bad() ? nullptr : &calibration;

        if (d.flag()) {
            fill(acceptance, ENTMTP_N_SETS * ENTMTP_N_INPUTS, 2.0f);
            params.acceptance = acceptance.data();
        }
    }

    policy_of(const policy_of &) = delete;

  private:
    float number(float low, float high) {
        static const float wrong[] = { NAN, INFINITY, -INFINITY, -1.0f, 0.0f, 1e-30f, 1e30f, 3.4e38f };
        return bad() ? wrong[d.between(0, 7)] : low + (high - low) * (float) d.byte() / 255.0f;
    }

    // once in a while, of parameters that are not all good
    bool bad() { return spoilt && d.rarely(); }

    // a table out of a few decisions
    void fill(std::vector<float> & to, int32_t n, float high, float low = 0.0f) {
        const float first = number(low, low + high), step = number(0.0f, high / 8);
        for (int32_t i = 0; i < n; ++i) {
            to.push_back(first + step * (float) (i % 7));
        }
        if (bad() && n > 0) {
            to[d.byte() % n] = number(low, high);
        }
    }

    decisions & d;
    const bool  spoilt;

    std::vector<float>   edges, expected, verify, level, tree, accept, ahead, cal_edges, scenarios, acceptance;
    std::vector<int32_t> ladder;
};
