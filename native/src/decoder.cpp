#include "decoder.h"

#include "positions.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

// verify passes of the last so many sizes keep their graphs: tuned banks hold no more trees
static constexpr uint32_t n_graph_slots = 8;

static bool is_cancelled(void * data) {
    return static_cast<std::atomic<bool> *>(data)->load(std::memory_order_relaxed);
}

decoder::decoder(llama_context * ctx, heads * h) :
    decoder(ctx, h, std::make_unique<pass>(ctx, h != nullptr, 1), nullptr, 0, 1 << 30) {
    llama_set_abort_callback(ctx, is_cancelled, &cancelled);
}

decoder::decoder(llama_context * ctx, heads * h, std::unique_ptr<pass> p, pass * s, int32_t seq, int32_t n_ctx) :
    n_vocab(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)))), servers(llama_get_model(ctx)), ctx(ctx),
    draft_heads(h), own(std::move(p)), shared(own ? *own : *s), memory(shared.memory), out(shared.out), seq(seq),
    n_ctx(std::min(n_ctx, n_positions(ctx))) {
    const int32_t root_parent = -1;
    const int32_t root_rank   = 0;
    set_trees({ make_tree(&root_parent, &root_rank, 1) });

    if (draft_heads) {
        if (llama_pooling_type(ctx) != LLAMA_POOLING_TYPE_NONE) {
            throw std::runtime_error(
                "decoder: a context with pooling gives embeddings, not text; create it without pooling to draft");
        }
        if (draft_heads->prefix()) {
            if (shared.n_seq > 1) {
                throw std::runtime_error(
                    "decoder: these heads have a layer of their own (Hydra++), whose cache holds one "
                    "text; several sequences cannot draft with them");
            }
            draft_heads->reserve_prefix((int32_t) llama_n_ctx_seq(ctx));
        }
    }

    n_slots = draft_heads || !own ? n_graph_slots : 0;
    llama_set_graph_slots(ctx, n_slots);
    shared.join(seq, this);
}

decoder::~decoder() {
    shared.join(seq, nullptr);
    if (own) {
        llama_set_abort_callback(ctx, nullptr, nullptr);
    }
}

entmtp_traffic decoder::traffic() const {
    entmtp_traffic res = out.traffic;
    if (draft_heads) {
        add(res, draft_heads->traffic());
    }
    return res;
}

void decoder::set_trees(std::vector<tree> trees) {
    if (trees.empty() || trees[0].n_nodes() != 1) {
        throw std::runtime_error("bank: the first tree must be a lone root (plain decoding)");
    }

    size_t deepest = 0;
    for (const auto & t : trees) {
        deepest = std::max(deepest, t.levels.size());
    }
    if (deepest > 0 && !memory.can_tree()) {
        throw std::runtime_error(memory.why_no_tree());
    }
    if (draft_heads && deepest > (size_t) draft_heads->n_heads()) {
        throw std::runtime_error("bank: a tree is " + std::to_string(deepest) + " deep, but there are only " +
                                 std::to_string(draft_heads->n_heads()) + " heads");
    }

    settle();
    reset_stats(); // records name trees by index
    walked.tree = -1;

    // graphs are kept per tree, by address
    if (draft_heads) {
        draft_heads->forget_graphs();
    }
    bank = std::move(trees);

    n_nodes.clear();
    depth.clear();
    for (const auto & t : bank) {
        n_nodes.push_back(t.n_nodes());
        depth.push_back((int32_t) t.levels.size());
    }
    policy = scheduler();
}

void decoder::set_policy(const entmtp_policy_params & p) {
    scheduler next(p, (int32_t) bank.size());
    if (p.policy == ENTMTP_POLICY_CONFIDENCE || next.needs_path()) {
        if (!draft_heads) {
            throw std::runtime_error("policy: this one needs draft heads");
        }
        if (!memory.can_tree()) {
            throw std::runtime_error(memory.why_no_tree());
        }
        if (draft_heads->n_vocab_draft() < grower::n_guess) {
            throw std::runtime_error("policy: a draft vocabulary of fewer than 8 tokens is too small for it");
        }
        const size_t n = (size_t) draft_heads->n_heads() * grower::max_width * grower::n_guess;
        guess.assign(n, 0);
        log_p.assign(n, 0.0f);
    }
    if (next.mixes() && !memory.can_tree()) {
        if (!memory.can_chain()) {
            throw std::runtime_error(memory.why_no_tree());
        }
        next.draft_chains();
    }
    if (next.mixes() && (p.drafters & ENTMTP_SOURCE_MODEL) && !drafting) {
        throw std::runtime_error("policy: a model is to draft, but there is none");
    }
    if (next.mixes() && (p.drafters & ENTMTP_SOURCE_HEADS) &&
        (!draft_heads || draft_heads->n_vocab_draft() < mixer::n_guess)) {
        throw std::runtime_error("policy: heads are to draft, but there are none, or they know fewer than 8 tokens");
    }
    if (!draft_heads && own) {
        keep_graphs(p.policy == ENTMTP_POLICY_OFF ? 0 : n_graph_slots);
    }
    policy  = std::move(next);
    running = ema(policy.window());
    in_step = false; // what is being walked was neither chosen nor timed for this policy
}

