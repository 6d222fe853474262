#include "pass.h"

#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>

namespace entmtp {

using us = std::chrono::duration<double, std::micro>;

// memories are long, not endless
static constexpr double forget = 1.0 - 1.0 / 64.0;

// how long a pass waits for the last ones, us: they have a token to sample and to look at
static constexpr double least_patience = 2e3;
static constexpr double most_patience  = 20e3;

static constexpr int32_t failed = -3;      // as llama_process() says it

static constexpr int32_t first_chunk = 64; // tokens of a prompt, until their time is known
static constexpr int32_t least_chunk = 16;

pass::pass(llama_context * ctx, bool want_hidden, int32_t n_seq) :
    memory(ctx), out(ctx, want_hidden), n_seq(n_seq), ctx(ctx), members(n_seq) {
    if (n_seq > 1) {
        worker = std::thread([this] { serve(); });
    }
}

pass::~pass() {
    llama_set_graph_slots(ctx, 0);
    if (worker.joinable()) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            over = true;
        }
        changed.notify_all();
        worker.join();
    }
}

pass::hold::hold(pass & p, int32_t seq) : owner(p) {
    std::unique_lock<std::mutex> lock(p.mutex);
    p.changed.wait(lock, [&] { return !p.running; });
    p.members[seq].absent = false;
    lock.release();
}

pass::apart::apart(pass & p, int32_t seq) : owner(p), seq(seq) {
    if (owner.n_seq > 1) {
        owner.members[seq].served = true;
        owner.mutex.unlock();
    }
}

pass::apart::~apart() {
    if (owner.n_seq > 1) {
        owner.mutex.lock();
        owner.members[seq].served = false;
        owner.changed.notify_all();
    }
}

void pass::join(int32_t seq, decoder * d) {
    members[seq].owner = d;
}

void pass::set_active(int32_t seq, bool active) {
    members[seq].active = active;
    members[seq].absent = false;
    changed.notify_all(); // others may have waited for this one
}

int32_t pass::n_active() const {
    return (int32_t) std::count_if(members.begin(), members.end(), [](const member & m) { return m.active; });
}

int32_t pass::n_others(int32_t seq) const {
    int32_t n = 0;
    for (int32_t s = 0; s < n_seq; ++s) {
        n += s != seq && members[s].active && !members[s].absent;
    }
    return n;
}

int32_t pass::prompt_chunk(int32_t seq) const {
    const auto n_batch = (int32_t) llama_n_batch(ctx);
    if (n_others(seq) == 0) {
        return n_batch;
    }
    const double n = t_prompt > 0.0 ? stall / t_prompt : first_chunk;
    return std::clamp((int32_t) std::min(n, 1e6), least_chunk,
                      std::max(least_chunk, std::min(n_batch, (int32_t) llama_n_ubatch(ctx) / 2)));
}

bool pass::ready() const {
    if (std::any_of(members.begin(), members.end(), [](const member & m) { return m.served; })) {
        return false;
    }
    const bool all =
        std::all_of(members.begin(), members.end(), [](const member & m) { return m.wants || !m.active || m.absent; });
    return all || clock::now() >= deadline;
}

void pass::be_patient() {
    const us patience(std::clamp(t_last / 2, least_patience, most_patience));
    deadline = clock::now() + std::chrono::duration_cast<clock::duration>(patience);
}

bool pass::wanted() const {
    return std::any_of(members.begin(), members.end(), [](const member & m) { return m.wants; });
}

int32_t pass::run(part & mine) {
    std::unique_lock<std::mutex> lock(mutex, std::adopt_lock);

    if (!wanted()) {
        be_patient();
    }
    mine.asked              = n_asked++;
    members[mine.seq].wants = &mine;
    if (n_seq == 1) {
        lead(lock);
    } else {
        changed.notify_all();
        changed.wait(lock, [&] { return members[mine.seq].served; });
        changed.notify_all();
    }
    members[mine.seq].served = false;
    lock.release(); // still held, as it came
    return mine.status;
}

// the worker's loop
void pass::serve() {
    std::unique_lock<std::mutex> lock(mutex);
    while (!over) {
        if (!wanted()) {
            changed.wait(lock);
        } else if (!ready()) {
            clock::now() < deadline ? (void) changed.wait_until(lock, deadline) : changed.wait(lock);
        } else {
            lead(lock);
        }
    }
}

// whose turn it is: all that decode, and prompts, both as they came, while they fit
std::vector<part *> pass::choose() const {
    std::vector<part *> prompts, texts, res;
    int32_t             n_room = (int32_t) std::min(llama_n_ubatch(ctx), llama_n_batch(ctx));
    for (const member & m : members) {
        if (m.wants) {
            (m.wants->is_prompt ? prompts : texts).push_back(m.wants);
        }
    }
    const auto earlier = [](const part * a, const part * b) {
        return a->asked < b->asked;
    };
    std::sort(prompts.begin(), prompts.end(), earlier);
    std::sort(texts.begin(), texts.end(), earlier);
    for (part * p : texts) {
        const auto n = (int32_t) p->tokens.size();
        if (n <= n_room || res.empty()) { // llama.cpp would split it, and keep the rows of its last piece alone
            res.push_back(p);
            n_room -= n;
        }
    }
    int32_t n_taken = 0;
    if (!prompts.empty() && (int32_t) prompts[0]->tokens.size() > n_room) {
        return { prompts[0] }; // as large as a pass may be: begun when no other was there
    }
    for (part * p : prompts) {
        const auto n = (int32_t) p->tokens.size();
        if (n_taken == 0 || (n <= n_room && n_taken + n <= prompt_chunk(p->seq))) {
            res.push_back(p);
            n_room -= n;
            n_taken += n;
        }
    }
    return res;
}

