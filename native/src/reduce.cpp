#include "reduce.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <stdexcept>

namespace entmtp {

// ops: docs/gpu.md lists them, and where each backend has them
static reduction build_reduction(ggml_context * ctx, ggml_tensor * logits, int32_t k) {
    const int64_t n_vocab = logits->ne[0];
    const int64_t n       = logits->ne[1];

    reduction res;
    res.k   = k;
    res.ids = k == 1 ? ggml_argmax(ctx, logits) : ggml_top_k(ctx, logits, k);

    ggml_tensor * index  = k == 1 ? ggml_reshape_2d(ctx, res.ids, 1, n) : res.ids;
    const auto    at_ids = [&](ggml_tensor * x) {
        return ggml_reshape_2d(ctx, ggml_get_rows(ctx, ggml_reshape_3d(ctx, x, 1, n_vocab, n), index), k, n);
    };

    ggml_tensor * p     = ggml_soft_max(ctx, logits);
    ggml_tensor * best  = at_ids(logits);
    // p ln p is 0 where p is: the logarithm must be finite there
    ggml_tensor * log_p = ggml_clamp(ctx, ggml_log(ctx, p), -110.0f, 0.0f);

    res.values = ggml_concat(ctx, best, at_ids(p), 0);
    res.values = ggml_concat(ctx, res.values, ggml_sum_rows(ctx, ggml_mul(ctx, p, log_p)), 0);
    if (k == 1) {
        // of several largest logits, backends choose different ones: tell the host that there are several
        ggml_tensor * less = ggml_sgn(ctx, ggml_sub(ctx, logits, best));
        res.values         = ggml_concat(ctx, res.values, ggml_sum_rows(ctx, less), 0);
    }
    return res;
}

//
// the sampler
//

static const char * reducer_name(const llama_sampler *) {
    return "entmtp";
}

static void reducer_apply(llama_sampler *, llama_token_data_array *) {}

static bool reducer_backend_init(llama_sampler *, ggml_backend_buffer_type_t, uint32_t) {
    return true; // missing_op() was asked before
}

static void
reducer_backend_apply(llama_sampler * smpl, ggml_context * ctx, ggml_cgraph * gf, llama_sampler_data * data) {
    static_cast<reducer *>(smpl->ctx)->build(ctx, gf, data->logits);
    data->logits = nullptr; // nothing is sampled
}

static llama_sampler_i reducer_i = {
    /* .name              = */ reducer_name,
    /* .accept            = */ nullptr,
    /* .apply             = */ reducer_apply,
    /* .reset             = */ nullptr,
    /* .clone             = */ nullptr,
    /* .free              = */ nullptr,
    /* .backend_init      = */ reducer_backend_init,
    /* .backend_accept    = */ nullptr,
    /* .backend_apply     = */ reducer_backend_apply,
    /* .backend_set_input = */ nullptr,
    /* .backend_reset     = */ nullptr,
    /* .copy_state        = */ nullptr,
};

reducer::reducer(int32_t k) : k(k), sampler_chain(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
    llama_sampler_chain_add(sampler_chain, llama_sampler_init(&reducer_i, this));
}

reducer::~reducer() {
    llama_sampler_free(sampler_chain);
}

void reducer::build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * row) {
    // llama.cpp offers one row at a time, a view into the logits of all outputs with one row of padding. One op over all
    // rows is one launch on a GPU; and without the view nothing is padded
    const ggml_tensor * all    = row->view_src;
    ggml_tensor *       logits = all && all->op == GGML_OP_PAD ? all->src[0] : row;

    built.erase(logits);
    if (logits->ne[1] < 1 || logits->ne[1] > max_rows) {
        return;
    }
    const reduction r = build_reduction(ctx, logits, (int32_t) std::min<int64_t>(k, logits->ne[0]));
    for (ggml_tensor * t : { r.ids, r.values }) {
        ggml_set_output(t);
        ggml_build_forward_expand(gf, t);
    }
    built[logits] = r;
}

const reduction * reducer::find(const ggml_tensor * logits) const {
    const auto it = built.find(logits);
    return it == built.end() ? nullptr : &it->second;
}

int32_t reducer::most_candidates(const std::function<bool(const ggml_tensor * op)> & supports,
                                 int64_t                                             n_vocab,
                                 int32_t                                             k,
                                 std::string &                                       missing) {
    missing.clear();

    int32_t most = 0;
    for (const int32_t n : { 1, k }) {
        ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_cgraph *    gf     = ggml_new_graph(ctx.get());
        ggml_tensor *    logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_vocab, max_rows);

        const reduction r = build_reduction(ctx.get(), logits, (int32_t) std::min<int64_t>(n, n_vocab));
        ggml_build_forward_expand(gf, r.ids);
        ggml_build_forward_expand(gf, r.values);

        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!supports(ggml_graph_node(gf, i))) {
                missing = ggml_op_desc(ggml_graph_node(gf, i));
                return most;
            }
        }
        most = n;
    }
    return most;
}

} // namespace entmtp
