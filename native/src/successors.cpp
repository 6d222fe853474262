#include "successors.h"

#include <algorithm>

namespace entmtp {

void successors::see(int32_t n_vocab, int32_t token, const int32_t * best, const float * log_p, int32_t n) {
    if (token < 0 || token >= n_vocab) {
        return;
    }
    if ((int32_t) index.size() < n_vocab) {
        index.resize(n_vocab, -1);
    }
    if (index[token] < 0) {
        index[token] = (int32_t) rows.size();
        rows.emplace_back();
    }
    row & r = rows[index[token]];
    r.n     = std::min(n, k);
    std::copy(best, best + r.n, r.token);
    std::copy(log_p, log_p + r.n, r.log_p);
}

const successors::row * successors::after(int32_t token) const {
    if (token < 0 || token >= (int32_t) index.size() || index[token] < 0) {
        return nullptr;
    }
    return &rows[index[token]];
}

void successors::forget() {
    index.clear();
    rows.clear();
}

} // namespace entmtp
