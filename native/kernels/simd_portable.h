// Plain C++: for processors without a file of their own, and the reference that the others equal bit for bit.

#include <cmath>

struct simd {
    static constexpr int R      = 4;
    static constexpr int G      = 4;
    static constexpr int GF     = 4;
    static constexpr int SUMS   = 4;
    static constexpr int SUMS_F = 4;
    static constexpr int OFF8   = 0;

    struct vf {
        float v[R];
    };
    struct vi {
        int32_t v[R];
    };
    struct vb {
        uint8_t v[R][4];
    };

    template <class T, class F>
    static T each(F f) {
        T t;
        for (int i = 0; i < R; ++i) {
            t.v[i] = f(i);
        }
        return t;
    }

    static vf set1f(float x) { return { { x, x, x, x } }; }
    static vf loadf(const float * p) {
        return each<vf>([&](int i) { return p[i]; });
    }
    static void storef(float * p, vf x) { memcpy(p, x.v, sizeof(x.v)); }
    static vf   addf(vf a, vf b) {
        return each<vf>([&](int i) { return a.v[i] + b.v[i]; });
    }
    static vf subf(vf a, vf b) {
        return each<vf>([&](int i) { return a.v[i] - b.v[i]; });
    }
    static vf mulf(vf a, vf b) {
        return each<vf>([&](int i) { return a.v[i] * b.v[i]; });
    }
    static vf fma(vf a, vf b, vf c) {
        return each<vf>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
    }
    static vf maxf(vf a, vf b) /* a > b ? a : b */ {
        return each<vf>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static vf cvt(vi a) {
        return each<vf>([&](int i) { return (float) a.v[i]; });
    }
    static vf load_f16(const uint16_t * p) {
        return each<vf>([&](int i) { return half_to_float(p[i]); });
    }

    // halves to even, as the instructions of processors do; what does not fit becomes INT32_MIN
    static vf load_bf16(const uint16_t * p) {
        return each<vf>([&](int i) {
            const uint32_t bits = (uint32_t) p[i] << 16;
            float          x;
            memcpy(&x, &bits, 4);
            return x;
        });
    }
    static vf power2(vi e) {
        return each<vf>([&](int i) {
            const uint32_t bits = (uint32_t) e.v[i] << 23;
            float          x;
            memcpy(&x, &bits, 4);
            return x * 0.5f;
        });
    }
    static vi round(vf a) {
        return each<vi>(
            [&](int i) { return std::fabs(a.v[i]) < 2147483648.0f ? (int32_t) std::nearbyint(a.v[i]) : INT32_MIN; });
    }
    static vf exp2i(vi n) {
        return each<vf>([&](int i) {
            const uint32_t bits = ((uint32_t) n.v[i] + 127u) << 23;
            float          x;
            memcpy(&x, &bits, 4);
            return x;
        });
    }
    static vf zero_if_less(vf x, float limit, vf y) {
        return each<vf>([&](int i) { return x.v[i] < limit ? 0.0f : y.v[i]; });
    }
    static vf if_less(vf x, float limit, vf a, vf b) /* x < limit ? a : b */ {
        return each<vf>([&](int i) { return x.v[i] < limit ? a.v[i] : b.v[i]; });
    }
    static float reduce_max(vf a) {
        float m = a.v[0];
        for (float x : a.v) {
            m = m > x ? m : x;
        }
        return m;
    }

    static vi set1i(int32_t x) { return { { x, x, x, x } }; }
    static vi addi(vi a, vi b) {
        return each<vi>([&](int i) { return (int32_t) ((uint32_t) a.v[i] + (uint32_t) b.v[i]); });
    }
    static vi muli(vi a, vi b) {
        return each<vi>([&](int i) { return (int32_t) ((uint32_t) a.v[i] * (uint32_t) b.v[i]); });
    }
    static vi load_u8(const uint8_t * p) {
        return each<vi>([&](int i) { return (int32_t) p[i]; });
    }
    static vi load_low4(const uint8_t * p) {
        return each<vi>([&](int i) { return (int32_t) (p[i] & 15); });
    }
    static vi load_i8(const uint8_t * p) {
        return each<vi>([&](int i) { return (int32_t) (int8_t) p[i]; });
    }
    static int32_t reduce_add(vi a) { return a.v[0] + a.v[1] + a.v[2] + a.v[3]; }
    static void    store_i8(int8_t * p, vi a) {
        for (int i = 0; i < R; ++i) {
            p[i] = (int8_t) (a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
        }
    }

    static vi load_u8x2(const uint8_t * p) {
        return each<vi>([&](int i) { return (int32_t) p[2 * i] | (int32_t) p[2 * i + 1] << 16; });
    }
    static vi dot2(vi acc, vi w, int32_t x) {
        return each<vi>([&](int i) {
            return acc.v[i] + (int16_t) w.v[i] * (int16_t) x + (int16_t) (w.v[i] >> 16) * (int16_t) (x >> 16);
        });
    }

    template <class F>
    static vb each_byte(F f) {
        vb t;
        for (int i = 0; i < 4 * R; ++i) {
            t.v[i / 4][i % 4] = (uint8_t) f(i / 4, i % 4);
        }
        return t;
    }

    static vb loadb(const uint8_t * p) {
        vb t;
        memcpy(t.v, p, sizeof(t.v));
        return t;
    }
    static vb low4(vb a) {
        return each_byte([&](int i, int j) { return a.v[i][j] & 15; });
    }
    static vb high4(vb a) {
        return each_byte([&](int i, int j) { return a.v[i][j] >> 4; });
    }
    static vb orb(vb a, vb b) {
        return each_byte([&](int i, int j) { return a.v[i][j] | b.v[i][j]; });
    }

    static vb lookup(vb a, const uint8_t * table) {
        return each_byte([&](int i, int j) { return table[a.v[i][j]]; });
    }

    template <int from, int n, int to>
    static vb bits(vb a) {
        return each_byte([&](int i, int j) { return (a.v[i][j] >> from & ((1 << n) - 1)) << to; });
    }

    template <int bits>
    static vi dot16(vi acc, const vb * w, const int8_t * x) {
        for (int k = 0; k < 16; ++k) {
            for (int i = 0; i < R; ++i) {
                const uint8_t u = w[k / 4].v[i][k % 4];
                acc.v[i] += (bits == 8 ? (int8_t) (u ^ 0x80) : (int) u) * x[k];
            }
        }
        return acc;
    }

    struct exact_sum {
        double s = 0.0;

        void add(vf p) {
            for (float x : p.v) {
                const volatile double t = x + 98304.0;
                s += t - 98304.0;
            }
        }
        double get() const { return s; }
    };

    static void transpose_f16(const uint8_t * p, size_t stride, float * out) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < R; ++c) {
                out[c * R + r] = half_to_float(((const uint16_t *) (p + r * stride))[c]);
            }
        }
    }
    static void transpose_f32(const uint8_t * p, size_t stride, float * out) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < R; ++c) {
                out[c * R + r] = ((const float *) (p + r * stride))[c];
            }
        }
    }
};
