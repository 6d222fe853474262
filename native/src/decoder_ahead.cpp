// In company a decoder does not wait for its caller: while he looks at a token, the token's pass is on its way.

#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <exception>

namespace entmtp {

// tokens by which a text may be cut back; where layers have a window, it must still hold what came before
static constexpr int32_t most_back = run_ahead::size + 64;

void restore(llama_sampler * chain, llama_sampler * from) {
    while (llama_sampler_chain_n(chain) > 0) {
        llama_sampler_free(llama_sampler_chain_remove(chain, 0));
    }
    while (llama_sampler_chain_n(from) > 0) {
        llama_sampler_chain_add(chain, llama_sampler_chain_remove(from, 0));
    }
}

bool decoder::take(const llama_sampler * sampler, int32_t * token) {
    const int32_t i = ahead.n_taken;
    if (ahead.sampler != sampler || !sampler || i == ahead.n_drawn) {
        return false;
    }
    *token        = ahead[i].token;
    ahead.n_taken = i + 1;
    return true;
}

int32_t decoder::sample_on(llama_sampler * sampler, int32_t * token) {
    come_back();
    const int32_t status = sample(sampler, token);
    if (status != ENTMTP_OK || shared.n_seq == 1 || strcmp(llama_sampler_name(sampler), "chain") != 0) {
        return status;
    }
    ahead.begin(sampler, reached());
    ahead[0].token = *token;
    ahead.n_drawn = ahead.n_taken = 1;
    go_on();
    return ENTMTP_OK;
}

// the next step, as far as its pass
void decoder::go_on() {
    try {
        while (ahead.sampler && !ahead.flying && !cancelled && ahead.status == ENTMTP_OK && draw_next()) {
            evaluate_next();
        }
    } catch (const std::exception & e) {
        live         = false;
        ahead.flying = false;
        ahead.status = ENTMTP_ERROR;
        ahead.error  = e.what();
    }
}

// false: there is no token to evaluate before the caller has done something
bool decoder::draw_next() {
    run_ahead::drawn & next = ahead[ahead.n_done];
    if (ahead.n_drawn == ahead.n_done) {
        const bool far = ahead.n_taken <= ahead.last_root || ahead.n_done - ahead.n_followed >= run_ahead::size - 1;
        if (far || !live) {
            return false;
        }
        next.before.reset(llama_sampler_clone(ahead.sampler));
        sample(ahead.sampler, &next.token);
        ++ahead.n_drawn;
    }
    const llama_vocab * vocab  = llama_model_get_vocab(llama_get_model(ctx));
    const bool          keeps  = memory.window() == 0 || reached() + most_back < memory.window();
    const bool          passes = !is_drafted(next.token);
    return !llama_vocab_is_eog(vocab, next.token) && (!passes || (reached() < n_ctx && keeps));
}

void decoder::evaluate_next() {
    run_ahead::drawn & next = ahead[ahead.n_done];
    if (is_drafted(next.token)) {
        next.by = (int32_t) first_of(drafted_by(next.token));
        advance(next.token);
        ++ahead.n_done;
        return;
    }
    next.by         = -1;
    ahead.last_root = ahead.n_done;
    ahead.status    = begin_step(next.token);
    if (ahead.status != ENTMTP_OK) {
        ahead.error = error;
        return;
    }
    ahead.flying = true;
    shared.post(work);
}

// the pass of a step that was begun ahead is over; in its thread
void decoder::arrived() {
    try {
        ahead.flying = wants_less();
        if (ahead.flying) {
            shared.post(work);
            return;
        }
        ahead.status = end_step();
    } catch (const std::exception & e) {
        live         = false;
        ahead.status = ENTMTP_ERROR;
        error        = e.what();
    }
    if (ahead.status == ENTMTP_OK) {
        ++ahead.n_done;
        go_on();
    } else {
        ahead.error = error;
    }
}

bool decoder::follow(const int32_t * toks, int32_t n, int32_t past) {
    if (n != 1 || cancelled || !ahead.expects(toks[0], past)) {
        return false;
    }
    pass::glance look(shared, seq);
    look.wait([&] { return ahead.n_done > ahead.n_followed || !ahead.flying; });
    if (ahead.n_done == ahead.n_followed) {
        return false;
    }
    ahead[ahead.n_followed++].before.reset();
    if (!ahead.flying) {
        look.wait_for_pass();
        go_on();
    }
    return true;
}

// what the caller did not ask for is taken back, and his sampler with it
void decoder::come_back() {
    if (!ahead.sampler) {
        return;
    }
    if (ahead.flying) {
        shared.withdraw(seq);
        ahead.flying = false;
        live         = false; // a pass may have been begun without it, and the row be gone
        text.truncate(n_past);
    }
    for (int32_t i = ahead.n_done; stats && steps.size() > 0 && i-- > ahead.n_followed;) {
        if (ahead[i].by < 0) {
            steps.drop_last();
            in_list = false;
        } else {
            steps.back().n_accepted--;
            steps.back().n_by[ahead[i].by]--;
        }
    }
    if (ahead.n_taken < ahead.n_drawn) {
        restore(ahead.sampler, ahead[ahead.n_taken].before.get());
    }
    const int32_t place = ahead.place();
    ahead.sampler       = nullptr;
    if (reached() != place) {
        settle();
        memory.truncate(seq, place);
        n_past = std::min(n_past, place);
        text.truncate(n_past);
        live = false;
    }
    if (!live) {
        walked.tree = -1;
        is_seen     = false;
        owes        = n_past == place && place > 0;
        set_row(-1);
    }
}

// the last token is evaluated once more
int32_t decoder::pay() {
    if (!owes) {
        return ENTMTP_OK;
    }
    const int32_t token = text[n_past - 1];
    return eval_prompt(&token, 1, n_past - 1, false);
}

} // namespace entmtp
