// Heads files: what loads, what the loaded heads compute, and what is refused with which sentence.

#include "entmtp.h"
#include "heads.h"
#include "tree.h"

#include "check.h"
#include "tiny.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <numeric>

using tiny::head_options;

struct heads_deleter { void operator()(entmtp_heads * p) { entmtp_heads_free(p); } };
using heads_ptr = std::unique_ptr<entmtp_heads, heads_deleter>;

static tiny::folder    dir;
static tiny::model_ptr base;

static heads_ptr load(const std::string & path) {
    return heads_ptr(entmtp_heads_load(path.c_str(), base.get(), 1));
}

static heads_ptr load(const head_options & o) {
    heads_ptr h = load(tiny::write_heads(dir / "heads.gguf", o));
    if (!h) {
        check_failed(__FILE__, __LINE__, std::string("did not load: ") + entmtp_last_error());
    }
    return h;
}

// the file is refused, and the sentence names the culprit
static void refused(const char * what, const std::string & path, std::initializer_list<const char *> parts) {
    const heads_ptr h = load(path);
    if (h) {
        check_failed(__FILE__, __LINE__, std::string(what) + ": loaded");
        return;
    }
    for (const char * part : parts) {
        if (!CHECK_HAS(entmtp_last_error(), part)) {
            fprintf(stderr, "  in: %s\n", what);
        }
    }
}

static void refused(const char * what, const head_options & o, std::initializer_list<const char *> parts) {
    refused(what, tiny::write_heads(dir / "bad.gguf", o), parts);
}

static std::vector<float> random_vector(int32_t n, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> res(n);
    for (auto & x : res) {
        x = normal(rng);
    }
    return res;
}

static std::vector<float> logits(entmtp_heads * h, int32_t head, const std::vector<float> & hidden, const std::vector<int32_t> & path = { 5, 6, 7, 8 }) {
    entmtp_heads_info info;
    entmtp_heads_get_info(h, &info);
    std::vector<float> res(info.n_vocab_draft, NAN);
    CHECK_EQ(entmtp_heads_logits(h, head, hidden.data(), path.data(), res.data()), ENTMTP_OK);
    return res;
}

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

    std::vector<float> res = matmul(f.values.at(p + "output.weight"), x);
    if (f.values.count(p + "output.bias")) {
        for (size_t k = 0; k < res.size(); ++k) {
            res[k] += f.values.at(p + "output.bias")[k];
        }
    }
    return res;
}

static double max_diff(const std::vector<float> & a, const std::vector<float> & b) {
    double res = a.size() == b.size() ? 0.0 : 1e9;
    for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        res = std::max(res, std::fabs((double) a[i] - (double) b[i]));
    }
    return res;
}

//
// files that load
//

static void test_info() {
    const heads_ptr m = load(head_options{});

    entmtp_heads_info info;
    entmtp_heads_get_info(m.get(), &info);
    CHECK_EQ(info.n_heads, 3);
    CHECK_EQ(info.n_blocks, 1);
    CHECK_EQ(info.n_embd, tiny::n_embd);
    CHECK_EQ(info.n_vocab, tiny::n_vocab);
    CHECK_EQ(info.n_vocab_draft, tiny::n_vocab);
    CHECK(!info.hydra && !info.grounded && !info.prefix);
    CHECK(info.n_bytes >= (int64_t) sizeof(float) * 3 * tiny::n_embd * (tiny::n_embd + 1 + tiny::n_vocab));
    CHECK(strlen(info.device) > 0);

    head_options o;
    o.arch     = "hydra";
    o.grounded = true;
    o.prefix   = true;
    o.n_heads  = 4;
    o.n_blocks = 2;
    const heads_ptr h = load(o);
    entmtp_heads_get_info(h.get(), &info);
    CHECK_EQ(info.n_heads, 4);
    CHECK_EQ(info.n_blocks, 2);
    CHECK(info.hydra && info.grounded && info.prefix);

    char hex[17];
    snprintf(hex, sizeof(hex), "%016" PRIx64, entmtp_vocab_fingerprint(base.get()));
    CHECK(tiny::fingerprint(tiny::vocabulary()) == hex);
}

