// What the last step drafted, and how far the text went along with it.

#include "decoder.h"

#include <algorithm>

namespace entmtp {

// The nodes stay as they are until the next step drafts, also when the memory has been settled meanwhile.
entmtp_walk decoder::walk(entmtp_node * nodes, int32_t n_max) const {
    entmtp_walk res = { walked.root, 0, running.get() };
    if (walked.tree < 0) {
        return res;
    }
    const tree & t = topology(walked.tree);
    res.n_nodes    = (int32_t) tokens.size();
    for (int32_t i = 0; i < std::min(res.n_nodes, n_max); ++i) {
        const uint32_t by  = sources.empty() ? (uint32_t) ENTMTP_SOURCE_HEADS : sources[i];
        const bool     was = std::find(walked.path.begin(), walked.path.end(), i) != walked.path.end();
        nodes[i]           = { tokens[i], t.parent[i], i > 0 ? by : 0, reach.empty() ? -1.0f : reach[i], was };
    }
    return res;
}

} // namespace entmtp
