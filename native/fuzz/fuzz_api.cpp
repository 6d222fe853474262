// The C interface with calls in any order, against a model of what must hold: which text is evaluated, which status a call
// has, and that the logits are those of plain llama.cpp over the same text. An input is a list of decisions.

#include "api_session.h"
#include "entmtp_walk.h"
#include "own_clock.h"
#include "policy_of.h"
#include "replays.h"

namespace {

class calls : public session {
  public:
    using session::session;

    void run() {
        while (!d.over()) {
            member & m = members[n_seq > 1 ? d.between(0, 1) : 0];
            call(m, d.byte() % 32);
            check(m);
        }
        for (member & m : members) {
            check_logits(m);
        }
    }

  private:
    int32_t token() { return d.rarely() ? d.between(0, 255) - 100 : d.between(0, tiny::n_vocab - 1); }

    tokens some_tokens(int32_t n) {
        tokens res(n);
        for (auto & t : res) {
            t = d.between(0, tiny::n_vocab - 1);
        }
        return res;
    }

    void prompt(member & m) {
        int32_t n = d.between(0, 20);
        n         = d.rarely() ? n * 8 : n;
        tokens t  = some_tokens(n);
        if (d.rarely() && n > 0) {
            t[n / 2] = token();
        }
        const auto size = (int32_t) m.text.size();
        int32_t    past = d.flag() ? size : d.between(0, std::max(size, 1));
        past            = d.rarely() ? d.between(0, 255) - 100 : past;
        const bool all  = d.flag();
        if (eval(m, t, past, all) == ENTMTP_OK) {
            MUST((entmtp_decoder_all_logits(m.dec) != nullptr) == all);
            if (all && m.known()) {
                check_all(m, n);
            }
        }
    }

    // tokens as a user would ask for them
    void generate(member & m) {
        for (int32_t i = d.between(1, 12); i > 0 && m.live; --i) {
            int32_t t = -1;
            MUST(entmtp_decoder_sample(m.dec, greedy.get(), &t) == ENTMTP_OK);
            check_greedy(m, t);
            eval(m, { t }, (int32_t) m.text.size());
        }
    }

    void sample(member & m, bool typical) {
        static const float values[] = { 0.0f, 0.09f, 0.3f, 1.0f, -1.0f, NAN, INFINITY };
        int32_t            t        = -1;

        llama_sampler * chain = d.flag() ? greedy.get() : drawing.get();
        const int32_t status = typical
                                   ? entmtp_decoder_sample_typical(m.dec, chain, values[d.between(0, 6)],
                                                                   values[d.between(0, 6)], values[d.between(0, 6)], &t)
                                   : entmtp_decoder_sample(m.dec, chain, &t);
        MUST(status == (m.live ? ENTMTP_OK : ENTMTP_ERROR));
        if (m.live) {
            MUST(t >= 0 && t < tiny::n_vocab);
            if (d.flag()) {
                eval(m, { t }, (int32_t) m.text.size());
            }
        }
    }

    // no tree: of no nodes, whose root has a parent, of a rank beyond any vocabulary
    void spoil(int32_t & n, int32_t & parent_of_root, int32_t & last_rank) {
        switch (d.between(0, 2)) {
            case 0:
                n = 0;
                break;
            case 1:
                parent_of_root = 0;
                break;
            default:
                last_rank = 1 << 30;
        }
    }

    void set_trees(member & m) {
        tokens n_nodes, parent, rank;
        for (int32_t i = d.between(1, 4); i > 0; --i) {
            const int32_t n = n_nodes.empty() ? 1 : d.between(1, 12);
            for (int32_t k = 0; k < n; ++k) {
                // parents that do not go back: breadth first
                const int32_t low = k < 2 ? 0 : parent.back();
                parent.push_back(k == 0 ? -1 : d.rarely() ? d.byte() - 8 : d.between(low, std::max(low, k - 1)));
                const bool sibling = k > 1 && parent.back() == parent[parent.size() - 2];
                rank.push_back(k == 0 ? 0 : d.rarely() ? d.byte() - 8 : sibling ? rank.back() + d.between(1, 2) : 0);
            }
            n_nodes.push_back(n);
            if (d.rarely()) {
                spoil(n_nodes.back(), parent[parent.size() - n], rank.back());
            }
        }
        const auto n = (int32_t) n_nodes.size();
        if (entmtp_decoder_set_trees(m.dec, n, n_nodes.data(), parent.data(), rank.data()) == ENTMTP_OK) {
            m.n_trees = n;
        }
    }

