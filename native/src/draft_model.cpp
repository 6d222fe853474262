#include "draft_model.h"

#include "entropy.h"
#include "outputs.h"

#include "../src/llama-ext.h" // prediction layers: C++ only so far, and no part of the public header
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace entmtp {

static constexpr int32_t most_waiting = 256; // states that wait before the layers are run over them
static constexpr int32_t most_kept    = 256; // and that are kept afterwards; now and then twice as many
static constexpr double  rate         = 0.1; // of what a pass took, in what is believed of the next

draft_model::draft_model(llama_context * target, llama_model * model, llama_context_params params) :
    target(target), own_layers(model == nullptr) {
    const llama_model * base = llama_get_model(target);
    if (!model) {
        model    = const_cast<llama_model *>(base);
        n_layers = llama_model_n_layer_nextn(base);
        if (n_layers < 1) {
            throw std::runtime_error("draft model: this model has no layers for multi-token prediction");
        }
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    n_known = std::min(n_vocab, llama_vocab_n_tokens(llama_model_get_vocab(base)));
    n_embd  = llama_model_n_embd_out(base);
    n_batch = (int32_t) std::min(llama_n_ctx_seq(target), 512u);

    params.n_ctx          = llama_n_ctx_seq(target);
    params.n_batch        = (uint32_t) n_batch;
    params.n_ubatch       = (uint32_t) n_batch;
    params.n_seq_max      = 1;
    params.n_rs_seq       = 0;
    params.embeddings     = false;
    params.ctx_type       = own_layers ? LLAMA_CONTEXT_TYPE_MTP : LLAMA_CONTEXT_TYPE_DEFAULT;
    params.ctx_other      = own_layers ? target : nullptr;
    params.abort_callback = nullptr;
    ctx.reset(llama_init_from_model(model, params));
    if (!ctx) {
        throw std::runtime_error("draft model: llama.cpp cannot make a context of it");
    }
    if (!llama_get_memory(ctx.get())) {
        throw std::runtime_error("draft model: it has no memory to decode with (an encoder?)");
    }
    if (own_layers) {
        llama_set_embeddings_nextn(target, true, /*masked*/ false);
        llama_set_embeddings_nextn(ctx.get(), true, /*masked*/ true);
    } else {
        check_vocabulary();
    }
    batch.reset(llama_batch_ext_init(ctx.get()));
    measure();
}

void draft_model::check_vocabulary() const {
    const llama_vocab * a = llama_model_get_vocab(llama_get_model(target));
    const llama_vocab * b = llama_model_get_vocab(llama_get_model(ctx.get()));
    const int32_t       n = llama_vocab_n_tokens(a);
    if (std::abs(n - n_vocab) > 128) { // files are padded differently
        throw std::runtime_error("draft model: its vocabulary has " + std::to_string(n_vocab) +
                                 " tokens, the model's " + std::to_string(n) + "; a drafter needs the same one");
    }
    for (int32_t i = 0; i < n_known; ++i) {
        if (std::strcmp(llama_vocab_get_text(a, i), llama_vocab_get_text(b, i)) != 0) {
            throw std::runtime_error("draft model: token " + std::to_string(i) + " is \"" + llama_vocab_get_text(b, i) +
                                     "\" there and \"" + llama_vocab_get_text(a, i) +
                                     "\" in the model; a drafter needs the same vocabulary");
        }
    }
}

// what passes cost: of one token, and of each that comes along
void draft_model::measure() {
    const std::vector<int32_t> tokens(16, 0);
    const std::vector<float>   rows(own_layers ? tokens.size() * n_embd : 0, 0.0f);
    const auto                 time = [&](size_t n) {
        const int64_t t0 = ggml_time_us();
        run((int32_t) held.size(), { tokens.begin(), tokens.begin() + (ptrdiff_t) n }, rows.data());
        return (double) (ggml_time_us() - t0);
    };
    if (n_batch < 64) { // no room: as a guess
        t_pass  = 1000.0;
        t_token = 200.0;
        return;
    }
    time(1); // graphs and caches are cold
    t_pass             = std::min({ time(1), time(1), time(1) });
    const double t_all = std::min(time(tokens.size()), time(tokens.size()));
    t_token            = std::max(0.0, (t_all - t_pass) / (double) (tokens.size() - 1));
    cut(0);
}

// forget what its memory holds from a position on
void draft_model::cut(int32_t pos) {
    if (pos >= (int32_t) held.size()) {
        return;
    }
    if (!llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, pos, -1)) {
        why = "its memory cannot be cut back (recurrent or hybrid)";
    }
    held.resize(std::max(pos, 0));
}

void draft_model::truncate(int32_t pos) {
    const int32_t n_seen = n_final;
    n_final              = std::min(n_final, pos);
    if (!own_layers) {
        return;
    }
    cut(n_final);
    waiting.resize(std::clamp(pos - n_seen, 0, (int32_t) waiting.size()));
    states.resize((size_t) std::clamp(pos - state0, 0, n_states()) * n_embd);
}

// Evaluate tokens from a position on; logits after the last of them, null: it failed
//   rows  prediction layers: [n][n_embd] the hidden states before them
const float * draft_model::run(int32_t pos0, const std::vector<int32_t> & tokens, const float * rows) {
    const int32_t n = (int32_t) tokens.size();
    if (std::any_of(tokens.begin(), tokens.end(), [&](int32_t t) { return t < 0 || t >= n_vocab; })) {
        return nullptr; // not known, or not to it
    }
    for (int32_t i = 0, m = 0; i < n; i += m) {
        m = std::min(n - i, n_batch);
        llama_batch_ext_clear(batch.get());
        for (int32_t j = 0; j < m; ++j) {
            const int32_t pos = pos0 + i + j;
            if (llama_batch_ext_add_token(batch.get(), 0, tokens[i + j]) != j ||
                !llama_batch_ext_set_pos(batch.get(), j, &pos) ||
                !llama_batch_ext_set_output_logits(batch.get(), j, j == m - 1) ||
                (own_layers && !llama_batch_ext_set_embd_token(
                                   batch.get(), j, { rows + (size_t) (i + j) * n_embd, 1, (size_t) n_embd }))) {
                return nullptr;
            }
        }
        const int32_t status = llama_process(ctx.get(), LLAMA_PROCESS_TYPE_DECODE, batch.get());
        if (status != 0) {
            llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, (int32_t) held.size(), -1);
            if (status < 0) {
                why = "llama.cpp could not evaluate it (status " + std::to_string(status) + ")";
            }
            return nullptr;
        }
        held.resize(pos0 + i, -1);
        held.insert(held.end(), tokens.begin() + i, tokens.begin() + i + m);
        if (own_layers) {
            const float * h = llama_get_embeddings_nextn_ith(ctx.get(), m - 1);
            if (!h) {
                why = "llama.cpp gives no states of its prediction layers";
                return nullptr;
            }
            own.assign(h, h + n_embd);
        }
    }
    return llama_get_logits_ith(ctx.get(), -1);
}

