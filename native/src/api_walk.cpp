// The C boundary of what a step drafted.

#include "api.h"
#include "entmtp_walk.h"

int32_t entmtp_decoder_get_walk(const entmtp_decoder * dec, entmtp_walk * walk, entmtp_node * nodes, int32_t n_max) {
    if (!dec || !walk || (!nodes && n_max > 0)) {
        return entmtp::fail("no decoder, or no room for what it drafted");
    }
    const auto hold = dec->impl.hold();
    *walk           = dec->impl.walk(nodes, n_max);
    return ENTMTP_OK;
}
