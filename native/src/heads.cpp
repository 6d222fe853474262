#include "heads.h"

#include "outputs.h"
#include "top_k.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

namespace entmtp {

void heads::use_device(ggml_backend_dev_t dev) {
    backend.reset(ggml_backend_dev_init(dev, nullptr));
    if (!backend) {
        heads_fail(std::string("cannot use device ") + ggml_backend_dev_name(dev));
    }
    set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads"));
    if (set_n_threads) {
        set_n_threads(backend.get(), n_threads);
    }
}

heads::heads(const char * path, const llama_model * model, int32_t n_threads) : n_threads(n_threads) {
    use_device(output_device(model));

    load_weights(path, model);

    // every op of the largest graph must run where the weights are; else everything goes to the CPU, and says so
    int32_t    parent[] = { -1, 0, 0, 1 };
    int32_t    rank[]   = { 0, 0, 1, 0 };
    const tree probe    = make_tree(parent, rank, n_heads() > 1 ? 4 : 3);
    const auto graph    = build_graph(probe);

    for (int i = 0; i < ggml_graph_n_nodes(graph->gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph->gf, i);
        if (ggml_backend_supports_op(backend.get(), node)) {
            continue;
        }
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (ggml_backend_get_device(backend.get()) == cpu) {
            heads_fail(std::string(path) + " needs the operation " + ggml_op_desc(node) +
                       ", which the CPU backend lacks for this type");
        }
        fprintf(stderr, "entmtp: %s cannot run %s; the heads run on the CPU\n", ggml_backend_name(backend.get()),
                ggml_op_desc(node));
        use_device(cpu);
        load_weights(path, model);
        break;
    }
}

void heads::set_threads(int32_t n) {
    n_threads = n;
    if (set_n_threads) {
        set_n_threads(backend.get(), n); // for the prefix layer
    }
}

entmtp_heads_info heads::info() const {
    entmtp_heads_info res = {};

    res.n_heads       = n_heads();
    res.n_blocks      = (int32_t) layers[0].blocks.size();
    res.n_embd        = n_embd;
    res.n_vocab       = n_vocab;
    res.n_vocab_draft = n_draft;
    res.hydra         = is_hydra;
    res.grounded      = grounded;
    res.prefix        = prefix_impl != nullptr;
    for (const ggml_backend_buffer_ptr & buf : { std::cref(buf_weights), std::cref(buf_packed) }) {
        res.n_bytes += buf ? (int64_t) ggml_backend_buffer_get_size(buf.get()) : 0;
    }
    snprintf(res.device, sizeof(res.device), "%s", ggml_backend_name(backend.get()));

    return res;
}

//
// graphs
//

// logits [n_vocab_draft, n] of head i for inputs x [n_in, n]
ggml_tensor * heads::build_head(ggml_context * ctx, int32_t i, ggml_tensor * x) const {
    for (const auto & block : layers[i].blocks) {
        ggml_tensor * y = ggml_silu(ctx, ggml_add(ctx, ggml_mul_mat(ctx, block.weight, x), block.bias));
        if (block.res_weight) {
            x = ggml_add(ctx, ggml_mul_mat(ctx, block.res_weight, x), block.res_bias);
        }
        x = ggml_add(ctx, x, y);
    }

    ggml_tensor * logits = ggml_mul_mat(ctx, layers[i].output, x);
    if (select) {
        const int64_t n        = x->ne[1];
        // tokens as rows: not every backend can repeat d2t for each column
        ggml_tensor * by_token = n == 1 ? logits : ggml_cont(ctx, ggml_transpose(ctx, logits));
        by_token               = ggml_reshape_2d(ctx, by_token, n, n_vocab);
        logits                 = ggml_get_rows(ctx, by_token, ggml_reshape_1d(ctx, d2t, n_draft)); // [n, n_draft]
        logits                 = n == 1 ? logits : ggml_cont(ctx, ggml_transpose(ctx, logits));
        logits                 = ggml_reshape_2d(ctx, logits, n_draft, n);
    }
    if (layers[i].output_bias) {
        logits = ggml_add(ctx, logits, layers[i].output_bias);
    }
    return logits;
}

// base tokens of the k largest logits per column, best first: i32 [k, n]
ggml_tensor * heads::build_guesses(ggml_context * ctx, ggml_tensor * logits, int32_t k) const {
    if (ggml_backend_is_cpu(backend.get())) {
        return build_top_k_cpu(ctx, logits, d2t, std::min(k, n_draft));
    }
    return build_base_tokens(ctx, build_top_k(ctx, logits, k));
}

// the same in draft tokens
ggml_tensor * heads::build_top_k(ggml_context * ctx, ggml_tensor * logits, int32_t k) const {
    const int64_t n = logits->ne[1];

    k = std::min(k, n_draft);

    if (ggml_backend_is_cpu(backend.get())) {
        return build_top_k_cpu(ctx, logits, nullptr, k);
    }
    if (k == 1) {
        return ggml_reshape_2d(ctx, ggml_argmax(ctx, logits), 1, n);
    }

    // top_k leaves the order open: sort its k candidates by their logits
    ggml_tensor * top    = ggml_top_k(ctx, logits, k);
    ggml_tensor * values = ggml_get_rows(ctx, ggml_reshape_3d(ctx, logits, 1, n_draft, n), top); // [1, k, n]
    ggml_tensor * order  = ggml_argsort(ctx, ggml_reshape_2d(ctx, values, k, n), GGML_SORT_ORDER_DESC);
    ggml_tensor * ids    = ggml_get_rows(ctx, ggml_reshape_3d(ctx, top, 1, k, n), order);        // [1, k, n]
    return ggml_reshape_2d(ctx, ids, k, n);
}

// tokens of the base model for draft tokens, i32 [k, n]
ggml_tensor * heads::build_base_tokens(ggml_context * ctx, ggml_tensor * ids) const {
    if (!d2t) {
        return ids;
    }
    const int64_t k = ids->ne[0];
    const int64_t n = ids->ne[1];

    ids = ggml_get_rows(ctx, d2t, ggml_reshape_1d(ctx, ids, k * n)); // [1, k*n]
    return ggml_reshape_2d(ctx, ids, k, n);
}

// f32 [n_embd, n] for i32 [n]
ggml_tensor * heads::build_embd(ggml_context * ctx, ggml_tensor * tokens) const {
    return ggml_get_rows(ctx, tok_embd, tokens);
}

std::unique_ptr<draft_graph> heads::new_graph() const {
    auto g = std::make_unique<draft_graph>();

    // per head: 6 nodes a block, 6 for the output, 6 for the top-k, 6 for the next level's inputs, and as many views
    const size_t n_max = 64 + n_heads() * (16 * layers[0].blocks.size() + 48);

    g->ctx.reset(
        ggml_init({ n_max * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_max, false), nullptr, true }));
    g->gf = ggml_new_graph_custom(g->ctx.get(), n_max, false);
    g->h  = ggml_new_tensor_2d(g->ctx.get(), GGML_TYPE_F32, n_embd, 1);
    ggml_set_input(g->h);
    if (grounded) {
        g->root = ggml_new_tensor_1d(g->ctx.get(), GGML_TYPE_I32, 1);
        ggml_set_input(g->root);
    }
    return g;
}

