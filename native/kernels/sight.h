// Which cells of a cache the queries of a task see.

#pragma once

#include "kernels.h"

#include <cstdint>
#include <vector>

namespace entmtp {

// The same for all heads of the queries' tokens, so it is found once for them
class sight {
  public:
    void of(const attention & a); // of its queries, masks and order
    void give(attention & a) const;

  private:
    std::vector<int32_t>  cells; // those that anyone sees, by position
    std::vector<uint32_t> who;   // queries that see each, a bit each
    int                   n_cells = 0;
    bool                  in_line = false;
};

} // namespace entmtp
