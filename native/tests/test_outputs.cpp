// What the host learns of a pass: reductions agree with the rows, candidates with the whole row, and little is copied.

#include "candidates.h"
#include "entropy.h"
#include "loop.h"
#include "reduce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

static tiny::sampler_ptr new_chain() {
    return tiny::sampler_ptr(llama_sampler_chain_init(llama_sampler_chain_default_params()));
}

static void test_needed() {
    const auto needs = [](std::initializer_list<llama_sampler *> samplers) {
        auto c = new_chain();
        for (llama_sampler * s : samplers) {
            llama_sampler_chain_add(c.get(), s);
        }
        return entmtp::candidates_needed(c.get(), 65);
    };
    const auto none = [] {
        return llama_sampler_init_penalties(0, 64, 1.0f, 0.0f, 0.0f); // without effect
    };

    CHECK_EQ(needs({ llama_sampler_init_greedy() }), 1);
    CHECK_EQ(needs({ none(), llama_sampler_init_top_p(1.0f, 1), llama_sampler_init_greedy() }), 1);
    CHECK_EQ(needs({ llama_sampler_init_top_k(40), llama_sampler_init_dist(1) }), 41);
    CHECK_EQ(needs({ none(), llama_sampler_init_top_k(1), llama_sampler_init_dist(1) }), 2);
    CHECK_EQ(needs({ llama_sampler_init_top_k(64), llama_sampler_init_dist(1) }), 65);

    // the whole row
    CHECK_EQ(needs({}), 0);
    CHECK_EQ(needs({ none() }), 0);
    CHECK_EQ(needs({ llama_sampler_init_top_k(65), llama_sampler_init_dist(1) }), 0);
    CHECK_EQ(needs({ llama_sampler_init_top_k(0), llama_sampler_init_dist(1) }), 0);
    CHECK_EQ(needs({ llama_sampler_init_dist(1) }), 0);
    CHECK_EQ(needs({ llama_sampler_init_temp(0.8f), llama_sampler_init_top_k(40), llama_sampler_init_dist(1) }), 0);
    CHECK_EQ(needs({ llama_sampler_init_penalties(tiny::n_vocab, 64, 1.1f, 0.0f, 0.0f), llama_sampler_init_greedy() }),
             0);
    CHECK_EQ(needs({ llama_sampler_init_greedy(), llama_sampler_init_top_k(4) }), 0);
    CHECK_EQ(needs({ llama_sampler_init_mirostat_v2(1, 5.0f, 0.1f) }), 0);

    tiny::sampler_ptr alone(llama_sampler_init_greedy());
    CHECK_EQ(entmtp::candidates_needed(alone.get(), 65), 1);
    tiny::sampler_ptr dist(llama_sampler_init_dist(1));
    CHECK_EQ(entmtp::candidates_needed(dist.get(), 65), 0);
}

using sampler_maker = std::function<llama_sampler *()>;

// a chain of one to four samplers from all that llama.cpp has without a vocabulary
static std::vector<sampler_maker> random_chain(std::mt19937 & rng) {
    const auto uniform = [&](float a, float b) {
        return std::uniform_real_distribution<float>(a, b)(rng);
    };
    const int32_t  k = std::uniform_int_distribution<int32_t>(0, 70)(rng);
    const float    p = uniform(0.3f, 1.0f), t = uniform(0.1f, 2.0f);
    const uint32_t seed = rng();

    const std::vector<sampler_maker> all = {
        [=] { return llama_sampler_init_top_k(k); },
        [=] { return llama_sampler_init_top_k(k); },
        [=] { return llama_sampler_init_top_p(p, 1); },
        [=] { return llama_sampler_init_min_p(1.0f - p, 1); },
        [=] { return llama_sampler_init_typical(p, 1); },
        [=] { return llama_sampler_init_temp(t); },
        [=] { return llama_sampler_init_temp_ext(t, 0.2f, 1.0f); },
        [=] { return llama_sampler_init_xtc(0.5f, 0.1f, 1, seed); },
        [=] { return llama_sampler_init_top_n_sigma(t); },
        [=] { return llama_sampler_init_penalties(0, 8, 1.0f, 0.0f, 0.0f); },
        [=] { return llama_sampler_init_penalties(1000, 8, 1.2f, 0.1f, 0.1f); },
    };
    std::vector<sampler_maker> res;
    for (uint32_t n = rng() % 4; n > 0; --n) {
        res.push_back(all[rng() % all.size()]);
    }
    switch (rng() % 4) {
        case 0:
            res.push_back([=] { return llama_sampler_init_greedy(); });
            break;
        case 1:
            res.push_back([=] { return llama_sampler_init_mirostat_v2(seed, 4.0f, 0.1f); });
            break;
        default:
            res.push_back([=] { return llama_sampler_init_dist(seed); });
    }
    return res;
}

