#include "draft_model.h"

#include "entropy.h"
#include "outputs.h"
#include "positions.h"

#include "../src/llama-ext.h" // prediction layers: C++ only so far, and no part of the public header
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace entmtp {

static constexpr int32_t most_waiting = 256; // states that wait before the layers are run over them
static constexpr int32_t most_kept    = 256; // and that are kept afterwards; now and then twice as many
static constexpr int32_t few          = 16;  // tokens that may all have rows of logits
static constexpr double  rate         = 0.1; // of what a pass took, in what is believed of the next

bool draft_model::is_of(const llama_model * model, const char * architecture) {
    char name[32] = {};
    llama_model_meta_val_str(model, "general.architecture", name, sizeof(name));
    return std::strcmp(name, architecture) == 0;
}

draft_model::draft_model(llama_context *      target,
                         llama_model *        model,
                         llama_context_params params,
                         int32_t              n_draft_vocab) :
    target(target), kind(!model                             ? what::layers
                         : is_of(model, "eagle3")           ? what::eagle3
                         : is_of(model, "gemma4-assistant") ? what::assistant
                                                            : what::model) {
    const llama_model * base = llama_get_model(target);
    if (!model) {
        model    = const_cast<llama_model *>(base);
        n_layers = llama_model_n_layer_nextn(base);
        if (n_layers < 1) {
            throw std::runtime_error("draft model: this model has no layers for multi-token prediction");
        }
    }
    check_layer(base, model);
    if (kind == what::model && (llama_model_is_recurrent(model) || llama_model_is_hybrid(model))) {
        throw std::runtime_error(
            "draft model: its memory holds states (a recurrent or hybrid model), which cannot be cut back when a draft "
            "is refused; use a model of attention alone");
    }
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    n_known = std::min(n_vocab, llama_vocab_n_tokens(llama_model_get_vocab(base)));
    n_embd  = kind == what::eagle3 ? llama_model_n_embd(model) : llama_model_n_embd_out(base);
    n_state = n_embd;
    n_batch = (int32_t) std::min(llama_n_ctx_seq(target), 512u);

    if (kind == what::assistant && llama_model_n_embd_out(model) != n_embd) {
        throw std::runtime_error("draft model: it takes states of " + std::to_string(llama_model_n_embd_out(model)) +
                                 " numbers, the model's have " + std::to_string(n_embd));
    }

    params.n_ctx          = llama_n_ctx_seq(target);
    params.n_batch        = (uint32_t) n_batch;
    params.n_ubatch       = (uint32_t) n_batch;
    params.n_seq_max      = 1;
    params.n_rs_seq       = 0;
    params.embeddings     = false;
    params.ctx_type       = kind == what::layers ? LLAMA_CONTEXT_TYPE_MTP : LLAMA_CONTEXT_TYPE_DEFAULT;
    params.ctx_other      = from_states() ? target : nullptr;
    params.abort_callback = nullptr;
    params.samplers       = nullptr; // the target's own
    params.n_samplers     = 0;
    ctx.reset(llama_init_from_model(model, params));
    if (!ctx) {
        throw std::runtime_error("draft model: llama.cpp cannot make a context of it");
    }
    if (!llama_get_memory(ctx.get())) {
        throw std::runtime_error("draft model: it has no memory to decode with (an encoder?)");
    }
    if (kind == what::layers || kind == what::assistant) {
        llama_set_embeddings_nextn(target, true, /*masked*/ false);
    }
    if (kind != what::layers) {
        check_vocabulary();
    }
    if (kind == what::eagle3) {
        follow_layers();
    }
    if (from_states()) {
        llama_set_embeddings_nextn(ctx.get(), true, /*masked*/ true);
    }
    batch.reset(llama_batch_ext_init(ctx.get()));
    choose_vocabulary(n_draft_vocab < 0 ? draft_vocabulary::usual(n_known) : n_draft_vocab);
    measure();
    if (!why.empty()) {
        throw std::runtime_error("draft model: " + why);
    }
}

// EAGLE-3: a layer reads states, and where it has none of its own the embeddings and the projection, of a model as wide as
// the one it was trained for; llama.cpp ends the process with others
void draft_model::check_layer(const llama_model * base, const llama_model * model) const {
    if (kind != what::eagle3) {
        return;
    }
    const auto tensor = [&](const char * name) {
        return llama_model_get_tensor(model, name);
    };
    const int64_t       wide  = llama_model_n_embd(base);
    const int64_t       n_in  = (int64_t) llama_model_target_layer_ids_n(model) * wide;
    const ggml_tensor * fc    = tensor("fc.weight");
    const bool          lends = !tensor("token_embd.weight") || !tensor("output.weight");
    if ((fc && fc->ne[0] != n_in) || (lends && llama_model_n_embd(model) != wide)) {
        throw std::runtime_error("draft model: it was trained for a model of another width than " +
                                 std::to_string(wide));
    }
}

// EAGLE-3: have the target give the inputs of some of its layers
void draft_model::follow_layers() {
    const llama_model * base  = llama_get_model(target);
    const llama_model * model = llama_get_model(ctx.get());
    const int32_t       width = llama_model_n_embd(base);

    inputs_of = llama_model_target_layer_ids(model);
    n_inputs  = (int32_t) llama_model_target_layer_ids_n(model);
    n_state   = n_inputs * width;
    for (int32_t i = 0; i < n_inputs; ++i) {
        if (inputs_of[i] < 0 || inputs_of[i] >= llama_model_n_layer(base)) {
            throw std::runtime_error("draft model: it wants the input of layer " + std::to_string(inputs_of[i]) +
                                     ", but the model has " + std::to_string(llama_model_n_layer(base)));
        }
        llama_set_embeddings_layer_inp(target, (uint32_t) inputs_of[i], true);
    }
}

// what passes cost: of one token, and of each that comes along
void draft_model::measure() {
    if (!has_memory()) {
        const auto time = [&] {
            const int64_t t0 = ggml_time_us();
            own.assign((size_t) n_embd, 0.0f);
            ask(0, 0);
            return (double) (ggml_time_us() - t0);
        };
        time();
        t_pass = std::min({ time(), time(), time() });
        return;
    }
    const std::vector<int32_t> tokens(16, 0);
    const std::vector<float>   rows(from_states() ? tokens.size() * n_embd : 0, 0.0f);
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
    if (!llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, std::max(pos - shift(), 0), -1)) {
        why = "llama.cpp could not cut its memory back";
    }
    held.resize(std::max(pos, 0));
}

