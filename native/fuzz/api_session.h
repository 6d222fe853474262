// Decoders on one context with all that is known of them: what the fuzzer of the C interface calls, and what must hold.

#pragma once

#include "entmtp.h"
#include "entmtp_corpus.h"
#include "entmtp_draft.h"
#include "entmtp_group.h"
#include "entmtp_replay.h"

#include "fuzz.h"
#include "plain_text.h"
#include "tiny.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

using tokens = std::vector<int32_t>;

static constexpr int32_t n_batch = 128;

// a model, and what plain llama.cpp makes of texts
struct base_model {
    tiny::model_ptr             model;
    std::unique_ptr<plain_text> plain;

    explicit base_model(const std::string & path) : model(tiny::load_base(path)) {
        MUST(model);
        plain = std::make_unique<plain_text>(model.get());
    }
};

// of a base model: texts whole; a layer with a sliding window, whose cache has no room for what lies before it, or has;
// a state in part
enum memory_kind { WHOLE, FORGETS, FULL, HYBRID };

// models, heads files, and contexts
struct setting {
    tiny::folder                dir;
    std::unique_ptr<base_model> base, windowed, hybrid;
    tiny::model_ptr             small;

    // by sequences, n_ubatch and memory; making one takes long
    std::map<std::tuple<int32_t, int32_t, memory_kind>, tiny::context_ptr> contexts;

    setting() {
        tiny::be_quiet();
        MUST(entmtp_kernels_enable(nullptr) == ENTMTP_OK);
        base     = std::make_unique<base_model>(tiny::write_base(dir / "base.gguf", 1));
        windowed = std::make_unique<base_model>(
            tiny::make_base(3, "llama", false, GGML_TYPE_F32, 16).write(dir / "windowed.gguf"));
        hybrid = std::make_unique<base_model>(tiny::make_hybrid(5).write(dir / "hybrid.gguf"));
        small  = tiny::load_base(tiny::write_base(dir / "small.gguf", 7));
        MUST(small);

        tiny::head_options o;
        tiny::write_heads(dir / "1.gguf", o);
        o.d2t = { 3, 39, 20, 0, 17, 5, 8, 30, 12, 22 };
        tiny::write_heads(dir / "2.gguf", o);
        o          = {};
        o.arch     = "hydra";
        o.grounded = true;
        tiny::write_heads(dir / "3.gguf", o);
        o.prefix = true;
        tiny::write_heads(dir / "4.gguf", o);
    }
};

// a decoder, and what is known of it
struct member {
    entmtp_decoder * dec = nullptr;

    tokens  text;              // in the memory; -1: put there by others
    bool    live      = false; // the last token can be sampled after
    bool    cancelled = false; // the next evaluation is
    int32_t n_trees   = 1;
    int32_t n_ctx     = 0;

    bool known() const { return std::find(text.begin(), text.end(), -1) == text.end(); }
};

struct heads_deleter {
    void operator()(entmtp_heads * p) { entmtp_heads_free(p); }
};
struct group_deleter {
    void operator()(entmtp_group * p) { entmtp_group_free(p); }
};
struct corpus_deleter {
    void operator()(entmtp_corpus * p) { entmtp_corpus_free(p); }
};
struct draft_deleter {
    void operator()(entmtp_draft_model * p) { entmtp_draft_model_free(p); }
};

// decoders on one context
class session {
  public:
    session(setting & s, decisions & d) : s(s), d(d) {
        const int32_t first = d.byte(), kind = first % 10;
        memory = first < 180 ? WHOLE : first < 200 ? HYBRID : first < 240 ? FORGETS : FULL;
        n_seq  = kind > 7 && memory != HYBRID ? 2 : 1;
        window = memory == FORGETS || memory == FULL;
        base   = window ? s.windowed.get() : memory == HYBRID ? s.hybrid.get() : s.base.get();
        n_ctx  = window ? 440 : n_seq > 1 ? 128 : 256;

        const int32_t n_ubatch = d.rarely() ? 4 : n_batch;

        params           = llama_context_default_params();
        params.n_ctx     = n_seq * n_ctx;
        params.swa_full  = memory == FULL;
        params.n_rs_seq  = memory == HYBRID ? std::min(4, n_ubatch - 2) : 0;
        params.n_batch   = n_batch;
        params.n_ubatch  = n_ubatch;
        params.n_threads = params.n_threads_batch = 1;
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type        = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        params.n_seq_max              = n_seq;
        params.kv_unified             = true;
        auto & kept                   = s.contexts[{ n_seq, n_ubatch, memory }];
        if (!kept) {
            kept.reset(llama_init_from_model(base->model.get(), params));
        }
        ctx = kept.get();
        MUST(ctx);
        llama_memory_clear(llama_get_memory(ctx), true);
        llama_set_n_threads(ctx, 1, 1);

        const int32_t which = n_seq > 1 ? (kind - 8) * 3 : kind % 5;
        if (which > 0) {
            heads.reset(entmtp_heads_load((s.dir / (std::to_string(which) + ".gguf")).c_str(), base->model.get(), 1));
            MUST(heads);
        }
        members.resize(n_seq);
        begin();
    }

    ~session() { end(); }

