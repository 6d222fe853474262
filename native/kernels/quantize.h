// Activations as the kernels take them, for one instruction set: included after its `simd`.

// Scales and roundings are ggml's, so that integers, and what they sum up to, are the same as its own but for signs.
template <int sums, bool pairs = false> // sums 1: weights with blocks of 32; more: of 256
void quantize_block(const float * x, int offset, int8_t * q, float * d, int32_t * s) {
    constexpr int block = sums == 1 ? 32 : 256;

    // the largest magnitude, as an integer: NaN compares greater than anything
    uint32_t top = 0;
    for (int i = 0; i < block; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float amax;
    memcpy(&amax, &top, 4);

    // blocks of 32 keep the scale as f16
    *d             = sums == 1 ? half_to_float(float_to_half(amax / 127.0f)) : amax / 127.0f;
    const float id = amax != 0.0f ? 127.0f / amax : 0.0f;

    for (int i = 0; i < block; i += simd::R) {
        simd::store_i8(q + i, simd::round(simd::mulf(simd::loadf(x + i), simd::set1f(id))));
    }

    constexpr int n_sum = block / sums / (pairs ? 2 : 1); // k of a sum
    if (pairs) {
        for (int i = 0; i < sums; ++i) {
            int32_t a = 0, b = 0;
            for (int j = 0; j < n_sum; ++j) {
                a += q[2 * n_sum * i + j];
                b += q[2 * n_sum * i + n_sum + j];
            }
            s[i] = (int32_t) ((uint32_t) (uint16_t) a | (uint32_t) (uint16_t) b << 16);
        }
    } else {
        for (int i = 0; i < sums; ++i) {
            simd::vi a = simd::set1i(0);
            for (int j = 0; j < n_sum; j += simd::R) { // as stored: wider loads would wait for the stores
                a = simd::addi(a, simd::load_i8((const uint8_t *) q + n_sum * i + j));
            }
            s[i] = -offset * simd::reduce_add(a);
        }
    }
}

static void
quantize(weight_type type, const float * const * x, int n, int64_t k, int64_t b0, int64_t b1, const activations & a) {
    const int block  = LAYOUTS[type].block;
    const int offset = LAYOUTS[type].offset == BYTE ? simd::OFF8 : LAYOUTS[type].offset;
    for (int64_t b = b0; b < b1; ++b) {
        for (int i = 0; i < n; ++i) {
            const float * xb = x[i] + b * block;
            const int64_t at = b * n + i;
            if (LAYOUTS[type].bits == 0) {
                const int64_t left = k - b * block;
                for (int j = 0; j < block; ++j) {
                    a.f[at * block + j] = j < left ? xb[j] : 0.0f;
                }
            } else if (LAYOUTS[type].sums == 1) {
                quantize_block<1>(xb, offset, a.q + at * 32, a.d + at, a.s + at);
            } else if (LAYOUTS[type].sums == 4) {
                quantize_block<4, true>(xb, offset, a.q + at * 256, a.d + at, a.s + at * 4);
            } else if (LAYOUTS[type].sums == 8 && offset == MINIMUM) {
                quantize_block<8, true>(xb, offset, a.q + at * 256, a.d + at, a.s + at * 8);
            } else if (LAYOUTS[type].sums == 8) {
                quantize_block<8>(xb, offset, a.q + at * 256, a.d + at, a.s + at * 8);
            } else {
                quantize_block<16>(xb, offset, a.q + at * 256, a.d + at, a.s + at * 16);
            }
        }
    }
}
