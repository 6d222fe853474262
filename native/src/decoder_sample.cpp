// The second half of a token: what its logits tell, and the draw of the next one.

#include "decoder.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

// In company the next pass may begin at any time: rows are kept for the caller
const float * decoder::logits() {
    if (live && shared.n_seq > 1) {
        set_row(out.keep(row));
    }
    return live ? out.logits(row) : nullptr;
}

const float * decoder::all_logits() {
    switch (all) {
        case all_of::nothing:
            return nullptr;
        case all_of::token:
            return logits();
        default:
            return shared.n_seq > 1 ? all_rows.data() : llama_get_logits(ctx);
    }
}

const float * decoder::hidden() {
    if (live && shared.n_seq > 1) {
        set_row(out.keep(row));
    }
    return live && draft_heads ? out.hidden(row) : nullptr;
}

// the entropy of the distribution that the next token is drawn from
void decoder::begin_token() {
    if ((policy.needs_signals() || stats || uses_rows()) && !is_seen && live) {
        look();
    }
}

// what the last evaluated token's logits tell
void decoder::look() {
    int32_t best[successors::k];
    float   log_p[successors::k];
    int32_t n = 0;
    if (const float * l = shared.n_seq > 1 ? out.logits(row) : nullptr) {
        const pass::apart reading(shared, seq);
        seen = describe(l, n_vocab);
        n    = uses_rows() ? outputs::best(l, n_vocab, successors::k, best, log_p) : 0;
    } else {
        seen = out.describe(row);
        n    = uses_rows() ? out.best(row, successors::k, best, log_p) : 0;
    }
    is_seen = true;
    running.add(seen.entropy);
    if (uses_rows()) {
        for (int32_t i = 0; i < n; ++i) {
            log_p[i] -= seen.log_sum;
            n = std::isfinite(log_p[i]) ? n : i;
        }
        rows.see(n_vocab, tree_id >= 0 ? tokens[path.back()] : text.back(), best, log_p, n);
    }
}

uint32_t decoder::drafted_by(int32_t token) const {
    if (!live || tree_id < 0) {
        return 0;
    }
    const int32_t child = topology(tree_id).find_child(path.back(), tokens, token);
    return child < 0 ? 0 : sources.empty() ? (uint32_t) ENTMTP_SOURCE_HEADS : sources[child];
}

void decoder::set_text(const int32_t * toks, int32_t n) {
    if (tree_id >= 0 || n != n_past) {
        throw std::runtime_error("the text is not the one in the memory: " + std::to_string(n) + " tokens for " +
                                 std::to_string(n_past));
    }
    text.truncate(0);
    for (int32_t i = 0; i < n; ++i) {
        text.append(toks[i] >= 0 && toks[i] < n_vocab ? toks[i] : (int32_t) text_index::unknown);
    }
}

entmtp_signals decoder::signals(int32_t token) {
    if (!live) {
        throw std::runtime_error("there is no evaluated token");
    }
    if (!is_seen) {
        look(); // the caller did not sample here: the token is his own
    }
    return { seen.entropy, std::exp(seen.log_max), out.logit(row, token) - seen.log_sum };
}

int32_t decoder::best(int32_t k, int32_t * best, float * log_p) {
    if (!live) {
        throw std::runtime_error("there is no evaluated token");
    }
    if (!is_seen) {
        look();
    }
    const int32_t n = out.best(row, k, best, log_p);
    for (int32_t i = 0; i < n; ++i) {
        log_p[i] -= seen.log_sum;
    }
    return n;
}

int32_t decoder::sample(llama_sampler * sampler, int32_t * token) {
    if (!live) {
        error = "there are no logits to sample from: evaluate a token first";
        return ENTMTP_ERROR;
    }

    const int64_t t0 = in_list ? ggml_time_us() : 0;

    begin_token();

    const int64_t t1 = in_list ? ggml_time_us() : 0;

    if (const float * l = shared.n_seq > 1 ? out.logits(row) : nullptr) {
        const pass::apart reading(shared, seq);
        *token = outputs::sample(sampler, l, n_vocab, candidates);
    } else {
        *token = out.sample(sampler, row);
    }

    if (in_list) {
        const int64_t t2 = ggml_time_us();
        steps.back().t_host_us += (int32_t) (t1 - t0);
        steps.back().t_sample_us += (int32_t) (t2 - t1);
    }
    return ENTMTP_OK;
}

int32_t decoder::sample_typical(llama_sampler * sampler, const typical_params & p, int32_t * token) {
    if (!live) {
        error = "there are no logits to sample from: evaluate a token first";
        return ENTMTP_ERROR;
    }

    begin_token();

    if (tree_id >= 0 && typical.empty()) {
        typical = typical_path(topology(tree_id), tokens, n_vocab, p,
                               [&](int32_t node) { return out.logits(work.at[node]); });
    }

    // the caller may have gone another way than the typical one
    if (tree_id >= 0 && path.size() < typical.size() && std::equal(path.begin(), path.end(), typical.begin())) {
        *token = tokens[typical[path.size()]];
        llama_sampler_accept(sampler, *token);
    } else {
        *token = out.sample(sampler, row); // the token that leaves the tree is drawn, as in Medusa's code
    }
    return ENTMTP_OK;
}

} // namespace entmtp
