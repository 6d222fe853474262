// Which kernels this processor can run.

#include "kernels.h"

#if defined(ENTMTP_NO_KERNELS)
// the portable ones alone, which nothing chooses by itself
#elif defined(__x86_64__) || defined(_M_X64)
#    define ENTMTP_X86
#    ifdef _MSC_VER
#        include <immintrin.h>
#        include <intrin.h>
#    else
#        include <cpuid.h>
#    endif
#elif defined(ENTMTP_DOTPROD) // and ENTMTP_I8MM: CMake found that the compiler knows the instructions
#    if defined(__APPLE__)
#        include <sys/sysctl.h>
#    elif defined(__linux__)
#        include <sys/auxv.h>
#    endif
#endif

namespace entmtp {

extern const kernel_set kernels_portable;
#ifdef ENTMTP_X86
extern const kernel_set kernels_avx512vnni, kernels_avxvnni, kernels_avx2;

static void cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) {
#    ifdef _MSC_VER
    __cpuidex((int *) r, (int) leaf, (int) sub);
#    else
    __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
#    endif
}

static uint64_t enabled_state() { // register files that the system saves
#    ifdef _MSC_VER
    return _xgetbv(0);
#    else
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t) hi << 32 | lo;
#    endif
}
#endif

#ifdef ENTMTP_DOTPROD
extern const kernel_set kernels_i8mm, kernels_dotprod;

#    ifdef __APPLE__
static bool has_feature(const char * name) {
    int    value = 0;
    size_t size  = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
static bool has_dotprod() {
    return has_feature("hw.optional.arm.FEAT_DotProd");
}
static bool has_i8mm() {
    return has_feature("hw.optional.arm.FEAT_I8MM");
}
#    elif defined(__linux__)
static bool has_dotprod() {
    return getauxval(AT_HWCAP) >> 20 & 1; // HWCAP_ASIMDDP
}
static bool has_i8mm() {
    return getauxval(AT_HWCAP2) >> 13 & 1; // HWCAP2_I8MM, which older headers lack
}
#    else
static bool has_dotprod() {
    return false;
}
static bool has_i8mm() {
    return false;
}
#    endif
#endif

const kernel_set * const * kernel_sets() {
    static const kernel_set * sets[5] = {};
    static const bool         filled  = [] {
        int n = 0;
#ifdef ENTMTP_X86
        uint32_t r0[4], r1[4], r7[4], r71[4] = {};
        cpuid(0, 0, r0);
        cpuid(1, 0, r1);
        if (r0[0] >= 7 && (r1[2] >> 27 & 1)) { // osxsave
            cpuid(7, 0, r7);
            if (r7[0] >= 1) {
                cpuid(7, 1, r71);
            }
            const uint64_t state  = enabled_state();
            const bool     ymm    = (state & 0x6) == 0x6;
            const bool     zmm    = (state & 0xe6) == 0xe6;
            const bool     avx2   = ymm && (r7[1] >> 5 & 1) && (r1[2] >> 12 & 1) && (r1[2] >> 29 & 1); // fma, f16c
            const bool f_dq_bw_vl = (r7[1] >> 16 & 1) && (r7[1] >> 17 & 1) && (r7[1] >> 30 & 1) && (r7[1] >> 31 & 1);
            if (avx2 && zmm && f_dq_bw_vl && (r7[2] >> 11 & 1)) {
                sets[n++] = &kernels_avx512vnni;
            }
            if (avx2 && (r71[0] >> 4 & 1)) {
                sets[n++] = &kernels_avxvnni;
            }
            if (avx2) {
                sets[n++] = &kernels_avx2;
            }
        }
#endif
#ifdef ENTMTP_DOTPROD
        if (has_dotprod()) {
#    ifdef ENTMTP_I8MM
            if (has_i8mm()) {
                sets[n++] = &kernels_i8mm;
            }
#    endif
            sets[n++] = &kernels_dotprod;
        }
#endif
        sets[n++] = &kernels_portable;
        return true;
    }();
    (void) filled;
    return sets;
}

} // namespace entmtp