void draft_model::truncate(int32_t pos) {
    n_met                = std::min(n_met, pos);
    const int32_t n_seen = n_final;
    n_final              = std::min(n_final, pos);
    if (!from_states()) {
        return;
    }
    cut(n_final);
    waiting.resize(std::clamp(pos - n_seen, 0, (int32_t) waiting.size()));
    states.resize((size_t) std::clamp(pos - state0, 0, n_states()) * n_state);
}

// Evaluate tokens from a position on; logits after the last of them, null: it failed
//   rows  prediction layers: [n][n_embd] the hidden states before them
const float * draft_model::run(int32_t pos0, const std::vector<int32_t> & tokens, const float * rows) {
    const int32_t n = (int32_t) tokens.size();
    if (std::any_of(tokens.begin(), tokens.end(), [&](int32_t t) { return t < 0 || t >= n_vocab; })) {
        return nullptr; // not known, or not to it
    }
    // the first token of a text has no state before it, and no place in the memory of an EAGLE-3 layer
    const int32_t n_skip = std::max(0, shift() - pos0);
    if (n_skip > 0) {
        held.assign(tokens.begin(), tokens.begin() + n_skip);
    }
    for (int32_t i = n_skip, m = 0; i < n; i += m) {
        m = std::min(n - i, n_batch);
        if (kind == what::eagle3 && i + m == n && m > few) {
            m -= few;
        }
        // llama.cpp's graph of EAGLE-3 gives rows for all tokens or for none
        const bool is_last = i + m == n;
        llama_batch_ext_clear(batch.get());
        for (int32_t j = 0; j < m; ++j) {
            const bool    output = is_last && (j == m - 1 || kind == what::eagle3);
            const float * row    = from_states() ? rows + (size_t) (i + j) * n_embd : nullptr;
            if (!add(j, tokens[i + j], pos0 + i + j - shift(), row, output)) {
                return nullptr;
            }
        }
        if (!process(is_last ? m - 1 : -1)) {
            llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, std::max((int32_t) held.size() - shift(), 0), -1);
            return nullptr;
        }
        held.resize(pos0 + i, -1);
        held.insert(held.end(), tokens.begin() + i, tokens.begin() + i + m);
    }
    return n > n_skip ? last_logits(-1) : nullptr;
}

