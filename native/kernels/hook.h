// The kernels as a hook of ggml's CPU backend.

#pragma once

#include "kernels.h"

namespace entmtp {

// Take part in models loaded from now on, and in attention. name: a kernel set, null for the best of this processor
// false if this processor has no such set
bool kernels_enable(const char * name);
void kernels_disable();               // models that are loaded keep their kernels; attention is ggml's again

const kernel_set * kernels_current(); // null while disabled
const kernel_set & kernels();         // of what is packed, also after kernels_disable()

// How weights are held that are loaded from now on
//   embeddings: the token embeddings are packed, too. Where they are also the output projection, they are held once
//   locked:     the system must not take them from memory
void     kernels_hold(bool embeddings, bool locked);
uint64_t kernels_unlocked(); // bytes that should be locked since then, and could not be

// 2: matrices of the ggml_type lie in panels, 1: its rows are multiplied one by one, 0: ggml does it
int kernels_of(int type);

// products that ggml computed itself, counted once per thread and op
uint64_t kernels_missed();

} // namespace entmtp
