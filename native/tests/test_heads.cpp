// What the loaded heads compute, against plain loops over the values that were written.

#include "heads.h"
#include "heads_files.h"
#include "top_k.h"
#include "tree.h"

#include <numeric>

// head i, from the values that were written
static std::vector<float> reference(const tiny::file & f, int32_t i, int32_t n_blocks, std::vector<float> x) {
    const std::string p = "head." + std::to_string(i) + ".";

    const auto matmul = [](const std::vector<float> & w, const std::vector<float> & v) {
        std::vector<float> y(w.size() / v.size());
        for (size_t r = 0; r < y.size(); ++r) {
            y[r] = (float) std::inner_product(v.begin(), v.end(), w.begin() + (ptrdiff_t) (r * v.size()), 0.0);
        }
        return y;
    };

    std::string b;
    for (int32_t j = 0; j < n_blocks; ++j) {
        const std::string name = p + "blk." + std::to_string(j) + ".";
        if (f.values.count(name + "weight")) {
            b = name;
        }
        std::vector<float> y = matmul(f.values.at(b + "weight"), x);
        std::vector<float> r = x;
        if (f.values.count(b + "res.weight")) {
            r = matmul(f.values.at(b + "res.weight"), x);
            for (size_t k = 0; k < r.size(); ++k) {
                r[k] += f.values.at(b + "res.bias")[k];
            }
        }
        x.resize(y.size());
        for (size_t k = 0; k < y.size(); ++k) {
            y[k] += f.values.at(b + "bias")[k];
            x[k] = r[k] + y[k] / (1.0f + std::exp(-y[k]));
        }
    }

    std::vector<float> res = matmul(f.values.at((f.values.count("output.weight") ? "" : p) + "output.weight"), x);
    if (f.values.count(p + "output.bias")) {
        for (size_t k = 0; k < res.size(); ++k) {
            res[k] += f.values.at(p + "output.bias")[k];
        }
    }
    return res;
}

static void test_logits() {
    const auto hidden = random_vector(tiny::n_embd, 11);

    for (const int kind : { 0, 1, 2 }) { // Medusa, Hydra, grounded Hydra
        for (const int32_t n_blocks : { 0, 1, 2, 3 }) {
            if (kind == 2 && n_blocks == 0) {
                continue; // the first block of a grounded head takes the embeddings in
            }
            head_options o;
            o.arch             = kind ? "hydra" : "medusa";
            o.grounded         = kind == 2;
            o.n_blocks         = n_blocks;
            o.bias             = n_blocks % 2;
            o.one              = n_blocks == 2 || kind == 2;
            const tiny::file f = tiny::make_heads(o);
            const heads_ptr  h = load(f.write(dir / "heads.gguf"));
            CHECK(h);

            // the base model's embeddings, as write_base() drew them
            tiny::file embd(1);
            embd.add("token_embd.weight", GGML_TYPE_F32, tiny::n_embd, tiny::n_vocab, 1.0f);

            const std::vector<int32_t> path = { 7, 39, 0 };
            for (int32_t i = 0; i < 3 && h; ++i) {
                std::vector<float> x = hidden;
                for (int32_t j = 0; j <= i && o.grounded; ++j) {
                    const auto row = embd.values["token_embd.weight"].begin() + path[j] * tiny::n_embd;
                    x.insert(x.end(), row, row + tiny::n_embd);
                }
                CHECK_NEAR(max_diff(logits(h.get(), i, hidden, path), reference(f, i, n_blocks, x)), 0.0, 1e-4);
            }
        }
    }
}