// one chain on whole rows, its twin on candidates: the same tokens, draw after draw
static void test_candidates() {
    constexpr int32_t n_vocab = 1000, k = 65;

    std::mt19937 rng(5);
    int32_t      n_used = 0, n_tied = 0;
    for (int32_t round = 0; round < 1500; ++round) {
        const auto make  = random_chain(rng);
        auto       whole = new_chain(), few = new_chain();
        for (const auto & m : make) {
            llama_sampler_chain_add(whole.get(), m());
            llama_sampler_chain_add(few.get(), m());
        }
        const int32_t needed = entmtp::candidates_needed(few.get(), k);
        if (needed == 0) {
            continue;
        }
        std::normal_distribution<float> normal(0.0f, 3.0f);
        const float                     grid = round % 3 == 0 ? 4.0f : 0.0f; // ties, or none

        for (int32_t i = 0; i < 8; ++i) {
            std::vector<llama_token_data> row(n_vocab), best;
            for (int32_t t = 0; t < n_vocab; ++t) {
                const float x = normal(rng);
                row[t]        = { t, grid > 0.0f ? std::round(x * grid) / grid : x, 0.0f };
            }
            // the device chooses among ties as it likes
            best = row;
            std::shuffle(best.begin(), best.end(), rng);
            std::stable_sort(best.begin(), best.end(), [](auto & a, auto & b) { return a.logit > b.logit; });
            best.resize(k);
            std::shuffle(best.begin(), best.end(), rng);

            const bool ok = entmtp::candidates_suffice(best, needed, n_vocab);
            n_tied += !ok;
            n_used += ok;
            std::vector<llama_token_data> second = ok ? best : row;

            int32_t chosen[2];
            for (const bool is_few : { false, true }) {
                auto &                 tokens = is_few ? second : row;
                llama_sampler *        s      = (is_few ? few : whole).get();
                llama_token_data_array a      = { tokens.data(), tokens.size(), -1, false };
                llama_sampler_apply(s, &a);
                if (!CHECK(a.selected >= 0)) {
                    return;
                }
                chosen[is_few] = a.data[a.selected].id;
                llama_sampler_accept(s, chosen[is_few]);
            }
            if (!CHECK_EQ(chosen[0], chosen[1])) {
                return;
            }
        }
    }
    CHECK(n_used > 1000);
    CHECK(n_tied > 100);

    // nan is no candidate, and a whole row needs no order
    std::vector<llama_token_data> c = { { 3, NAN, 0 }, { 1, 2.0f, 0 } };
    CHECK(!entmtp::candidates_suffice(c, 1, 9));
    c = { { 1, 2.0f, 0 }, { 0, 2.0f, 0 } };
    CHECK(!entmtp::candidates_suffice(c, 2, 9));
    CHECK(!entmtp::candidates_suffice(c, 1, 9)); // a third one may be as large, and come first
    CHECK(entmtp::candidates_suffice(c, 2, 2));
    CHECK_EQ(c[0].id, 0);
}

