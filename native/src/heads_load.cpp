// What a heads file must hold to serve a base model (docs/heads-gguf.md), and how its weights get to the device.

#include "heads.h"
#include "hook.h"
#include "pack.h"
#include "projection.h"

#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"

#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <stdexcept>

namespace entmtp {

void heads_fail(const std::string & what) {
    throw std::runtime_error("heads: " + what);
}

uint64_t vocab_fingerprint(const llama_model * model) {
    const llama_vocab * vocab = llama_model_get_vocab(model);
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        heads_fail("the base model has no tokenizer");
    }

    uint64_t hash = 14695981039346656037ull;

    for (int32_t i = 0; i < llama_vocab_n_tokens(vocab); ++i) {
        const char * text = llama_vocab_get_text(vocab, i);
        do {
            hash = (hash ^ (uint8_t) *text) * 1099511628211ull;
        } while (*text++);
    }

    return hash;
}

// reads the keys of a heads file, each checked for its type
struct key_reader {
    const gguf_context * gguf;
    std::string          path;
    std::string          arch;

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf, key.c_str());
        if (id < 0) {
            heads_fail(path + " has no key " + key + "; convert the checkpoint again with python -m entmtp.convert");
        }
        if (gguf_get_kv_type(gguf, id) != type) {
            heads_fail(path + ": key " + key + " has type " + gguf_type_name(gguf_get_kv_type(gguf, id)) +
                       ", expected " + gguf_type_name(type));
        }
        return id;
    }

    int32_t u32(const std::string & key, int32_t min, int32_t max) const {
        const uint32_t x = gguf_get_val_u32(gguf, find(key, GGUF_TYPE_UINT32));
        if (x < (uint32_t) min || x > (uint32_t) max) {
            heads_fail(path + ": key " + key + " is " + std::to_string(x) + ", expected " + std::to_string(min) +
                       " to " + std::to_string(max));
        }
        return (int32_t) x;
    }

    bool flag(const std::string & key) const {
        const int64_t id = gguf_find_key(gguf, key.c_str());
        return id >= 0 && gguf_get_val_bool(gguf, find(key, GGUF_TYPE_BOOL));
    }

    float       f32(const std::string & key) const { return gguf_get_val_f32(gguf, find(key, GGUF_TYPE_FLOAT32)); }
    std::string str(const std::string & key) const { return gguf_get_val_str(gguf, find(key, GGUF_TYPE_STRING)); }
};

