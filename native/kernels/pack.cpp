#include "pack.h"

#include <cstring>

namespace entmtp {

// ggml's blocks, as its GGUF files hold them
struct q4_0 {
    uint16_t d;
    uint8_t  qs[16]; // k in the low nibble, k + 16 in the high one
};
struct q8_0 {
    uint16_t d;
    int8_t   qs[32];
};
struct q4_1 {
    uint16_t d, m;
    uint8_t  qs[16];
};
struct q5_0 {
    uint16_t d;
    uint8_t  qh[4]; // the upper bit of k is bit k
    uint8_t  qs[16];
};
struct q5_1 {
    uint16_t d, m;
    uint8_t  qh[4];
    uint8_t  qs[16];
};
struct mxfp4 {
    uint8_t e; // the scale is 2^(e - 128), for values that are doubled
    uint8_t qs[16];
};
struct q2_k {
    uint8_t  scales[16]; // of 16 k: scale in the low nibble, min in the high one
    uint8_t  qs[64];     // for each 128 k: k, k + 32, k + 64 and k + 96 in one byte
    uint16_t d, dmin;
};
struct q3_k {
    uint8_t  hmask[32]; // the upper bit of k is bit k / 32 of byte k % 32
    uint8_t  qs[64];    // as Q2_K's
    uint8_t  scales[12];
    uint16_t d;
};
struct iq4_xs {
    uint16_t d;
    uint16_t scales_h;    // two upper bits of each scale
    uint8_t  scales_l[4]; // of 32 k: nibbles
    uint8_t  qs[128];     // for each 32 k: k in the low nibble, k + 16 in the high one
};
struct q4_k {
    uint16_t d, dmin;
    uint8_t  scales[12]; // 6-bit scales and mins
    uint8_t  qs[128];    // for each 64 k: k in the low nibble, k + 32 in the high one
};
struct q5_k {
    uint16_t d, dmin;
    uint8_t  scales[12];
    uint8_t  qh[32]; // the upper bit of k is bit k / 32 of byte k % 32
    uint8_t  qs[128];
};
struct q6_k {
    uint8_t  ql[128];
    uint8_t  qh[64];
    int8_t   scales[16];
    uint16_t d;
};

static_assert(sizeof(q4_0) == 18 && sizeof(q8_0) == 34 && sizeof(q4_k) == 144 && sizeof(q6_k) == 210, "ggml's layouts");
static_assert(sizeof(q2_k) == 84 && sizeof(q3_k) == 110 && sizeof(iq4_xs) == 136, "ggml's layouts");
static_assert(sizeof(q4_1) == 20 && sizeof(q5_0) == 22 && sizeof(q5_1) == 24 && sizeof(mxfp4) == 17 &&
                  sizeof(q5_k) == 176,
              "ggml's layouts");

weight_type packed_type(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:
            return W_Q4_0;
        case GGML_TYPE_Q4_1:
            return W_Q4_1;
        case GGML_TYPE_Q5_0:
            return W_Q5_0;
        case GGML_TYPE_Q5_1:
            return W_Q5_1;
        case GGML_TYPE_Q8_0:
            return W_Q8_0;
        case GGML_TYPE_IQ4_NL:
            return W_IQ4_NL;
        case GGML_TYPE_MXFP4:
            return W_MXFP4;
        case GGML_TYPE_Q2_K:
            return W_Q2_K;
        case GGML_TYPE_Q3_K:
            return W_Q3_K;
        case GGML_TYPE_Q4_K:
            return W_Q4_K;
        case GGML_TYPE_Q5_K:
            return W_Q5_K;
        case GGML_TYPE_Q6_K:
            return W_Q6_K;
        case GGML_TYPE_IQ4_XS:
            return W_IQ4_XS;
        case GGML_TYPE_F16:
            return W_F16;
        case GGML_TYPE_BF16:
            return W_BF16;
        case GGML_TYPE_F32:
            return W_F32;
        default:
            return W_COUNT;
    }
}

size_t packed_size(weight_type type, int64_t k, int64_t n_rows) {
    const weight_layout & l = LAYOUTS[type];
    return (size_t) ((n_rows + PANEL - 1) / PANEL) * ((k + l.block - 1) / l.block) * l.panel_bytes;
}

// One row's block into row r of a panel. `lines` is where the lines of 32 k start: line j has four bytes of each row, of
// k = 4j to 4j + 3. Values come four at a time, a byte each: four(j) are those of line j's k.

