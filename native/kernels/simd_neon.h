// NEON with dot products of bytes: 4 lanes, and 32 registers. With FEAT_I8MM weights are unsigned, else signed.

#include <arm_neon.h>

struct simd {
    static constexpr int R      = 4;
    static constexpr int G      = 16;
    static constexpr int GF     = 4;
    static constexpr int SUMS   = 16; // 8 weights and what is in flight are in the other registers
    static constexpr int SUMS_F = 16;
#ifdef __ARM_FEATURE_MATMUL_INT8
    static constexpr int OFF8 = 128;
#else
    static constexpr int OFF8 = 0;
#endif

    using vf = float32x4_t;
    using vi = int32x4_t;
    using vb = uint8x16_t; // [R][4] bytes

    static vf   set1f(float x) { return vdupq_n_f32(x); }
    static vf   loadf(const float * p) { return vld1q_f32(p); }
    static void storef(float * p, vf x) { vst1q_f32(p, x); }
    static vf   addf(vf a, vf b) { return vaddq_f32(a, b); }
    static vf   subf(vf a, vf b) { return vsubq_f32(a, b); }
    static vf   mulf(vf a, vf b) { return vmulq_f32(a, b); }
    static vf   fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
    static vf   maxf(vf a, vf b) /* a > b ? a : b */ { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static vf   load_f16(const uint16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static vf   load_bf16(const uint16_t * p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16)); }
    static vf   power2(vi e) { return mulf(vreinterpretq_f32_s32(vshlq_n_s32(e, 23)), set1f(0.5f)); }
    static vf   cvt(vi a) { return vcvtq_f32_s32(a); }
    static vi   round(vf a) { // the instruction saturates, and makes NaN 0
        const uint32x4_t fits = vcaltq_f32(a, set1f(2147483648.0f));
        return vbslq_s32(fits, vcvtnq_s32_f32(a), set1i(INT32_MIN));
    }
    static vf exp2i(vi n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, set1i(127)), 23)); }
    static vf zero_if_less(vf x, float limit, vf y) { return vbslq_f32(vcltq_f32(x, set1f(limit)), set1f(0.0f), y); }
    static vf if_less(vf x, float limit, vf a, vf b) /* x < limit ? a : b */ {
        return vbslq_f32(vcltq_f32(x, set1f(limit)), a, b);
    }
    static float reduce_max(vf a) { return vmaxvq_f32(a); }

    static vi set1i(int32_t x) { return vdupq_n_s32(x); }
    static vi addi(vi a, vi b) { return vaddq_s32(a, b); }
    static vi muli(vi a, vi b) { return vmulq_s32(a, b); }
    static vi load_u8(const uint8_t * p) { return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(load4(p))))); }
    static vi load_low4(const uint8_t * p) { return vandq_s32(load_u8(p), set1i(15)); }
    static vi load_i8(const uint8_t * p) { return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load4(p))))); }
    static int32_t reduce_add(vi a) { return vaddvq_s32(a); }
    static void    store_i8(int8_t * p, vi a) {
        const int16x4_t s = vqmovn_s32(a);
        const int8x8_t  b = vqmovn_s16(vcombine_s16(s, s));
        memcpy(p, &b, R);
    }

    static vi load_u8x2(const uint8_t * p) { return vreinterpretq_s32_u16(vmovl_u8(vld1_u8(p))); }
    static vi dot2(vi acc, vi w, int32_t x) {
        const int16x8_t a = vreinterpretq_s16_s32(w), b = vreinterpretq_s16_s32(set1i(x));
        const int32x4_t lo = vmull_s16(vget_low_s16(a), vget_low_s16(b)), hi = vmull_high_s16(a, b);
        return vaddq_s32(acc, vpaddq_s32(lo, hi));
    }

    static vb loadb(const uint8_t * p) { return vld1q_u8(p); }
    static vb low4(vb a) { return vandq_u8(a, vdupq_n_u8(15)); }
    static vb high4(vb a) { return vshrq_n_u8(a, 4); }
    static vb orb(vb a, vb b) { return vorrq_u8(a, b); }

    static vb lookup(vb i, const uint8_t * table) { return vqtbl1q_u8(vld1q_u8(table), i); }

    template <int from, int n, int to>
    static vb bits(vb a) {
        return vandq_u8(shift<to - from>(a), vdupq_n_u8(((1 << n) - 1) << to));
    }

    template <int by>
    static vb shift(vb a) {
        if constexpr (by > 0) {
            return vshlq_n_u8(a, by);
        } else if constexpr (by < 0) {
            return vshrq_n_u8(a, -by);
        } else {
            return a;
        }
    }

    // a lane of x holds 4 k for all rows
    template <int bits>
    static vi dot16(vi acc, const vb * w, const int8_t * x) {
        const int8x16_t x16 = vld1q_s8(x);
#ifdef __ARM_FEATURE_MATMUL_INT8
        acc = vusdotq_laneq_s32(acc, w[0], x16, 0);
        acc = vusdotq_laneq_s32(acc, w[1], x16, 1);
        acc = vusdotq_laneq_s32(acc, w[2], x16, 2);
        acc = vusdotq_laneq_s32(acc, w[3], x16, 3);
#else
        acc = vdotq_laneq_s32(acc, sign<bits>(w[0]), x16, 0);
        acc = vdotq_laneq_s32(acc, sign<bits>(w[1]), x16, 1);
        acc = vdotq_laneq_s32(acc, sign<bits>(w[2]), x16, 2);
        acc = vdotq_laneq_s32(acc, sign<bits>(w[3]), x16, 3);
#endif
        return acc;
    }

    struct exact_sum {
        float64x2_t s = vdupq_n_f64(0.0);

        void add(vf p) {
            const float64x2_t c = vdupq_n_f64(98304.0);
            s                   = vaddq_f64(s, vsubq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(p)), c), c));
            s                   = vaddq_f64(s, vsubq_f64(vaddq_f64(vcvt_high_f64_f32(p), c), c));
        }
        double get() const { return vaddvq_f64(s); }
    };

    static void transpose(const vf r[4], float * out) {
        const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
        storef(out + 0 * R, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
        storef(out + 1 * R, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
        storef(out + 2 * R, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
        storef(out + 3 * R, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }

    static void transpose_f16(const uint8_t * p, size_t stride, float * out) {
        vf r[4];
        for (int i = 0; i < 4; ++i) {
            r[i] = load_f16((const uint16_t *) (p + i * stride));
        }
        transpose(r, out);
    }

    static void transpose_f32(const uint8_t * p, size_t stride, float * out) {
        vf r[4];
        for (int i = 0; i < 4; ++i) {
            r[i] = loadf((const float *) (p + i * stride));
        }
        transpose(r, out);
    }

  private:
    static uint8x8_t load4(const uint8_t * p) {
        uint32_t x;
        memcpy(&x, p, 4);
        return vreinterpret_u8_u32(vdup_n_u32(x));
    }

    // 4 and 6 bits are positive either way; bytes have 128 added
    template <int bits>
    static int8x16_t sign(vb w) {
        return vreinterpretq_s8_u8(bits == 8 ? veorq_u8(w, vdupq_n_u8(0x80)) : w);
    }
};
