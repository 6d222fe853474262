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

// a heads file, which is untrusted: its keys, each checked for its type, and the places of its tensors
struct heads_file {
    std::string      path;
    std::ifstream    stream;
    uint64_t         size = 0;
    gguf_context_ptr gguf;
    ggml_context_ptr meta; // tensors without data

    explicit heads_file(const char * path) : path(path), stream(path, std::ios::binary | std::ios::ate) {
        if (!stream) {
            heads_fail(std::string("cannot open ") + path);
        }
        size = (uint64_t) stream.tellg();

        ggml_context * ctx = nullptr;
        gguf.reset(gguf_init_from_file(path, { /*no_alloc*/ true, &ctx }));
        meta.reset(ctx);
        if (!gguf) {
            fail(" is not a GGUF file, or it is damaged");
        }
    }

    [[noreturn]] void fail(const std::string & what) const { heads_fail(path + what); }

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf.get(), key.c_str());
        if (id < 0) {
            fail(" has no key " + key + "; convert the checkpoint again with python -m entmtp.convert");
        }
        if (gguf_get_kv_type(gguf.get(), id) != type) {
            fail(": key " + key + " has type " + gguf_type_name(gguf_get_kv_type(gguf.get(), id)) + ", expected " +
                 gguf_type_name(type));
        }
        return id;
    }

    int32_t u32(const std::string & key, int32_t min, int32_t max) const {
        const uint32_t x = gguf_get_val_u32(gguf.get(), find(key, GGUF_TYPE_UINT32));
        if (x < (uint32_t) min || x > (uint32_t) max) {
            fail(": key " + key + " is " + std::to_string(x) + ", expected " + std::to_string(min) + " to " +
                 std::to_string(max));
        }
        return (int32_t) x;
    }

    bool flag(const std::string & key) const {
        const int64_t id = gguf_find_key(gguf.get(), key.c_str());
        return id >= 0 && gguf_get_val_bool(gguf.get(), find(key, GGUF_TYPE_BOOL));
    }

    float f32(const std::string & key) const { return gguf_get_val_f32(gguf.get(), find(key, GGUF_TYPE_FLOAT32)); }

    std::string str(const std::string & key) const { return gguf_get_val_str(gguf.get(), find(key, GGUF_TYPE_STRING)); }

    // null if there is none
    const ggml_tensor * tensor(const std::string & name) const {
        return gguf_find_tensor(gguf.get(), name.c_str()) < 0 ? nullptr : ggml_get_tensor(meta.get(), name.c_str());
    }

    uint64_t offset(const ggml_tensor * t) const {
        return gguf_get_data_offset(gguf.get()) +
               gguf_get_tensor_offset(gguf.get(), gguf_find_tensor(gguf.get(), ggml_get_name(t)));
    }

    bool holds(const ggml_tensor * t) const { return offset(t) <= size && ggml_nbytes(t) <= size - offset(t); }

    // all of the tensor's bytes
    void read(const ggml_tensor * t, void * data) {
        stream.seekg((std::streamoff) offset(t));
        stream.read((char *) data, (std::streamsize) ggml_nbytes(t));
        if (!stream) {
            fail(" is truncated: tensor " + std::string(ggml_get_name(t)) + " could not be read");
        }
    }
};

// One load. Everything is checked and given a tensor first, then memory is taken, then the data is read.
struct heads::loader {
    heads &             h;
    const llama_model * model;
    heads_file          file;
    std::string         arch;
    const bool          on_cpu;

    // a tensor of the file, and the one of ours that its data goes to
    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> to_read;

    std::vector<int32_t> d2t_ids;               // empty: all tokens

    const ggml_tensor * base_output  = nullptr; // the base model's projection, if it is shared
    ggml_tensor *       output       = nullptr; // what the heads multiply with, if it is one for all
    bool                copy_output  = false;   // it is a copy
    const ggml_tensor * embd_to_copy = nullptr; // the base model's, where the heads' device cannot read them

    loader(heads & h, const char * path, const llama_model * model) :
        h(h), model(model), file(path), on_cpu(ggml_backend_is_cpu(h.backend.get())) {}