static void test_shared_blocks() {
    const auto hidden = random_vector(tiny::n_embd, 12);

    head_options o;
    o.n_blocks        = 3;
    o.equal           = true;
    const auto full   = load(o);
    o.n_stored        = 1;
    const auto shared = load(o);
    o.n_blocks        = 1;
    const auto single = load(o);

    // equal blocks draw no more random numbers than one: the first head of all three is the same but for its output
    entmtp_heads_info a;
    entmtp_heads_info b;
    entmtp_heads_get_info(full.get(), &a);
    entmtp_heads_get_info(shared.get(), &b);
    CHECK_EQ(a.n_blocks, 3);
    CHECK_EQ(b.n_blocks, 3);
    CHECK(a.n_bytes > b.n_bytes);
    for (int32_t i = 0; i < 3; ++i) {
        CHECK_NEAR(max_diff(logits(full.get(), i, hidden), logits(shared.get(), i, hidden)), 0.0, 1e-6);
        CHECK(max_diff(logits(shared.get(), i, hidden), logits(single.get(), i, hidden)) > 0.01);
    }

    // the wide first block of a grounded head repeats for no other
    o          = {};
    o.arch     = "hydra";
    o.grounded = true;
    o.n_blocks = 2;
    o.n_stored = 1;
    refused("a grounded head without its second block", o, { "has no tensor head.0.blk.1.weight" });
}

static void test_types() {
    const auto hidden = random_vector(tiny::n_embd, 13);
    const auto exact  = load(head_options{});

    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0 }) {
        head_options o;
        o.type       = type;
        const auto h = load(o);
        for (int32_t i = 0; i < 3 && h; ++i) {
            const auto   a    = logits(exact.get(), i, hidden);
            const auto   b    = logits(h.get(), i, hidden);
            // error relative to the logits' size
            const double size = std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0) / (double) a.size());
            const double tol  = type == GGML_TYPE_F16    ? 0.01
                                : type == GGML_TYPE_Q4_0 ? 0.5
                                : type == GGML_TYPE_Q5_0 ? 0.25
                                                         : 0.05;
            CHECK_NEAR(max_diff(a, b) / size, 0.0, tol);
        }

        // and the decoder layer
        o.arch                    = "hydra";
        o.grounded                = true;
        o.prefix                  = true;
        const auto         prefix = load(o);
        std::vector<float> out(tiny::n_embd, NAN);
        CHECK_EQ(entmtp_heads_prefix(prefix.get(), hidden.data(), 1, 0, out.data()), ENTMTP_OK);
        CHECK(std::isfinite(std::accumulate(out.begin(), out.end(), 0.0f)));
    }
}

static void test_draft_vocabulary() {
    const auto hidden = random_vector(tiny::n_embd, 14);

    const std::vector<int32_t> parent = { -1, 0, 0, 0, 0, 1, 1 };
    const std::vector<int32_t> rank   = { 0, 0, 1, 2, 5, 0, 9 };
    const entmtp::tree         tree   = entmtp::make_tree(parent.data(), rank.data(), (int32_t) parent.size());

    for (const std::vector<int64_t> & d2t : { std::vector<int64_t>{}, { 39, 3, 20, 0, 17, 5, 8, 30 }, { 12 } }) {
        for (const bool grounded : { false, true }) {
            head_options o;
            o.arch                 = grounded ? "hydra" : "medusa";
            o.grounded             = grounded;
            o.d2t                  = d2t;
            const std::string path = tiny::write_heads(dir / "heads.gguf", o);
            const auto        c    = load(path);
            CHECK(c);

            entmtp::heads        h(path.c_str(), base.get(), 1);
            std::vector<int32_t> tokens(tree.n_nodes(), 0);
            tokens[0] = 21;
            h.draft(tree, { hidden.data(), nullptr, { 0 } }, tokens);

            for (int32_t i = 1; i < tree.n_nodes(); ++i) {
                const int32_t head = tree.depth[i] - 1;
                const auto    l    = logits(c.get(), head, hidden, { 21, tokens[tree.parent[i]] });
                CHECK_EQ(l.size(), d2t.empty() ? (size_t) tiny::n_vocab : d2t.size());

                std::vector<int32_t> order(l.size());
                std::iota(order.begin(), order.end(), 0);
                std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return l[a] > l[b]; });

                // a rank beyond a small draft vocabulary repeats its last guess
                const int32_t best = order[std::min<size_t>(tree.rank[i], order.size() - 1)];
                CHECK_EQ(tokens[i], d2t.empty() ? best : (int32_t) d2t[best]);
            }

            // the graph is used again
            std::vector<int32_t> again(tree.n_nodes(), 0);
            again[0] = 21;
            h.draft(tree, { hidden.data(), nullptr, { 0 } }, again);
            CHECK(tokens == again);
        }
    }
}

