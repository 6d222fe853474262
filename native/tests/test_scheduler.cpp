// Which tree is chosen: tables by hand, and simulated machines.

#include "scheduler.h"

#include "check.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>

using entmtp::scheduler;

// a bank: what scheduler wants, with its arrays
struct bank {
    std::vector<int32_t> n_nodes;
    std::vector<float>   edges;
    std::vector<float>   expected; // [n_bins][n_trees]
    std::vector<float>   cost;

    int32_t policy      = ENTMTP_POLICY_ENTROPY;
    int32_t static_tree = 0;
    float   window      = 8.0f;

    entmtp_policy_params params() const {
        return { policy, static_tree, window, (int32_t) edges.size() + 1, edges.data(), expected.data(), cost.data() };
    }
    scheduler make() const { return scheduler(params(), (int32_t) n_nodes.size()); }
};

static constexpr int32_t no_limit = 1 << 20;

// plain decoding is timed before anything else is chosen
static void warm_up(scheduler & s, const bank & b, double t_us = 1000.0) {
    for (int i = 0; i < 2; ++i) {
        CHECK_EQ(s.choose(0.0f, no_limit, b.n_nodes), 0);
        s.observe(0, 0, t_us);
    }
}

static void test_policies() {
    const bank b = { { 1, 4, 16 }, { 1.0f }, { 0, 2, 1, 0, 1, 1 }, { 1, 1.5f, 2 } };

    // off, and the default
    scheduler off;
    bank      b_off = b;
    b_off.policy    = ENTMTP_POLICY_OFF;
    scheduler off2  = b_off.make();
    for (int i = 0; i < 10; ++i) {
        CHECK_EQ(off.choose(0.1f * (float) i, no_limit, b.n_nodes), 0);
        CHECK_EQ(off2.choose(0.1f * (float) i, no_limit, b.n_nodes), 0);
        off2.observe(0, 0, 1000.0);
    }
    CHECK(!off.needs_entropy() && !off.needs_timing());

    // static: one tree, or plain decoding where it does not fit
    bank b_static        = b;
    b_static.policy      = ENTMTP_POLICY_STATIC;
    b_static.static_tree = 2;
    scheduler fixed      = b_static.make();
    for (int i = 0; i < 10; ++i) {
        CHECK_EQ(fixed.choose(3.0f, no_limit, b.n_nodes), 2);
        CHECK_EQ(fixed.choose(3.0f, 16, b.n_nodes), 2);
        CHECK_EQ(fixed.choose(3.0f, 15, b.n_nodes), 0);
        fixed.observe(2, 0, 1e9);
    }
    CHECK(!fixed.needs_entropy() && !fixed.needs_timing());

    scheduler entropy = b.make();
    CHECK(entropy.needs_entropy() && entropy.needs_timing());
    CHECK_NEAR(entropy.window(), 8.0, 0.0);
}

static void test_tables() {
    // scores (1 + expected) / cost, more than 1.3 apart, so that nothing is tried for its own sake:
    //   below 0.5 nats:  1, 2,   5
    //   0.5 to 1.5:      1, 2,   1.25
    //   from 1.5:        1, 0.6, 0.25
    const bank b = { { 1, 4, 8 }, { 0.5f, 1.5f }, { 0, 3, 19, 0, 3, 4, 0, 0.2f, 0 }, { 1, 2, 4 } };

    // costs are ratios: their scale does not matter
    for (const float scale : { 1.0f, 0.01f, 500.0f }) {
        bank scaled = b;
        for (float & c : scaled.cost) {
            c *= scale;
        }
        scheduler s = scaled.make();
        warm_up(s, b);

        CHECK_EQ(s.choose(0.0f, no_limit, b.n_nodes), 2);
        CHECK_EQ(s.choose(0.499f, no_limit, b.n_nodes), 2);
        CHECK_EQ(s.choose(0.5f, no_limit, b.n_nodes), 1); // an edge belongs to the bin above it
        CHECK_EQ(s.choose(1.499f, no_limit, b.n_nodes), 1);
        CHECK_EQ(s.choose(1.5f, no_limit, b.n_nodes), 0);
        CHECK_EQ(s.choose(99.0f, no_limit, b.n_nodes), 0);

        // room
        CHECK_EQ(s.choose(0.0f, 8, b.n_nodes), 2);
        CHECK_EQ(s.choose(0.0f, 7, b.n_nodes), 1);
        CHECK_EQ(s.choose(0.0f, 4, b.n_nodes), 1);
        CHECK_EQ(s.choose(0.0f, 3, b.n_nodes), 0);
        CHECK_EQ(s.choose(0.0f, 1, b.n_nodes), 0);
    }

    // one bin, and a bank of plain decoding alone
    const bank one = { { 1, 4 }, {}, { 0, 3 }, { 1, 2 } };
    scheduler  s   = one.make();
    warm_up(s, one);
    CHECK_EQ(s.choose(0.0f, no_limit, one.n_nodes), 1);
    CHECK_EQ(s.choose(9.0f, no_limit, one.n_nodes), 1);

    const bank plain = { { 1 }, {}, { 0 }, { 1 } };
    scheduler  p     = plain.make();
    for (int i = 0; i < 100; ++i) {
        CHECK_EQ(p.choose(1.0f, no_limit, plain.n_nodes), 0);
        p.observe(0, 0, 1000.0);
    }
}