// tokens of the text that are in its memory: what it drafted and was right is among them
int32_t draft_model::in_common(const text_index & text) const {
    int32_t same = std::min(n_final, (int32_t) held.size());
    while (same < std::min(text.size(), (int32_t) held.size()) && held[same] == text[same]) {
        ++same;
    }
    return same;
}

// a model of its own: what it holds may be the text already, and the path
const float * draft_model::go_on(const text_index & text, const std::vector<int32_t> & path) {
    const int32_t n_text = text.size();
    const int32_t n      = n_text + (int32_t) path.size();
    const auto    token  = [&](int32_t i) {
        return i < n_text ? text[i] : path[i - n_text];
    };

    n_final      = in_common(text);
    int32_t same = n_final;
    while (same >= n_text && same < std::min(n, (int32_t) held.size()) && held[same] == token(same)) {
        ++same;
    }
    same = std::min(same, n - 1); // the last one's logits are wanted
    cut(same);

    std::vector<int32_t> tokens;
    for (int32_t i = same; i < n; ++i) {
        tokens.push_back(token(i));
    }
    return run(same, tokens, nullptr);
}

//
// prediction layers
//

void draft_model::follow(const std::vector<int32_t> & tokens, int32_t pos0, const std::vector<int32_t> & rows) {
    if (!own_layers || !why.empty()) {
        return;
    }
    truncate(pos0);
    if (pos0 != n_final + (int32_t) waiting.size()) { // tokens are missing: what they know of the text begins here
        cut(0);
        waiting.clear();
        n_final = pos0;
    }
    if (pos0 != state0 + n_states()) {
        states.clear();
        state0 = pos0;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        const float * h = llama_get_embeddings_nextn_ith(target, rows[i]);
        if (!h) {
            why = "llama.cpp gives no hidden states for its prediction layers";
            return;
        }
        states.insert(states.end(), h, h + n_embd);
        waiting.push_back(tokens[i]);
    }
    if ((int32_t) waiting.size() >= most_waiting) {
        catch_up(-1);
    }
}

