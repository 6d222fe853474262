// The decode loop: drafting changes how many passes there are, and nothing else.

#include "entmtp.h"

#include "check.h"
#include "tiny.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>

struct heads_deleter   { void operator()(entmtp_heads * p)   { entmtp_heads_free(p); } };
struct decoder_deleter { void operator()(entmtp_decoder * p) { entmtp_decoder_free(p); } };

using heads_ptr   = std::unique_ptr<entmtp_heads, heads_deleter>;
using decoder_ptr = std::unique_ptr<entmtp_decoder, decoder_deleter>;
using tokens      = std::vector<int32_t>;

static tiny::folder    dir;
static tiny::model_ptr base;

static const tokens prompt = { 1, 17, 4, 33, 9, 9, 21, 30, 5, 12 };

//
// a context, its decoder and its bank
//

struct bank {
    tokens n_nodes = { 1 };
    tokens parent  = { -1 };
    tokens rank    = { 0 };

    void add(const tokens & p, const tokens & r) {
        n_nodes.push_back((int32_t) p.size());
        parent.insert(parent.end(), p.begin(), p.end());
        rank  .insert(rank.end(), r.begin(), r.end());
    }
};

// a chain, a bushy tree and one that holds every token as the first guess
static bank make_bank() {
    bank b;
    b.add({ -1, 0, 1, 2 }, { 0, 0, 0, 0 });
    b.add({ -1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 7, 7 }, { 0, 0, 1, 2, 3, 5, 8, 0, 1, 4, 0, 2, 0, 0, 1 });

    tokens all_parent = { -1 };
    tokens all_rank   = { 0 };
    for (int32_t i = 0; i < tiny::n_vocab; ++i) {
        all_parent.push_back(0);
        all_rank.push_back(i);
    }
    b.add(all_parent, all_rank);
    return b;
}

static constexpr int32_t chain = 1, bushy = 2, every_token = 3;

struct loop {
    tiny::context_ptr ctx;
    heads_ptr         heads; // null: plain decoding
    decoder_ptr       dec;

    explicit loop(const char * heads_path = nullptr, uint32_t n_ctx = 512) : ctx(tiny::new_context(base.get(), n_ctx)) {
        if (heads_path) {
            heads.reset(entmtp_heads_load((dir / heads_path).c_str(), base.get(), 1));
            CHECK(heads);
        }
        dec.reset(entmtp_decoder_init(ctx.get(), heads.get()));
        CHECK(dec);
        entmtp_decoder_set_stats(dec.get(), true);
        if (heads) {
            const bank b = make_bank();
            CHECK_EQ(entmtp_decoder_set_trees(dec.get(), (int32_t) b.n_nodes.size(), b.n_nodes.data(), b.parent.data(), b.rank.data()), ENTMTP_OK);
        }
    }

    void use_tree(int32_t id) {
        entmtp_policy_params p = {};
        p.policy      = ENTMTP_POLICY_STATIC;
        p.static_tree = id;
        CHECK_EQ(entmtp_decoder_set_policy(dec.get(), &p), ENTMTP_OK);
    }

    // a bank that likes its trees, so that all of them are used
    void use_entropy() {
        const float edges[]    = { 1.0f, 2.0f };
        const float expected[] = { 0, 1, 2, 3, 0, 2, 3, 1, 0, 3, 1, 2 };
        const float cost[]     = { 1, 1.1f, 1.2f, 1.3f };

        entmtp_policy_params p = {};
        p.policy     = ENTMTP_POLICY_ENTROPY;
        p.ema_window = 4.0f;
        p.n_bins     = 3;
        p.bin_edges  = edges;
        p.expected   = expected;
        p.cost       = cost;
        CHECK_EQ(entmtp_decoder_set_policy(dec.get(), &p), ENTMTP_OK);
    }

    int32_t eval(const tokens & t, int32_t n_past, bool all = false) {
        return entmtp_decoder_eval(dec.get(), t.data(), (int32_t) t.size(), n_past, all);
    }

    std::vector<entmtp_step> steps() const {
        std::vector<entmtp_step> res(entmtp_decoder_n_steps(dec.get()));
        CHECK_EQ(entmtp_decoder_get_steps(dec.get(), res.data(), 0, res.size()), res.size());
        return res;
    }

    int32_t n_accepted() const {
        int32_t n = 0;
        for (const auto & s : steps()) {
            n += s.n_accepted;
        }
        return n;
    }
};