// Each chose its tree as if the others had none. Of all nodes together the most probable ones stay, as long as they pay
void pass::drop_nodes(const std::vector<part *> & parts) const {
    int32_t            n_sure = 0;
    std::vector<float> p;
    for (const part * x : parts) {
        n_sure += x->p.empty() ? (int32_t) x->tokens.size() : 1;
        if (!x->p.empty()) {
            p.insert(p.end(), x->p.begin() + 1, x->p.end());
        }
    }
    const auto with_fee = std::find_if(parts.begin(), parts.end(), [](const part * x) { return (bool) x->fee; });
    if (parts.size() < 2 || p.empty() || with_fee == parts.end()) {
        return;
    }
    const auto & fee = (*with_fee)->fee;
    std::sort(p.begin(), p.end(), std::greater<float>());
    double sum = 0.0, best = -fee(n_sure);
    size_t n_best = 0;
    for (size_t n = 1; n <= p.size(); ++n) {
        sum += p[n - 1];
        const double worth = sum - fee(n_sure + (int32_t) n);
        if (worth > best) {
            best   = worth;
            n_best = n;
        }
    }
    const auto n_max = (size_t) std::max(0, (int32_t) llama_n_ubatch(ctx) - n_sure);
    n_best           = std::min(n_best, n_max);
    if (n_best == p.size()) {
        return;
    }
    const float least  = n_best == 0 ? HUGE_VALF : p[n_best - 1];
    size_t      n_left = n_best;
    for (part * x : parts) {
        if (!x->p.empty()) {
            x->keep([&](size_t i) { return i == 0 || (x->p[i] >= least && n_left > 0 && n_left--); });
        }
    }
}

void pass::lead(std::unique_lock<std::mutex> & lock) {
    const std::vector<part *> parts = choose();

    for (member & m : members) {
        if (m.owner && !m.wants && !m.absent && n_seq > 1) {
            m.owner->detach(); // its rows are about to go
            m.absent = m.active;
        }
    }
    drop_nodes(parts);

    int32_t n_tokens = 0, n_prompt = 0;
    bool    to_host = false, timed = n_seq > 1;
    for (const part * p : parts) {
        n_tokens += (int32_t) p->tokens.size();
        n_prompt += p->is_prompt ? (int32_t) p->tokens.size() : 0;
        to_host = to_host || p->to_host;
        timed   = timed || p->timed;
    }

    out.begin(to_host);
    running = true;
    lock.unlock();

    const int64_t t0           = ggml_time_us();
    int32_t       first_output = 0;
    int32_t       status       = failed;
    try {
        status = memory.decode(parts, &first_output);
        if (status == 0) {
            out.end(n_tokens, first_output);
        }
        if (timed) {
            llama_synchronize(ctx);
        }
    } catch (const std::exception & e) { // those who wait must hear of it
        fprintf(stderr, "entmtp: a pass failed: %s\n", e.what());
    }
    const double t = (double) (ggml_time_us() - t0);

    lock.lock();
    running = false;

    ++n_passes;
    n_parts += (int64_t) parts.size();
    this->n_tokens += n_tokens;
    if (status == 0 && n_seq > 1) {
        if (n_prompt == 0) {
            t_last      = t;
            tokens_seen = forget * tokens_seen;
            time_seen   = forget * time_seen + t;
        } else if (n_prompt >= least_chunk) {
            const double t_each = std::max(t - t_last, t / 2) / n_prompt;
            t_prompt            = t_prompt > 0.0 ? t_prompt + (t_each - t_prompt) / 4 : t_each;
        }
    }
    // no cells for a tree beside the others: it goes back to who drafted it, and their turn comes again without it
    const auto is_tree = [](const part * p) {
        return !p->is_prompt && p->tokens.size() > 1;
    };
    const bool crowded = status == 1 && std::any_of(parts.begin(), parts.end(), is_tree);
    for (part * p : parts) {
        if (crowded && !is_tree(p)) {
            continue;
        }
        p->status              = status;
        p->t_us                = t;
        p->built               = out.built();
        p->n_others            = n_tokens - (int32_t) p->tokens.size();
        p->with_prompt         = n_prompt > (p->is_prompt ? (int32_t) p->tokens.size() : 0);
        members[p->seq].wants  = nullptr;
        members[p->seq].served = true;
    }
    be_patient(); // with those whose turn it was not
    changed.notify_all();
}

} // namespace entmtp
