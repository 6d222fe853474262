// Several sequences that share the passes of a context: each in a thread of its own, with what it would have alone.

#include "loop.h"

#include "entmtp_group.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

struct group_deleter {
    void operator()(entmtp_group * p) { entmtp_group_free(p); }
};
using group_ptr   = std::unique_ptr<entmtp_group, group_deleter>;
using sampler_ptr = std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)>;

static constexpr int32_t n_seq = 4, n_ctx = 256;

static llama_context_params params_of(uint32_t n_cells) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = n_cells;
    params.n_batch = params.n_ubatch = 128;
    params.n_threads = params.n_threads_batch = 1;
    params.n_seq_max                          = n_seq;
    params.kv_unified                         = true;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED; // these heads are too narrow for our kernel
    return params;
}

static tiny::context_ptr shared_context(uint32_t n_cells = n_seq * n_ctx) {
    return tiny::context_ptr(llama_init_from_model(base.get(), params_of(n_cells)));
}

static sampler_ptr drawing(uint32_t seed) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(chain, llama_sampler_init_temp(0.9f));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(seed));
    return { chain, llama_sampler_free };
}

// one tree of the bank for every step, or none
static void draft_from(entmtp_decoder * dec, int32_t tree) {
    const bank b = make_bank();
    CHECK_EQ(
        entmtp_decoder_set_trees(dec, (int32_t) b.n_nodes.size(), b.n_nodes.data(), b.parent.data(), b.rank.data()),
        ENTMTP_OK);
    entmtp_policy_params p = {};
    p.policy               = tree ? ENTMTP_POLICY_STATIC : ENTMTP_POLICY_OFF;
    p.static_tree          = tree;
    CHECK_EQ(entmtp_decoder_set_policy(dec, &p), ENTMTP_OK);
}

// n tokens after a prompt; fewer where it was cancelled
static tokens write(entmtp_decoder * dec, const tokens & text, uint32_t seed, int32_t n) {
    const sampler_ptr sampler = drawing(seed);
    tokens            res;
    int32_t           status = entmtp_decoder_eval(dec, text.data(), (int32_t) text.size(), 0, false);
    while (status == ENTMTP_OK && (int32_t) res.size() < n) {
        int32_t token = -1;
        CHECK_EQ(entmtp_decoder_sample(dec, sampler.get(), &token), ENTMTP_OK);
        res.push_back(token);
        status = entmtp_decoder_eval(dec, &token, 1, (int32_t) (text.size() + res.size()) - 1, false);
    }
    CHECK(status == ENTMTP_OK || status == ENTMTP_CANCELLED);
    return res;
}

struct request {
    tokens   text;
    uint32_t seed;
    int32_t  n;
    bool     cancel; // some time
    tokens   alone;
};

static std::vector<request> requests() {
    std::mt19937         rng(3);
    std::vector<request> res;
    for (uint32_t i = 0; i < 48; ++i) {
        request      r      = { {}, i % 5, (int32_t) (rng() % 40) + 1, i % 6 == 5, {} };
        // some begin alike; some are long, and come in pieces while others wait
        const size_t n_text = i % 4 == 0 ? 60 + rng() % 60 : 2 + rng() % 10;
        for (size_t t = 0; t < n_text; ++t) {
            r.text.push_back(t < 8 ? (int32_t) (t * 7 % tiny::n_vocab) : (int32_t) (rng() % tiny::n_vocab));
        }
        res.push_back(r);
    }
    tiny::context_ptr ctx = shared_context();
    decoder_ptr       dec(entmtp_decoder_init(ctx.get(), nullptr));
    for (request & r : res) {
        r.alone = write(dec.get(), r.text, r.seed, r.n);
        CHECK_EQ((int32_t) r.alone.size(), r.n);
    }
    return res;
}

