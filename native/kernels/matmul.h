// Products of packed weights and few tokens, for one instruction set: included after its `simd`.

// -- one panel --
//
// Every kernel keeps float sums in registers, one per token and vector of rows, unpacks a block of weights once and uses it
// for all n tokens. It goes over the panel once, or once for each part of the rows whose sums fit.

// vectors of rows at a time, for n tokens and what registers hold of sums
constexpr int vectors(int n, int n_sums) {
    int v = PANEL / simd::R;
    while (v > 1 && v * n > n_sums) {
        v /= 2;
    }
    return v;
}

static inline void prefetch(const uint8_t * p, int bytes) {
#if defined(__GNUC__)
    for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(p + i, 0, 3);
    }
#else
    (void) p;
    (void) bytes;
#endif
}

constexpr int AHEAD = 4096; // bytes

// Ends the work on one token: compilers would load the activations of all, and spill what 32 registers cannot hold.
template <class V>
void end_token(V & sum) {
#if defined(__GNUC__) && defined(__aarch64__)
    if constexpr (!__is_class(V)) { // the portable kernels' vectors lie in no register
        __asm__ volatile("" : "+w"(sum) : : "memory");
    }
#else
    (void) sum;
#endif
}

// 4 lines of nibbles: lines 0 to 3 in the lower halves, 4 to 7 in the upper ones
static inline void unpack_nibbles(const uint8_t * lines, simd::vb w[8]) {
    for (int j = 0; j < 4; ++j) {
        const simd::vb x = simd::loadb(lines + 4 * PANEL * j);
        w[j]             = simd::low4(x);
        w[j + 4]         = simd::high4(x);
    }
}

// 1 line of upper bits: bit j of a byte belongs to line j, where it becomes bit `to`
template <int to = 4>
void add_upper_bits(const uint8_t * line, simd::vb w[8]) {
    const simd::vb x = simd::loadb(line);
    w[0]             = simd::orb(w[0], simd::bits<0, 1, to>(x));
    w[1]             = simd::orb(w[1], simd::bits<1, 1, to>(x));
    w[2]             = simd::orb(w[2], simd::bits<2, 1, to>(x));
    w[3]             = simd::orb(w[3], simd::bits<3, 1, to>(x));
    w[4]             = simd::orb(w[4], simd::bits<4, 1, to>(x));
    w[5]             = simd::orb(w[5], simd::bits<5, 1, to>(x));
    w[6]             = simd::orb(w[6], simd::bits<6, 1, to>(x));
    w[7]             = simd::orb(w[7], simd::bits<7, 1, to>(x));
}

// 1 line of pairs of bits: pair j of a byte belongs to line j of 4, where it becomes bits `to` and `to` + 1
template <int to>
void unpack_pairs(const uint8_t * line, simd::vb w[4]) {
    const simd::vb x = simd::loadb(line);
    w[0]             = simd::bits<0, 2, to>(x);
    w[1]             = simd::bits<2, 2, to>(x);
    w[2]             = simd::bits<4, 2, to>(x);
    w[3]             = simd::bits<6, 2, to>(x);
}

// what nibbles stand for, with 128 added: IQ4_NL of llama.cpp, and twice the E2M1 of OCP's microscaling formats
alignas(16) constexpr uint8_t IQ4_NL_VALUES[16] = { 1,   24,  45,  63,  79,  93,  106, 118,
                                                    129, 141, 153, 166, 181, 197, 217, 241 };
alignas(16) constexpr uint8_t MXFP4_VALUES[16]  = { 128, 129, 130, 131, 132, 134, 136, 140,
                                                    128, 127, 126, 125, 124, 122, 120, 116 };

// the 8 lines of a block of 32
template <weight_type type>
void unpack_32(const uint8_t * lines, simd::vb w[8]) {
    if constexpr (type == W_Q8_0) {
        for (int j = 0; j < 8; ++j) {
            w[j] = simd::loadb(lines + 4 * PANEL * j);
        }
        return;
    }
    unpack_nibbles(lines, w);
    if constexpr (LAYOUTS[type].bits == 5) {
        add_upper_bits(lines + 4 * PANEL * 4, w);
    }
    if constexpr (type == W_IQ4_NL || type == W_MXFP4) {
        for (int j = 0; j < 8; ++j) {
            w[j] = simd::lookup(w[j], type == W_IQ4_NL ? IQ4_NL_VALUES : MXFP4_VALUES);
        }
    }
}

// dot16 knows sums of 4, 6 and 8 bits that do not overflow
constexpr int dot_bits(int bits) {
    return bits <= 4 ? 4 : bits == 5 ? 6 : bits;
}

