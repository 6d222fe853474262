// Tokens that a decoder drew and evaluated before its caller asked for them.

#pragma once

#include "entmtp.h"
#include "llama.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace entmtp {

struct sampler_deleter {
    void operator()(llama_sampler * s) { llama_sampler_free(s); }
};
using sampler_ptr = std::unique_ptr<llama_sampler, sampler_deleter>;

// have a sampler chain be what a clone of it is
void restore(llama_sampler * chain, llama_sampler * from);

// Token i was drawn after those before it had been evaluated; the caller takes it, then has it evaluated. All but the
// taking wants the pass held. The caller's thread alone takes, begins and ends
//   n_followed <= n_taken <= n_drawn,  n_done <= n_drawn <= n_done + 1
struct run_ahead {
    static constexpr int32_t size = 128; // tokens that may wait, more than a tree is deep

    struct drawn {
        int32_t     token = 0;
        int32_t     by    = -1; // who guessed it, as entmtp_step counts them; -1: it began a step
        sampler_ptr before;     // the sampler as it was
    };

    llama_sampler * sampler = nullptr; // that draws; null: nothing is done ahead
    int32_t         pos0    = 0;       // of token 0

    std::array<drawn, size> tokens;
    std::atomic<int32_t>    n_drawn{ 0 };
    std::atomic<int32_t>    n_taken{ 0 };
    int32_t                 n_done     = 0;     // evaluated
    int32_t                 n_followed = 0;     // the caller had them evaluated, too
    int32_t                 last_root  = -1;    // the last step began with this one
    bool                    flying     = false; // the pass of token n_done is to come

    int32_t     status = ENTMTP_OK;             // why token n_done was not evaluated
    std::string error;

    drawn & operator[](int32_t i) { return tokens[i % size]; }

    int32_t place() const { return pos0 + n_followed; } // where the caller is, tokens

    void begin(llama_sampler * s, int32_t pos) {
        sampler = s;
        pos0    = pos;
        n_drawn = n_taken = n_done = n_followed = 0;
        last_root                               = -1;
        flying                                  = false;
        status                                  = ENTMTP_OK;
    }

    // `token` comes next at this place, and the caller took it
    bool expects(int32_t token, int32_t pos) {
        return sampler && n_followed < n_taken && tokens[n_followed % size].token == token && pos == place();
    }
};

} // namespace entmtp
