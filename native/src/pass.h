// A pass of the model over the tokens of one sequence, or of several that share a context and wait for each other.

#pragma once

#include "outputs.h"
#include "verify.h"

#include "llama.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace entmtp {

class decoder;

// With one sequence a pass runs at once, in the thread that asks for it. With several each has a thread of its own, and a
// pass begins when all that are active have said what they want evaluated. Nobody is waited for much longer than a pass
// takes: who comes late keeps the row that it still needs and joins the next one. All these passes run in one thread of
// ours, for OpenMP gives every thread that computes a team of its own, which spins when it has nothing to do.
class pass {
  public:
    // want_hidden  hidden states beside the logits
    pass(llama_context * ctx, bool want_hidden, int32_t n_seq);
    ~pass();

    verifier memory;
    outputs  out;

    const int32_t n_seq;

    // Every call of a decoder holds the pass: one at a time, and none while it runs
    class hold {
      public:
        hold(pass & p, int32_t seq);
        ~hold() { owner.mutex.unlock(); }

        hold(const hold &)             = delete;
        hold & operator=(const hold &) = delete;

      private:
        pass & owner;
    };

    // Within a call: others may go on, but no pass begins, for this one reads the last one's rows. For what takes long and
    // touches nothing that is shared; with one sequence nothing changes
    class apart {
      public:
        apart(pass & p, int32_t seq);
        ~apart();

        apart(const apart &)             = delete;
        apart & operator=(const apart &) = delete;

      private:
        pass &        owner;
        const int32_t seq;
    };

    // of several sequences: who takes part. Both want the pass held
    void join(int32_t seq, decoder * d);
    void set_active(int32_t seq, bool active);

    // Evaluate a part, together with those of others; returns its status. The pass is held, and let go of meanwhile
    int32_t run(part & mine);

    // Company: the others that the next pass is expected to have, and what all earn together, in tokens per us (0: unknown)
    int32_t n_others(int32_t seq) const;
    double  price() const { return n_active() > 1 && time_seen > 0.0 ? tokens_seen / time_seen : 0.0; }
    void    earn(int32_t n_tokens) { tokens_seen += n_tokens; }

    // tokens of a prompt that a pass may take now
    int32_t prompt_chunk(int32_t seq) const;
    void    set_stall(double us) { stall = us; } // that others may have to wait for a prompt

    // passes so far, parts in them, and their tokens
    int64_t n_passes = 0;
    int64_t n_parts  = 0;
    int64_t n_tokens = 0;

  private:
    using clock = std::chrono::steady_clock;

    struct member {
        decoder * owner  = nullptr;
        bool      active = false;
        bool      absent = false; // was left out, and has not been heard of since
        part *    wants  = nullptr;
        bool      served = false; // what came of it is not collected yet, or is being read: its rows must stay
    };

    int32_t             n_active() const;
    void                be_patient(); // from now on, for half as long as a pass takes
    bool                wanted() const;
    bool                ready() const;
    std::vector<part *> choose() const;
    void                drop_nodes(const std::vector<part *> & parts) const;
    void                lead(std::unique_lock<std::mutex> & lock);
    void                serve();

    llama_context * ctx;

    std::mutex              mutex;
    std::condition_variable changed;
    bool                    running = false;
    bool                    over    = false;
    std::thread             worker;  // of several sequences
    std::vector<member>     members; // [n_seq]
    clock::time_point       deadline;
    int64_t                 n_asked = 0;

    double stall       = 200e3; // us
    double t_last      = 0.0;   // us, of a pass without prompts
    double t_prompt    = 0.0;   // us a token of a prompt takes; 0: not known
    double tokens_seen = 0.0;   // both forget
    double time_seen   = 0.0;
};

} // namespace entmtp