// blocks of 32 with one scale
//   sum = fma(float(integer sum of the block), d_w*d_x, sum), and with a minimum then fma(m_w, d_x*float(sum of x), sum)
template <weight_type type, int n>
void matmul_32(const uint8_t * panel, int64_t n_blocks, const activations & a, float * out) {
    constexpr int  bytes   = LAYOUTS[type].panel_bytes;
    constexpr bool has_min = LAYOUTS[type].offset == MINIMUM;
    constexpr int  lines   = type == W_MXFP4 ? PANEL : has_min ? 4 * PANEL : 2 * PANEL; // where they start
    constexpr int  bits    = dot_bits(LAYOUTS[type].bits);
    constexpr int  nv      = vectors(n, simd::SUMS);
    for (int sub = 0; sub < PANEL; sub += nv * simd::R) {
        simd::vf sum[nv][n];
        for (int i = 0; i < nv * n; ++i) {
            sum[i / n][i % n] = simd::set1f(0.0f);
        }
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t * p  = panel + b * bytes;
            const int8_t *  q  = a.q + b * n * 32;
            const float *   dx = a.d + b * n;
            const int32_t * s  = a.s + b * n;
            prefetch(p + AHEAD, bytes);

#pragma GCC unroll 4
            for (int v = 0; v < nv; ++v) {
                const int row = sub + v * simd::R;
                simd::vf  d, m;
                if constexpr (type == W_MXFP4) {
                    d = simd::power2(simd::load_u8(p + row));
                } else {
                    d = simd::load_f16((const uint16_t *) p + row);
                }
                if constexpr (has_min) {
                    m = simd::load_f16((const uint16_t *) p + PANEL + row);
                }

                simd::vb w[8];
                unpack_32<type>(p + lines + 4 * row, w);
#pragma GCC unroll 16
                for (int i = 0; i < n; ++i) {
                    simd::vi t = simd::set1i(has_min ? 0 : s[i]);
                    t          = simd::dot16<bits>(t, w, q + 32 * i);
                    t          = simd::dot16<bits>(t, w + 4, q + 32 * i + 16);
                    sum[v][i]  = simd::fma(simd::cvt(t), simd::mulf(d, simd::set1f(dx[i])), sum[v][i]);
                    if constexpr (has_min) {
                        sum[v][i] = simd::fma(m, simd::set1f(dx[i] * (float) s[i]), sum[v][i]);
                    }
                    end_token(sum[v][i]);
                }
            }
        }
        for (int i = 0; i < nv * n; ++i) {
            simd::storef(out + PANEL * (i % n) + sub + i / n * simd::R, sum[i / n][i % n]);
        }
    }
}

// the 8 lines of 32 k of a block of 256
template <weight_type type>
void unpack_256(const uint8_t * l, simd::vb w[8]) {
    if constexpr (type == W_Q2_K || type == W_Q3_K) {
        unpack_pairs<0>(l, w);
        unpack_pairs<0>(l + 4 * PANEL, w + 4);
        if constexpr (type == W_Q3_K) {
            add_upper_bits<2>(l + 4 * PANEL * 2, w);
        }
        return;
    }
    unpack_nibbles(l, w);
    if constexpr (type == W_Q5_K) {
        add_upper_bits(l + 4 * PANEL * 4, w);
    }
    if constexpr (type == W_Q6_K) {
        for (int j = 0; j < 2; ++j) {
            simd::vb upper[4];
            unpack_pairs<4>(l + 4 * PANEL * (4 + j), upper);
            for (int i = 0; i < 4; ++i) {
                w[4 * j + i] = simd::orb(w[4 * j + i], upper[i]);
            }
        }
    }
    if constexpr (type == W_IQ4_XS) {
        for (int j = 0; j < 8; ++j) {
            w[j] = simd::lookup(w[j], IQ4_NL_VALUES);
        }
    }
}

constexpr bool has_packed_scales(weight_type type) { // of 6 bits
    return type == W_Q4_K || type == W_Q5_K;
}

// the scale of every 16 or 32 k, of 8, 6 or 4 bits
template <weight_type type>
simd::vi load_scale(const uint8_t * p) {
    if constexpr (has_packed_scales(type)) {
        return simd::load_u8(p);
    } else {
        return type == W_Q2_K ? simd::load_low4(p) : simd::load_i8(p);
    }
}

// mins of Q2_K's block, side by side in pairs, as the sums of activations are
//   scales [16][16]: bytes with the scale in the lower and the min in the upper half
static inline void unpack_mins(const uint8_t * scales, uint8_t mins[8][PANEL][2]) {
    for (int g = 0; g < 8; ++g) {
        for (int r = 0; r < PANEL; ++r) {
            mins[g][r][0] = scales[PANEL * (2 * g) + r] >> 4;
            mins[g][r][1] = scales[PANEL * (2 * g + 1) + r] >> 4;
        }
    }
}

