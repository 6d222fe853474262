// Never slower: drafting stops where it loses against plain decoding, and is tried again now and then.

#pragma once

#include <cstdint>

namespace entmtp {

// Two situations are watched. Drafts that do not pay: after a losing streak drafting pauses. And drafts that were not
// made: what was learned on the last text may not hold for this one, so after a while a few steps draft whatever the
// policy expects, and go on as long as they win. Both waits double from one failure to the next.
//
// A losing streak is found by its cumulative sum (Page 1954): what drafted steps saved, cut at 0 from above, so that it
// tells since when they lose, however much they won before.
class guard {
  public:
    enum class verdict { free, must_not, must };

    // a step may lose so much, in plain steps: chance alone must not end what pays a little
    static constexpr double allowance = 0.03;

    // what the next step may do
    verdict next();

    // A new text may be easier than the last one: heads that have won before are tried soon, others are not waited for
    // as long as they might be
    void begin_text();

    // what it did: the time it saved, plain decoding of the same tokens less the step itself, in plain steps
    void observe(bool drafted, double saved);

    guard();

  private:
    int32_t wait;           // steps until the next trial
    int32_t idle   = 0;     // steps since the last draft
    bool    paused = false; // until a trial wins
    bool    proven = false; // drafting has won once
    int32_t probe  = 0;     // drafts left of the trial that is running
    double  won    = 0.0;   // by that trial; outside of trials since the last failure
    double  streak = 0.0;   // cumulative sum, at most 0

    void fail();
};

} // namespace entmtp