void heads::load_weights(const char * path, const llama_model * model) {
    layers.clear();
    prefix_impl.reset();

    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) {
        heads_fail(std::string("cannot open ") + path);
    }
    const uint64_t file_size = (uint64_t) file.tellg();

    ggml_context *   ctx_raw = nullptr;
    gguf_context_ptr gguf(gguf_init_from_file(path, { /*no_alloc*/ true, &ctx_raw }));
    ggml_context_ptr ctx_meta(ctx_raw);
    if (!gguf) {
        heads_fail(std::string(path) + " is not a GGUF file, or it is damaged");
    }

    key_reader key{ gguf.get(), path, "" };

    key.arch = key.str("general.architecture");
    if (key.arch != "medusa" && key.arch != "hydra") {
        heads_fail(std::string(path) + " holds a model of architecture " + key.arch +
                   ", not draft heads (medusa or hydra)");
    }
    is_hydra = key.arch == "hydra";

    if (key.u32("entmtp.format_version", 0, INT32_MAX) != 1) {
        heads_fail(std::string(path) +
                   " was written by a newer version of entmtp; update entmtp or convert the checkpoint again");
    }

    // the base model
    std::string base = key.str("entmtp.base.name");
    if (base.empty()) {
        base = "another model";
    }

    const auto differs = [&](const char * what, const std::string & ours, const std::string & theirs) {
        heads_fail(std::string(path) + " was made for " + base + ": its " + what + " is " + ours +
                   ", the loaded model's is " + theirs);
    };

    n_embd  = key.u32(key.arch + ".embedding_length", 1, 1 << 20);
    n_vocab = key.u32(key.arch + ".vocab_size", 2, 1 << 26);

    const int32_t n_vocab_model = llama_vocab_n_tokens(llama_model_get_vocab(model));
    if (n_embd != llama_model_n_embd(model)) {
        differs("embedding length", std::to_string(n_embd), std::to_string(llama_model_n_embd(model)));
    }
    if (llama_model_n_embd_out(model) != n_embd) {
        heads_fail("the hidden states of this model are not as wide as its embeddings; heads cannot use them");
    }
    if (n_vocab != n_vocab_model) {
        differs("vocabulary size", std::to_string(n_vocab), std::to_string(n_vocab_model));
    }

    char fingerprint[17];
    snprintf(fingerprint, sizeof(fingerprint), "%016" PRIx64, vocab_fingerprint(model));
    const std::string expected = key.str("entmtp.tokenizer.fingerprint");
    if (expected != fingerprint) {
        differs("tokenizer fingerprint", expected, fingerprint);
    }

    grounded = is_hydra && key.flag("hydra.grounded");

    const int32_t n_heads  = key.u32(key.arch + ".predict_heads", 1, 64);
    const int32_t n_blocks = key.u32(key.arch + ".block_count", grounded ? 1 : 0, 64);

    // weights: shapes are checked here, data is read below
    std::vector<std::pair<ggml_tensor *, size_t>> to_read; // tensor, offset in the file

    const size_t n_tensors = (size_t) gguf_get_n_tensors(gguf.get());
    ctx_weights.reset(ggml_init({ (n_tensors + 3) * ggml_tensor_overhead(), nullptr, true }));
    ctx_packed.reset(ggml_init({ (n_tensors + 3) * ggml_tensor_overhead(), nullptr, true }));
    const bool on_cpu = ggml_backend_is_cpu(backend.get());

    const auto get = [&](const std::string & name, int64_t ne0, int64_t ne1, bool optional = false) -> ggml_tensor * {
        const int64_t id = gguf_find_tensor(gguf.get(), name.c_str());
        if (id < 0) {
            if (optional) {
                return nullptr;
            }
            heads_fail(std::string(path) + " has no tensor " + name);
        }
        const ggml_tensor * meta = ggml_get_tensor(ctx_meta.get(), name.c_str());
        if (meta->ne[0] != ne0 || meta->ne[1] != ne1 || meta->ne[2] != 1 || meta->ne[3] != 1) {
            heads_fail(std::string(path) + ": tensor " + name + " has shape [" + std::to_string(meta->ne[0]) + ", " +
                       std::to_string(meta->ne[1]) + "], expected [" + std::to_string(ne0) + ", " +
                       std::to_string(ne1) + "]");
        }
        const bool is_weight = ggml_is_quantized(meta->type) && meta->type != GGML_TYPE_Q8_1 &&
                               meta->type != GGML_TYPE_Q8_K; // those two are for activations
        if (ne1 == 1 ? meta->type != GGML_TYPE_F32
                     : !(is_weight || meta->type == GGML_TYPE_F32 || meta->type == GGML_TYPE_F16 ||
                         meta->type == GGML_TYPE_BF16)) {
            heads_fail(std::string(path) + ": tensor " + name + " has type " + ggml_type_name(meta->type) +
                       ", which is not expected there");
        }
        const size_t offset = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), id);
        if (offset > file_size || ggml_nbytes(meta) > file_size - offset) {
            heads_fail(std::string(path) + " is truncated: tensor " + name + " reaches beyond its end");
        }
        // matrices on the CPU: as the kernels want them
        const bool    packed = on_cpu && kernels_current() && ne1 > 1 && packed_type(meta->type) != W_COUNT;
        ggml_tensor * t      = ggml_new_tensor_2d(packed ? ctx_packed.get() : ctx_weights.get(), meta->type, ne0, ne1);
        ggml_set_name(t, name.c_str());
        to_read.push_back({ t, offset });
        return t;
    };

    // the draft vocabulary
    std::vector<int32_t> d2t_data;
    n_draft = n_vocab;
    d2t     = nullptr;
    if (const int64_t id = gguf_find_tensor(gguf.get(), "d2t"); id >= 0) {
        const ggml_tensor * meta   = ggml_get_tensor(ctx_meta.get(), "d2t");
        const size_t        offset = gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), id);
        if (meta->type != GGML_TYPE_I64 || ggml_nelements(meta) != meta->ne[0] || meta->ne[0] < 1 ||
            meta->ne[0] > n_vocab || offset > file_size || ggml_nbytes(meta) > file_size - offset) {
            heads_fail(std::string(path) + ": d2t is not a list of at most " + std::to_string(n_vocab) +
                       " 64-bit token ids");
        }
        n_draft = (int32_t) meta->ne[0];

        std::vector<int64_t> ids(n_draft);
        file.seekg((std::streamoff) offset);
        file.read((char *) ids.data(), (std::streamsize) ggml_nbytes(meta));
        if (!file) {
            heads_fail(std::string(path) + " is truncated: tensor d2t could not be read");
        }
        std::vector<bool> seen(n_vocab);
        for (const int64_t t : ids) {
            if (t < 0 || t >= n_vocab) {
                heads_fail(std::string(path) + ": d2t names token " + std::to_string(t) + " of a vocabulary of " +
                           std::to_string(n_vocab));
            }
            if (seen[t]) {
                heads_fail(std::string(path) + ": d2t names token " + std::to_string(t) + " twice");
            }
            seen[t] = true;
            d2t_data.push_back((int32_t) t);
        }
        d2t = ggml_new_tensor_2d(ctx_weights.get(), GGML_TYPE_I32, 1, n_draft);
    }

    // the projection, where it is the base model's
    const ggml_tensor * base_output = nullptr;
    ggml_tensor *       output      = nullptr;
    bool                copy_output = false;
    select                          = false;
    if (key.flag(key.arch + ".shared_output")) {
        base_output    = base_projection(model, n_embd, n_vocab);
        const auto how = choose_sharing(base_output, backend.get(), d2t_data);
        select         = how == sharing::select;
        copy_output    = how == sharing::rows || how == sharing::copy;
        output         = const_cast<ggml_tensor *>(base_output);
        if (copy_output) {
            ggml_context * ctx = on_cpu && rows_are_packed(base_output) ? ctx_packed.get() : ctx_weights.get();
            output             = ggml_new_tensor_2d(ctx, base_output->type, n_embd, n_draft);
        }
    }

    for (int32_t i = 0; i < n_heads; ++i) {
        const std::string p    = "head." + std::to_string(i) + ".";
        const int64_t     n_in = grounded ? (int64_t) (i + 2) * n_embd : n_embd;

        head layer;
        for (int32_t j = 0; j < n_blocks; ++j) {
            const std::string b = p + "blk." + std::to_string(j) + ".";
            const int64_t     n = j == 0 ? n_in : n_embd;

            res_block block;
            block.weight = get(b + "weight", n, n_embd, j > 0);
            if (!block.weight) {
                // the same as the block before it
                block = layer.blocks.back();
                if (block.res_weight) {
                    heads_fail(std::string(path) + " has no tensor " + b + "weight");
                }
            } else {
                block.bias = get(b + "bias", n_embd, 1);
                if (grounded && j == 0) {
                    block.res_weight = get(b + "res.weight", n, n_embd);
                    block.res_bias   = get(b + "res.bias", n_embd, 1);
                }
            }
            layer.blocks.push_back(block);
        }
        if (output && gguf_find_tensor(gguf.get(), (p + "output.weight").c_str()) >= 0) {
            heads_fail(std::string(path) + " says that the base model's projection is shared, and has a tensor " + p +
                       "output.weight");
        }
        layer.output      = output ? output : get(p + "output.weight", n_embd, n_draft);
        layer.output_bias = get(p + "output.bias", n_draft, 1, true);
        layers.push_back(std::move(layer));
    }

    if (is_hydra && key.flag("hydra.prefix_layer")) {
        prefix_impl = std::make_unique<prefix_layer>();

        auto & p           = prefix_impl->params;
        p.n_embd           = n_embd;
        p.n_head           = key.u32("hydra.attention.head_count", 1, n_embd);
        p.n_head_kv        = key.u32("hydra.attention.head_count_kv", 1, n_embd);
        p.rms_eps          = key.f32("hydra.attention.layer_norm_rms_epsilon");
        p.rope_base        = key.f32("hydra.rope.freq_base");
        const int32_t n_ff = key.u32("hydra.feed_forward_length", 1, 1 << 24);
        if (n_embd % p.n_head || p.n_head % p.n_head_kv || (n_embd / p.n_head) % 2 || !(p.rms_eps > 0) ||
            !(p.rope_base > 1)) {
            heads_fail(std::string(path) +
                       ": the head counts, norm epsilon or rotary base of the prefix layer make no sense");
        }
        const int32_t n_kv = n_embd / p.n_head * p.n_head_kv;

        prefix_impl->attn_norm   = get("prefix.attn_norm.weight", n_embd, 1);
        prefix_impl->attn_q      = get("prefix.attn_q.weight", n_embd, n_embd);
        prefix_impl->attn_k      = get("prefix.attn_k.weight", n_embd, n_kv);
        prefix_impl->attn_v      = get("prefix.attn_v.weight", n_embd, n_kv);
        prefix_impl->attn_output = get("prefix.attn_output.weight", n_embd, n_embd);
        prefix_impl->ffn_norm    = get("prefix.ffn_norm.weight", n_embd, 1);
        prefix_impl->ffn_gate    = get("prefix.ffn_gate.weight", n_embd, n_ff);
        prefix_impl->ffn_up      = get("prefix.ffn_up.weight", n_embd, n_ff);
        prefix_impl->ffn_down    = get("prefix.ffn_down.weight", n_ff, n_embd);
        prefix_impl->output_norm = get("prefix.output_norm.weight", n_embd, 1);
    }

    // grounded heads look up the base model's embeddings where they are, if the heads' device can read them there
    const ggml_tensor * base_embd = nullptr;
    tok_embd                      = nullptr;
    if (grounded) {
        base_embd = llama_model_get_tensor(model, "token_embd.weight");
        if (!base_embd || base_embd->ne[0] != n_embd || base_embd->ne[1] < n_vocab) {
            heads_fail("the base model has no token embeddings that grounded heads could use");
        }
        if (ggml_backend_supports_buft(backend.get(), ggml_backend_buffer_get_type(base_embd->buffer))) {
            tok_embd  = const_cast<ggml_tensor *>(base_embd);
            base_embd = nullptr;
        } else {
            tok_embd = ggml_new_tensor_2d(ctx_weights.get(), base_embd->type, n_embd, base_embd->ne[1]);
        }
    }

    const auto has_tensors = [](const ggml_context_ptr & ctx) {
        return ggml_get_first_tensor(ctx.get()) != nullptr;
    };
    if (has_tensors(ctx_weights)) {
        buf_weights.reset(ggml_backend_alloc_ctx_tensors(ctx_weights.get(), backend.get()));
    }
    if (has_tensors(ctx_packed)) {
        buf_packed.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_packed.get(), ggml_cpu_hook_buffer_type()));
    }
    if ((has_tensors(ctx_weights) && !buf_weights) || (has_tensors(ctx_packed) && !buf_packed)) {
        heads_fail(std::string("no memory for the weights of ") + path + " on " + ggml_backend_name(backend.get()));
    }
    if (buf_weights) {
        ggml_backend_buffer_set_usage(buf_weights.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }

    std::vector<uint8_t> data;
    for (const auto & [t, offset] : to_read) {
        data.resize(ggml_nbytes(t));
        file.seekg((std::streamoff) offset);
        file.read((char *) data.data(), (std::streamsize) data.size());
        if (!file) {
            heads_fail(std::string(path) + " is truncated: tensor " + t->name + " could not be read");
        }
        if (!ggml_validate_row_data(t->type, data.data(), data.size())) {
            heads_fail(std::string(path) + ": tensor " + t->name + " holds values that are not numbers");
        }
        ggml_backend_tensor_set(t, data.data(), 0, data.size());
    }
    if (d2t) {
        ggml_backend_tensor_set(d2t, d2t_data.data(), 0, ggml_nbytes(d2t));
    }
    if (copy_output) {
        copy_rows(base_output, d2t_data, output);
    }
    if (base_embd) {
        ggml_backend_tensor_copy(const_cast<ggml_tensor *>(base_embd), tok_embd);
    }
}

} // namespace entmtp