// a change drops all graphs, and with them the rows that were not read yet
void decoder::keep_graphs(uint32_t n) {
    if (n != n_slots) {
        detach();
        n_slots = n;
        llama_set_graph_slots(ctx, n);
    }
}

void decoder::set_threads(int32_t n, const entmtp_costs * costs) {
    policy.set_threads(n, costs, (int32_t) bank.size());
    llama_set_n_threads(ctx, n, n);
    if (drafting) {
        drafting->set_threads(n);
    }
    if (draft_heads) {
        // of several sequences each drafts in a thread of its own
        draft_heads->set_threads(shared.n_seq > 1 ? 1 : n);
    }
    in_step = false; // what is being walked was timed with other threads
}

void decoder::set_stats(bool enabled) {
    stats   = enabled;
    in_list = in_list && enabled;
}

void decoder::reset_stats() {
    steps.clear();
    in_list = false;
}

//
// evaluate
//

// the memory may refuse a batch, or the user may have stopped it
int32_t decoder::decode_status(int32_t status) {
    if (status == 0) {
        return ENTMTP_OK;
    }

    live = false;
    set_row(-1);

    if (status == 2 || (cancelled && status < 0)) {
        cancelled = false;
        error     = "cancelled";
        return ENTMTP_CANCELLED;
    }
    if (status == 1) {
        error = "the context is full: " + std::to_string(n_past) + " of " + std::to_string(n_ctx) +
                " positions are taken; create the model with a larger n_ctx";
        return ENTMTP_CONTEXT_FULL;
    }
    error = "llama.cpp could not evaluate the batch (status " + std::to_string(status) + ")";
    return ENTMTP_ERROR;
}

int32_t decoder::eval(const int32_t * toks, int32_t n, int32_t past, bool all_outputs) {
    if (n < 1) {
        error = "nothing to evaluate";
        return ENTMTP_ERROR;
    }
    for (int32_t i = 0; i < n; ++i) {
        if (toks[i] < 0 || toks[i] >= n_vocab) {
            error = "token " + std::to_string(toks[i]) + " is not in the vocabulary of " + std::to_string(n_vocab);
            return ENTMTP_ERROR;
        }
    }
    if (cancelled) {
        cancelled = false;
        error     = "cancelled";
        return ENTMTP_CANCELLED;
    }
    all      = all_of::nothing;
    all_rows = {};

    const bool goes_on = n == 1 && live && past == n_past + (int32_t) path.size();
    int32_t    status;
    try {
        status = goes_on ? advance(toks[0]) : eval_prompt(toks, n, past, all_outputs);
    } catch (...) {
        abandon();
        throw;
    }
    if (all_outputs && status == ENTMTP_OK) {
        all = goes_on ? all_of::token : all_of::prompt;
    }
    return status;
}

// one more token: follow the tree, or start the next step
int32_t decoder::advance(int32_t token) {
    if (tree_id >= 0) {
        const int32_t child = topology(tree_id).find_child(path.back(), tokens, token);
        if (child >= 0) {
            path.push_back(child);
            walked.path = path;
            set_row(work.at[child]);
            is_seen = false;
            if (in_list) {
                steps.back().n_accepted++;
                steps.back().n_by[first_of(sources.empty() ? (uint32_t) ENTMTP_SOURCE_HEADS : sources[child])]++;
            }
            return ENTMTP_OK;
        }
    }
    return step(token);
}

int32_t decoder::room() const {
    // each of several may take its share of a pass
    const int32_t n = (int32_t) std::min(llama_n_ubatch(ctx), llama_n_batch(ctx)) / shared.n_seq;
    return std::min({ n_ctx - n_past, n, memory.most_nodes() });
}

int32_t decoder::verify_tree(int32_t id) {
    const tree & t = topology(id);

    work        = {};
    work.seq    = seq;
    work.pos0   = n_past;
    work.tokens = tokens;
    work.parent = t.parent;
    work.depth  = t.depth;
    work.p      = reach;
    work.timed  = stats || policy.needs_timing();
    if (id == (int32_t) bank.size() && shared.n_seq == 1 && memory.can_tree()) {
        work.fill(std::min(policy.pass_size((int32_t) tokens.size()), room()));
    }

    work.fee = [this](int32_t n) {
        return policy.fee(n);
    };

    const int32_t status = shared.run(work);
    if (status == 0 && !work.kept.empty()) {
        drop_nodes(work.kept);
    }
    return status;
}

void decoder::set_row(int32_t i) {
    if (i != row) {
        out.release(row);
        row = i;
    }
}

