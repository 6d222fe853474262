// What a decoder drafts, and what it keeps from one token, step and text to the next.

#include "loop.h"

#include <algorithm>

static const int32_t n_prompt = (int32_t) prompt.size();

// the tokens that would be right drafts
static tokens drafted(const loop & l) {
    tokens res;
    for (int32_t token = 0; token < tiny::n_vocab; ++token) {
        if (entmtp_decoder_is_drafted(l.dec.get(), token)) {
            res.push_back(token);
        }
    }
    return res;
}

static std::vector<float> hidden(const loop & l) {
    const float * h = entmtp_decoder_hidden(l.dec.get());
    return h ? std::vector<float>(h, h + tiny::n_embd) : std::vector<float>();
}

// the 8 best guesses of the head that comes after a path, which begins with the token after the hidden state's
static tokens guesses(loop & l, const std::vector<float> & h, const tokens & path, float * log_p_best = nullptr) {
    tokens             res(8);
    std::vector<float> log_p(8);
    CHECK_EQ(entmtp_heads_expand(l.heads.get(), (int32_t) path.size() - 1, h.data(), path.data(), 1, 8, res.data(),
                                 log_p.data()),
             ENTMTP_OK);
    if (log_p_best) {
        *log_p_best = log_p[0];
    }
    return res;
}

// Every token of a tree that was grown is a guess of its head after its own path, and no node is there twice: walk to each
// of them
static void test_grown_guesses() {
    for (const char * heads : { "medusa.gguf", "hydra.gguf" }) {
        loop l(heads);
        l.use_confidence();

        int32_t             n_found = 0, n_deep = 0;
        std::vector<tokens> open = { { 3 } }; // paths to walk
        while (!open.empty()) {
            const tokens path = open.back();
            open.pop_back();
            n_found++;
            n_deep += path.size() > 2;

            CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
            const auto h = hidden(l);
            entmtp_decoder_reset_stats(l.dec.get());
            for (size_t i = 0; i < path.size(); ++i) {
                CHECK_EQ(l.eval({ path[i] }, n_prompt + (int32_t) i), ENTMTP_OK);
            }
            if (!CHECK_EQ(l.steps().size(), 1)) {
                return;
            }
            const tokens next = drafted(l);
            if (path.size() > loop::n_levels) {
                CHECK(next.empty());
                continue;
            }
            const tokens expected = guesses(l, h, path);
            for (const int32_t token : next) {
                CHECK(std::count(expected.begin(), expected.end(), token));
                open.push_back(path);
                open.back().push_back(token);
            }
        }
        CHECK_EQ(l.steps().back().n_nodes, n_found);
        CHECK(n_deep > 3);
    }
}

// hits: drafting ends where the best guess never holds, though others do
static void test_hits() {
    constexpr float w = 20.0f;

    const auto               verify = loop::pass_costs();
    const std::vector<float> level(loop::n_levels * 3, 1.0f);
    const float              tree[] = { 0, 1, 1, 1 };
    const entmtp_costs costs = { (int32_t) verify.size(), verify.data(), loop::n_levels, level.data(), tree, 0.0f };
    plain_calibration  cal(loop::n_levels);
    std::fill(cal.accept.begin(), cal.accept.end(), 0.0f);
    for (int32_t l = 0; l < loop::n_levels; ++l) {
        cal.accept[l * ENTMTP_N_ACCEPT]     = -0.4f * w;
        cal.accept[l * ENTMTP_N_ACCEPT + 7] = w; // hits
    }
    entmtp_calibration calibration = cal.params();
    calibration.hits_window        = 3.0f;

    entmtp_policy_params p = {};
    p.policy               = ENTMTP_POLICY_CONFIDENCE;
    p.ema_window           = 4.0f;
    p.n_bins               = 1;
    p.costs                = &costs;
    p.calibration          = &calibration;

    for (const bool best : { true, false }) {
        loop l("medusa.gguf");
        CHECK_EQ(entmtp_decoder_set_policy(l.dec.get(), &p), ENTMTP_OK);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        int32_t pos = n_prompt;
        for (int32_t step = 0; step < 8; ++step) {
            const tokens order = guesses(l, hidden(l), { step });
            CHECK_EQ(l.eval({ step }, pos++), ENTMTP_OK);
            const int32_t n_nodes = l.steps().back().n_nodes;
            if (best || step == 0) {
                CHECK(n_nodes > 2);
            } else if (step > 3) {
                CHECK_EQ(n_nodes, 1);
            }
            const int32_t next = order[best ? 0 : 1];
            CHECK_EQ(entmtp_decoder_is_drafted(l.dec.get(), next), n_nodes > 1);
            CHECK_EQ(l.eval({ next }, pos++), ENTMTP_OK);
            CHECK_EQ(l.steps().back().n_accepted, n_nodes > 1);
            if (n_nodes == 1) {
                // that was a step of its own: the next token begins another one
                step++;
            }
        }
    }
}

