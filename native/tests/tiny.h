// A tiny base model and tiny draft heads with random weights, written as GGUF files.

#pragma once

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace tiny {

constexpr int32_t n_embd    = 32;
constexpr int32_t n_vocab   = 40;
constexpr int32_t n_head    = 4;
constexpr int32_t n_head_kv = 2;
constexpr int32_t n_ff      = 64;
constexpr int32_t n_layer   = 2;
constexpr int32_t n_kv      = n_embd / n_head * n_head_kv;

// a folder that goes with its owner
class folder {
  public:
    folder() {
        std::random_device seed;
        path =
            std::filesystem::temp_directory_path() / ("entmtp-test-" + std::to_string(seed()) + std::to_string(seed()));
        std::filesystem::create_directories(path);
    }
    ~folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    folder(const folder &)             = delete;
    folder & operator=(const folder &) = delete;

    std::string operator/(const std::string & name) const { return (path / name).string(); }

  private:
    std::filesystem::path path;
};

// a GGUF file in the making
class file {
  public:
    gguf_context_ptr gguf{ gguf_init_empty() };

    std::map<std::string, std::vector<float>> values; // of the matrices and vectors, before quantisation

    explicit file(uint32_t seed) : rng(seed), ctx(ggml_init({ 16 << 20, nullptr, false })) {}

    void set(const std::string & key, const char * val) { gguf_set_val_str(gguf.get(), key.c_str(), val); }
    void set(const std::string & key, uint32_t val) { gguf_set_val_u32(gguf.get(), key.c_str(), val); }
    void set(const std::string & key, float val) { gguf_set_val_f32(gguf.get(), key.c_str(), val); }
    void set(const std::string & key, bool val) { gguf_set_val_bool(gguf.get(), key.c_str(), val); }

    // random values around mean
    void add(const std::string & name, ggml_type type, int64_t ne0, int64_t ne1, float scale, float mean = 0.0f) {
        std::normal_distribution<float> normal(mean, scale);
        std::vector<float>              data((size_t) (ne0 * ne1));
        for (auto & x : data) {
            x = normal(rng);
        }
        add(name, type, ne0, ne1, data);
    }

    void add(const std::string & name, ggml_type type, int64_t ne0, int64_t ne1, const std::vector<float> & data) {
        values[name] = data;

        ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), type, ne0, ne1);
        ggml_set_name(t, name.c_str());
        if (type == GGML_TYPE_F32) {
            memcpy(t->data, data.data(), ggml_nbytes(t));
        } else {
            ggml_quantize_chunk(type, data.data(), t->data, 0, ne1, ne0, nullptr);
        }
        gguf_add_tensor(gguf.get(), t);
    }

    // a tensor as it is
    template <typename T>
    void add_raw(const std::string & name, ggml_type type, std::vector<int64_t> ne, const std::vector<T> & data) {
        ggml_tensor * t = ggml_new_tensor(ctx.get(), type, (int) ne.size(), ne.data());
        ggml_set_name(t, name.c_str());
        if (!t->data) {
            t->data = ggml_get_mem_buffer(ctx.get()); // an empty tensor
        } else if (!data.empty()) {
            memcpy(t->data, data.data(), std::min(ggml_nbytes(t), data.size() * sizeof(T)));
        }
        gguf_add_tensor(gguf.get(), t);
    }

    std::string write(const std::string & path) const {
        return gguf_write_to_file(gguf.get(), path.c_str(), false) ? path : "";
    }

  private:
    std::mt19937     rng;
    ggml_context_ptr ctx;
};

inline std::vector<std::string> vocabulary() {
    std::vector<std::string> res = { "<unk>", "<s>", "</s>", "<0x0A>" };
    while ((int32_t) res.size() < n_vocab) {
        res.push_back("t" + std::to_string(res.size()));
    }
    return res;
}

// FNV-1a 64 of the vocabulary, 16 hex digits
inline std::string fingerprint(const std::vector<std::string> & vocab) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const auto & text : vocab) {
        for (size_t i = 0; i <= text.size(); ++i) {
            hash ^= (uint8_t) text.c_str()[i];
            hash *= 0x100000001b3;
        }
    }
    char hex[17];
    snprintf(hex, sizeof(hex), "%016" PRIx64, hash);
    return hex;
}