// the graph's answer for random rows, with ties and -inf among them
static void test_reductions() {
    constexpr int32_t n = 7;

    struct way {
        int32_t k;
        bool    by_chunks;
        int32_t n_vocab;
    };
    for (const auto & [k, by_chunks, n_vocab] :
         { way{ 1, false, 500 }, way{ 65, false, 500 }, way{ 65, true, 500 }, way{ 65, true, 4096 },
           way{ 65, true, 3 * 1024 + 20 }, way{ 65, true, 5 * 1024 + 700 } }) {
        ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_cgraph *    gf     = ggml_new_graph(ctx.get());
        ggml_tensor *    logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_vocab, n);
        ggml_set_output(logits);

        // as llama.cpp offers it: the first row of the padded logits
        entmtp::reducer r(k, by_chunks);
        ggml_tensor *   padded = ggml_pad(ctx.get(), logits, 0, 1, 0, 0);
        r.build(ctx.get(), gf, ggml_view_1d(ctx.get(), padded, n_vocab, 0));
        const entmtp::reduction * found = r.find(logits);
        if (!CHECK(found)) {
            return;
        }
        CHECK_EQ(found->k, k);
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            CHECK(ggml_graph_node(gf, i) != padded); // nothing is padded for it
        }
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.get()));

        std::vector<float>              rows(n_vocab * n);
        std::mt19937                    rng(3);
        std::normal_distribution<float> normal(0.0f, 2.0f);
        for (auto & x : rows) {
            x = normal(rng);
        }
        rows[1 * n_vocab + 20] = rows[1 * n_vocab + 400] = 30.0f;                                         // a tie
        rows[2 * n_vocab + 3]                            = 90.0f;                                         // certain
        std::fill(&rows[3 * n_vocab], &rows[3 * n_vocab] + n_vocab, 1.5f);                                // all alike
        std::fill(&rows[4 * n_vocab], &rows[4 * n_vocab] + 250, -std::numeric_limits<float>::infinity()); // forbidden
        ggml_backend_tensor_set(logits, rows.data(), 0, ggml_nbytes(logits));
        CHECK_EQ(ggml_backend_graph_compute(cpu.get(), gf), GGML_STATUS_SUCCESS);

        const int32_t        width = entmtp::reduction::width(k);
        std::vector<float>   values(width * n);
        std::vector<int32_t> ids(k * n);
        CHECK_EQ(ggml_nbytes(found->values), values.size() * sizeof(float));
        CHECK_EQ(found->by_chunks, by_chunks && n_vocab > 2048);
        ids.resize(ggml_nelements(found->ids));
        CHECK_EQ(ids.size(), (size_t) (found->by_chunks ? 2 : 1) * k * n);
        ggml_backend_tensor_get(found->values, values.data(), 0, ggml_nbytes(found->values));
        ggml_backend_tensor_get(found->ids, ids.data(), 0, ggml_nbytes(found->ids));
        found->to_tokens(ids, n_vocab);
        CHECK_EQ(ids.size(), (size_t) k * n);

        for (int32_t i = 0; i < n; ++i) {
            const float * row      = &rows[i * n_vocab];
            const float * v        = &values[i * width];
            const auto    expected = entmtp::describe(row, n_vocab);
            CHECK_NEAR(-v[k + 1], expected.entropy, 2e-5 * (1.0 + expected.entropy));
            CHECK_NEAR(v[k], std::exp(expected.log_max), 1e-6);

            std::vector<float> sorted(row, row + n_vocab);
            std::sort(sorted.rbegin(), sorted.rend());
            for (int32_t c = 0; c < k; ++c) {
                const float x = row[ids[i * k + c]];
                CHECK(x == v[c]);
                CHECK(x >= sorted[k - 1]);
                CHECK(std::count(&ids[i * k], &ids[i * k] + k, ids[i * k + c]) == 1);
            }
            if (k == 1) {
                const auto n_best = std::count(sorted.begin(), sorted.end(), sorted[0]);
                CHECK(v[3] == (float) (n_best - n_vocab));
            }
        }
    }

    constexpr int32_t n_vocab = 500;

    // a prompt's rows are left alone
    ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_cgraph *    gf = ggml_new_graph(ctx.get());
    entmtp::reducer  r(1);
    ggml_tensor *    logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_vocab, 65);
    ggml_tensor *    row    = ggml_view_1d(ctx.get(), ggml_pad(ctx.get(), logits, 0, 1, 0, 0), n_vocab, 0);
    r.build(ctx.get(), gf, row);
    CHECK(!r.find(logits));
    CHECK_EQ(ggml_graph_n_nodes(gf), 0);

    // one fewer are a pass, and what was found of it is not what a later prompt at the same place has
    logits->ne[1] = 64;
    r.build(ctx.get(), gf, row);
    CHECK(r.find(logits));
    logits->ne[1] = 65;
    r.build(ctx.get(), gf, row);
    CHECK(!r.find(logits));
}

