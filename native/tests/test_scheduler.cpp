// Which tree is chosen: tables by hand, and simulated machines and texts.

#include "scheduler.h"

#include "check.h"
#include "policies.h"

#include <chrono>
#include <limits>
#include <random>
#include <stdexcept>

using entmtp::scheduler;

static constexpr int32_t no_limit = 1 << 20;

static scheduler make(const policy_bank & b) {
    return scheduler(b.params(), (int32_t) b.n_nodes.size());
}

static int32_t choose(scheduler &         s,
                      const policy_bank & b,
                      float               entropy,
                      int32_t             n_max = no_limit,
                      float               top1  = 0.5f,
                      float               path  = 0.5f) {
    return s.choose({ entropy, top1, -1.0f }, entropy, path, n_max, b.n_nodes, b.depth);
}

static void test_off_and_static() {
    policy_bank b;
    b.policy = ENTMTP_POLICY_OFF;
    scheduler off, off2 = make(b);
    b.policy        = ENTMTP_POLICY_STATIC;
    b.static_tree   = 2;
    scheduler fixed = make(b);
    for (int i = 0; i < 10; ++i) {
        CHECK_EQ(choose(off, b, 0.1f * (float) i), 0);
        CHECK_EQ(choose(off2, b, 0.1f * (float) i), 0);
        CHECK_EQ(choose(fixed, b, 3.0f), 2);
        CHECK_EQ(choose(fixed, b, 3.0f, 8), 2);
        CHECK_EQ(choose(fixed, b, 3.0f, 7), 0);
        fixed.observe(2, 8, { { 0 }, -1, -1, 1e9, 1e9 });
    }
    CHECK(!off.needs_signals() && !fixed.needs_signals() && !fixed.needs_timing());
}

// a bank with a clear winner per bin; a step with 4 nodes costs 1.5, with 8 nodes 2 plain steps
static policy_bank clear_bank() {
    policy_bank b;
    b.edges    = { 0.5f, 1.5f };
    b.expected = { 0, 1, 3, 0, 1, 0.9f, 0, 0.3f, 0.4f };
    b.set_costs(1000.0f, 0.0f, 0.0f);
    for (size_t n = 1; n < b.verify.size(); ++n) {
        b.verify[n] = n < 4 ? 1400.0f : 1900.0f;
    }
    b.draft = { 0, 100, 100 };
    return b;
}

static void test_tables() {
    for (const float scale : { 1.0f, 0.01f, 500.0f }) {
        policy_bank b = clear_bank();
        for (auto * v : { &b.verify, &b.draft }) {
            for (float & x : *v) {
                x *= scale;
            }
        }
        scheduler s = make(b);
        CHECK_EQ(choose(s, b, 0.0f), 2); // 4 / 2
        CHECK_EQ(choose(s, b, 0.499f), 2);
        CHECK_EQ(choose(s, b, 0.5f), 1); // 2 / 1.5; an edge belongs to the bin above it
        CHECK_EQ(choose(s, b, 1.5f), 0); // 1.3 / 1.5
        CHECK_EQ(choose(s, b, 99.0f), 0);
        CHECK_EQ(choose(s, b, 0.0f, 8), 2);
        CHECK_EQ(choose(s, b, 0.0f, 7), 1);
        CHECK_EQ(choose(s, b, 0.0f, 3), 0);
    }
    CHECK(make(clear_bank()).needs_signals() && !make(clear_bank()).needs_timing());
}

