// What the files of the C boundary share: its objects, and exceptions as statuses.

#pragma once

#include "decoder.h"
#include "draft_model.h"
#include "heads.h"

#include "entmtp.h"

#include <exception>
#include <string>

struct entmtp_heads {
    entmtp::heads impl;
};

struct entmtp_draft_model {
    entmtp::draft_model impl;
};

struct entmtp_decoder {
    entmtp::decoder impl;
};

namespace entmtp {

extern thread_local std::string last_error;

inline int32_t fail(const char * what) {
    last_error = what;
    return ENTMTP_ERROR;
}

// runs f() -> int32_t
template <typename F>
int32_t guarded(F && f) {
    try {
        return f();
    } catch (const std::exception & e) {
        return fail(e.what());
    } catch (...) {
        return fail("unknown failure");
    }
}

// the same for a decoder, whose statuses carry their reason along
template <typename F>
int32_t guarded(entmtp_decoder * dec, F && f) {
    if (!dec) {
        return fail("no decoder");
    }
    const auto hold = dec->impl.hold();
    dec->impl.error.clear();
    const int32_t status = guarded([&] { return f(dec->impl); });
    // whatever came of it: what is read from a lost server means nothing
    if (const char * server = dec->impl.servers.lost()) {
        last_error = std::string("the RPC server ") + server +
                     " is lost: it ended, or the network did; start it again, then load the model anew";
        return ENTMTP_SERVER_LOST;
    }
    if (status != ENTMTP_OK && !dec->impl.error.empty()) {
        last_error = dec->impl.error;
        dec->impl.error.clear();
    }
    return status;
}

} // namespace entmtp
