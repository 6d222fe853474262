// Heads files: what loads, and what is refused with which sentence.

#include "heads_files.h"

#include <fstream>
#include <iterator>

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
    o.arch            = "hydra";
    o.grounded        = true;
    o.prefix          = true;
    o.n_heads         = 4;
    o.n_blocks        = 2;
    const heads_ptr h = load(o);
    entmtp_heads_get_info(h.get(), &info);
    CHECK_EQ(info.n_heads, 4);
    CHECK_EQ(info.n_blocks, 2);
    CHECK(info.hydra && info.grounded && info.prefix);

    char hex[17];
    snprintf(hex, sizeof(hex), "%016" PRIx64, entmtp_vocab_fingerprint(base.get()));
    CHECK(tiny::fingerprint(tiny::vocabulary()) == hex);
}

static void test_wrong_keys() {
    const auto with = [](auto change) {
        head_options o;
        o.change = change;
        return o;
    };
    const auto without = [&](const char * key) {
        return with([key](tiny::file & f) { gguf_remove_key(f.gguf.get(), key); });
    };

    for (const char * key :
         { "general.architecture", "entmtp.format_version", "entmtp.base.name", "entmtp.tokenizer.fingerprint",
           "medusa.embedding_length", "medusa.vocab_size", "medusa.predict_heads", "medusa.block_count" }) {
        refused("a missing key", without(key), { "has no key", key, "entmtp.convert" });
        refused("a key of a wrong type", with([&](tiny::file & f) { f.set(key, 1.0f); }), { key, "f32" });
        const uint32_t list[] = { 1, 2 };
        refused("a list",
                with([&](tiny::file & f) { gguf_set_arr_data(f.gguf.get(), key, GGUF_TYPE_UINT32, list, 2); }),
                { key, "arr" });
    }
    CHECK(load(with([](tiny::file & f) { f.set("entmtp.base.name", ""); }))); // a base model may have none

    refused("another architecture", with([](tiny::file & f) { f.set("general.architecture", "llama"); }),
            { "llama", "not draft heads" });
    refused("a newer format", with([](tiny::file & f) { f.set("entmtp.format_version", (uint32_t) 2); }),
            { "newer version" });

    const auto u32 = [&](const char * key, uint32_t val) {
        return with([key, val](tiny::file & f) { f.set(std::string("medusa.") + key, val); });
    };
    refused("another width", u32("embedding_length", 64), { "tiny base", "embedding length is 64", "is 32" });
    refused("another vocabulary", u32("vocab_size", 50), { "tiny base", "vocabulary size is 50", "is 40" });
    refused("another tokenizer",
            with([](tiny::file & f) { f.set("entmtp.tokenizer.fingerprint", "0123456789abcdef"); }),
            { "tokenizer fingerprint is 0123456789abcdef", tiny::fingerprint(tiny::vocabulary()).c_str() });

    for (const uint32_t x : { 0u, 65u, 0x80000000u, 0xffffffffu }) {
        refused("a nonsensical number of heads", u32("predict_heads", x), { "medusa.predict_heads", "expected 1 to" });
        if (x > 0) {
            refused("a nonsensical number of blocks", u32("block_count", x), { "medusa.block_count", "expected 0 to" });
        }
    }
    head_options g;
    g.arch     = "hydra";
    g.grounded = true;
    g.change   = [](tiny::file & f) {
        f.set("hydra.block_count", (uint32_t) 0);
    };
    refused("grounded heads without blocks", g, { "hydra.block_count is 0", "expected 1 to" });
    refused("no width", u32("embedding_length", 0), { "medusa.embedding_length" });
    refused("a huge width", u32("embedding_length", 0xffffffffu), { "medusa.embedding_length" });
    refused("too many heads", u32("predict_heads", 4), { "has no tensor head.3.blk.0.weight" });

    for (const char * key : { "hydra.grounded", "hydra.prefix_layer" }) {
        head_options o;
        o.arch   = "hydra";
        o.change = [key](tiny::file & f) {
            f.set(key, (uint32_t) 1);
        };
        refused("a flag of a wrong type", o, { key, "u32", "bool" });
    }

    const std::pair<const char *, uint32_t> nonsense[] = {
        { "hydra.attention.head_count", 3 },
        { "hydra.attention.head_count", 32 },
        { "hydra.attention.head_count_kv", 3 },
    };
    for (const auto & [key, x] : nonsense) {
        head_options o;
        o.arch   = "hydra";
        o.prefix = true;
        o.change = [key = key, x = x](tiny::file & f) {
            f.set(key, x);
        };
        refused("heads of attention that do not divide", o, { "make no sense" });
    }
}

