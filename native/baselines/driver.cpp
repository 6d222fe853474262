// llama.cpp's own drafting (common/speculative.h) for prompts that come one after the other, to be compared with ours.
//
//   entmtp-speculative -m model.gguf --spec-type ngram-simple --spec-ngram-simple-size-m 16 [options of llama.cpp]
//
// ENTMTP_LIBRARY: path of libentmtp, whose CPU kernels then take part; without it ggml computes.
// First a line {"kernels": name or null, "n_max": most drafts of a step}. Then a line for each one on stdin:
//
//   {"tokens": [..], "n": 128, "temp": 0.0, "seed": 1}
//   {"tokens": [..], "times": [..], "prompt_ms": .., "decode_ms": .., "passes": .., "drafted": .., "accepted": ..}
//
// or {"error": sentence}. times: seconds after the first token. [n]

#include "arg.h"
#include "common.h"
#include "llama.h"
#include "log.h"
#include "sampling.h"
#include "speculative.h"

#include <dlfcn.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>

using json = nlohmann::ordered_json;

namespace {

void check(bool ok, const std::string & what) {
    if (!ok) {
        throw std::runtime_error(what);
    }
}

// turns the kernels of libentmtp on and returns their name; null where ggml computes
// The library finds libllama loaded already: both call it by one name.
json enable_kernels() {
    const char * path = std::getenv("ENTMTP_LIBRARY");
    if (!path || !*path) {
        return nullptr;
    }
    void * library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    check(library, library ? "" : dlerror());
    const auto enable  = reinterpret_cast<int32_t (*)(const char *)>(dlsym(library, "entmtp_kernels_enable"));
    const auto current = reinterpret_cast<const char * (*)()>(dlsym(library, "entmtp_kernels_current"));
    check(enable && current, std::string(path) + " is not libentmtp");
    const char * name = std::getenv("ENTMTP_KERNELS");
    check(enable(name) == 0, "this processor has no such kernels");
    return current();
}

double seconds(int64_t from, int64_t to) {
    return 1e-6 * (double) (to - from);
}

struct drafting {
    common_params                      params;
    common_init_result_ptr             target;
    common_speculative_init_result_ptr draft;
    common_speculative_ptr             spec;

    llama_context * ctx     = nullptr;
    llama_context * ctx_dft = nullptr; // null where text alone drafts

    explicit drafting(common_params given) : params(std::move(given)) {
        const auto limits =
            common_speculative_get_output_limits(params.n_batch, 1, common_speculative_n_max(&params.speculative));
        params.n_outputs_max         = limits.total;
        params.n_outputs_max_per_seq = limits.per_seq;

        target = common_init_from_params(params);
        ctx    = target->context();
        check(ctx, "the model could not be loaded: " + params.model.path);

        auto params_dft = common_base_params_to_speculative(params);
        draft           = common_speculative_init_from_params(params_dft, target->model(), ctx);
        ctx_dft         = draft->context();
        check(common_context_can_seq_rm(ctx) != COMMON_CONTEXT_SEQ_RM_TYPE_FULL &&
                  (!ctx_dft || common_context_can_seq_rm(ctx_dft) != COMMON_CONTEXT_SEQ_RM_TYPE_FULL),
              "the memory of this model cannot be cut back, which drafting needs here");

        params.speculative.draft.ctx_tgt = ctx;
        params.speculative.draft.ctx_dft = ctx_dft;
        spec.reset(common_speculative_init(params.speculative, 1));
    }

    void forget(llama_pos from) {
        llama_memory_seq_rm(llama_get_memory(ctx), 0, from, -1);
        if (ctx_dft) {
            llama_memory_seq_rm(llama_get_memory(ctx_dft), 0, from, -1);
        }
    }

    void process(common_batch & batch) {
        check(llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch.get()) == 0, "a pass of the model failed");
        check(common_speculative_process(spec.get(), batch), "the drafting model's pass failed");
    }

