// RPC servers that hold layers of the model, and whether they are still there.

#pragma once

#include "ggml-backend.h"
#include "llama.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace entmtp {

// The RPC backend computes asynchronously, so a server that is lost in a pass shows only when the results are read: they
// are zeros then. Its count of lost connections tells.
class remote_servers {
  public:
    explicit remote_servers(const llama_model * model);

    // one whose connection was lost since, host:port; null if there is none
    const char * lost() const;

  private:
    uint64_t (*n_lost)(const char * endpoint) = nullptr;

    std::vector<std::pair<std::string, uint64_t>> servers; // with their losses before
};

} // namespace entmtp
