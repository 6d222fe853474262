#include "outputs.h"

#include "candidates.h"
#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <stdexcept>

namespace entmtp {

ggml_backend_dev_t output_device(const llama_model * model) {
    const ggml_tensor * t = llama_model_get_tensor(model, "output.weight");
    if (t && t->buffer && !ggml_backend_buffer_is_host(t->buffer)) {
        if (ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer))) {
            return dev;
        }
    }
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

static bool is_cpu(ggml_backend_dev_t dev) {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

// ggml's code for NVIDIA and AMD launches TOP_K once a row, or sorts whole rows, each in a block of its own; either takes
// as long for a few rows as several layers of a small model
static bool sorts_row_by_row(ggml_backend_dev_t dev) {
    const std::string name = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
    return name == "CUDA" || name == "ROCm" || name == "MUSA";
}

// a sequence that no batch has: the sampler takes part in every graph and samples nothing
static constexpr llama_seq_id no_sequence = -1;

outputs::outputs(llama_context * ctx, bool want_hidden) :
    ctx(ctx), device(output_device(llama_get_model(ctx))),
    n_vocab(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)))),
    n_embd(llama_model_n_embd(llama_get_model(ctx))), want_hidden(want_hidden) {
    llama_set_embeddings_out(ctx, want_hidden);
    set_mode(ENTMTP_OUTPUTS_AUTO);
}

outputs::~outputs() {
    use_reductions(0);
    llama_set_outputs_to_host(ctx, true);
    llama_set_embeddings_out(ctx, false);
}

void outputs::set_mode(int32_t asked) {
    if (asked < ENTMTP_OUTPUTS_AUTO || asked > ENTMTP_OUTPUTS_DEVICE) {
        throw std::runtime_error("outputs: there is no such mode");
    }
    note.clear();

    // In host memory a reduction by ggml's threads costs a pass over every row; walking visits a few of them.
    int32_t next = asked;
    if (asked == ENTMTP_OUTPUTS_AUTO) {
        next = is_cpu(device) ? ENTMTP_OUTPUTS_HOST : ENTMTP_OUTPUTS_DEVICE;
    }

    if (llama_pooling_type(ctx) != LLAMA_POOLING_TYPE_NONE && next != ENTMTP_OUTPUTS_HOST) {
        next = ENTMTP_OUTPUTS_HOST;
        note = "a context with pooling copies its outputs";
    }
    if (next == ENTMTP_OUTPUTS_DEVICE) {
        std::string missing;

        const auto supports = [&](const ggml_tensor * op) {
            return ggml_backend_dev_supports_op(device, op);
        };

        by_chunks = sorts_row_by_row(device);
        most_k    = reducer::most_candidates(supports, n_vocab, n_candidates, by_chunks, missing);
        if (!missing.empty()) {
            announce(std::string(ggml_backend_dev_name(device)) + " cannot run " + missing);
        }
        wanted_k = std::clamp(wanted_k, 1, std::max(most_k, 1));
        next     = most_k > 0 ? next : (int32_t) ENTMTP_OUTPUTS_ROWS;
    }

    mode = next;
    use_reductions(mode == ENTMTP_OUTPUTS_DEVICE ? wanted_k : 0);
}

void outputs::announce(const std::string & why) {
    note = why;
    fprintf(stderr, "entmtp: %s; rows of logits come to the host where it is needed\n", why.c_str());
}

entmtp_outputs_info outputs::info() const {
    entmtp_outputs_info res = {};

    res.mode = mode;
    snprintf(res.device, sizeof(res.device), "%s", ggml_backend_dev_name(device));
    snprintf(res.note, sizeof(res.note), "%s", note.c_str());
    return res;
}

// k = 0: none. Graphs are built anew afterwards
void outputs::use_reductions(int32_t n) {
    if ((reductions ? reductions->k : 0) == n) {
        return;
    }
    if (reductions) {
        llama_set_sampler(ctx, no_sequence, nullptr);
        reductions.reset();
    }
    if (n > 0) {
        reductions = std::make_unique<reducer>(n, by_chunks);
        if (!llama_set_sampler(ctx, no_sequence, reductions->chain())) {
            reductions.reset();
            mode = ENTMTP_OUTPUTS_ROWS;
            announce("llama.cpp takes no samplers into the graphs of this model");
        }
    }
}

//
// a pass
//

void outputs::begin(bool to_host) {
    if (mode == ENTMTP_OUTPUTS_DEVICE) {
        use_reductions(wanted_k);
    }
    at_host = to_host || mode == ENTMTP_OUTPUTS_HOST;
    llama_set_outputs_to_host(ctx, at_host);

    rows.clear();
    is_read  = false;
    k        = 0;
    t_logits = nullptr;
    t_hidden = nullptr;
    n_reused = llama_perf_context(ctx).n_reused;
}