    // what is laid down in docs/heads-gguf.md, for exactly this base model
    void check_keys() {
        arch = file.str("general.architecture");
        if (arch != "medusa" && arch != "hydra") {
            file.fail(" holds a model of architecture " + arch + ", not draft heads (medusa or hydra)");
        }
        h.is_hydra = arch == "hydra";

        if (file.u32("entmtp.format_version", 0, INT32_MAX) != 1) {
            file.fail(" was written by a newer version of entmtp; update entmtp or convert the checkpoint again");
        }

        std::string base = file.str("entmtp.base.name");
        if (base.empty()) {
            base = "another model";
        }
        const auto differs = [&](const char * what, const std::string & ours, const std::string & theirs) {
            file.fail(" was made for " + base + ": its " + what + " is " + ours + ", the loaded model's is " + theirs);
        };

        h.n_embd  = file.u32(arch + ".embedding_length", 1, 1 << 20);
        h.n_vocab = file.u32(arch + ".vocab_size", 2, 1 << 26);

        const int32_t n_vocab_model = llama_vocab_n_tokens(llama_model_get_vocab(model));
        if (h.n_embd != llama_model_n_embd(model)) {
            differs("embedding length", std::to_string(h.n_embd), std::to_string(llama_model_n_embd(model)));
        }
        if (llama_model_n_embd_out(model) != h.n_embd) {
            heads_fail("the hidden states of this model are not as wide as its embeddings; heads cannot use them");
        }
        if (h.n_vocab != n_vocab_model) {
            differs("vocabulary size", std::to_string(h.n_vocab), std::to_string(n_vocab_model));
        }

        char fingerprint[17];
        snprintf(fingerprint, sizeof(fingerprint), "%016" PRIx64, vocab_fingerprint(model));
        const std::string expected = file.str("entmtp.tokenizer.fingerprint");
        if (expected != fingerprint) {
            differs("tokenizer fingerprint", expected, fingerprint);
        }

        h.grounded = h.is_hydra && file.flag("hydra.grounded");
    }

    // room for the description of every tensor of the file, d2t, a copied projection and copied embeddings
    void make_contexts() {
        const size_t size = ((size_t) gguf_get_n_tensors(file.gguf.get()) + 3) * ggml_tensor_overhead();
        h.ctx_weights.reset(ggml_init({ size, nullptr, true }));
        h.ctx_packed.reset(ggml_init({ size, nullptr, true }));
    }

    // a tensor of ours for one of the file's, whose shape, type and place are checked; its data is read later
    ggml_tensor * get(const std::string & name, int64_t ne0, int64_t ne1, bool optional = false) {
        const ggml_tensor * meta = file.tensor(name);
        if (!meta) {
            if (optional) {
                return nullptr;
            }
            file.fail(" has no tensor " + name);
        }
        if (meta->ne[0] != ne0 || meta->ne[1] != ne1 || meta->ne[2] != 1 || meta->ne[3] != 1) {
            file.fail(": tensor " + name + " has shape [" + std::to_string(meta->ne[0]) + ", " +
                      std::to_string(meta->ne[1]) + "], expected [" + std::to_string(ne0) + ", " + std::to_string(ne1) +
                      "]");
        }
        const bool is_weight = ggml_is_quantized(meta->type) && meta->type != GGML_TYPE_Q8_1 &&
                               meta->type != GGML_TYPE_Q8_K; // those two are for activations
        if (ne1 == 1 ? meta->type != GGML_TYPE_F32
                     : !(is_weight || meta->type == GGML_TYPE_F32 || meta->type == GGML_TYPE_F16 ||
                         meta->type == GGML_TYPE_BF16)) {
            file.fail(": tensor " + name + " has type " + ggml_type_name(meta->type) + ", which is not expected there");
        }
        if (!file.holds(meta)) {
            file.fail(" is truncated: tensor " + name + " reaches beyond its end");
        }
        // matrices on the CPU: as the kernels want them
        const bool    packed = on_cpu && kernels_current() && ne1 > 1 && packed_type(meta->type) != W_COUNT;
        ggml_tensor * t      = ggml_new_tensor_2d((packed ? h.ctx_packed : h.ctx_weights).get(), meta->type, ne0, ne1);
        ggml_set_name(t, name.c_str());
        to_read.push_back({ meta, t });
        return t;
    }

