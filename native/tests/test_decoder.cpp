// The decode loop: drafting changes how many passes there are, and nothing else.

#include "loop.h"

#include <algorithm>
#include <cstring>

static void test_same_tokens() {
    constexpr int32_t n = 200;

    for (const bool is_greedy : { true, false }) {
        const auto sampler = [&] {
            return is_greedy ? greedy() : sampling(42);
        };

        loop         plain;
        const tokens expected = run(plain, sampler().get(), n);
        CHECK_EQ(expected.size(), n);
        CHECK_EQ(plain.steps().size(), n);
        CHECK_EQ(plain.n_accepted(), 0);

        for (const char * path : all_heads) {
            loop l(path);
            for (const int32_t tree : { 0, chain, bushy, every_token }) {
                l.use_tree(tree);
                int32_t    n_drafted = 0;
                const auto count     = [&](loop & x, int32_t i) {
                    n_drafted += entmtp_decoder_is_drafted(x.dec.get(), expected[i]);
                };
                CHECK(run(l, sampler().get(), n, count) == expected);
                CHECK_EQ(n_drafted, l.n_accepted());

                // every token had a step or was accepted in one
                const auto steps = l.steps();
                CHECK_EQ((int32_t) steps.size() + l.n_accepted(), n);
                for (const auto & s : steps) {
                    CHECK_EQ(s.tree, tree);
                    CHECK(s.n_accepted >= 0 && s.n_accepted < s.n_nodes);
                    CHECK(s.t_draft_us >= 0 && s.t_verify_us >= 0 && s.t_sample_us >= 0 && s.t_host_us >= 0);
                }
                if (tree == bushy) {
                    CHECK(l.n_accepted() > 0);
                }
                if (tree == every_token && !strstr(path, "d2t")) {
                    // the first guess holds, whatever it is
                    CHECK_EQ(steps.size(), n / 2);
                    CHECK_EQ(l.n_accepted(), n / 2);
                }
            }

            l.use_entropy();
            CHECK(run(l, sampler().get(), n) == expected);
            CHECK_EQ((int32_t) l.steps().size() + l.n_accepted(), n);

            std::vector<bool> used(4);
            for (const auto & s : l.steps()) {
                used[s.tree] = true;
                CHECK(s.entropy >= 0.0f && s.entropy < std::log((float) tiny::n_vocab) + 0.01f);
            }
            CHECK(std::count(used.begin(), used.end(), true) >= 2);

            // trees that are grown: the tiny models have fewer heads than some calibrations, and small draft vocabularies
            l.use_confidence();
            CHECK(run(l, sampler().get(), n) == expected);
            CHECK_EQ((int32_t) l.steps().size() + l.n_accepted(), n);
            bool grown = false;
            for (const auto & s : l.steps()) {
                CHECK_EQ(s.tree, s.n_nodes > 1 ? 4 : 0);
                grown = grown || s.tree == 4;
            }
            CHECK(grown);

            // as on a device: passes of powers of two
            l.build                     = 100.0f;
            const entmtp_traffic before = l.traffic();
            l.use_confidence(-1.0f);
            CHECK(run(l, sampler().get(), n) == expected);
            // a layer that sees every hidden state has every token of the prompt put out
            int64_t n_outputs = strstr(path, "prefix") ? (int64_t) prompt.size() : 1;
            for (const auto & s : l.steps()) {
                int32_t size = 1;
                while (size < s.n_nodes) {
                    size *= 2;
                }
                n_outputs += size;
            }
            CHECK_EQ(l.traffic().n_outputs - before.n_outputs, n_outputs);
            l.build = 0.0f;

            // no guess is worth its place: a lone root is plain decoding, whoever grew it
            l.use_confidence(-20.0f);
            CHECK(run(l, sampler().get(), n) == expected);
            CHECK_EQ(l.steps().size(), n);
            for (const auto & s : l.steps()) {
                CHECK_EQ(s.tree, 0);
            }
        }
    }
}

static void test_settle() {
    constexpr int32_t n = 80;

    loop         plain;
    const tokens expected = run(plain, sampling(7).get(), n);

    for (const char * path : all_heads) {
        loop l(path);
        for (const int32_t tree : { bushy, every_token, -1, -2 }) {
            if (tree == -2) {
                l.use_confidence();
            } else if (tree < 0) {
                l.use_entropy();
            } else {
                l.use_tree(tree);
            }
            for (const int32_t every : { 1, 3 }) {
                const tokens got = run(l, sampling(7).get(), n, [&](loop & x, int32_t i) {
                    if (i % every == 0) {
                        CHECK_EQ(entmtp_decoder_settle(x.dec.get()), ENTMTP_OK);
                    }
                });
                CHECK(got == expected);

                // the memory holds what plain decoding has there
                CHECK_EQ(entmtp_decoder_settle(l.dec.get()), ENTMTP_OK);
                const auto mem = llama_get_memory(l.ctx.get());
                CHECK_EQ(llama_memory_seq_pos_max(mem, 0), (int32_t) prompt.size() + n - 1);
            }
        }
    }
}

