// Compiled for any processor.

#include "half.h"
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace {
#include "simd_portable.h"

using namespace entmtp;
#include "matmul.h"
#include "quantize.h"
// needs prefetch of matmul.h
#include "attention.h"
} // namespace

namespace entmtp {
extern const kernel_set kernels_portable;
const kernel_set        kernels_portable = { "portable",     simd::G, simd::GF, quantize, matmul,
                                             matmul_ordered, attend,  softmax,  nullptr };
} // namespace entmtp