    // the draft vocabulary
    void read_d2t() {
        h.n_draft = h.n_vocab;
        h.d2t     = nullptr;

        const ggml_tensor * meta = file.tensor("d2t");
        if (!meta) {
            return;
        }
        if (meta->type != GGML_TYPE_I64 || ggml_nelements(meta) != meta->ne[0] || meta->ne[0] < 1 ||
            meta->ne[0] > h.n_vocab || !file.holds(meta)) {
            file.fail(": d2t is not a list of at most " + std::to_string(h.n_vocab) + " 64-bit token ids");
        }
        h.n_draft = (int32_t) meta->ne[0];

        std::vector<int64_t> ids(h.n_draft);
        file.read(meta, ids.data());

        std::vector<bool> seen(h.n_vocab);
        for (const int64_t t : ids) {
            if (t < 0 || t >= h.n_vocab) {
                file.fail(": d2t names token " + std::to_string(t) + " of a vocabulary of " +
                          std::to_string(h.n_vocab));
            }
            if (seen[t]) {
                file.fail(": d2t names token " + std::to_string(t) + " twice");
            }
            seen[t] = true;
            d2t_ids.push_back((int32_t) t);
        }
        h.d2t = ggml_new_tensor_2d(h.ctx_weights.get(), GGML_TYPE_I32, 1, h.n_draft);
    }

    // the projection, where it is the base model's, or one for all heads
    void share_projection() {
        h.select = false;

        const bool for_all = file.tensor("output.weight") != nullptr;
        if (!file.flag(arch + ".shared_output")) {
            output = for_all ? get("output.weight", h.n_embd, h.n_draft) : nullptr;
            return;
        }
        if (for_all) {
            file.fail(" says that the base model's projection is shared, and has a tensor output.weight");
        }
        base_output    = base_projection(model, h.n_embd, h.n_vocab);
        const auto how = choose_sharing(base_output, h.backend.get(), d2t_ids);
        h.select       = how == sharing::select;
        copy_output    = how == sharing::rows || how == sharing::copy;
        output         = const_cast<ggml_tensor *>(base_output);
        if (copy_output) {
            ggml_context * ctx = (on_cpu && rows_are_packed(base_output) ? h.ctx_packed : h.ctx_weights).get();
            output             = ggml_new_tensor_2d(ctx, base_output->type, h.n_embd, h.n_draft);
        }
    }

    void get_heads(int32_t n_heads, int32_t n_blocks) {
        for (int32_t i = 0; i < n_heads; ++i) {
            const std::string p    = "head." + std::to_string(i) + ".";
            const int64_t     n_in = h.grounded ? (int64_t) (i + 2) * h.n_embd : h.n_embd;

            head layer;
            for (int32_t j = 0; j < n_blocks; ++j) {
                const std::string b = p + "blk." + std::to_string(j) + ".";
                const int64_t     n = j == 0 ? n_in : h.n_embd;

                res_block block;
                block.weight = get(b + "weight", n, h.n_embd, j > 0);
                if (!block.weight) {
                    // the same as the block before it
                    block = layer.blocks.back();
                    if (block.res_weight) {
                        file.fail(" has no tensor " + b + "weight");
                    }
                } else {
                    block.bias = get(b + "bias", h.n_embd, 1);
                    if (h.grounded && j == 0) {
                        block.res_weight = get(b + "res.weight", n, h.n_embd);
                        block.res_bias   = get(b + "res.bias", h.n_embd, 1);
                    }
                }
                layer.blocks.push_back(block);
            }
            if (output && file.tensor(p + "output.weight")) {
                file.fail(std::string(base_output ? " says that the base model's projection is shared"
                                                  : " has one projection for all heads, output.weight") +
                          ", and has a tensor " + p + "output.weight");
            }
            layer.output      = output ? output : get(p + "output.weight", h.n_embd, h.n_draft);
            layer.output_bias = get(p + "output.bias", h.n_draft, 1, true);
            h.layers.push_back(std::move(layer));
        }
    }