    void set_policy(member & m) {
        const uint32_t sources = ENTMTP_SOURCE_TEXT | ENTMTP_SOURCE_ROWS | (heads ? ENTMTP_SOURCE_HEADS : 0) |
                                 (draft ? ENTMTP_SOURCE_MODEL : 0);
        policy_of      p(d, m.n_trees, heads ? 3 : 1, sources);
        if (d.flag()) {
            p.params.policy      = ENTMTP_POLICY_STATIC;
            p.params.static_tree = d.between(0, m.n_trees - 1);
            MUST(entmtp_decoder_set_policy(m.dec, &p.params) == ENTMTP_OK);
        } else if (entmtp_decoder_set_policy(m.dec, &p.params) != ENTMTP_OK) {
            MUST(strlen(entmtp_last_error()) > 3);
        }
    }

    void settle(member & m) {
        const int32_t status = entmtp_decoder_settle(m.dec);
        MUST(status == ENTMTP_OK || !m.known());
        if (status == ENTMTP_OK && m.live && n_seq == 1) {
            MUST(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == (int32_t) m.text.size() - 1);
        }
        m.live = entmtp_decoder_n_evaluated(m.dec) >= 0 && m.live;
    }

    // the memory is changed behind the decoder's back, and it is told
    void outside(member & m) {
        settle(m);
        const auto    size = (int32_t) m.text.size();
        const int32_t n    = d.between(0, std::max(size, 1));
        switch (d.between(0, 3)) {
            case 0: // nothing was: it forgets the end
                entmtp_decoder_invalidate(m.dec, std::min(n, size));
                m.text.resize(std::min(n, size));
                if (m.known()) {
                    entmtp_decoder_set_text(m.dec, m.text.data(), (int32_t) m.text.size() + d.rarely());
                }
                break;
            case 1: // a state is kept
                if (n_seq == 1) {
                    state.resize(llama_state_seq_get_size(ctx, 0));
                    MUST(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size());
                    state_text = m.text;
                }
                return;
            case 2: // and loaded
                if (n_seq > 1 || state.empty()) {
                    return;
                }
                MUST(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) > 0);
                m.text = state_text;
                entmtp_decoder_invalidate(m.dec, (int32_t) m.text.size());
                if (m.known() && d.flag()) {
                    entmtp_decoder_set_text(m.dec, m.text.data(), (int32_t) m.text.size());
                }
                break;
            default: { // it is told what is not so
                static const int32_t wrong[] = { -1, INT32_MIN, 1000, 1 << 20, INT32_MAX };
                const int32_t        many    = wrong[d.between(0, 4)];
                entmtp_decoder_invalidate(m.dec, many);
                m.text.assign(std::clamp(many, 0, m.n_ctx), -1);
                m.live = false;
                eval(m, { 5 }, 0); // which is always possible
                return;
            }
        }
        m.live = false;
    }

    // what is recycled after the last token: the most probable ones of the plain model over the same text
    void check_best(member & m) {
        int32_t       ids[8];
        float         log_p[8];
        const int32_t k = 1 + (int32_t) m.text.size() % 8;
        const int32_t n = entmtp_decoder_best(m.dec, k, ids, log_p);
        MUST(m.live ? n >= 0 && n <= k : n == ENTMTP_ERROR);
        if (n > 0 && m.known()) {
            const auto & want = base->plain->logits(m.text);
            double       sum  = 0.0;
            for (const float x : want) {
                sum += std::exp((double) x);
            }
            for (int32_t i = 0; i < n; ++i) {
                MUST(ids[i] >= 0 && ids[i] < tiny::n_vocab && (i == 0 || log_p[i] <= log_p[i - 1]));
                MUST(std::fabs(log_p[i] - (want[ids[i]] - std::log(sum))) < 2e-3);
            }
        }
    }