static uint32_t load4(const void * src) {
    uint32_t x;
    memcpy(&x, src, 4);
    return x;
}

static void put4(uint8_t * lines, int r, int j, uint32_t x) {
    memcpy(lines + 4 * PANEL * j + 4 * r, &x, 4);
}

// four(j): 0 to 15. 4 lines, nibbles of k and k + 16
template <class F>
static void put_nibbles(uint8_t * lines, int r, F four) {
    for (int j = 0; j < 4; ++j) {
        put4(lines, r, j, four(j) | four(j + 4) << 4);
    }
}

// four(j): 0 to 3. 2 lines: line j's values are in byte line j / 4, at bits 2 * (j % 4)
template <class F>
static void put_pairs(uint8_t * lines, int r, F four) {
    for (int i = 0; i < 2; ++i) {
        put4(lines, r, i, four(4 * i) | four(4 * i + 1) << 2 | four(4 * i + 2) << 4 | four(4 * i + 3) << 6);
    }
}

// four(j): 0 or 1. One line: line j's values are at bit j
template <class F>
static void put_bits(uint8_t * lines, int r, F four) {
    uint32_t x = 0;
    for (int j = 0; j < 8; ++j) {
        x |= four(j) << j;
    }
    put4(lines, r, 0, x);
}

// 16 bytes that have the nibbles of k and k + 16 together already
static void copy_nibbles(const uint8_t * qs, int r, uint8_t * lines) {
    for (int j = 0; j < 4; ++j) {
        put4(lines, r, j, load4(qs + 4 * j));
    }
}

