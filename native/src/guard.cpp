#include "guard.h"

#include <algorithm>

namespace entmtp {

// memory of the mean: about this many drafted steps
static constexpr double n_window = 32.0;

// a mean of fewer steps than this is not acted on
static constexpr double enough = 0.4; // weight: 1 - (1 - 1/n_window)^n

guard::verdict guard::next() {
    if (probe > 0) {
        return verdict::must;
    }
    if (idle >= wait) {
        paused = false;
        probe  = n_probe;
        won    = 0.0;
        return verdict::must;
    }
    return paused ? verdict::must_not : verdict::free;
}

void guard::fail() {
    wait   = std::min(2 * wait, wait_max);
    idle   = 0;
    mean   = 0.0;
    weight = 0.0;
}

void guard::observe(bool drafted, double saved, double scale) {
    if (!drafted) {
        ++idle;
        return;
    }
    idle = 0;

    const double x = saved / scale;

    mean += (x - mean) / n_window;
    weight += (1.0 - weight) / n_window;

    if (probe > 0) {
        won += x;
        if (--probe == 0) {
            if (won > 0.0) {
                probe = n_probe; // go on while it wins
                won   = 0.0;
                wait  = wait_min;
            } else {
                fail();
            }
        }
        return;
    }

    if (weight > enough) {
        if (mean < 0.0) {
            paused = true;
            fail();
        } else {
            wait = wait_min;
        }
    }
}

} // namespace entmtp
