// Among which tokens a model drafts, and where their logits are read.

#include "draft_model.h"

#include "projection.h"

#include "ggml-backend.h"

#include <cstring>
#include <stdexcept>

namespace entmtp {

// what its graph multiplies with to get logits; null: something follows that needs those of the whole vocabulary
const ggml_tensor * draft_model::projection() const {
    const llama_model * model = llama_get_model(ctx.get());
    if (llama_model_get_tensor(model, "output.bias") ||
        is_of(model, "chameleon")) { // its graph crosses out a range of tokens
        return nullptr;
    }
    const std::string of_layers =
        "blk." + std::to_string(llama_model_n_layer(model)) + ".nextn.shared_head_head.weight";
    const ggml_tensor * res = kind == what::layers ? llama_model_get_tensor(model, of_layers.c_str()) : nullptr;
    res                     = res ? res : llama_model_get_tensor(model, "output.weight");
    return res || kind != what::eagle3 ? res : llama_model_get_tensor(llama_get_model(target), "output.weight");
}

// the tokens of an EAGLE-3 layer's own draft vocabulary
std::vector<int32_t> draft_model::own_tokens(const ggml_tensor * d2t) const {
    std::vector<int64_t> tokens((size_t) d2t->ne[0]);
    ggml_backend_tensor_get(d2t, tokens.data(), 0, ggml_nbytes(d2t));
    for (const int64_t token : tokens) {
        if (token < 0 || token >= n_known) {
            throw std::runtime_error("draft model: its draft vocabulary names token " + std::to_string(token) +
                                     ", and there are " + std::to_string(n_known));
        }
    }
    return { tokens.begin(), tokens.end() };
}

// have it propose n tokens only, if that can be, 0 or all there are: any; or those of its own draft vocabulary
void draft_model::choose_vocabulary(int32_t n) {
    const ggml_tensor * output = projection();
    const ggml_tensor * d2t =
        kind == what::eagle3 ? llama_model_get_tensor(llama_get_model(ctx.get()), "d2t") : nullptr;
    if (!output || !output->buffer || output->ne[2] != 1) {
        return;
    }
    if (d2t && d2t->ne[0] == output->ne[1]) {
        vocabulary = std::make_unique<draft_vocabulary>(output, own_tokens(d2t));
    } else if (!d2t && n > 0 && n < n_known && output->ne[1] == n_vocab && has_rows(output) &&
               !is_remote(output)) { // there each token that comes would take two round trips
        vocabulary = std::make_unique<draft_vocabulary>(output, n);
    } else {
        return;
    }
    llama_set_output_rows(ctx.get(), output, vocabulary->rows());
    llama_set_outputs_to_host(ctx.get(), false);

    // does its graph take them? Some multiply in a way that the patch does not reach
    const std::vector<float> rows(from_states() ? 2 * n_embd : 0, 0.0f);
    own.assign(from_states() ? n_embd : 0, 0.0f);
    has_memory() ? run(0, { 0, 0 }, rows.data()) : ask(0, 0);
    const ggml_tensor * logits = why.empty() ? llama_get_logits_tensor(ctx.get()) : nullptr;
    if (!logits || logits->ne[0] != vocabulary->size()) {
        llama_set_output_rows(ctx.get(), nullptr, nullptr);
        llama_set_outputs_to_host(ctx.get(), true);
        vocabulary.reset();
    }
    cut(0);
}

void draft_model::forget() {
    if (vocabulary) {
        vocabulary->forget();
        n_met = 0;
    }
}

// of the last output of a pass, which is its token `row`: [n_draft_vocab]
const float * draft_model::last_logits(int32_t row) {
    if (!vocabulary) {
        return llama_get_logits_ith(ctx.get(), row);
    }
    const ggml_tensor * t = llama_get_logits_tensor(ctx.get());
    if (!t || t->ne[0] != vocabulary->size()) {
        return nullptr;
    }
    llama_synchronize(ctx.get());
    const size_t at = (size_t) (t->ne[1] - 1) * t->nb[1];
    if (ggml_backend_buffer_is_host(t->buffer)) {
        return (const float *) ((const char *) t->data + at);
    }
    fetched.resize((size_t) t->ne[0]);
    ggml_backend_tensor_get(t, fetched.data(), at, fetched.size() * sizeof(float));
    return fetched.data();
}

void draft_model::check_vocabulary() const {
    const llama_vocab * a = llama_model_get_vocab(llama_get_model(target));
    const llama_vocab * b = llama_model_get_vocab(llama_get_model(ctx.get()));
    const int32_t       n = llama_vocab_n_tokens(a);
    if (llama_vocab_type(a) == LLAMA_VOCAB_TYPE_NONE || llama_vocab_type(b) == LLAMA_VOCAB_TYPE_NONE) {
        throw std::runtime_error("draft model: a file without a vocabulary; a drafter needs the model's own");
    }
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

} // namespace entmtp
