// The int8 peak of an instruction set: included after its `simd`.

static int64_t int8_peak(int64_t n_steps) {
    constexpr int n = 12; // sums: enough to hide the latency of the instruction on every processor that has it

    // activations of which the compiler knows nothing, others for each sum and step: no product can be used twice
    static volatile int8_t one = 1;
    int8_t                 x[4 * n * 16];
    for (int8_t & v : x) {
        v = one;
    }
    uint8_t ones[4 * simd::R];
    memset(ones, 1, sizeof(ones));

    simd::vb w[4];
    for (int j = 0; j < 4; ++j) {
        w[j] = simd::loadb(ones);
    }
    simd::vi sum[n];
#pragma GCC unroll 12
    for (int i = 0; i < n; ++i) {
        sum[i] = simd::set1i(0);
    }
    for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < n; ++i) {
            sum[i] = simd::dot16<4>(sum[i], w, x + 16 * (step % 4 * n + i));
        }
    }
    int32_t all = 0;
#pragma GCC unroll 12
    for (int i = 0; i < n; ++i) {
        all += simd::reduce_add(sum[i]);
    }
    const volatile int32_t looked_at = all; // so that the products must be computed
    (void) looked_at;
    return n_steps * n * 16 * simd::R;
}