// Threads meet after every operation, which costs more than a second one brings until each has about this much to do.
constexpr size_t BYTES_PER_THREAD = 1 << 20; // weights of a level, as one token reads them

// how many threads a graph of some levels is worth
static int32_t worthwhile_threads(ggml_cgraph * gf, int32_t n_levels) {
    size_t work = 0;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_MUL_MAT) {
            work += ggml_nbytes(node->src[0]) * (size_t) (node->ne[1] + 1) / 2; // a second token costs half a first
        }
    }
    const size_t n = work / BYTES_PER_THREAD / (size_t) std::max(n_levels, 1);
    return (int32_t) std::clamp<size_t>(n, 1, 1024);
}

void heads::finish_graph(draft_graph & g, const std::vector<ggml_tensor *> & outputs) const {
    for (ggml_tensor * t : outputs) {
        ggml_set_output(t);
        ggml_build_forward_expand(g.gf, t);
    }
    g.alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    if (!ggml_gallocr_alloc_graph(g.alloc.get(), g.gf)) {
        heads_fail("no memory for a draft graph");
    }
    moved.n_draft_graphs++;
    g.n_threads = worthwhile_threads(g.gf, (int32_t) g.guesses.size());
}

std::unique_ptr<draft_graph> heads::build_graph(const tree & topology) const {
    auto           g   = new_graph();
    ggml_context * ctx = g->ctx.get();

    std::vector<std::pair<ggml_tensor *, std::vector<int32_t>>> constants;

    // an index tensor that keeps its value from step to step: flagged as an output, its memory is not reused
    const auto constant = [&](std::vector<int32_t> values) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) values.size());
        ggml_set_input(t);
        ggml_set_output(t);
        constants.push_back({ t, std::move(values) });
        return t;
    };

    ggml_tensor * x = g->h;
    if (grounded && !topology.levels.empty()) {
        x = ggml_concat(ctx, g->h, build_embd(ctx, g->root), 0);
    }

    for (size_t l = 0; l < topology.levels.size(); ++l) {
        const auto & level = topology.levels[l];

        if (grounded && l > 0) {
            // inputs of this level: the parent's input, and the embedding of the node's own token
            std::vector<int32_t> column; // of the parent in the level before
            std::vector<int32_t> guess;  // of the node among the guesses of the level before
            const int32_t        k = (int32_t) g->guesses.back()->ne[0];
            for (const int32_t node : level.expand) {
                const int32_t slot = topology.slot[topology.parent[node]];
                column.push_back(slot);
                guess.push_back(slot * k + std::min(topology.rank[node], k - 1));
            }

            ggml_tensor * ids = ggml_reshape_2d(ctx, g->guesses.back(), 1, ggml_nelements(g->guesses.back()));
            ids               = ggml_get_rows(ctx, ids, constant(guess)); // [1, n_expand]
            ids               = ggml_reshape_1d(ctx, ids, (int64_t) guess.size());

            x = ggml_get_rows(ctx, x, constant(column));
            x = ggml_concat(ctx, x, build_embd(ctx, ids), 0); // [(l + 2)*n_embd, n_expand]
        }

        g->guesses.push_back(build_guesses(ctx, build_head(ctx, (int32_t) l, x), level.k));
    }

    finish_graph(*g, g->guesses);

    for (const auto & [t, values] : constants) {
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
    for (const ggml_tensor * t : g->guesses) {
        g->result.emplace_back(ggml_nelements(t));
    }
    return g;
}