// the score of the heads' greedy path is the product of their probabilities
static void test_path_score() {
    loop l("hydra.gguf");
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
    const auto h    = hidden(l);
    tokens     path = { 3 };
    float      sum  = 0.0f;
    for (int32_t i = 0; i < loop::n_levels; ++i) {
        float log_p = 0.0f;
        path.push_back(guesses(l, h, path, &log_p)[0]);
        sum += log_p;
    }
    for (const bool above : { true, false }) {
        const float          edge     = 1.0f - std::exp(sum) + (above ? 1e-5f : -1e-5f);
        const int32_t        ladder[] = { bushy, chain };
        entmtp_policy_params p        = {};
        p.policy                      = ENTMTP_POLICY_LADDER;
        p.score                       = ENTMTP_SCORE_PATH;
        p.ema_window                  = 4.0f;
        p.n_bins                      = 2;
        p.bin_edges                   = &edge;
        p.ladder                      = ladder;
        CHECK_EQ(entmtp_decoder_set_policy(l.dec.get(), &p), ENTMTP_OK);
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        CHECK_EQ(l.eval({ 3 }, n_prompt), ENTMTP_OK);
        CHECK_EQ(l.steps().back().tree, above ? bushy : chain);
    }
}

// The running entropy at a step is that of the text so far, in plain decoding and in drafting, in the first text and in the
// ones after it
static void test_running_entropy() {
    constexpr int32_t n = 60;

    entmtp_policy_params off = {};
    off.ema_window           = 4.0f;

    loop plain;
    CHECK_EQ(entmtp_decoder_set_policy(plain.dec.get(), &off), ENTMTP_OK);
    run(plain, sampling(5).get(), n);
    const auto expected = plain.steps();

    for (const int32_t mode : { ENTMTP_OUTPUTS_HOST, ENTMTP_OUTPUTS_DEVICE }) {
        outputs_mode = mode;
        loop l("hydra.gguf");
        l.use_entropy();
        for (int32_t round = 0; round < 3; ++round) {
            run(l, sampling(5).get(), n);
            int32_t i = 0;
            for (const auto & s : l.steps()) {
                CHECK_NEAR(s.entropy, expected[i].entropy, 1e-3);
                i += 1 + s.n_accepted;
            }
            CHECK(l.n_accepted() > 0);

            // looked at, and left for another text
            int32_t token = -1;
            CHECK_EQ(entmtp_decoder_sample(l.dec.get(), greedy().get(), &token), ENTMTP_OK);
        }
    }
    outputs_mode = ENTMTP_OUTPUTS_AUTO;
}

