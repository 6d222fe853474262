// Graphs that stay built (patch 6): a size that comes along takes over the scheduler of an older one, whose buffers are large,
// also when all graphs had to go; and a token's logits are what they are with one graph for all sizes.

#include "check.h"
#include "tiny.h"

#ifdef __linux__
#    include <dlfcn.h>

#    include <algorithm>

static int n_made = 0; // schedulers

// found before ggml's own, which it calls
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

// logits of the last token of each batch: sizes up and down, more of them than there are slots, beyond the largest, too
static std::vector<float> decode(llama_model * model, uint32_t n_slots, int & made) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 512;
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    tiny::context_ptr ctx(llama_init_from_model(model, params));
    llama_set_graph_slots(ctx.get(), n_slots);

    std::vector<float> res;
    const int          before = n_made;
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
    made = n_made - before;
    return res;
}

int main() {
    tiny::be_quiet();
    llama_backend_init();
    tiny::folder folder;
    const auto   model = tiny::load_base(tiny::write_base(folder / "base.gguf"));

    int        made     = 0;
    const auto expected = decode(model.get(), 0, made);
    CHECK_EQ(made, 1); // the one in use, made anew after the first round
    for (const uint32_t n_slots : { 1, 3, 20 }) {
        CHECK(decode(model.get(), n_slots, made) == expected);
        CHECK_EQ(made, 1 + (int) std::min<uint32_t>(n_slots, 8)); // eight sizes get a graph of their own
    }
    return check_result("graph_slots");
}
#else
int main() {
    printf("graph_slots: skipped, schedulers are counted on Linux only\n");
}
#endif
