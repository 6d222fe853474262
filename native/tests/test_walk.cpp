// What a step drafted, as it is shown: against the text, the bank and the records of the steps.

#include "entmtp_walk.h"
#include "loop.h"

static std::vector<entmtp_node> nodes_of(const loop & l, entmtp_walk * walk) {
    CHECK_EQ(entmtp_decoder_get_walk(l.dec.get(), walk, nullptr, 0), ENTMTP_OK);
    std::vector<entmtp_node> nodes(walk->n_nodes);
    CHECK_EQ(entmtp_decoder_get_walk(l.dec.get(), walk, nodes.data(), walk->n_nodes), ENTMTP_OK);
    return nodes;
}

static bool same(const std::vector<entmtp_node> & a, const std::vector<entmtp_node> & b) {
    bool res = a.size() == b.size();
    for (size_t i = 0; res && i < a.size(); ++i) {
        res = a[i].token == b[i].token && a[i].parent == b[i].parent && a[i].sources == b[i].sources &&
              a[i].p == b[i].p && a[i].walked == b[i].walked;
    }
    return res;
}

// policy: a tree of the bank, -1: grown
static void test_texts(const char * heads, int32_t policy) {
    constexpr int32_t n = 100;

    loop         plain;
    const tokens expected = run(plain, sampling(11).get(), n);

    loop l(heads);
    if (policy < 0) {
        l.use_confidence();
    } else {
        l.use_tree(policy);
    }
    const bank b = make_bank();

    tokens  text      = prompt;
    int32_t n_guessed = 0;
    float   running   = 0.0f;
    bool    left      = false; // the token before left its tree
    run(l, sampling(11).get(), n, [&](loop & x, int32_t i) {
        // `text` is evaluated, and expected[i] is drawn
        entmtp_walk walk  = {};
        const auto  nodes = nodes_of(x, &walk);
        if (i == 0) {
            CHECK_EQ(walk.n_nodes, 0);
        } else if (CHECK(walk.n_nodes > 0 && walk.n_past < (int32_t) text.size())) {
            // the nodes that were walked are the text since the root
            int32_t at = -1, pos = walk.n_past;
            for (int32_t k = 0; k < walk.n_nodes; ++k) {
                CHECK(k == 0 ? nodes[k].parent == -1 : nodes[k].parent >= 0 && nodes[k].parent < k);
                CHECK_EQ(nodes[k].sources, k == 0 ? 0u : (uint32_t) ENTMTP_SOURCE_HEADS);
                CHECK_EQ(nodes[k].p, -1.0f);
                if (nodes[k].walked) {
                    CHECK_EQ(nodes[k].parent, at);
                    CHECK_EQ(nodes[k].token, text[pos++]);
                    at = k;
                }
            }
            CHECK_EQ(pos, (int32_t) text.size());
            if (policy == bushy) {
                CHECK_EQ(walk.n_nodes, b.n_nodes[bushy]);
                for (int32_t k = 0; k < walk.n_nodes; ++k) {
                    CHECK_EQ(nodes[k].parent, b.parent[b.n_nodes[0] + b.n_nodes[chain] + k]);
                }
            }
            CHECK_EQ(x.steps().back().n_nodes, walk.n_nodes);
            if (left) { // this step began with the estimate of the token before
                CHECK_EQ(x.steps().back().entropy, running);
            }
            // the children of the last one are what the next token may be without another pass
            for (int32_t token = 0; token < tiny::n_vocab; ++token) {
                bool is_child = false;
                for (const auto & node : nodes) {
                    is_child = is_child || (node.parent == at && node.token == token);
                }
                CHECK_EQ(entmtp_decoder_is_drafted(x.dec.get(), token), is_child);
            }
        }
        running = walk.entropy;

        // what is settled meanwhile is still shown
        if (i % 7 == 3) {
            CHECK_EQ(entmtp_decoder_settle(x.dec.get()), ENTMTP_OK);
            entmtp_walk later = {};
            CHECK(same(nodes_of(x, &later), nodes));
            CHECK_EQ(later.n_past, walk.n_past);
        }

        const int32_t token = expected[i];
        left                = !entmtp_decoder_is_drafted(x.dec.get(), token);
        n_guessed += !left;
        text.push_back(token);
    });
    CHECK_EQ((int32_t) text.size(), (int32_t) prompt.size() + n);
    CHECK_EQ(l.n_accepted(), n_guessed);
    CHECK(policy == 0 || n_guessed > 0);

    // what there is no step of
    entmtp_walk walk = {};
    CHECK(!nodes_of(l, &walk).empty());
    CHECK_EQ(entmtp_decoder_settle(l.dec.get()), ENTMTP_OK);
    entmtp_decoder_forget(l.dec.get());
    CHECK(nodes_of(l, &walk).empty());
    CHECK_EQ(l.eval({ 3 }, (int32_t) text.size()), ENTMTP_OK);
    CHECK(!nodes_of(l, &walk).empty());
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
    CHECK(nodes_of(l, &walk).empty());
}

static void test_arguments() {
    loop        l;
    entmtp_walk walk = {};
    CHECK_EQ(entmtp_decoder_get_walk(nullptr, &walk, nullptr, 0), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_get_walk(l.dec.get(), nullptr, nullptr, 0), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_get_walk(l.dec.get(), &walk, nullptr, 1), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_get_walk(l.dec.get(), &walk, nullptr, 0), ENTMTP_OK);
    CHECK_EQ(walk.n_nodes, 0);
}

int main() {
    if (set_up()) {
        for (const char * heads : all_heads) {
            for (const int32_t policy : { 0, chain, bushy, every_token, -1 }) {
                test_texts(heads, policy);
            }
        }
        test_arguments();
    }
    return tear_down("test_walk");
}
