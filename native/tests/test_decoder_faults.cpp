// The decode loop when something goes wrong, or changes under way.

#include "loop.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

static void test_cancel() {
    constexpr int32_t n = 300;

    loop         plain;
    const tokens expected = run(plain, greedy().get(), n);

    for (const char * path : { (const char *) nullptr, "medusa.gguf", "hydra-prefix.gguf" }) {
        loop l(path);
        if (path) {
            l.use_tree(bushy);
        }

        // before a call: that call is refused, the next is not
        entmtp_decoder_cancel(l.dec.get());
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_CANCELLED);
        CHECK_HAS(entmtp_last_error(), "cancelled");
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);

        // from another thread, again and again
        std::atomic<bool> stop{ false };
        std::thread       other([&] {
            while (!stop) {
                std::this_thread::sleep_for(std::chrono::microseconds(700));
                entmtp_decoder_cancel(l.dec.get());
            }
        });

        const auto s           = greedy();
        int32_t    pos         = (int32_t) prompt.size();
        int32_t    n_cancelled = 0;
        tokens     got;
        while ((int32_t) got.size() < n) {
            int32_t token = -1;
            if (!CHECK_EQ(entmtp_decoder_sample(l.dec.get(), s.get(), &token), ENTMTP_OK)) {
                break;
            }
            int32_t status = l.eval({ token }, pos);
            for (int tries = 0; status == ENTMTP_CANCELLED && tries < 1000; ++tries) {
                n_cancelled++;
                status = l.eval({ token }, pos); // what was settled is still there
            }
            if (!CHECK_EQ(status, ENTMTP_OK)) {
                break;
            }
            got.push_back(token);
            pos++;
        }
        stop = true;
        other.join();

        CHECK(got == expected);
        CHECK(n_cancelled > 0);
    }
}

static void test_context_full() {
    loop          plain(nullptr, 256);
    const int32_t n_ctx = (int32_t) llama_n_ctx_seq(plain.ctx.get());

    const auto fill = [&](loop & l) {
        const auto s = sampling(3);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        tokens  res;
        int32_t status = ENTMTP_OK;
        for (int32_t pos = (int32_t) prompt.size(); status == ENTMTP_OK && pos < 2 * n_ctx; ++pos) {
            int32_t token = -1;
            CHECK_EQ(entmtp_decoder_sample(l.dec.get(), s.get(), &token), ENTMTP_OK);
            status = l.eval({ token }, pos);
            res.push_back(token);
        }
        CHECK_EQ(status, ENTMTP_CONTEXT_FULL);
        CHECK_HAS(entmtp_last_error(), "context is full");
        CHECK_HAS(entmtp_last_error(), "n_ctx");
        return res;
    };

    const tokens expected = fill(plain);
    CHECK_EQ((int32_t) (expected.size() + prompt.size()), n_ctx + 1);

    for (const char * path : all_heads) {
        loop l(path, 256);
        for (const int32_t tree : { chain, bushy, every_token }) {
            l.use_tree(tree);
            CHECK(fill(l) == expected);
        }
        // and it goes on from an earlier place
        CHECK(run(l, greedy().get(), 20) == run(plain, greedy().get(), 20));
    }
}

