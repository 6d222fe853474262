// The decoder layer that Hydra++ runs over the base model's hidden states, with a KV cache of its own.

#pragma once

#include "transfer.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <map>
#include <utility>
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

    // hidden states at positions pos0 ..; a position that was never added is not attended to
    void add(const states & h, int32_t pos0);

    // The result for the last one, valid until the next is asked for. The layer runs now, over all that was added since it
    // last ran: where nothing is drafted for long, it costs nothing
    states output();
    void   read(float * res); // [n_embd]

    int32_t size() const { return (int32_t) valid.size(); }

    entmtp_traffic traffic = {};

  private:
    // for n hidden states and a cache of n_kv rows
    struct graph {
        ggml_context_ptr ctx;
        ggml_gallocr_ptr alloc;

        ggml_cgraph * gf   = nullptr;
        ggml_tensor * inp  = nullptr; // [n_embd, n]
        ggml_tensor * pos  = nullptr; // i32 [n]
        ggml_tensor * last = nullptr; // i32 [1] position of the only query
        ggml_tensor * rows = nullptr; // i64 [n] of the cache
        ggml_tensor * mask = nullptr; // [n_kv, 1]
    };

    graph build(int32_t n, int32_t n_kv) const;
    void  run(int32_t first, int32_t n); // over a part of those that wait
    void  flush();

    ggml_backend_t          backend = nullptr; // not owned
    ggml_context_ptr        ctx_kv;
    ggml_backend_buffer_ptr buf_kv;

    ggml_tensor * k_cache = nullptr; // [n_embd_kv, n_ctx]
    ggml_tensor * v_cache = nullptr; // [n_embd_kv, n_ctx]
    ggml_tensor * out     = nullptr; // [n_embd, 1]
    ggml_tensor * waiting = nullptr; // [n_embd, n_wait] added, and not run yet

    int32_t waiting_pos = 0;         // of the first
    int32_t n_waiting   = 0;

    std::map<std::pair<int32_t, int32_t>, graph> graphs; // by (n, n_kv)

    std::vector<bool>  valid;                            // [n_ctx] positions that hold a key and a value
    std::vector<float> mask;
};

} // namespace entmtp
