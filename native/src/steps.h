// Records of the latest steps, and sums over the older ones: memory stays bounded however long a process runs.

#pragma once

#include "entmtp.h"

#include <cstddef>
#include <vector>

namespace entmtp {

class step_log {
  public:
    explicit step_log(size_t n_kept = 65536) : n_kept(n_kept) {}

    void clear();
    void push(const entmtp_step & s);

    // the last one may still change: the walk through its tree goes on
    entmtp_step & back() { return ring[(first + ring.size() - 1) % ring.size()]; }

    size_t size() const { return ring.size(); }

    const entmtp_step & operator[](size_t i) const { return ring[(first + i) % ring.size()]; } // oldest first

    const entmtp_step_sums & older() const { return sums; }

    // steps with this tree among the older ones
    int64_t older_with(size_t tree) const { return tree < by_tree.size() ? by_tree[tree] : 0; }

  private:
    size_t                   n_kept;
    size_t                   first = 0; // index of the oldest
    std::vector<entmtp_step> ring;
    entmtp_step_sums         sums = {};
    std::vector<int64_t>     by_tree;
};

} // namespace entmtp
