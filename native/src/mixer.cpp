#include "mixer.h"

#include <algorithm>
#include <cmath>

namespace entmtp {

static constexpr float hits_start = 0.5f;
static constexpr float hits_rate  = 2.0f / 33.0f; // a window of 32 steps

mixer::mixer(const entmtp_calibration * c, const float * weights, bool adapt) : accept(weights, adapt) {
    if (c) {
        heads     = calibration(*c);
        has_heads = true;
    }
    std::fill(hits, hits + n_sources, hits_start);
}

void mixer::begin_text() {
    std::fill(hits, hits + n_sources, hits_start);
    heads.begin_text();
}

void mixer::skip() {
    heads.skip();
    found.clear();
    nodes.clear();
    root_first = -1;
}

//
// proposals
//

// the child of a candidate (-1: of the root) that carries the token, a new one if need be; -1: there are too many
int32_t mixer::propose(int32_t parent, int32_t token, source from) {
    int32_t * link = parent < 0 ? &root_first : &found[parent].first;
    while (*link >= 0) {
        candidate & c = found[*link];
        if (c.token == token) {
            c.sources |= from;
            return *link;
        }
        link = &c.next;
    }
    if ((int32_t) found.size() >= max_found) {
        return -1;
    }
    *link = (int32_t) found.size(); // before found grows: link may point into it

    candidate c = {};
    c.token     = token;
    c.parent    = parent;
    c.depth     = parent < 0 ? 1 : found[parent].depth + 1;
    c.sources   = from;
    c.first     = -1;
    c.next      = -1;
    found.push_back(c);
    return (int32_t) found.size() - 1;
}

// places are grouped by the token that followed; the longest match comes first
void mixer::from_places(int32_t parent, const std::vector<text_index::place> & from, const text_index & text) {
    int32_t rank = 0;
    for (size_t i = 0; i < from.size(); ++i) {
        const int32_t token = text[from[i].at];
        const auto    same  = [&](const text_index::place & p) {
            return text[p.at] == token;
        };
        if (token < 0 || std::any_of(from.begin(), from.begin() + (ptrdiff_t) i, same)) {
            continue;
        }
        const int32_t at = propose(parent, token, from_text);
        if (at < 0) {
            return;
        }
        candidate & c    = found[at];
        c.signals.length = (float) from[i].length;
        c.signals.rank   = (float) rank++;
        c.places         = (int32_t) pool.size();
        for (size_t j = i; j < from.size(); ++j) {
            if (same(from[j])) {
                pool.push_back({ from[j].at + 1, std::min(from[j].length + 1, text_index::max_match) });
            }
        }
        c.n_places      = (int32_t) pool.size() - c.places;
        c.signals.share = (float) c.n_places / (float) from.size();
    }
}

void mixer::path_to(int32_t at, std::vector<int32_t> & tokens) const {
    tokens.clear();
    for (; at >= 0; at = found[at].parent) {
        tokens.push_back(found[at].token);
    }
    std::reverse(tokens.begin(), tokens.end());
}

// look for the children of a candidate, -1: of the root, in the text and in the rows
void mixer::open(int32_t at, const situation & now) {
    const int32_t token = at < 0 ? now.text.back() : found[at].token;
    if (at >= 0) {
        found[at].open = true;
    } else {
        root_open = true;
    }
    places.clear();
    if (at < 0) {
        now.text.match(nullptr, 0, places);
    } else if (found[at].n_places > 0) {
        const auto from = pool.begin() + found[at].places;
        places.assign(from, from + found[at].n_places);
        places.erase(std::remove_if(places.begin(), places.end(),
                                    [&](const text_index::place & p) { return !now.text.holds(p.at); }),
                     places.end());
    }
    if (places.empty() && at >= 0) {
        path_to(at, tail); // another place may know how to go on
        now.text.match(tail.data(), (int32_t) tail.size(), places);
    }
    from_places(at, places, now.text);

    if (const successors::row * row = now.rows.after(token)) {
        for (int32_t r = 0; r < std::min(row->n, n_rows); ++r) {
            if (const int32_t c = propose(at, row->token[r], from_rows); c >= 0) {
                found[c].signals.row = row->log_p[r];
            }
        }
    }
}

//
// how probable they are
//

void mixer::judge_children(int32_t first, float above, const situation & now) {
    float sum = 0.0f;
    for (int32_t i = first; i >= 0; i = found[i].next) {
        candidate & c     = found[i];
        c.signals.entropy = now.running;
        c.signals.depth   = (float) c.depth;
        std::copy(hits, hits + n_sources, c.signals.hits);
        c.q = accept.probability(c.sources, c.signals);
        sum += c.q;
    }
    // one of them at most is right
    const float scale = sum > 1.0f ? 1.0f / sum : 1.0f;
    int32_t     best  = -1;
    for (int32_t i = first; i >= 0; i = found[i].next) {
        candidate & c = found[i];
        c.q *= scale;
        c.p  = (c.sources & now.allowed) ? above * c.q : 0.0f;
        best = best < 0 || c.p > found[best].p ? i : best;
    }
    for (int32_t i = first; i >= 0 && now.chain; i = found[i].next) {
        found[i].p = i == best ? found[i].p : 0.0f;
    }
}

// parents come before their children
void mixer::judge(const situation & now) {
    judge_children(root_first, 1.0f, now);
    for (size_t i = 0; i < found.size(); ++i) {
        if (found[i].first >= 0) {
            judge_children(found[i].first, found[i].p, now);
        }
    }
}

// open candidates, the most probable first, until none is left that could pay
void mixer::grow_cheap(const situation & now) {
    queue.clear();
    const auto wait = [&](int32_t first) {
        for (int32_t i = first; i >= 0; i = found[i].next) {
            if (!found[i].open && found[i].p > least && found[i].depth < max_depth) {
                queue.push_back({ found[i].p, i });
                std::push_heap(queue.begin(), queue.end());
            }
        }
    };
    if (!root_open) {
        open(-1, now);
        judge_children(root_first, 1.0f, now);
    }
    wait(root_first);
    for (size_t i = 0; i < found.size(); ++i) {
        wait(found[i].first);
    }
    while (!queue.empty() && (int32_t) found.size() < max_found) {
        std::pop_heap(queue.begin(), queue.end());
        const int32_t at = queue.back().second;
        queue.pop_back();
        if (found[at].open) {
            continue;
        }
        open(at, now);
        judge_children(found[at].first, found[at].p, now);
        wait(found[at].first);
    }
}

void mixer::sort_probs() {
    probs.clear();
    for (const candidate & c : found) {
        if (c.p > least) {
            probs.push_back(c.p);
        }
    }
    std::sort(probs.begin(), probs.end(), std::greater<float>());
}

//
// a tree
//

// what the best pass over all that was found has, and brings
void mixer::weigh() {
    sort_probs();
    n_best = 1;
    worth  = best_pass(probs, fee, &n_best);
}

const std::vector<mixer::node> &
mixer::grow(const situation & now, const expand_fn & expand, const asked_model & model) {
    found.clear();
    pool.clear();
    nodes.clear();
    root_first   = -1;
    root_open    = false;
    t_heads      = 0.0;
    t_model      = 0.0;
    n_levels_run = 0;
    n_model_run  = 0;
    candidate_of.assign(1, -1);
    std::fill(by_source, by_source + n_sources, 0);
    std::fill(best_of, best_of + n_sources, -1);

    now.cost.fees(now.price, now.n_max, fee, now.n_others);
    if (fee.size() < 2) {
        return nodes;
    }
    double step = fee[1] - fee[0];
    for (size_t n = 2; n < fee.size(); ++n) {
        step = std::min(step, (fee[n] - fee[0]) / (double) n);
    }
    least = (float) std::clamp(0.8 * step, 0.01, 0.9);

    grow_cheap(now);
    weigh();
    ask_heads(now, expand);
    ask_model(now, model);

    // the best guess of each drafter at the root
    for (int32_t s = 0; s < n_sources; ++s) {
        for (int32_t i = root_first; i >= 0; i = found[i].next) {
            const bool better = best_of[s] < 0 || found[i].q > found[best_of[s]].q;
            best_of[s]        = (found[i].sources & (1u << s)) && better ? i : best_of[s];
        }
    }
    if (now.forced && n_best == 1 && !probs.empty()) {
        n_best = 2;
    }
    if (n_best == 1) {
        return nodes;
    }

    // the n_best - 1 most probable candidates; among equals the upper ones, so that every parent is among them
    order.clear();
    for (size_t i = 0; i < found.size(); ++i) {
        if (found[i].p > least) {
            order.push_back((int32_t) i);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return found[a].p != found[b].p ? found[a].p > found[b].p : found[a].depth < found[b].depth;
    });
    order.resize(std::min<size_t>(order.size(), (size_t) n_best - 1));
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return found[a].depth < found[b].depth; });

    std::vector<int32_t> place(found.size(), -1);
    for (const int32_t i : order) {
        const candidate & c = found[i];
        nodes.push_back({ c.parent < 0 ? 0 : place[c.parent], c.depth, c.token, c.sources & now.allowed, c.p });
        place[i] = (int32_t) nodes.size();
        candidate_of.push_back(i);
        by_source[first_of(c.sources & now.allowed)]++;
    }
    return nodes;
}

