// The int8 peak of an instruction set: included after its `simd`.

// 12 sums are enough to hide the latency of the instruction on every processor that has it
static inline int32_t sum_so_far(simd::vi a) {
    int32_t x;
    memcpy(&x, &a, 4);
    return x;
}

static int64_t int8_peak(int64_t n_steps) {
    constexpr int n = 12;
    int8_t        x[16];
    memset(x, 1, sizeof(x));
    uint8_t ones[4 * simd::R];
    memset(ones, 1, sizeof(ones));

    simd::vb w[4];
    for (simd::vb & v : w) {
        v = simd::loadb(ones);
    }
    // different starts: equal sums would be computed once
    simd::vi s0 = simd::set1i(0), s1 = simd::set1i(1), s2 = simd::set1i(2), s3 = simd::set1i(3), s4 = simd::set1i(4),
             s5 = simd::set1i(5), s6 = simd::set1i(6), s7 = simd::set1i(7), s8 = simd::set1i(8), s9 = simd::set1i(9),
             s10 = simd::set1i(10), s11 = simd::set1i(11);
    for (int64_t i = 0; i < n_steps; ++i) {
#define STEP(s) s = simd::dot16<4>(s, w, x)
        STEP(s0);
        STEP(s1);
        STEP(s2);
        STEP(s3);
        STEP(s4);
        STEP(s5);
        STEP(s6);
        STEP(s7);
        STEP(s8);
        STEP(s9);
        STEP(s10);
        STEP(s11);
#undef STEP
        x[i & 15] ^= (int8_t) (sum_so_far(s0) & 1); // depends on the sums: nothing can be taken out of the loop
    }
    const simd::vi all[n] = { s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11 };
    int32_t        sum    = 0;
    for (const simd::vi & s : all) {
        sum += simd::reduce_add(s);
    }
    static volatile int32_t looked_at; // so that the products must be computed
    looked_at = sum;
    (void) looked_at;
    return n_steps * n * 16 * simd::R;
}
