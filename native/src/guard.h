// Never slower: drafting stops where it loses against plain decoding, and is tried again now and then.

#pragma once

#include <cstdint>

namespace entmtp {

// Two situations are watched. Drafts that do not pay: after a losing streak drafting pauses. And drafts that were not
// made: what was learned on the last text may not hold for this one, so after a while a few steps draft whatever the
// policy expects, and go on as long as they win. Both waits double from one failure to the next.
class guard {
  public:
    enum class verdict { free, must_not, must };

    // what the next step may do
    verdict next();

    // what it did: the time it saved, plain decoding of the same tokens less the step itself
    //   scale  time of a plain step, same unit
    void observe(bool drafted, double saved, double scale);

  private:
    static constexpr int32_t wait_min = 96;   // steps
    static constexpr int32_t wait_max = 4096;
    static constexpr int32_t n_probe  = 4;    // drafts of one trial

    int32_t wait   = wait_min;
    int32_t idle   = 0;     // steps since the last draft
    bool    paused = false; // until `idle` reaches `wait`
    int32_t probe  = 0;     // drafts left of the trial that is running
    double  won    = 0.0;   // in it, in plain steps

    // of what drafted steps saved, in plain steps
    double mean   = 0.0;
    double square = 0.0; // mean of the squares
    double n      = 0.0; // steps in these means

    void fail();
};

} // namespace entmtp