void outputs::end(int32_t n, int32_t first) {
    const int32_t n_ubatch  = (int32_t) llama_n_ubatch(ctx);
    const int64_t n_graphs  = (n + n_ubatch - 1) / n_ubatch;
    const int64_t reused    = llama_perf_context(ctx).n_reused - n_reused;
    const int64_t n_outputs = n - first;

    first_output = first;
    traffic.n_passes++;
    traffic.n_outputs += n_outputs;
    is_built = reused < n_graphs;
    traffic.n_graphs += std::clamp<int64_t>(n_graphs - reused, 0, n_graphs);

    if (at_host) {
        traffic.to_host += n_outputs * (n_vocab + (want_hidden ? n_embd : 0)) * (int64_t) sizeof(float);
        traffic.n_rows += n_outputs;
        traffic.n_syncs++;
        return;
    }
    llama_synchronize(ctx);
    traffic.n_syncs++;

    t_logits = llama_get_logits_tensor(ctx);
    t_hidden = llama_get_embeddings_tensor(ctx);
    if (t_logits && t_logits->ne[1] == n) {
        first_output = 0; // a context for embeddings gives a row of every token
    }
}

const reduction * outputs::reduced() {
    const reduction * r = reductions && t_logits ? reductions->find(t_logits) : nullptr;
    if (r && !is_read) {
        is_read = true;
        k       = r->k;
        values.resize(ggml_nelements(r->values));
        ids.resize(ggml_nelements(r->ids));
        fetch(traffic, r->values, values.data(), 0, ggml_nbytes(r->values));
        fetch(traffic, r->ids, ids.data(), 0, ggml_nbytes(r->ids));
        r->to_tokens(ids, n_vocab);
    }
    return r;
}

int32_t outputs::keep(int32_t i) {
    if (!in_pass(i)) {
        return i;
    }
    kept_row row;
    if (const float * l = logits(i)) {
        row.logits.assign(l, l + n_vocab);
    }
    if (const float * h = want_hidden ? hidden(i) : nullptr) {
        row.hidden.assign(h, h + n_embd);
    }
    n_kept           = (n_kept + 1) % first_kept;
    const int32_t id = first_kept + n_kept;
    kept[id]         = std::move(row);
    return id;
}

void outputs::release(int32_t i) {
    if (!in_pass(i)) {
        kept.erase(i);
    }
}

const float * outputs::logits(int32_t i) {
    if (!in_pass(i)) {
        const auto row = kept.find(i);
        return row != kept.end() && !row->second.logits.empty() ? row->second.logits.data() : nullptr;
    }
    if (at_host) {
        return llama_get_logits_ith(ctx, i);
    }
    const int32_t r = i - first_output;
    if (!t_logits || r < 0 || r >= t_logits->ne[1]) {
        return nullptr;
    }
    const size_t offset     = (size_t) r * t_logits->nb[1];
    const auto [at, is_new] = rows.try_emplace(r);

    traffic.n_rows += is_new;
    if (ggml_backend_buffer_is_host(t_logits->buffer)) {
        return (const float *) ((const char *) t_logits->data + offset);
    }
    auto & row = at->second;
    if (is_new) {
        row.resize(n_vocab);
        fetch(traffic, t_logits, row.data(), offset, row.size() * sizeof(float));
    }
    return row.data();
}

const float * outputs::hidden(int32_t i) {
    if (!in_pass(i)) {
        const auto row = kept.find(i);
        return row != kept.end() && !row->second.hidden.empty() ? row->second.hidden.data() : nullptr;
    }
    if (at_host) {
        return llama_get_embeddings_ith(ctx, i);
    }
    const int32_t r = i - first_output;
    if (!t_hidden || r < 0 || r >= t_hidden->ne[1]) {
        return nullptr;
    }
    const size_t offset = (size_t) r * t_hidden->nb[1];
    if (ggml_backend_buffer_is_host(t_hidden->buffer)) {
        return (const float *) ((const char *) t_hidden->data + offset);
    }
    state.resize(n_embd);
    fetch(traffic, t_hidden, state.data(), offset, state.size() * sizeof(float));
    return state.data();
}

states outputs::hidden_states(std::vector<int32_t> tokens_of_pass) {
    states res;
    if (tokens_of_pass.size() == 1 && !in_pass(tokens_of_pass[0])) {
        res.host = hidden(tokens_of_pass[0]);
        res.rows = { 0 };
        return res;
    }
    res.rows = std::move(tokens_of_pass);
    for (int32_t & r : res.rows) {
        r -= first_output;
    }
    if (at_host) {
        res.host = llama_get_embeddings_ith(ctx, first_output);
    } else {
        res.tensor = t_hidden;
    }
    if (!res.host && !res.tensor) {
        throw std::runtime_error("decoder: the context gives no hidden states; is there another decoder on it?");
    }
    return res;
}

distribution outputs::describe(int32_t i) {
    if (in_pass(i) && !at_host && reduced()) {
        const float * v    = &values[(size_t) (i - first_output) * reduction::width(k)];
        const int32_t best = (int32_t) (std::max_element(v, v + k) - v);
        const float   p    = v[k];
        const float   h    = -v[k + 1];
        if (std::isfinite(h) && p > 0.0f && std::isfinite(v[best])) {
            const float log_max = std::log(p);
            return { std::max(0.0f, h), v[best] - log_max, log_max };
        }
    }
    const float * l = logits(i);
    return l ? entmtp::describe(l, n_vocab) : distribution{};
}

