// The C boundary of several sequences that share the passes of a context.

#include "api.h"
#include "entmtp_group.h"

#include <memory>
#include <vector>

struct entmtp_group {
    entmtp::pass                                 shared;
    std::vector<std::unique_ptr<entmtp_decoder>> members; // they go before what they share

    entmtp_group(llama_context * ctx, bool want_hidden, int32_t n_seq) : shared(ctx, want_hidden, n_seq) {}
};

using entmtp::fail;
using entmtp::guarded;

entmtp_group * entmtp_group_init(llama_context * ctx, entmtp_heads * heads, int32_t n_seq, int32_t n_ctx) {
    entmtp_group * res = nullptr;
    guarded([&] {
        if (!ctx || !llama_get_memory(ctx)) {
            return fail("no context, or one without a memory to decode with");
        }
        if (n_seq < 1 || n_seq > (int32_t) llama_n_seq_max(ctx) || n_ctx < 1) {
            return fail("the context was not made for so many sequences (n_seq_max)");
        }
        if (n_seq > 1 && llama_n_ctx_seq(ctx) < llama_n_ctx(ctx)) {
            return fail("the context has a cache for every sequence; create it with kv_unified");
        }
        auto group = std::make_unique<entmtp_group>(ctx, heads != nullptr, n_seq);
        if (n_seq > 1 && group->shared.memory.recurrent()) {
            return fail("the memory of this model, a state, cannot hold several texts in one cache");
        }
        for (int32_t i = 0; i < n_seq; ++i) {
            group->members.emplace_back(
                new entmtp_decoder{ { ctx, heads ? &heads->impl : nullptr, group->shared, i, n_ctx } });
        }
        res = group.release();
        return (int32_t) ENTMTP_OK;
    });
    return res;
}

void entmtp_group_free(entmtp_group * group) {
    delete group;
}

entmtp_decoder * entmtp_group_decoder(entmtp_group * group, int32_t i) {
    return group && i >= 0 && i < group->shared.n_seq ? group->members[i].get() : nullptr;
}

void entmtp_group_set_active(entmtp_group * group, int32_t i, bool active) {
    if (entmtp_decoder * dec = entmtp_group_decoder(group, i)) {
        const auto hold = dec->impl.hold();
        if (!active) {
            dec->impl.detach();
        }
        group->shared.set_active(i, active);
    }
}

void entmtp_group_set_stall(entmtp_group * group, double us) {
    if (group && us > 0.0) {
        const auto hold = group->members[0]->impl.hold();
        group->shared.set_stall(us);
    }
}

void entmtp_group_get_passes(entmtp_group * group, int64_t * n_passes, int64_t * n_parts, int64_t * n_tokens) {
    if (group && n_passes && n_parts && n_tokens) {
        const auto hold = group->members[0]->impl.hold();
        *n_passes       = group->shared.n_passes;
        *n_parts        = group->shared.n_parts;
        *n_tokens       = group->shared.n_tokens;
    }
}

int32_t entmtp_decoder_clear(entmtp_decoder * dec) {
    return guarded(dec, [&](entmtp::decoder & d) {
        d.clear();
        return (int32_t) ENTMTP_OK;
    });
}

int32_t entmtp_decoder_in_common(const entmtp_decoder * dec, const int32_t * tokens, int32_t n) {
    if (!dec || !tokens || n < 0) {
        return 0;
    }
    const auto hold = dec->impl.hold();
    return dec->impl.in_common(tokens, n);
}

int32_t entmtp_decoder_n_held(const entmtp_decoder * dec) {
    if (!dec) {
        return 0;
    }
    const auto hold = dec->impl.hold();
    return dec->impl.n_held();
}

int32_t entmtp_decoder_share(entmtp_decoder * dec, const entmtp_decoder * from, const int32_t * tokens, int32_t n) {
    int32_t       n_shared = 0;
    const int32_t status   = guarded(dec, [&](entmtp::decoder & d) {
        if (!from || !tokens || n < 0) {
            return fail("no decoder or tokens to share");
        }
        n_shared = d.share(from->impl, tokens, n);
        return (int32_t) ENTMTP_OK;
    });
    return status == ENTMTP_OK ? n_shared : status;
}
