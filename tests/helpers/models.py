"""Small models with random weights, written as GGUF: enough of an architecture to run its graph and its memory."""

from __future__ import annotations

import functools
import os
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from .typed import quantise

# layers on the GPU of the models that tests load: -1 (all) runs the suite there (docs/build.md)
GPU_LAYERS = int(os.environ.get("ENTMTP_TEST_GPU_LAYERS", "0"))
ON_GPU = {"n_gpu_layers": GPU_LAYERS} if GPU_LAYERS else {}

N_ROT = 32  # dimensions that latent attention rotates
N_VOCAB = 320  # 256 bytes, one merge, the end token, fillers


POST_NORM = {"gemma3", "olmo2", "gpt-oss"}  # norms after attention, and but for gpt-oss after feed-forward


@dataclass(frozen=True)
class Spec:
    """Shape of a model; what an architecture does not use is ignored."""

    arch: str
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32  # a row of q8_0 blocks
    n_ff: int = 96
    window: int = 0  # sliding window of every other layer
    n_expert: int = 0
    n_expert_used: int = 0
    latent: int = (
        0  # dimensions that keys and values are made from, by a matrix for each head; rotated: 32 more
    )
    nextn: int = 0  # prediction layers
    tied: bool = False  # the embeddings are the output projection, too
    n_vocab: int = N_VOCAB
    types: tuple[
        tuple[str, str], ...
    ] = ()  # of matrices by a part of their names, the first that fits; else f32


SPECS = {
    "llama": Spec("llama"),
    "llama-tied": Spec("llama", tied=True),
    "qwen3": Spec("qwen3", n_head_kv=1),
    "gemma3": Spec("gemma3", n_layer=4, window=16),
    # sliding windows without gemma's GELU, which ggml takes from a table of f16
    "olmo2": Spec("olmo2", n_layer=4, window=16, n_head=2, n_head_kv=1),
    # a deep node no longer sees the tree's root
    "olmo2-narrow": Spec("olmo2", n_layer=4, window=4, n_head=2, n_head_kv=1),
    "qwen3moe": Spec("qwen3moe", n_expert=8, n_expert_used=2, n_ff=32),
    "mamba": Spec("mamba"),
    # its text side; every layer has other matrices for images
    "cogvlm": Spec("cogvlm", n_embd=128, n_head_kv=4),
}

# mixtures of experts as files of them are: rows of whole blocks of 256, types by what a matrix is for
EXPERTS = {
    "qwen3moe": Spec(
        "qwen3moe", n_embd=256, head_dim=64, n_expert=8, n_expert_used=2, n_ff=256,
        types=(("ffn_down_exps", "Q6_K"), ("_exps", "Q4_K"), ("attn_v.", "Q6_K"), ("attn_", "Q4_K")),
    ),
    "gpt-oss": Spec(
        "gpt-oss", n_layer=4, n_embd=256, head_dim=64, n_expert=8, n_expert_used=4, n_ff=256, window=16,
        types=(("_exps.weight", "MXFP4"), ("attn_sinks", "F32"), ("attn_", "Q8_0"), ("output.", "Q8_0")),
    ),
    # of Mixtral's shape; IQ3_S has no panels
    "mixtral": Spec(
        "llama", n_embd=256, head_dim=64, n_expert=8, n_expert_used=2, n_ff=256,
        types=(("ffn_up_exps", "IQ3_S"), ("ffn_gate_exps", "Q5_0"), ("_exps", "F16"), ("attn_", "Q4_0")),
    ),
    # latent attention, a dense first layer, an expert that all tokens share
    "deepseek2": Spec(
        "deepseek2", n_layer=3, n_embd=256, n_head_kv=1, head_dim=64, latent=256, n_expert=8, n_expert_used=2, n_ff=256,
        types=(("_exps", "Q4_K"), ("attn_v_b", "Q5_K"), ("attn_output", "Q6_K"), ("attn_", "Q8_0")),
    ),
}  # fmt: skip


# GLM-4.7-Flash's shape: latent attention, and a prediction layer
LATENT_NEXTN = replace(EXPERTS["deepseek2"], types=(), nextn=1)