// the values of a matrix as its type holds them
static std::vector<float> as_stored(const std::vector<float> & values, ggml_type type) {
    if (type == GGML_TYPE_F32) {
        return values;
    }
    const int64_t        n_rows = (int64_t) values.size() / tiny::n_embd;
    std::vector<uint8_t> bytes(ggml_row_size(type, tiny::n_embd) * (size_t) n_rows);
    std::vector<float>   res(values.size());
    ggml_quantize_chunk(type, values.data(), bytes.data(), 0, n_rows, tiny::n_embd, nullptr);
    ggml_get_type_traits(type)->to_float(bytes.data(), res.data(), (int64_t) res.size());
    return res;
}

// heads that share the base model's projection: as ggml's kernels and ours hold it, tied to the embeddings or not
static void test_shared_projection() {
    const auto hidden = random_vector(tiny::n_embd, 17);

    for (const bool kernels : { false, true }) {
        if (!kernels) {
            entmtp_kernels_disable();
        } else if (entmtp_kernels_enable(nullptr) != ENTMTP_OK) {
            continue; // built without
        }
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_0 }) {
            for (const bool tied : { false, true }) {
                const tiny::file model = tiny::make_base(1, "llama", tied, type);
                base                   = tiny::load_base(model.write(dir / "shared-base.gguf"));
                CHECK(base);
                const auto projection = as_stored(model.values.at(tied ? "token_embd.weight" : "output.weight"), type);

                for (const std::vector<int64_t> & d2t :
                     { std::vector<int64_t>{}, { 39, 3, 20, 0, 17, 5, 8, 30, 1, 2, 4, 6, 7, 9, 10, 11, 38 }, { 12 } }) {
                    head_options o;
                    o.shared = true;
                    o.bias   = d2t.size() != 1;
                    o.d2t    = d2t;

                    tiny::file      f = tiny::make_heads(o);
                    const heads_ptr h = load(f.write(dir / "heads.gguf"));
                    if (!CHECK(h)) {
                        fprintf(stderr, "  %s %s: %s\n", ggml_type_name(type), tied ? "tied" : "", entmtp_last_error());
                        continue;
                    }

                    // nothing is held twice
                    entmtp_heads_info info;
                    entmtp_heads_get_info(h.get(), &info);
                    const auto blocks = (int64_t) sizeof(float) * 3 * tiny::n_embd * (tiny::n_embd + 1);
                    const auto rows   = (int64_t) sizeof(float) * tiny::n_embd * ((int64_t) d2t.size() + 16);
                    CHECK(info.n_bytes < blocks + 4096 + (d2t.empty() ? 0 : rows));

                    std::vector<float> own;
                    for (int64_t i = 0; i < (d2t.empty() ? tiny::n_vocab : (int64_t) d2t.size()); ++i) {
                        const auto row = projection.begin() + (d2t.empty() ? i : d2t[i]) * tiny::n_embd;
                        own.insert(own.end(), row, row + tiny::n_embd);
                    }
                    for (int32_t i = 0; i < 3; ++i) {
                        f.values["head." + std::to_string(i) + ".output.weight"] = own;

                        const auto   expected = reference(f, i, 1, hidden);
                        const auto   got      = logits(h.get(), i, hidden);
                        const double size =
                            std::sqrt(std::inner_product(expected.begin(), expected.end(), expected.begin(), 0.0) /
                                      (double) expected.size());
                        // quantised products round their activations, too
                        const double tol = type == GGML_TYPE_F32   ? 1e-4
                                           : type == GGML_TYPE_F16 ? 5e-3
                                                                   : 0.04 * (size + 1);
                        CHECK_NEAR(max_diff(got, expected), 0.0, tol);
                    }
                }
                base.reset();
            }
        }
    }
    entmtp_kernels_disable();
    base = tiny::load_base(dir / "base.gguf");
}

