// Compiled for AVX2 with AVX-VNNI.

#include "half.h"
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {
#include "simd_avx2.h"

using namespace entmtp;
#include "matmul.h"
#include "quantize.h"
// needs prefetch of matmul.h
#include "attention.h"
#include "peak.h"
} // namespace

namespace entmtp {
extern const kernel_set kernels_avxvnni;
const kernel_set        kernels_avxvnni = { "avxvnni",      simd::G, simd::GF, quantize, matmul,
                                            matmul_ordered, attend,  softmax,  int8_peak };
} // namespace entmtp