// a policy with a memory begins each text anew
static void test_texts_begin_anew() {
    loop l("medusa.gguf");

    // of one token each: the least and the most uncertain continuation
    int32_t low = 0, high = 0;
    float   h_low = 1e9f, h_high = -1e9f;
    for (int32_t token = 0; token < tiny::n_vocab; ++token) {
        CHECK_EQ(l.eval({ token, 1 }, 0), ENTMTP_OK);
        entmtp_signals s = {};
        CHECK_EQ(entmtp_decoder_signals(l.dec.get(), 0, &s), ENTMTP_OK);
        if (s.entropy < h_low) {
            h_low = s.entropy;
            low   = token;
        }
        if (s.entropy > h_high) {
            h_high = s.entropy;
            high   = token;
        }
    }
    CHECK(h_high > h_low + 0.01f);

    const float          edges[]  = { h_low - 0.1f, (h_low + h_high) / 2 };
    const int32_t        ladder[] = { chain, bushy };
    entmtp_policy_params p        = {};
    p.policy                      = ENTMTP_POLICY_HYSTERESIS;
    p.ema_window                  = 4.0f;
    p.n_bins                      = 3;
    p.bin_edges                   = edges;
    p.ladder                      = ladder;
    CHECK_EQ(entmtp_decoder_set_policy(l.dec.get(), &p), ENTMTP_OK);

    for (int32_t round = 0; round < 2; ++round) {
        CHECK_EQ(l.eval({ high, 1 }, 0), ENTMTP_OK);
        CHECK_EQ(l.eval({ 5 }, 2), ENTMTP_OK);
        CHECK_EQ(l.steps().back().tree, bushy);
        CHECK_EQ(l.eval({ low, 1 }, 0), ENTMTP_OK);
        CHECK_EQ(l.eval({ 5 }, 2), ENTMTP_OK);
        CHECK_EQ(l.steps().back().tree, chain);
    }
}

// one token in place of the last one: not the next of the tree that is being walked
static void test_last_token_again() {
    for (const char * path : { (const char *) nullptr, "medusa.gguf", "hydra-prefix.gguf" }) {
        loop l(path), fresh;
        if (path) {
            l.use_tree(every_token);
        }
        for (int32_t n = 1; n < 4; ++n) { // at the root of a tree, and after a draft that was right
            tokens text = prompt;
            CHECK_EQ(l.eval(text, 0), ENTMTP_OK);
            for (int32_t i = 0; i < n; ++i) {
                CHECK_EQ(l.eval({ 7 + i }, (int32_t) text.size()), ENTMTP_OK);
                text.push_back(7 + i);
            }
            text.back()      = 25;
            const int32_t at = (int32_t) text.size() - 1;
            CHECK_EQ(l.eval({ 25 }, at), ENTMTP_OK);
            CHECK_EQ(entmtp_decoder_n_evaluated(l.dec.get()), at + 1);

            CHECK_EQ(fresh.eval(text, 0), ENTMTP_OK);
            const float * a = entmtp_decoder_logits(l.dec.get());
            const float * b = entmtp_decoder_logits(fresh.dec.get());
            if (!CHECK(a && b)) {
                return;
            }
            for (int32_t t = 0; t < tiny::n_vocab; ++t) {
                CHECK_NEAR(a[t], b[t], 1e-4);
            }
        }
    }
}

// a prompt that the prefix layer takes in several parts: the same drafts, wherever they are cut
static void test_prompt_in_parts() {
    tokens text;
    for (int32_t i = 0; i < 110; ++i) {
        text.push_back((i * 7 + i * i) % tiny::n_vocab);
    }
    const auto go_on = [&](loop & l) {
        std::vector<tokens> res;
        for (int32_t i = 0; i < 20; ++i) {
            CHECK_EQ(l.eval({ (i * 5) % tiny::n_vocab }, (int32_t) text.size() + i), ENTMTP_OK);
            res.push_back(drafted(l));
        }
        return res;
    };
    loop whole("hydra-prefix.gguf"), parts("hydra-prefix.gguf");
    for (loop * l : { &whole, &parts }) {
        l->use_tree(bushy);
    }
    CHECK_EQ(whole.eval(text, 0), ENTMTP_OK); // 64 and 46
    CHECK_EQ(parts.eval({ text.begin(), text.begin() + 50 }, 0), ENTMTP_OK);
    CHECK_EQ(parts.eval({ text.begin() + 50, text.end() }, 50), ENTMTP_OK);

    const float * a = entmtp_decoder_logits(whole.dec.get());
    const float * b = entmtp_decoder_logits(parts.dec.get());
    if (CHECK(a && b)) {
        for (int32_t t = 0; t < tiny::n_vocab; ++t) {
            CHECK_NEAR(a[t], b[t], 1e-4);
        }
    }
    CHECK(go_on(whole) == go_on(parts));
}