def byte_tokens() -> list[str]:
    """The 256 byte tokens of a GPT-2 vocabulary: printable bytes stand for themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]


class Weights:
    """Draws tensors and adds them to the file; the same name and seed give the same weights."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int, types: tuple[tuple[str, str], ...] = ()) -> None:
        self.writer = writer
        self.seed = seed
        self.types = types

    def normal(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Rows first, as numpy has it. Variance 1 / columns: activations keep their size."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        scale = gain / np.sqrt(shape[-1])
        values = rng.normal(0.0, scale, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType[next((t for part, t in self.types if part in name), "F32")]
        if kind == gguf.GGMLQuantizationType.F32:
            self.writer.add_tensor(name, values)
        elif kind == gguf.GGMLQuantizationType.F16:
            self.writer.add_tensor(name, values.astype(np.float16))
        else:
            self.writer.add_tensor(name, quantise(values, kind), raw_dtype=kind)

    def norm(self, name: str, n: int, size: float = 1.0) -> None:
        """A norm's weights near `size`, all different: a hidden state before the norm cannot pass for one after it."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        self.writer.add_tensor(name, (size * rng.uniform(0.7, 1.3, n)).astype(np.float32))

    def bias(self, name: str, *shape: int) -> None:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        self.writer.add_tensor(name, rng.normal(0.0, 0.3, shape).astype(np.float32))


def add_vocab(w: gguf.GGUFWriter, n_vocab: int = N_VOCAB) -> None:
    tokens = [*byte_tokens(), "th", "<|end|>"]
    kinds = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL]
    while len(tokens) < n_vocab:
        tokens.append(f"<|{len(tokens)}|>")
        kinds.append(gguf.TokenType.UNUSED)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges(["t h"])
    w.add_bos_token_id(257)
    w.add_eos_token_id(257)
    w.add_add_bos_token(False)


def _add_cogvlm(t: Weights, s: Spec, prefix: str) -> None:
    t.norm(f"{prefix}.ffn_norm.weight", s.n_embd)
    for kind, ffn in (("attn", "ffn"), ("vis_attn", "vis")):
        t.normal(f"{prefix}.{kind}_qkv.weight", 3 * s.n_embd, s.n_embd)
        t.normal(f"{prefix}.{kind}_output.weight", s.n_embd, s.n_embd)
        t.normal(f"{prefix}.{ffn}_gate.weight", s.n_ff, s.n_embd)
        t.normal(f"{prefix}.{ffn}_up.weight", s.n_ff, s.n_embd)
        t.normal(f"{prefix}.{ffn}_down.weight", s.n_embd, s.n_ff)


def _add_attention(t: Weights, s: Spec, prefix: str) -> None:
    # sharp attention (gain on queries and keys): one token wrongly seen, or missed, moves the logits a lot
    t.normal(f"{prefix}.attn_q.weight", s.n_head * s.head_dim, s.n_embd, gain=1.5)
    t.normal(f"{prefix}.attn_k.weight", s.n_head_kv * s.head_dim, s.n_embd, gain=1.5)
    t.normal(f"{prefix}.attn_v.weight", s.n_head_kv * s.head_dim, s.n_embd)
    t.normal(f"{prefix}.attn_output.weight", s.n_embd, s.n_head * s.head_dim)
    if s.arch == "gpt-oss":
        for part, n in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv)):
            t.bias(f"{prefix}.attn_{part}.bias", n * s.head_dim)
        t.bias(f"{prefix}.attn_output.bias", s.n_embd)
        t.bias(f"{prefix}.attn_sinks.weight", s.n_head)
    elif s.arch != "llama":
        over_heads = s.arch == "olmo2"  # one norm over all heads
        t.norm(f"{prefix}.attn_q_norm.weight", s.head_dim * (s.n_head if over_heads else 1))
        t.norm(f"{prefix}.attn_k_norm.weight", s.head_dim * (s.n_head_kv if over_heads else 1))
    if s.arch in POST_NORM:
        t.norm(f"{prefix}.post_attention_norm.weight", s.n_embd)


def _add_latent_attention(t: Weights, s: Spec, prefix: str) -> None:
    t.norm(f"{prefix}.attn_q_a_norm.weight", s.latent)
    t.norm(f"{prefix}.attn_kv_a_norm.weight", s.latent)
    t.normal(f"{prefix}.attn_q_a.weight", s.latent, s.n_embd)
    t.normal(f"{prefix}.attn_q_b.weight", s.n_head * (s.head_dim + N_ROT), s.latent, gain=1.5)
    t.normal(f"{prefix}.attn_kv_a_mqa.weight", s.latent + N_ROT, s.n_embd, gain=1.5)
    t.normal(f"{prefix}.attn_k_b.weight", s.n_head, s.latent, s.head_dim)
    t.normal(f"{prefix}.attn_v_b.weight", s.n_head, s.head_dim, s.latent)
    t.normal(f"{prefix}.attn_output.weight", s.n_embd, s.n_head * s.head_dim)


def _add_ffn(t: Weights, s: Spec, prefix: str) -> None:
    if s.arch not in ("olmo2", "gpt-oss"):
        t.norm(f"{prefix}.ffn_norm.weight", s.n_embd)
    if s.n_expert and not (s.latent and prefix == "blk.0"):
        if s.latent:
            t.bias(f"{prefix}.exp_probs_b.bias", s.n_expert)
            t.normal(f"{prefix}.ffn_gate_shexp.weight", s.n_ff, s.n_embd)
            t.normal(f"{prefix}.ffn_up_shexp.weight", s.n_ff, s.n_embd)
            t.normal(f"{prefix}.ffn_down_shexp.weight", s.n_embd, s.n_ff)
        if s.arch == "gpt-oss":
            t.bias(f"{prefix}.ffn_gate_inp.bias", s.n_expert)
            for part, n in (("gate", s.n_ff), ("up", s.n_ff), ("down", s.n_embd)):
                t.bias(f"{prefix}.ffn_{part}_exps.bias", s.n_expert, n)
        t.normal(f"{prefix}.ffn_gate_inp.weight", s.n_expert, s.n_embd)
        t.normal(f"{prefix}.ffn_gate_exps.weight", s.n_expert, s.n_ff, s.n_embd)
        t.normal(f"{prefix}.ffn_up_exps.weight", s.n_expert, s.n_ff, s.n_embd)
        t.normal(f"{prefix}.ffn_down_exps.weight", s.n_expert, s.n_embd, s.n_ff)
        return
    t.normal(f"{prefix}.ffn_gate.weight", s.n_ff, s.n_embd)
    t.normal(f"{prefix}.ffn_up.weight", s.n_ff, s.n_embd)
    t.normal(f"{prefix}.ffn_down.weight", s.n_embd, s.n_ff)
    if s.arch in POST_NORM:
        t.norm(f"{prefix}.post_ffw_norm.weight", s.n_embd)


def _add_mamba(w: gguf.GGUFWriter, t: Weights, s: Spec, prefix: str) -> None:
    d_conv, d_inner, d_state, dt_rank = 4, 2 * s.n_embd, 16, 4
    t.normal(f"{prefix}.ssm_in.weight", 2 * d_inner, s.n_embd)
    t.normal(f"{prefix}.ssm_conv1d.weight", d_inner, d_conv)
    t.norm(f"{prefix}.ssm_conv1d.bias", d_inner)
    t.normal(f"{prefix}.ssm_x.weight", dt_rank + 2 * d_state, d_inner)
    t.normal(f"{prefix}.ssm_dt.weight", d_inner, dt_rank)
    t.norm(f"{prefix}.ssm_dt.bias", d_inner)
    decay = -np.tile(np.arange(1, d_state + 1, dtype=np.float32), (d_inner, 1))  # negative: the state decays
    w.add_tensor(f"{prefix}.ssm_a", decay)
    t.norm(f"{prefix}.ssm_d", d_inner)
    t.normal(f"{prefix}.ssm_out.weight", s.n_embd, d_inner)


def write_model(path: Path, spec: Spec, seed: int = 1, split: int = 0) -> Path:
    """Write a model of shape `spec` to `path`, or with `split` tensors in each part; returns the file, or the first."""
    s = spec
    w = gguf.GGUFWriter(path, s.arch, split_max_tensors=split)
    t = Weights(w, seed, s.types)

    w.add_name(f"random {s.arch}")
    w.add_context_length(2048)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer + s.nextn)
    w.add_feed_forward_length(s.n_ff)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(s.n_vocab)
    add_vocab(w, s.n_vocab)
    if s.arch == "mamba":
        w.add_head_count(0)
        w.add_ssm_conv_kernel(4)
        w.add_ssm_inner_size(2 * s.n_embd)
        w.add_ssm_state_size(16)
        w.add_ssm_time_step_rank(4)
    else:
        w.add_head_count(s.n_head)
        w.add_head_count_kv(s.n_head_kv)
        w.add_key_length(s.latent + N_ROT if s.latent else s.head_dim)
        w.add_value_length(s.latent or s.head_dim)
        w.add_rope_dimension_count(N_ROT if s.latent else s.head_dim)
        w.add_rope_freq_base(10000.0)
    if s.window:
        w.add_sliding_window(s.window)
        w.add_uint32(f"{s.arch}.attention.sliding_window_pattern", 2)  # every second layer is global
    if s.n_expert:
        w.add_expert_count(s.n_expert)
        w.add_expert_used_count(s.n_expert_used)
        w.add_expert_feed_forward_length(s.n_ff)

    if s.nextn:
        w.add_uint32(f"{s.arch}.nextn_predict_layers", s.nextn)
    if s.latent:
        w.add_q_lora_rank(s.latent)
        w.add_kv_lora_rank(s.latent)
        w.add_key_length_mla(s.head_dim + N_ROT)
        w.add_value_length_mla(s.head_dim)
        w.add_leading_dense_block_count(1)
        w.add_expert_shared_count(1)
        w.add_expert_weights_scale(1.5)
        w.add_expert_weights_norm(True)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)

    # embeddings of size 1, except where the architecture scales them itself
    t.normal("token_embd.weight", s.n_vocab, s.n_embd, gain=1.0 if s.arch == "gemma3" else s.n_embd**0.5)
    t.norm("output_norm.weight", s.n_embd)
    if not s.tied:
        t.normal("output.weight", s.n_vocab, s.n_embd, gain=2.0)
    for i in range(s.n_layer + s.nextn):
        prefix = f"blk.{i}"
        if i >= s.n_layer:
            t.normal(f"{prefix}.nextn.eh_proj.weight", s.n_embd, 2 * s.n_embd)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                t.norm(f"{prefix}.nextn.{name}.weight", s.n_embd)
        if s.arch != "olmo2":
            t.norm(f"{prefix}.attn_norm.weight", s.n_embd)
        if s.arch == "mamba":
            _add_mamba(w, t, s, prefix)
        elif s.arch == "cogvlm":
            _add_cogvlm(t, s, prefix)
        else:
            (_add_latent_attention if s.latent else _add_attention)(t, s, prefix)
            _add_ffn(t, s, prefix)

    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="entmtp-models-")  # removed when the process ends


@functools.cache
def model_path(name: str) -> Path:
    """The GGUF file of SPECS[name], written once per process."""
    return write_model(Path(_folder().name) / f"{name}.gguf", SPECS[name])


@functools.cache
def experts_path(name: str) -> Path:
    """The same of EXPERTS[name]."""
    return write_model(Path(_folder().name) / f"experts-{name}.gguf", EXPERTS[name])


def write_encoder(path: Path) -> Path:
    """A BERT of one layer: it reads, and writes nothing."""
    w = gguf.GGUFWriter(path, "bert")
    t = Weights(w, 1)
    d, n_ff, n_ctx = 64, 96, 128
    add_vocab(w)
    w.add_token_type_count(2)
    w.add_context_length(n_ctx)
    w.add_embedding_length(d)
    w.add_block_count(1)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(4)
    w.add_layer_norm_eps(1e-5)
    w.add_causal_attention(False)
    w.add_pooling_type(gguf.PoolingType.NONE)
    for name, rows in (("token_embd", N_VOCAB), ("position_embd", n_ctx), ("token_types", 2)):
        t.normal(f"{name}.weight", rows, d)
    matrices = [("attn_q", d, d), ("attn_k", d, d), ("attn_v", d, d), ("attn_output", d, d)]
    for name, rows, columns in [*matrices, ("ffn_up", n_ff, d), ("ffn_down", d, n_ff)]:
        t.normal(f"blk.0.{name}.weight", rows, columns)
        t.norm(f"blk.0.{name}.bias", rows)
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        t.norm(f"{name}.weight", d)
        t.norm(f"{name}.bias", d)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