// 6-bit scales and mins of one block of Q4_K or Q5_K
//   packed [12][16]: byte b < 8 holds scale b and the lower 2 bits of min b, byte 8 + b/2 the upper 4 bits of mins b and b + 1
static inline void unpack_scales(const uint8_t * packed, uint8_t scales[8][PANEL], uint8_t mins[4][PANEL][2]) {
    for (int b = 0; b < 8; ++b) {
        for (int r = 0; r < PANEL; ++r) {
            const uint8_t t = packed[PANEL * b + r];
            scales[b][r]    = t & 63;
        }
    }
    for (int b = 0; b < 4; ++b) {
        for (int r = 0; r < PANEL; ++r) {
            const uint8_t t = packed[PANEL * (8 + b) + r];
            mins[b][r][0]   = (uint8_t) (packed[PANEL * (2 * b) + r] >> 6 | (t & 15) << 2);
            mins[b][r][1]   = (uint8_t) (packed[PANEL * (2 * b + 1) + r] >> 6 | (t >> 4) << 2);
        }
    }
}

// blocks of 256, with a scale for every 16 or 32 k
//   sum = fma(float(sum of scale*(q - offset)*x), d_w*d_x, sum), and with mins then fma(float(sum of min*x), -(dmin*d_x), sum)
template <weight_type type, int n>
void matmul_256(const uint8_t * panel, int64_t n_blocks, const activations & a, float * out) {
    constexpr int  bytes    = LAYOUTS[type].panel_bytes;
    constexpr int  bits     = dot_bits(LAYOUTS[type].bits);
    constexpr int  sums     = LAYOUTS[type].sums;
    constexpr bool has_min  = LAYOUTS[type].offset == MINIMUM;
    constexpr bool packed   = has_packed_scales(type);
    constexpr int  n_scales = packed || type == W_IQ4_XS ? 8 : 16;
    constexpr int  scale_at = has_min ? 4 * PANEL : 2 * PANEL;
    constexpr int  lines_at = scale_at + PANEL * (packed ? 12 : n_scales);
    constexpr int  group    = (bytes - lines_at) / 8; // bytes of 32 k
    constexpr int  nv       = vectors(n, simd::SUMS);
    for (int sub = 0; sub < PANEL; sub += nv * simd::R) {
        simd::vf sum[nv][n];
        for (int i = 0; i < nv * n; ++i) {
            sum[i / n][i % n] = simd::set1f(0.0f);
        }
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t * p      = panel + b * bytes;
            const uint8_t * scales = p + scale_at;
            const int8_t *  q      = a.q + b * n * 256;
            const float *   dx     = a.d + b * n;
            const int32_t * s      = a.s + b * n * sums;

            alignas(64) uint8_t unpacked[8][PANEL];
            alignas(64) uint8_t mins[n_scales / 2][PANEL][2];
            if constexpr (packed) {
                unpack_scales(scales, unpacked, mins);
                scales = unpacked[0];
            }

            simd::vi t[nv][n];
            for (int i = 0; i < nv * n; ++i) {
                t[i / n][i % n] = simd::set1i(0);
            }
            for (int g = 0; g < 8; ++g) {
                const uint8_t * l = p + lines_at + group * g + 4 * sub;
                prefetch(p + AHEAD + bytes / 8 * g, bytes / 8);

#pragma GCC unroll 4
                for (int v = 0; v < nv; ++v) {
                    simd::vb w[8];
                    unpack_256<type>(l + 4 * v * simd::R, w);
                    const uint8_t * at     = scales + PANEL * (n_scales / 8 * g) + sub + v * simd::R;
                    const simd::vi  scale0 = load_scale<type>(at);
                    const simd::vi  scale1 = n_scales == 8 ? scale0 : load_scale<type>(at + PANEL);
#pragma GCC unroll 16
                    for (int i = 0; i < n; ++i) {
                        const int8_t *  x  = q + 256 * i + 32 * g;
                        const int32_t * sx = s + sums * i + n_scales / 8 * g;
                        simd::vi        u  = simd::dot16<bits>(simd::set1i(has_min ? 0 : sx[0]), w, x);
                        if constexpr (n_scales == 8) {
                            u       = simd::dot16<bits>(u, w + 4, x + 16);
                            t[v][i] = simd::addi(t[v][i], simd::muli(u, scale0));
                        } else {
                            const simd::vi u1 = simd::dot16<bits>(simd::set1i(has_min ? 0 : sx[1]), w + 4, x + 16);
                            t[v][i] = simd::addi(t[v][i], simd::addi(simd::muli(u, scale0), simd::muli(u1, scale1)));
                        }
                        end_token(t[v][i]);
                    }
                }
            }

            if constexpr (has_min && !packed) {
                unpack_mins(scales, mins);
            }
#pragma GCC unroll 4
            for (int v = 0; v < nv; ++v) {
                const int      row = sub + v * simd::R;
                const simd::vf d   = simd::load_f16((const uint16_t *) p + row);
                simd::vf       dmin;
                simd::vi       min[n_scales / 2];
                if constexpr (has_min) {
                    dmin = simd::load_f16((const uint16_t *) p + PANEL + row);
                    for (int g = 0; g < n_scales / 2; ++g) {
                        min[g] = simd::load_u8x2(mins[g][row]);
                    }
                }
#pragma GCC unroll 16
                for (int i = 0; i < n; ++i) {
                    sum[v][i] = simd::fma(simd::cvt(t[v][i]), simd::mulf(d, simd::set1f(dx[i])), sum[v][i]);
                    if constexpr (has_min) {
                        simd::vi m = simd::set1i(0);
                        for (int g = 0; g < n_scales / 2; ++g) {
                            m = simd::dot2(m, min[g], s[sums * i + g]);
                        }
                        sum[v][i] = simd::fma(simd::cvt(m), simd::mulf(dmin, simd::set1f(-dx[i])), sum[v][i]);
                    }
                }
            }
        }
        for (int i = 0; i < nv * n; ++i) {
            simd::storef(out + PANEL * (i % n) + sub + i / n * simd::R, sum[i / n][i % n]);
        }
    }
}