static void test_errors() {
    loop l("medusa.gguf");
    l.use_tree(bushy);

    int32_t    token = -1;
    const auto s     = greedy();
    CHECK_EQ(entmtp_decoder_sample(l.dec.get(), s.get(), &token), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "evaluate a token first");

    for (const int32_t bad : { -1, tiny::n_vocab, INT32_MAX, INT32_MIN }) {
        CHECK_EQ(l.eval({ 1, bad }, 0), ENTMTP_ERROR);
        CHECK_HAS(entmtp_last_error(), "not in the vocabulary");
    }
    CHECK_EQ(l.eval({}, 0), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_eval(l.dec.get(), prompt.data(), -5, 0, false), ENTMTP_ERROR);
    CHECK_EQ(l.eval(prompt, 1), ENTMTP_ERROR);
    CHECK_EQ(l.eval(prompt, 5), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "only 0 are evaluated");
    for (const int32_t n_past : { -1, -7, INT32_MIN }) {
        CHECK_EQ(l.eval(prompt, n_past), ENTMTP_ERROR);
        CHECK_HAS(entmtp_last_error(), "cannot continue");
    }
    CHECK_EQ(l.eval(tokens(129, 5), 0), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "n_batch");

    CHECK_EQ(entmtp_decoder_eval(nullptr, prompt.data(), 1, 0, false), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_sample(l.dec.get(), nullptr, &token), ENTMTP_ERROR);
    CHECK(!entmtp_decoder_init(nullptr, nullptr));

    // a bad token in the middle of a tree leaves the tree as it was
    loop         plain;
    const tokens expected = run(plain, greedy().get(), 50);
    const tokens got      = run(l, greedy().get(), 50, [](loop & x, int32_t i) {
        CHECK_EQ(x.eval({ tiny::n_vocab }, (int32_t) prompt.size() + i), ENTMTP_ERROR);
    });
    CHECK(got == expected);

    // banks and policies that cannot work
    const auto set = [&](const bank & b) {
        return entmtp_decoder_set_trees(l.dec.get(), (int32_t) b.n_nodes.size(), b.n_nodes.data(), b.parent.data(),
                                        b.rank.data());
    };
    bank b;
    b.n_nodes = { 2 };
    b.parent  = { -1, 0 };
    b.rank    = { 0, 0 };
    CHECK_EQ(set(b), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "lone root");
    b = {};
    b.add({ -1, 0, 1, 2, 3 }, { 0, 0, 0, 0, 0 });
    CHECK_EQ(set(b), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "only 3 heads");
    CHECK_EQ(entmtp_decoder_set_trees(l.dec.get(), 0, nullptr, nullptr, nullptr), ENTMTP_ERROR);
    CHECK_EQ(entmtp_decoder_set_policy(l.dec.get(), nullptr), ENTMTP_ERROR);

    b = make_bank();
    // without heads trees are filled from rows that were seen
    CHECK_EQ(entmtp_decoder_set_trees(plain.dec.get(), 4, b.n_nodes.data(), b.parent.data(), b.rank.data()), ENTMTP_OK);

    // the decoder still works
    CHECK(run(l, greedy().get(), 50) == expected);
}

static void test_changes_in_a_step() {
    constexpr int32_t n = 60;

    loop         plain;
    const tokens expected = run(plain, greedy().get(), n);

    for (const bool drafts : { false, true }) {
        loop l(drafts ? "medusa.gguf" : nullptr);

        const auto again = [&](const between & f) {
            if (drafts) {
                l.use_tree(every_token);
            }
            entmtp_decoder_set_stats(l.dec.get(), true);
            CHECK(run(l, greedy().get(), n, f) == expected);
        };
        for (const int32_t phase : { 0, 1, 2 }) {
            again([&](loop & x, int32_t i) {
                if (i % 3 == phase) {
                    entmtp_decoder_reset_stats(x.dec.get());
                }
            });
            CHECK((int32_t) l.steps().size() + l.n_accepted() <= 3);
            again([&](loop & x, int32_t i) { entmtp_decoder_set_stats(x.dec.get(), i % 3 != phase); });
            for (const auto & s : l.steps()) {
                CHECK(s.n_accepted >= 0 && s.n_accepted < s.n_nodes);
            }
        }
        // between evaluation and sampling
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        const auto s = greedy();
        for (int32_t i = 0; i < 10; ++i) {
            int32_t token = -1;
            entmtp_decoder_reset_stats(l.dec.get());
            CHECK_EQ(entmtp_decoder_sample(l.dec.get(), s.get(), &token), ENTMTP_OK);
            CHECK_EQ(l.eval({ token }, (int32_t) prompt.size() + i), ENTMTP_OK);
        }
    }

    // an untimed step of the old policy is no evidence for the new one
    loop l("medusa.gguf");
    entmtp_decoder_set_stats(l.dec.get(), false);
    l.use_tree(every_token);
    const tokens got = run(l, greedy().get(), n, [](loop & x, int32_t i) {
        if (i == 5) {
            x.use_entropy();
            entmtp_decoder_set_stats(x.dec.get(), true);
        }
    });
    CHECK(got == expected);
    const auto steps = l.steps();
    CHECK(std::any_of(steps.begin(), steps.end(), [](const entmtp_step & s) { return s.tree != every_token; }));
}

