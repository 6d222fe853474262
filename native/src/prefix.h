// The decoder layer that Hydra++ runs over the base model's hidden states, with a KV cache of its own.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <vector>

namespace entmtp {

struct prefix_params {
    int32_t n_embd    = 0;
    int32_t n_head    = 0;
    int32_t n_head_kv = 0;
    float   rms_eps   = 1e-5f;
    float   rope_base = 10000.0f;
};

// arXiv 2402.05109, section 4.2: a Llama decoder layer whose output replaces the hidden state as the heads' input
class prefix_layer {
  public:
    prefix_params params;

    ggml_tensor * attn_norm   = nullptr; // [n_embd]
    ggml_tensor * attn_q      = nullptr;
    ggml_tensor * attn_k      = nullptr;
    ggml_tensor * attn_v      = nullptr;
    ggml_tensor * attn_output = nullptr;
    ggml_tensor * ffn_norm    = nullptr; // [n_embd]
    ggml_tensor * ffn_gate    = nullptr;
    ggml_tensor * ffn_up      = nullptr;
    ggml_tensor * ffn_down    = nullptr;
    ggml_tensor * output_norm = nullptr; // [n_embd]

    // room for n_ctx positions; what was there is forgotten
    void reserve(ggml_backend_t backend, int32_t n_ctx);

    // forget the positions from pos on
    void truncate(int32_t pos);

    // run over n hidden states at positions pos0 ..; a position that was never run is not attended to
    //   h   [n][n_embd]
    //   out [n_embd]    result for the last one
    void run(const float * h, int32_t n, int32_t pos0, float * out);

    int32_t size() const { return (int32_t) valid.size(); }

  private:
    ggml_backend_t          backend = nullptr; // not owned
    ggml_context_ptr        ctx_kv;
    ggml_backend_buffer_ptr buf_kv;
    ggml_gallocr_ptr        alloc;

    ggml_tensor * k_cache = nullptr; // [n_embd_kv, n_ctx]
    ggml_tensor * v_cache = nullptr; // [n_embd_kv, n_ctx]

    std::vector<bool>  valid;        // [n_ctx] positions that hold a key and a value
    std::vector<float> mask;
};

} // namespace entmtp
