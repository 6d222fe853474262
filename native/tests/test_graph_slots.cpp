// Graphs that stay built (patch 6): a size that comes along takes over the scheduler of an older one, also when all graphs had
// to go; all lie in the same buffers, also when these are replaced by larger ones; and a token's logits are what they are
// with one graph for all sizes.

#include "check.h"
#include "tiny.h"

#ifdef __linux__
#    include <dlfcn.h>

#    include <algorithm>

static int    n_made   = 0;    // schedulers
static size_t n_bytes  = 0;    // of buffers that are there
static size_t n_most   = 0;    // of them at most
static bool   is_ready = true; // buffers are made for the largest batch beforehand

// these three are found before ggml's own, which they call
ggml_backend_sched_t ggml_backend_sched_new(ggml_backend_t *             backends,
                                            ggml_backend_buffer_type_t * bufts,
                                            int                          n_backends,
                                            size_t                       graph_size,
                                            bool                         parallel,
                                            bool                         op_offload) {
    static const auto real = (decltype(&ggml_backend_sched_new)) dlsym(RTLD_NEXT, "ggml_backend_sched_new");
    n_made++;
    return real(backends, bufts, n_backends, graph_size, parallel, op_offload);
}

ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    static const auto real =
        (decltype(&ggml_backend_buft_alloc_buffer)) dlsym(RTLD_NEXT, "ggml_backend_buft_alloc_buffer");
    n_bytes += size;
    n_most = std::max(n_most, n_bytes);
    return real(buft, size);
}

void ggml_backend_buffer_free(ggml_backend_buffer_t buffer) {
    static const auto real = (decltype(&ggml_backend_buffer_free)) dlsym(RTLD_NEXT, "ggml_backend_buffer_free");
    n_bytes -= buffer ? ggml_backend_buffer_get_size(buffer) : 0;
    real(buffer);
}

bool ggml_backend_sched_reserve(ggml_backend_sched_t sched, ggml_cgraph * graph) {
    static const auto real = (decltype(&ggml_backend_sched_reserve)) dlsym(RTLD_NEXT, "ggml_backend_sched_reserve");
    return !is_ready || real(sched, graph);
}

// logits of the last token of each batch: sizes up and down, more of them than there are slots, beyond the largest, too
static std::vector<float> decode(llama_model * model, uint32_t n_slots, int & made, size_t & most) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 512;
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    const int         n_before  = n_made;
    const size_t      before = n_most = n_bytes;
    tiny::context_ptr ctx(llama_init_from_model(model, params));
    llama_set_graph_slots(ctx.get(), n_slots);

    std::vector<float> res;
    for (int round = 0; round < 2; ++round) {
        for (const int32_t n : { 1, 2, 3, 4, 5, 6, 70, 3, 1, 40, 2, 64, 5, 1, 6, 4 }) {
            std::vector<llama_token> tokens(n);
            for (int32_t i = 0; i < n; ++i) {
                tokens[i] = 4 + (i * 7 + n) % (tiny::n_vocab - 4);
            }
            llama_memory_clear(llama_get_memory(ctx.get()), true);
            CHECK_EQ(llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), n)), 0);
            const float * logits = llama_get_logits_ith(ctx.get(), -1);
            res.insert(res.end(), logits, logits + tiny::n_vocab);
        }
        llama_set_adapter_cvec(ctx.get(), nullptr, 0, 0, 0, 0); // none, as before; the graphs could be others now
    }
    made = n_made - n_before;
    most = n_most - before;
    return res;
}

int main() {
    tiny::be_quiet();
    llama_backend_init();
    tiny::folder folder;
    const auto   model = tiny::load_base(tiny::write_base(folder / "base.gguf"));

    int        made     = 0;
    size_t     most     = 0;
    const auto expected = decode(model.get(), 0, made, most);
    CHECK_EQ(made, 2); // the one in use, made anew after the first round
    const size_t one_graph = most;
    CHECK(one_graph > 0);
    for (const uint32_t n_slots : { 1, 3, 20 }) {
        is_ready = true;
        CHECK(decode(model.get(), n_slots, made, most) == expected);
        CHECK_EQ(made, 2 + (int) std::min<uint32_t>(n_slots, 8)); // eight sizes get a graph of their own
        CHECK_EQ(most, one_graph);

        is_ready = false; // so each batch that is larger than all before replaces the buffers that graphs were built in
        CHECK(decode(model.get(), n_slots, made, most) == expected);
    }
    return check_result("graph_slots");
}
#else
int main() {
    printf("graph_slots: skipped, schedulers are counted on Linux only\n");
}
#endif
