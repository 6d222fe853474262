"""ctypes bindings of native/include/*.h: each declaration under the C prototype it mirrors, nothing else."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

from ..common.errors import Cancelled, EntmtpError, ServerError
from . import library

lib = library.load()
llama = library.load_llama()

OK = 0
CANCELLED = -3
SERVER_LOST = -4

# enum entmtp_policy
POLICIES = {
    "off": 0,
    "static": 1,
    "entropy": 2,
    "confidence": 3,
    "ladder": 4,
    "hysteresis": 5,
    "best-depth": 6,
    "auto": 7,
}

# enum entmtp_source
SOURCES = {"text": 1, "recycling": 2, "heads": 4, "model": 8}

# enum entmtp_score
SCORES = {"entropy": 0, "top1": 1, "path": 2}

# enum entmtp_criterion
CRITERIA = {"ratio": 0, "price": 1}

N_ACCEPT = 9  # ENTMTP_N_ACCEPT
N_AHEAD = 7  # ENTMTP_N_AHEAD


class HeadsInfo(ctypes.Structure):
    """struct entmtp_heads_info"""

    _fields_ = [
        ("n_heads", c_int32),
        ("n_blocks", c_int32),
        ("n_embd", c_int32),
        ("n_vocab", c_int32),
        ("n_vocab_draft", c_int32),
        ("hydra", c_int32),
        ("grounded", c_int32),
        ("prefix", c_int32),
        ("n_bytes", c_int64),
        ("device", c_char * 64),
    ]


class Costs(ctypes.Structure):
    """struct entmtp_costs"""

    _fields_ = [
        ("n_verify", c_int32),
        ("verify", POINTER(c_float)),
        ("n_levels", c_int32),
        ("level", POINTER(c_float)),
        ("tree", POINTER(c_float)),
        ("build", c_float),
    ]


class Calibration(ctypes.Structure):
    """struct entmtp_calibration"""

    _fields_ = [
        ("n_levels", c_int32),
        ("hits", c_float),
        ("hits_window", c_float),
        ("accept", POINTER(c_float)),
        ("n_bins", c_int32),
        ("n_scenarios", c_int32),
        ("ahead", POINTER(c_float)),
        ("edges", POINTER(c_float)),
        ("scenarios", POINTER(c_float)),
    ]


class PolicyParams(ctypes.Structure):
    """struct entmtp_policy_params"""

    _fields_ = [
        ("policy", c_int32),
        ("static_tree", c_int32),
        ("ema_window", c_float),
        ("n_bins", c_int32),
        ("bin_edges", POINTER(c_float)),
        ("expected", POINTER(c_float)),
        ("criterion", c_int32),
        ("score", c_int32),
        ("ladder", POINTER(c_int32)),
        ("costs", POINTER(Costs)),
        ("calibration", POINTER(Calibration)),
        ("drafters", c_uint32),
        ("acceptance", POINTER(c_float)),
        ("adapt", c_bool),
    ]


class Signals(ctypes.Structure):
    """struct entmtp_signals"""

    _fields_ = [("entropy", c_float), ("top1", c_float), ("log_root", c_float)]


class Walk(ctypes.Structure):
    """struct entmtp_walk"""

    _fields_ = [("n_past", c_int32), ("n_nodes", c_int32), ("entropy", c_float)]


# enum entmtp_outputs
OUTPUTS = {"auto": 0, "host": 1, "rows": 2, "device": 3}


class OutputsInfo(ctypes.Structure):
    """struct entmtp_outputs_info"""

    _fields_ = [("mode", c_int32), ("device", c_char * 64), ("note", c_char * 128)]


class Traffic(ctypes.Structure):
    """struct entmtp_traffic"""

    _fields_ = [
        ("n_passes", c_int64),
        ("n_outputs", c_int64),
        ("to_host", c_int64),
        ("to_device", c_int64),
        ("on_device", c_int64),
        ("n_rows", c_int64),
        ("n_syncs", c_int64),
        ("n_graphs", c_int64),
        ("n_draft_graphs", c_int64),
    ]


class StepSums(ctypes.Structure):
    """struct entmtp_step_sums"""

    _fields_ = [
        ("n_steps", c_int64),
        ("n_nodes", c_int64),
        ("n_accepted", c_int64),
        ("entropy", c_double),
        ("t_draft_us", c_int64),
        ("t_verify_us", c_int64),
        ("t_sample_us", c_int64),
        ("t_host_us", c_int64),
        ("n_by", c_int64 * len(SOURCES)),
    ]


def bind(name: str, restype: Any, *argtypes: Any, library: ctypes.CDLL | None = None) -> Any:
    function = getattr(library or lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


# const char * entmtp_version(void);
version = bind("entmtp_version", c_char_p)

# const char * entmtp_last_error(void);
_last_error = bind("entmtp_last_error", c_char_p)


def last_error() -> str:
    """The reason of the last failure in this thread."""
    return _last_error().decode("utf-8", errors="replace")


def check(status: int) -> int:
    """The status itself if it is none of failure.

    Raises:
        Cancelled: the generation was cancelled.
        ServerError: an RPC server is lost.
        EntmtpError: anything else that failed, with the reason.
    """
    if status >= 0:
        return status
    if status == CANCELLED:
        raise Cancelled("the generation was cancelled")
    if status == SERVER_LOST:
        raise ServerError(last_error())
    raise EntmtpError(last_error())


# struct entmtp_heads * entmtp_heads_load(const char * path, const struct llama_model * model, int32_t n_threads);
heads_load = bind("entmtp_heads_load", c_void_p, c_char_p, c_void_p, c_int32)

# void entmtp_heads_free(struct entmtp_heads * heads);
heads_free = bind("entmtp_heads_free", None, c_void_p)

# void entmtp_heads_get_info(const struct entmtp_heads * heads, struct entmtp_heads_info * info);
heads_get_info = bind("entmtp_heads_get_info", None, c_void_p, POINTER(HeadsInfo))

# int32_t entmtp_heads_logits(
#         struct entmtp_heads * heads, int32_t head, const float * h, const int32_t * path, float * logits);
heads_logits = bind("entmtp_heads_logits", c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_void_p)

# int32_t entmtp_heads_expand(
#         struct entmtp_heads * heads, int32_t head, const float * h, const int32_t * paths, int32_t n, int32_t k,
#         int32_t * tokens, float * log_p);
heads_expand = bind(
    "entmtp_heads_expand",
    c_int32,
    c_void_p,
    c_int32,
    c_void_p,
    c_void_p,
    c_int32,
    c_int32,
    c_void_p,
    c_void_p,
)

# int32_t entmtp_heads_prefix(struct entmtp_heads * heads, const float * h, int32_t n, int32_t pos0, float * out);
heads_prefix = bind("entmtp_heads_prefix", c_int32, c_void_p, c_void_p, c_int32, c_int32, c_void_p)

# uint64_t entmtp_vocab_fingerprint(const struct llama_model * model);
vocab_fingerprint = bind("entmtp_vocab_fingerprint", c_uint64, c_void_p)

# struct entmtp_draft_model * entmtp_draft_model_init(
#         struct llama_context * ctx, struct llama_model * model, const struct llama_context_params * params,
#         int32_t n_draft_vocab);
draft_model_init = bind("entmtp_draft_model_init", c_void_p, c_void_p, c_void_p, c_void_p, c_int32)

# void entmtp_draft_model_free(struct entmtp_draft_model * draft);
draft_model_free = bind("entmtp_draft_model_free", None, c_void_p)

# const char * entmtp_draft_model_broken(const struct entmtp_draft_model * draft);
draft_model_broken = bind("entmtp_draft_model_broken", c_char_p, c_void_p)

# int32_t entmtp_draft_model_vocab(const struct entmtp_draft_model * draft);
draft_model_vocab = bind("entmtp_draft_model_vocab", c_int32, c_void_p)

# double entmtp_draft_model_cost(const struct entmtp_draft_model * draft);
draft_model_cost = bind("entmtp_draft_model_cost", c_double, c_void_p)

# int32_t entmtp_follow_layer(struct llama_context * ctx, int32_t layer);
follow_layer = bind("entmtp_follow_layer", c_int32, c_void_p, c_int32)

# const float * entmtp_layer_inputs(struct llama_context * ctx, int32_t layer);
layer_inputs = bind("entmtp_layer_inputs", POINTER(c_float), c_void_p, c_int32)

# struct entmtp_corpus * entmtp_corpus_init(const int32_t * tokens, int64_t n);
corpus_init = bind("entmtp_corpus_init", c_void_p, c_void_p, c_int64)

# void entmtp_corpus_free(struct entmtp_corpus * corpus);
corpus_free = bind("entmtp_corpus_free", None, c_void_p)

# int32_t entmtp_decoder_set_corpus(struct entmtp_decoder * dec, const struct entmtp_corpus * corpus);
decoder_set_corpus = bind("entmtp_decoder_set_corpus", c_int32, c_void_p, c_void_p)

# struct entmtp_decoder * entmtp_decoder_init(struct llama_context * ctx, struct entmtp_heads * heads);
decoder_init = bind("entmtp_decoder_init", c_void_p, c_void_p, c_void_p)

# void entmtp_decoder_free(struct entmtp_decoder * dec);
decoder_free = bind("entmtp_decoder_free", None, c_void_p)

# int32_t entmtp_decoder_set_trees(
#         struct entmtp_decoder * dec, int32_t n_trees, const int32_t * n_nodes, const int32_t * parent,
#         const int32_t * rank);
decoder_set_trees = bind("entmtp_decoder_set_trees", c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_void_p)

# int32_t entmtp_decoder_set_policy(struct entmtp_decoder * dec, const struct entmtp_policy_params * params);
decoder_set_policy = bind("entmtp_decoder_set_policy", c_int32, c_void_p, POINTER(PolicyParams))

# int32_t entmtp_decoder_set_threads(
#         struct entmtp_decoder * dec, int32_t n_threads, const struct entmtp_costs * costs);
decoder_set_threads = bind("entmtp_decoder_set_threads", c_int32, c_void_p, c_int32, POINTER(Costs))

# int32_t entmtp_decoder_eval(
#         struct entmtp_decoder * dec, const int32_t * tokens, int32_t n, int32_t n_past, bool all_outputs);
decoder_eval = bind("entmtp_decoder_eval", c_int32, c_void_p, c_void_p, c_int32, c_int32, c_bool)

# int32_t entmtp_decoder_sample(struct entmtp_decoder * dec, struct llama_sampler * sampler, int32_t * token);
decoder_sample = bind("entmtp_decoder_sample", c_int32, c_void_p, c_void_p, POINTER(c_int32))

# int32_t entmtp_decoder_sample_typical(
#         struct entmtp_decoder * dec, struct llama_sampler * sampler, float temp, float epsilon, float alpha,
#         int32_t * token);
decoder_sample_typical = bind(
    "entmtp_decoder_sample_typical", c_int32, c_void_p, c_void_p, c_float, c_float, c_float, POINTER(c_int32)
)

# int32_t entmtp_sample(struct llama_context * ctx, struct llama_sampler * sampler, int32_t i, int32_t * token);
sample = bind("entmtp_sample", c_int32, c_void_p, c_void_p, c_int32, POINTER(c_int32))

# bool entmtp_decoder_is_drafted(const struct entmtp_decoder * dec, int32_t token);
decoder_is_drafted = bind("entmtp_decoder_is_drafted", c_bool, c_void_p, c_int32)

# uint32_t entmtp_decoder_drafted_by(const struct entmtp_decoder * dec, int32_t token);
decoder_drafted_by = bind("entmtp_decoder_drafted_by", c_uint32, c_void_p, c_int32)

# void entmtp_decoder_set_text(struct entmtp_decoder * dec, const int32_t * tokens, int32_t n);
decoder_set_text = bind("entmtp_decoder_set_text", None, c_void_p, c_void_p, c_int32)

# void entmtp_decoder_forget(struct entmtp_decoder * dec);
decoder_forget = bind("entmtp_decoder_forget", None, c_void_p)

# int32_t entmtp_decoder_get_acceptance(const struct entmtp_decoder * dec, float * weights);
decoder_get_acceptance = bind("entmtp_decoder_get_acceptance", c_int32, c_void_p, c_void_p)

# int32_t entmtp_decoder_set_acceptance(struct entmtp_decoder * dec, const float * weights);
decoder_set_acceptance = bind("entmtp_decoder_set_acceptance", c_int32, c_void_p, c_void_p)

# void entmtp_acceptance_shipped(float * weights);
acceptance_shipped = bind("entmtp_acceptance_shipped", None, c_void_p)

# int32_t entmtp_decoder_best(struct entmtp_decoder * dec, int32_t k, int32_t * tokens, float * log_p);
decoder_best = bind("entmtp_decoder_best", c_int32, c_void_p, c_int32, c_void_p, c_void_p)

# int32_t entmtp_decoder_settle(struct entmtp_decoder * dec);
decoder_settle = bind("entmtp_decoder_settle", c_int32, c_void_p)

# void entmtp_decoder_invalidate(struct entmtp_decoder * dec, int32_t n_past);
decoder_invalidate = bind("entmtp_decoder_invalidate", None, c_void_p, c_int32)

# const float * entmtp_decoder_logits(struct entmtp_decoder * dec);
decoder_logits = bind("entmtp_decoder_logits", POINTER(c_float), c_void_p)

# const float * entmtp_decoder_all_logits(struct entmtp_decoder * dec);
decoder_all_logits = bind("entmtp_decoder_all_logits", POINTER(c_float), c_void_p)

# const float * entmtp_decoder_hidden(struct entmtp_decoder * dec);
decoder_hidden = bind("entmtp_decoder_hidden", POINTER(c_float), c_void_p)

# int32_t entmtp_decoder_signals(struct entmtp_decoder * dec, int32_t token, struct entmtp_signals * signals);
decoder_signals = bind("entmtp_decoder_signals", c_int32, c_void_p, c_int32, POINTER(Signals))

# int32_t entmtp_decoder_get_walk(const struct entmtp_decoder * dec, struct entmtp_walk * walk,
#         struct entmtp_node * nodes, int32_t n_max);
decoder_get_walk = bind("entmtp_decoder_get_walk", c_int32, c_void_p, POINTER(Walk), c_void_p, c_int32)

# void entmtp_decoder_cancel(struct entmtp_decoder * dec);
decoder_cancel = bind("entmtp_decoder_cancel", None, c_void_p)

# void entmtp_decoder_resume(struct entmtp_decoder * dec);
decoder_resume = bind("entmtp_decoder_resume", None, c_void_p)

# int32_t entmtp_decoder_n_evaluated(const struct entmtp_decoder * dec);
decoder_n_evaluated = bind("entmtp_decoder_n_evaluated", c_int32, c_void_p)

# bool entmtp_decoder_can_continue(const struct entmtp_decoder * dec, int32_t n_past);
decoder_can_continue = bind("entmtp_decoder_can_continue", c_bool, c_void_p, c_int32)

# bool entmtp_decoder_can_chain(const struct entmtp_decoder * dec);
decoder_can_chain = bind("entmtp_decoder_can_chain", c_bool, c_void_p)

# int32_t entmtp_decoder_set_draft_model(struct entmtp_decoder * dec, struct entmtp_draft_model * draft);
decoder_set_draft_model = bind("entmtp_decoder_set_draft_model", c_int32, c_void_p, c_void_p)

# bool entmtp_decoder_can_tree(const struct entmtp_decoder * dec);
decoder_can_tree = bind("entmtp_decoder_can_tree", c_bool, c_void_p)

# int32_t entmtp_decoder_set_outputs(struct entmtp_decoder * dec, int32_t mode);
decoder_set_outputs = bind("entmtp_decoder_set_outputs", c_int32, c_void_p, c_int32)

# void entmtp_decoder_get_outputs(const struct entmtp_decoder * dec, struct entmtp_outputs_info * info);
decoder_get_outputs = bind("entmtp_decoder_get_outputs", None, c_void_p, POINTER(OutputsInfo))

# void entmtp_decoder_get_traffic(const struct entmtp_decoder * dec, struct entmtp_traffic * traffic);
decoder_get_traffic = bind("entmtp_decoder_get_traffic", None, c_void_p, POINTER(Traffic))

# struct entmtp_group * entmtp_group_init(
#         struct llama_context * ctx, struct entmtp_heads * heads, int32_t n_seq, int32_t n_ctx);
group_init = bind("entmtp_group_init", c_void_p, c_void_p, c_void_p, c_int32, c_int32)

# void entmtp_group_free(struct entmtp_group * group);
group_free = bind("entmtp_group_free", None, c_void_p)

# struct entmtp_decoder * entmtp_group_decoder(struct entmtp_group * group, int32_t i);
group_decoder = bind("entmtp_group_decoder", c_void_p, c_void_p, c_int32)

# void entmtp_group_set_active(struct entmtp_group * group, int32_t i, bool active);
group_set_active = bind("entmtp_group_set_active", None, c_void_p, c_int32, c_bool)

# void entmtp_group_set_stall(struct entmtp_group * group, double us);
group_set_stall = bind("entmtp_group_set_stall", None, c_void_p, c_double)

# void entmtp_group_get_passes(
#         struct entmtp_group * group, int64_t * n_passes, int64_t * n_parts, int64_t * n_tokens);
group_get_passes = bind("entmtp_group_get_passes", None, c_void_p, *[POINTER(c_int64)] * 3)

# int32_t entmtp_decoder_clear(struct entmtp_decoder * dec);
decoder_clear = bind("entmtp_decoder_clear", c_int32, c_void_p)

# int32_t entmtp_decoder_n_held(const struct entmtp_decoder * dec);
decoder_n_held = bind("entmtp_decoder_n_held", c_int32, c_void_p)

# int32_t entmtp_decoder_in_common(const struct entmtp_decoder * dec, const int32_t * tokens, int32_t n);
decoder_in_common = bind("entmtp_decoder_in_common", c_int32, c_void_p, c_void_p, c_int32)

# int32_t entmtp_decoder_share(
#         struct entmtp_decoder * dec, const struct entmtp_decoder * from, const int32_t * tokens, int32_t n);
decoder_share = bind("entmtp_decoder_share", c_int32, c_void_p, c_void_p, c_void_p, c_int32)

# void entmtp_decoder_set_stats(struct entmtp_decoder * dec, bool enabled);
decoder_set_stats = bind("entmtp_decoder_set_stats", None, c_void_p, c_bool)

# size_t entmtp_decoder_n_steps(const struct entmtp_decoder * dec);
decoder_n_steps = bind("entmtp_decoder_n_steps", c_size_t, c_void_p)

# size_t entmtp_decoder_get_steps(
#         const struct entmtp_decoder * dec, struct entmtp_step * steps, size_t first, size_t n);
decoder_get_steps = bind("entmtp_decoder_get_steps", c_size_t, c_void_p, c_void_p, c_size_t, c_size_t)

# void entmtp_decoder_get_older_steps(
#         const struct entmtp_decoder * dec, struct entmtp_step_sums * sums, int64_t * by_tree, int32_t n_trees);
decoder_get_older_steps = bind(
    "entmtp_decoder_get_older_steps", None, c_void_p, POINTER(StepSums), c_void_p, c_int32
)

# void entmtp_decoder_reset_stats(struct entmtp_decoder * dec);
decoder_reset_stats = bind("entmtp_decoder_reset_stats", None, c_void_p)

# int32_t entmtp_kernels_enable(const char * name);
kernels_enable = bind("entmtp_kernels_enable", c_int32, c_char_p)

# void entmtp_kernels_disable(void);
kernels_disable = bind("entmtp_kernels_disable", None)

# const char * entmtp_kernels_current(void);
kernels_current = bind("entmtp_kernels_current", c_char_p)

# const char * entmtp_kernels_name(int32_t i);
kernels_name = bind("entmtp_kernels_name", c_char_p, c_int32)

# void entmtp_kernels_hold(int32_t embeddings, int32_t locked);
kernels_hold = bind("entmtp_kernels_hold", None, c_int32, c_int32)

# uint64_t entmtp_kernels_unlocked(void);
kernels_unlocked = bind("entmtp_kernels_unlocked", c_uint64)

# int32_t entmtp_kernels_of(int32_t type);
kernels_of = bind("entmtp_kernels_of", c_int32, c_int32)

# uint64_t entmtp_kernels_missed(void);
kernels_missed = bind("entmtp_kernels_missed", c_uint64)

# int32_t entmtp_machine_peaks(int32_t n_threads, double * bytes_per_s, double * macs_per_s);
machine_peaks = bind("entmtp_machine_peaks", c_int32, c_int32, POINTER(c_double), POINTER(c_double))

# int32_t entmtp_device_bandwidth(const struct llama_model * model, double * bytes_per_s);
device_bandwidth = bind("entmtp_device_bandwidth", c_int32, c_void_p, POINTER(c_double))

# void llama_set_embeddings_out(struct llama_context * ctx, bool value);  (of libllama, native/patches/0004)
llama_set_embeddings_out = bind("llama_set_embeddings_out", None, c_void_p, c_bool, library=llama)