    void look(member & m) {
        check_best(m);
        entmtp_signals signals = {};
        const int32_t  t       = token();
        const bool     valid   = t >= 0 && t < tiny::n_vocab;
        MUST(entmtp_decoder_signals(m.dec, t, &signals) == (m.live && valid ? ENTMTP_OK : ENTMTP_ERROR));
        if (m.live && valid) {
            MUST(signals.entropy >= 0.0f && signals.entropy < 3.7f && signals.top1 > 0.0f && signals.top1 < 1.001f);
            MUST(signals.log_root < 1e-3f);
        }
        entmtp_walk              walk = {};
        std::vector<entmtp_node> nodes(64);
        MUST(entmtp_decoder_get_walk(m.dec, &walk, nodes.data(), d.between(0, 64)) == ENTMTP_OK);
        MUST(entmtp_decoder_get_walk(m.dec, &walk, nodes.data(), 64) == ENTMTP_OK);
        MUST(walk.n_nodes >= 0 && std::isfinite(walk.entropy));
        for (int32_t i = 0; i < std::min(walk.n_nodes, 64); ++i) {
            MUST(nodes[i].token >= 0 && nodes[i].token < tiny::n_vocab);
            MUST(nodes[i].parent < i && (nodes[i].parent < 0) == (i == 0));
            MUST(nodes[i].parent < 0 || !nodes[i].walked || nodes[nodes[i].parent].walked);
        }
        MUST((entmtp_decoder_drafted_by(m.dec, t) != 0) == entmtp_decoder_is_drafted(m.dec, t));
        const int32_t n = d.between(0, 10);
        MUST(entmtp_decoder_can_continue(m.dec, n) == (n <= (int32_t) m.text.size()) || memory != WHOLE);
        entmtp_outputs_info info;
        entmtp_decoder_get_outputs(m.dec, &info);
        entmtp_traffic traffic;
        entmtp_decoder_get_traffic(m.dec, &traffic);
        MUST(traffic.n_passes >= 0);
        MUST(entmtp_decoder_can_tree(m.dec) == (memory != HYBRID) && entmtp_decoder_can_chain(m.dec));
        MUST(!draft || (std::isfinite(entmtp_draft_model_cost(draft.get())) && entmtp_draft_model_broken(draft.get()) &&
                        entmtp_draft_model_vocab(draft.get()) >= 0));
        int64_t n_passes = 0, n_parts = 0, n_tokens = 0;
        entmtp_group_get_passes(group.get(), &n_passes, &n_parts, &n_tokens);
        MUST(n_parts >= n_passes && n_tokens >= n_parts);
        float weights[ENTMTP_N_SETS * ENTMTP_N_INPUTS];
        MUST(entmtp_decoder_get_acceptance(m.dec, weights) == ENTMTP_OK);
        weights[(uint32_t) t % (ENTMTP_N_SETS * ENTMTP_N_INPUTS)] = t < 0 ? NAN : 0.1f * (float) t;
        MUST(entmtp_decoder_set_acceptance(m.dec, weights) == (t < 0 ? ENTMTP_ERROR : ENTMTP_OK));
    }

    void read_steps(member & m) {
        std::vector<entmtp_step> steps(20);
        const size_t             n = entmtp_decoder_n_steps(m.dec), first = d.byte();
        const size_t             got = entmtp_decoder_get_steps(m.dec, steps.data(), first, steps.size());
        MUST(got == std::min(steps.size(), n - std::min(first, n)));
        for (size_t i = 0; i < got; ++i) {
            MUST(steps[i].n_accepted >= 0 && steps[i].n_accepted < steps[i].n_nodes);
        }
        entmtp_step_sums     sums;
        std::vector<int64_t> by_tree(8);
        entmtp_decoder_get_older_steps(m.dec, &sums, by_tree.data(), 8);
    }

    void use_heads() {
        if (!heads) {
            return;
        }
        std::vector<float> h(4 * tiny::n_embd, 0.1f), out(tiny::n_vocab), log_p(64 * 8);
        tokens             paths(64 * 8), ids(64 * 8);
        const int32_t      first = token(), step = d.byte();
        for (size_t i = 0; i < paths.size(); ++i) {
            paths[i] = first < 0 || first >= tiny::n_vocab ? first : (first + (int32_t) i * step) % tiny::n_vocab;
        }
        const int32_t head = d.between(0, 4) - 1, n = d.between(0, 8), k = d.between(0, 8);
        entmtp_heads_prefix(heads.get(), h.data(), d.between(0, 4), d.between(0, 2) * 100, out.data());
        entmtp_heads_logits(heads.get(), head, h.data(), paths.data(), out.data());
        if (entmtp_heads_expand(heads.get(), head, h.data(), paths.data(), n, k, ids.data(), log_p.data()) ==
            ENTMTP_OK) {
            for (int32_t i = 0; i < n * k; ++i) {
                MUST(ids[i] >= 0 && ids[i] < tiny::n_vocab);
            }
        }
    }