static void test_texts(int32_t tree, bool lazy) {
    const std::vector<request> all = requests();
    tiny::context_ptr          ctx = shared_context();
    const group_ptr            group(entmtp_group_init(ctx.get(), nullptr, n_seq, n_ctx));
    if (!CHECK(group)) {
        return;
    }
    entmtp_group_set_stall(group.get(), 1.0); // prompts in the smallest pieces
    std::atomic<size_t>      next{ 0 };
    std::vector<tokens>      said(all.size());
    std::vector<std::thread> users;
    for (int32_t i = 0; i < n_seq; ++i) {
        users.emplace_back([&, i] {
            entmtp_decoder * dec = entmtp_group_decoder(group.get(), i);
            draft_from(dec, tree);
            for (size_t k = next++; k < all.size(); k = next++) {
                const request & r = all[k];
                entmtp_decoder_resume(dec);
                for (int32_t other = 0; other < n_seq; ++other) {
                    entmtp_decoder * from = entmtp_group_decoder(group.get(), other);
                    if (other != i && entmtp_decoder_in_common(from, r.text.data(), (int32_t) r.text.size()) >= 8) {
                        const int32_t n = entmtp_decoder_share(dec, from, r.text.data(), (int32_t) r.text.size());
                        CHECK(n >= 0 && n <= (int32_t) r.text.size());
                        break;
                    }
                }
                entmtp_group_set_active(group.get(), i, true);
                std::thread canceller;
                if (r.cancel) {
                    canceller = std::thread([dec, k] {
                        std::this_thread::sleep_for(std::chrono::microseconds(200 * (k % 7)));
                        entmtp_decoder_cancel(dec);
                    });
                }
                said[k] = write(dec, r.text, r.seed, r.n);
                if (canceller.joinable()) {
                    canceller.join();
                }
                if (lazy && k % 3 == 0) { // still active, and not there
                    std::this_thread::sleep_for(std::chrono::milliseconds(30));
                }
                entmtp_group_set_active(group.get(), i, false);
            }
        });
    }
    for (std::thread & user : users) {
        user.join();
    }
    for (size_t k = 0; k < all.size(); ++k) {
        if (all[k].cancel) { // what came is right
            CHECK(said[k].size() <= all[k].alone.size() &&
                  std::equal(said[k].begin(), said[k].end(), all[k].alone.begin()));
        } else {
            CHECK(said[k] == all[k].alone);
        }
    }
    int64_t n_passes = 0, n_parts = 0, n_tokens = 0;
    entmtp_group_get_passes(group.get(), &n_passes, &n_parts, &n_tokens);
    CHECK(n_passes > 0 && n_parts > n_passes && n_tokens > n_parts);
}

static void test_sharing() {
    tiny::context_ptr ctx = shared_context();
    const group_ptr   group(entmtp_group_init(ctx.get(), nullptr, n_seq, n_ctx));
    entmtp_decoder *  first = entmtp_group_decoder(group.get(), 0), *second = entmtp_group_decoder(group.get(), 1);

    const tokens text = { 3, 4, 5, 6, 7, 8, 9, 10 };
    CHECK_EQ(entmtp_decoder_eval(first, text.data(), 8, 0, false), ENTMTP_OK);
    CHECK_EQ(entmtp_decoder_in_common(first, text.data(), 8), 8);
    const tokens other = { 3, 4, 5, 1, 1 };
    CHECK_EQ(entmtp_decoder_in_common(first, other.data(), 5), 3);
    CHECK_EQ(entmtp_decoder_share(second, first, other.data(), 5), 3);
    CHECK_EQ(entmtp_decoder_n_evaluated(second), -1); // nothing to sample from yet
    CHECK_EQ(entmtp_decoder_eval(second, other.data() + 3, 2, 3, false), ENTMTP_OK);
    // the cells are the first one's as well: it goes, and leaves them
    CHECK_EQ(entmtp_decoder_clear(first), ENTMTP_OK);
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0), -1);
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 1), 4);

    tiny::context_ptr own = shared_context();
    const decoder_ptr alone(entmtp_decoder_init(own.get(), nullptr));
    CHECK(entmtp_decoder_share(second, alone.get(), other.data(), 5) < 0); // of no group
    CHECK(entmtp_decoder_share(second, second, other.data(), 5) < 0);
}

// a memory that is a state in part has none that two texts could share
static void test_states() {
    const auto           hybrid = tiny::load_base(tiny::make_hybrid().write(dir / "hybrid.gguf"));
    llama_context_params params = llama_context_default_params();
    params.n_seq_max            = n_seq;
    params.n_ctx                = n_seq * n_ctx;
    params.kv_unified           = true;
    const tiny::context_ptr ctx(llama_init_from_model(hybrid.get(), params));
    CHECK(!entmtp_group_init(ctx.get(), nullptr, n_seq, n_ctx));
    CHECK_HAS(entmtp_last_error(), "cannot hold several texts");
    const group_ptr alone(entmtp_group_init(ctx.get(), nullptr, 1, n_ctx));
    CHECK(alone);
}