// what a device can find, by the ops that it has
static void test_ops() {
    ggml_backend_dev_t cpu  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto         most = [&](ggml_op lacks, const char * missing, bool by_chunks = false) {
        std::string   found;
        const int32_t k = entmtp::reducer::most_candidates(
            [&](const ggml_tensor * op) { return op->op != lacks && ggml_backend_dev_supports_op(cpu, op); }, 128000,
            65, by_chunks, found);
        CHECK_EQ(k == 65, found.empty());
        CHECK_HAS(found, missing);
        return k;
    };
    CHECK_EQ(most(GGML_OP_NONE, ""), 65);
    CHECK_EQ(most(GGML_OP_CONV_2D, ""), 65);
    CHECK_EQ(most(GGML_OP_NONE, "", true), 65);
    CHECK_EQ(most(GGML_OP_TOP_K, "TOP_K"), 1);
    CHECK_EQ(most(GGML_OP_ARGSORT, "ARGSORT", true), 1);
    CHECK_EQ(most(GGML_OP_ARGMAX, "ARGMAX"), 0);
    CHECK_EQ(most(GGML_OP_SOFT_MAX, "SOFT_MAX"), 0);
}

// the same signals, however they were computed
static void test_signals() {
    outputs_mode = ENTMTP_OUTPUTS_HOST;
    loop host("hydra.gguf");
    outputs_mode = ENTMTP_OUTPUTS_DEVICE;
    loop device("hydra.gguf");
    host.use_tree(bushy);
    device.use_tree(bushy);

    for (const bool is_greedy : { true, false }) {
        std::vector<entmtp_signals> seen[2];
        tokens                      got[2];
        for (const int32_t i : { 0, 1 }) {
            auto chain = new_chain();
            llama_sampler_chain_add(chain.get(), is_greedy ? llama_sampler_init_greedy() : llama_sampler_init_top_k(8));
            if (!is_greedy) {
                llama_sampler_chain_add(chain.get(), llama_sampler_init_dist(9));
            }
            got[i] = run(i ? device : host, chain.get(), 60, [&](loop & l, int32_t at) {
                for (const int32_t token : { at % tiny::n_vocab, 7 }) {
                    entmtp_signals s = {};
                    CHECK_EQ(entmtp_decoder_signals(l.dec.get(), token, &s), ENTMTP_OK);
                    seen[i].push_back(s);
                }
            });
        }
        CHECK(got[0] == got[1]);
        CHECK_EQ(seen[0].size(), 120);
        for (size_t i = 0; i < seen[0].size(); ++i) {
            CHECK_NEAR(seen[0][i].entropy, seen[1][i].entropy, 1e-4);
            CHECK_NEAR(seen[0][i].top1, seen[1][i].top1, 1e-5);
            CHECK_NEAR(seen[0][i].log_root, seen[1][i].log_root, 1e-4);
        }
    }
    CHECK(host.n_accepted() > 0);
}