static void test_logits() {
    const auto hidden = random_vector(tiny::n_embd, 11);

    for (const int kind : { 0, 1, 2 }) { // Medusa, Hydra, grounded Hydra
        for (const int32_t n_blocks : { 1, 2, 3 }) {
            head_options o;
            o.arch     = kind ? "hydra" : "medusa";
            o.grounded = kind == 2;
            o.n_blocks = n_blocks;
            o.bias     = n_blocks % 2;
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

// blocks that are not stored are the nearest stored one before
static void test_shared_blocks() {
    const auto hidden = random_vector(tiny::n_embd, 12);

    head_options o;
    o.n_blocks = 3;
    o.equal    = true;
    const auto full = load(o);
    o.n_stored = 1;
    const auto shared = load(o);
    o.n_blocks = 1;
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
        o.type = type;
        const auto h = load(o);
        for (int32_t i = 0; i < 3 && h; ++i) {
            const auto a = logits(exact.get(), i, hidden);
            const auto b = logits(h.get(), i, hidden);
            // error relative to the logits' size
            const double size = std::sqrt(std::inner_product(a.begin(), a.end(), a.begin(), 0.0) / (double) a.size());
            const double tol  = type == GGML_TYPE_F16 ? 0.01 : type == GGML_TYPE_Q4_0 ? 0.5 : type == GGML_TYPE_Q5_0 ? 0.25 : 0.05;
            CHECK_NEAR(max_diff(a, b) / size, 0.0, tol);
        }

        // and the decoder layer
        o.arch     = "hydra";
        o.grounded = true;
        o.prefix   = true;
        const auto prefix = load(o);
        std::vector<float> out(tiny::n_embd, NAN);
        CHECK_EQ(entmtp_heads_prefix(prefix.get(), hidden.data(), 1, 0, out.data()), ENTMTP_OK);
        CHECK(std::isfinite(std::accumulate(out.begin(), out.end(), 0.0f)));
    }
}

// guesses are the best logits in order, in base tokens
static void test_draft_vocabulary() {
    const auto hidden = random_vector(tiny::n_embd, 14);

    const std::vector<int32_t> parent = { -1, 0, 0, 0, 0, 1, 1 };
    const std::vector<int32_t> rank   = {  0, 0, 1, 2, 5, 0, 9 };
    const entmtp::tree         tree   = entmtp::make_tree(parent.data(), rank.data(), (int32_t) parent.size());

    for (const std::vector<int64_t> & d2t : { std::vector<int64_t>{}, { 39, 3, 20, 0, 17, 5, 8, 30 }, { 12 } }) {
        for (const bool grounded : { false, true }) {
            head_options o;
            o.arch     = grounded ? "hydra" : "medusa";
            o.grounded = grounded;
            o.d2t      = d2t;
            const std::string path = tiny::write_heads(dir / "heads.gguf", o);
            const auto        c    = load(path);
            CHECK(c);

            entmtp::heads        h(path.c_str(), base.get(), 1);
            std::vector<int32_t> tokens(tree.n_nodes(), 0);
            tokens[0] = 21;
            h.draft(tree, hidden.data(), tokens);

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
            h.draft(tree, hidden.data(), again);
            CHECK(tokens == again);
        }
    }
}

// the decoder layer gives the same whatever the chunks
static void test_prefix_chunks() {
    head_options o;
    o.arch     = "hydra";
    o.grounded = true;
    o.prefix   = true;
    const auto h = load(o);

    constexpr int32_t n = 130; // more than one padding of the cache
    const auto        hidden = random_vector(n * tiny::n_embd, 15);
    const auto        run    = [&](int32_t from, int32_t to) {
        std::vector<float> out(tiny::n_embd, NAN);
        CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data() + from * tiny::n_embd, to - from, from, out.data()), ENTMTP_OK);
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
    CHECK_EQ(entmtp_heads_prefix(h.get(), hidden.data(), 0, 0, out.data()),  ENTMTP_ERROR);
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

//
// files that do not
//

static void test_wrong_keys() {
    const auto with = [](auto change) {
        head_options o;
        o.change = change;
        return o;
    };
    const auto without = [&](const char * key) {
        return with([key](tiny::file & f) { gguf_remove_key(f.gguf.get(), key); });
    };

    for (const char * key : { "general.architecture", "entmtp.format_version", "entmtp.tokenizer.fingerprint", "medusa.embedding_length",
                              "medusa.vocab_size", "medusa.predict_heads", "medusa.block_count" }) {
        refused("a missing key", without(key), { "has no key", key, "entmtp.convert" });
        refused("a key of a wrong type", with([&](tiny::file & f) { f.set(key, 1.0f); }), { key, "f32" });
        const uint32_t list[] = { 1, 2 };
        refused("a list", with([&](tiny::file & f) { gguf_set_arr_data(f.gguf.get(), key, GGUF_TYPE_UINT32, list, 2); }), { key, "arr" });
    }
    CHECK(load(without("entmtp.base.name")));

    refused("another architecture", with([](tiny::file & f) { f.set("general.architecture", "llama"); }), { "llama", "not draft heads" });
    refused("a newer format", with([](tiny::file & f) { f.set("entmtp.format_version", (uint32_t) 2); }), { "newer version" });

    const auto u32 = [&](const char * key, uint32_t val) {
        return with([key, val](tiny::file & f) { f.set(std::string("medusa.") + key, val); });
    };
    refused("another width", u32("embedding_length", 64), { "tiny base", "embedding length is 64", "is 32" });
    refused("another vocabulary", u32("vocab_size", 50), { "tiny base", "vocabulary size is 50", "is 40" });
    refused("another tokenizer", with([](tiny::file & f) { f.set("entmtp.tokenizer.fingerprint", "0123456789abcdef"); }),
            { "tokenizer fingerprint is 0123456789abcdef", tiny::fingerprint(tiny::vocabulary()).c_str() });

    for (const uint32_t x : { 0u, 65u, 0x80000000u, 0xffffffffu }) {
        refused("a nonsensical number of heads",  u32("predict_heads",    x), { "medusa.predict_heads", "expected 1 to" });
        refused("a nonsensical number of blocks", u32("block_count",      x), { "medusa.block_count", "expected 1 to" });
    }
    refused("no width",        u32("embedding_length", 0),           { "medusa.embedding_length" });
    refused("a huge width",    u32("embedding_length", 0xffffffffu), { "medusa.embedding_length" });
    refused("too many heads",  u32("predict_heads", 4),              { "has no tensor head.3.blk.0.weight" });

    for (const char * key : { "hydra.grounded", "hydra.prefix_layer" }) {
        head_options o;
        o.arch   = "hydra";
        o.change = [key](tiny::file & f) { f.set(key, (uint32_t) 1); };
        refused("a flag of a wrong type", o, { key, "u32", "bool" });
    }

    const std::pair<const char *, uint32_t> nonsense[] = {
        { "hydra.attention.head_count", 3 }, { "hydra.attention.head_count", 32 }, { "hydra.attention.head_count_kv", 3 },
    };
    for (const auto & [key, x] : nonsense) {
        head_options o;
        o.arch   = "hydra";
        o.prefix = true;
        o.change = [key = key, x = x](tiny::file & f) { f.set(key, x); };
        refused("heads of attention that do not divide", o, { "make no sense" });
    }
}

static void test_wrong_tensors() {
    head_options o;
    for (const char * name : { "head.0.blk.0.weight", "head.1.blk.0.bias", "head.2.output.weight" }) {
        o.skip = { name };
        refused("a missing tensor", o, { "has no tensor", name });

        o.change = [name](tiny::file & f) { f.add(name, GGML_TYPE_F32, 16, 8, 1.0f); };
        refused("a tensor of a wrong shape", o, { name, "[16, 8]", "expected [" });

        o.change = [name](tiny::file & f) { f.add_raw<float>(name, GGML_TYPE_F32, { tiny::n_embd, tiny::n_embd, 2 }, {}); };
        refused("a tensor of three dimensions", o, { name });

        for (const std::vector<int64_t> & ne : { std::vector<int64_t>{ tiny::n_embd, 0 }, { tiny::n_embd, tiny::n_embd, 0 } }) {
            o.change = [&](tiny::file & f) { f.add_raw<float>(name, GGML_TYPE_F32, ne, {}); };
            refused("an empty tensor", o, { name });
        }
        o.change = nullptr;
    }

    o        = {};
    o.skip   = { "head.0.blk.0.weight" };
    o.change = [](tiny::file & f) { f.add_raw<int32_t>("head.0.blk.0.weight", GGML_TYPE_I32, { tiny::n_embd, tiny::n_embd }, {}); };
    refused("a matrix of whole numbers", o, { "head.0.blk.0.weight", "i32" });

    // types that are quantised, but that no weights have: nothing can multiply with them
    o          = {};
    o.arch     = "hydra";
    o.grounded = true;
    o.n_heads  = 7; // its input is as wide as a block of q8_K
    o.skip     = { "head.6.blk.0.weight" };
    for (const ggml_type type : { GGML_TYPE_Q8_1, GGML_TYPE_Q8_K }) {
        o.change = [type](tiny::file & f) { f.add_raw<uint8_t>("head.6.blk.0.weight", type, { 8 * tiny::n_embd, tiny::n_embd }, std::vector<uint8_t>(1 << 16)); };
        refused("a type for activations", o, { "head.6.blk.0.weight", ggml_type_name(type) });
    }

    o        = {};
    o.skip   = { "head.0.blk.0.bias" };
    o.change = [](tiny::file & f) { f.add("head.0.blk.0.bias", GGML_TYPE_F16, tiny::n_embd, 1, 1.0f); };
    refused("a bias in f16", o, { "head.0.blk.0.bias", "f16" });

    // values that are not numbers
    for (const char * name : { "head.0.blk.0.weight", "head.0.blk.0.bias" }) {
        const int64_t rows = strstr(name, "bias") ? 1 : tiny::n_embd;
        for (const float x : { NAN, INFINITY }) {
            std::vector<float> data((size_t) (rows * tiny::n_embd), 0.5f);
            data[17] = x;
            o.skip   = { name };
            o.change = [&](tiny::file & f) { f.add(name, GGML_TYPE_F32, tiny::n_embd, rows, data); };
            refused("not numbers", o, { name, "not numbers" });
        }
    }

    // draft vocabularies
    const auto d2t = [](std::vector<int64_t> ids) {
        head_options res;
        res.d2t = std::move(ids);
        return res;
    };
    refused("a token below the vocabulary", d2t({ 1, 2, -1 }),        { "d2t names token -1" });
    refused("a token beyond it",            d2t({ 1, 40, 3 }),        { "d2t names token 40" });
    refused("a token far beyond it",        d2t({ 1ll << 32 | 5, 3 }), { "d2t names token" });
    refused("a larger draft vocabulary",    d2t(std::vector<int64_t>(41, 1)), { "d2t is not a list of at most 40" });

    o        = {};
    o.change = [](tiny::file & f) { f.add("d2t", GGML_TYPE_F32, 8, 1, 1.0f); };
    refused("a d2t of floats", o, { "d2t is not a list" });
    o.change = [](tiny::file & f) { f.add_raw<int64_t>("d2t", GGML_TYPE_I64, { 2, 4 }, std::vector<int64_t>(8, 1)); };
    refused("a d2t of two dimensions", o, { "d2t is not a list" });
    o.change = [](tiny::file & f) { f.add_raw<int64_t>("d2t", GGML_TYPE_I64, { 8 }, std::vector<int64_t>(8, 1)); };
    refused("a d2t that does not fit the heads", o, { "head.0.output.weight" });
}

static void test_damaged_files() {
    refused("no file", dir / "missing.gguf", { "cannot open", "missing.gguf" });
    refused("a folder", dir / "", { "" });

    const auto write = [&](const std::string & bytes) {
        const std::string path = dir / "bad.gguf";
        std::ofstream(path, std::ios::binary) << bytes;
        return path;
    };
    refused("an empty file", write(""), { "not a GGUF file" });
    refused("a text", write(std::string(1000, 'x')), { "not a GGUF file" });
    refused("a magic number alone", write("GGUF"), { "not a GGUF file" });

    // the base model itself
    refused("a base model", dir / "base.gguf", { "llama", "not draft heads" });

    head_options o;
    o.arch     = "hydra";
    o.grounded = true;
    o.prefix   = true;
    o.d2t      = { 1, 2, 3, 4, 5, 6, 7, 8 };

    std::string bytes;
    {
        std::ifstream in(tiny::write_heads(dir / "heads.gguf", o), std::ios::binary);
        bytes.assign(std::istreambuf_iterator<char>(in), {});
    }
    CHECK(load(write(bytes)));

    // cut anywhere
    std::mt19937 rng(3);
    for (int i = 0; i < 100; ++i) {
        const size_t n = i < 20 ? bytes.size() - 32 - (size_t) i * 40 : rng() % (bytes.size() - 32);
        refused("a truncated file", write(bytes.substr(0, n)), { "bad.gguf" });
    }

    // bytes changed in the header: it loads or it does not, and no more
    const size_t n_header = bytes.find("prefix.output_norm.weight") + 64;
    for (int i = 0; i < 1000; ++i) {
        std::string changed = bytes;
        for (int j = 0; j <= i % 3; ++j) {
            changed[rng() % n_header] = (char) (rng() % 256);
        }
        const auto h = load(write(changed));
        CHECK(h || strlen(entmtp_last_error()) > 10);
        if (h && i % 10 == 0) {
            logits(h.get(), 0, random_vector(tiny::n_embd, 1), { 5, 6, 7, 8 });
        }
    }
}

static void test_arguments() {
    CHECK(!entmtp_heads_load(nullptr, base.get(), 1));
    CHECK(!entmtp_heads_load("x", nullptr, 1));
    CHECK_EQ(entmtp_vocab_fingerprint(nullptr), 0);

    entmtp_heads_info info;
    entmtp_heads_get_info(nullptr, &info);
    CHECK_EQ(info.n_heads, 0);

    // a base model without a tokenizer
    const auto mute = tiny::load_base(tiny::write_base(dir / "no-vocab.gguf", 1, "no_vocab"));
    CHECK(mute);
    CHECK_EQ(entmtp_vocab_fingerprint(mute.get()), 0);
    CHECK(!entmtp_heads_load(tiny::write_heads(dir / "heads.gguf").c_str(), mute.get(), 1));
    CHECK_HAS(entmtp_last_error(), "tokenizer");
    entmtp_heads_free(nullptr);

    head_options o;
    o.arch     = "hydra";
    o.grounded = true;
    const auto h = load(o);

    std::vector<float> x(tiny::n_embd);
    std::vector<float> out(tiny::n_vocab);
    const int32_t      path[] = { 1, 2, 3, 4 };
    const int32_t      bad[]  = { 1, tiny::n_vocab, 3 };
    CHECK_EQ(entmtp_heads_logits(h.get(), 0, x.data(), path, out.data()), ENTMTP_OK);
    for (const int32_t head : { -1, 3, INT32_MAX }) {
        CHECK_EQ(entmtp_heads_logits(h.get(), head, x.data(), path, out.data()), ENTMTP_ERROR);
        CHECK_HAS(entmtp_last_error(), "no head");
    }
    CHECK_EQ(entmtp_heads_logits(h.get(), 1, x.data(), bad, out.data()), ENTMTP_ERROR);
    CHECK_HAS(entmtp_last_error(), "vocabulary");
    CHECK_EQ(entmtp_heads_logits(nullptr, 0, x.data(), path, out.data()), ENTMTP_ERROR);
    CHECK_EQ(entmtp_heads_logits(h.get(), 0, nullptr, path, out.data()), ENTMTP_ERROR);
}

int main() {
    tiny::be_quiet();
    base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
    if (!CHECK(base)) {
        return check_result("test_heads_file");
    }

    test_info();
    test_logits();
    test_shared_blocks();
    test_types();
    test_draft_vocabulary();
    test_prefix_chunks();
    test_wrong_keys();
    test_wrong_tensors();
    test_damaged_files();
    test_arguments();

    base.reset();
    llama_backend_free();
    return check_result("test_heads_file");
}