template <weight_type type>
simd::vf load_floats(const uint8_t * p) {
    if constexpr (type == W_F32) {
        return simd::loadf((const float *) p);
    } else {
        return type == W_F16 ? simd::load_f16((const uint16_t *) p) : simd::load_bf16((const uint16_t *) p);
    }
}

// F16, BF16 and F32: each block of 32 k has a sum of its own, in order, which is then added to the whole
template <weight_type type, int n>
void matmul_float(const uint8_t * panel, int64_t n_blocks, const activations & a, float * out) {
    constexpr int size = LAYOUTS[type].panel_bytes / (32 * PANEL); // of a weight, bytes
    constexpr int nv   = vectors(n, simd::SUMS_F);
    for (int sub = 0; sub < PANEL; sub += nv * simd::R) {
        simd::vf sum[nv][n];
        for (int i = 0; i < nv * n; ++i) {
            sum[i / n][i % n] = simd::set1f(0.0f);
        }
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t * w = panel + size * (b * 32 * PANEL + sub);
            prefetch(w + AHEAD, 32 * PANEL * size);

            const float * x = a.f + b * n * 32;
            simd::vf      t[nv][n];
#pragma GCC unroll 16
            for (int i = 0; i < nv * n; ++i) {
                t[i / n][i % n] = simd::set1f(0.0f);
            }
            for (int k = 0; k < 32; ++k) {
#pragma GCC unroll 4
                for (int v = 0; v < nv; ++v) {
                    const simd::vf wk = load_floats<type>(w + size * (k * PANEL + v * simd::R));
#pragma GCC unroll 16
                    for (int i = 0; i < n; ++i) {
                        t[v][i] = simd::fma(wk, simd::set1f(x[32 * i + k]), t[v][i]);
                    }
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < nv * n; ++i) {
                sum[i / n][i % n] = simd::addf(sum[i / n][i % n], t[i / n][i % n]);
            }
        }
        for (int i = 0; i < nv * n; ++i) {
            simd::storef(out + PANEL * (i % n) + sub + i / n * simd::R, sum[i / n][i % n]);
        }
    }
}

// -- dispatch by type and number of tokens --

// [W_COUNT] as LAYOUTS tells; floats have no kernels for more than simd::GF tokens
template <int n, int nf = n <= simd::GF ? n : 1>
constexpr void (*PRODUCTS[W_COUNT])(const uint8_t * panel, int64_t n_blocks, const activations & a, float * out) = {
    matmul_32<W_Q4_0, n>,    matmul_32<W_Q4_1, n>,    matmul_32<W_Q5_0, n>,     matmul_32<W_Q5_1, n>,
    matmul_32<W_Q8_0, n>,    matmul_32<W_IQ4_NL, n>,  matmul_32<W_MXFP4, n>,    matmul_256<W_Q2_K, n>,
    matmul_256<W_Q3_K, n>,   matmul_256<W_Q4_K, n>,   matmul_256<W_Q5_K, n>,    matmul_256<W_Q6_K, n>,
    matmul_256<W_IQ4_XS, n>, matmul_float<W_F16, nf>, matmul_float<W_BF16, nf>, matmul_float<W_F32, nf>,
};

static void
matmul(weight_type type, const uint8_t * panel, int64_t n_blocks, int n, const activations & a, float * out) {
#define CASE(i)                                                \
    case i:                                                    \
        if constexpr (i <= simd::G) {                          \
            return PRODUCTS<i>[type](panel, n_blocks, a, out); \
        }                                                      \
        return
    switch (n) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
        CASE(13);
        CASE(14);
        CASE(15);
        CASE(16);
    }
#undef CASE
}