// bytes and graphs per step, on the backend that is here
static void test_traffic() {
    for (const char * path : all_heads) {
        const bool is_prefix = strstr(path, "prefix") != nullptr;

        outputs_mode = ENTMTP_OUTPUTS_DEVICE;
        loop                l(path);
        entmtp_outputs_info info = {};
        entmtp_decoder_get_outputs(l.dec.get(), &info);
        CHECK_EQ(info.mode, ENTMTP_OUTPUTS_DEVICE);
        CHECK_HAS(info.device, "CPU");
        CHECK_EQ(strlen(info.note), 0);

        for (const int32_t tree : { 0, chain, bushy, every_token }) {
            l.use_tree(tree);
            run(l, greedy().get(), 30); // the first step builds the graphs
            const auto before  = l.traffic();
            const auto n_steps = (int64_t) l.steps().size();
            generate(l, greedy().get(), 40, (int32_t) prompt.size() + 30);
            const auto    t = l.traffic();
            const int64_t n = (int64_t) l.steps().size() - n_steps;

            const int64_t n_outputs = t.n_outputs - before.n_outputs;
            CHECK_EQ(t.n_passes - before.n_passes, n);
            CHECK(n_outputs >= n);

            // 4 floats and a token per node; a guess is a token, and a level of k guesses may be used by one node
            CHECK(t.to_host - before.to_host <= n * 4 * 3 * tiny::n_vocab + 20 * n_outputs);
            CHECK_EQ(t.n_rows, before.n_rows);
            CHECK_EQ(t.n_graphs, before.n_graphs);
            if (!is_prefix) {
                CHECK_EQ(t.n_draft_graphs, before.n_draft_graphs);
                CHECK_EQ(t.to_device - before.to_device, tree == 0 || !strstr(path, "hydra") ? 0 : 4 * n);
                CHECK_EQ(t.on_device - before.on_device, tree == 0 ? 0 : 4 * tiny::n_embd * n);
            } else {
                // every settled token goes through the prefix layer, and its last output into the draft
                CHECK(t.on_device - before.on_device >= 4 * tiny::n_embd * 39);
            }
            CHECK(t.n_syncs - before.n_syncs <= (is_prefix ? 16 : 6) * n);
        }
    }

    // by way of the host, every row comes along
    outputs_mode = ENTMTP_OUTPUTS_HOST;
    loop host("medusa.gguf");
    host.use_tree(bushy);
    run(host, greedy().get(), 30);
    const auto t = host.traffic();
    CHECK_EQ(t.n_rows, t.n_outputs);
    CHECK(t.to_host >= 4 * t.n_outputs * (tiny::n_vocab + tiny::n_embd));

    // row by row, each that is visited, in every pass anew
    outputs_mode = ENTMTP_OUTPUTS_ROWS;
    loop by_row("medusa.gguf");
    by_row.use_tree(bushy);
    run(by_row, greedy().get(), 30);
    CHECK_EQ(by_row.traffic().n_rows, 30);

    // the most probable token's logit came with the reduction, after a prompt as in a tree
    outputs_mode = ENTMTP_OUTPUTS_DEVICE;
    loop device("medusa.gguf");
    device.use_tree(bushy);
    CHECK_EQ(device.eval(prompt, 0), ENTMTP_OK);
    for (int32_t i = 0; i < 20; ++i) {
        int32_t token = -1;
        CHECK_EQ(entmtp_decoder_sample(device.dec.get(), greedy().get(), &token), ENTMTP_OK);
        const auto     before = device.traffic().to_host;
        entmtp_signals s      = {};
        CHECK_EQ(entmtp_decoder_signals(device.dec.get(), token, &s), ENTMTP_OK);
        CHECK_EQ(device.traffic().to_host, before);
        CHECK_NEAR(s.log_root, std::log(s.top1), 1e-5);
        CHECK_EQ(device.eval({ token }, (int32_t) prompt.size() + i), ENTMTP_OK);
    }

    CHECK_EQ(entmtp_decoder_set_outputs(host.dec.get(), 17), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "no such mode");
}