static void test_top_k() {
    std::mt19937 rng(18);
    for (const int32_t n : { 1, 2, 15, 63, 64, 65, 1000, 4096 }) {
        for (const int32_t k : { 1, 2, 8, 64 }) {
            // few different values: ties are common, and the first comes first
            std::vector<float> x(n);
            for (float & v : x) {
                v = n % 2 ? (float) (rng() % 50) - 25.0f : (float) rng() - 2e9f;
            }
            std::vector<int32_t> order(n);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });

            std::vector<int32_t> best(std::min(n, k), -1);
            entmtp::top_k(x.data(), n, (int32_t) best.size(), best.data());
            CHECK(std::equal(best.begin(), best.end(), order.begin()));

            // values that are not numbers: indices all the same
            for (int32_t i = 0; i < n; i += 1 + (int32_t) (rng() % 3)) {
                x[i] = i % 2 ? NAN : INFINITY;
            }
            entmtp::top_k(x.data(), n, (int32_t) best.size(), best.data());
            for (const int32_t i : best) {
                CHECK(i >= 0 && i < n);
            }
        }
    }
}

static void test_prefix_chunks() {
    head_options o;
    o.arch       = "hydra";
    o.grounded   = true;
    o.prefix     = true;
    const auto h = load(o);

    constexpr int32_t n      = 130; // more than one padding of the cache
    const auto        hidden = random_vector(n * tiny::n_embd, 15);
    const auto        run    = [&](int32_t from, int32_t to) {
        std::vector<float> out(tiny::n_embd, NAN);
        CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data() + from * tiny::n_embd, to - from, from, out.data()),
                 ENTMTP_OK);
        return out;
    };

    const auto all  = run(0, n);
    const auto some = run(0, 70);
    for (const int32_t chunk : { 1, 7, 64, 129 }) {
        for (int32_t i = 0; i < n; i += chunk) {
            const auto out = run(i, std::min(i + chunk, n));
            if (i + chunk == 70) {
                CHECK_NEAR(max_diff(out, some), 0.0, 1e-5);
            }
            if (i + chunk >= n) {
                CHECK_NEAR(max_diff(out, all), 0.0, 1e-5);
            }
        }
        CHECK_NEAR(max_diff(run(60, 70), some), 0.0, 1e-5); // back, and on from there
    }

    std::vector<float> out(tiny::n_embd);
    CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data(), 0, 0, out.data()), ENTMTP_ERROR);
    CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data(), 1, -1, out.data()), ENTMTP_ERROR);
    CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data(), n, INT32_MAX - 2, out.data()), ENTMTP_ERROR);
    CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data(), INT32_MAX, 1, out.data()), ENTMTP_ERROR);

    // more positions than the cache was first made for: right, or an error
    const auto longer = random_vector(700 * tiny::n_embd, 16);
    const auto other  = load(o);
    CHECK_EQ(entmtp_heads_prefix(other.get(), longer.data(), 700, 0, out.data()), ENTMTP_OK);
    const auto expected = out;
    CHECK_EQ(entmtp_heads_prefix(h.get(), longer.data(), 400, 0, out.data()), ENTMTP_OK);
    if (entmtp_heads_prefix(h.get(), longer.data() + 400 * tiny::n_embd, 300, 400, out.data()) == ENTMTP_OK) {
        CHECK_NEAR(max_diff(out, expected), 0.0, 1e-5);
    }

    CHECK_EQ(entmtp_heads_prefix(load(head_options{}).get(), hidden.data(), 1, 0, out.data()), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "no prefix layer");
}

int main() {
    if (set_up()) {
        test_logits();
        test_shared_blocks();
        test_types();
        test_draft_vocabulary();
        test_shared_projection();
        test_top_k();
        test_prefix_chunks();
    }
    return tear_down("test_heads");
}
