// The first half of a step: choose a topology, and let who drafts fill in its tokens.

#include "decoder.h"

#include "ggml.h"

#include <cmath>

namespace entmtp {

void decoder::set_draft_model(draft_model * d) {
    if (d && shared.n_seq > 1) {
        throw std::runtime_error("decoder: a drafting model follows one text; several sequences cannot draft with it");
    }
    settle();
    drafting = d;
}

// ln p [n][n_guess] of head l after its first n expanded paths; their tokens go to `guess`
const float * decoder::expand(int32_t l, int32_t n) {
    constexpr int32_t k     = grower::n_guess;
    constexpr int32_t n_row = grower::max_width * k;

    std::vector<int32_t> paths; // [n][l + 1]
    if (draft_heads->sees_path()) {
        std::vector<int32_t> ranks(l);
        for (int32_t c = 0; c < n; ++c) {
            expanded_path(l, c, ranks.data());
            paths.push_back(tokens[0]);
            for (int32_t d = 0; d < l; ++d) {
                // the expanded path of level d that this one goes through
                int32_t column = c;
                for (int32_t up = l; up > d; --up) {
                    column = expanded_parent(up, column);
                }
                paths.push_back(guess[d * n_row + column * k + ranks[d]]);
            }
        }
    }
    draft_heads->expand(l, draft_input(), paths.data(), n, k, &guess[l * n_row], &log_p[l * n_row]);
    return &log_p[l * n_row];
}

// product of the heads' top-1 probabilities down the greedy path
float decoder::greedy_path() {
    float sum = 0.0f;
    for (int32_t l = 0; l < draft_heads->n_heads(); ++l) {
        sum += expand(l, 1)[0];
    }
    return std::exp(sum);
}

// a fixed tree without heads: each node is a successor of its parent's token (Token Recycling, arXiv 2408.08696)
void decoder::draft_from_rows(const tree & topology) {
    sources.assign(topology.n_nodes(), ENTMTP_SOURCE_ROWS);
    for (int32_t i = 1; i < topology.n_nodes(); ++i) {
        const int32_t           parent = tokens[topology.parent[i]];
        const successors::row * row    = rows.after(parent);
        // without a successor of that rank: a guess that is as good as none, but takes its place in the pass
        tokens[i]                      = row && topology.rank[i] < row->n ? row->token[topology.rank[i]] : parent;
    }
}

// a fixed tree from a model that drafts: it goes on down the path of its best guesses, whose siblings are its next best ones
void decoder::draft_from_model(const tree & topology) {
    constexpr int32_t    k = mixer::n_guess;
    std::vector<int32_t> best(k), below;
    std::vector<float>   best_log_p(k);
    int32_t              asked = -1; // node whose children `best` are
    int32_t              at    = 0;  // the end of the path
    bool                 knows = true;

    sources.assign(topology.n_nodes(), ENTMTP_SOURCE_MODEL);
    for (int32_t i = 1; i < topology.n_nodes(); ++i) {
        const int32_t parent = topology.parent[i];
        if (parent == at && asked != at) {
            knows = drafting->expand(text, below, k, best.data(), best_log_p.data());
            asked = at;
        }
        // where it was not asked: a guess that is as good as none, but takes its place in the pass
        tokens[i] = knows && parent == asked && topology.rank[i] < k ? best[topology.rank[i]] : tokens[parent];
        if (knows && parent == asked && topology.rank[i] == 0) {
            at = i;
            below.push_back(tokens[i]);
        }
    }
}

void decoder::mix(const entmtp_signals & s) {
    const auto expand = [&](int32_t l, const std::vector<int32_t> & paths, int32_t n, int32_t * best,
                            float * best_log_p) {
        const int64_t t0 = ggml_time_us();
        draft_heads->expand(l, draft_input(), paths.data(), n, mixer::n_guess, best, best_log_p);
        t_heads += (double) (ggml_time_us() - t0);
    };
    mixer::asked_model model;
    if (drafting && drafting->broken().empty()) {
        model.depth = drafting->depth();
        model.cost  = [this](int32_t l) {
            return drafting->cost(text, l);
        };
        model.guess = [this](const std::vector<int32_t> & below, int32_t * best, float * best_log_p) {
            return drafting->expand(text, below, mixer::n_guess, best, best_log_p);
        };
    }
    const int32_t n_heads   = draft_heads ? draft_heads->n_heads() : 0;
    const bool    sees_path = draft_heads && draft_heads->sees_path();
    const auto &  nodes     = policy.mix(text, rows, s, running.get(), room(), n_heads, sees_path, expand, model);

    grown.parent.assign(1, -1);
    grown.rank.assign(1, 0);
    grown.depth.assign(1, 0);
    sources.assign(1, 0);
    reach.assign(1, 1.0f);
    for (const auto & node : nodes) {
        grown.parent.push_back(node.parent);
        grown.rank.push_back(0);
        grown.depth.push_back(node.depth);
        tokens.push_back(node.token);
        sources.push_back(node.sources);
        reach.push_back(node.p);
    }
}

// choose a topology and fill in its tokens; returns its id
int32_t decoder::draft(int32_t token) {
    entmtp_signals s = {};
    if (policy.needs_signals()) {
        s = signals(token);
    }

    tokens.assign(1, token);
    sources.clear();
    reach.clear();
    t_heads = 0.0;

    policy.meet({ shared.n_others(seq), shared.price() });
    const float   product = policy.needs_path() ? greedy_path() : 0.0f;
    const int32_t id      = policy.choose(s, running.get(), product, room(), n_nodes, depth);

    if (id != scheduler::grow_tree) {
        tokens.resize(bank[id].n_nodes());
        // a model that was named comes before heads, the model's own layers after them
        const bool asks_model = drafting && drafting->broken().empty() && (!draft_heads || !drafting->predicts());
        if (bank[id].n_nodes() > 1 && asks_model) {
            draft_from_model(bank[id]);
        } else if (bank[id].n_nodes() > 1 && draft_heads) {
            draft_heads->draft(bank[id], draft_input(), tokens);
        } else if (bank[id].n_nodes() > 1) {
            draft_from_rows(bank[id]);
        }
        return id;
    }
    if (policy.mixes()) {
        mix(s);
        return (int32_t) bank.size();
    }

    const bool   sees_path = draft_heads->sees_path();
    const auto & nodes     = policy.grow(s, running.get(), room(), draft_heads->n_heads(), sees_path,
                                         [&](int32_t l, int32_t n) { return expand(l, n); });

    grown.parent.assign(1, -1);
    grown.rank.assign(1, 0);
    grown.depth.assign(1, 0);
    for (const auto & node : nodes) {
        grown.parent.push_back(node.parent);
        grown.rank.push_back(node.rank);
        grown.depth.push_back(node.depth);

        const int32_t column = sees_path ? node.column : 0;
        tokens.push_back(guess[((node.depth - 1) * grower::max_width + column) * grower::n_guess + node.rank]);
    }
    return (int32_t) bank.size();
}

} // namespace entmtp
