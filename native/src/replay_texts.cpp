// The auto policy over recorded texts: the mixer of the decode loop, fed with what was recorded.

#include "entropy.h"
#include "replay.h"
#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace entmtp {

namespace {

void check(const entmtp_texts * t, const entmtp_policy_params * p, const void * costs, const void * steps) {
    if (!t || !p || !steps || !costs) {
        throw std::runtime_error("replay: a pointer is missing");
    }
    if (p->policy != ENTMTP_POLICY_AUTO) {
        throw std::runtime_error("replay: of texts there is only the auto policy");
    }
    if (p->drafters & ENTMTP_SOURCE_MODEL) {
        throw std::runtime_error("replay: a model that drafts cannot be asked");
    }
    if (t->n_texts < 0 || !t->n_prompt || !t->n_tokens || !t->tokens || !t->signals || t->n_best < 1 || !t->best ||
        !t->log_p) {
        throw std::runtime_error("texts: a table is missing");
    }
    for (int32_t i = 0; i < t->n_texts; ++i) {
        if (t->n_prompt[i] < 1 || t->n_tokens[i] < 1) {
            throw std::runtime_error("texts: a text has no prompt, or no tokens");
        }
    }
}

// heads look embeddings up by token, and a table has a place for each
void check_tokens(const entmtp_texts & t, int32_t n_vocab) {
    const auto check = [n_vocab](const int32_t * tokens, int64_t n, int32_t lowest) {
        const auto * end   = tokens + n;
        const auto * wrong = std::find_if(tokens, end, [&](int32_t x) { return x < lowest || x >= n_vocab; });
        if (wrong != end) {
            throw std::runtime_error("texts: token " + std::to_string(*wrong) +
                                     " is not in the vocabulary; record the traces again");
        }
    };
    int64_t n_prompt = 0, n = 0;
    for (int32_t i = 0; i < t.n_texts; ++i) {
        n_prompt += t.n_prompt[i];
        n += t.n_tokens[i];
    }
    check(t.tokens, n_prompt + n, 0);
    check(t.best, n * t.n_best, -1);
}

} // namespace

