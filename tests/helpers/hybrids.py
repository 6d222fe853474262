"""Small models with random weights whose memory is states, all of it or in part: it can be cut back by a few tokens
only, or not at all.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import gguf
import numpy as np

from .models import N_VOCAB, Weights, add_vocab

N_EMBD, N_FF, HEAD, N_HEAD, N_HEAD_KV = 64, 96, 32, 4, 2


def _begin(
    path: Path, arch: str, n_layer: int, n_ff: int | list[int] = N_FF, n_head: int = N_HEAD
) -> tuple[gguf.GGUFWriter, Weights]:
    w = gguf.GGUFWriter(path, arch)
    w.add_name(f"random {arch}")
    w.add_context_length(2048)
    w.add_embedding_length(N_EMBD)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(N_VOCAB)
    w.add_head_count(n_head)
    w.add_rope_freq_base(10000.0)
    add_vocab(w)
    t = Weights(w, 1)
    t.normal("token_embd.weight", N_VOCAB, N_EMBD, gain=N_EMBD**0.5)
    t.normal("output.weight", N_VOCAB, N_EMBD, gain=2.0)
    return w, t


def _end(w: gguf.GGUFWriter, path: Path) -> Path:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _ffn(t: Weights, prefix: str) -> None:
    t.normal(f"{prefix}.ffn_gate.weight", N_FF, N_EMBD)
    t.normal(f"{prefix}.ffn_up.weight", N_FF, N_EMBD)
    t.normal(f"{prefix}.ffn_down.weight", N_EMBD, N_FF)


def write_qwen35(path: Path, nextn: bool = True) -> Path:
    """Qwen3.5's shape: three layers of gated delta rule, one of attention, and a prediction layer."""
    n_layer, state, groups, values, conv = 4, 32, 2, 4, 4  # heads of keys and of values
    w, t = _begin(path, "qwen35", n_layer + nextn)
    w.add_head_count_kv(N_HEAD_KV)
    w.add_key_length(HEAD)
    w.add_value_length(HEAD)
    w.add_rope_dimension_count(HEAD)
    w.add_rope_dimension_sections([4, 4, 4, 4])
    w.add_ssm_conv_kernel(conv)
    w.add_ssm_inner_size(state * values)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(values)
    w.add_ssm_group_count(groups)
    w.add_uint32("qwen35.full_attention_interval", 4)
    t.norm("output_norm.weight", N_EMBD)
    for i in range(n_layer + nextn):
        prefix = f"blk.{i}"
        t.norm(f"{prefix}.attn_norm.weight", N_EMBD)
        t.norm(f"{prefix}.post_attention_norm.weight", N_EMBD)
        if i < n_layer and (i + 1) % 4:
            width = state * (2 * groups + values)
            t.normal(f"{prefix}.attn_qkv.weight", width, N_EMBD)
            t.normal(f"{prefix}.attn_gate.weight", state * values, N_EMBD)
            t.normal(f"{prefix}.ssm_conv1d.weight", width, conv)
            t.norm(f"{prefix}.ssm_dt.bias", values)
            w.add_tensor(f"{prefix}.ssm_a", -np.linspace(0.2, 2.0, values, dtype=np.float32))  # states decay
            t.normal(f"{prefix}.ssm_beta.weight", values, N_EMBD)
            t.normal(f"{prefix}.ssm_alpha.weight", values, N_EMBD)
            t.norm(f"{prefix}.ssm_norm.weight", state)
            t.normal(f"{prefix}.ssm_out.weight", N_EMBD, state * values)
        else:
            t.normal(f"{prefix}.attn_q.weight", 2 * N_HEAD * HEAD, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_k.weight", N_HEAD_KV * HEAD, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_v.weight", N_HEAD_KV * HEAD, N_EMBD)
            t.normal(f"{prefix}.attn_output.weight", N_EMBD, N_HEAD * HEAD)
            t.norm(f"{prefix}.attn_q_norm.weight", HEAD)
            t.norm(f"{prefix}.attn_k_norm.weight", HEAD)
        _ffn(t, prefix)
        if i >= n_layer:
            t.normal(f"{prefix}.nextn.eh_proj.weight", N_EMBD, 2 * N_EMBD)
            t.norm(f"{prefix}.nextn.enorm.weight", N_EMBD)
            t.norm(f"{prefix}.nextn.hnorm.weight", N_EMBD)
            t.norm(f"{prefix}.nextn.shared_head_norm.weight", N_EMBD)
    if nextn:
        w.add_uint32("qwen35.nextn_predict_layers", 1)
    return _end(w, path)


def write_lfm2(path: Path) -> Path:
    """LFM2's shape: short convolutions and attention by turns."""
    kv = [0, N_HEAD_KV, 0, N_HEAD_KV]
    w, t = _begin(path, "lfm2", len(kv))
    w.add_head_count_kv(kv)
    w.add_shortconv_l_cache(3)
    head = N_EMBD // N_HEAD
    t.norm("token_embd_norm.weight", N_EMBD)
    for i, n_head_kv in enumerate(kv):
        prefix = f"blk.{i}"
        t.norm(f"{prefix}.ffn_norm.weight", N_EMBD)
        t.norm(f"{prefix}.attn_norm.weight", N_EMBD)
        _ffn(t, prefix)
        if n_head_kv:
            t.norm(f"{prefix}.attn_q_norm.weight", head)
            t.norm(f"{prefix}.attn_k_norm.weight", head)
            t.normal(f"{prefix}.attn_q.weight", N_EMBD, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_k.weight", n_head_kv * head, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_v.weight", n_head_kv * head, N_EMBD)
            t.normal(f"{prefix}.attn_output.weight", N_EMBD, N_EMBD)
        else:
            t.normal(f"{prefix}.shortconv.conv.weight", N_EMBD, 3)
            t.normal(f"{prefix}.shortconv.in_proj.weight", 3 * N_EMBD, N_EMBD)
            t.normal(f"{prefix}.shortconv.out_proj.weight", N_EMBD, N_EMBD)
    return _end(w, path)


