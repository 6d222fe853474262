// Rows of packed weights as floats (GGML_OP_GET_ROWS): embeddings that are also the output projection are held once.

#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

namespace entmtp {

bool   is_lookup(const ggml_tensor * op); // that packed weights can answer
size_t lookup_work_size(int n_threads, const ggml_tensor * op);
void   compute_lookup(const ggml_cpu_hook_task * task, ggml_tensor * op);

} // namespace entmtp
