// IEEE half precision in plain C++, halves to even: the same on every processor.

#pragma once

#include <cstdint>
#include <cstring>

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t exp  = h >> 10 & 31;
    const uint32_t frac = h & 1023;

    uint32_t bits;
    float    x;
    if (exp == 31) {
        bits = sign | 0x7f800000 | frac << 13;
    } else if (exp != 0) {
        bits = sign | (exp + 112) << 23 | frac << 13;
    } else { // zero, or frac*2^-24
        x = (float) frac * 5.9604644775390625e-8f;
        memcpy(&bits, &x, 4);
        bits |= sign;
    }
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t) (bits >> 16 & 0x8000);
    bits &= 0x7fffffff;

    if (bits >= 0x7f800000) { // infinity, NaN
        return sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0);
    }
    if (bits >= 0x477ff000) { // rounds to more than 65504
        return sign | 0x7c00;
    }
    if (bits < 0x38800000) { // below 2^-14: a multiple of 2^-24, by adding 2^-1
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return sign | (uint16_t) (bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t) ((bits - 0x38000000) >> 13);
}