// after another text was put into the memory, the prefix layer knows nothing of the one before
static void test_invalidate() {
    constexpr int32_t n = 20;

    tokens text;
    for (int32_t i = 0; i < n; ++i) {
        text.push_back((i * 11 + 3) % tiny::n_vocab);
    }
    loop other("hydra-prefix.gguf");
    CHECK_EQ(other.eval(text, 0), ENTMTP_OK);
    std::vector<uint8_t> state(llama_state_seq_get_size(other.ctx.get(), 0));
    CHECK_EQ(llama_state_seq_get_data(other.ctx.get(), state.data(), state.size(), 0), state.size());

    for (const bool is_run : { true, false }) {
        loop fresh("hydra-prefix.gguf"), l("hydra-prefix.gguf");
        for (loop * x : { &fresh, &l }) {
            x->use_tree(bushy);
        }
        if (is_run) {
            run(l, greedy().get(), 40);
        } else {
            CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK); // its hidden states wait for a draft
        }
        for (loop * x : { &fresh, &l }) {
            CHECK(llama_state_seq_set_data(x->ctx.get(), state.data(), state.size(), 0) > 0);
            entmtp_decoder_invalidate(x->dec.get(), n);
            CHECK_EQ(entmtp_decoder_n_evaluated(x->dec.get()), -1);
            CHECK_EQ(x->eval({ 4, 9 }, n), ENTMTP_OK);
        }
        for (int32_t i = 0; i < 20; ++i) {
            for (loop * x : { &fresh, &l }) {
                CHECK_EQ(x->eval({ (i * 5) % tiny::n_vocab }, n + 2 + i), ENTMTP_OK);
            }
            CHECK(drafted(fresh) == drafted(l));
        }
    }
}

// more tokens than any context holds, or fewer than none
static void test_invalidate_nonsense() {
    loop l("medusa.gguf");
    for (const int32_t n : { INT32_MAX, INT32_MIN }) {
        CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
        entmtp_decoder_invalidate(l.dec.get(), n);
        CHECK_EQ(l.eval({ 4 }, n), ENTMTP_ERROR);
    }
    CHECK_EQ(l.eval(prompt, 0), ENTMTP_OK);
}

// a prompt of which a part fits: the memory is left as it was
static void test_memory_after_failure() {
    loop          l("hydra-prefix.gguf", 256);
    const auto    mem   = llama_get_memory(l.ctx.get());
    const int32_t n_ctx = (int32_t) llama_n_ctx_seq(l.ctx.get());
    for (int32_t pos = 0; pos < n_ctx - 64; pos += 64) {
        CHECK_EQ(l.eval(tokens(64, 5), pos), ENTMTP_OK);
    }
    CHECK_EQ(l.eval(tokens(100, 6), n_ctx - 64), ENTMTP_CONTEXT_FULL);
    CHECK_EQ(llama_memory_seq_pos_max(mem, 0), n_ctx - 64 - 1);
    CHECK_EQ(l.eval(tokens(60, 6), n_ctx - 64), ENTMTP_OK);
}

int main() {
    if (set_up()) {
        test_grown_guesses();
        test_hits();
        test_path_score();
        test_running_entropy();
        test_texts_begin_anew();
        test_last_token_again();
        test_prompt_in_parts();
        test_invalidate();
        test_invalidate_nonsense();
        test_memory_after_failure();
    }
    return tear_down("test_decoder_state");
}