int32_t outputs::best(int32_t i, int32_t n, int32_t * best_ids, float * best_logits) {
    if (in_pass(i) && !at_host && reduced()) {
        // what the device found: not sorted
        const size_t         r = (size_t) (i - first_output);
        const float *        v = &values[r * reduction::width(k)];
        std::vector<int32_t> order(k);
        std::iota(order.begin(), order.end(), 0);
        n = std::min(n, k);
        std::partial_sort(order.begin(), order.begin() + n, order.end(),
                          [&](int32_t a, int32_t b) { return v[a] > v[b]; });
        for (int32_t j = 0; j < n; ++j) {
            best_ids[j]    = ids[r * k + order[j]];
            best_logits[j] = v[order[j]];
        }
        return n;
    }
    const float * l = logits(i);
    return l ? best(l, n_vocab, n, best_ids, best_logits) : 0;
}

int32_t outputs::best(const float * row, int32_t n_vocab, int32_t k, int32_t * best_ids, float * best_logits) {
    const int32_t n = std::min(k, n_vocab);
    top_k(row, n_vocab, n, best_ids);
    for (int32_t j = 0; j < n; ++j) {
        best_logits[j] = row[best_ids[j]];
    }
    return n;
}

float outputs::logit(int32_t i, int32_t token) {
    if (at_host || !in_pass(i)) {
        return logits(i)[token];
    }
    const int32_t r = i - first_output;
    if (reduced()) {
        const int32_t * first = &ids[(size_t) r * k];
        const int32_t * at    = std::find(first, first + k, token);
        if (at != first + k) {
            return values[(size_t) r * reduction::width(k) + (at - first)];
        }
    }
    if (const auto row = rows.find(r); row != rows.end() && !row->second.empty()) {
        return row->second[token];
    }
    float res;
    fetch(traffic, t_logits, &res, (size_t) r * t_logits->nb[1] + (size_t) token * sizeof(float), sizeof(res));
    return res;
}

//
// sample
//

// fills `tokens` with what the sampler must see of the row, unless that is the whole of it
bool outputs::from_candidates(llama_sampler * sampler, int32_t i) {
    const int32_t needed = reductions ? candidates_needed(sampler, most_k) : 0;

    // a graph with more candidates costs more: go back to one only where that lasts
    n_unused = needed > 1 ? 0 : n_unused + (needed == 1);
    if (needed > 1) {
        wanted_k = most_k;
    } else if (n_unused > 256) {
        wanted_k = 1;
    }

    if (needed == 0 || !reduced()) {
        return false;
    }
    const size_t    r  = (size_t) (i - first_output);
    const float *   v  = &values[r * reduction::width(k)];
    const int32_t * id = &ids[r * k];

    tokens.resize(k);
    for (int32_t c = 0; c < k; ++c) {
        tokens[c] = { id[c], v[c], 0.0f };
        if (id[c] < 0 || id[c] >= n_vocab) {
            return false; // a row of nothing but nan has no largest logit
        }
    }
    if (k == 1) {
        // the others are all less probable
        return needed == 1 && v[3] == (float) (1 - n_vocab);
    }
    return candidates_suffice(tokens, needed, n_vocab);
}

int32_t outputs::sample(llama_sampler * sampler, int32_t i) {
    if (at_host && in_pass(i) &&
        (llama_get_sampled_token_ith(ctx, i) != LLAMA_TOKEN_NULL || llama_get_sampled_logits_ith(ctx, i) ||
         llama_get_sampled_probs_ith(ctx, i))) {
        return llama_sampler_sample(sampler, ctx, i); // the context has a sampler of its own
    }
    if (at_host || !in_pass(i) || !from_candidates(sampler, i)) {
        const float * l = logits(i);
        if (!l) {
            throw std::runtime_error("there are no logits to sample from");
        }
        return sample(sampler, l, n_vocab, tokens);
    }
    return apply(sampler, tokens);
}

int32_t outputs::sample(llama_sampler *                 sampler,
                        const float *                   logits,
                        int32_t                         n_vocab,
                        std::vector<llama_token_data> & candidates) {
    if (!shortlist(sampler, logits, n_vocab, candidates)) {
        candidates.resize(n_vocab);
        for (int32_t t = 0; t < n_vocab; ++t) {
            candidates[t] = { t, logits[t], 0.0f };
        }
    }
    return apply(sampler, candidates);
}

// as llama_sampler_sample() does
int32_t outputs::apply(llama_sampler * sampler, std::vector<llama_token_data> & candidates) {
    llama_token_data_array array = { candidates.data(), candidates.size(), -1, false };
    llama_sampler_apply(sampler, &array);
    if (array.selected < 0 || array.selected >= (int64_t) array.size) {
        throw std::runtime_error("the sampler chain chose no token");
    }
    const int32_t token = array.data[array.selected].id;
    llama_sampler_accept(sampler, token);
    return token;
}

} // namespace entmtp
