// Ops that read the cache: attention, and what takes its place where flash attention is off. All sum in one order.

#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

namespace entmtp {

bool is_attention(const ggml_tensor * op);
bool is_softmax(const ggml_tensor * op);
bool is_cache_product(const ggml_tensor * op);

void   compute_attention(const ggml_cpu_hook_task * task, ggml_tensor * op);
void   compute_softmax(const ggml_cpu_hook_task * task, ggml_tensor * op);
size_t ordered_scratch(const ggml_tensor * op); // bytes that a thread needs
void   compute_ordered(const ggml_cpu_hook_task * task, ggml_tensor * op);

} // namespace entmtp