// room is respected whatever was seen
static void test_room() {
    std::mt19937 rng(1);

    const bank b = { { 1, 2, 4, 8, 16, 32 }, { 1.0f }, { 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5 }, { 1, 1, 1, 1, 1, 1 } };
    scheduler  s = b.make();

    for (int i = 0; i < 20000; ++i) {
        const int32_t n_max = 1 + (int32_t) (rng() % 40);
        const int32_t id    = s.choose((float) (rng() % 200) / 100.0f, n_max, b.n_nodes);
        CHECK(id >= 0 && id < (int32_t) b.n_nodes.size() && b.n_nodes[id] <= n_max);
        s.observe(id, (int32_t) (rng() % 3), 500.0 + rng() % 1000);
    }
}

// a machine and a text: what a step with each tree takes and accepts
struct machine {
    std::vector<double> t_us;
    std::vector<double> accept; // mean number of accepted tokens
    double              noise = 0.05;

    std::mt19937         rng{ 7 };
    std::vector<int64_t> count = {}; // of the last run

    void run(scheduler & s, const bank & b, int n, float entropy = 0.5f) {
        count.assign(t_us.size(), 0);
        std::uniform_real_distribution<double> uniform(-noise, noise);
        for (int i = 0; i < n; ++i) {
            const int32_t id = s.choose(entropy, no_limit, b.n_nodes);
            count[id]++;
            // the mean, from whole numbers
            const int32_t whole = (int32_t) accept[id];
            const int32_t n_acc = whole + ((double) (rng() % 1000) / 1000.0 < accept[id] - whole ? 1 : 0);
            // now and then something else has the processor
            const double  slow  = rng() % 200 == 0 ? 10.0 : 1.0;
            s.observe(id, n_acc, t_us[id] * (1.0 + uniform(rng)) * slow);
        }
    }

    double share(int32_t id, int n) const { return (double) count[id] / n; }
};

static void test_learns() {
    // by the bank the large tree is best; on this machine it is the small one
    const bank b = { { 1, 4, 16 }, {}, { 0, 1, 3 }, { 1, 1.5f, 2 } };
    {
        scheduler s = b.make();
        machine   m = { { 1000, 1200, 6000 }, { 0, 1, 3 } };
        m.run(s, b, 500);
        m.run(s, b, 5000);
        CHECK(m.share(1, 5000) > 0.95);
    }
    // here every tree is slower than plain decoding: one pass costs more than it brings
    {
        scheduler s = b.make();
        machine   m = { { 1000, 3000, 9000 }, { 0, 1, 3 } };
        m.run(s, b, 500);
        m.run(s, b, 5000);
        CHECK(m.share(0, 5000) > 0.98);
    }
    // the costs are right, but nothing is accepted
    {
        scheduler s = b.make();
        machine   m = { { 1000, 1500, 2000 }, { 0, 0.1, 0.1 } };
        m.run(s, b, 500);
        m.run(s, b, 5000);
        CHECK(m.share(0, 5000) > 0.97);
    }
    // many trees, all of them losing
    {
        bank    many = { { 1 }, {}, { 0 }, { 1 } };
        machine m    = { { 1000 }, { 0 } };
        for (int i = 1; i < 16; ++i) {
            many.n_nodes.push_back(1 + i);
            many.expected.push_back(2.0f);
            many.cost.push_back(1.2f);
            m.t_us.push_back(2500);
            m.accept.push_back(0.5);
        }
        scheduler s = many.make();
        m.run(s, many, 6000); // a few steps with each until its figures have sunk
        m.run(s, many, 5000);
        CHECK(m.share(0, 5000) > 0.98);
    }
    // the text changes: what paid stops paying, and pays again
    {
        scheduler s = b.make();
        machine   m = { { 1000, 1200, 2000 }, { 0, 1, 3 } };
        m.run(s, b, 2000);
        CHECK(m.share(2, 2000) > 0.9);
        m.accept = { 0, 0, 0 };
        m.run(s, b, 2000);
        m.run(s, b, 2000);
        CHECK(m.share(0, 2000) > 0.9);
    }
    // so does the machine
    {
        scheduler s = b.make();
        machine   m = { { 1000, 1200, 2000 }, { 0, 1, 3 } };
        m.run(s, b, 2000);
        m.t_us = { 1000, 1200, 20000 };
        m.run(s, b, 500);
        m.run(s, b, 5000);
        CHECK(m.share(1, 5000) > 0.95);
    }
    // plain decoding looked slow when it was timed first: that is found out
    {
        scheduler s = b.make();
        warm_up(s, b, 5000.0);
        machine m = { { 1000, 3000, 9000 }, { 0, 1, 3 } };
        m.run(s, b, 3000);
        m.run(s, b, 5000);
        CHECK(m.share(0, 5000) > 0.98);
    }
    // a clock that does not tick makes no tree free of charge for ever
    {
        scheduler s = b.make();
        warm_up(s, b);
        for (int i = 0; i < 4; ++i) {
            s.observe(2, 0, 0.0);
        }
        machine m = { { 1000, 3000, 9000 }, { 0, 1, 3 } };
        m.run(s, b, 3000);
        m.run(s, b, 5000);
        CHECK(m.share(0, 5000) > 0.98);
    }
}

