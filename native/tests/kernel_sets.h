// What the tests of the CPU kernels compare instruction sets by.

#pragma once

#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace entmtp {

inline const kernel_set & portable() {
    const kernel_set * const * sets = kernel_sets();
    while (sets[1]) {
        ++sets;
    }
    return **sets;
}

inline bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    if (a.size() != b.size()) {
        return false;
    }
    for (size_t i = 0; i < a.size(); ++i) {
        if (memcmp(&a[i], &b[i], 4) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) {
            fprintf(stderr, "element %zu: %a and %a\n", i, a[i], b[i]);
            return false;
        }
    }
    return true;
}

} // namespace entmtp
