#include "unpack.h"

#include "pack.h"

#include <array>
#include <cstring>
#include <vector>

namespace entmtp {

// Packing moves the bits of a block, and some it negates (128 added to a byte, 32 taken from a scale): where each went is
// found by packing blocks of one set bit, so that no type is described a second time.
struct bit_run {       // neighbours that stay neighbours
    uint16_t from;     // byte in the block of a panel, of row 0
    uint16_t to;       // byte in ggml's block
    uint8_t  stride;   // bytes from one row to the next
    uint8_t  from_bit; // lowest
    uint8_t  to_bit;
    uint8_t  n_bits;
    uint8_t  negated; // these bits of the result
};

static std::vector<bit_run> find_runs(ggml_type type) {
    const weight_type to_type = packed_type(type);
    const int64_t     k       = LAYOUTS[to_type].block;
    const size_t      size    = ggml_type_size(type);

    const auto packed = [&](size_t bit, int row) { // a block of zeros with one bit set, or without
        std::vector<uint8_t> rows(PANEL * size), panel(packed_size(to_type, k, PANEL));
        if (bit < 8 * size) {
            rows[row * size + bit / 8] |= (uint8_t) (1 << bit % 8);
        }
        pack_panels(to_type, rows.data(), k, PANEL, 0, 1, panel.data());
        return panel;
    };
    const std::vector<uint8_t> zero = packed(8 * size, 0);

    std::vector<bit_run> runs;
    for (size_t bit = 0; bit < 8 * size; ++bit) {
        size_t at[2]; // in bits, of rows 0 and 1
        for (int row = 0; row < 2; ++row) {
            const std::vector<uint8_t> one = packed(bit, row);
            for (at[row] = 0; !((one[at[row] / 8] ^ zero[at[row] / 8]) >> at[row] % 8 & 1);) {
                ++at[row];
            }
        }
        const uint8_t negated = zero[at[0] / 8] >> at[0] % 8 & 1;
        bit_run *     last    = runs.empty() ? nullptr : &runs.back();
        if (last && bit % 8 != 0 && at[0] == 8u * last->from + last->from_bit + last->n_bits && at[0] % 8 != 0) {
            last->negated |= (uint8_t) (negated << last->n_bits);
            last->n_bits++;
        } else {
            runs.push_back({ (uint16_t) (at[0] / 8), (uint16_t) (bit / 8), (uint8_t) ((at[1] - at[0]) / 8),
                             (uint8_t) (at[0] % 8), (uint8_t) (bit % 8), 1, negated });
        }
    }
    return runs;
}

static const std::vector<bit_run> & runs_of(ggml_type type) {
    static const std::array<std::vector<bit_run>, GGML_TYPE_COUNT> all = [] {
        std::array<std::vector<bit_run>, GGML_TYPE_COUNT> found;
        for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
            const weight_type t = packed_type((ggml_type) i);
            if (t != W_COUNT && LAYOUTS[t].bits != 0) {
                found[i] = find_runs((ggml_type) i);
            }
        }
        return found;
    }();
    return all[type];
}

void unpack_row(ggml_type type, const uint8_t * src, int64_t k, int64_t row, uint8_t * dst) {
    const weight_layout & l        = LAYOUTS[packed_type(type)];
    const int64_t         n_blocks = (k + l.block - 1) / l.block, r = row % PANEL;
    const uint8_t *       panel = src + (size_t) (row / PANEL) * n_blocks * l.panel_bytes;
    const size_t          size  = ggml_type_size(type);

    if (l.bits == 0) { // [k][16 rows]
        for (int64_t i = 0; i < k; ++i) {
            memcpy(dst + i * size, panel + (i * PANEL + r) * size, size);
        }
        return;
    }
    const std::vector<bit_run> & runs = runs_of(type);
    memset(dst, 0, n_blocks * size);
    for (int64_t b = 0; b < n_blocks; ++b, panel += l.panel_bytes, dst += size) {
        for (const bit_run & run : runs) {
            const int bits = (panel[run.from + r * run.stride] >> run.from_bit ^ run.negated) & ((1 << run.n_bits) - 1);
            dst[run.to] |= (uint8_t) (bits << run.to_bit);
        }
    }
}

} // namespace entmtp