static void test_logits() {
    loop plain("medusa.gguf"); // with heads, for its hidden states
    loop l("hydra.gguf");
    l.use_tree(bushy);

    CHECK(!entmtp_decoder_logits(l.dec.get()));
    CHECK(!entmtp_decoder_hidden(l.dec.get()));

    CHECK_EQ(plain.eval(prompt, 0), ENTMTP_OK);
    const tokens a = run(l, greedy().get(), 100, [&](loop & x, int32_t i) {
        const float * la = entmtp_decoder_logits(x.dec.get());
        const float * lb = entmtp_decoder_logits(plain.dec.get());
        const float * ha = entmtp_decoder_hidden(x.dec.get());
        const float * hb = entmtp_decoder_hidden(plain.dec.get());
        if (!CHECK(la && lb && ha && hb)) {
            return;
        }
        for (int32_t k = 0; k < tiny::n_vocab; ++k) {
            CHECK_NEAR(la[k], lb[k], 1e-4);
        }
        for (int32_t k = 0; k < tiny::n_embd; ++k) {
            CHECK_NEAR(ha[k], hb[k], 1e-4);
        }
        const int32_t best = (int32_t) (std::max_element(lb, lb + tiny::n_vocab) - lb);
        CHECK_EQ(plain.eval({ best }, (int32_t) prompt.size() + i), ENTMTP_OK);
    });
    CHECK_EQ(a.size(), 100);
}

static void test_rewind() {
    loop         plain;
    const tokens expected = run(plain, greedy().get(), 60);

    for (const char * path : all_heads) {
        loop l(path);
        l.use_tree(every_token);
        for (const int32_t n : { 60, 13, 1 }) {
            run(l, sampling((uint32_t) n).get(), n);
            CHECK_EQ(l.eval({ prompt.end() - 3, prompt.end() }, (int32_t) prompt.size() - 3), ENTMTP_OK);
            CHECK(generate(l, greedy().get(), 60, (int32_t) prompt.size()) == expected);
        }

        // all outputs of a prompt
        CHECK_EQ(l.eval(prompt, 0, true), ENTMTP_OK);
        const float * all = llama_get_logits(l.ctx.get());
        CHECK(all && entmtp_decoder_logits(l.dec.get()) == all + (prompt.size() - 1) * tiny::n_vocab);
    }
}

static void test_typical() {
    // a threshold that only the most probable token passes: greedy decoding
    loop         plain;
    const tokens expected = run(plain, greedy().get(), 100);

    loop l("hydra.gguf");
    for (const int32_t tree : { chain, bushy, every_token }) {
        l.use_tree(tree);
        for (const float epsilon : { 1.0f, 0.09f }) {
            CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
            entmtp_decoder_reset_stats(l.dec.get());
            tokens got;
            for (int32_t i = 0; i < 100; ++i) {
                int32_t token = -1;
                CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), greedy().get(), epsilon == 1.0f ? 0.0f : 1.0f,
                                                       epsilon, 0.3f, &token),
                         ENTMTP_OK);
                CHECK_EQ(l.eval({ token }, (int32_t) prompt.size() + i), ENTMTP_OK);
                got.push_back(token);
            }
            CHECK(epsilon != 1.0f || got == expected);
            CHECK_EQ((int32_t) l.steps().size() + l.n_accepted(), 100);
        }
    }

    // the caller goes another way than the typical one: it does not lead on from there
    tokens parent = { -1 };
    tokens rank   = { 0 };
    for (const bool leaf : { false, true }) {
        for (int32_t i = 0; i < tiny::n_vocab; ++i) {
            parent.push_back(leaf ? i + 1 : 0);
            rank.push_back(leaf ? 0 : i);
        }
    }
    bank b;
    b.add(parent, rank);
    CHECK_EQ(entmtp_decoder_set_trees(l.dec.get(), 2, b.n_nodes.data(), b.parent.data(), b.rank.data()), ENTMTP_OK);
    l.use_tree(1);
    for (int32_t i = 0; i < 20; ++i) {
        const int32_t pos = (int32_t) prompt.size();
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        CHECK_EQ(l.eval({ i }, pos), ENTMTP_OK);

        int32_t token = -1;
        CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), greedy().get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
        const int32_t other = (token + 1 + i) % tiny::n_vocab;
        CHECK_EQ(l.eval({ other }, pos + 1), ENTMTP_OK); // in the tree, as every token is

        const float * row  = entmtp_decoder_logits(l.dec.get());
        const int32_t best = (int32_t) (std::max_element(row, row + tiny::n_vocab) - row);
        CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), greedy().get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
        CHECK_EQ(token, best);
    }
}

int main() {
    if (set_up()) {
        test_same_tokens();
        test_settle();
        for (const int32_t mode : { ENTMTP_OUTPUTS_HOST, ENTMTP_OUTPUTS_ROWS, ENTMTP_OUTPUTS_DEVICE }) {
            outputs_mode = mode;
            test_logits();
            test_rewind();
            test_typical();
        }
        test_same_tokens();
    }
    return tear_down("test_decoder");
}