static void test_wrong_tensors() {
    head_options o;
    for (const char * name : { "head.0.blk.0.weight", "head.1.blk.0.bias", "head.2.output.weight" }) {
        o.skip = { name };
        refused("a missing tensor", o, { "has no tensor", name });

        o.change = [name](tiny::file & f) {
            f.add(name, GGML_TYPE_F32, 16, 8, 1.0f);
        };
        refused("a tensor of a wrong shape", o, { name, "[16, 8]", "expected [" });

        o.change = [name](tiny::file & f) {
            f.add_raw<float>(name, GGML_TYPE_F32, { tiny::n_embd, tiny::n_embd, 2 }, {});
        };
        refused("a tensor of three dimensions", o, { name });

        for (const std::vector<int64_t> & ne :
             { std::vector<int64_t>{ tiny::n_embd, 0 }, { tiny::n_embd, tiny::n_embd, 0 } }) {
            o.change = [&](tiny::file & f) {
                f.add_raw<float>(name, GGML_TYPE_F32, ne, {});
            };
            refused("an empty tensor", o, { name });
        }
        o.change = nullptr;
    }

    o        = {};
    o.skip   = { "head.0.blk.0.weight" };
    o.change = [](tiny::file & f) {
        f.add_raw<int32_t>("head.0.blk.0.weight", GGML_TYPE_I32, { tiny::n_embd, tiny::n_embd }, {});
    };
    refused("a matrix of whole numbers", o, { "head.0.blk.0.weight", "i32" });

    // types that are quantised, but that no weights have: nothing can multiply with them
    o          = {};
    o.arch     = "hydra";
    o.grounded = true;
    o.n_heads  = 7; // its input is as wide as a block of q8_K
    o.skip     = { "head.6.blk.0.weight" };
    for (const ggml_type type : { GGML_TYPE_Q8_1, GGML_TYPE_Q8_K }) {
        o.change = [type](tiny::file & f) {
            f.add_raw<uint8_t>("head.6.blk.0.weight", type, { 8 * tiny::n_embd, tiny::n_embd },
                               std::vector<uint8_t>(1 << 16));
        };
        refused("a type for activations", o, { "head.6.blk.0.weight", ggml_type_name(type) });
    }

    o        = {};
    o.skip   = { "head.0.blk.0.bias" };
    o.change = [](tiny::file & f) {
        f.add("head.0.blk.0.bias", GGML_TYPE_F16, tiny::n_embd, 1, 1.0f);
    };
    refused("a bias in f16", o, { "head.0.blk.0.bias", "f16" });

    // values that are not numbers
    for (const char * name : { "head.0.blk.0.weight", "head.0.blk.0.bias" }) {
        const int64_t rows = strstr(name, "bias") ? 1 : tiny::n_embd;
        for (const float x : { NAN, INFINITY }) {
            std::vector<float> data((size_t) (rows * tiny::n_embd), 0.5f);
            data[17] = x;
            o.skip   = { name };
            o.change = [&](tiny::file & f) {
                f.add(name, GGML_TYPE_F32, tiny::n_embd, rows, data);
            };
            refused("not numbers", o, { name, "not numbers" });
        }
    }

    // draft vocabularies
    const auto d2t = [](std::vector<int64_t> ids) {
        head_options res;
        res.d2t = std::move(ids);
        return res;
    };
    refused("a token below the vocabulary", d2t({ 1, 2, -1 }), { "d2t names token -1" });
    refused("a token beyond it", d2t({ 1, 40, 3 }), { "d2t names token 40" });
    refused("a token far beyond it", d2t({ 1ll << 32 | 5, 3 }), { "d2t names token" });
    refused("a token that comes twice", d2t({ 1, 7, 3, 7 }), { "d2t names token 7 twice" });
    refused("a larger draft vocabulary", d2t(std::vector<int64_t>(41, 1)), { "d2t is not a list of at most 40" });

    o        = {};
    o.change = [](tiny::file & f) {
        f.add("d2t", GGML_TYPE_F32, 8, 1, 1.0f);
    };
    refused("a d2t of floats", o, { "d2t is not a list" });
    o.change = [](tiny::file & f) {
        f.add_raw<int64_t>("d2t", GGML_TYPE_I64, { 2, 4 }, std::vector<int64_t>(8, 1));
    };
    refused("a d2t of two dimensions", o, { "d2t is not a list" });
    o.change = [](tiny::file & f) {
        f.add_raw<int64_t>("d2t", GGML_TYPE_I64, { 8 }, { 1, 2, 3, 4, 5, 6, 7, 8 });
    };
    refused("a d2t that does not fit the heads", o, { "head.0.output.weight" });
}