// who was never said to be active keeps what he evaluated, though others go on
static void test_inactive() {
    tiny::context_ptr ctx = shared_context(), own = shared_context();
    const group_ptr   group(entmtp_group_init(ctx.get(), nullptr, n_seq, n_ctx));
    const decoder_ptr alone(entmtp_decoder_init(own.get(), nullptr));
    const tokens      text = { 3, 4, 5 }, other = { 9, 8, 7, 6, 5, 4 };
    entmtp_decoder *  first = entmtp_group_decoder(group.get(), 0), *second = entmtp_group_decoder(group.get(), 1);
    const sampler_ptr one = drawing(1), two = drawing(1);
    int32_t           token = -1, expected = -1;
    for (const int32_t n_more : { 0, 1 }) { // as a prompt, and as a token after it
        const tokens part = n_more ? tokens{ 6 } : text;
        for (entmtp_decoder * dec : { first, alone.get() }) {
            CHECK_EQ(entmtp_decoder_eval(dec, part.data(), (int32_t) part.size(), 3 * n_more, false), ENTMTP_OK);
        }
        CHECK_EQ(entmtp_decoder_eval(second, other.data(), 6, 0, false), ENTMTP_OK);
        CHECK_EQ(entmtp_decoder_sample(first, one.get(), &token), ENTMTP_OK);
        CHECK_EQ(entmtp_decoder_sample(alone.get(), two.get(), &expected), ENTMTP_OK);
        CHECK_EQ(token, expected);
    }
}

// each has its own room, whatever the others leave free
static void test_room() {
    tiny::context_ptr ctx = shared_context();
    const group_ptr   group(entmtp_group_init(ctx.get(), nullptr, n_seq, 16));
    entmtp_decoder *  dec = entmtp_group_decoder(group.get(), 0);
    const tokens      text(17, 5);
    CHECK_EQ(entmtp_decoder_eval(dec, text.data(), 17, 0, false), ENTMTP_CONTEXT_FULL);
    CHECK_EQ(entmtp_decoder_eval(dec, text.data(), 15, 0, false), ENTMTP_OK);
    CHECK_EQ(entmtp_decoder_eval(dec, text.data(), 1, 15, false), ENTMTP_OK);
    CHECK_EQ(entmtp_decoder_eval(dec, text.data(), 1, 16, false), ENTMTP_CONTEXT_FULL);
    CHECK_HAS(entmtp_last_error(), "16 of 16 positions");
    CHECK_EQ(entmtp_decoder_n_evaluated(dec), -1);
    CHECK_EQ(entmtp_decoder_n_held(dec), 16); // what it has evaluated stays, though it cannot be sampled after
    CHECK_EQ(entmtp_decoder_eval(dec, text.data(), 2, 12, false), ENTMTP_OK);
    CHECK_EQ(entmtp_decoder_n_held(dec), 14);
    entmtp_decoder_invalidate(dec, 0); // the text is forgotten, its cells are not free
    CHECK_EQ(entmtp_decoder_n_held(dec), 14);
    CHECK_EQ(entmtp_decoder_clear(dec), ENTMTP_OK);
    CHECK_EQ(entmtp_decoder_n_held(dec), 0);
    CHECK_EQ(entmtp_decoder_n_held(nullptr), 0);
}

// cells for the texts alone: a tree that does not fit beside another's tokens is left out, and those tokens are not
static void test_no_room_for_trees() {
    constexpr int32_t most = 128;
    tiny::context_ptr ctx = shared_context(2 * most), own = shared_context();
    const group_ptr   group(entmtp_group_init(ctx.get(), nullptr, 2, n_ctx));
    const decoder_ptr alone(entmtp_decoder_init(own.get(), nullptr));
    struct text {
        tokens   begin;
        uint32_t seed;
        tokens   rest;
    };
    std::vector<text> texts[2];
    for (int32_t i = 0; i < 2; ++i) {
        for (uint32_t k = 0; k < 8; ++k) {
            tokens begin(k % 2 ? 20 : 100);
            for (size_t t = 0; t < begin.size(); ++t) {
                begin[t] = (int32_t) ((t * (3 + k) + (size_t) i) % tiny::n_vocab);
            }
            texts[i].push_back({ begin, k, write(alone.get(), begin, k, most - (int32_t) begin.size()) });
        }
    }
    std::vector<std::thread> users;
    for (int32_t i = 0; i < 2; ++i) {
        users.emplace_back([&, i] {
            entmtp_decoder * dec = entmtp_group_decoder(group.get(), i);
            draft_from(dec, i == 0 ? (int32_t) bushy : 0);
            entmtp_group_set_active(group.get(), i, true);
            for (const text & t : texts[i]) {
                CHECK(write(dec, t.begin, t.seed, (int32_t) t.rest.size()) == t.rest);
            }
            entmtp_group_set_active(group.get(), i, false);
        });
    }
    for (std::thread & user : users) {
        user.join();
    }
}