void heads::compute(const draft_graph & g, bool wait) const {
    if (set_n_threads) {
        set_n_threads(backend.get(), std::min(g.n_threads, n_threads));
    }
    const ggml_status status = ggml_backend_graph_compute_async(backend.get(), g.gf);
    if (wait) {
        ggml_backend_synchronize(backend.get());
    }
    if (set_n_threads) {
        set_n_threads(backend.get(), n_threads); // for the prefix layer
    }
    if (status != GGML_STATUS_SUCCESS) {
        heads_fail(std::string("the draft could not be computed on ") + ggml_backend_name(backend.get()));
    }
}

entmtp_traffic heads::traffic() const {
    entmtp_traffic res = moved;
    if (prefix_impl) {
        add(res, prefix_impl->traffic);
    }
    return res;
}

void heads::draft(const tree & topology, const states & h, std::vector<int32_t> & tokens) {
    auto & g = graphs[&topology];
    if (!g) {
        g = build_graph(topology);
    }

    send(moved, g->h, h);
    if (grounded) {
        send(moved, g->root, &tokens[0]);
    }

    // the host waits once, for the tokens of all levels
    compute(*g, false);
    for (size_t l = 0; l < g->guesses.size(); ++l) {
        const size_t size = ggml_nbytes(g->guesses[l]);
        ggml_backend_tensor_get_async(backend.get(), g->guesses[l], g->result[l].data(), 0, size);
        moved.to_host += (int64_t) size;
    }
    ggml_backend_synchronize(backend.get());
    moved.n_syncs++;

    for (int32_t i = 1; i < topology.n_nodes(); ++i) {
        const size_t  l = topology.depth[i] - 1;
        const int32_t k = (int32_t) g->guesses[l]->ne[0];
        const int32_t c = grounded ? topology.slot[topology.parent[i]] : 0;
        // a draft vocabulary smaller than the rank repeats its last guess: never accepted twice, never wrong
        tokens[i]       = g->result[l][c * k + std::min(topology.rank[i], k - 1)];
    }
}

