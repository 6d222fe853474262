#include "guard.h"

#include <algorithm>
#include <cmath>

namespace entmtp {

// memory of the means, drafted steps
static constexpr double n_window = 128.0;

// a losing streak is acted on when chance is no longer a good excuse: after so many steps, and when the mean lies so many
// standard errors below 0
static constexpr double n_least  = 8.0;
static constexpr double n_errors = 2.0;

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
    square = 0.0;
    n      = 0.0;
}

void guard::observe(bool drafted, double saved, double scale) {
    if (!drafted) {
        ++idle;
        return;
    }
    idle = 0;

    const double x = saved / scale;

    n = std::min(n + 1.0, n_window);
    mean += (x - mean) / n;
    square += (x * x - square) / n;

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

    const double error = std::sqrt(std::max(square - mean * mean, 0.0) / n);

    if (n >= n_least && mean + n_errors * error < 0.0) {
        paused = true;
        fail();
    } else if (n >= n_least && mean > 0.0) {
        wait = wait_min;
    }
}

} // namespace entmtp