static tiny::sampler_ptr greedy() {
    tiny::sampler_ptr s(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    llama_sampler_chain_add(s.get(), llama_sampler_init_greedy());
    return s;
}

static tiny::sampler_ptr sampling(uint32_t seed) {
    tiny::sampler_ptr s(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    llama_sampler_chain_add(s.get(), llama_sampler_init_penalties(tiny::n_vocab, 16, 1.1f, 0.1f, 0.1f));
    llama_sampler_chain_add(s.get(), llama_sampler_init_top_k(20));
    llama_sampler_chain_add(s.get(), llama_sampler_init_top_p(0.95f, 1));
    llama_sampler_chain_add(s.get(), llama_sampler_init_temp(0.9f));
    llama_sampler_chain_add(s.get(), llama_sampler_init_dist(seed));
    return s;
}

// what happens between two tokens
using between = std::function<void(loop &, int32_t i)>;

// n tokens after what is evaluated already; pos is the next position
static tokens generate(loop & l, llama_sampler * sampler, int32_t n, int32_t pos, const between & f = nullptr) {
    tokens res;
    for (int32_t i = 0; i < n; ++i) {
        int32_t token = -1;
        if (!CHECK_EQ(entmtp_decoder_sample(l.dec.get(), sampler, &token), ENTMTP_OK)) {
            break;
        }
        res.push_back(token);
        if (f) {
            f(l, i);
        }
        if (!CHECK_EQ(l.eval({ token }, pos++), ENTMTP_OK)) {
            fprintf(stderr, "  %s\n", entmtp_last_error());
            break;
        }
    }
    return res;
}

static tokens run(loop & l, llama_sampler * sampler, int32_t n, const between & f = nullptr) {
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
    entmtp_decoder_reset_stats(l.dec.get());
    return generate(l, sampler, n, (int32_t) prompt.size(), f);
}

static const char * all_heads[] = { "medusa.gguf", "medusa-d2t.gguf", "hydra.gguf", "hydra-prefix.gguf" };

//
// tests
//

static void test_same_tokens() {
    constexpr int32_t n = 200;

    for (const bool is_greedy : { true, false }) {
        const auto sampler = [&] { return is_greedy ? greedy() : sampling(42); };

        loop         plain;
        const tokens expected = run(plain, sampler().get(), n);
        CHECK_EQ(expected.size(), n);
        CHECK_EQ(plain.steps().size(), n);
        CHECK_EQ(plain.n_accepted(), 0);

        for (const char * path : all_heads) {
            loop l(path);
            for (const int32_t tree : { 0, chain, bushy, every_token }) {
                l.use_tree(tree);
                CHECK(run(l, sampler().get(), n) == expected);

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
        }
    }
}

static void test_settle() {
    constexpr int32_t n = 80;

    loop         plain;
    const tokens expected = run(plain, sampling(7).get(), n);

    for (const char * path : all_heads) {
        loop l(path);
        for (const int32_t tree : { bushy, every_token, -1 }) {
            if (tree < 0) {
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

// logits and hidden states are those of plain decoding
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

// going back, in the middle of a tree too
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
        return entmtp_decoder_set_trees(l.dec.get(), (int32_t) b.n_nodes.size(), b.n_nodes.data(), b.parent.data(), b.rank.data());
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
    CHECK_EQ(entmtp_decoder_set_trees(plain.dec.get(), 4, b.n_nodes.data(), b.parent.data(), b.rank.data()), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "need draft heads");

    // the decoder still works
    CHECK(run(l, greedy().get(), 50) == expected);
}

// settings that change while a tree is being walked
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
                CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), epsilon == 1.0f ? 0.0f : 1.0f, epsilon, 0.3f, &token), ENTMTP_OK);
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
            rank  .push_back(leaf ? 0 : i);
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
        CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
        const int32_t other = (token + 1 + i) % tiny::n_vocab;
        CHECK_EQ(l.eval({ other }, pos + 1), ENTMTP_OK); // in the tree, as every token is

        const float * row  = entmtp_decoder_logits(l.dec.get());
        const int32_t best = (int32_t) (std::max_element(row, row + tiny::n_vocab) - row);
        CHECK_EQ(entmtp_decoder_sample_typical(l.dec.get(), 1.0f, 1e-9f, 1.0f, &token), ENTMTP_OK);
        CHECK_EQ(token, best);
    }
}

int main() {
    tiny::be_quiet();
    base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
    if (!CHECK(base)) {
        return check_result("test_decoder");
    }

    tiny::head_options o;
    o.bias = true;
    tiny::write_heads(dir / "medusa.gguf", o);
    o.d2t = { 3, 39, 20, 0, 17, 5, 8, 30, 12, 22 };
    tiny::write_heads(dir / "medusa-d2t.gguf", o);
    o          = {};
    o.arch     = "hydra";
    o.grounded = true;
    tiny::write_heads(dir / "hydra.gguf", o);
    o.prefix = true;
    tiny::write_heads(dir / "hydra-prefix.gguf", o);

    test_same_tokens();
    test_settle();
    test_logits();
    test_rewind();
    test_cancel();
    test_context_full();
    test_errors();
    test_typical();
    test_changes_in_a_step();

    base.reset();
    llama_backend_free();
    return check_result("test_decoder");
}
