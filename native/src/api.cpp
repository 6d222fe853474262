// The C boundary: pointers are checked, exceptions become statuses.

#include "entmtp.h"

#include "api.h"
#include "bandwidth.h"
#include "hook.h"
#include "llama.h"
#include "peaks.h"
#include "replay.h"

#include <algorithm>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

thread_local std::string entmtp::last_error;

using entmtp::fail;
using entmtp::guarded;
using entmtp::last_error;

const char * entmtp_version(void) {
    return ENTMTP_VERSION;
}

const char * entmtp_last_error(void) {
    return last_error.c_str();
}

//
// heads
//

entmtp_heads * entmtp_heads_load(const char * path, const llama_model * model, int32_t n_threads) {
    entmtp_heads * res = nullptr;
    guarded([&] {
        if (!path || !model) {
            return fail("no path or no model");
        }
        res = new entmtp_heads{ { path, model, std::max(n_threads, 1) } };
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

void entmtp_heads_free(entmtp_heads * heads) {
    delete heads;
}

void entmtp_heads_get_info(const entmtp_heads * heads, entmtp_heads_info * info) {
    if (info) {
        *info = heads ? heads->impl.info() : entmtp_heads_info{};
    }
}

int32_t entmtp_heads_logits(entmtp_heads * heads, int32_t head, const float * h, const int32_t * path, float * logits) {
    return guarded([&] {
        if (!heads || !h || !path || !logits) {
            return fail("a pointer is missing");
        }
        heads->impl.logits(head, h, path, logits);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_heads_expand(entmtp_heads *  heads,
                            int32_t         head,
                            const float *   h,
                            const int32_t * paths,
                            int32_t         n,
                            int32_t         k,
                            int32_t *       tokens,
                            float *         log_p) {
    return guarded([&] {
        if (!heads || !h || !paths || !tokens || !log_p) {
            return fail("a pointer is missing");
        }
        if (head < 0 || head >= heads->impl.n_heads()) {
            return fail("there is no such head");
        }
        const entmtp_heads_info info = heads->impl.info();
        if (n < 1 || n > 4096 || k < 1 || k > info.n_vocab_draft || (n > 1 && !info.grounded)) {
            return fail("more paths or guesses than these heads can give");
        }
        if (info.grounded && std::any_of(paths, paths + (ptrdiff_t) n * (head + 1),
                                         [&](int32_t t) { return t < 0 || t >= info.n_vocab; })) {
            return fail("a token of a path is not in the vocabulary");
        }
        heads->impl.expand(head, { h, nullptr, { 0 } }, paths, n, k, tokens, log_p);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_heads_prefix(entmtp_heads * heads, const float * h, int32_t n, int32_t pos0, float * out) {
    return guarded([&] {
        if (!heads || !h || !out) {
            return fail("a pointer is missing");
        }
        entmtp::prefix_layer * prefix = heads->impl.prefix();
        if (!prefix) {
            return fail("these heads have no prefix layer");
        }
        if (n < 1 || pos0 < 0 || pos0 > (1 << 24) || n > (1 << 24)) {
            return fail("no hidden states, or positions that make no sense");
        }
        if (prefix->size() < pos0 + n) {
            if (pos0 > 0 && prefix->size() > 0) {
                return fail("the cache of the prefix layer is full; run it again from position 0");
            }
            heads->impl.reserve_prefix(std::max(pos0 + n, 4096));
        }
        prefix->truncate(pos0);
        std::vector<int32_t> rows(n);
        std::iota(rows.begin(), rows.end(), 0);
        prefix->add({ h, nullptr, rows }, pos0);
        prefix->read(out);
        return (int32_t) ENTMTP_OK;
    });
}

uint64_t entmtp_vocab_fingerprint(const llama_model * model) {
    uint64_t res = 0;
    guarded([&] {
        res = model ? entmtp::vocab_fingerprint(model) : 0;
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

//
// decoder
//

// what a decoder says of itself
template <typename R, typename F>
static R held(const entmtp_decoder * dec, R without, F && f) {
    if (!dec) {
        return without;
    }
    const auto hold = dec->impl.hold();
    return f(dec->impl);
}

entmtp_decoder * entmtp_decoder_init(llama_context * ctx, entmtp_heads * heads) {
    entmtp_decoder * res = nullptr;
    guarded([&] {
        if (!ctx) {
            return fail("no context");
        }
        if (!llama_get_memory(ctx)) {
            return fail("this model has no memory to decode with (an encoder?)");
        }
        res = new entmtp_decoder{ { ctx, heads ? &heads->impl : nullptr } };
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

void entmtp_decoder_free(entmtp_decoder * dec) {
    delete dec;
}

static std::vector<entmtp::tree>
make_bank(int32_t n_trees, const int32_t * n_nodes, const int32_t * parent, const int32_t * rank) {
    if (n_trees < 1 || !n_nodes || !parent || !rank) {
        throw std::runtime_error("bank: no trees");
    }
    std::vector<entmtp::tree> bank;
    for (int32_t i = 0; i < n_trees; ++i) {
        bank.push_back(entmtp::make_tree(parent, rank, n_nodes[i]));
        parent += n_nodes[i];
        rank += n_nodes[i];
    }
    return bank;
}

int32_t entmtp_decoder_set_trees(
    entmtp_decoder * dec, int32_t n_trees, const int32_t * n_nodes, const int32_t * parent, const int32_t * rank) {
    return guarded(dec, [&](entmtp::decoder & d) {
        d.set_trees(make_bank(n_trees, n_nodes, parent, rank));
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_set_policy(entmtp_decoder * dec, const entmtp_policy_params * params) {
    return guarded(dec, [&](entmtp::decoder & d) {
        if (!params) {
            return fail("policy: no parameters");
        }
        d.set_policy(*params);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_set_threads(entmtp_decoder * dec, int32_t n_threads, const entmtp_costs * costs) {
    return guarded(dec, [&](entmtp::decoder & d) {
        if (n_threads < 1 || n_threads > 1024) {
            return fail("threads: 1 to 1024");
        }
        d.set_threads(n_threads, costs);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_eval(entmtp_decoder * dec, const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs) {
    return guarded(dec, [&](entmtp::decoder & d) {
        return tokens || n == 0 ? d.eval(tokens, n, n_past, all_outputs) : fail("no tokens");
    });
}

int32_t entmtp_decoder_sample(entmtp_decoder * dec, llama_sampler * sampler, int32_t * token) {
    return guarded(
        dec, [&](entmtp::decoder & d) { return sampler && token ? d.sample(sampler, token) : fail("no sampler"); });
}

int32_t entmtp_decoder_sample_typical(
    entmtp_decoder * dec, llama_sampler * sampler, float temp, float epsilon, float alpha, int32_t * token) {
    return guarded(dec, [&](entmtp::decoder & d) {
        return sampler && token ? d.sample_typical(sampler, { temp, epsilon, alpha }, token)
                                : fail("no sampler or token");
    });
}

bool entmtp_decoder_is_drafted(const entmtp_decoder * dec, int32_t token) {
    return held(dec, false, [&](const entmtp::decoder & d) { return d.is_drafted(token); });
}

uint32_t entmtp_decoder_drafted_by(const entmtp_decoder * dec, int32_t token) {
    return held(dec, 0u, [&](const entmtp::decoder & d) { return d.drafted_by(token); });
}

void entmtp_decoder_set_text(entmtp_decoder * dec, const int32_t * tokens, int32_t n) {
    guarded(dec, [&](entmtp::decoder & d) {
        d.set_text(tokens, tokens ? n : 0);
        return (int32_t) ENTMTP_OK;
    });
}

void entmtp_decoder_forget(entmtp_decoder * dec) {
    guarded(dec, [&](entmtp::decoder & d) {
        d.forget();
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_get_acceptance(const entmtp_decoder * dec, float * weights) {
    if (!dec || !weights) {
        return fail("no decoder, or no room for the weights");
    }
    const auto   hold = dec->impl.hold();
    const auto & w    = dec->impl.acceptance_weights();
    std::copy(w.begin(), w.end(), weights);
    return ENTMTP_OK;
}

int32_t entmtp_decoder_settle(entmtp_decoder * dec) {
    return guarded(dec, [&](entmtp::decoder & d) { return d.settle(); });
}

void entmtp_decoder_invalidate(entmtp_decoder * dec, int32_t n_past) {
    guarded(dec, [&](entmtp::decoder & d) {
        d.invalidate(n_past);
        return (int32_t) ENTMTP_OK;
    });
}

const float * entmtp_decoder_logits(entmtp_decoder * dec) {
    const float * res = nullptr;
    guarded(dec, [&](entmtp::decoder & d) {
        res = d.logits();
        return (int32_t) ENTMTP_OK;
    });
    return res && !dec->impl.servers.lost() ? res : nullptr;
}

const float * entmtp_decoder_all_logits(entmtp_decoder * dec) {
    const float * res = nullptr;
    guarded(dec, [&](entmtp::decoder & d) {
        res = d.all_logits();
        return (int32_t) ENTMTP_OK;
    });
    return res && !dec->impl.servers.lost() ? res : nullptr;
}

const float * entmtp_decoder_hidden(entmtp_decoder * dec) {
    const float * res = nullptr;
    guarded(dec, [&](entmtp::decoder & d) {
        res = d.hidden();
        return (int32_t) ENTMTP_OK;
    });
    return res && !dec->impl.servers.lost() ? res : nullptr;
}

int32_t entmtp_decoder_signals(entmtp_decoder * dec, int32_t token, entmtp_signals * signals) {
    return guarded(dec, [&](entmtp::decoder & d) {
        if (!signals || token < 0 || token >= d.n_vocab) {
            return fail("no room for the signals, or no such token");
        }
        *signals = d.signals(token);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_set_outputs(entmtp_decoder * dec, int32_t mode) {
    return guarded(dec, [&](entmtp::decoder & d) {
        d.set_outputs(mode);
        return (int32_t) ENTMTP_OK;
    });
}

void entmtp_decoder_get_outputs(const entmtp_decoder * dec, entmtp_outputs_info * info) {
    if (info) {
        *info = dec ? dec->impl.outputs_info() : entmtp_outputs_info{};
    }
}

void entmtp_decoder_get_traffic(const entmtp_decoder * dec, entmtp_traffic * traffic) {
    if (traffic) {
        *traffic = held(dec, entmtp_traffic{}, [](const entmtp::decoder & d) { return d.traffic(); });
    }
}

int32_t entmtp_decoder_n_evaluated(const entmtp_decoder * dec) {
    return held(dec, -1, [](const entmtp::decoder & d) { return d.n_evaluated(); });
}

bool entmtp_decoder_can_continue(const entmtp_decoder * dec, int32_t n_past) {
    return held(dec, false, [&](const entmtp::decoder & d) { return d.can_continue(n_past); });
}

bool entmtp_decoder_can_chain(const entmtp_decoder * dec) {
    return held(dec, false, [](const entmtp::decoder & d) { return d.can_chain(); });
}

bool entmtp_decoder_can_tree(const entmtp_decoder * dec) {
    return dec && dec->impl.can_tree();
}

void entmtp_decoder_cancel(entmtp_decoder * dec) {
    if (dec) {
        dec->impl.cancel(true);
    }
}

void entmtp_decoder_resume(entmtp_decoder * dec) {
    if (dec) {
        dec->impl.cancel(false);
    }
}

//
// statistics
//

void entmtp_decoder_set_stats(entmtp_decoder * dec, bool enabled) {
    guarded(dec, [&](entmtp::decoder & d) {
        d.set_stats(enabled);
        return (int32_t) ENTMTP_OK;
    });
}

size_t entmtp_decoder_n_steps(const entmtp_decoder * dec) {
    return held(dec, (size_t) 0, [](const entmtp::decoder & d) { return d.steps.size(); });
}

size_t entmtp_decoder_get_steps(const entmtp_decoder * dec, entmtp_step * steps, size_t first, size_t n) {
    return held(dec, (size_t) 0, [&](const entmtp::decoder & d) {
        if (!steps || first >= d.steps.size()) {
            return (size_t) 0;
        }
        n = std::min(n, d.steps.size() - first);
        for (size_t i = 0; i < n; ++i) {
            steps[i] = d.steps[first + i];
        }
        return n;
    });
}

void entmtp_decoder_get_older_steps(const entmtp_decoder * dec,
                                    entmtp_step_sums *     sums,
                                    int64_t *              by_tree,
                                    int32_t                n_trees) {
    if (dec && sums && by_tree) {
        const auto hold = dec->impl.hold();
        *sums           = dec->impl.steps.older();
        for (int32_t i = 0; i < n_trees; ++i) {
            by_tree[i] = dec->impl.steps.older_with((size_t) i);
        }
    }
}

void entmtp_decoder_reset_stats(entmtp_decoder * dec) {
    guarded(dec, [&](entmtp::decoder & d) {
        d.reset_stats();
        return (int32_t) ENTMTP_OK;
    });
}

//
// replay
//

int64_t entmtp_replay(const entmtp_trace *         trace,
                      int32_t                      n_trees,
                      const int32_t *              n_nodes,
                      const int32_t *              parent,
                      const int32_t *              rank,
                      const entmtp_policy_params * params,
                      const entmtp_costs *         truth,
                      entmtp_step *                steps,
                      int64_t                      n_max) {
    int64_t       n      = 0;
    const int32_t status = guarded([&] {
        const auto bank = make_bank(n_trees, n_nodes, parent, rank);
        n               = entmtp::replay(trace, bank, params, truth, steps, n_max);
        return (int32_t) ENTMTP_OK;
    });
    return status == ENTMTP_OK ? n : status;
}

int32_t entmtp_kernels_enable(const char * name) {
    if (entmtp::kernels_enable(name)) {
        return ENTMTP_OK;
    }
    std::string have;
    for (int32_t i = 0; entmtp_kernels_name(i); ++i) {
        have += std::string(i ? ", " : "") + entmtp_kernels_name(i);
    }
    return fail(("this processor has no kernels named " + std::string(name) + "; it has " + have).c_str());
}

void entmtp_kernels_disable(void) {
    entmtp::kernels_disable();
}

const char * entmtp_kernels_current(void) {
    const entmtp::kernel_set * set = entmtp::kernels_current();
    return set ? set->name : nullptr;
}

const char * entmtp_kernels_name(int32_t i) {
    const entmtp::kernel_set * const * sets = entmtp::kernel_sets();
    for (int32_t k = 0; sets[k]; ++k) {
        if (k == i) {
            return sets[k]->name;
        }
    }
    return nullptr;
}

void entmtp_kernels_hold(int32_t embeddings, int32_t locked) {
    entmtp::kernels_hold(embeddings != 0, locked != 0);
}

uint64_t entmtp_kernels_unlocked(void) {
    return entmtp::kernels_unlocked();
}

int32_t entmtp_kernels_of(int32_t type) {
    return entmtp::kernels_of(type);
}

uint64_t entmtp_kernels_missed(void) {
    return entmtp::kernels_missed();
}

int32_t entmtp_machine_peaks(int32_t n_threads, double * bytes_per_s, double * macs_per_s) {
    return guarded([&] {
        if (n_threads < 1 || !bytes_per_s || !macs_per_s) {
            return fail("machine_peaks: at least one thread and two results");
        }
        entmtp::machine_peaks(n_threads, bytes_per_s, macs_per_s);
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_device_bandwidth(const llama_model * model, double * bytes_per_s) {
    return guarded([&] {
        if (!model || !bytes_per_s) {
            return fail("no model, or no room for the result");
        }
        *bytes_per_s = entmtp::device_bandwidth(entmtp::output_device(model));
        return (int32_t) ENTMTP_OK;
    });
}
