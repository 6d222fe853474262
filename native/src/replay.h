// Any policy over recorded texts, without a model: the same scheduler as in the decode loop.

#pragma once

#include "tree.h"

#include "entmtp.h"

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

} // namespace entmtp