  protected:
    void begin() {
        if (n_seq > 1) {
            group.reset(entmtp_group_init(ctx, heads.get(), n_seq, n_ctx));
            MUST(group);
            entmtp_group_set_stall(group.get(), 1.0);
        }
        for (int32_t i = 0; i < n_seq; ++i) {
            member & m = members[i];
            m          = {};
            m.n_ctx    = n_seq > 1 ? n_ctx : (int32_t) llama_n_ctx_seq(ctx);
            m.dec      = n_seq > 1 ? entmtp_group_decoder(group.get(), i) : entmtp_decoder_init(ctx, heads.get());
            MUST(m.dec);
        }
        // a cache of a window has 256 cells: from here on it comes round
        for (int32_t i = 0; window && i < 250; i += 125) {
            tokens long_text;
            for (int32_t k = 0; k < 125; ++k) {
                long_text.push_back((i + k * k) % tiny::n_vocab);
            }
            MUST(eval(members[0], long_text, i) == ENTMTP_OK);
        }
    }

    void end() {
        if (n_seq == 1) {
            entmtp_decoder_free(members[0].dec);
        }
        group.reset();
        draft.reset();
    }

    //
    // what must hold
    //

    void check(const member & m) const {
        MUST(entmtp_decoder_n_evaluated(m.dec) == (m.live ? (int32_t) m.text.size() : -1));
    }

    void check_row(const float * row, const tokens & text) {
        const auto & want = base->plain->logits(text);
        for (int32_t t = 0; t < tiny::n_vocab; ++t) {
            MUST(std::fabs(row[t] - want[t]) < 1e-3f);
        }
    }

    void check_logits(member & m) {
        const float * row = entmtp_decoder_logits(m.dec);
        MUST((row != nullptr) == m.live);
        if (row && m.known()) {
            check_row(row, m.text);
        }
        MUST((entmtp_decoder_hidden(m.dec) != nullptr) == (m.live && heads));
    }

    // the rows of the n tokens that were evaluated last: one of them, and the last, which is the text's
    void check_all(member & m, int32_t n) {
        entmtp_decoder_logits(m.dec); // in company the row is kept; these stay where they are
        const float * rows = entmtp_decoder_all_logits(m.dec);
        const int32_t i    = (int32_t) m.text.size() % n;
        check_row(rows + (ptrdiff_t) i * tiny::n_vocab, tokens(m.text.begin(), m.text.end() - (n - 1 - i)));
        check_row(rows + (ptrdiff_t) (n - 1) * tiny::n_vocab, m.text);
    }

    // of the plain model over the same text, as far as rounding lets it be told
    void check_greedy(member & m, int32_t token) {
        if (m.known()) {
            const auto & want = base->plain->logits(m.text);
            MUST(want[token] > *std::max_element(want.begin(), want.end()) - 1e-3f);
        }
    }

    // a prompt may go on there: always at the end, and where a memory of cells is cut back
    bool remembers(const member & m, int32_t n, int32_t past) const {
        if (n == 1 && m.live && past == (int32_t) m.text.size()) {
            return true;
        }
        const bool asked = entmtp_decoder_can_continue(m.dec, past);
        entmtp_decoder_settle(m.dec);
        MUST(!asked || entmtp_decoder_can_continue(m.dec, past));
        return entmtp_decoder_can_continue(m.dec, past);
    }

    int32_t eval(member & m, const tokens & t, int32_t past, bool all = false) {
        const auto n = (int32_t) t.size();
        const bool valid =
            n > 0 && std::all_of(t.begin(), t.end(), [](int32_t x) { return x >= 0 && x < tiny::n_vocab; });
        const bool placed =
            past >= 0 && past <= (int32_t) m.text.size() && n <= n_batch && (memory == WHOLE || remembers(m, n, past));

        const int32_t status = entmtp_decoder_eval(m.dec, t.data(), n, past, all);
        if (!valid) {
            MUST(status == ENTMTP_ERROR);
        } else if (m.cancelled) {
            MUST(status == ENTMTP_CANCELLED);
            m.cancelled = false;
        } else if (!placed) {
            MUST(status == ENTMTP_ERROR);
        } else if (status == ENTMTP_OK) {
            MUST(past + n <= m.n_ctx);
            m.text.resize(past);
            m.text.insert(m.text.end(), t.begin(), t.end());
            m.live = true;
        } else {
            // of a text that is known, only the room can be missing
            MUST(status == ENTMTP_CONTEXT_FULL ? past + n > m.n_ctx : status == ENTMTP_ERROR && !m.known());
            m.text.resize(past);
            m.live = false;
        }
        if (status != ENTMTP_OK) {
            MUST(strlen(entmtp_last_error()) > 3);
        }
        return status;
    }

    setting &   s;
    decisions & d;

    base_model *         base;
    memory_kind          memory;
    bool                 window;
    int32_t              n_seq = 1;
    int32_t              n_ctx; // that each may have
    llama_context_params params;
    llama_context *      ctx;

    std::unique_ptr<entmtp_heads, heads_deleter> heads;
    std::unique_ptr<entmtp_group, group_deleter> group;

    std::vector<std::unique_ptr<entmtp_corpus, corpus_deleter>> corpora; // which outlive the decoders
    std::unique_ptr<entmtp_draft_model, draft_deleter>          draft;

    std::vector<member>  members;
    std::vector<uint8_t> state;
    tokens               state_text;

    tiny::sampler_ptr greedy{ llama_sampler_init_greedy() }, drawing{ llama_sampler_init_dist(3) };
};