// With one thread large passes cost as many passes of one token, with two they are all but free. What is learned of one
// number of threads is there when it comes back, and says nothing of the other.
static void test_threads() {
    policy_bank two = clear_bank(), one = clear_bank();
    for (size_t n = 0; n < one.verify.size(); ++n) {
        one.verify[n] = 2000.0f * (float) (n + 1);
    }
    two.adapt   = true;
    scheduler s = make(two);
    s.set_threads(2, nullptr, 3);
    const auto settled = [&] {
        int32_t last = 0;
        for (int32_t i = 0; i < 8; ++i) { // the first steps are plain
            last = choose(s, two, 0.0f);
        }
        return last;
    };
    CHECK_EQ(settled(), 2);
    s.set_threads(1, one.costs(), 3);
    CHECK_EQ(settled(), 0);
    s.set_threads(2, one.costs(), 3); // known: these are not looked at
    CHECK_EQ(settled(), 2);

    // eight tokens turn out to cost as many passes
    for (int32_t i = 0; i < 60; ++i) {
        s.observe(0, 1, { { 0 }, -1, -1, 0, 1000 });
        s.observe(0, 1, { { 0 }, -1, -1, 0, 1000 });
        s.observe(2, 8, { { 0, 1, 2, 3 }, -1, -1, 100, 9000 });
    }
    CHECK(settled() != 2);
    s.set_threads(1, nullptr, 3);
    CHECK_EQ(settled(), 0);
    s.set_threads(4, two.costs(), 3); // a third
    CHECK_EQ(settled(), 2);
    s.set_threads(2, nullptr, 3);
    CHECK(settled() != 2);

    policy_bank bad = clear_bank();
    bad.verify[0]   = -1.0f;
    bool thrown     = false;
    try {
        s.set_threads(8, bad.costs(), 3);
    } catch (const std::runtime_error &) {
        thrown = true;
    }
    CHECK(thrown);
    CHECK(settled() != 2); // all is as it was

    scheduler off;         // without costs there is nothing to keep
    off.set_threads(1, nullptr, 1);
    CHECK_EQ(choose(off, two, 0.0f), 0);
}

// Two bins that follow on each other by chance. With the ratio, the tree of bin 1 is the one with most tokens per time
// there; at the price of the whole text's throughput the larger one is right, for its tokens cost less than elsewhere.
static void test_criteria() {
    policy_bank b;
    b.edges    = { 1.0f };
    b.expected = { 0, 0, 0, 0, 0.8f, 1.25f };
    b.set_costs(1000.0f, 0.0f, 0.0f);
    for (size_t n = 1; n < b.verify.size(); ++n) {
        b.verify[n] = n < 4 ? 1050.0f : 1400.0f;
    }
    CHECK_EQ(([&] {
                 auto s = make(b);
                 return choose(s, b, 2.0f);
             }()),
             1); // 1.8 / 1.05 beats 2.25 / 1.4

    b.criterion = ENTMTP_CRITERION_PRICE;
    scheduler s = make(b);
    // most steps are plain ones, so a token is worth a plain step: 2.25 - 1.4 beats 1.8 - 1.05
    for (int i = 0; i < 400; ++i) {
        s.observe(0, 1, { { 0 }, -1, -1, 0, 1000 });
    }
    CHECK_EQ(choose(s, b, 2.0f), 2);
    // where every step gains, time is dearer
    for (int i = 0; i < 2000; ++i) {
        s.observe(1, 4, { { 0, 1 }, -1, -1, 0, 1050 });
    }
    CHECK_EQ(choose(s, b, 2.0f), 1);
}

