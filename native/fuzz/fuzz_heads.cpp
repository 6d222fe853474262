// Heads files: whatever is in one, it loads and drafts, or is refused with a sentence.
//
// An input is three bytes and the beginning of a file, which is filled up with (as many bytes, of which value) they say:
// weights may be anything, and need no place in the corpus.

#include "entmtp.h"

#include "fuzz.h"
#include "gguf_file.h"
#include "tiny.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

static constexpr size_t n_control = 3;

namespace {

struct setting {
    tiny::folder      dir;
    tiny::model_ptr   base;
    tiny::context_ptr ctx;
    std::string       path = dir / "heads.gguf";

    setting() {
        tiny::be_quiet();
        MUST(entmtp_kernels_enable(nullptr) == ENTMTP_OK); // which pack the weights of heads, too
        base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
        MUST(base);
        ctx = tiny::new_context(base.get(), 256);
    }
};

} // namespace

static void use(const setting & s, entmtp_heads * heads) {
    entmtp_heads_info info = {};
    entmtp_heads_get_info(heads, &info);
    MUST(info.n_heads >= 1 && info.n_heads <= 64);
    MUST(info.n_blocks >= 0 && info.n_blocks <= 64);
    MUST(info.n_embd == tiny::n_embd && info.n_vocab == tiny::n_vocab);
    MUST(info.n_vocab_draft >= 1 && info.n_vocab_draft <= info.n_vocab);
    MUST(!info.grounded || info.hydra);

    const std::vector<float> h(tiny::n_embd, 0.25f);
    std::vector<float>       out(tiny::n_vocab);
    std::vector<int32_t>     path(info.n_heads, 5);
    for (const int32_t i : { 0, info.n_heads - 1 }) {
        MUST(entmtp_heads_logits(heads, i, h.data(), path.data(), out.data()) == ENTMTP_OK);

        const int32_t        k = std::min(3, info.n_vocab_draft);
        std::vector<int32_t> guesses(k);
        std::vector<float>   log_p(k);
        MUST(entmtp_heads_expand(heads, i, h.data(), path.data(), 1, k, guesses.data(), log_p.data()) == ENTMTP_OK);
        for (const int32_t token : guesses) {
            MUST(token >= 0 && token < tiny::n_vocab);
        }
    }
    const std::vector<float> states(3 * tiny::n_embd, 0.5f);
    MUST((entmtp_heads_prefix(heads, states.data(), 3, 0, out.data()) == ENTMTP_OK) == (info.prefix != 0));

    // a step with a tree
    entmtp_decoder * dec = entmtp_decoder_init(s.ctx.get(), heads);
    MUST(dec);
    const int32_t n_nodes[] = { 1, info.n_heads > 1 ? 5 : 3 };
    const int32_t parent[]  = { -1, -1, 0, 0, 1, 1 };
    const int32_t rank[]    = { 0, 0, 0, 1, 0, 45 };
    MUST(entmtp_decoder_set_trees(dec, 2, n_nodes, parent, rank) == ENTMTP_OK);
    entmtp_policy_params policy = {};
    policy.policy               = ENTMTP_POLICY_STATIC;
    policy.static_tree          = 1;
    MUST(entmtp_decoder_set_policy(dec, &policy) == ENTMTP_OK);
    const int32_t text[] = { 1, 17, 4, 33 };
    MUST(entmtp_decoder_eval(dec, text, 3, 0, false) == ENTMTP_OK);
    MUST(entmtp_decoder_eval(dec, text + 3, 1, 3, false) == ENTMTP_OK);
    MUST(entmtp_decoder_settle(dec) == ENTMTP_OK);
    entmtp_decoder_free(dec);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const setting s;
    if (size < n_control) {
        return 0;
    }
    {
        static const uint8_t    values[] = { 0x00, 0x3c, 0xff, 0x7f };
        const std::vector<char> rest((size_t) (data[0] + 256 * data[1]) * 32, (char) values[data[2] % 4]);
        std::ofstream           out(s.path, std::ios::binary);
        out.write((const char *) data + n_control, (std::streamsize) (size - n_control));
        out.write(rest.data(), (std::streamsize) rest.size());
    }
    if (entmtp_heads * heads = entmtp_heads_load(s.path.c_str(), s.base.get(), 1)) {
        use(s, heads);
        entmtp_heads_free(heads);
    } else {
        MUST(strlen(entmtp_last_error()) > 10);
    }
    return 0;
}

// a whole file: what libFuzzer begins with
static std::string seed_file(std::mt19937 & rng) {
    static const ggml_type types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

    tiny::head_options o;
    o.arch     = rng() % 2 ? "medusa" : "hydra";
    o.grounded = o.arch == "hydra" && rng() % 4;
    o.prefix   = o.arch == "hydra" && rng() % 2;
    o.n_heads  = 1 + (int32_t) (rng() % 3);
    o.n_blocks = o.grounded + (int32_t) (rng() % 3);
    o.n_stored = o.grounded ? 0 : std::min(o.n_blocks, 1);
    o.bias     = rng() % 2;
    o.shared   = rng() % 2;
    o.type     = types[rng() % 5];
    for (int32_t i = rng() % 2 ? 0 : 10; i > 0; --i) {
        o.d2t.push_back((i * 7) % tiny::n_vocab);
    }
    const tiny::file     whole = tiny::make_heads(o);
    std::vector<uint8_t> meta(gguf_get_meta_size(whole.gguf.get()));
    gguf_parts           file;
    gguf_get_meta_data(whole.gguf.get(), meta.data());
    MUST(file.read(meta.data(), meta.size()));
    const auto d2t = std::find_if(file.tensors.begin(), file.tensors.end(),
                                  [](const gguf_parts::tensor & t) { return t.name == "d2t"; });
    if (d2t != file.tensors.end()) { // the only values that matter: they come first
        std::rotate(file.tensors.begin(), d2t, d2t + 1);
        for (const int64_t id : o.d2t) {
            gguf_parts::put(file.data, id);
        }
    }
    file.lay_out();
    const char control[n_control] = { 0, 8, 0 }; // 64 KiB of zeros
    return std::string(control, n_control) + file.write();
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    std::mt19937 rng(seed);
    if (size <= n_control || rng() % 64 == 0) {
        const std::string seed_bytes = seed_file(rng);
        if (seed_bytes.size() <= max_size) {
            memcpy(data, seed_bytes.data(), seed_bytes.size());
            return seed_bytes.size();
        }
    }
    if (size <= n_control || rng() % 16 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    if (rng() % 16 == 0) { // another filling
        LLVMFuzzerMutate(data, n_control, n_control);
        return size;
    }
    return n_control + mutate_gguf(data + n_control, size - n_control, max_size - n_control, rng);
}
