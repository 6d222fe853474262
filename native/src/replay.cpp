#include "replay.h"

#include "entropy.h"
#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace entmtp {

namespace {

// what would have been drafted after one token of a trace
struct position {
    const entmtp_trace & trace;
    int64_t              i;

    const int32_t * rank() const { return trace.rank + i * trace.n_heads; }

    int32_t n_rows() const { return trace.sees_path ? 1 + 4 * (trace.n_heads - 1) : trace.n_heads; }

    // ln p [..][n_guess] of head l after its expanded paths
    const float * log_p(int32_t l) const {
        const int32_t row = trace.sees_path ? (l == 0 ? 0 : 1 + 4 * (l - 1)) : l;
        return trace.log_p + (i * n_rows() + row) * trace.n_guess;
    }

    // product of the heads' top-1 probabilities down the greedy path
    float greedy_path() const {
        float sum = 0.0f;
        for (int32_t l = 0; l < trace.n_heads; ++l) {
            sum += log_p(l)[0];
        }
        return std::exp(sum);
    }

    // nodes of a tree that the real tokens follow, the root first; `end` is the first token that is not evaluated
    std::vector<int32_t> walk(const tree & t, int64_t end) const {
        std::vector<int32_t> path = { 0 };
        for (int32_t d = 0; d < trace.n_heads && i + 1 + d < end && rank()[d] >= 0; ++d) {
            const int32_t child = t.find_child(path.back(), t.rank, rank()[d]);
            if (child < 0) {
                break;
            }
            path.push_back(child);
        }
        return path;
    }
};

} // namespace

// one policy over all texts
static int64_t replay(const entmtp_trace &         trace,
                      const std::vector<tree> &    bank,
                      const entmtp_policy_params & params,
                      const entmtp_costs &         truth_table,
                      entmtp_step *                steps,
                      int64_t                      n_max) {
    scheduler        policy(params, (int32_t) bank.size());
    const cost_model truth(truth_table, (int32_t) bank.size(), false);

    if ((params.policy == ENTMTP_POLICY_CONFIDENCE || policy.needs_path()) &&
        (!trace.log_p || trace.n_guess != grower::n_guess || trace.n_heads > truth.n_levels())) {
        throw std::runtime_error("trace: it holds no probabilities of the heads, record it again");
    }

    std::vector<int32_t> n_nodes, depth;
    for (const auto & t : bank) {
        n_nodes.push_back(t.n_nodes());
        depth.push_back((int32_t) t.levels.size());
        if (depth.back() > trace.n_heads) {
            throw std::runtime_error("trace: a tree is deeper than the heads that were recorded");
        }
    }

    tree    grown;       // parents and ranks of the step's, where the policy grows its own
    int64_t n_steps = 0;
    int64_t begin   = 0; // first token of the text

    for (int32_t text = 0; text < trace.n_texts; begin += trace.n_tokens[text++]) {
        ema running(policy.window());
        policy.begin_text();

        const int64_t end  = begin + trace.n_tokens[text] - 1; // the last token is sampled, not evaluated
        int64_t       seen = begin;                            // tokens whose entropy was counted

        for (int64_t i = begin; i < end;) {
            if (n_steps == n_max) {
                throw std::runtime_error("trace: more steps than there is room for");
            }
            while (seen <= i) {
                running.add(trace.signals[seen++].entropy);
            }

            const position         at = { trace, i };
            const entmtp_signals & s  = trace.signals[i];

            double t_draft = 0.0;
            float  product = 0.0f;
            if (policy.needs_path()) {
                product = at.greedy_path();
                for (int32_t l = 0; l < trace.n_heads; ++l) {
                    t_draft += truth.level(l, 1);
                }
            }

            const int32_t id = policy.choose(s, running.get(), product, 1 << 20, n_nodes, depth);

            if (id == scheduler::grow_tree) {
                const auto & nodes =
                    policy.grow(s, running.get(), 1 << 20, trace.n_heads, trace.sees_path, [&](int32_t l, int32_t n) {
                        t_draft += truth.level(l, n);
                        return at.log_p(l);
                    });
                grown.parent.assign(1, -1);
                grown.rank.assign(1, 0);
                for (const auto & node : nodes) {
                    grown.parent.push_back(node.parent);
                    grown.rank.push_back(node.rank);
                }
            } else if (n_nodes[id] > 1) {
                t_draft += truth.draft(id);
            }

            const tree &               t    = id == scheduler::grow_tree ? grown : bank[id];
            const int32_t              size = t.n_nodes();
            const std::vector<int32_t> path = at.walk(t, end);

            const double  t_verify = truth.verify(size);
            const int32_t hit      = i + 1 < end && at.rank()[0] >= 0 ? (at.rank()[0] == 0 ? 1 : 0) : -1;
            policy.observe(id, size, { path, hit, -1, t_draft, t_verify });

            entmtp_step & out = steps[n_steps++];

            out             = {};
            out.entropy     = running.get();
            out.tree        = size == 1 ? 0 : id == scheduler::grow_tree ? (int32_t) bank.size() : id;
            out.n_nodes     = size;
            out.n_accepted  = (int32_t) path.size() - 1;
            out.t_draft_us  = (int32_t) std::lround(t_draft);
            out.t_verify_us = (int32_t) std::lround(t_verify);

            i += (int64_t) path.size();
        }
    }
    return n_steps;
}

int64_t replay(const entmtp_trace *         trace,
               const std::vector<tree> &    bank,
               const entmtp_policy_params * params,
               const entmtp_costs *         truth,
               entmtp_step *                steps,
               int64_t                      n_max) {
    if (params && params->policy == ENTMTP_POLICY_AUTO) {
        throw std::runtime_error("replay: ranks alone do not tell what the auto policy drafts, texts do");
    }
    if (!trace || !params || !steps || (!truth && !params->costs)) {
        throw std::runtime_error("replay: a pointer is missing");
    }
    if (trace->n_texts < 0 || !trace->n_tokens || !trace->signals || !trace->rank || trace->n_heads < 1) {
        throw std::runtime_error("trace: a table is missing");
    }
    for (int32_t i = 0; i < trace->n_texts; ++i) {
        if (trace->n_tokens[i] < 1) {
            throw std::runtime_error("trace: a text has no tokens");
        }
    }
    return replay(*trace, bank, *params, truth ? *truth : *params->costs, steps, n_max);
}

} // namespace entmtp