static void test_published() {
    policy_bank b = clear_bank();
    b.policy      = ENTMTP_POLICY_LADDER;
    b.ladder      = { 2, 1, 0 };
    {
        scheduler s = make(b);
        CHECK_EQ(choose(s, b, 0.4f), 2);
        CHECK_EQ(choose(s, b, 0.6f), 1);
        CHECK_EQ(choose(s, b, 1.6f), 0);
        CHECK_EQ(choose(s, b, 0.4f, 7), 0);
    }
    {
        policy_bank t = b;
        t.score       = ENTMTP_SCORE_TOP1; // 1 - p
        t.edges       = { 0.2f, 0.6f };
        scheduler s   = make(t);
        CHECK_EQ(choose(s, t, 9.0f, no_limit, 0.9f), 2);
        CHECK_EQ(choose(s, t, 0.0f, no_limit, 0.5f), 1);
        CHECK_EQ(choose(s, t, 0.0f, no_limit, 0.1f), 0);
        t.score = ENTMTP_SCORE_PATH;
        s       = make(t);
        CHECK(s.needs_path());
        CHECK_EQ(choose(s, t, 9.0f, no_limit, 0.1f, 0.9f), 2);
        CHECK_EQ(choose(s, t, 9.0f, no_limit, 0.9f, 0.3f), 0);
    }
    {
        policy_bank h = b;
        h.policy      = ENTMTP_POLICY_HYSTERESIS;
        h.ladder      = { 2, 1 };
        scheduler s   = make(h);
        CHECK_EQ(choose(s, h, 1.0f), 2); // the start: the first one
        CHECK_EQ(choose(s, h, 1.6f), 1);
        CHECK_EQ(choose(s, h, 1.0f), 1); // between the edges it stays
        CHECK_EQ(choose(s, h, 0.4f), 2);
        CHECK_EQ(choose(s, h, 1.0f), 2);
        s.begin_text();
        CHECK_EQ(choose(s, h, 1.0f), 2);
    }
    {
        policy_bank d = b;
        d.policy      = ENTMTP_POLICY_BEST_DEPTH;
        d.set_costs(1000.0f, 50.0f, 50.0f); // steps cost 1, 1.2 and 1.4 plain steps
        scheduler s = make(d);
        CHECK_EQ(choose(s, d, 3.0f), 0);    // acceptance exp(-3)
        CHECK_EQ(choose(s, d, 0.9f), 1);    // 0.41: 1.41 / 1.2 beats 1.57 / 1.4
        CHECK_EQ(choose(s, d, 0.05f), 2);   // 0.95: 2.85 / 1.4 beats 1.95 / 1.2
    }
}

static void test_room() {
    std::mt19937 rng(1);
    policy_bank  b;
    b.n_nodes  = { 1, 2, 4, 8, 16, 32 };
    b.depth    = { 0, 1, 2, 3, 4, 4 };
    b.edges    = { 1.0f };
    b.expected = { 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5 };
    b.set_costs(1000.0f, 1.0f, 1.0f);
    b.adapt     = true;
    scheduler s = make(b);
    for (int i = 0; i < 20000; ++i) {
        const int32_t n_max = 1 + (int32_t) (rng() % 40);
        const int32_t id    = choose(s, b, (float) (rng() % 200) / 100.0f, n_max);
        CHECK(id >= 0 && id < (int32_t) b.n_nodes.size() && b.n_nodes[id] <= n_max);
        s.observe(id, b.n_nodes[id],
                  { std::vector<int32_t>(1 + rng() % (1 + b.depth[id]), 0), -1, -1, 1.0, 500.0 + rng() % 1000 });
    }
}

// a machine and a text: what a step with each tree takes and accepts
struct machine {
    std::vector<double> t_us;
    std::vector<double> accept;

    std::mt19937 rng{ 7 };
    double       tokens = 0, time = 0, drafted = 0;

    // relative to plain decoding of the same tokens
    double run(scheduler & s, const policy_bank & b, int n, float entropy = 0.1f) {
        std::uniform_real_distribution<double> noise(0.95, 1.05);
        tokens = time = drafted = 0;
        for (int i = 0; i < n; ++i) {
            const int32_t id    = choose(s, b, entropy);
            const int32_t whole = (int32_t) accept[id];
            const int32_t got   = whole + ((double) (rng() % 1000) / 1000.0 < accept[id] - whole ? 1 : 0);
            // now and then something else has the processor
            const double  slow  = rng() % 200 == 0 ? 10.0 : 1.0;
            s.observe(id, b.n_nodes[id],
                      { std::vector<int32_t>(1 + got, 0), -1, -1, b.draft[id], t_us[id] * noise(rng) * slow });
            tokens += 1 + got;
            time += t_us[id] + (id ? b.draft[id] : 0.0);
            drafted += id != 0;
        }
        return time / (tokens * t_us[0]);
    }
};

