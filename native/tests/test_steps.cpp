// The log of steps: what it forgets is in its sums.

#include "steps.h"

#include "check.h"

#include <algorithm>

using entmtp::step_log;

static entmtp_step make_step(int32_t i) {
    entmtp_step s = {};
    s.entropy     = 0.5f * (float) i;
    s.tree        = i % 3;
    s.n_nodes     = i + 1;
    s.t_draft_us  = 2 * i;
    s.t_verify_us = 3 * i;
    s.t_sample_us = 5 * i;
    s.t_host_us   = 7 * i;
    return s;
}

int main() {
    constexpr int32_t n_kept = 8;

    step_log log(n_kept);
    for (const bool again : { false, true }) {
        (void) again;
        entmtp_step_sums sum        = {};
        int64_t          by_tree[3] = {};
        for (int32_t i = 0; i < 100; ++i) {
            log.push(make_step(i));
            log.back().n_accepted += i; // the walk goes on after the push
            CHECK_EQ(log.back().t_draft_us, 2 * i);

            if (i >= n_kept) { // this one fell out
                const entmtp_step s = make_step(i - n_kept);
                sum.n_steps += 1;
                sum.n_nodes += s.n_nodes;
                sum.n_accepted += i - n_kept;
                sum.entropy += s.entropy;
                sum.t_draft_us += s.t_draft_us;
                sum.t_verify_us += s.t_verify_us;
                sum.t_sample_us += s.t_sample_us;
                sum.t_host_us += s.t_host_us;
                by_tree[s.tree]++;
            }
            CHECK_EQ((int32_t) log.size(), std::min(i + 1, n_kept));
            for (size_t k = 0; k < log.size(); ++k) {
                const int32_t j = i + 1 - (int32_t) log.size() + (int32_t) k;
                CHECK_EQ(log[k].t_verify_us, 3 * j);
                CHECK_EQ(log[k].n_accepted, j);
            }
            const entmtp_step_sums & old = log.older();
            CHECK_EQ(old.n_steps, sum.n_steps);
            CHECK_EQ(old.n_nodes, sum.n_nodes);
            CHECK_EQ(old.n_accepted, sum.n_accepted);
            CHECK(old.entropy == sum.entropy);
            CHECK_EQ(old.t_draft_us, sum.t_draft_us);
            CHECK_EQ(old.t_verify_us, sum.t_verify_us);
            CHECK_EQ(old.t_sample_us, sum.t_sample_us);
            CHECK_EQ(old.t_host_us, sum.t_host_us);
            for (size_t t = 0; t < 3; ++t) {
                CHECK_EQ(log.older_with(t), by_tree[t]);
            }
            CHECK_EQ(log.older_with(9), 0);
        }
        log.clear();
        CHECK_EQ(log.size(), 0u);
        CHECK_EQ(log.older().n_steps, 0);
        CHECK_EQ(log.older_with(0), 0);
    }
    return check_result("test_steps");
}
