// The part of a tree that takes time to be guessed: what heads and a model say, asked for as long as it pays.

#include "mixer.h"

#include <algorithm>
#include <cmath>

namespace entmtp {

// new guesses are there: all is judged anew, and what costs nothing may go on from them
void mixer::use(const situation & now) {
    judge(now);
    for (candidate & c : found) {
        if (!(c.sources & from_heads)) {
            c.raw = (c.parent < 0 ? 0.0f : found[c.parent].raw) + std::log(std::max(c.q, 1e-6f));
        }
    }
    grow_cheap(now);
    weigh();
}

//
// heads
//

// what is already proposed after a candidate, as a probability
float mixer::covered(int32_t at) const {
    float sum = 0.0f;
    for (int32_t i = first_child(at); i >= 0; i = found[i].next) {
        sum += found[i].p > 0.0f ? found[i].q : 0.0f; // others may not enter the tree
    }
    return std::min(sum, 1.0f);
}

// does it pay to run head l, alone or with the ones below it, after this candidate?
bool mixer::pays(int32_t l, int32_t at, int32_t n_heads, const situation & now) {
    const float path  = at < 0 ? 0.0f : found[at].raw;
    const float above = at < 0 || found[at].parent < 0 ? 0.0f : found[found[at].parent].raw;
    const float a     = sigmoid(heads.foresee(l, path, path - above, now.signals, now.running));
    // what others propose, the heads need not
    const float p     = (at < 0 ? 1.0f : found[at].p) * (1.0f - covered(at));

    const float * scenarios = heads.foreseen(l, a);
    const size_t  size      = (size_t) heads.n_levels * 3;

    double t_chain = 0.0;
    for (int32_t to = l + 1; to <= n_heads; ++to) {
        t_chain += now.price * now.cost.level(to - 1, 1);
        double        sum = 0.0;
        const float * row = scenarios;
        for (int32_t i = 0; i < heads.n_scenarios; ++i, row += size) {
            trial = probs;
            for (int32_t j = 3 * l; j < 3 * to; ++j) {
                const float x = p * row[j];
                trial.insert(std::upper_bound(trial.begin(), trial.end(), x, std::greater<float>()), x);
            }
            sum += best_pass(trial, fee);
        }
        if (sum / heads.n_scenarios - t_chain > worth) {
            return true;
        }
    }
    return false;
}

// after how many paths? As many as have a guess below them that may enter the tree
int32_t mixer::width(int32_t l, const std::vector<int32_t> & front, const situation & now) const {
    if (!now.sees_path || l == 0) {
        return (int32_t) front.size();                     // they cost nothing to heads that do not see the path
    }
    const float  a    = std::max(0.3f, found[front[0]].q); // as sure as on the level above
    const double node = n_best > 1 ? (fee[n_best - 1] - fee[0]) / (n_best - 1) : fee[1] - fee[0];
    double       gain = 0.0;
    int32_t      n    = 1;
    for (int32_t c = 1; c < (int32_t) front.size(); ++c) {
        gain += std::max(0.0, a * found[front[c]].p * (1.0 - covered(front[c])) - node);
        if ((c == 1 || c == 3) && gain > now.price * (now.cost.level(l, c + 1) - now.cost.level(l, 1))) {
            n = c + 1;
        }
    }
    return n;
}

// guesses of head l become children of the front
void mixer::merge_guesses(int32_t l, const std::vector<int32_t> & front, int32_t n, const situation & now) {
    for (int32_t c = 0; c < n; ++c) {
        const int32_t   at     = front[c];
        const int32_t   column = now.sees_path ? c : 0;
        const int32_t * token  = &guess[(size_t) column * n_guess];
        const float *   lp     = &log_p[(size_t) column * n_guess];
        const float     above  = at < 0 ? 0.0f : found[at].raw;
        const float     spread = spread_of(lp, n_guess);
        for (int32_t r = 0; r < n_guess; ++r) {
            const int32_t i = propose(at, token[r], from_heads);
            if (i < 0) {
                return;
            }
            found[i].signals.head = heads.logit(l, r, lp[r], above, spread, now.signals, now.running);
            found[i].raw          = above + lp[r];
        }
    }
}

void mixer::ask_heads(const situation & now, const expand_fn & expand) {
    const int32_t n_heads =
        has_heads && (now.allowed & from_heads) ? std::min({ now.n_heads, heads.n_levels, now.cost.n_levels() }) : 0;

    std::vector<int32_t> front;
    std::vector<int32_t> paths;
    for (int32_t l = 0; l < n_heads; ++l) {
        front.clear();
        if (l == 0) {
            front.push_back(-1);
        } else {
            for (size_t i = 0; i < found.size(); ++i) {
                if (found[i].depth == l && found[i].p > 0.0f) {
                    front.push_back((int32_t) i);
                }
            }
            const size_t n = std::min<size_t>(front.size(), max_width);
            std::partial_sort(front.begin(), front.begin() + (ptrdiff_t) n, front.end(),
                              [&](int32_t a, int32_t b) { return found[a].p > found[b].p; });
            front.resize(n);
        }
        if (front.empty() || (!((now.forced & from_heads) && l == 0) && !pays(l, front[0], n_heads, now))) {
            break;
        }

        const int32_t n     = width(l, front, now);
        const int32_t n_run = now.sees_path ? n : 1;
        paths.clear();
        for (int32_t c = 0; c < n_run && now.sees_path; ++c) {
            path_to(front[c], tail);
            paths.push_back(now.text.back());
            paths.insert(paths.end(), tail.begin(), tail.end());
        }
        guess.resize((size_t) n_run * n_guess);
        log_p.resize((size_t) n_run * n_guess);
        expand(l, paths, n_run, guess.data(), log_p.data());
        t_heads += now.cost.level(l, n_run);
        n_levels_run = l + 1;

        merge_guesses(l, front, n, now);
        use(now);
    }
}

//
// a model
//

// the most probable child that may enter the tree, of a candidate or (-1) the root; -1: there is none
int32_t mixer::best_child(int32_t at) const {
    int32_t best = -1;
    for (int32_t i = first_child(at); i >= 0; i = found[i].next) {
        best = found[i].p > least && (best < 0 || found[i].p > found[best].p) ? i : best;
    }
    return best;
}

int32_t mixer::bin_of(int32_t at, const situation & now) const {
    return at < 0 ? foresight::after_root(now.running) : foresight::after_node(found[at].q);
}

// Does its next guess, after a path of l tokens, pay, alone or with those that come after it?
bool mixer::model_pays(int32_t at, int32_t l, const situation & now, const asked_model & model) const {
    static constexpr int32_t most = 4; // guesses ahead

    const foresight::bin & scenarios = ahead.of(bin_of(at, now));
    // what others propose there, it need not
    const float            p         = (at < 0 ? 1.0f : found[at].p) * (1.0f - covered(at));

    double t = 0.0;
    for (int32_t n = 1; n <= std::min(most, model.depth - l); ++n) {
        t += now.price * model.cost(l + n - 1);
        double sum = 0.0;
        for (const foresight::scenario & s : scenarios) {
            trial      = probs;
            float path = p;
            for (int32_t i = 0; i < n; ++i, path *= s[0]) { // as sure further down
                for (const float x : s) {
                    trial.insert(std::upper_bound(trial.begin(), trial.end(), path * x, std::greater<float>()),
                                 path * x);
                }
            }
            sum += best_pass(trial, fee);
        }
        if (sum / scenarios.n - t > worth) {
            return true;
        }
    }
    return false;
}

void mixer::ask_model(const situation & now, const asked_model & model) {
    if (!(now.allowed & from_model)) {
        return;
    }
    int32_t at = -1;
    for (int32_t l = 0; l < model.depth; ++l) {
        if (!((now.forced & from_model) && l == 0) && !model_pays(at, l, now, model)) {
            return;
        }
        path_to(at, tail);
        guess.resize(n_guess);
        log_p.resize(n_guess);
        t_model += model.cost(l);
        const std::vector<int32_t> path = tail; // opening candidates uses `tail`
        if (!model.guess(path, guess.data(), log_p.data())) {
            return;
        }
        n_model_run = l + 1;

        const int32_t bin = bin_of(at, now);
        for (int32_t r = 0; r < n_guess; ++r) {
            if (const int32_t i = propose(at, guess[r], from_model); i >= 0) {
                found[i].signals.model = log_p[r];
            }
        }
        use(now);

        foresight::scenario best = {};
        for (int32_t i = first_child(at); i >= 0; i = found[i].next) {
            if (found[i].sources & from_model) {
                float q = found[i].q;
                for (float & b : best) {
                    if (q > b) {
                        std::swap(q, b);
                    }
                }
            }
        }
        ahead.see(bin, best);

        at = best_child(at);
        if (at < 0) {
            return;
        }
    }
}

} // namespace entmtp