// the i-th token of a batch
//   row  [n_embd] the hidden state before it, null: it takes none
bool draft_model::add(int32_t i, int32_t token, int32_t pos, const float * row, bool output) {
    return llama_batch_ext_add_token(batch.get(), 0, token) == i && llama_batch_ext_set_pos(batch.get(), i, &pos) &&
           llama_batch_ext_set_output_logits(batch.get(), i, output) &&
           (!row || llama_batch_ext_set_embd_token(batch.get(), i, { row, 1, (size_t) n_embd }));
}

// evaluate the batch; its own state after the token `last` is kept, -1: of none
bool draft_model::process(int32_t last) {
    const int32_t status = llama_process(ctx.get(), LLAMA_PROCESS_TYPE_DECODE, batch.get());
    if (status != 0) {
        if (status < 0) {
            why = "llama.cpp could not evaluate it (status " + std::to_string(status) + ")";
        }
        return false;
    }
    if (from_states() && last >= 0) {
        const float * h = llama_get_embeddings_nextn_ith(ctx.get(), last);
        if (!h) {
            why = "llama.cpp gives no states of it";
            return false;
        }
        own.assign(h, h + n_embd);
    }
    return true;
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
    if (!why.empty()) {
        return nullptr;
    }

    std::vector<int32_t> tokens;
    for (int32_t i = same; i < n; ++i) {
        tokens.push_back(token(i));
    }
    return run(same, tokens, nullptr);
}

//
// prediction layers, EAGLE-3 and assistants
//

void draft_model::follow(const std::vector<int32_t> & tokens, int32_t pos0, const std::vector<int32_t> & rows) {
    if (!from_states() || !why.empty()) {
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
        if (!read_state(rows[i])) {
            why = "llama.cpp gives no hidden states for it";
            return;
        }
        waiting.push_back(tokens[i]);
    }
    if (!has_memory()) {
        n_final += (int32_t) waiting.size();
        waiting.clear();
        drop_old_states();
    } else if ((int32_t) waiting.size() >= most_waiting) {
        catch_up(-1);
    }
}

// the last is before the token that comes next; more are kept, for the text may be cut back
void draft_model::drop_old_states() {
    const int32_t n_old = n_states() - most_kept;
    if (n_old > most_kept) {
        states.erase(states.begin(), states.begin() + (ptrdiff_t) n_old * n_state);
        state0 += n_old;
    }
}

// the target's state after a token of its last pass goes to `states`
bool draft_model::read_state(int32_t row) {
    if (kind != what::eagle3) {
        const float * h = llama_get_embeddings_nextn_ith(target, row);
        states.insert(states.end(), h, h ? h + n_state : h);
        return h != nullptr;
    }
    const int32_t width = n_state / n_inputs;
    for (int32_t i = 0; i < n_inputs; ++i) {
        const float * h = llama_get_embeddings_layer_inp(target, (uint32_t) inputs_of[i]);
        if (!h) {
            return false;
        }
        states.insert(states.end(), h + (size_t) row * width, h + (size_t) (row + 1) * width);
    }
    return true;
}

// EAGLE-3: states of the target as the layer wants them
//   rows  [n][n_state] -> [n][n_embd]
bool draft_model::encode(std::vector<float> & rows) {
    const int32_t      n = (int32_t) rows.size() / n_state;
    std::vector<float> res;
    for (int32_t i = 0, m = 0; i < n; i += m) {
        m = std::min(n - i, n_batch);
        llama_batch_ext_clear(batch.get());
        for (int32_t j = 0; j < m; ++j) {
            const float * row = rows.data() + (size_t) (i + j) * n_state;
            const int32_t pos = std::max((int32_t) held.size() - shift(), 0) + j; // not looked at
            if (llama_batch_ext_add_embd(batch.get(), 0, { row, 1, (size_t) n_state }) != j ||
                !llama_batch_ext_set_pos(batch.get(), j, &pos) ||
                !llama_batch_ext_set_output_logits(batch.get(), j, true)) {
                return false;
            }
        }
        if (llama_process(ctx.get(), LLAMA_PROCESS_TYPE_ENCODE, batch.get()) != 0) {
            why = "llama.cpp could not evaluate it";
            return false;
        }
        const float * g = llama_get_embeddings_nextn(ctx.get());
        res.insert(res.end(), g, g + (size_t) m * n_embd);
    }
    rows = std::move(res);
    return true;
}

