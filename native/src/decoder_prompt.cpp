// Prompts: several tokens in a row, whatever was in the memory after the place where they go.

#include "decoder.h"

#include <algorithm>
#include <numeric>

namespace entmtp {

int32_t decoder::eval_prompt(const int32_t * toks, int32_t n, int32_t past, bool all_outputs) {
    if (const int32_t status = settle(); status != ENTMTP_OK) {
        return status;
    }
    if (past < 0 || past > n_past) {
        error = "cannot continue after " + std::to_string(past) + " tokens: only " + std::to_string(n_past) +
                " are evaluated";
        return ENTMTP_ERROR;
    }
    if (n > (int32_t) llama_n_batch(ctx)) {
        error = std::to_string(n) + " tokens are more than n_batch (" + std::to_string(llama_n_batch(ctx)) + ")";
        return ENTMTP_ERROR;
    }

    prefix_layer * prefix = draft_heads ? draft_heads->prefix() : nullptr;

    if (!memory.can_continue(seq, past) || !memory.truncate(seq, past)) {
        error = memory.recurrent() || memory.window() == 0
                    ? "the memory of this model cannot be cut back to " + std::to_string(past) +
                          " tokens; evaluate the text from its beginning"
                    : "the memory of this model keeps a window of " + std::to_string(memory.window()) +
                          " tokens, and part of what token " + std::to_string(past) +
                          " attends to has left it; evaluate the text from its beginning, or create the model with "
                          "swa_full=True";
        return ENTMTP_ERROR;
    }
    n_past = past;
    text.truncate(past);
    if (drafting) {
        drafting->truncate(past);
    }

    live        = false;
    is_seen     = false;
    walked.tree = -1;
    running.reset();
    policy.begin_text();
    if (prefix) {
        prefix->truncate(past);
    }

    if (n > n_ctx - past) {
        return decode_status(1); // in company llama.cpp knows of the room of all alone
    }

    // the prefix layer wants every hidden state, and hidden states come with output rows: in small batches, so that the
    // vocabulary-sized rows that come along stay few
    const bool    all   = all_outputs || prefix;
    const int32_t n_all = prefix && !all_outputs ? std::min(64, (int32_t) llama_n_ubatch(ctx)) : n;

    for (int32_t i = 0, m = 0; i < n; i += m) {
        m = std::min({ n - i, n_all, shared.prompt_chunk(seq) });

        work              = {};
        work.seq          = seq;
        work.pos0         = past + i;
        work.first_output = all ? 0 : m - (i + m == n);
        work.is_prompt    = true;
        work.to_host      = all_outputs;
        work.tokens.assign(toks + i, toks + i + m);

        const int32_t status = decode_status(cancelled ? 2 : shared.run(work));
        if (status != ENTMTP_OK) {
            // what was evaluated before the failure stays in llama.cpp's memory: cut it back
            memory.truncate(seq, past);
            n_past = past;
            if (prefix) {
                prefix->truncate(past);
            }
            if (drafting) {
                drafting->truncate(past);
            }
            return status;
        }
        for (int32_t k = 0; k < m && all_outputs && shared.n_seq > 1; ++k) {
            const float * l = out.logits(work.at[k]);
            all_rows.insert(all_rows.end(), l, l + n_vocab);
        }
        if (drafting) {
            drafting->follow(work.tokens, work.pos0, work.at);
        }

        if (prefix) {
            std::vector<int32_t> rows(m);
            std::iota(rows.begin(), rows.end(), 0);
            run_prefix(rows, past + i);
        }
        set_row(work.at[m - 1]);
    }

    n_past = past + n;
    live   = true;
    for (int32_t i = 0; i < n; ++i) {
        text.append(toks[i]);
    }
    return ENTMTP_OK;
}

void decoder::run_prefix(const std::vector<int32_t> & rows, int32_t pos0) {
    draft_heads->prefix()->add(out.hidden_states(rows), pos0);
}

} // namespace entmtp