def write_nemotron_h(path: Path) -> Path:
    """Nemotron-H's shape: a block is either a Mamba 2 mixer, attention, or a feed-forward part."""
    kv, ff = [0, N_HEAD_KV, 0, 0, 0, 0], [0, 0, N_FF, 0, N_FF, 0]
    state, groups, heads, inner, conv = 16, 1, 4, 64, 4
    w, t = _begin(path, "nemotron_h", len(kv), n_ff=ff)
    w.add_head_count_kv(kv)
    w.add_key_length(HEAD)
    w.add_value_length(HEAD)
    w.add_rope_dimension_count(HEAD)
    w.add_ssm_conv_kernel(conv)
    w.add_ssm_inner_size(inner)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(heads)
    w.add_ssm_group_count(groups)
    w.add_layer_norm_eps(1e-6)
    t.norm("output_norm.weight", N_EMBD)
    for i, (n_head_kv, n_ff) in enumerate(zip(kv, ff, strict=True)):
        prefix = f"blk.{i}"
        t.norm(f"{prefix}.attn_norm.weight", N_EMBD)
        if n_ff:
            t.normal(f"{prefix}.ffn_up.weight", n_ff, N_EMBD)
            t.normal(f"{prefix}.ffn_down.weight", N_EMBD, n_ff)
        elif n_head_kv:
            t.normal(f"{prefix}.attn_q.weight", N_HEAD * HEAD, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_k.weight", n_head_kv * HEAD, N_EMBD, gain=1.5)
            t.normal(f"{prefix}.attn_v.weight", n_head_kv * HEAD, N_EMBD)
            t.normal(f"{prefix}.attn_output.weight", N_EMBD, N_HEAD * HEAD)
        else:
            width = inner + 2 * groups * state
            t.normal(f"{prefix}.ssm_in.weight", inner + width + heads, N_EMBD)
            t.normal(f"{prefix}.ssm_conv1d.weight", width, conv)
            t.norm(f"{prefix}.ssm_conv1d.bias", width)
            t.norm(f"{prefix}.ssm_dt.bias", heads)
            w.add_tensor(f"{prefix}.ssm_a", -np.linspace(0.2, 2.0, heads, dtype=np.float32)[:, None])
            w.add_tensor(f"{prefix}.ssm_d", np.linspace(0.5, 1.5, heads, dtype=np.float32)[:, None])
            w.add_tensor(f"{prefix}.ssm_norm.weight", np.ones((groups, inner // groups), np.float32))
            t.normal(f"{prefix}.ssm_out.weight", N_EMBD, inner)
    return _end(w, path)


def write_rwkv6(path: Path) -> Path:
    """RWKV-6's shape: states alone. One of its matrices, `time_mix_w2`, is reshaped before it is multiplied by."""
    n_layer, d, mix, mixes = 2, N_EMBD, 32, 5
    w, t = _begin(path, "rwkv6", n_layer, n_head=0)
    w.add_layer_norm_eps(1e-5)
    w.add_wkv_head_size(HEAD)
    w.add_time_mix_extra_dim(mix)
    w.add_time_decay_extra_dim(mix)
    w.add_rescale_every_n_layers(6)
    w.add_token_shift_count(2)

    def norms(*names: str) -> None:
        for name in names:
            t.norm(f"{name}.weight", d)
            t.bias(f"{name}.bias", d)

    norms("token_embd_norm", "output_norm")
    for i in range(n_layer):
        at = f"blk.{i}"
        norms(*(f"{at}.{name}" for name in ("attn_norm", "attn_norm_2", "time_mix_ln")))
        t.normal(f"{at}.time_mix_w1.weight", mixes * mix, d)
        t.normal(f"{at}.time_mix_w2.weight", mixes, d, mix)
        for name in ("time_mix_lerp_x", "channel_mix_lerp_k", "channel_mix_lerp_r"):
            t.bias(f"{at}.{name}.weight", 1, 1, d)
        t.bias(f"{at}.time_mix_lerp_fused.weight", mixes, 1, 1, d)
        t.bias(f"{at}.time_mix_first.weight", d // HEAD, HEAD)
        t.bias(f"{at}.time_mix_decay.weight", d)
        t.normal(f"{at}.time_mix_decay_w1.weight", mix, d)
        t.normal(f"{at}.time_mix_decay_w2.weight", d, mix)
        for name in ("key", "value", "receptance", "gate", "output"):
            t.normal(f"{at}.time_mix_{name}.weight", d, d)
        t.normal(f"{at}.channel_mix_key.weight", N_FF, d)
        t.normal(f"{at}.channel_mix_value.weight", d, N_FF)
        t.normal(f"{at}.channel_mix_receptance.weight", d, d)
    return _end(w, path)


WRITERS = {"qwen35": write_qwen35, "lfm2": write_lfm2, "nemotron_h": write_nemotron_h, "rwkv6": write_rwkv6}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="entmtp-hybrids-")  # removed when the process ends


@functools.cache
def hybrid_path(name: str) -> Path:
    """The GGUF file of a hybrid model, written once per process."""
    return WRITERS[name](Path(_folder().name) / f"{name}.gguf")
