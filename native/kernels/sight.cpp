#include "sight.h"

#include <algorithm>

namespace entmtp {

static constexpr uint16_t minus_infinity = 0xfc00;

static void add_seen(const uint16_t * __restrict mask, int n_kv, uint32_t queries, uint32_t * __restrict seen) {
    for (int j = 0; j < n_kv; ++j) {
        seen[j] |= mask[j] != minus_infinity ? queries : 0u;
    }
}

static uint32_t first_bits(int n) {
    return n == 32 ? 0xffffffffu : (1u << n) - 1;
}

void sight::of(const attention & a) {
    static thread_local std::vector<uint32_t> seen; // [n_kv] queries that see a cell, a bit each

    const int n_kv = a.n_kv;
    seen.assign(n_kv, 0);
    for (int i = 0, end = 0; i < a.n_query; i = end) {
        end = i + 1;
        while (end < a.n_query && a.mask[end] == a.mask[i]) {
            ++end; // heads of one token
        }
        const uint32_t queries = first_bits(end) & ~first_bits(i);
        if (a.mask[i]) {
            add_seen(a.mask[i], n_kv, queries, seen.data());
        } else {
            seen.assign(n_kv, queries);
        }
    }

    const auto n_seen = n_kv - std::count(seen.begin(), seen.end(), 0u);
    cells.resize(n_seen + 1); // the loop writes before it knows
    who.resize(n_seen + 1);
    n_cells = 0;
    for (int j = 0; j < n_kv; ++j) {
        const int32_t c = a.order ? a.order[j] : j;
        if (c < 0) {
            break;
        }
        cells[n_cells] = c;
        who[n_cells]   = seen[c];
        n_cells += seen[c] != 0;
    }
    in_line = true;
    for (int j = 1; j < n_cells && in_line; ++j) {
        in_line = cells[j] == cells[0] + j;
    }
}

void sight::give(attention & a) const {
    a.cells   = cells.data();
    a.who     = who.data();
    a.n_cells = n_cells;
    a.in_line = in_line;
}

} // namespace entmtp
