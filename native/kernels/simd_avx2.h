// AVX2 with FMA and F16C, and AVX-VNNI where the compiler may use it: 8 lanes.

#include <immintrin.h>

struct simd {
    static constexpr int R      = 8;
    static constexpr int G      = 4;
    static constexpr int GF     = 4;
    static constexpr int SUMS   = 2; // measured: with more, a second pass is faster
    static constexpr int SUMS_F = 8;
#ifdef __AVXVNNI__
    static constexpr int OFF8 = 128;
#else
    static constexpr int OFF8 = 0; // 255*127*2 would saturate
#endif

    using vf = __m256;
    using vi = __m256i;
    using vb = __m256i;

    static vf   set1f(float x) { return _mm256_set1_ps(x); }
    static vf   loadf(const float * p) { return _mm256_loadu_ps(p); }
    static void storef(float * p, vf x) { _mm256_storeu_ps(p, x); }
    static vf   addf(vf a, vf b) { return _mm256_add_ps(a, b); }
    static vf   subf(vf a, vf b) { return _mm256_sub_ps(a, b); }
    static vf   mulf(vf a, vf b) { return _mm256_mul_ps(a, b); }
    static vf   fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
    static vf   maxf(vf a, vf b) /* a > b ? a : b */ { return _mm256_max_ps(a, b); }
    static vf   load_f16(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
    static vf   load_bf16(const uint16_t * p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
    }
    static vf power2(vi e) { return mulf(_mm256_castsi256_ps(_mm256_slli_epi32(e, 23)), set1f(0.5f)); }
    static vf cvt(vi a) { return _mm256_cvtepi32_ps(a); }
    static vi round(vf a) { return _mm256_cvtps_epi32(a); }
    static vf exp2i(vi n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static vf zero_if_less(vf x, float limit, vf y) {
        return _mm256_and_ps(_mm256_cmp_ps(x, set1f(limit), _CMP_NLT_UQ), y);
    }

    static vf if_less(vf x, float limit, vf a, vf b) /* x < limit ? a : b */ {
        return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, set1f(limit), _CMP_LT_OQ));
    }
    static float reduce_max(vf a) {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        m        = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    }

    static vi set1i(int32_t x) { return _mm256_set1_epi32(x); }
    static vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
    static vi muli(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
    static vi load_u8(const uint8_t * p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }
    static vi load_low4(const uint8_t * p) { return _mm256_and_si256(load_u8(p), set1i(15)); }
    static vi load_i8(const uint8_t * p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)); }

    static int32_t reduce_add(vi a) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s         = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }

    static void store_i8(int8_t * p, vi a) {
        const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storel_epi64((__m128i *) p, _mm_packs_epi16(s, s));
    }

    static vi load_u8x2(const uint8_t * p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *) p)); }
    static vi dot2(vi acc, vi w, int32_t x) {
        return _mm256_add_epi32(acc, _mm256_madd_epi16(w, _mm256_set1_epi32(x)));
    }

    static vb loadb(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
    static vb low4(vb a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
    static vb high4(vb a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
    static vb orb(vb a, vb b) { return _mm256_or_si256(a, b); }

    static vb lookup(vb i, const uint8_t * table) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) table)), i);
    }

    template <int from, int n, int to>
    static vb bits(vb a) {
        return _mm256_and_si256(shift<to - from>(a), _mm256_set1_epi8((char) (((1 << n) - 1) << to)));
    }

    // to the left, or by a negative number to the right; bits of the byte beside come in
    template <int by>
    static vb shift(vb a) {
        return by > 0 ? _mm256_slli_epi16(a, by > 0 ? by : 0) : _mm256_srli_epi16(a, by > 0 ? 0 : -by);
    }

    template <int bits>
    static vi dot16(vi acc, const vb * w, const int8_t * x) {
        vb x4[4];
        for (int j = 0; j < 4; ++j) {
            int32_t t;
            memcpy(&t, x + 4 * j, 4);
            x4[j] = _mm256_set1_epi32(t);
        }
#ifdef __AVXVNNI__
        for (int j = 0; j < 4; ++j) {
            acc = _mm256_dpbusd_avx_epi32(acc, w[j], x4[j]);
        }
#else
        const __m256i ones = _mm256_set1_epi16(1);
        if (bits == 4) { // 4*2*15*127 fits in int16
            __m256i s = _mm256_maddubs_epi16(w[0], x4[0]);
            for (int j = 1; j < 4; ++j) {
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(w[j], x4[j]));
            }
            acc = _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
        } else if (bits == 6) { // 2*2*63*127 fits
            for (int j = 0; j < 4; j += 2) {
                const __m256i s =
                    _mm256_add_epi16(_mm256_maddubs_epi16(w[j], x4[j]), _mm256_maddubs_epi16(w[j + 1], x4[j + 1]));
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
            }
        } else { // |w| is at most 128: 2*128*127 fits
            for (int j = 0; j < 4; ++j) {
                const __m256i v = _mm256_xor_si256(w[j], _mm256_set1_epi8((char) 0x80));
                const __m256i s = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x4[j], v));
                acc             = _mm256_add_epi32(acc, _mm256_madd_epi16(s, ones));
            }
        }
#endif
        return acc;
    }

    struct exact_sum {
        __m256d s = _mm256_setzero_pd();

        void add(vf p) {
            const __m256d c = _mm256_set1_pd(98304.0);
            const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(p));
            const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(p, 1));
            s               = _mm256_add_pd(s, _mm256_sub_pd(_mm256_add_pd(a, c), c));
            s               = _mm256_add_pd(s, _mm256_sub_pd(_mm256_add_pd(b, c), c));
        }
        double get() const {
            double t[4];
            _mm256_storeu_pd(t, s);
            return (t[0] + t[1]) + (t[2] + t[3]);
        }
    };

    static void transpose(__m256 * r, float * out) {
        __m256 t[8];
        for (int i = 0; i < 8; i += 2) {
            t[i]     = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i]     = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
            r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            storef(out + i * R, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            storef(out + (i + 4) * R, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }

    static void transpose_f16(const uint8_t * p, size_t stride, float * out) {
        __m256 r[8];
        for (int i = 0; i < 8; ++i) {
            r[i] = load_f16((const uint16_t *) (p + i * stride));
        }
        transpose(r, out);
    }

    static void transpose_f32(const uint8_t * p, size_t stride, float * out) {
        __m256 r[8];
        for (int i = 0; i < 8; ++i) {
            r[i] = loadf((const float *) (p + i * stride));
        }
        transpose(r, out);
    }
};
