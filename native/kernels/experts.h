// Mixtures of experts, GGML_OP_MUL_MAT_ID: each row is multiplied by the few matrices that a router chose for it.

#pragma once

#include "kernels.h"

#include "ggml-cpu.h"
#include "ggml.h"

namespace entmtp {

// op: src[0] packed weights [k, n_out, n_expert], src[1] floats [k, n_used or 1, n_tokens], src[2] ids [n_used, n_tokens]

size_t experts_work_size(int n_threads, const ggml_tensor * op);

// called by every thread; writes [n_out, n_used, n_tokens]
void compute_experts(const kernel_set & set, const ggml_cpu_hook_task * task, ggml_tensor * op);

} // namespace entmtp