// from greedy to sampling and back, with the mode changed on the way: the text is plain decoding's
static void test_changes() {
    outputs_mode       = ENTMTP_OUTPUTS_HOST;
    const auto sampler = [](int32_t i) {
        auto c = new_chain();
        if (i % 2) {
            llama_sampler_chain_add(c.get(), llama_sampler_init_top_k(6));
        }
        llama_sampler_chain_add(c.get(), i == 2  ? llama_sampler_init_dist(3)
                                         : i % 2 ? llama_sampler_init_dist((uint32_t) i)
                                                 : llama_sampler_init_greedy());
        return c;
    };
    loop   plain, l("hydra.gguf");
    tokens expected, got;
    l.use_tree(bushy);
    for (loop * x : { &plain, &l }) {
        CHECK_EQ(x->eval(prompt, 0), ENTMTP_OK);
        int32_t pos = (int32_t) prompt.size();
        for (int32_t i = 0; i < 8; ++i) {
            if (x == &l) {
                CHECK_EQ(entmtp_decoder_set_outputs(l.dec.get(), 1 + (i * 2 + i / 3) % 3), ENTMTP_OK);
            }
            const tokens some = generate(*x, sampler(i).get(), i == 4 ? 270 : 20, pos);
            auto &       all  = x == &l ? got : expected;
            all.insert(all.end(), some.begin(), some.end());
            pos += (int32_t) some.size();
        }
    }
    CHECK(got == expected);
}

// another policy between a pass and what is read of it: graphs go, the row stays
static void test_another_policy() {
    entmtp_policy_params policy = {};
    for (const int32_t mode : { ENTMTP_OUTPUTS_HOST, ENTMTP_OUTPUTS_ROWS, ENTMTP_OUTPUTS_DEVICE }) {
        outputs_mode = ENTMTP_OUTPUTS_HOST;
        loop plain;
        outputs_mode = mode;
        loop l;
        CHECK_EQ(plain.eval(prompt, 0), ENTMTP_OK);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        for (int32_t i = 0; i < 6; ++i) {
            policy.policy = i % 2 ? ENTMTP_POLICY_OFF : ENTMTP_POLICY_STATIC;
            CHECK_EQ(entmtp_decoder_set_policy(l.dec.get(), &policy), ENTMTP_OK);
            const float * a = entmtp_decoder_logits(l.dec.get());
            const float * b = entmtp_decoder_logits(plain.dec.get());
            if (!CHECK(a && b)) {
                return;
            }
            for (int32_t t = 0; t < tiny::n_vocab; ++t) {
                CHECK_NEAR(a[t], b[t], 1e-4);
            }
            int32_t token = -1, expected = -1;
            CHECK_EQ(entmtp_decoder_sample(plain.dec.get(), greedy().get(), &expected), ENTMTP_OK);
            CHECK_EQ(entmtp_decoder_sample(l.dec.get(), greedy().get(), &token), ENTMTP_OK);
            CHECK_EQ(token, expected);
            for (loop * x : { &plain, &l }) {
                CHECK_EQ(x->eval({ expected }, (int32_t) prompt.size() + i), ENTMTP_OK);
            }
        }
    }
    outputs_mode = ENTMTP_OUTPUTS_AUTO;
}

// a context for embeddings, too, gives rows of all tokens
static void test_embeddings() {
    tokens texts[2];
    for (const int32_t mode : { ENTMTP_OUTPUTS_HOST, ENTMTP_OUTPUTS_ROWS, ENTMTP_OUTPUTS_DEVICE }) {
        for (const bool embeddings : { false, true }) {
            outputs_mode = mode;
            loop l("medusa.gguf");
            llama_set_embeddings(l.ctx.get(), embeddings);
            l.use_tree(bushy);
            CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
            texts[embeddings] = generate(l, greedy().get(), 20, (int32_t) prompt.size());
        }
        CHECK(texts[0] == texts[1]);
    }
    outputs_mode = ENTMTP_OUTPUTS_AUTO;
}

int main() {
    if (set_up()) {
        test_needed();
        test_candidates();
        test_reductions();
        test_ops();
        test_signals();
        test_traffic();
        test_changes();
        test_another_policy();
        test_embeddings();
    }
    return tear_down("test_outputs");
}
