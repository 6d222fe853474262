// The tree of the last step, for showing it: what was drafted, by whom, and how far the text went along with it.

#pragma once

#include "entmtp.h"

#ifdef __cplusplus
extern "C" {
#endif

struct entmtp_node {
    int32_t  token;
    int32_t  parent;  // index of a node before it; -1: the root
    uint32_t sources; // enum entmtp_source; 0: the root, which nobody guessed
    float    p;       // chance of being reached, as it was believed; -1: the policy does not say
    int32_t  walked;  // 1: the root, and guesses whose token was evaluated next; else 0
};

struct entmtp_walk {
    int32_t n_past;  // tokens of the text before the root
    int32_t n_nodes; // the root among them; 0: no step was made since the last prompt
    float   entropy; // running mean, nats, of the distributions that tokens were drawn from so far
};

// nodes [n_max]  the first ones, parents before children; there may be more
ENTMTP_API int32_t entmtp_decoder_get_walk(const struct entmtp_decoder * dec,
                                           struct entmtp_walk *          walk,
                                           struct entmtp_node *          nodes,
                                           int32_t                       n_max);

#ifdef __cplusplus
}
#endif
