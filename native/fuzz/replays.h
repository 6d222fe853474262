// Policies over texts of before, without a model: what the fuzzer of the C interface has replayed.

#pragma once

#include "entmtp.h"
#include "entmtp_replay.h"

#include "fuzz.h"
#include "policy_of.h"
#include "tiny.h"

#include <vector>

static constexpr int32_t most_tokens = 15; // of three texts of up to five

// each token but the first of a text is drafted, or sampled
inline void
check_replayed(int64_t n, const std::vector<entmtp_step> & steps, const int32_t * lengths, int32_t n_texts) {
    MUST(n <= (int64_t) steps.size());
    int32_t n_tokens = 0, expected = 0;
    for (int64_t i = 0; i < n; ++i) {
        MUST(steps[i].n_accepted >= 0 && steps[i].n_accepted < steps[i].n_nodes);
        n_tokens += 1 + steps[i].n_accepted;
    }
    for (int32_t i = 0; i < n_texts; ++i) {
        expected += lengths[i] - 1;
    }
    MUST(n < 0 || n_tokens == expected);
}

// by recorded guesses of heads
inline void replay_heads(decisions & d) {
    const int32_t n_heads = d.between(1, 3), n_texts = d.between(0, 3), n_trees = d.between(1, 3);
    const int32_t n_rows = d.flag() ? 1 + 4 * (n_heads - 1) : n_heads;

    std::vector<int32_t> lengths(3), rank;
    for (int32_t & n : lengths) {
        n = d.rarely() ? 0 : d.between(1, 5);
    }
    std::vector<entmtp_signals> signals;
    std::vector<float>          log_p;
    for (int32_t i = 0; i < most_tokens; ++i) {
        signals.push_back({ (float) d.between(0, 30) / 10.0f, 0.5f, -1.0f });
        for (int32_t h = 0; h < n_heads; ++h) {
            rank.push_back(d.between(0, 6) - 1);
        }
    }
    for (int32_t i = 0; i < most_tokens * n_rows * 8; ++i) {
        log_p.push_back(-0.5f * (float) (1 + i % 8));
    }
    const std::vector<int32_t> n_nodes = { 1, 2, 4 }, parent = { -1, -1, 0, -1, 0, 0, 1 },
                               order = { 0, 0, 0, 0, 0, 1, 0 };

    entmtp_trace trace = {};
    trace.n_texts      = n_texts;
    trace.n_tokens     = lengths.data();
    trace.n_heads      = n_heads;
    trace.n_guess      = d.rarely() ? 3 : 8;
    trace.signals      = signals.data();
    trace.rank         = rank.data();
    trace.log_p        = d.rarely() ? nullptr : log_p.data();
    trace.sees_path    = n_rows > n_heads;

    const policy_of          p(d, n_trees, n_heads, 0);
    std::vector<entmtp_step> steps(most_tokens);
    const int64_t n = entmtp_replay(&trace, n_trees, n_nodes.data(), parent.data(), order.data(), &p.params, nullptr,
                                    steps.data(), d.rarely() ? 2 : most_tokens);
    check_replayed(n, steps, lengths.data(), n_texts);
}

// by the text and the tokens that were probable; heads draft from hidden states
inline void replay_texts(decisions & d, entmtp_heads * heads) {
    const int32_t n_texts = d.between(0, 3), n_best = 2;

    std::vector<int32_t> n_prompt, n_tokens, tokens, best;
    for (int32_t i = 0; i < 3; ++i) {
        n_prompt.push_back(d.rarely() ? 0 : d.between(1, 4));
        n_tokens.push_back(d.rarely() ? 0 : d.between(1, 5));
        for (int32_t k = n_prompt[i] + n_tokens[i]; k > 0; --k) {
            tokens.push_back(d.rarely() ? d.byte() - 100 : d.between(0, 5)); // few, so that they come again
        }
    }
    std::vector<entmtp_signals> signals(most_tokens, { 1.0f, 0.5f, -1.0f });
    std::vector<float>          log_p(most_tokens * n_best, -0.7f), states(most_tokens * tiny::n_embd, 0.1f);
    for (int32_t i = 0; i < most_tokens * n_best; ++i) {
        best.push_back(d.rarely() ? d.byte() - 100 : i % 6);
    }

    entmtp_texts texts = {};
    texts.n_texts      = n_texts;
    texts.n_prompt     = n_prompt.data();
    texts.n_tokens     = n_tokens.data();
    texts.tokens       = tokens.data();
    texts.signals      = signals.data();
    texts.n_best       = n_best;
    texts.best         = best.data();
    texts.log_p        = log_p.data();
    texts.states       = d.flag() ? states.data() : nullptr;

    policy_of p(d, 1, heads ? 3 : 1, ENTMTP_SOURCE_TEXT | ENTMTP_SOURCE_ROWS | (heads ? ENTMTP_SOURCE_HEADS : 0));
    p.params.policy = d.rarely() ? ENTMTP_POLICY_ENTROPY : ENTMTP_POLICY_AUTO;

    std::vector<entmtp_step>     steps(most_tokens);
    std::vector<entmtp_proposal> proposals(most_tokens * ENTMTP_MAX_SAMPLES);
    int64_t                      n_proposals = 0;

    const int64_t n =
        entmtp_replay_texts(&texts, heads, &p.params, d.flag() ? &p.costs : nullptr, d.byte(), steps.data(),
                            d.rarely() ? 2 : most_tokens, d.flag() ? proposals.data() : nullptr, &n_proposals);
    check_replayed(n, steps, n_tokens.data(), n_texts);
    for (int64_t i = 0; i < n_proposals; ++i) {
        MUST(proposals[i].sources != 0 && proposals[i].p >= 0.0f && proposals[i].p <= 1.0f);
    }
}

inline void replay(decisions & d, entmtp_heads * heads) {
    replay_heads(d);
    replay_texts(d, heads);
}