// one head for n paths: guesses and their probabilities
std::unique_ptr<draft_graph> heads::build_level(int32_t l, int32_t n, int32_t k) const {
    auto           g   = new_graph();
    ggml_context * ctx = g->ctx.get();

    ggml_tensor * x = g->h;
    if (grounded) {
        g->paths = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) (l + 1) * n);
        ggml_set_input(g->paths);
        ggml_tensor * embd = ggml_reshape_2d(ctx, build_embd(ctx, g->paths), (int64_t) (l + 1) * n_embd, n);
        if (n > 1) {
            x = ggml_repeat_4d(ctx, x, n_embd, n, 1, 1);
        }
        x = ggml_concat(ctx, x, embd, 0); // [(l + 2)*n_embd, n]
    }

    ggml_tensor * logits = build_head(ctx, l, x);
    ggml_tensor * ids    = build_top_k(ctx, logits, k);
    ggml_tensor * probs  = ggml_reshape_3d(ctx, ggml_soft_max(ctx, logits), 1, n_draft, n);

    g->probs = ggml_reshape_2d(ctx, ggml_get_rows(ctx, probs, ids), k, n);
    g->guesses.push_back(build_base_tokens(ctx, ids));

    finish_graph(*g, { g->guesses[0], g->probs });
    return g;
}

void heads::expand(
    int32_t l, const states & h, const int32_t * paths, int32_t n, int32_t k, int32_t * tokens, float * log_p) {
    auto & g = levels[{ l, n, k }];
    if (!g) {
        g = build_level(l, n, k);
    }

    send(moved, g->h, h);
    if (grounded) {
        send(moved, g->paths, paths);
    }
    compute(*g);
    fetch(moved, g->guesses[0], tokens, 0, ggml_nbytes(g->guesses[0]));
    fetch(moved, g->probs, log_p, 0, ggml_nbytes(g->probs));

    for (int32_t i = 0; i < n * k; ++i) {
        log_p[i] = std::log(log_p[i] > 1e-30f ? log_p[i] : 1e-30f); // also where it is nan
    }
}

void heads::logits(int32_t i, const float * h, const int32_t * path, float * logits) {
    if (i < 0 || i >= n_heads()) {
        heads_fail("there is no head " + std::to_string(i));
    }

    auto           g   = new_graph();
    ggml_context * ctx = g->ctx.get();

    ggml_tensor * x   = g->h;
    ggml_tensor * ids = nullptr;
    if (grounded) {
        ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, i + 1);
        ggml_set_input(ids);
        x = ggml_concat(ctx, x, ggml_reshape_2d(ctx, build_embd(ctx, ids), (int64_t) (i + 1) * n_embd, 1), 0);
    }
    g->logits = build_head(ctx, i, x);
    finish_graph(*g, { g->logits });

    ggml_backend_tensor_set(g->h, h, 0, n_embd * sizeof(float));
    if (grounded) {
        for (int32_t j = 0; j <= i; ++j) {
            if (path[j] < 0 || path[j] >= n_vocab) {
                heads_fail("token " + std::to_string(path[j]) + " is not in the vocabulary");
            }
        }
        ggml_backend_tensor_set(ids, path, 0, ggml_nbytes(ids));
    }
    compute(*g);
    ggml_backend_tensor_get(g->logits, logits, 0, ggml_nbytes(g->logits));
}

} // namespace entmtp
