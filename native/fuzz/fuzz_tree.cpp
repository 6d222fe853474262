// Token trees in the cache of llama.cpp, committed, refused and cut back in any order, against a simple model: a list of
// cells for each sequence. After every commit the cache must hold what plain decoding of the same text has there.
//
// llama.cpp itself is not instrumented: what a sequence of calls came to is told to libFuzzer by counters of our own.

#include "llama-ext.h"

#include "entmtp.h"
#include "fuzz.h"
#include "plain_text.h"
#include "tiny.h"

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

using tokens = std::vector<int32_t>;

static constexpr int32_t n_seq = 2, n_ctx = 256;

#if defined(__clang__) && defined(__linux__)
__attribute__((section("__libfuzzer_extra_counters")))
#endif
static uint8_t reached[1 << 12];

// something that is worth a place in the corpus when it is seen first
static void reach(uint32_t what, uint32_t a, uint32_t b = 0) {
    reached[(what * 977 + std::min(a, 31u) * 61 + std::min(b, 31u)) % sizeof(reached)] = 1;
}

namespace {

struct setting {
    tiny::folder                dir;
    tiny::model_ptr             base;
    std::unique_ptr<plain_text> plain[2];                        // without and with flash attention

    std::map<std::pair<bool, bool>, tiny::context_ptr> contexts; // unified, flash attention; making one takes long

    setting() {
        tiny::be_quiet();
        MUST(entmtp_kernels_enable(nullptr) == ENTMTP_OK);
        base = tiny::load_base(tiny::write_base(dir / "base.gguf"));
        MUST(base);
        for (int32_t flash = 0; flash < 2; ++flash) {
            plain[flash] = std::make_unique<plain_text>(base.get(), flash > 0);
        }
    }
};

// the tree of a sequence that is in the memory and not committed yet
struct open_tree {
    tokens token, parent, at; // [n]; at: index in the batch

    // from the root to a node
    tokens path(int32_t node) const {
        tokens res;
        for (; node >= 0; node = parent[node]) {
            res.insert(res.begin(), node);
        }
        return res;
    }
};

class session {
  public:
    session(setting & s, decisions & d) : d(d) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = n_ctx;
        params.n_batch = params.n_ubatch = 64;
        params.n_threads = params.n_threads_batch = 1;
        params.n_seq_max                          = n_seq;
        params.kv_unified                         = d.flag();
        params.type_k = params.type_v = GGML_TYPE_F32;
        const bool flash              = d.flag();
        params.flash_attn_type        = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        unified                       = params.kv_unified;
        plain_logits                  = s.plain[flash].get();
        auto & kept                   = s.contexts[{ unified, flash }];
        if (!kept) {
            kept.reset(llama_init_from_model(s.base.get(), params));
        }
        ctx = kept.get();
        MUST(ctx);
        mem   = llama_get_memory(ctx);
        batch = llama_batch_ext_init(ctx);
        MUST(mem && batch);
        llama_memory_clear(mem, true);
    }

    ~session() { llama_batch_ext_free(batch); }

    void run() {
        while (!d.over()) {
            const int32_t what = d.byte() % 16, seq = d.between(0, n_seq - 1);
            switch (what) {
                case 0:
                case 1:
                    plain(seq);
                    break;
                case 2:
                case 3:
                case 4:
                case 5:
                    grow({ seq });
                    break;
                case 6:
                    grow({ 0, 1 });
                    break;
                case 7:
                    grow({ 1, 0 });
                    break;
                case 8:
                    refused(seq);
                    break;
                case 9:
                case 10:
                case 11:
                    commit(seq);
                    break;
                case 12:
                    cut(seq);
                    break;
                case 13:
                    copy(seq);
                    break;
                case 14:
                    state(seq);
                    break;
                default:
                    llama_memory_clear(mem, d.flag());
                    for (int32_t i = 0; i < n_seq; ++i) {
                        text[i].clear();
                        open[i] = {};
                    }
                    forget();
            }
            check();
        }
        for (int32_t seq = 0; seq < n_seq; ++seq) {
            finish(seq);
        }
        check();
    }

  private:
    //
    // what must hold
    //

    void check() const {
        for (int32_t seq = 0; seq < n_seq; ++seq) {
            int32_t deepest = -1;
            for (size_t i = 0; i < open[seq].parent.size(); ++i) {
                deepest = std::max(deepest, (int32_t) open[seq].path((int32_t) i).size() - 1);
            }
            const int32_t n = (int32_t) text[seq].size() + deepest + 1;
            MUST(llama_memory_seq_pos_max(mem, seq) == n - 1);
            MUST(llama_memory_seq_pos_min(mem, seq) == (n > 0 ? 0 : -1));
        }
    }

    void same(const float * row, const tokens & whole) const {
        MUST(row);
        const auto & want = plain_logits->logits(whole);
        // our kernels: a token's bits do not depend on its pass, nor on where its cells lie
        for (int32_t t = 0; t < tiny::n_vocab; ++t) {
            MUST(row[t] == want[t]);
        }
    }