    void get_prefix_layer() {
        if (!h.is_hydra || !file.flag("hydra.prefix_layer")) {
            return;
        }
        h.prefix_impl = std::make_unique<prefix_layer>();

        prefix_layer & l = *h.prefix_impl;
        auto &         p = l.params;

        const int32_t n_embd = h.n_embd;

        p.n_embd           = n_embd;
        p.n_head           = file.u32("hydra.attention.head_count", 1, n_embd);
        p.n_head_kv        = file.u32("hydra.attention.head_count_kv", 1, n_embd);
        p.rms_eps          = file.f32("hydra.attention.layer_norm_rms_epsilon");
        p.rope_base        = file.f32("hydra.rope.freq_base");
        const int32_t n_ff = file.u32("hydra.feed_forward_length", 1, 1 << 24);
        if (n_embd % p.n_head || p.n_head % p.n_head_kv || (n_embd / p.n_head) % 2 || !(p.rms_eps > 0) ||
            !(p.rope_base > 1)) {
            file.fail(": the head counts, norm epsilon or rotary base of the prefix layer make no sense");
        }
        const int32_t n_kv = n_embd / p.n_head * p.n_head_kv;

        l.attn_norm   = get("prefix.attn_norm.weight", n_embd, 1);
        l.attn_q      = get("prefix.attn_q.weight", n_embd, n_embd);
        l.attn_k      = get("prefix.attn_k.weight", n_embd, n_kv);
        l.attn_v      = get("prefix.attn_v.weight", n_embd, n_kv);
        l.attn_output = get("prefix.attn_output.weight", n_embd, n_embd);
        l.ffn_norm    = get("prefix.ffn_norm.weight", n_embd, 1);
        l.ffn_gate    = get("prefix.ffn_gate.weight", n_embd, n_ff);
        l.ffn_up      = get("prefix.ffn_up.weight", n_embd, n_ff);
        l.ffn_down    = get("prefix.ffn_down.weight", n_ff, n_embd);
        l.output_norm = get("prefix.output_norm.weight", n_embd, 1);
    }

    // grounded heads look up the base model's embeddings where they are, if the heads' device can read them there
    void share_embeddings() {
        h.tok_embd = nullptr;
        if (!h.grounded) {
            return;
        }
        const ggml_tensor * embd = llama_model_get_tensor(model, "token_embd.weight");
        if (!embd || embd->ne[0] != h.n_embd || embd->ne[1] < h.n_vocab) {
            heads_fail("the base model has no token embeddings that grounded heads could use");
        }
        if (ggml_backend_supports_buft(h.backend.get(), ggml_backend_buffer_get_type(embd->buffer))) {
            h.tok_embd = const_cast<ggml_tensor *>(embd);
        } else {
            h.tok_embd   = ggml_new_tensor_2d(h.ctx_weights.get(), embd->type, h.n_embd, embd->ne[1]);
            embd_to_copy = embd;
        }
    }

    void allocate() {
        const auto has_tensors = [](const ggml_context_ptr & ctx) {
            return ggml_get_first_tensor(ctx.get()) != nullptr;
        };
        if (has_tensors(h.ctx_weights)) {
            h.buf_weights.reset(ggml_backend_alloc_ctx_tensors(h.ctx_weights.get(), h.backend.get()));
        }
        if (has_tensors(h.ctx_packed)) {
            h.buf_packed.reset(
                ggml_backend_alloc_ctx_tensors_from_buft(h.ctx_packed.get(), ggml_cpu_hook_buffer_type()));
        }
        if ((has_tensors(h.ctx_weights) && !h.buf_weights) || (has_tensors(h.ctx_packed) && !h.buf_packed)) {
            heads_fail("no memory for the weights of " + file.path + " on " + ggml_backend_name(h.backend.get()));
        }
        if (h.buf_weights) {
            ggml_backend_buffer_set_usage(h.buf_weights.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        }
    }

    void upload() {
        std::vector<uint8_t> data;
        for (const auto & [meta, t] : to_read) {
            data.resize(ggml_nbytes(t));
            file.read(meta, data.data());
            if (!ggml_validate_row_data(t->type, data.data(), data.size())) {
                file.fail(": tensor " + std::string(t->name) + " holds values that are not numbers");
            }
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
        if (h.d2t) {
            ggml_backend_tensor_set(h.d2t, d2t_ids.data(), 0, ggml_nbytes(h.d2t));
        }
        if (copy_output) {
            copy_rows(base_output, d2t_ids, output);
        }
        if (embd_to_copy) {
            ggml_backend_tensor_copy(const_cast<ggml_tensor *>(embd_to_copy), h.tok_embd);
        }
    }
};

void heads::load_weights(const char * path, const llama_model * model) {
    layers.clear();
    prefix_impl.reset();

    loader l(*this, path, model);
    l.check_keys();
    const int32_t n_heads  = l.file.u32(l.arch + ".predict_heads", 1, 64);
    const int32_t n_blocks = l.file.u32(l.arch + ".block_count", grounded ? 1 : 0, 64);

    l.make_contexts();
    l.read_d2t();
    l.share_projection();
    l.get_heads(n_heads, n_blocks);
    l.get_prefix_layer();
    l.share_embeddings();

    l.allocate();
    l.upload();
}

} // namespace entmtp