int32_t decoder::step(int32_t token) {
    const bool    timed   = stats || policy.needs_timing();
    const int64_t t_start = timed ? ggml_time_us() : 0;

    if (const int32_t status = settle(token); status != ENTMTP_OK) {
        return status;
    }

    if (n_past >= n_ctx) {
        return decode_status(1);
    }

    const int64_t t0 = timed ? ggml_time_us() : 0;

    text.truncate(n_past);
    text.append(token);
    walked.tree = -1;
    int32_t id  = draft(token);

    const int64_t t1 = timed ? ggml_time_us() : 0;

    int32_t status = verify_tree(id);
    // no cells for the tree (1), a batch that llama.cpp takes in no pass (-1), or no memory for its graph (-2): the token
    // alone may still be possible
    if (tokens.size() > 1 && (status == 1 || status == -1 || status == -2) && !cancelled && !servers.lost()) {
        if (status < 0) {
            memory.truncate(seq, n_past);
        }
        id = 0;
        tokens.resize(1);
        sources.clear();
        reach.clear();
        status = verify_tree(id);
    }
    if (const int32_t res = decode_status(status); res != ENTMTP_OK) {
        memory.truncate(seq, n_past);
        text.truncate(n_past);
        return res;
    }

    tree_id = id;
    path.assign(1, 0);
    walked = { id, n_past, path };
    set_row(work.at[0]);
    is_seen = false;
    in_step = true;
    in_list = stats;

    if (timed) {
        t_draft  = (double) (t1 - t0);
        t_verify = work.t_us;

        if (stats) {
            entmtp_step s = {};
            s.entropy     = running.get();
            s.tree        = tokens.size() > 1 ? id : 0; // a lone root is plain decoding, grown or not
            s.n_nodes     = (int32_t) tokens.size();
            s.t_draft_us  = (int32_t) t_draft;
            s.t_verify_us = (int32_t) t_verify;
            s.t_host_us   = (int32_t) (t0 - t_start);
            steps.push(s);
        }
    }
    return ENTMTP_OK;
}

int32_t decoder::settle(int32_t next) {
    try {
        return tree_id < 0 ? (int32_t) ENTMTP_OK : keep_path(next);
    } catch (...) {
        abandon();
        throw;
    }
}

bool decoder::can_continue(int32_t past) const {
    const int32_t end    = n_past + (int32_t) path.size();
    // a state goes back once: to the end of what is being walked, if not all of it is
    const bool    is_cut = tree_id >= 0 && (int32_t) path.size() < topology(tree_id).n_nodes();
    return past <= end && (past == end || past == 0 || !is_cut || !memory.recurrent()) &&
           memory.can_continue(seq, past);
}

int32_t decoder::keep_path(int32_t next) {
    if (in_step) {
        const int32_t id         = tree_id == (int32_t) bank.size() ? scheduler::grow_tree : tree_id;
        const int32_t next_token = next;
        if (path.size() > 1) {
            next = tokens[path[1]];
        }
        const int32_t hit =
            id == scheduler::grow_tree && !policy.mixes() && next >= 0 ? (next == guess[0] ? 1 : 0) : -1;
        policy.observe(id, topology(tree_id).n_nodes(),
                       { path, hit, next_token, policy.mixes() ? t_heads : t_draft, t_verify, work.n_others,
                         !work.with_prompt, work.built });
    }

    shared.earn((int32_t) path.size());

    std::vector<int32_t> in_pass;
    for (const int32_t node : path) {
        in_pass.push_back(work.at[node]);
    }

    const bool is_tree = topology(tree_id).n_nodes() > 1;
    if (is_tree && !memory.commit(seq, in_pass, n_past)) {
        // cannot happen unless the memory was changed behind our back
        memory.truncate(seq, n_past);
        leave_tree();
        live  = false;
        error = "the memory of the context was changed while a tree was being walked";
        return ENTMTP_ERROR;
    }

    // the prefix layer follows the settled tokens: their hidden states are still in the context's outputs
    if (draft_heads && draft_heads->prefix()) {
        run_prefix(in_pass, n_past);
    }

    text.truncate(n_past);
    std::vector<int32_t> settled;
    for (const int32_t node : path) {
        text.append(tokens[node]);
        settled.push_back(tokens[node]);
    }
    if (drafting) {
        drafting->follow(settled, n_past, in_pass);
    }
    n_past += (int32_t) path.size();
    leave_tree();
    return ENTMTP_OK;
}

// what failed half done: the text ends where it was settled last
void decoder::abandon() {
    leave_tree();
    live        = false;
    walked.tree = -1;
    set_row(-1);
    memory.truncate(seq, n_past);
    text.truncate(n_past);
    if (draft_heads && draft_heads->prefix()) {
        draft_heads->prefix()->truncate(n_past);
    }
    if (drafting) {
        drafting->truncate(n_past);
    }
}

void decoder::leave_tree() {
    tree_id = -1;
    path.clear();
    typical.clear();
    in_step = false;
    in_list = false;
}

void decoder::invalidate(int32_t past) {
    leave_tree();
    live        = false;
    is_seen     = false;
    walked.tree = -1;
    set_row(-1);
    n_past = std::clamp(past, 0, n_ctx);
    memory.changed(seq);
    text.truncate(0); // it may be another one
    text.truncate(n_past);
    running.reset();
    if (draft_heads && draft_heads->prefix()) {
        draft_heads->prefix()->truncate(0);
    }
    if (drafting) {
        drafting->truncate(0);
    }
}

} // namespace entmtp