    size_t n_cells() const {
        size_t n = 0;
        for (int32_t seq = 0; seq < n_seq; ++seq) {
            n += text[seq].size() + open[seq].token.size();
        }
        return n;
    }

    //
    // calls
    //

    void forget() {
        for (open_tree & t : last) {
            t = {};
        }
    }

    // no tree may be left over when something else is decoded
    void finish(int32_t seq) {
        if (!open[seq].token.empty()) {
            open[seq] = {};
            MUST(llama_memory_seq_rm(mem, seq, (int32_t) text[seq].size(), -1));
        }
    }

    void add(int32_t i, int32_t seq, int32_t token, int32_t pos) {
        MUST(llama_batch_ext_add_token(batch, seq, token) == i);
        MUST(llama_batch_ext_set_pos(batch, i, &pos));
        MUST(llama_batch_ext_set_output_logits(batch, i, true));
    }

    int32_t process() { return llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch); }

    void plain(int32_t seq) {
        finish(seq);
        finish(1 - seq); // a commit is of the last batch
        const int32_t n = d.between(1, 12);
        llama_batch_ext_clear(batch);
        tokens more;
        for (int32_t i = 0; i < n; ++i) {
            more.push_back(d.between(0, tiny::n_vocab - 1));
            add(i, seq, more.back(), (int32_t) text[seq].size() + i);
        }
        const int32_t status = process();
        reach(1, n, status);
        const size_t room = unified ? n_ctx - n_cells() : llama_n_ctx_seq(ctx) - text[seq].size();
        MUST(status == ((size_t) n <= room ? 0 : 1));
        if (status == 0) {
            forget();
            text[seq].insert(text[seq].end(), more.begin(), more.end());
            same(llama_get_logits_ith(ctx, n - 1), text[seq]);
        }
    }

    // level by level, each node below one of the level before; with several roots it is a forest
    open_tree draw() {
        open_tree     t;
        const int32_t n      = d.between(1, 14);
        const int32_t forest = d.rarely();
        for (int32_t i = 0; i < n; ++i) {
            const int32_t low = i == 0 ? -1 : t.parent.back();
            int32_t       p   = i == 0 ? -1 : d.between(std::max(low, forest ? -1 : 0), i - 1);
            t.token.push_back(d.between(0, tiny::n_vocab - 1));
            t.parent.push_back(p);
        }
        return t;
    }

    void grow(const std::vector<int32_t> & seqs) {
        for (int32_t seq = 0; seq < n_seq; ++seq) {
            finish(seq);
        }
        std::vector<open_tree> trees;
        size_t                 n = 0;
        for (size_t i = 0; i < seqs.size(); ++i) {
            trees.push_back(draw());
            n += trees.back().token.size();
        }
        llama_batch_ext_clear(batch);
        bool    is_tree = false;
        int32_t at      = 0;
        for (size_t k = 0; k < seqs.size(); ++k) {
            open_tree & t = trees[k];
            for (size_t i = 0; i < t.token.size(); ++i, ++at) {
                add(at, seqs[k], t.token[i], (int32_t) (text[seqs[k]].size() + t.path((int32_t) i).size()) - 1);
                t.at.push_back(at);
                if (t.parent[i] >= 0) {
                    is_tree = true;
                    MUST(llama_batch_ext_set_parent(batch, at, t.at[t.parent[i]]));
                }
            }
        }
        // roots alone are no tree, and two of one sequence at one place are no text
        const bool forest = std::any_of(trees.begin(), trees.end(), [](const open_tree & t) {
            return std::count(t.parent.begin(), t.parent.end(), -1) > 1;
        });
        if (!is_tree && forest) {
            return;
        }
        const int32_t status = process();
        reach(2, (uint32_t) n, (uint32_t) (status + 1) * 4 + (uint32_t) seqs.size());
        if (is_tree && seqs.size() > 1 && !unified) {
            MUST(status == -1); // caches of their own take equal parts of a batch
            return;
        }
        const size_t room = unified ? n_ctx - n_cells() : llama_n_ctx_seq(ctx) - text[seqs[0]].size();
        if (status != 0) {
            MUST(status == 1 && (n > room || seqs.size() > 1));
            return;
        }
        forget();
        for (size_t k = 0; k < seqs.size(); ++k) {
            const open_tree & t = trees[k];
            for (const int32_t node : { (int32_t) t.token.size() - 1, d.between(0, (int32_t) t.token.size() - 1) }) {
                tokens whole = text[seqs[k]];
                for (const int32_t i : t.path(node)) {
                    whole.push_back(t.token[i]);
                }
                same(llama_get_logits_ith(ctx, t.at[node]), whole);
            }
            open[seqs[k]] = t;
            if (is_tree) {
                last[seqs[k]] = t;
            }
        }
    }

    // batches and calls that are no trees: nothing of them may stay
    void refused(int32_t seq) {
        finish(0);
        finish(1);
        llama_batch_ext_clear(batch);
        const auto pos = (int32_t) text[seq].size();
        add(0, seq, 5, pos);
        add(1, seq, 6, pos + 1);
        const int32_t parent = d.between(0, 4) - 2;
        MUST(llama_batch_ext_set_parent(batch, 1, parent) == (parent == 0));
        MUST(!llama_batch_ext_set_parent(batch, d.flag() ? 2 : -1, 0));
        const int32_t wrong = d.between(0, 2);
        if (wrong == 0) {
            add(2, seq, 7, pos + 3);     // not after its parent
        } else if (wrong == 1) {
            add(2, 1 - seq, 7, pos + 1); // of another sequence than its parent
        } else {
            add(2, seq, 7, pos);         // before it
        }
        MUST(llama_batch_ext_set_parent(batch, 2, 0));
        MUST(process() == -1);
        reach(3, (uint32_t) wrong, (uint32_t) (parent + 2));
    }

    void commit(int32_t seq) {
        const open_tree & t = last[seq];
        const int32_t     n = (int32_t) t.token.size();

        tokens path = n > 0 ? t.path(d.between(0, n - 1)) : tokens();
        if (d.rarely()) {
            path.clear(); // the whole tree goes
        }
        tokens idx;
        for (const int32_t i : path) {
            idx.push_back(t.at[i]);
        }
        if (d.rarely() && !idx.empty()) { // a path that is none
            const size_t i = d.byte() % idx.size();
            switch (d.between(0, 3)) {
                case 0:
                    idx[i] = d.byte() - 100;
                    break;
                case 1:
                    idx.push_back(idx[i]);
                    break;
                case 2:
                    idx.erase(idx.begin() + (ptrdiff_t) i);
                    break;
                default:
                    std::swap(idx[0], idx[i]);
            }
        }
        // which nodes it names
        bool   is_path = true;
        tokens named;
        for (size_t k = 0; k < idx.size() && is_path; ++k) {
            const auto at = std::find(t.at.begin(), t.at.end(), idx[k]);
            is_path       = at != t.at.end() && t.parent[at - t.at.begin()] == (k > 0 ? named.back() : -1);
            named.push_back((int32_t) (at - t.at.begin()));
        }
        const bool done = llama_memory_tree_commit(mem, seq, idx.data(), (int32_t) idx.size());
        reach(4, (uint32_t) idx.size(), (uint32_t) (2 * done + is_path));
        MUST(done == (n > 0 && is_path));
        if (done) {
            for (size_t k = 0; k < named.size() && !open[seq].token.empty(); ++k) {
                text[seq].push_back(t.token[named[k]]);
            }
            open[seq] = last[seq] = {};
            MUST(!llama_memory_tree_commit(mem, seq, idx.data(), (int32_t) idx.size())); // once
        }
    }

    // positions from p0 on go, as when a text is cut back
    void cut(int32_t seq) {
        const auto    size = (int32_t) text[seq].size();
        const int32_t p0   = d.between(0, size);
        MUST(llama_memory_seq_rm(mem, seq, p0, -1));
        reach(5, (uint32_t) (size - p0), open[seq].token.empty());
        text[seq].resize(p0);
        open[seq] = {}; // a commit then changes nothing
    }

    // another sequence goes on from the same text
    void copy(int32_t seq) {
        finish(seq);
        finish(1 - seq);
        if (!unified && text[seq].empty()) {
            return;
        }
        MUST(llama_memory_seq_rm(mem, 1 - seq, -1, -1));
        text[1 - seq].clear();
        if (unified) { // caches of their own copy when something is decoded
            const int32_t n = d.between(0, (int32_t) text[seq].size());
            llama_memory_seq_cp(mem, seq, 1 - seq, 0, n);
            text[1 - seq].assign(text[seq].begin(), text[seq].begin() + n);
            reach(6, (uint32_t) n);
            // shared cells are counted twice by n_cells(): leave the second text so that the room is known
            MUST(llama_memory_seq_rm(mem, d.flag() ? seq : 1 - seq, 0, -1));
            tokens & gone = llama_memory_seq_pos_max(mem, seq) < 0 ? text[seq] : text[1 - seq];
            gone.clear();
        }
    }

    // saved and loaded: the same text
    void state(int32_t seq) {
        finish(seq);
        std::vector<uint8_t> data(llama_state_seq_get_size(ctx, seq));
        MUST(llama_state_seq_get_data(ctx, data.data(), data.size(), seq) == data.size());
        finish(1 - seq);
        MUST(llama_state_seq_set_data(ctx, data.data(), data.size(), seq) > 0);
        reach(7, (uint32_t) text[seq].size());
        forget();
    }

    decisions & d;

    llama_context *   ctx          = nullptr;
    llama_memory_t    mem          = nullptr;
    llama_batch_ext * batch        = nullptr;
    plain_text *      plain_logits = nullptr;
    bool              unified;

    tokens    text[n_seq];
    open_tree open[n_seq]; // in the memory, beyond the text
    open_tree last[n_seq]; // of the last batch, if it held trees: what can be committed
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static setting s;
    decisions      d(data, size);
    session(s, d).run();
    return 0;
}
