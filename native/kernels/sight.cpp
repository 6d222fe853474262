#include "sight.h"

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

    cells.resize(n_kv);
    who.resize(n_kv);
    int n = 0;
    for (int j = 0; j < n_kv; ++j) {
        const int32_t c = a.order ? a.order[j] : j;
        if (c < 0) {
            break;
        }
        cells[n] = c;
        who[n]   = seen[c];
        n += seen[c] != 0;
    }
    n_cells = n;
    in_line = true;
    for (int j = 1; j < n && in_line; ++j) {
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