static void test_drift() {
    policy_bank b = clear_bank();
    b.adapt       = true;
    // as the bank says: the large tree, half the time of plain decoding
    {
        scheduler s = make(b);
        machine   m = { { 1000, 1400, 1900 }, { 0, 1, 3 } };
        m.run(s, b, 50);
        CHECK(m.run(s, b, 1000) < 0.53);
    }
    // passes over several tokens come to cost three times as much (another program takes the other cores): within 50 steps
    // nothing is lost any more
    {
        scheduler s = make(b);
        machine   m = { { 1000, 1400, 1900 }, { 0, 1, 3 } };
        m.run(s, b, 300);
        m.t_us = { 1000, 4200, 5700 };
        m.run(s, b, 50);
        CHECK(m.run(s, b, 500) < 1.03);
        // and when they are gone, the tree comes back
        m.t_us = { 1000, 1400, 1900 };
        m.run(s, b, 1000);
        CHECK(m.run(s, b, 1000) < 0.6);
    }
    // everything takes twice as long (battery): the same tree is right
    {
        scheduler s = make(b);
        machine   m = { { 1000, 1400, 1900 }, { 0, 1, 3 } };
        m.run(s, b, 300);
        m.t_us = { 2000, 2800, 3800 };
        m.run(s, b, 50);
        CHECK(m.run(s, b, 500) < 0.56);
    }
    // acceptance collapses: within 50 steps drafting stops
    {
        scheduler s = make(b);
        machine   m = { { 1000, 1400, 1900 }, { 0, 1, 3 } };
        m.run(s, b, 300);
        m.accept = { 0, 0, 0 };
        m.run(s, b, 50);
        CHECK(m.run(s, b, 500) < 1.03);
        m.accept = { 0, 1, 3 };
        m.run(s, b, 600);
        CHECK(m.run(s, b, 500) < 0.6);
    }
    // the bank is wrong about this machine from the start
    {
        scheduler s = make(b);
        machine   m = { { 1000, 3000, 9000 }, { 0, 1, 3 } };
        CHECK(m.run(s, b, 2000) < 1.02);
        scheduler s2 = make(b);
        machine   m2 = { { 1000, 1100, 9000 }, { 0, 1, 3 } };
        m2.run(s2, b, 100);
        CHECK(m2.run(s2, b, 1000) < 0.65); // the small tree: 1200 us for two tokens
    }
    // useless heads, by counted cost
    {
        scheduler s = make(b);
        machine   m = { { 1000, 1400, 1900 }, { 0, 0, 0 } };
        CHECK(m.run(s, b, 2000) < 1.02);
    }
    // harder text in one bin only
    {
        scheduler s    = make(b);
        machine   easy = { { 1000, 1400, 1900 }, { 0, 1, 3 } }, hard = { { 1000, 1400, 1900 }, { 0, 0, 0 } };
        for (int i = 0; i < 100; ++i) {
            easy.run(s, b, 10, 0.1f);
            hard.run(s, b, 10, 1.0f);
        }
        CHECK(easy.run(s, b, 200, 0.1f) < 0.6);
    }
}

static void test_confidence_needs() {
    policy_bank b = clear_bank();
    b.policy      = ENTMTP_POLICY_CONFIDENCE;
    CHECK_THROWS(make(b), "calibration");
    const plain_calibration cal(2);
    const auto              c = cal.params();
    auto                    p = b.params();
    p.calibration             = &c;
    scheduler s(p, 3);
    CHECK_EQ(choose(s, b, 0.5f), scheduler::grow_tree);
    CHECK_EQ(choose(s, b, 0.5f, 1), 0);
}