// a sampler that takes its time, so that a record of it cannot be zero
static tiny::sampler_ptr slow() {
    static llama_sampler_i iface = {};
    iface.apply                  = [](llama_sampler *, llama_token_data_array * p) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        p->selected = 0;
    };
    return tiny::sampler_ptr(llama_sampler_init(&iface, nullptr));
}

// the memory is emptied while a tree is walked: nothing of that step reaches into the text that follows
static void test_commit_fails() {
    constexpr int32_t n = 20;

    const auto typical = [](loop & l) {
        tokens res;
        for (int32_t i = 0; i < n; ++i) {
            int32_t token = -1;
            CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), greedy().get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
            CHECK_EQ(l.eval({ token }, (int32_t) prompt.size() + i), ENTMTP_OK);
            res.push_back(token);
        }
        return res;
    };

    for (const char * path : all_heads) {
        loop fresh(path);
        loop l(path);
        fresh.use_tree(bushy);
        CHECK_EQ(fresh.eval(prompt, 0), ENTMTP_OK);
        const tokens expected = typical(fresh);

        // in the middle of another tree, whose typical path is known
        l.use_tree(chain);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        int32_t token = -1;
        int32_t pos   = (int32_t) prompt.size();
        CHECK_EQ(l.eval({ 3 }, pos++), ENTMTP_OK);
        CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), greedy().get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
        llama_memory_clear(llama_get_memory(l.ctx.get()), true);
        int32_t status = ENTMTP_OK;
        for (int32_t i = 0; i < tiny::n_vocab && status == ENTMTP_OK; ++i) {
            status = l.eval({ i }, pos++); // the first that is not in the tree ends it
        }
        CHECK_EQ(status, ENTMTP_ERROR);
        CHECK_HAS(entmtp_last_error(), "was changed while a tree was being walked");
        CHECK_EQ(entmtp_decoder_sample(l.dec.get(), greedy().get(), &token), ENTMTP_ERROR);

        // what is sampled now belongs to no step
        l.use_tree(bushy);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        const int32_t before = l.steps().back().t_sample_us;
        CHECK_EQ(entmtp_decoder_sample(l.dec.get(), slow().get(), &token), ENTMTP_OK);
        CHECK_EQ(l.steps().back().t_sample_us, before);

        CHECK(typical(l) == expected);
    }
}

// heads that cannot go on: their cache is made anew for another decoder, which needs less room
static void test_heads_fail() {
    const tokens expected = [] {
        loop plain;
        return run(plain, greedy().get(), 20);
    }();
    loop              l("hydra-prefix.gguf");
    tiny::context_ptr small = tiny::new_context(base.get(), 256);
    l.use_tree(bushy);
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
    decoder_ptr(entmtp_decoder_init(small.get(), l.heads.get())).reset();

    int32_t status = ENTMTP_OK, pos = (int32_t) prompt.size();
    for (; status == ENTMTP_OK && pos < 300; ++pos) {
        int32_t token = -1;
        CHECK_EQ(entmtp_decoder_sample(l.dec.get(), greedy().get(), &token), ENTMTP_OK);
        status = l.eval({ token }, pos);
    }
    CHECK_EQ(status, ENTMTP_ERROR);
    CHECK(pos > 256 && pos < 300);
    CHECK_HAS(entmtp_last_error(), "outside the cache of the prefix layer");

    // no logits of a pass that is over, no text beyond what was settled
    int32_t token = -1;
    CHECK_EQ(entmtp_decoder_n_evaluated(l.dec.get()), -1);
    CHECK(!entmtp_decoder_logits(l.dec.get()));
    CHECK_EQ(entmtp_decoder_sample(l.dec.get(), greedy().get(), &token), ENTMTP_ERROR);
    CHECK(!entmtp_decoder_can_continue(l.dec.get(), pos));
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(l.ctx.get()), 0), 255);
    CHECK(run(l, greedy().get(), 20) == expected); // and it is as good as new
}

int main() {
    if (set_up()) {
        test_cancel();
        test_context_full();
        test_errors();
        test_changes_in_a_step();
        test_commit_fails();
        test_heads_fail();
    }
    return tear_down("test_decoder_faults");
}