// 32 bits, of k = 0 to 31
static void copy_bits(const uint8_t * qh, int r, uint8_t * line) {
    const uint32_t bits = load4(qh);
    put_bits(line, r, [&](int j) {
        const uint32_t x = bits >> 4 * j;
        return (x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21;
    });
}

static void pack_block(const q4_0 & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    copy_nibbles(b.qs, r, dst + 2 * PANEL);
}

static void pack_block(const q4_1 & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    memcpy(dst + 2 * PANEL + 2 * r, &b.m, 2);
    copy_nibbles(b.qs, r, dst + 4 * PANEL);
}

static void pack_block(const q5_0 & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    copy_nibbles(b.qs, r, dst + 2 * PANEL);
    copy_bits(b.qh, r, dst + 18 * PANEL);
}

static void pack_block(const q5_1 & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    memcpy(dst + 2 * PANEL + 2 * r, &b.m, 2);
    copy_nibbles(b.qs, r, dst + 4 * PANEL);
    copy_bits(b.qh, r, dst + 20 * PANEL);
}

static void pack_block(const mxfp4 & b, int r, uint8_t * dst) {
    dst[r] = b.e;
    copy_nibbles(b.qs, r, dst + PANEL);
}

static void pack_block(const q8_0 & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    for (int j = 0; j < 8; ++j) {
        put4(dst + 2 * PANEL, r, j, load4(b.qs + 4 * j) ^ 0x80808080);
    }
}

// Q4_K, and Q5_K with a line of upper bits after every 4 lines of nibbles
template <class T>
static void pack_super_block(const T & b, int r, int group, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    memcpy(dst + 2 * PANEL + 2 * r, &b.dmin, 2);

    uint8_t * packed = dst + 4 * PANEL; // see unpack_scales()
    for (int i = 0; i < 8; ++i) {
        const uint8_t * s     = b.scales;
        const uint8_t   scale = i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        const uint8_t   min   = i < 4 ? s[i + 4] & 63 : (s[i + 4] >> 4) | (s[i] >> 6) << 4;

        packed[PANEL * i + r] = (uint8_t) (scale | (min & 3) << 6);

        uint8_t & upper = packed[PANEL * (8 + i / 2) + r];
        upper           = i % 2 == 0 ? min >> 2 : (uint8_t) (upper | min >> 2 << 4);
    }
    for (int g = 0; g < 8; ++g) {
        const uint8_t * qs = b.qs + 32 * (g / 2);
        put_nibbles(dst + 16 * PANEL + group * g, r,
                    [&](int j) { return load4(qs + 4 * j) >> (g % 2 * 4) & 0x0f0f0f0f; });
    }
}

static void pack_block(const q4_k & b, int r, uint8_t * dst) {
    pack_super_block(b, r, 16 * PANEL, dst);
}

static void pack_block(const q5_k & b, int r, uint8_t * dst) {
    pack_super_block(b, r, 20 * PANEL, dst);
    for (int g = 0; g < 8; ++g) {
        put_bits(dst + 16 * PANEL + 20 * PANEL * g + 16 * PANEL, r,
                 [&](int j) { return load4(b.qh + 4 * j) >> g & 0x01010101; });
    }
}

// 2 lines of the lower bits of Q2_K and Q3_K for 32 k, and of the upper ones of Q6_K: two bits of byte 32 * (g / 4) + k
static void copy_pairs(const uint8_t * qs, int g, int r, uint8_t * lines) {
    put_pairs(lines, r, [&](int j) { return load4(qs + 32 * (g / 4) + 4 * j) >> (2 * (g % 4)) & 0x03030303; });
}

static void pack_block(const q6_k & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    for (int i = 0; i < 16; ++i) {
        dst[2 * PANEL + PANEL * i + r] = (uint8_t) b.scales[i];
    }
    for (int g = 0; g < 8; ++g) {
        // for each 128 k: ql holds k and k + 64, k + 32 and k + 96; qh holds the upper bits of all four
        uint8_t *       lines = dst + PANEL * (18 + 24 * g);
        const uint8_t * ql    = b.ql + 64 * (g / 4) + 32 * (g % 2);
        put_nibbles(lines, r, [&](int j) { return load4(ql + 4 * j) >> (g % 4 / 2 * 4) & 0x0f0f0f0f; });
        copy_pairs(b.qh, g, r, lines + PANEL * 16);
    }
}

static void pack_block(const q2_k & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    memcpy(dst + 2 * PANEL + 2 * r, &b.dmin, 2);
    for (int i = 0; i < 16; ++i) {
        dst[4 * PANEL + PANEL * i + r] = b.scales[i];
    }
    for (int g = 0; g < 8; ++g) {
        copy_pairs(b.qs, g, r, dst + PANEL * (20 + 8 * g));
    }
}

static void pack_block(const q3_k & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    for (int i = 0; i < 16; ++i) { // 6 bits: nibbles in the first 8 bytes, upper pairs in the last 4
        const int low = b.scales[i % 8] >> (i / 8 * 4) & 15, high = b.scales[8 + i % 4] >> (i / 4 * 2) & 3;
        dst[2 * PANEL + PANEL * i + r] = (uint8_t) ((low | high << 4) - 32);
    }
    for (int g = 0; g < 8; ++g) {
        uint8_t * lines = dst + PANEL * (18 + 12 * g);
        copy_pairs(b.qs, g, r, lines);
        put_bits(lines + 8 * PANEL, r, [&](int j) { return load4(b.hmask + 4 * j) >> g & 0x01010101; });
    }
}

static void pack_block(const iq4_xs & b, int r, uint8_t * dst) {
    memcpy(dst + 2 * r, &b.d, 2);
    for (int g = 0; g < 8; ++g) {
        const int low = b.scales_l[g / 2] >> (g % 2 * 4) & 15, high = b.scales_h >> (2 * g) & 3;
        dst[2 * PANEL + PANEL * g + r] = (uint8_t) ((low | high << 4) - 32);
        copy_nibbles(b.qs + 16 * g, r, dst + PANEL * (10 + 16 * g));
    }
}

// Row `row` of a matrix of k columns into row r of its panel, which is zero before
template <weight_type type, class T>
static void pack_row(const uint8_t * src, int64_t row, int64_t k, int r, uint8_t * panel) {
    const int64_t n_blocks = k / LAYOUTS[type].block;
    for (int64_t b = 0; b < n_blocks; ++b) {
        T block;
        memcpy(&block, src + (row * n_blocks + b) * sizeof(T), sizeof(T));
        pack_block(block, r, panel + b * LAYOUTS[type].panel_bytes);
    }
}

// the same for floats of `size` bytes, whose rows may end within a block
template <int size>
static void pack_floats(const uint8_t * src, int64_t row, int64_t k, int r, uint8_t * panel) {
    for (int64_t i = 0; i < k; ++i) {
        memcpy(panel + size * (i * PANEL + r), src + size * (row * k + i), size);
    }
}

// [W_COUNT] as LAYOUTS tells
static void (*const PACK[W_COUNT])(const uint8_t * src, int64_t row, int64_t k, int r, uint8_t * panel) = {
    pack_row<W_Q4_0, q4_0>,   pack_row<W_Q4_1, q4_1>,   pack_row<W_Q5_0, q5_0>,     pack_row<W_Q5_1, q5_1>,
    pack_row<W_Q8_0, q8_0>,   pack_row<W_IQ4_NL, q4_0>, // its nibbles lie as Q4_0's do and stand for other values
    pack_row<W_MXFP4, mxfp4>, pack_row<W_Q2_K, q2_k>,   pack_row<W_Q3_K, q3_k>,     pack_row<W_Q4_K, q4_k>,
    pack_row<W_Q5_K, q5_k>,   pack_row<W_Q6_K, q6_k>,   pack_row<W_IQ4_XS, iq4_xs>, pack_floats<2>,
    pack_floats<2>,           pack_floats<4>,
};

void pack_panels(weight_type type, const void * src, int64_t k, int64_t n_rows, int64_t p0, int64_t p1, uint8_t * dst) {
    const weight_layout & l        = LAYOUTS[type];
    const int64_t         n_blocks = (k + l.block - 1) / l.block;

    for (int64_t p = p0; p < p1; ++p) {
        uint8_t * panel = dst + (size_t) p * n_blocks * l.panel_bytes;
        memset(panel, 0, (size_t) n_blocks * l.panel_bytes);
        for (int r = 0; r < PANEL && p * PANEL + r < n_rows; ++r) {
            PACK[type]((const uint8_t *) src, p * PANEL + r, k, r, panel);
        }
    }
}

// A block of a panel holds, one after the other, items of all 16 rows side by side
struct item_run {
    int bytes; // of one row's item
    int count;
};

// [W_COUNT] as LAYOUTS tells
constexpr item_run ITEMS[W_COUNT][3] = {
    { { 2, 1 }, { 4, 4 } },             // Q4_0: d, lines
    { { 2, 2 }, { 4, 4 } },             // Q4_1: d and m, lines
    { { 2, 1 }, { 4, 5 } },             // Q5_0: d, lines
    { { 2, 2 }, { 4, 5 } },             // Q5_1: d and m, lines
    { { 2, 1 }, { 4, 8 } },             // Q8_0: d, lines
    { { 2, 1 }, { 4, 4 } },             // IQ4_NL: d, lines
    { { 1, 1 }, { 4, 4 } },             // MXFP4: exponent, lines
    { { 2, 2 }, { 1, 16 }, { 4, 16 } }, // Q2_K: d and dmin, scales and mins, lines
    { { 2, 1 }, { 1, 16 }, { 4, 24 } }, // Q3_K: d, scales, lines
    { { 2, 2 }, { 1, 12 }, { 4, 32 } }, // Q4_K: d and dmin, scales and mins, lines
    { { 2, 2 }, { 1, 12 }, { 4, 40 } }, // Q5_K: the same
    { { 2, 1 }, { 1, 16 }, { 4, 48 } }, // Q6_K: d, scales, lines
    { { 2, 1 }, { 1, 8 }, { 4, 32 } },  // IQ4_XS: d, scales, lines
    { { 2, 32 } },                      // F16
    { { 2, 32 } },                      // BF16
    { { 4, 32 } },                      // F32
};

void copy_packed_row(weight_type type, int64_t k, const uint8_t * src, int64_t from, uint8_t * dst, int64_t to) {
    const weight_layout & l        = LAYOUTS[type];
    const int64_t         n_blocks = (k + l.block - 1) / l.block;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const uint8_t * s = src + (size_t) (from / PANEL * n_blocks + b) * l.panel_bytes;
        uint8_t *       d = dst + (size_t) (to / PANEL * n_blocks + b) * l.panel_bytes;
        for (const item_run & run : ITEMS[type]) {
            for (int j = 0; j < run.count; ++j, s += PANEL * run.bytes, d += PANEL * run.bytes) {
                memcpy(d + to % PANEL * run.bytes, s + from % PANEL * run.bytes, (size_t) run.bytes);
            }
        }
    }
}

void copy_packed_rows(
    weight_type type, int64_t k, const uint8_t * src, const int32_t * ids, int64_t n_ids, uint8_t * dst) {
    memset(dst, 0, packed_size(type, k, n_ids));
    for (int64_t i = 0; i < n_ids; ++i) {
        copy_packed_row(type, k, src, ids[i], dst, i);
    }
}

} // namespace entmtp
