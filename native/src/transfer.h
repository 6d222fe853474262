// What crosses between the host and a device, counted where it happens.

#pragma once

#include "entmtp.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace entmtp {

// some hidden states, where the pass left them: in host memory, or in a tensor on a device
struct states {
    const float *        host   = nullptr; // [..][n_embd], or
    const ggml_tensor *  tensor = nullptr; // [n_embd, ..]
    std::vector<int32_t> rows;             // which of them
};

// the whole of dst, from the host
void send(entmtp_traffic & t, ggml_tensor * dst, const void * src);

// a part of src, to the host
void fetch(entmtp_traffic & t, const ggml_tensor * src, void * dst, size_t offset, size_t size);

// dst [n_embd, rows.size()]; from device to device where both are on the same
void send(entmtp_traffic & t, ggml_tensor * dst, const states & src);

// src into dst, both of one shape
void copy(entmtp_traffic & t, const ggml_tensor * src, ggml_tensor * dst);

void add(entmtp_traffic & sum, const entmtp_traffic & t);

} // namespace entmtp