void mixer::drop_nodes(const std::vector<int32_t> & kept) {
    std::vector<node>    left;
    std::vector<int32_t> place(nodes.size() + 1, 0), candidates;
    std::fill(by_source, by_source + n_sources, 0);
    for (const int32_t i : kept) {
        place[i] = (int32_t) candidates.size();
        candidates.push_back(candidate_of[i]);
        if (i > 0) {
            left.push_back(nodes[i - 1]);
            left.back().parent = place[left.back().parent];
            by_source[first_of(left.back().sources)]++;
        }
    }
    nodes        = std::move(left);
    candidate_of = std::move(candidates);
}

void mixer::observe(const std::vector<int32_t> & path, int32_t next) {
    if (candidate_of.empty()) {
        return;
    }
    const auto token_of = [&](size_t i) {
        return i < path.size() ? found[candidate_of[path[i]]].token : next;
    };

    // what was proposed after every place that was reached
    for (size_t i = 0; i < path.size(); ++i) {
        const int32_t came = token_of(i + 1);
        if (came < 0) {
            break;
        }
        const int32_t at = candidate_of[path[i]];
        for (int32_t c = at < 0 ? root_first : found[at].first; c >= 0; c = found[c].next) {
            accept.observe(found[c].sources, found[c].signals, found[c].token == came);
        }
    }
    const int32_t came = token_of(1);
    for (int32_t s = 0; s < n_sources && came >= 0; ++s) {
        if (best_of[s] >= 0) {
            hits[s] += ((found[best_of[s]].token == came ? 1.0f : 0.0f) - hits[s]) * hits_rate;
        }
    }
    if (n_levels_run == 0) {
        heads.skip();
    } else if (came >= 0 && best_of[2] >= 0) {
        heads.observe(found[best_of[2]].token == came);
    }
}

} // namespace entmtp
