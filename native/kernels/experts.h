// Products of each row with one of many matrices: mixtures of experts (GGML_OP_MUL_MAT_ID), whose router chose it, and
// latent attention (GGML_OP_MUL_MAT with weights of three dimensions), which has one for each head.

#pragma once

#include "kernels.h"

#include "ggml-cpu.h"
#include "ggml.h"

namespace entmtp {

// op, MUL_MAT_ID: src[0] packed weights [k, n_out, n_expert], src[1] floats [k, n_used or 1, n_tokens], src[2] ids
// [n_used, n_tokens]; result [n_out, n_used, n_tokens]
//     MUL_MAT: src[0] packed weights [k, n_out, n_head], src[1] floats [k, n_tokens, n_head]; result [n_out, n_tokens, n_head]

size_t experts_work_size(int n_threads, const ggml_tensor * op);

// called by every thread
void compute_experts(const kernel_set & set, const ggml_cpu_hook_task * task, ggml_tensor * op);

} // namespace entmtp