    json answer(const llama_tokens & prompt, int n, float temp, uint32_t seed) {
        check(!prompt.empty() && n > 0 && prompt.size() + n <= llama_n_ctx(ctx), "prompt and answer do not fit");
        params.sampling.temp  = temp;
        params.sampling.seed  = seed;
        params.sampling.top_k = temp > 0.0f ? 40 : 1; // greedy: no need to sort the vocabulary
        common_sampler_ptr sampler(common_sampler_init(target->model(), params.sampling));
        const llama_token  eos = llama_vocab_eos(llama_model_get_vocab(target->model()));

        const int64_t begin = ggml_time_us();
        forget(0);
        common_batch batch(ctx);
        for (size_t i = 0; i < prompt.size(); ++i) {
            batch.add(prompt[i], (llama_pos) i, 0, i + 1 == prompt.size());
            if (batch.size() == params.n_batch || i + 1 == prompt.size()) {
                process(batch);
                if (i + 1 < prompt.size()) {
                    batch.clear();
                }
            }
        }
        llama_tokens said{ common_sampler_sample(sampler.get(), ctx, -1) };
        common_sampler_accept(sampler.get(), said.back(), true);

        llama_tokens text = prompt; // in the model's memory
        common_speculative_begin(spec.get(), 0, text);
        const int64_t       first = ggml_time_us();
        std::vector<double> times{ 0.0 };
        int                 passes = 0, drafted = 0, accepted = 0;
        while ((int) said.size() < n && said.back() != eos) {
            const llama_token last   = said.back();
            const llama_pos   n_past = (llama_pos) text.size();
            llama_tokens      guesses;
            const int         most = std::min(n - (int) said.size() - 1, (int) llama_n_ctx(ctx) - n_past - 2);
            if (spec && most > 0) {
                common_speculative_get_draft_params(spec.get(), 0) = { true, most, n_past, last, &text, &guesses };
                common_speculative_draft(spec.get());
                if (ctx_dft) { // what it drafted with; the pass below shows it the same tokens
                    llama_memory_seq_rm(llama_get_memory(ctx_dft), 0, n_past, -1);
                }
            }
            batch.clear();
            batch.add(last, n_past, 0, true);
            for (size_t i = 0; i < guesses.size(); ++i) {
                batch.add(guesses[i], n_past + 1 + (llama_pos) i, 0, true);
            }
            process(batch);
            const auto ids = common_sampler_sample_and_accept_n(sampler.get(), ctx, guesses);
            if (spec && !guesses.empty()) {
                common_speculative_accept(spec.get(), 0, (uint16_t) (ids.size() - 1));
            }
            passes += 1;
            drafted += (int) guesses.size();
            accepted += (int) ids.size() - 1;
            text.push_back(last);
            text.insert(text.end(), ids.begin(), ids.end() - 1);
            forget((llama_pos) text.size());
            const double now = seconds(first, ggml_time_us());
            for (const llama_token id : ids) {
                said.push_back(id);
                times.push_back(now);
                if (id == eos) {
                    break;
                }
            }
        }
        return {
            { "tokens", said },
            { "times", times },
            { "prompt_ms", 1e3 * seconds(begin, first) },
            { "decode_ms", 1e3 * times.back() },
            { "passes", passes },
            { "drafted", drafted },
            { "accepted", accepted },
        };
    }
};

void say(const json & line) {
    std::cout << line.dump() << std::endl;
}

int run(int argc, char ** argv) {
    common_log_set_verbosity_thold(LOG_LEVEL_ERROR); // stdout is for answers
    common_params params;
    params.fit_params = false;
    params.n_parallel = 1;
    params.verbosity  = LOG_LEVEL_ERROR;
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_SPECULATIVE)) {
        return 1;
    }
    const json kernels = enable_kernels(); // before the model: they take part in what is loaded from then on
    llama_backend_init();
    llama_numa_init(params.numa);
    drafting model(std::move(params));
    say({ { "kernels", kernels }, { "n_max", common_speculative_n_max(model.spec.get()) } });

    std::string line;
    while (std::getline(std::cin, line)) {
        try {
            const json asked = json::parse(line);
            say(model.answer(asked.at("tokens").get<llama_tokens>(), asked.at("n"), asked.value("temp", 0.0f),
                             asked.value("seed", 0u)));
        } catch (const std::exception & e) {
            say({ { "error", e.what() } });
        }
    }
    return 0;
}

} // namespace

int main(int argc, char ** argv) {
    std::setlocale(LC_NUMERIC, "C");
    try {
        return run(argc, argv);
    } catch (const std::exception & e) {
        say({ { "error", e.what() } });
        return 1;
    }
}
