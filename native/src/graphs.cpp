#include "graphs.h"

#include <algorithm>

namespace entmtp {

int32_t graph_sizes::index(int32_t n) {
    int32_t i = 0;
    while ((1 << i) < n && i < n_sizes - 1) {
        ++i;
    }
    return i;
}

int32_t graph_sizes::round(int32_t n) const {
    const int32_t largest = 1 << (n_sizes - 2);
    return build > 0.0 && n <= largest ? 1 << index(n) : n;
}

double graph_sizes::charge(int32_t n) const {
    const size & s = sizes[index(n)];
    return s.n_runs < 0 ? build / s.usual : 0.0;
}

bool graph_sizes::see(int32_t n, bool built) {
    if (build <= 0.0) {
        return !built;
    }
    size & s = sizes[index(n)];
    if (built && s.n_runs > 0) {
        // the cache has grown: all graphs are out of date
        for (size & old : sizes) {
            if (old.n_runs >= 0) {
                old.usual = std::max(1.0, (old.usual + old.n_runs) / 2);
            }
            old.n_runs = -1;
        }
    }
    s.n_runs = built ? 0 : s.n_runs + 1;
    return s.n_runs >= n_first;
}

} // namespace entmtp