// bins learn apart from each other
static void test_bins_learn() {
    const bank b = { { 1, 4 }, { 1.0f }, { 0, 1, 0, 1 }, { 1, 1.5f } };
    scheduler  s = b.make();

    machine low  = { { 1000, 1500 }, { 0, 2 } };
    machine high = { { 1000, 1500 }, { 0, 0.1 } };
    for (int i = 0; i < 200; ++i) {
        low.run(s, b, 10, 0.5f);
        high.run(s, b, 10, 2.0f);
    }
    low.run(s, b, 1000, 0.5f);
    CHECK(low.share(1, 1000) > 0.98);
    high.run(s, b, 1000, 2.0f);
    CHECK(high.share(0, 1000) > 0.95);
}

static void test_bad_params() {
    const bank good = { { 1, 4 }, { 0.5f, 1.5f }, { 0, 1, 0, 1, 0, 1 }, { 1, 1.5f } };
    (void) good.make();

    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float inf = std::numeric_limits<float>::infinity();

    const auto with = [&](auto change) {
        bank b = good;
        change(b);
        return b.make();
    };

    CHECK_THROWS(with([](bank & b) { b.policy = -1; }), "unknown");
    CHECK_THROWS(with([](bank & b) { b.policy = 3; }), "unknown");

    CHECK_THROWS(with([](bank & b) {
                     b.policy      = ENTMTP_POLICY_STATIC;
                     b.static_tree = 2;
                 }),
                 "static_tree");
    CHECK_THROWS(with([](bank & b) {
                     b.policy      = ENTMTP_POLICY_STATIC;
                     b.static_tree = -1;
                 }),
                 "static_tree");

    for (const float x : { 0.0f, 0.5f, -3.0f, nan, inf }) {
        CHECK_THROWS(with([&](bank & b) { b.window = x; }), "ema_window");
    }
    for (const float x : { 0.5f, 0.2f, nan, inf }) {
        CHECK_THROWS(with([&](bank & b) { b.edges[1] = x; }), "bin_edges");
    }
    for (const float x : { -0.1f, nan, inf }) {
        CHECK_THROWS(with([&](bank & b) { b.expected[5] = x; }), "expected");
    }
    for (const float x : { 0.0f, -1.0f, nan, inf }) {
        CHECK_THROWS(with([&](bank & b) { b.cost[0] = x; }), "costs");
        CHECK_THROWS(with([&](bank & b) { b.cost[1] = x; }), "costs");
    }

    for (const int missing : { 0, 1, 2, 3 }) {
        entmtp_policy_params p = good.params();
        if (missing == 0) {
            p.n_bins = 0;
        } else {
            (missing == 1 ? p.bin_edges : missing == 2 ? p.expected : p.cost) = nullptr;
        }
        CHECK_THROWS(scheduler(p, 2), "needs");
    }

    // what only the entropy policy reads may be absent elsewhere
    entmtp_policy_params p = {};
    p.policy               = ENTMTP_POLICY_STATIC;
    (void) scheduler(p, 2);
}

// printed, not checked: machines differ
static void time_choose() {
    bank b = { { 1 }, { 0.3f, 0.6f, 1.0f, 1.5f }, {}, { 1 } };
    for (int i = 1; i < 16; ++i) {
        b.n_nodes.push_back(2 * i);
        b.cost.push_back(1.0f + 0.1f * (float) i);
    }
    for (size_t i = 0; i < 5 * b.n_nodes.size(); ++i) {
        b.expected.push_back((float) (i % b.n_nodes.size()) * 0.08f);
    }

    scheduler s = b.make();
    machine   m = { std::vector<double>(16, 1000.0), std::vector<double>(16, 0.5) };
    m.run(s, b, 1000);

    constexpr int n   = 200000;
    int64_t       sum = 0;
    const auto    t0  = std::chrono::steady_clock::now();
    for (int i = 0; i < n; ++i) {
        sum += s.choose(0.01f * (float) (i % 200), no_limit, b.n_nodes);
    }
    const std::chrono::duration<double, std::micro> t = std::chrono::steady_clock::now() - t0;
    printf("choose() among 16 trees: %.3f us (%d)\n", t.count() / n, (int) (sum % 2));
}

int main() {
    test_policies();
    test_tables();
    test_room();
    test_learns();
    test_bins_learn();
    test_bad_params();
    time_choose();
    return check_result("test_scheduler");
}