inline void set_vocabulary(file & f, const std::string & tokenizer) {
    const auto                vocab = vocabulary();
    std::vector<const char *> texts;
    std::vector<float>        scores;
    std::vector<int32_t>      types;
    for (int32_t i = 0; i < n_vocab; ++i) {
        texts.push_back(vocab[i].c_str());
        scores.push_back((float) -i);
        types.push_back(i == 0 ? 2 : i < 3 ? 3 : i == 3 ? 6 : 1); // unknown, control, byte, normal
    }
    f.set("tokenizer.ggml.model", tokenizer.c_str());
    if (tokenizer != "no_vocab") {
        gguf_set_arr_str(f.gguf.get(), "tokenizer.ggml.tokens", texts.data(), n_vocab);
        gguf_set_arr_data(f.gguf.get(), "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), n_vocab);
        gguf_set_arr_data(f.gguf.get(), "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), n_vocab);
        f.set("tokenizer.ggml.bos_token_id", (uint32_t) 1);
        f.set("tokenizer.ggml.eos_token_id", (uint32_t) 2);
    }
}

// a Llama of two layers; with a window an OLMo 2, whose first layer attends to so many tokens
inline file make_base(uint32_t            seed      = 1,
                      const std::string & tokenizer = "llama",
                      bool                tied      = false, // the embeddings are the output projection
                      ggml_type           output    = GGML_TYPE_F32,
                      uint32_t            window    = 0) {
    file              f(seed);
    const std::string arch = window ? "olmo2" : "llama";

    f.set("general.architecture", arch.c_str());
    f.set("general.name", "tiny base");
    f.set(arch + ".context_length", (uint32_t) 1024);
    f.set(arch + ".embedding_length", (uint32_t) n_embd);
    f.set(arch + ".block_count", (uint32_t) n_layer);
    f.set(arch + ".feed_forward_length", (uint32_t) n_ff);
    f.set(arch + ".attention.head_count", (uint32_t) n_head);
    f.set(arch + ".attention.head_count_kv", (uint32_t) n_head_kv);
    f.set(arch + ".attention.layer_norm_rms_epsilon", 1e-5f);
    f.set(arch + ".vocab_size", (uint32_t) n_vocab);
    if (window) {
        f.set(arch + ".attention.sliding_window", window);
        f.set(arch + ".attention.sliding_window_pattern", (uint32_t) n_layer);
    }

    set_vocabulary(f, tokenizer);

    const float s = 1.0f / std::sqrt((float) n_embd);

    f.add("token_embd.weight", tied ? output : GGML_TYPE_F32, n_embd, n_vocab, 1.0f);
    f.add("output_norm.weight", GGML_TYPE_F32, n_embd, 1, 0.1f, 1.0f);
    if (!tied) {
        f.add("output.weight", output, n_embd, n_vocab, 2.0f * s);
    }
    for (int32_t i = 0; i < n_layer; ++i) {
        const std::string b    = "blk." + std::to_string(i) + ".";
        const auto        norm = [&](const char * name, int32_t n) {
            f.add(b + name + ".weight", GGML_TYPE_F32, n, 1, 0.1f, 1.0f);
        };
        if (!window) {
            norm("attn_norm", n_embd);
        }
        f.add(b + "attn_q.weight", GGML_TYPE_F32, n_embd, n_embd, 1.5f * s);
        f.add(b + "attn_k.weight", GGML_TYPE_F32, n_embd, n_kv, 1.5f * s);
        f.add(b + "attn_v.weight", GGML_TYPE_F32, n_embd, n_kv, s);
        f.add(b + "attn_output.weight", GGML_TYPE_F32, n_embd, n_embd, s);
        if (!window) {
            norm("ffn_norm", n_embd);
        }
        f.add(b + "ffn_gate.weight", GGML_TYPE_F32, n_embd, n_ff, s);
        f.add(b + "ffn_up.weight", GGML_TYPE_F32, n_embd, n_ff, s);
        f.add(b + "ffn_down.weight", GGML_TYPE_F32, n_ff, n_embd, 0.7f * s);
        if (window) {
            norm("attn_q_norm", n_embd);
            norm("attn_k_norm", n_kv);
            norm("post_attention_norm", n_embd);
            norm("post_ffw_norm", n_embd);
        }
    }
    return f;
}

// an LFM2 of a short convolution and a layer of attention, whose memory is a state in part
inline file make_hybrid(uint32_t seed = 1) {
    file f(seed);

    f.set("general.architecture", "lfm2");
    f.set("general.name", "tiny hybrid");
    f.set("lfm2.context_length", (uint32_t) 1024);
    f.set("lfm2.embedding_length", (uint32_t) n_embd);
    f.set("lfm2.block_count", (uint32_t) 2);
    f.set("lfm2.feed_forward_length", (uint32_t) n_ff);
    f.set("lfm2.attention.head_count", (uint32_t) n_head);
    f.set("lfm2.attention.layer_norm_rms_epsilon", 1e-5f);
    f.set("lfm2.vocab_size", (uint32_t) n_vocab);
    f.set("lfm2.shortconv.l_cache", (uint32_t) 3);
    const int32_t of_layer[] = { 0, n_head_kv };
    gguf_set_arr_data(f.gguf.get(), "lfm2.attention.head_count_kv", GGUF_TYPE_INT32, of_layer, 2);
    set_vocabulary(f, "llama");

    const float s = 1.0f / std::sqrt((float) n_embd);

    const auto norm = [&](const std::string & name, int32_t n) {
        f.add(name + ".weight", GGML_TYPE_F32, n, 1, 0.1f, 1.0f);
    };
    f.add("token_embd.weight", GGML_TYPE_F32, n_embd, n_vocab, 1.0f);
    f.add("output.weight", GGML_TYPE_F32, n_embd, n_vocab, 2.0f * s);
    norm("token_embd_norm", n_embd);
    for (const char * b : { "blk.0.", "blk.1." }) {
        norm(std::string(b) + "attn_norm", n_embd);
        norm(std::string(b) + "ffn_norm", n_embd);
        f.add(std::string(b) + "ffn_gate.weight", GGML_TYPE_F32, n_embd, n_ff, s);
        f.add(std::string(b) + "ffn_up.weight", GGML_TYPE_F32, n_embd, n_ff, s);
        f.add(std::string(b) + "ffn_down.weight", GGML_TYPE_F32, n_ff, n_embd, 0.7f * s);
    }
    f.add("blk.0.shortconv.conv.weight", GGML_TYPE_F32, 3, n_embd, 0.5f);
    f.add("blk.0.shortconv.in_proj.weight", GGML_TYPE_F32, n_embd, 3 * n_embd, s);
    f.add("blk.0.shortconv.out_proj.weight", GGML_TYPE_F32, n_embd, n_embd, s);
    norm("blk.1.attn_q_norm", n_embd / n_head);
    norm("blk.1.attn_k_norm", n_embd / n_head);
    f.add("blk.1.attn_q.weight", GGML_TYPE_F32, n_embd, n_embd, 1.5f * s);
    f.add("blk.1.attn_k.weight", GGML_TYPE_F32, n_embd, n_kv, 1.5f * s);
    f.add("blk.1.attn_v.weight", GGML_TYPE_F32, n_embd, n_kv, s);
    f.add("blk.1.attn_output.weight", GGML_TYPE_F32, n_embd, n_embd, s);
    return f;
}

inline std::string write_base(const std::string & path, uint32_t seed = 1, const std::string & tokenizer = "llama") {
    return make_base(seed, tokenizer).write(path);
}

struct head_options {
    std::string arch     = "medusa";
    bool        grounded = false;
    bool        prefix   = false;

    int32_t   n_heads  = 3;
    int32_t   n_blocks = 1;
    int32_t   n_stored = 0;             // blocks in the file, 0: all
    bool      equal    = false;         // all blocks of a head are equal
    bool      bias     = false;         // of the output
    bool      shared   = false;         // no projections: the base model's
    bool      one      = false;         // one projection for all heads
    ggml_type type     = GGML_TYPE_F32; // of the matrices

    std::vector<int64_t> d2t;           // empty: the whole vocabulary

    std::set<std::string> skip;         // tensors to leave out

    std::function<void(file &)> change; // before the file is written
};

// docs/heads-gguf.md
inline file make_heads(const head_options & o, uint32_t seed = 2) {
    file f(seed);

    f.set("general.architecture", o.arch.c_str());
    f.set("entmtp.format_version", (uint32_t) 1);
    f.set("entmtp.base.name", "tiny base");
    f.set("entmtp.base.architecture", "llama");
    f.set("entmtp.tokenizer.fingerprint", fingerprint(vocabulary()).c_str());
    f.set(o.arch + ".embedding_length", (uint32_t) n_embd);
    f.set(o.arch + ".vocab_size", (uint32_t) n_vocab);
    f.set(o.arch + ".predict_heads", (uint32_t) o.n_heads);
    f.set(o.arch + ".block_count", (uint32_t) o.n_blocks);
    if (o.shared) {
        f.set(o.arch + ".shared_output", true);
    }
    if (o.arch == "hydra") {
        f.set("hydra.grounded", o.grounded);
        f.set("hydra.prefix_layer", o.prefix);
    }

    const auto add = [&](const std::string & name, ggml_type type, int64_t ne0, int64_t ne1, float scale,
                         float mean = 0.0f) {
        if (!o.skip.count(name)) {
            f.add(name, type, ne0, ne1, scale, mean);
        }
    };

    const int32_t n_draft  = o.d2t.empty() ? n_vocab : (int32_t) o.d2t.size();
    const int32_t n_stored = o.n_stored ? o.n_stored : o.n_blocks;
    const float   s        = 1.0f / std::sqrt((float) n_embd);

    for (int32_t i = 0; i < o.n_heads; ++i) {
        const std::string p = "head." + std::to_string(i) + ".";
        for (int32_t j = 0; j < n_stored; ++j) {
            const std::string b    = p + "blk." + std::to_string(j) + ".";
            const int32_t     n_in = o.grounded && j == 0 ? (i + 2) * n_embd : n_embd;
            if (o.equal && j > 0) {
                f.add(b + "weight", o.type, n_in, n_embd, std::vector<float>(f.values[p + "blk.0.weight"]));
                f.add(b + "bias", GGML_TYPE_F32, n_embd, 1, std::vector<float>(f.values[p + "blk.0.bias"]));
                continue;
            }
            add(b + "weight", o.type, n_in, n_embd, s);
            add(b + "bias", GGML_TYPE_F32, n_embd, 1, s);
            if (o.grounded && j == 0) {
                add(b + "res.weight", o.type, n_in, n_embd, s);
                add(b + "res.bias", GGML_TYPE_F32, n_embd, 1, s);
            }
        }
        if (!o.shared && !o.one) {
            add(p + "output.weight", o.type, n_embd, n_draft, 2.0f * s);
        }
        if (o.bias) {
            add(p + "output.bias", GGML_TYPE_F32, n_draft, 1, s);
        }
    }
    if (o.one) {
        add("output.weight", o.type, n_embd, n_draft, 2.0f * s);
    }
    if (!o.d2t.empty()) {
        f.add_raw("d2t", GGML_TYPE_I64, { n_draft }, o.d2t);
    }

    if (o.prefix) {
        f.set("hydra.attention.head_count", (uint32_t) n_head);
        f.set("hydra.attention.head_count_kv", (uint32_t) n_head_kv);
        f.set("hydra.attention.layer_norm_rms_epsilon", 1e-5f);
        f.set("hydra.rope.freq_base", 10000.0f);
        f.set("hydra.feed_forward_length", (uint32_t) n_ff);

        add("prefix.attn_norm.weight", GGML_TYPE_F32, n_embd, 1, 0.1f, 1.0f);
        add("prefix.attn_q.weight", o.type, n_embd, n_embd, s);
        add("prefix.attn_k.weight", o.type, n_embd, n_kv, s);
        add("prefix.attn_v.weight", o.type, n_embd, n_kv, s);
        add("prefix.attn_output.weight", o.type, n_embd, n_embd, s);
        add("prefix.ffn_norm.weight", GGML_TYPE_F32, n_embd, 1, 0.1f, 1.0f);
        add("prefix.ffn_gate.weight", o.type, n_embd, n_ff, s);
        add("prefix.ffn_up.weight", o.type, n_embd, n_ff, s);
        add("prefix.ffn_down.weight", o.type, n_ff, n_embd, s);
        add("prefix.output_norm.weight", GGML_TYPE_F32, n_embd, 1, 0.1f, 1.0f);
    }

    if (o.change) {
        o.change(f);
    }
    return f;
}

inline std::string write_heads(const std::string & path, const head_options & o = {}, uint32_t seed = 2) {
    return make_heads(o, seed).write(path);
}

// owners

struct model_deleter {
    void operator()(llama_model * p) { llama_model_free(p); }
};
struct context_deleter {
    void operator()(llama_context * p) { llama_free(p); }
};
struct sampler_deleter {
    void operator()(llama_sampler * p) { llama_sampler_free(p); }
};

using model_ptr   = std::unique_ptr<llama_model, model_deleter>;
using context_ptr = std::unique_ptr<llama_context, context_deleter>;
using sampler_ptr = std::unique_ptr<llama_sampler, sampler_deleter>;

// llama.cpp's messages would bury the test's own
inline void be_quiet() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
}

inline model_ptr load_base(const std::string & path) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;
    return model_ptr(llama_model_load_from_file(path.c_str(), params));
}

inline context_ptr new_context(llama_model * model, uint32_t n_ctx = 512, bool flash = false) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = n_ctx;
    params.n_batch              = 128;
    params.n_ubatch             = 128;
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    // f32 throughout: what is left between batch sizes is the order of sums.
    // the CPU's flash attention has a kernel for large batches that differs by 1e-2
    params.type_k               = GGML_TYPE_F32;
    params.type_v               = GGML_TYPE_F32;
    params.flash_attn_type      = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return context_ptr(llama_init_from_model(model, params));
}

} // namespace tiny
