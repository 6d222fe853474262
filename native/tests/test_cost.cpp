// What steps cost: tables, and what is learned when they are wrong.

#include "cost.h"

#include "check.h"
#include "policies.h"

#include <limits>
#include <utility>
#include <vector>

using entmtp::cost_model;

static policy_bank make_bank() {
    policy_bank b;
    b.set_costs(1000.0f, 100.0f, 50.0f);
    return b;
}

static void test_tables() {
    const policy_bank b = make_bank();
    const cost_model  c(*b.costs(), 3, true);
    CHECK_NEAR(c.verify(1), 1000.0, 1e-3);
    CHECK_NEAR(c.verify(8), 1700.0, 1e-3);
    CHECK_NEAR(c.verify(64), 7300.0, 1e-3);
    CHECK_NEAR(c.verify(128), 14600.0, 1e-2); // in proportion beyond the table
    CHECK_NEAR(c.draft(0), 0.0, 0.0);
    CHECK_NEAR(c.draft(2), 50.0, 1e-3);
    CHECK_NEAR(c.level(3, 4), 50.0, 1e-3);

    // not adapting: whatever is seen
    cost_model frozen(*b.costs(), 3, false);
    for (int i = 0; i < 50; ++i) {
        frozen.observe(1, 5000.0, 0.0, 0.0);
        frozen.observe(4, 9000.0, 500.0, 50.0);
    }
    CHECK_NEAR(frozen.verify(4), 1300.0, 1e-3);
    CHECK(!frozen.wants_plain());
}

// costs that are not what the table says are known within 50 steps, to a tenth
static void test_learns() {
    const policy_bank b = make_bank();

    const auto run = [](cost_model & c, int n, double plain, double pass, double draft) {
        for (int i = 0; i < n; ++i) {
            const bool is_plain = c.wants_plain() || i % 16 == 0;
            c.observe(is_plain ? 1 : 4, is_plain ? plain : pass, is_plain ? 0.0 : draft, is_plain ? 0.0 : c.draft(1));
        }
    };
    {
        // passes over several tokens cost twice as much as thought
        cost_model c(*b.costs(), 3, true);
        run(c, 50, 1000, 2600, 50);
        CHECK_NEAR(c.verify(4) / c.verify(1), 2.6, 0.26);
        // a size that was not seen moves along
        CHECK(c.verify(8) > 1.4 * 1700);
    }
    {
        // the whole machine is twice as slow: proportions stay
        cost_model c(*b.costs(), 3, true);
        run(c, 50, 2000, 2600, 100);
        CHECK_NEAR(c.verify(4) / c.verify(1), 1.3, 0.2);
        run(c, 100, 2000, 2600, 100);
        CHECK_NEAR(c.verify(1), 2000, 200);
        CHECK_NEAR(c.verify(4), 2600, 260);
    }
    {
        // drafts
        cost_model c(*b.costs(), 3, true);
        run(c, 60, 1000, 1300, 200);
        CHECK_NEAR(c.draft(1), 200.0, 40.0);
        CHECK_NEAR(c.level(0, 1), 200.0, 40.0);
    }
    {
        // hiccups: one step in ten takes twenty times as long
        cost_model c(*b.costs(), 3, true);
        for (int i = 0; i < 400; ++i) {
            c.observe(1, i % 10 ? 1000 : 20000, 0, 0);
            c.observe(4, i % 10 ? 1300 : 26000, 50, 50);
        }
        CHECK_NEAR(c.verify(4) / c.verify(1), 1.3, 0.15);
    }
}

// on a device passes are run in sizes of powers of two, and a size without a graph is charged with one
static void test_graphs() {
    policy_bank b = make_bank();
    b.build       = 8000.0f;
    cost_model c(*b.costs(), 3, true);

    for (const auto & [n, size] :
         std::vector<std::pair<int, int>>{ { 1, 1 }, { 2, 2 }, { 3, 4 }, { 5, 8 }, { 33, 64 } }) {
        CHECK_EQ(c.size_of(n), size);
        CHECK_NEAR(c.verify(n), 1000.0 + 100.0 * (size - 1), 1e-3);
    }
    CHECK_EQ(c.size_of(100), 100); // as large as it is

    std::vector<double> fee;
    c.fees(1.0, 8, fee);
    CHECK_NEAR(fee[2], 1300.0 + 8000.0 / 16, 1e-3); // thought to serve 16 passes

    // the two passes that build and capture teach nothing of what the size costs
    c.observe(4, 9000.0, 0.0, 0.0, true);
    c.observe(3, 6000.0, 0.0, 0.0, false);
    CHECK_NEAR(c.verify(4), 1300.0, 1e-3);
    c.fees(1.0, 8, fee);
    CHECK_NEAR(fee[2], 1300.0, 1e-3); // it has its graph
    CHECK_NEAR(fee[4], 1700.0 + 500.0, 1e-3);
    for (int i = 0; i < 62; ++i) {
        c.observe(4, 2600.0, 0.0, 0.0);
    }
    CHECK_NEAR(c.verify(3), 2600.0, 130.0);

    // the cache has grown: all are without one, and one is thought to serve as many passes as the last ones did
    c.observe(8, 9000.0, 0.0, 0.0, true);
    c.observe(8, 6000.0, 0.0, 0.0);
    c.observe(8, 1700.0, 0.0, 0.0, true);
    c.fees(1.0, 8, fee);
    CHECK_NEAR(fee[3] - c.verify(4), 8000.0 / ((16.0 + 63.0) / 2), 1e-3);

    // where graphs cost nothing worth mentioning, sizes are as they come, and only that pass is left out
    const policy_bank free = make_bank();
    cost_model        any(*free.costs(), 3, true);
    CHECK_EQ(any.size_of(3), 3);
    for (int i = 0; i < 30; ++i) {
        any.observe(3, 12000.0, 0.0, 0.0, true);
    }
    CHECK_NEAR(any.verify(3), 1200.0, 1e-3);
    any.fees(1.0, 8, fee);
    CHECK_NEAR(fee[2], 1200.0, 1e-3);
}

static void test_bad_costs() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const float x : { nan, -1.0f, std::numeric_limits<float>::infinity() }) {
        policy_bank b = make_bank();
        b.verify[3]   = x;
        CHECK_THROWS(cost_model(*b.costs(), 3, true), "costs");
        b          = make_bank();
        b.level[2] = x;
        CHECK_THROWS(cost_model(*b.costs(), 3, true), "costs");
        b          = make_bank();
        b.draft[1] = x;
        CHECK_THROWS(cost_model(*b.costs(), 3, true), "costs");
    }
    for (const float x : { nan, -1.0f, std::numeric_limits<float>::infinity() }) {
        policy_bank b = make_bank();
        b.build       = x;
        CHECK_THROWS(cost_model(*b.costs(), 3, true), "costs of graphs");
    }
    policy_bank b = make_bank();
    b.verify[0]   = 0.0f;
    CHECK_THROWS(cost_model(*b.costs(), 3, true), "nothing");
    b = make_bank();
    b.costs();
    b.c.verify = nullptr;
    CHECK_THROWS(cost_model(b.c, 3, true), "missing");
}

int main() {
    test_tables();
    test_learns();
    test_graphs();
    test_bad_costs();
    return check_result("test_cost");
}