static void test_wrong_sharing() {
    head_options o;
    o.change = [](tiny::file & f) {
        f.set("medusa.shared_output", true);
    };
    refused("shared and not", o, { "shared", "head.0.output.weight" });

    o.shared = true;
    o.change = [](tiny::file & f) {
        f.set("medusa.shared_output", (uint32_t) 1);
    };
    refused("a flag of a wrong type", o, { "medusa.shared_output", "u32", "bool" });
    o.change = [](tiny::file & f) {
        f.set("medusa.shared_output", false);
    };
    refused("neither shared nor its own", o, { "has no tensor head.0.output.weight" });

    o.change = [](tiny::file & f) {
        f.set("medusa.shared_output", true);
        f.add("output.weight", GGML_TYPE_F32, tiny::n_embd, tiny::n_vocab, 1.0f);
    };
    refused("the base model's and one for all heads", o, { "shared", "has a tensor output.weight" });

    o        = {};
    o.one    = true;
    o.change = [](tiny::file & f) {
        f.add("head.1.output.weight", GGML_TYPE_F32, tiny::n_embd, tiny::n_vocab, 1.0f);
    };
    refused("one for all heads and another", o, { "one projection for all heads", "head.1.output.weight" });
    o.change = nullptr;
    o.skip   = { "output.weight" };
    refused("the one for all heads is missing", o, { "has no tensor head.0.output.weight" });
    o     = {};
    o.one = true;
    o.d2t = { 5, 1, 2 };
    CHECK(load(o));
    o.d2t    = {};
    o.change = [](tiny::file & f) {
        f.add_raw<int64_t>("d2t", GGML_TYPE_I64, { 8 }, { 1, 2, 3, 4, 5, 6, 7, 8 });
    };
    refused("a d2t that does not fit the one for all heads", o, { "tensor output.weight has shape" });

    o        = {};
    o.shared = true;
    o.change = nullptr;
    o.bias   = true;
    o.d2t    = { 1, 2, 3 };
    CHECK(load(o));
    o.skip   = { "head.1.output.bias" };
    o.change = [](tiny::file & f) {
        f.add("head.1.output.bias", GGML_TYPE_F32, tiny::n_vocab, 1, 1.0f);
    };
    refused("a bias of another vocabulary", o, { "head.1.output.bias" });
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
    entmtp_heads_get_info(nullptr, nullptr);

    // a base model without a tokenizer
    const auto mute = tiny::load_base(tiny::write_base(dir / "no-vocab.gguf", 1, "no_vocab"));
    CHECK(mute);
    CHECK_EQ(entmtp_vocab_fingerprint(mute.get()), 0);
    CHECK(!entmtp_heads_load(tiny::write_heads(dir / "heads.gguf").c_str(), mute.get(), 1));
    CHECK_HAS(entmtp_last_error(), "tokenizer");
    entmtp_heads_free(nullptr);

    head_options o;
    o.arch       = "hydra";
    o.grounded   = true;
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
    if (set_up()) {
        test_info();
        test_wrong_keys();
        test_wrong_tensors();
        test_wrong_sharing();
        test_damaged_files();
        test_arguments();
    }
    return tear_down("test_heads_load");
}
