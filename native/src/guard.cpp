#include "guard.h"

#include <algorithm>

namespace entmtp {

static constexpr int32_t wait_min  = 96;   // steps
static constexpr int32_t wait_max  = 4096; // steps
static constexpr int32_t wait_text = 768;  // steps, at the begin of a text
static constexpr int32_t n_soon    = 8;    // steps into a new text until heads that have won before are tried
static constexpr int32_t n_probe   = 4;    // drafts of one trial

// all in plain steps
static constexpr double streak_max = 12.0; // lost in a row before drafting pauses
static constexpr double streak_new = 4.0;  // the same for heads that never won anything yet
static constexpr double probe_max  = 1.5;  // lost in one trial

guard::guard() : wait(wait_min) {}

guard::verdict guard::next() {
    if (probe > 0) {
        return verdict::must;
    }
    if (idle >= wait) {
        probe = n_probe;
        won   = 0.0;
        return verdict::must;
    }
    return paused ? verdict::must_not : verdict::free;
}

void guard::begin_text() {
    if (proven) {
        wait = wait_min;
        idle = std::max(idle, wait_min - n_soon);
    } else {
        wait = std::min(wait, wait_text);
    }
}

void guard::fail() {
    wait   = std::min(2 * wait, wait_max);
    idle   = 0;
    probe  = 0;
    won    = 0.0;
    streak = 0.0;
}

void guard::observe(bool drafted, double saved) {
    if (!drafted) {
        ++idle;
        return;
    }
    idle = 0;
    won += saved;

    if (probe > 0) {
        if (won < -probe_max || (probe == 1 && won <= 0.0)) {
            fail();
        } else if (--probe == 0) {
            // go on while it wins
            probe  = n_probe;
            won    = 0.0;
            paused = false;
            wait   = wait_min;
        }
        return;
    }

    streak = std::min(0.0, streak + saved + allowance);
    if (streak < -(proven ? streak_max : streak_new)) {
        paused = true;
        fail();
    } else if (won > streak_new) {
        proven = true;
        wait   = wait_min;
    }
}

} // namespace entmtp