// run them over the settled tokens that wait, and the root, if there is one; logits after the last
const float * draft_model::catch_up(int32_t root) {
    std::vector<int32_t> tokens = waiting;
    if (root >= 0) {
        tokens.push_back(root);
    }
    cut(n_final);
    std::vector<float> rows(tokens.size() * n_embd, 0.0f); // zeros where the state before is not known
    for (int32_t i = 0; i < (int32_t) tokens.size(); ++i) {
        const int32_t at = n_final + i - 1 - state0;
        if (at >= 0 && at < n_states()) {
            std::copy_n(states.begin() + (ptrdiff_t) at * n_embd, n_embd, rows.begin() + (ptrdiff_t) i * n_embd);
        }
    }
    const float * logits = run(n_final, tokens, rows.data());
    if (logits) {
        n_final += (int32_t) waiting.size();
        waiting.clear();
        // the last is before the token that comes next; more are kept, for the text may be cut back
        const int32_t n_old = n_states() - most_kept;
        if (n_old > most_kept) {
            states.erase(states.begin(), states.begin() + (ptrdiff_t) n_old * n_embd);
            state0 += n_old;
        }
    }
    return logits;
}

const float * draft_model::predict(const text_index & text, const std::vector<int32_t> & path) {
    if (path.empty()) {
        return n_final + (int32_t) waiting.size() == text.size() - 1 ? catch_up(text.back()) : nullptr;
    }
    if ((int32_t) held.size() != text.size() + (int32_t) path.size() - 1) {
        return nullptr;
    }
    const std::vector<float> before = own;
    return run((int32_t) held.size(), { path.back() }, before.data());
}

//
// drafts
//

double draft_model::cost(const text_index & text, int32_t l) const {
    const int32_t n_old = own_layers ? n_final : in_common(text);
    const int32_t n_new = l > 0 ? 1 : std::max(1, text.size() - n_old);
    return t_pass + t_token * (n_new - 1);
}

bool draft_model::expand(
    const text_index & text, const std::vector<int32_t> & path, int32_t k, int32_t * tokens, float * log_p) {
    const int32_t n = text.size() + (int32_t) path.size();
    if (!why.empty() || text.size() < 1 || n > (int32_t) llama_n_ctx_seq(ctx.get()) || n_known < k) {
        return false;
    }
    const int64_t t0       = ggml_time_us();
    const double  expected = cost(text, (int32_t) path.size());

    const float * logits = own_layers ? predict(text, path) : go_on(text, path);
    if (!logits) {
        return false;
    }
    outputs::best(logits, n_known, k, tokens, log_p);
    const float log_sum = describe(logits, n_vocab).log_sum;
    for (int32_t i = 0; i < k; ++i) {
        log_p[i] -= log_sum;
        if (!std::isfinite(log_p[i])) {
            why = "its predictions are not numbers (damaged weights?)";
            return false;
        }
    }

    const double took  = (double) (ggml_time_us() - t0);
    const double drift = std::pow(std::clamp(took / std::max(expected, 1.0), 0.25, 4.0), rate);
    t_pass *= drift;
    t_token *= drift;
    return true;
}

} // namespace entmtp
