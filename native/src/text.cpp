#include "text.h"

#include <algorithm>

namespace entmtp {

// a chain is named by a place's token and the one before
size_t text_index::bucket(int32_t a, int32_t b) const {
    const uint64_t key = ((uint64_t) (uint32_t) a << 32 | (uint32_t) b) * 0x9E3779B97F4A7C15ull; // Fibonacci hashing
    return (size_t) (key >> 32) & (heads.size() - 1);
}

void text_index::append(int32_t token) {
    tokens.push_back(token);
    before.push_back(-1);
    if (tokens.size() > heads.size()) {
        rehash();
        return;
    }
    const size_t i = tokens.size() - 1;
    if (i > 0) {
        int32_t & head = heads[bucket(tokens[i - 1], token)];
        before[i]      = head;
        head           = (int32_t) i;
    }
}

void text_index::rehash() {
    heads.assign(std::max<size_t>(1024, 2 * heads.size()), -1);
    for (size_t i = 1; i < tokens.size(); ++i) {
        int32_t & head = heads[bucket(tokens[i - 1], tokens[i])];
        before[i]      = head;
        head           = (int32_t) i;
    }
}

void text_index::truncate(int32_t n) {
    while (size() > std::max(n, 0)) {
        const size_t i = tokens.size() - 1;
        if (i > 0) {
            heads[bucket(tokens[i - 1], tokens[i])] = before[i]; // the last place of all is the first of its chain
        }
        tokens.pop_back();
        before.pop_back();
    }
    while (size() < n) {
        append(unknown);
    }
}

template <typename F>
void text_index::walk(
    int32_t first, int32_t last, int32_t n, F && at, int32_t offset, std::vector<place> & found) const {
    if (heads.empty()) {
        return;
    }
    int32_t place_of = heads[bucket(first, last)];
    for (int32_t walked = 0; place_of >= 0 && walked < max_walk; ++walked, place_of = before[place_of]) {
        if (place_of + 1 >= size()) {
            continue; // nothing followed yet
        }
        int32_t length = 0;
        while (length < max_match && length <= place_of && length < n && tokens[place_of - length] != unknown &&
               tokens[place_of - length] == at(length)) {
            ++length;
        }
        if (length < 2) {
            continue; // another pair in the same bucket
        }
        const auto to = std::upper_bound(found.begin(), found.end(), length,
                                         [](int32_t l, const place & p) { return l > p.length; });
        if (to - found.begin() < max_places) {
            found.insert(to, { offset + place_of + 1, length });
            found.resize(std::min<size_t>(found.size(), max_places));
        }
    }
}

void text_index::match(const int32_t * tail, int32_t n_tail, std::vector<place> & found) const {
    found.clear();
    const int32_t n = size() + n_tail;

    const auto at = [&](int32_t back) {
        const int32_t i = n - 1 - back;
        return i < size() ? tokens[i] : tail[i - size()];
    };
    if (n < 2 || at(0) == unknown || at(1) == unknown) {
        return;
    }
    walk(at(1), at(0), n, at, 0, found);
    if (others) {
        others->walk(at(1), at(0), n, at, far, found);
    }
}

} // namespace entmtp