static void test_bad_params() {
    const float nan  = std::numeric_limits<float>::quiet_NaN();
    const float inf  = std::numeric_limits<float>::infinity();
    const auto  with = [&](auto change) {
        policy_bank b = clear_bank();
        change(b);
        return make(b);
    };
    CHECK_THROWS(with([](policy_bank & b) { b.policy = -1; }), "unknown");
    CHECK_THROWS(with([](policy_bank & b) { b.policy = 8; }), "unknown");
    CHECK_THROWS(with([](policy_bank & b) {
                     b.policy   = ENTMTP_POLICY_AUTO;
                     b.drafters = ENTMTP_SOURCE_HEADS;
                 }),
                 "need a calibration");
    for (const int32_t id : { -1, 3 }) {
        CHECK_THROWS(with([&](policy_bank & b) {
                         b.policy      = ENTMTP_POLICY_STATIC;
                         b.static_tree = id;
                     }),
                     "static_tree");
    }
    for (const float x : { 0.0f, 0.5f, -3.0f, nan, inf }) {
        CHECK_THROWS(with([&](policy_bank & b) { b.window = x; }), "ema_window");
    }
    for (const float x : { 0.5f, 0.2f, nan, inf }) {
        CHECK_THROWS(with([&](policy_bank & b) { b.edges[1] = x; }), "bin_edges");
    }
    for (const float x : { -0.1f, nan, inf }) {
        CHECK_THROWS(with([&](policy_bank & b) { b.expected[5] = x; }), "expected");
        CHECK_THROWS(with([&](policy_bank & b) { b.verify[2] = x; }), "costs");
    }
    CHECK_THROWS(with([](policy_bank & b) { b.criterion = 2; }), "criterion");
    CHECK_THROWS(with([](policy_bank & b) {
                     b.policy = ENTMTP_POLICY_LADDER;
                     b.ladder = { 0, 1, 3 };
                 }),
                 "ladder");
    for (const int missing : { 0, 1, 2, 3 }) {
        policy_bank          b = clear_bank();
        entmtp_policy_params p = b.params();
        p.n_bins               = missing == 0 ? 0 : p.n_bins;
        p.bin_edges            = missing == 1 ? nullptr : p.bin_edges;
        p.expected             = missing == 2 ? nullptr : p.expected;
        p.costs                = missing == 3 ? nullptr : p.costs;
        CHECK_THROWS(scheduler(p, 3), "policy: ");
    }
    // what only other policies read may be absent
    entmtp_policy_params p = {};
    p.policy               = ENTMTP_POLICY_STATIC;
    (void) scheduler(p, 2);
}

// printed, not checked: machines differ
static void time_choose() {
    policy_bank b;
    b.n_nodes.clear();
    b.depth.clear();
    for (int i = 0; i < 8; ++i) {
        b.n_nodes.push_back(1 + 2 * i);
        b.depth.push_back(i);
    }
    b.edges = { 0.3f, 0.6f, 1.0f, 1.5f };
    for (int i = 0; i < 5 * 8; ++i) {
        b.expected.push_back((float) (i % 8) * 0.3f);
    }
    b.set_costs(1000.0f, 50.0f, 10.0f);
    b.adapt                         = true;
    scheduler                  s    = make(b);
    int64_t                    sum  = 0;
    const auto                 t0   = std::chrono::steady_clock::now();
    const std::vector<int32_t> path = { 0, 1 };
    constexpr int              n    = 200000;
    for (int i = 0; i < n; ++i) {
        const int32_t id = choose(s, b, 0.01f * (float) (i % 200));
        s.observe(id, b.n_nodes[id], { path, -1, -1, 10.0, 1000.0 });
        sum += id;
    }
    const std::chrono::duration<double, std::micro> t = std::chrono::steady_clock::now() - t0;
    printf("choose() and observe() among 8 trees: %.3f us (%d)\n", t.count() / n, (int) (sum % 2));
}

int main() {
    test_off_and_static();
    test_tables();
    test_threads();
    test_criteria();
    test_published();
    test_room();
    test_drift();
    test_confidence_needs();
    test_bad_params();
    time_choose();
    return check_result("test_scheduler");
}
