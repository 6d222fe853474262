// The C boundary of replayed texts and of the acceptance model's weights.

#include "api.h"
#include "entmtp_replay.h"
#include "replay.h"

#include <algorithm>

int64_t entmtp_replay_texts(const entmtp_texts *         texts,
                            entmtp_heads *               heads,
                            const entmtp_policy_params * params,
                            const entmtp_costs *         truth,
                            uint32_t                     without,
                            entmtp_step *                steps,
                            int64_t                      n_max,
                            entmtp_proposal *            samples,
                            int64_t *                    n_samples) {
    int64_t       n      = 0;
    const int32_t status = entmtp::guarded([&] {
        n = entmtp::replay_texts(texts, heads ? &heads->impl : nullptr, params, truth, without, steps, n_max, samples,
                                 n_samples);
        return (int32_t) ENTMTP_OK;
    });
    return status == ENTMTP_OK ? n : status;
}

int32_t entmtp_decoder_best(entmtp_decoder * dec, int32_t k, int32_t * tokens, float * log_p) {
    return entmtp::guarded(dec, [&](entmtp::decoder & d) {
        if (k < 1 || k > entmtp::successors::k || !tokens || !log_p) {
            return entmtp::fail("1 to 8 tokens, and room for them");
        }
        return d.best(k, tokens, log_p);
    });
}

void entmtp_acceptance_shipped(float * weights) {
    if (weights) {
        const float * from = entmtp::acceptance::shipped();
        std::copy(from, from + ENTMTP_N_SETS * ENTMTP_N_INPUTS, weights);
    }
}

int32_t entmtp_decoder_set_acceptance(entmtp_decoder * dec, const float * weights) {
    return entmtp::guarded(dec, [&](entmtp::decoder & d) {
        if (!weights) {
            return entmtp::fail("the weights are missing");
        }
        d.set_acceptance_weights(weights);
        return (int32_t) ENTMTP_OK;
    });
}
