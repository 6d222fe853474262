#include "steps.h"

namespace entmtp {

void step_log::clear() {
    first = 0;
    ring.clear();
    sums = {};
    by_tree.clear();
}

void step_log::push(const entmtp_step & s) {
    if (ring.size() < n_kept) {
        ring.push_back(s);
        return;
    }

    const entmtp_step & old = ring[first];
    sums.n_steps += 1;
    sums.n_nodes += old.n_nodes;
    sums.n_accepted += old.n_accepted;
    sums.entropy += old.entropy;
    sums.t_draft_us += old.t_draft_us;
    sums.t_verify_us += old.t_verify_us;
    sums.t_sample_us += old.t_sample_us;
    sums.t_host_us += old.t_host_us;
    for (int32_t s = 0; s < ENTMTP_N_SOURCES; ++s) {
        sums.n_by[s] += old.n_by[s];
    }
    if ((size_t) old.tree >= by_tree.size()) {
        by_tree.resize(old.tree + 1);
    }
    by_tree[old.tree]++;

    ring[first] = s;
    first       = (first + 1) % n_kept;
}

} // namespace entmtp
