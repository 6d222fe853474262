// Never slower, by counted cost: whatever the policy wants to draft.

#include "guard.h"

#include "check.h"

#include <random>

using entmtp::guard;
using verdict = entmtp::guard::verdict;

// time of n steps relative to plain decoding of the same tokens, for a policy that always wants to draft
static double relative_time(guard & g, int n, double cost, double accepted, uint32_t seed = 1) {
    std::mt19937                           rng(seed);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);

    double tokens = 0.0, time = 0.0;
    for (int i = 0; i < n; ++i) {
        const bool drafts = g.next() != verdict::must_not;
        const int  got    = drafts ? (int) accepted + (uniform(rng) < accepted - (int) accepted ? 1 : 0) : 0;
        tokens += 1 + got;
        time += drafts ? cost : 1.0;
        g.observe(drafts, drafts ? 1 + got - cost : 0.0);
    }
    return time / tokens;
}

int main() {
    // useless heads, dear and cheap drafts: at most 2 % over 2,000 steps
    for (const double cost : { 1.05, 1.3, 2.0, 4.0 }) {
        guard g;
        CHECK(relative_time(g, 2000, cost, 0.0) < 1.02);
    }
    // drafts that nearly pay
    {
        guard g;
        CHECK(relative_time(g, 4000, 1.6, 0.5) < 1.02);
    }
    // drafts that pay are left alone
    for (const double accepted : { 0.5, 1.0, 2.5 }) {
        guard        g;
        const double t = relative_time(g, 4000, 1.3, accepted);
        CHECK(t < 1.02 * 1.3 / (1 + accepted));
    }
    // acceptance collapses: within 50 steps drafting has stopped; and when it comes back, a trial finds out
    {
        guard g;
        relative_time(g, 200, 1.3, 1.0);
        relative_time(g, 50, 1.3, 0.0);
        int n_drafts = 0;
        for (int i = 0; i < 50; ++i) {
            const bool drafts = g.next() != verdict::must_not;
            n_drafts += drafts;
            g.observe(drafts, drafts ? -0.3 : 0.0);
        }
        CHECK(n_drafts <= 4);
        relative_time(g, 300, 1.3, 1.0); // the wait, doubled once
        CHECK(relative_time(g, 500, 1.3, 1.0) < 0.75);
    }
    // a hard text ends: heads that have won before are tried soon in the next one, useless ones are not
    {
        guard g;
        relative_time(g, 200, 1.3, 1.0);
        relative_time(g, 120, 1.3, 0.0);
        CHECK(g.next() == verdict::must_not);
        g.begin_text();
        relative_time(g, 10, 1.3, 1.0);
        CHECK(relative_time(g, 200, 1.3, 1.0) < 0.7);

        guard  useless;
        double lost = 0.0;
        for (int i = 0; i < 40; ++i) {
            useless.begin_text();
            lost += 100.0 * (relative_time(useless, 100, 1.3, 0.0) - 1.0);
        }
        CHECK(lost < 0.01 * 4000);
    }
    // a policy that never wants to draft is made to try now and then, ever more seldom while it loses
    {
        guard g;
        int   n_first = 0, n_last = 0;
        for (int i = 0; i < 20000; ++i) {
            const bool drafts = g.next() == verdict::must;
            (i < 2000 ? n_first : n_last) += drafts && i % 10000 < 2000;
            g.observe(drafts, drafts ? -0.5 : 0.0);
        }
        CHECK(n_first >= 8 && n_first <= 40);
        CHECK(n_last <= n_first / 2);
    }
    return check_result("test_guard");
}