// run them over the settled tokens that wait, and the root, if there is one; logits after the last
const float * draft_model::catch_up(int32_t root) {
    std::vector<int32_t> tokens = waiting;
    if (root >= 0) {
        tokens.push_back(root);
    }
    cut(n_final);
    std::vector<float> rows(tokens.size() * n_state, 0.0f); // zeros where the state before is not known
    for (int32_t i = 0; i < (int32_t) tokens.size(); ++i) {
        const int32_t at = n_final + i - 1 - state0;
        if (at >= 0 && at < n_states()) {
            std::copy_n(states.begin() + (ptrdiff_t) at * n_state, n_state, rows.begin() + (ptrdiff_t) i * n_state);
        }
    }
    if (kind == what::eagle3 && !encode(rows)) {
        return nullptr;
    }
    const float * logits = run(n_final, tokens, rows.data());
    if (logits) {
        n_final += (int32_t) waiting.size();
        waiting.clear();
        drop_old_states();
    }
    return logits;
}

// an assistant: from the state before a token, `own`, and the target's keys and values before a position
const float * draft_model::ask(int32_t token, int32_t pos) {
    if (token < 0 || token >= n_vocab) {
        return nullptr; // not known, or not to it
    }
    const std::vector<float> before = own;
    llama_batch_ext_clear(batch.get());
    return add(0, token, pos, before.data(), true) && process(0) ? last_logits(0) : nullptr;
}

const float * draft_model::look(const text_index & text, const std::vector<int32_t> & path) {
    const int32_t pos = text.size() - 1; // of a path's tokens, too
    if (!path.empty()) {
        return ask(path.back(), pos);
    }
    const int32_t at = pos - 1 - state0;
    if (at < 0 || at >= n_states()) {
        return nullptr; // what came before was not followed
    }
    own.assign(states.begin() + (ptrdiff_t) at * n_state, states.begin() + (ptrdiff_t) (at + 1) * n_state);
    return ask(text.back(), pos);
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

// tokens that it would have to be run over to draft after a path of l tokens
int32_t draft_model::n_new(const text_index & text, int32_t l) const {
    const int32_t n_old = from_states() ? n_final : in_common(text);
    return l > 0 || !has_memory() ? 1 : std::max(1, text.size() - n_old);
}

double draft_model::cost(const text_index & text, int32_t l) const {
    return t_pass + t_token * (n_new(text, l) - 1);
}

// what it took to be run over n tokens
void draft_model::observe(int32_t n, double us) {
    const auto follow = [](double & believed, double seen) {
        believed += rate * (std::clamp(seen, 0.25 * believed, 4.0 * believed + 1.0) - believed); // hiccups aside
    };
    if (n == 1 || us < t_pass) {
        follow(t_pass, us);
    } else {
        follow(t_token, (us - t_pass) / (n - 1));
    }
}

bool draft_model::expand(
    const text_index & text, const std::vector<int32_t> & path, int32_t k, int32_t * tokens, float * log_p) {
    const int32_t n = text.size() + (int32_t) path.size();
    if (!why.empty() || text.size() < 1 || n > n_positions(ctx.get()) || n_draft_vocab() < k) {
        return false;
    }
    const int64_t t0    = ggml_time_us();
    const int32_t n_run = n_new(text, (int32_t) path.size());

    for (n_met = std::min(n_met, text.size()); vocabulary && n_met < text.size(); ++n_met) {
        vocabulary->meet(text[n_met]);
    }
    const float * logits = !has_memory() ? look(text, path) : from_states() ? predict(text, path) : go_on(text, path);
    if (!logits) {
        return false;
    }
    outputs::best(logits, n_draft_vocab(), k, tokens, log_p);
    const float log_sum = describe(logits, vocabulary ? vocabulary->size() : n_vocab).log_sum;
    for (int32_t i = 0; i < k; ++i) {
        tokens[i] = vocabulary ? vocabulary->token(tokens[i]) : tokens[i];
        log_p[i] -= log_sum;
        if (!std::isfinite(log_p[i])) {
            why = "its predictions are not numbers (damaged weights?)";
            return false;
        }
    }

    observe(n_run, (double) (ggml_time_us() - t0));
    return true;
}

} // namespace entmtp
