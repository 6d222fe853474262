"""ctypes bindings of replay: entmtp_replay() of native/include/entmtp.h and native/include/entmtp_replay.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_int32, c_int64, c_uint32, c_void_p

from .abi import Costs, PolicyParams, bind

MAX_SAMPLES = 40  # ENTMTP_MAX_SAMPLES


class Trace(ctypes.Structure):
    """struct entmtp_trace"""

    _fields_ = [
        ("n_texts", c_int32),
        ("n_tokens", c_void_p),
        ("n_heads", c_int32),
        ("n_guess", c_int32),
        ("signals", c_void_p),
        ("rank", c_void_p),
        ("log_p", c_void_p),
        ("sees_path", c_bool),
    ]


class Texts(ctypes.Structure):
    """struct entmtp_texts"""

    _fields_ = [
        ("n_texts", c_int32),
        ("n_prompt", c_void_p),
        ("n_tokens", c_void_p),
        ("tokens", c_void_p),
        ("signals", c_void_p),
        ("n_best", c_int32),
        ("best", c_void_p),
        ("log_p", c_void_p),
        ("states", c_void_p),
    ]


# int64_t entmtp_replay(
#         const struct entmtp_trace * trace, int32_t n_trees, const int32_t * n_nodes, const int32_t * parent,
#         const int32_t * rank, const struct entmtp_policy_params * params, const struct entmtp_costs * truth,
#         struct entmtp_step * steps, int64_t n_max);
replay = bind(
    "entmtp_replay", c_int64, POINTER(Trace), c_int32, c_void_p, c_void_p, c_void_p, POINTER(PolicyParams),
    POINTER(Costs), c_void_p, c_int64,
)  # fmt: skip

# int64_t entmtp_replay_texts(
#         const struct entmtp_texts * texts, struct entmtp_heads * heads, const struct entmtp_policy_params * params,
#         const struct entmtp_costs * truth, uint32_t without, struct entmtp_step * steps, int64_t n_max,
#         struct entmtp_proposal * samples, int64_t * n_samples);
replay_texts = bind(
    "entmtp_replay_texts", c_int64, POINTER(Texts), c_void_p, POINTER(PolicyParams), POINTER(Costs), c_uint32,
    c_void_p, c_int64, c_void_p, POINTER(c_int64),
)  # fmt: skip
