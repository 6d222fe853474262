// AVX-512 with VNNI: 16 lanes.

#include <immintrin.h>

struct simd {
    static constexpr int R      = 16;  // lanes
    static constexpr int G      = 16;  // tokens per pass over integer weights: what the 32 registers hold
    static constexpr int GF     = 8;   // the same for float weights
    static constexpr int SUMS   = 16;  // of tokens and vectors of rows, for integer weights
    static constexpr int SUMS_F = 8;   // the same for float weights
    static constexpr int OFF8   = 128; // dot16<8> takes 8-bit weights with this added

    using vf = __m512;
    using vi = __m512i;
    using vb = __m512i; // [R][4] bytes

    static vf   set1f(float x) { return _mm512_set1_ps(x); }
    static vf   loadf(const float * p) { return _mm512_loadu_ps(p); }
    static void storef(float * p, vf x) { _mm512_storeu_ps(p, x); }
    static vf   addf(vf a, vf b) { return _mm512_add_ps(a, b); }
    static vf   subf(vf a, vf b) { return _mm512_sub_ps(a, b); }
    static vf   mulf(vf a, vf b) { return _mm512_mul_ps(a, b); }
    static vf   fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
    static vf   maxf(vf a, vf b) /* a > b ? a : b */ { return _mm512_max_ps(a, b); }
    static vf   load_f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static vf   load_bf16(const uint16_t * p) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
    }
    static vf power2(vi e) /* 2^(e - 128) */ {
        return mulf(_mm512_castsi512_ps(_mm512_slli_epi32(e, 23)), set1f(0.5f));
    }
    static vf cvt(vi a) { return _mm512_cvtepi32_ps(a); }
    static vi round(vf a) { return _mm512_cvtps_epi32(a); }
    static vf exp2i(vi n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
    }
    static vf zero_if_less(vf x, float limit, vf y) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1f(limit), _CMP_NLT_UQ), y);
    }
    static vf if_less(vf x, float limit, vf a, vf b) /* x < limit ? a : b */ {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set1f(limit), _CMP_LT_OQ), b, a);
    }
    static float reduce_max(vf a) { return _mm512_reduce_max_ps(a); }

    static vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
    static vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
    static vi muli(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
    static vi load_u8(const uint8_t * p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }
    static vi load_low4(const uint8_t * p) /* the lower nibbles */ { return _mm512_and_si512(load_u8(p), set1i(15)); }
    static vi load_i8(const uint8_t * p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)); }
    static int32_t reduce_add(vi a) { return _mm512_reduce_add_epi32(a); }
    static void    store_i8(int8_t * p, vi a) { _mm_storeu_si128((__m128i *) p, _mm512_cvtsepi32_epi8(a)); }

    // [R] pairs of unsigned bytes, and their products with a pair of int16
    static vi load_u8x2(const uint8_t * p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *) p)); }
    static vi dot2(vi acc, vi w, int32_t x) { return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x)); }

    static vb loadb(const uint8_t * p) { return _mm512_loadu_si512(p); }
    static vb low4(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
    static vb high4(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
    static vb orb(vb a, vb b) { return _mm512_or_si512(a, b); }

    static vb lookup(vb i, const uint8_t * table) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) table)), i);
    }

    // `n` bits of every byte from bit `from` on, moved to bit `to`
    template <int from, int n, int to>
    static vb bits(vb a) {
        return _mm512_and_si512(shift<to - from>(a), _mm512_set1_epi8((char) (((1 << n) - 1) << to)));
    }

    // to the left, or by a negative number to the right; bits of the byte beside come in
    template <int by>
    static vb shift(vb a) {
        return by > 0 ? _mm512_slli_epi16(a, by > 0 ? by : 0) : _mm512_srli_epi16(a, by > 0 ? 0 : -by);
    }

    // acc[r] += sum over 16 k of w[k/4][r][k%4]*x[k]
    template <int bits>
    static vi dot16(vi acc, const vb * w, const int8_t * x) {
        for (int j = 0; j < 4; ++j) {
            int32_t x4;
            memcpy(&x4, x + 4 * j, 4);
            acc = _mm512_dpbusd_epi32(acc, w[j], _mm512_set1_epi32(x4));
        }
        return acc;
    }

    // sums in double of numbers rounded to multiples of 2^-36: exact below 2^17, so their order cannot matter
    struct exact_sum {
        __m512d s = _mm512_setzero_pd();

        void add(vf p) {
            const __m512d c = _mm512_set1_pd(98304.0); // 1.5*2^16
            const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(p));
            const __m512d b = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(p), 1)));
            s               = _mm512_add_pd(s, _mm512_sub_pd(_mm512_add_pd(a, c), c));
            s               = _mm512_add_pd(s, _mm512_sub_pd(_mm512_add_pd(b, c), c));
        }
        double get() const { return _mm512_reduce_add_pd(s); }
    };

    // rows of float -> out[c*R + r]
    static void transpose(__m512 * r, float * out) {
        __m512 t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i]     = _mm512_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i]     = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
            r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            t[i]      = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
            t[i + 4]  = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
            t[i + 8]  = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        }
        for (int i = 0; i < 4; ++i) {
            storef(out + (i + 0) * R, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
            storef(out + (i + 4) * R, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
            storef(out + (i + 8) * R, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
            storef(out + (i + 12) * R, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
        }
    }

    // Words of a transposition in three steps. A step takes two registers of `rows` rows each, and gives one with both's rows
    // for the first (`half` 0) or second half of their columns. Columns lie side by side, at first rows do.
    template <int rows, int half>
    static __m512i columns(__m512i a, __m512i b) {
        struct table {
            alignas(64) uint16_t at[32];
            constexpr table() : at() {
                for (int i = 0; i < 32; ++i) {
                    const int r = i % (2 * rows), c = i / (2 * rows) + half * 16 / rows;
                    at[i] = (uint16_t) ((rows == 2 ? r % rows * 16 + c : c * rows + r % rows) + (r < rows ? 0 : 32));
                }
            }
        };
        static constexpr table words;
        return _mm512_permutex2var_epi16(a, _mm512_load_si512(words.at), b);
    }

    static void transpose_f16(const uint8_t * p, size_t stride, float * out) {
        __m512i x[8], y[8]; // pairs of rows
        for (int i = 0; i < 8; ++i) {
            const __m256i a = _mm256_loadu_si256((const __m256i *) (p + 2 * i * stride));
            const __m256i b = _mm256_loadu_si256((const __m256i *) (p + (2 * i + 1) * stride));
            x[i]            = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        }
        for (int i = 0; i < 4; ++i) {
            y[i]     = columns<2, 0>(x[2 * i], x[2 * i + 1]);
            y[4 + i] = columns<2, 1>(x[2 * i], x[2 * i + 1]);
        }
        for (int i = 0; i < 8; i += 4) { // i: first of 8 columns
            for (int j = 0; j < 2; ++j) {
                x[i + j]     = columns<4, 0>(y[i + 2 * j], y[i + 2 * j + 1]);
                x[i + 2 + j] = columns<4, 1>(y[i + 2 * j], y[i + 2 * j + 1]);
            }
        }
        for (int i = 0; i < 8; i += 2) {
            y[i]     = columns<8, 0>(x[i], x[i + 1]);
            y[i + 1] = columns<8, 1>(x[i], x[i + 1]);
        }
        for (int i = 0; i < 8; ++i) {
            storef(out + 2 * i * R, _mm512_cvtph_ps(_mm512_castsi512_si256(y[i])));
            storef(out + (2 * i + 1) * R, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(y[i], 1)));
        }
    }

    static void transpose_f32(const uint8_t * p, size_t stride, float * out) {
        __m512 r[16];
        for (int i = 0; i < 16; ++i) {
            r[i] = loadf((const float *) (p + i * stride));
        }
        transpose(r, out);
    }
};
