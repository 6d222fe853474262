// Compiled for FEAT_I8MM and FEAT_DotProd of Arm.

#include "half.h"
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {
#include "simd_neon.h"

using namespace entmtp;
#include "matmul.h"
#include "quantize.h"
// needs prefetch of matmul.h
#include "attention.h"
#include "peak.h"
} // namespace

namespace entmtp {
extern const kernel_set kernels_i8mm;
const kernel_set        kernels_i8mm = { "i8mm",         simd::G, simd::GF, quantize, matmul,
                                         matmul_ordered, attend,  softmax,  int8_peak };
} // namespace entmtp
