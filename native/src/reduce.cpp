#include "reduce.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <stdexcept>

namespace entmtp {

static constexpr int64_t chunk = 1024; // columns that a device sorts in one block

// rows of x [m, n] at index [k, n]: [k, n]
static ggml_tensor * at(ggml_context * ctx, ggml_tensor * x, ggml_tensor * index) {
    const int64_t k = index->ne[0], n = index->ne[1];
    return ggml_reshape_2d(ctx, ggml_get_rows(ctx, ggml_reshape_3d(ctx, x, 1, x->ne[0], n), index), k, n);
}

// the best of one or several parts of a row, and where in their part they are: [k of each part, n]
struct best_of {
    ggml_tensor * values = nullptr;
    ggml_tensor * places = nullptr;
};

// of `width` columns at a time, n_parts times, from column `first` on
static best_of
sort_parts(ggml_context * ctx, ggml_tensor * logits, int32_t k, int64_t first, int64_t width, int64_t n_parts) {
    const int64_t n     = logits->ne[1];
    const size_t  size  = sizeof(float);
    ggml_tensor * parts = ggml_view_3d(ctx, logits, width, n_parts, n, width * size, logits->nb[1], first * size);
    parts               = ggml_reshape_2d(ctx, ggml_cont(ctx, parts), width, n_parts * n);

    const int64_t n_best = std::min<int64_t>(k, width);
    ggml_tensor * order  = ggml_argsort(ctx, parts, GGML_SORT_ORDER_DESC);
    order                = ggml_view_2d(ctx, order, n_best, n_parts * n, order->nb[1], 0);
    return { ggml_reshape_2d(ctx, at(ctx, parts, order), n_best * n_parts, n),
             ggml_reshape_2d(ctx, ggml_cont(ctx, order), n_best * n_parts, n) };
}

// the k largest of every chunk, then the k largest of these
static ggml_tensor * best_by_chunks(ggml_context * ctx, ggml_tensor * logits, int32_t k, reduction & res) {
    const int64_t n_chunks = logits->ne[0] / chunk, rest = logits->ne[0] % chunk;

    best_of all = sort_parts(ctx, logits, k, 0, chunk, n_chunks);
    if (rest > 0) {
        const best_of last = sort_parts(ctx, logits, k, n_chunks * chunk, rest, 1);
        all = { ggml_concat(ctx, all.values, last.values, 0), ggml_concat(ctx, all.places, last.places, 0) };
    }
    ggml_tensor * best = ggml_top_k(ctx, all.values, k);
    res.ids            = ggml_concat(ctx, best, at(ctx, all.places, best), 0);
    return at(ctx, all.values, best);
}

void reduction::to_tokens(std::vector<int32_t> & read, int32_t n_vocab) const {
    if (!by_chunks) {
        return;
    }
    const size_t         n = read.size() / (size_t) (2 * k);
    std::vector<int32_t> tokens(n * k);
    for (size_t i = 0; i < n; ++i) {
        for (int32_t c = 0; c < k; ++c) {
            const int32_t place = read[2 * k * i + c], within = read[2 * k * i + k + c];
            tokens[k * i + c] = (int32_t) std::min<int64_t>(place / k, n_vocab / chunk) * (int32_t) chunk + within;
        }
    }
    read = std::move(tokens);
}

// ops: docs/gpu.md lists them, and where each backend has them
static reduction build_reduction(ggml_context * ctx, ggml_tensor * logits, int32_t k, bool by_chunks) {
    const int64_t n = logits->ne[1];

    reduction res;
    res.k         = k;
    res.by_chunks = by_chunks && k > 1 && logits->ne[0] > 2 * chunk;

    ggml_tensor * first = ggml_argmax(ctx, logits);
    ggml_tensor * index = ggml_reshape_2d(ctx, first, 1, n);
    ggml_tensor * best  = nullptr;
    if (res.by_chunks) {
        best = best_by_chunks(ctx, logits, k, res);
    } else {
        res.ids = k == 1 ? first : ggml_top_k(ctx, logits, k);
        best    = at(ctx, logits, k == 1 ? index : res.ids);
    }

    ggml_tensor * p     = ggml_soft_max(ctx, logits);
    // p ln p is 0 where p is: the logarithm must be finite there
    ggml_tensor * log_p = ggml_clamp(ctx, ggml_log(ctx, p), -110.0f, 0.0f);

    res.values = ggml_concat(ctx, best, at(ctx, p, index), 0);
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

reducer::reducer(int32_t k, bool by_chunks) :
    k(k), by_chunks(by_chunks), sampler_chain(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
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
    const reduction r = build_reduction(ctx, logits, (int32_t) std::min<int64_t>(k, logits->ne[0]), by_chunks);
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
                                 bool                                                by_chunks,
                                 std::string &                                       missing) {
    missing.clear();

    int32_t most = 0;
    for (const int32_t n : { 1, k }) {
        ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_cgraph *    gf     = ggml_new_graph(ctx.get());
        ggml_tensor *    logits = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_vocab, max_rows);

        const reduction r = build_reduction(ctx.get(), logits, (int32_t) std::min<int64_t>(n, n_vocab), by_chunks);
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
