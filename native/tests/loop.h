// A context with its decoder and its bank, for the tests of the decode loop.

#pragma once

#include "entmtp.h"

#include "check.h"
#include "policies.h"
#include "tiny.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct heads_deleter {
    void operator()(entmtp_heads * p) { entmtp_heads_free(p); }
};
struct decoder_deleter {
    void operator()(entmtp_decoder * p) { entmtp_decoder_free(p); }
};

using heads_ptr   = std::unique_ptr<entmtp_heads, heads_deleter>;
using decoder_ptr = std::unique_ptr<entmtp_decoder, decoder_deleter>;
using tokens      = std::vector<int32_t>;

inline int32_t outputs_mode = ENTMTP_OUTPUTS_AUTO; // of the loops made from now on

inline tiny::folder    dir;
inline tiny::model_ptr base;

const tokens prompt = { 1, 17, 4, 33, 9, 9, 21, 30, 5, 12 };

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
        rank.insert(rank.end(), r.begin(), r.end());
    }
};

// a chain, a bushy tree and one that holds every token as the first guess
inline bank make_bank() {
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

constexpr int32_t chain = 1, bushy = 2, every_token = 3;

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
        CHECK_EQ(entmtp_decoder_set_outputs(dec.get(), outputs_mode), ENTMTP_OK);
        if (heads) {
            const bank b = make_bank();
            CHECK_EQ(entmtp_decoder_set_trees(dec.get(), (int32_t) b.n_nodes.size(), b.n_nodes.data(), b.parent.data(),
                                              b.rank.data()),
                     ENTMTP_OK);
        }
    }

    static constexpr int32_t n_levels = 3;

    float build = 0.0f; // us that a new graph costs

    // a pass over a few tokens costs little more than a pass over one, us
    static std::vector<float> pass_costs() {
        std::vector<float> us(64);
        for (size_t i = 0; i < us.size(); ++i) {
            us[i] = 100.0f + (float) i;
        }
        return us;
    }

    void use_tree(int32_t id) {
        entmtp_policy_params p = {};
        p.policy               = ENTMTP_POLICY_STATIC;
        p.static_tree          = id;
        CHECK_EQ(entmtp_decoder_set_policy(dec.get(), &p), ENTMTP_OK);
    }

    // a bank that likes its trees, so that all of them are used
    void use_entropy() {
        const float edges[]    = { 1.0f, 2.0f };
        const float expected[] = { 0, 1, 2, 3, 0, 2, 3, 1, 0, 3, 1, 2 };
        const auto  verify     = pass_costs();
        const float tree[]     = { 0, 1, 1, 1 };

        const entmtp_costs costs = { (int32_t) verify.size(), verify.data(), 0, nullptr, tree, 0.0f };

        entmtp_policy_params p = {};
        p.policy               = ENTMTP_POLICY_ENTROPY;
        p.ema_window           = 4.0f;
        p.n_bins               = 3;
        p.bin_edges            = edges;
        p.expected             = expected;
        p.costs                = &costs;
        CHECK_EQ(entmtp_decoder_set_policy(dec.get(), &p), ENTMTP_OK);
    }

    // trees grown from the heads' probabilities
    //   trust  added to the logit of every guess: it trusts them more than they do themselves
    void use_confidence(float trust = 4.0f) {
        const auto verify = pass_costs();

        const std::vector<float> level(n_levels * 3, 1.0f);
        const float              tree[] = { 0, 1, 1, 1 };
        const entmtp_costs costs = { (int32_t) verify.size(), verify.data(), n_levels, level.data(), tree, build };

        plain_calibration cal(n_levels);
        for (int32_t l = 0; l < n_levels; ++l) {
            cal.accept[l * ENTMTP_N_ACCEPT] = trust;
        }
        const entmtp_calibration calibration = cal.params();

        entmtp_policy_params p = {};
        p.policy               = ENTMTP_POLICY_CONFIDENCE;
        p.ema_window           = 4.0f;
        p.n_bins               = 1;
        p.costs                = &costs;
        p.calibration          = &calibration;
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

    entmtp_traffic traffic() const {
        entmtp_traffic t = {};
        entmtp_decoder_get_traffic(dec.get(), &t);
        return t;
    }

    int32_t n_accepted() const {
        int32_t n = 0;
        for (const auto & s : steps()) {
            n += s.n_accepted;
        }
        return n;
    }
};

inline tiny::sampler_ptr greedy() {
    tiny::sampler_ptr s(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    llama_sampler_chain_add(s.get(), llama_sampler_init_greedy());
    return s;
}

inline tiny::sampler_ptr sampling(uint32_t seed) {
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
inline tokens generate(loop & l, llama_sampler * sampler, int32_t n, int32_t pos, const between & f = nullptr) {
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

inline tokens run(loop & l, llama_sampler * sampler, int32_t n, const between & f = nullptr) {
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
    entmtp_decoder_reset_stats(l.dec.get());
    return generate(l, sampler, n, (int32_t) prompt.size(), f);
}

inline const char * all_heads[] = { "medusa.gguf", "medusa-d2t.gguf", "hydra.gguf", "hydra-prefix.gguf" };

// the model and the heads that the tests share
inline bool set_up() {
    tiny::be_quiet();
    base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
    if (!CHECK(base)) {
        return false;
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
    return true;
}

inline int tear_down(const char * name) {
    base.reset();
    llama_backend_free();
    return check_result(name);
}
