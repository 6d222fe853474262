// Any policy over recorded texts, without a model: the same scheduler as in the decode loop.

#pragma once

#include "heads.h"
#include "tree.h"

#include "entmtp.h"
#include "entmtp_replay.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// see entmtp_replay(); throws std::runtime_error with one sentence
int64_t replay(const entmtp_trace *         trace,
               const std::vector<tree> &    bank,
               const entmtp_policy_params * params,
               const entmtp_costs *         truth,
               entmtp_step *                steps,
               int64_t                      n_max);

// see entmtp_replay_texts(); throws std::runtime_error with one sentence
int64_t replay_texts(const entmtp_texts *         texts,
                     heads *                      guessing,
                     const entmtp_policy_params * params,
                     const entmtp_costs *         truth,
                     uint32_t                     without,
                     entmtp_step *                steps,
                     int64_t                      n_max,
                     entmtp_proposal *            samples,
                     int64_t *                    n_samples);

} // namespace entmtp
