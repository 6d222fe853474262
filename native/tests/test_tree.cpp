// Topologies: what make_tree accepts, refuses and derives.

#include "tree.h"

#include "check.h"
#include "random_tree.h"

using entmtp::make_tree;
using entmtp::tree;

static tree make(const std::vector<int32_t> & parent, const std::vector<int32_t> & rank) {
    return make_tree(parent.data(), rank.data(), (int32_t) parent.size());
}

static void test_by_hand() {
    // a lone root: nothing to draft
    const tree root = make({ -1 }, { 0 });
    CHECK_EQ(root.n_nodes(), 1);
    CHECK(root.levels.empty());
    CHECK_EQ(root.slot[0], -1);
    CHECK_EQ(root.find_child(0, { 5 }, 5), -1);

    //          0
    //    1(r0)   2(r2)
    //  3(r0) 4(r3)  5(r1)
    //           6(r0)
    const tree t = make({ -1, 0, 0, 1, 1, 2, 4 }, { 0, 0, 2, 0, 3, 1, 0 });

    CHECK(t.depth == (std::vector<int32_t>{ 0, 1, 1, 2, 2, 2, 3 }));
    CHECK(t.slot == (std::vector<int32_t>{ 0, 0, 1, -1, 0, -1, -1 }));

    CHECK_EQ(t.levels.size(), 3);
    CHECK(t.levels[0].expand == (std::vector<int32_t>{ 0 }));
    CHECK(t.levels[1].expand == (std::vector<int32_t>{ 1, 2 }));
    CHECK(t.levels[2].expand == (std::vector<int32_t>{ 4 }));
    CHECK_EQ(t.levels[0].k, 3);
    CHECK_EQ(t.levels[1].k, 4);
    CHECK_EQ(t.levels[2].k, 1);

    const std::vector<int32_t> tokens = { 9, 10, 11, 12, 13, 12, 14 };
    CHECK_EQ(t.find_child(0, tokens, 10), 1);
    CHECK_EQ(t.find_child(0, tokens, 11), 2);
    CHECK_EQ(t.find_child(0, tokens, 12), -1); // there, but not a child
    CHECK_EQ(t.find_child(1, tokens, 12), 3);
    CHECK_EQ(t.find_child(2, tokens, 12), 5);
    CHECK_EQ(t.find_child(4, tokens, 14), 6);
    CHECK_EQ(t.find_child(6, tokens, 14), -1);

    // two children with one token: the first is taken
    CHECK_EQ(t.find_child(1, { 9, 10, 11, 12, 12, 12, 14 }, 12), 3);
}

static void test_malformed() {
    const int32_t none = 0;
    CHECK_THROWS(make_tree(&none, &none, 0), "no root");
    CHECK_THROWS(make_tree(&none, &none, -1), "no root");

    CHECK_THROWS(make({ 0 }, { 0 }), "node 0 is the root and cannot have a parent");
    CHECK_THROWS(make({ -1, -1 }, { 0, 0 }), "node 1 must come after its parent"); // a second root
    CHECK_THROWS(make({ -1, 1 }, { 0, 0 }), "node 1 must come after its parent");  // its own parent
    CHECK_THROWS(make({ -1, 2, 0 }, { 0, 0, 0 }), "node 1 must come after its parent");
    CHECK_THROWS(make({ -1, 7 }, { 0, 0 }), "node 1 must come after its parent");
    CHECK_THROWS(make({ -1, INT32_MIN }, { 0, 0 }), "node 1 must come after its parent");
    CHECK_THROWS(make({ -1, 0 }, { 0, -1 }), "node 1 has a negative rank");
    CHECK_THROWS(make({ -1, 0 }, { 0, INT32_MAX }), "node 1 has a rank");
    CHECK_THROWS(make({ -1, 0 }, { 0, 1 << 26 }), "node 1 has a rank");
    CHECK_EQ(make({ -1, 0 }, { 0, (1 << 26) - 1 }).levels[0].k, 1 << 26);
    CHECK_THROWS(make({ -1, 0, 0 }, { 0, 1, 1 }), "node 2 is there twice");
    CHECK_THROWS(make({ -1, 0, 1, 0 }, { 0, 0, 0, 1 }), "node 3 breaks the breadth-first order");
}

static void test_random() {
    std::mt19937 rng(1);

    for (int round = 0; round < 500; ++round) {
        const random_tree r(rng, 1 + (int32_t) (rng() % 64));
        const tree        t = r.make();

        CHECK_EQ(t.n_nodes(), r.n_nodes());
        CHECK(t.parent == r.parent && t.rank == r.rank);

        std::vector<int32_t> k(t.levels.size());
        std::vector<int32_t> tokens(t.n_nodes());

        for (int32_t i = 1; i < t.n_nodes(); ++i) {
            const int32_t up = t.parent[i];

            CHECK_EQ(t.depth[i], t.depth[up] + 1);
            CHECK(t.depth[i] >= t.depth[i - 1]);

            // the parent is found in its level's expand, at its slot
            const auto & level = t.levels[t.depth[up]];
            CHECK(t.slot[up] >= 0 && t.slot[up] < (int32_t) level.expand.size());
            CHECK_EQ(level.expand[t.slot[up]], up);
            CHECK(t.rank[i] < level.k);

            k[t.depth[up]] = std::max(k[t.depth[up]], t.rank[i] + 1);
            tokens[i]      = up * 100 + t.rank[i]; // siblings differ
        }

        size_t n_expand = 0;
        for (size_t l = 0; l < t.levels.size(); ++l) {
            CHECK_EQ(t.levels[l].k, k[l]);
            CHECK(!t.levels[l].expand.empty());
            n_expand += t.levels[l].expand.size();
        }

        size_t n_inner = 0;
        for (int32_t i = 0; i < t.n_nodes(); ++i) {
            const bool is_leaf = !std::count(t.parent.begin(), t.parent.end(), i);
            CHECK_EQ(t.slot[i] < 0, is_leaf);
            n_inner += !is_leaf;

            for (int32_t token = 0; token < 12; ++token) {
                int32_t expected = -1;
                for (int32_t j = 1; j < t.n_nodes(); ++j) {
                    if (t.parent[j] == i && tokens[j] == i * 100 + token) {
                        expected = j;
                    }
                }
                CHECK_EQ(t.find_child(i, tokens, i * 100 + token), expected);
            }
        }
        CHECK_EQ(n_expand, n_inner);
    }
}

int main() {
    test_by_hand();
    test_malformed();
    test_random();
    return check_result("test_tree");
}