    // what is missing is said, and nothing more
    void nothing(member & m) {
        int32_t             t = 0;
        entmtp_signals      signals;
        entmtp_walk         walk;
        entmtp_outputs_info info;
        for (entmtp_decoder * dec : { (entmtp_decoder *) nullptr, m.dec }) {
            MUST(entmtp_decoder_eval(dec, nullptr, d.between(0, 2), 0, false) == ENTMTP_ERROR);
            MUST(entmtp_decoder_sample(dec, nullptr, &t) == ENTMTP_ERROR);
            MUST(entmtp_decoder_sample(dec, greedy.get(), nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_sample_typical(dec, nullptr, 1.0f, 1.0f, 1.0f, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_set_trees(dec, 1, nullptr, nullptr, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_set_policy(dec, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_signals(dec, 1, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_get_acceptance(dec, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_get_walk(dec, nullptr, nullptr, 0) == ENTMTP_ERROR);
            MUST(entmtp_decoder_get_steps(dec, nullptr, 0, 5) == 0);
            MUST(entmtp_decoder_share(dec, nullptr, &t, 1) == ENTMTP_ERROR);
            MUST(entmtp_decoder_in_common(dec, nullptr, 1) == 0);
            MUST(entmtp_decoder_best(dec, 1, nullptr, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_best(dec, d.byte() - 100, nullptr, nullptr) == ENTMTP_ERROR);
            MUST(entmtp_decoder_set_acceptance(dec, nullptr) == ENTMTP_ERROR);
            MUST(n_seq == 1 || entmtp_decoder_share(dec, dec, &t, 1) == ENTMTP_ERROR);
            entmtp_decoder_get_outputs(dec, nullptr);
            entmtp_decoder_get_traffic(dec, nullptr);
            entmtp_decoder_get_older_steps(dec, nullptr, nullptr, 0);
        }
        MUST(entmtp_decoder_signals(nullptr, 1, &signals) == ENTMTP_ERROR);
        MUST(entmtp_decoder_get_walk(nullptr, &walk, nullptr, 0) == ENTMTP_ERROR);
        MUST(!entmtp_decoder_logits(nullptr) && !entmtp_decoder_hidden(nullptr));
        MUST(!entmtp_decoder_is_drafted(nullptr, 1) && !entmtp_decoder_can_tree(nullptr));
        entmtp_decoder_get_outputs(nullptr, &info);
        entmtp_decoder_cancel(nullptr);
        entmtp_heads_get_info(heads.get(), nullptr);
        MUST(!entmtp_heads_load(nullptr, base->model.get(), 1));
        MUST(entmtp_heads_prefix(heads.get(), nullptr, 1, 0, nullptr) == ENTMTP_ERROR);
        MUST(entmtp_heads_logits(heads.get(), 0, nullptr, nullptr, nullptr) == ENTMTP_ERROR);
        MUST(entmtp_heads_expand(heads.get(), 0, nullptr, nullptr, 1, 1, nullptr, nullptr) == ENTMTP_ERROR);
        MUST(entmtp_sample(nullptr, greedy.get(), 0, &t) == ENTMTP_ERROR);
        MUST(entmtp_vocab_fingerprint(nullptr) == 0);
        entmtp_acceptance_shipped(nullptr);
        MUST(!entmtp_decoder_init(nullptr, heads.get()) && !entmtp_group_init(nullptr, nullptr, 1, 1));
        MUST(!entmtp_group_init(ctx, nullptr, n_seq + 1, 1) && !entmtp_group_decoder(group.get(), n_seq));
        MUST(!entmtp_corpus_init(nullptr, 3) && !entmtp_corpus_init(&t, -1));
        MUST(!entmtp_draft_model_init(nullptr, nullptr, nullptr, 0));
    }

    void share(member & m) {
        if (n_seq < 2) {
            entmtp_decoder_clear(m.dec);
            m.text.clear();
            m.live = false;
            return;
        }
        member & from = &m == &members[0] ? members[1] : members[0];
        tokens   t    = from.known() && d.flag() ? from.text : some_tokens(d.between(0, 5));
        t.reserve(1); // none is no list
        const int32_t n = entmtp_decoder_share(m.dec, from.dec, t.data(), (int32_t) t.size());
        MUST(n >= 0 && n <= (int32_t) t.size() && (n == 0 || memory != FORGETS));
        if (n == 0) {
            return;
        }
        if (from.known()) {
            MUST(std::equal(t.begin(), t.begin() + n, from.text.begin()));
        }
        t.resize(n);
        m.text = t;
        m.live = false;
        MUST(entmtp_decoder_in_common(m.dec, t.data(), n) == n);
    }

    void set_draft_model(member & m) {
        if (n_seq > 1) {
            return;
        }
        if (draft || d.rarely()) {
            MUST(entmtp_decoder_set_draft_model(m.dec, nullptr) == ENTMTP_OK);
            // a policy that asks it is left without one
            draft.reset();
        } else {
            draft.reset(entmtp_draft_model_init(ctx, s.small.get(), &params, d.rarely() ? 0 : 64));
            MUST(draft);
            MUST(entmtp_decoder_set_draft_model(m.dec, draft.get()) == ENTMTP_OK);
        }
    }

    void call(member & m, int32_t what) {
        switch (what) {
            case 0:
            case 1:
            case 2:
                prompt(m);
                break;
            case 3:
            case 4:
            case 5:
            case 6:
                generate(m);
                break;
            case 7:
                sample(m, false);
                break;
            case 8:
                sample(m, true);
                break;
            case 9:
            case 10:
                set_trees(m);
                break;
            case 11:
            case 12:
                set_policy(m);
                break;
            case 13:
                settle(m);
                break;
            case 14:
            case 15:
                outside(m);
                break;
            case 16:
                look(m);
                break;
            case 17:
                read_steps(m);
                break;
            case 18:
                d.flag() ? use_heads() : replay(d, heads.get());
                break;
            case 19:
                share(m);
                break;
            case 20:
                set_draft_model(m);
                break;
            case 21: {
                tokens     t       = some_tokens(d.between(0, 30));
                const bool strange = t.size() == 30;
                if (strange) { // of another model
                    t[7] = tiny::n_vocab;
                }
                auto c =
                    std::unique_ptr<entmtp_corpus, corpus_deleter>(entmtp_corpus_init(t.data(), (int64_t) t.size()));
                MUST(c);
                for (member & other : members) {
                    const bool none = d.rarely();
                    MUST(entmtp_decoder_set_corpus(other.dec, none ? nullptr : c.get()) ==
                         (strange && !none ? ENTMTP_ERROR : ENTMTP_OK));
                }
                corpora.push_back(std::move(c));
                break;
            }
            case 22:
                entmtp_decoder_forget(m.dec);
                break;
            case 23: {
                // two wait for each other, which takes as long as all they do
                const int32_t n      = d.rarely() ? 0 : d.rarely() ? 2 : 1;
                const int32_t status = entmtp_decoder_set_threads(m.dec, n, nullptr);
                MUST(status == (n > 0 ? ENTMTP_OK : ENTMTP_ERROR));
                break;
            }
            case 24: {
                const int32_t mode = d.between(0, 4);
                MUST(entmtp_decoder_set_outputs(m.dec, mode) == (mode < 4 ? ENTMTP_OK : ENTMTP_ERROR));
                break;
            }
            case 25:
                entmtp_decoder_set_stats(m.dec, d.flag());
                break;
            case 26:
                entmtp_decoder_reset_stats(m.dec);
                break;
            case 27:
                m.cancelled = d.flag();
                (m.cancelled ? entmtp_decoder_cancel : entmtp_decoder_resume)(m.dec);
                break;
            case 28:
                check_logits(m);
                break;
            case 29:
                if (n_seq > 1) {
                    // others then wait for it, in vain: rarely
                    entmtp_group_set_active(group.get(), (int32_t) (&m - members.data()), d.rarely());
                }
                break;
            case 30:
                nothing(m);
                if (d.rarely()) { // another decoder on the same context
                    end();
                    begin();
                }
                break;
            default: { // follow the tree: a draft, if there is one
                for (int32_t t = d.between(0, 20), i = 0; i < tiny::n_vocab && m.live;
                     ++i, t                          = (t + 1) % tiny::n_vocab) {
                    if (entmtp_decoder_is_drafted(m.dec, t)) {
                        eval(m, { t }, (int32_t) m.text.size());
                        break;
                    }
                }
            }
        }
    }
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static setting s;
    decisions      d(data, size);
    own_clock::begin(size);
    calls(s, d).run();
    return 0;
}