int64_t replay_texts(const entmtp_texts *         recorded,
                     heads *                      guessing,
                     const entmtp_policy_params * params,
                     const entmtp_costs *         true_costs,
                     uint32_t                     without,
                     entmtp_step *                steps,
                     int64_t                      n_max,
                     entmtp_proposal *            samples,
                     int64_t *                    n_samples) {
    check(recorded, params, true_costs ? true_costs : params ? params->costs : nullptr, steps);
    if (samples && !n_samples) {
        throw std::runtime_error("replay: a pointer is missing");
    }
    const entmtp_texts & t       = *recorded;
    const bool           by_head = guessing && t.states && (params->drafters & ENTMTP_SOURCE_HEADS);
    const int32_t        n_embd  = guessing ? guessing->info().n_embd : 0;
    const int32_t        n_heads = by_head ? guessing->n_heads() : 0;
    const int32_t        n_best  = std::min(t.n_best, successors::k);
    check_tokens(t, guessing ? guessing->info().n_vocab : ENTMTP_MAX_VOCAB);

    entmtp_policy_params own = *params;
    own.drafters &= by_head ? ~0u : ~(uint32_t) ENTMTP_SOURCE_HEADS;
    const entmtp_costs & costs = true_costs ? *true_costs : *params->costs;
    scheduler            policy(own, 1);
    const cost_model     truth(costs, 1, false);
    if (n_heads > truth.n_levels()) {
        throw std::runtime_error("replay: there are costs of fewer heads than draft");
    }

    int64_t n_steps = 0, n_seen = 0, n_samples_max = 0;
    for (int32_t k = 0; k < t.n_texts; ++k) {
        n_samples_max += (int64_t) t.n_tokens[k] * ENTMTP_MAX_SAMPLES;
    }
    policy.learned().study(without, [&](uint32_t set, const float * x, float p, bool right) {
        if (samples) {
            if (n_seen == n_samples_max) {
                throw std::runtime_error("texts: more samples than there is room for");
            }
            entmtp_proposal & s = samples[n_seen++];
            s                   = { (int32_t) n_steps, set, right ? 1 : 0, p, {} };
            std::copy(x, x + ENTMTP_N_INPUTS, s.inputs);
        }
    });

    int32_t n_vocab = 0;
    int64_t n       = 0;
    for (int32_t k = 0; k < t.n_texts; ++k) {
        n += t.n_prompt[k] + t.n_tokens[k];
    }
    for (int64_t i = 0; i < n; ++i) {
        n_vocab = std::max(n_vocab, t.tokens[i] + 1);
    }

    text_index           text;
    successors           rows;
    std::vector<int32_t> path;
    const int32_t *      token = t.tokens; // the first generated one of the text is token[n_prompt]
    int64_t              begin = 0;        // its index among all generated ones

    for (int32_t k = 0; k < t.n_texts; token += t.n_prompt[k] + t.n_tokens[k], begin += t.n_tokens[k], ++k) {
        const int32_t n_prompt = t.n_prompt[k];
        const int32_t end      = t.n_tokens[k] - 1; // the last token is sampled, not evaluated
        ema           running(policy.window());
        policy.begin_text();
        text.truncate(0);
        for (int32_t i = 0; i < n_prompt; ++i) {
            text.append(token[i]);
        }
        int32_t    seen = 0; // tokens whose distribution was looked at
        const auto look = [&] {
            const int64_t   at    = (begin + seen) * t.n_best;
            const int32_t * best  = t.best + at;
            const int32_t   known = (int32_t) (std::find(best, best + n_best, -1) - best);
            running.add(t.signals[begin + seen].entropy);
            rows.see(n_vocab, token[n_prompt + seen - 1], best, t.log_p + at, known);
            ++seen;
        };

        for (int32_t i = 0; i < end;) {
            if (n_steps == n_max) {
                throw std::runtime_error("texts: more steps than there is room for");
            }
            while (seen <= i) {
                look();
            }
            const int32_t root = token[n_prompt + i];
            text.append(root);

            double     t_draft = 0.0;
            const auto expand  = [&](int32_t l, const std::vector<int32_t> & paths, int32_t n_paths, int32_t * best,
                                     float * log_p) {
                t_draft += truth.level(l, n_paths);
                guessing->expand(l, { t.states + (begin + i) * n_embd, nullptr, { 0 } }, paths.data(), n_paths,
                                 mixer::n_guess, best, log_p);
            };
            const entmtp_signals & s  = t.signals[begin + i];
            const int32_t          id = policy.choose(s, running.get(), 0.0f, 1 << 20, { 1 }, { 0 });

            const std::vector<mixer::node> none;
            const auto & nodes = id == scheduler::grow_tree ? policy.mix(text, rows, s, running.get(), 1 << 20, n_heads,
                                                                         by_head && guessing->sees_path(), expand, {})
                                                            : none;
            const int32_t size = 1 + (int32_t) nodes.size();

            entmtp_step & out = steps[n_steps];
            out               = {};
            path.assign(1, 0);
            while (i + (int32_t) path.size() < end) {
                const int32_t came = token[n_prompt + i + (int32_t) path.size()];
                const auto    hit  = std::find_if(nodes.begin(), nodes.end(), [&](const mixer::node & node) {
                    return node.parent == path.back() && node.token == came;
                });
                if (hit == nodes.end()) {
                    break;
                }
                path.push_back(1 + (int32_t) (hit - nodes.begin()));
                out.n_by[first_of(hit->sources)]++;
            }
            const int32_t n_path = (int32_t) path.size();
            for (int32_t j = 1; j < n_path; ++j) {
                text.append(token[n_prompt + i + j]);
            }
            const int32_t next     = i + n_path < end ? token[n_prompt + i + n_path] : -1;
            const double  t_verify = truth.verify(size);

            out.entropy     = running.get();
            out.tree        = size == 1 ? 0 : 1;
            out.n_nodes     = size;
            out.n_accepted  = n_path - 1;
            out.t_draft_us  = (int32_t) std::lround(t_draft);
            out.t_verify_us = (int32_t) std::lround(t_verify);
            policy.observe(id, size, { path, -1, next, t_draft, t_verify });
            n_steps++;
            i += n_path;
        }
        while (seen < t.n_tokens[k]) {
            look();
        }
    }
    if (n_samples) {
        *n_samples = n_seen;
    }
    return n_steps;
}

} // namespace entmtp
