// What a decoder does for the others that share its passes.

#include "decoder.h"

#include <algorithm>
#include <stdexcept>

namespace entmtp {

// the pass had no room for some nodes of a grown tree
void decoder::drop_nodes(const std::vector<int32_t> & kept) {
    grown.parent = work.parent;
    grown.depth  = work.depth;
    grown.rank.assign(kept.size(), 0);
    tokens = work.tokens;
    std::vector<uint32_t> left;
    for (const int32_t i : kept) {
        left.push_back(sources[i]);
    }
    sources = left;
    reach   = work.p;
    policy.drop_nodes(kept);
}

void decoder::detach() {
    settle();
    if (live && row >= 0) {
        set_row(out.keep(row));
    }
}

int32_t decoder::in_common(const int32_t * toks, int32_t n) const {
    int32_t i = 0;
    while (i < std::min(n, n_past) && text[i] == toks[i]) {
        ++i;
    }
    return i;
}

int32_t decoder::share(const decoder & from, const int32_t * toks, int32_t n) {
    if (&from == this || &from.shared != &shared) {
        throw std::runtime_error("share: it is not another sequence of the same group");
    }
    n = from.in_common(toks, std::min(n, n_ctx));
    if (n == 0 || !memory.can_share(from.seq, n)) {
        return 0;
    }
    settle();
    memory.truncate(seq, 0);
    memory.share(from.seq, seq, n);
    invalidate(n);
    set_text(toks, n);
    return n;
}

void decoder::clear() {
    settle();
    memory.truncate(seq, 0);
    invalidate(0);
}

} // namespace entmtp