// fewer tokens in a pass than texts: llama.cpp would split it, and keep the rows of the last piece alone
static void test_small_passes() {
    for (const int32_t mode : { ENTMTP_OUTPUTS_HOST, ENTMTP_OUTPUTS_ROWS, ENTMTP_OUTPUTS_DEVICE }) {
        tokens texts[2][n_seq];
        for (const bool company : { false, true }) {
            llama_context_params params = params_of(n_seq * n_ctx);
            params.n_ubatch             = 2;
            const tiny::context_ptr ctx(llama_init_from_model(base.get(), params));
            const group_ptr         group(entmtp_group_init(ctx.get(), nullptr, n_seq, n_ctx));
            CHECK_EQ(entmtp_decoder_set_outputs(entmtp_group_decoder(group.get(), 0), mode), ENTMTP_OK);

            const auto run = [&](int32_t i) {
                entmtp_decoder * dec = entmtp_group_decoder(group.get(), i);
                texts[company][i]    = write(dec, { 1, 17 + i }, (uint32_t) i, 16);
                entmtp_group_set_active(group.get(), i, false);
            };
            for (int32_t i = 0; company && i < n_seq; ++i) {
                entmtp_group_set_active(group.get(), i, true);
            }
            std::vector<std::thread> users;
            for (int32_t i = 0; i < n_seq; ++i) {
                if (company) {
                    users.emplace_back(run, i);
                } else {
                    entmtp_group_set_active(group.get(), i, true);
                    run(i);
                }
            }
            for (std::thread & user : users) {
                user.join();
            }
        }
        for (int32_t i = 0; i < n_seq; ++i) {
            CHECK_EQ((int32_t) texts[0][i].size(), 16);
            CHECK(texts[0][i] == texts[1][i]);
        }
    }
}

// a state that was asked for stays the caller's while another text's pass runs
static void test_hidden_states() {
    const tiny::context_ptr ctx = shared_context();
    const heads_ptr         heads(entmtp_heads_load((dir / "medusa.gguf").c_str(), base.get(), 1));
    const group_ptr         group(entmtp_group_init(ctx.get(), heads.get(), 2, n_ctx));
    entmtp_decoder *        a        = entmtp_group_decoder(group.get(), 0);
    const int32_t           first[]  = { 1, 17, 4 };
    const int32_t           second[] = { 1, 33, 9 };
    CHECK_EQ(entmtp_decoder_eval(a, first, 3, 0, false), ENTMTP_OK);
    const float * h = entmtp_decoder_hidden(a);
    if (!CHECK(h)) {
        return;
    }
    const std::vector<float> before(h, h + tiny::n_embd);
    CHECK_EQ(entmtp_decoder_eval(entmtp_group_decoder(group.get(), 1), second, 3, 0, false), ENTMTP_OK);
    CHECK(std::equal(before.begin(), before.end(), h));
}

static void test_groups_that_cannot_be() {
    llama_context_params apart = params_of(n_seq * n_ctx);
    apart.kv_unified           = false;
    const tiny::context_ptr each(llama_init_from_model(base.get(), apart));
    CHECK(!entmtp_group_init(each.get(), nullptr, 2, 64));
    CHECK(strstr(entmtp_last_error(), "kv_unified"));

    tiny::context_ptr ctx = shared_context();
    CHECK(!entmtp_group_init(nullptr, nullptr, 2, 64));
    CHECK(!entmtp_group_init(ctx.get(), nullptr, n_seq + 1, 64));
    CHECK(!entmtp_group_init(ctx.get(), nullptr, 0, 64));
    CHECK(!entmtp_group_init(ctx.get(), nullptr, 2, 0));
    const group_ptr group(entmtp_group_init(ctx.get(), nullptr, 2, 64));
    CHECK(group && !entmtp_group_decoder(group.get(), 2) && !entmtp_group_decoder(group.get(), -1));
    CHECK(!entmtp_group_decoder(nullptr, 0));
}

int main() {
    CHECK_EQ(entmtp_kernels_enable(nullptr), ENTMTP_OK); // whose bits do not depend on the pass
    if (set_up()) {
        test_texts(0, false);
        test_texts(chain, true);
        test_texts(bushy, false);
        test_sharing();
        test_states();
        test_inactive();
        test_room();
        test_no_room_for_trees();
        test_small_passes();
        test_hidden_states();
        test_groups_that_cannot_be();
    }
    return tear_down("test_group");
}
