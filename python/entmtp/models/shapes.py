"""Models of useful size with random weights: their passes cost what a real model's do, their text means nothing.

The tokenizer is the demo base's, filled up to the shape's vocabulary. Weights are random blocks of a
quantisation, written tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..common.atomic import atomic_path


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama model, or of one with experts, which are `n_ff` wide."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    arch: str = "llama"
    n_head_dim: int = 0  # 0: n_embd / n_head
    n_expert: int = 0
    n_expert_used: int = 0
    window: int = 0  # sliding window of every other layer
    dense: str = ""  # type of matrices that are no experts; "": as experts
    tied: bool = False  # the embeddings are the output projection, too

    @property
    def head_dim(self) -> int:
        return self.n_head_dim or self.n_embd // self.n_head


SHAPES = {
    "tiny": Shape(2, 64, 128, 2, 1, 4352),  # for tests
    "demo": Shape(6, 256, 768, 4, 2, 4096),  # the bundled model
    "1b": Shape(16, 2048, 8192, 32, 8, 32000),  # Llama 3.2 1B, with the vocabulary of Llama 2
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),  # Llama 2 7B
    "32b": Shape(64, 5120, 27648, 40, 8, 152064),  # Qwen2.5 32B
    # 4 of the 48 layers of Qwen3 30B A3B, and of the 24 of gpt-oss 20B; vocabularies are smaller by as much
    "30b-a3b": Shape(4, 2048, 768, 32, 4, 12800, "qwen3moe", 128, 128, 8),
    "gpt-oss-20b": Shape(4, 2880, 2880, 64, 8, 33536, "gpt-oss", 64, 32, 4, 128, "q8_0"),
}


DRAWN = 1 << 22  # numbers: matrices of f16 repeat rows that were drawn


@dataclass(frozen=True)
class Quant:
    """Blocks of a quantisation: where f16 scales lie, and the root mean square of random bytes in units of a scale."""

    file_type: gguf.LlamaFileType
    scales: tuple[int, ...]  # offset in the block, bytes
    deviation: float
    exponent: bool = False  # the scale is a power of two, in one byte
    minimum: float = 0.0  # the second scale, of mins, in units of the first: with it weights have no mean


QUANTS = {
    "q4_0": Quant(gguf.LlamaFileType.MOSTLY_Q4_0, (0,), 4.6),
    "q8_0": Quant(gguf.LlamaFileType.MOSTLY_Q8_0, (0,), 74.0),
    "q2_k": Quant(gguf.LlamaFileType.MOSTLY_Q2_K, (80, 82), 13.9, minimum=1.5),  # 4-bit scales and mins
    "q3_k": Quant(gguf.LlamaFileType.MOSTLY_Q3_K_M, (108,), 43.3),  # 6-bit scales
    "q4_k": Quant(gguf.LlamaFileType.MOSTLY_Q4_K_M, (0, 2), 258.0, minimum=7.5),  # 6-bit scales and mins
    "q5_k": Quant(gguf.LlamaFileType.MOSTLY_Q5_K_M, (0, 2), 527.0, minimum=15.5),
    "q6_k": Quant(gguf.LlamaFileType.MOSTLY_Q6_K, (208,), 1370.0),  # 8-bit scales
    "iq4_xs": Quant(gguf.LlamaFileType.MOSTLY_IQ4_XS, (0,), 1247.0),
    "mxfp4": Quant(gguf.LlamaFileType.MOSTLY_MXFP4_MOE, (0,), 2.9, exponent=True),
    "f16": Quant(gguf.LlamaFileType.MOSTLY_F16, (), 1.0),
}


def n_weights(s: Shape) -> int:
    """Weights of a model of a shape, without vectors."""
    attention = 2 * s.head_dim * (s.n_head + s.n_head_kv) * s.n_embd
    layer = attention + 3 * s.n_ff * s.n_embd * max(1, s.n_expert)
    return s.n_layer * layer + 2 * s.n_vocab * s.n_embd


def model_bytes(s: Shape, quant: str) -> int:
    """Size of a file of `write_model`, roughly."""
    n_block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant.upper()]]
    return n_weights(s) * n_bytes // n_block


def cache_bytes(s: Shape, n_ctx: int) -> int:
    """Size of the KV cache in f16."""
    return 4 * s.n_layer * s.head_dim * s.n_head_kv * n_ctx


class _Writer:
    """Adds random matrices and plain vectors to a GGUF file."""

    def __init__(self, path: Path, arch: str, seed: int, quant: str = "q4_0"):
        self.gguf = gguf.GGUFWriter(path, arch, use_temp_file=True)
        self.rng = np.random.default_rng(seed)
        self.quant = quant
        self.gguf.add_file_type(QUANTS[quant].file_type)

    def matrix(
        self, name: str, n_out: int, n_in: int, n_expert: int = 0, quant: str = "", gain: float = 1.0
    ) -> None:
        """Weights with a variance of gain^2 / n_in, of one matrix or of as many as there are experts."""
        quant = quant or self.quant
        q, kind = QUANTS[quant], gguf.GGMLQuantizationType[quant.upper()]
        shape, n_out = (n_expert, n_out) if n_expert else (n_out,), n_out * max(1, n_expert)
        scale = np.array([gain / (q.deviation * np.sqrt(n_in))], dtype=np.float16)
        if not q.scales:
            # drawing 7e9 numbers takes minutes; the output's rows must differ, or their logits are equal
            rows = n_out if name == "output.weight" else min(n_out, max(1, DRAWN // n_in))
            drawn = self.rng.standard_normal((rows, n_in), dtype=np.float32) * np.float32(scale[0])
            self.gguf.add_tensor(name, np.resize(drawn.astype(np.float16), (*shape, n_in)))
            return
        n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = self.rng.integers(0, 256, (n_out, n_in // n_weights, n_bytes), dtype=np.uint8)
        for at, factor in zip(q.scales, (1.0, q.minimum), strict=False):
            if q.exponent:
                blocks[..., at] = 127 + round(np.log2(float(scale[0])))
            else:
                blocks[..., at : at + 2] = (scale * np.float16(factor)).view(np.uint8)
        self.gguf.add_tensor(name, blocks.reshape(*shape, -1), raw_dtype=kind)

    def router(self, name: str, n_expert: int, n_in: int) -> None:
        """Floats that send random tokens to all experts alike."""
        drawn = self.rng.standard_normal((n_expert, n_in), dtype=np.float32)
        self.gguf.add_tensor(name, drawn / np.float32(np.sqrt(n_in)))

    def vector(self, name: str, n: int | tuple[int, int], value: float) -> None:
        self.gguf.add_tensor(name, np.full(n, value, dtype=np.float32))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def _add_tokenizer(w: gguf.GGUFWriter, source: Path, n_vocab: int) -> list[str]:
    """The tokenizer of `source` with fillers behind its tokens."""
    fields = gguf.GGUFReader(source).fields
    tokens: list[str] = []
    for name, field in fields.items():
        if not name.startswith("tokenizer."):
            continue
        value: Any = field.contents()
        if name == "tokenizer.ggml.tokens":
            value = tokens = [*value, *(f"<|filler{i}|>" for i in range(n_vocab - len(value)))]
        elif name == "tokenizer.ggml.token_type":
            value = [*value, *[int(gguf.TokenType.UNUSED)] * (n_vocab - len(value))]
        elif name == "tokenizer.ggml.scores":
            value = [*value, *[0.0] * (n_vocab - len(value))]
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        w.add_key_value(name, value, kind, sub_type=sub)
    return tokens


def _add_experts(w: _Writer, s: Shape, b: str) -> None:
    w.router(f"{b}.ffn_gate_inp.weight", s.n_expert, s.n_embd)
    for part, n_out, n_in in (
        ("gate", s.n_ff, s.n_embd),
        ("up", s.n_ff, s.n_embd),
        ("down", s.n_embd, s.n_ff),
    ):
        w.matrix(f"{b}.ffn_{part}_exps.weight", n_out, n_in, s.n_expert)
        if s.arch == "gpt-oss":
            w.vector(f"{b}.ffn_{part}_exps.bias", (s.n_expert, n_out), 0.0)
    if s.arch == "gpt-oss":
        w.vector(f"{b}.ffn_gate_inp.bias", s.n_expert, 0.0)


def _add_layer(w: _Writer, s: Shape, b: str) -> None:
    n_q, n_kv = s.head_dim * s.n_head, s.head_dim * s.n_head_kv
    w.vector(f"{b}.attn_norm.weight", s.n_embd, 1.0)
    w.vector(f"{b}.{'post_attention' if s.arch == 'gpt-oss' else 'ffn'}_norm.weight", s.n_embd, 1.0)
    for part, n_out in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        w.matrix(f"{b}.attn_{part}.weight", n_out, s.n_embd, quant=s.dense)
        if s.arch == "gpt-oss":
            w.vector(f"{b}.attn_{part}.bias", n_out, 0.0)
    w.matrix(f"{b}.attn_output.weight", s.n_embd, n_q, quant=s.dense)
    if s.arch == "gpt-oss":
        w.vector(f"{b}.attn_output.bias", s.n_embd, 0.0)
        w.vector(f"{b}.attn_sinks.weight", s.n_head, 0.0)
    if s.arch == "qwen3moe":
        w.vector(f"{b}.attn_q_norm.weight", s.head_dim, 1.0)
        w.vector(f"{b}.attn_k_norm.weight", s.head_dim, 1.0)
    if s.n_expert:
        _add_experts(w, s, b)
        return
    w.matrix(f"{b}.ffn_gate.weight", s.n_ff, s.n_embd)
    w.matrix(f"{b}.ffn_up.weight", s.n_ff, s.n_embd)
    w.matrix(f"{b}.ffn_down.weight", s.n_embd, s.n_ff)


def write_model(path: str | Path, shape: Shape, seed: int = 1, quant: str = "q4_0") -> Path:
    """A model of `shape`; with experts, these are in `quant`, and the rest in what the shape says.

    Raises:
        ValueError: `quant` is not one of `QUANTS`, or its blocks do not fit the shape's rows.
    """
    if quant not in QUANTS:
        raise ValueError(f"quantisation is {quant!r}, must be one of {', '.join(QUANTS)}")
    n_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant.upper()]][0]
    if shape.n_embd % n_block or shape.n_ff % n_block:
        raise ValueError(
            f"{quant} has blocks of {n_block} weights, which rows of {shape.n_embd} do not divide into"
        )
    from .assets import assets

    s, path = shape, Path(path)
    with atomic_path(path) as temporary:
        w = _Writer(temporary, s.arch, seed, quant)
        g = w.gguf
        g.add_name("random weights")
        g.add_context_length(4096)
        g.add_embedding_length(s.n_embd)
        g.add_block_count(s.n_layer)
        g.add_feed_forward_length(s.n_ff)
        g.add_head_count(s.n_head)
        g.add_head_count_kv(s.n_head_kv)
        g.add_key_length(s.head_dim)
        g.add_value_length(s.head_dim)
        g.add_layer_norm_rms_eps(1e-5)
        g.add_rope_dimension_count(s.head_dim)
        g.add_rope_freq_base(10000.0)
        g.add_vocab_size(s.n_vocab)
        if s.n_expert:
            g.add_expert_count(s.n_expert)
            g.add_expert_used_count(s.n_expert_used)
            g.add_expert_feed_forward_length(s.n_ff)
        if s.window:
            g.add_sliding_window(s.window)
        _add_tokenizer(g, assets() / "demo-base-q8_0.gguf", s.n_vocab)
        # with experts, what a token is should choose them, more than what all tokens have seen
        gain = s.n_embd**0.5 if s.n_expert else 1.0
        w.matrix("token_embd.weight", s.n_vocab, s.n_embd, quant=s.dense, gain=gain)
        if not s.tied:
            w.matrix("output.weight", s.n_vocab, s.n_embd, quant=s.dense)
        w.vector("output_norm.weight", s.n_embd, 1.0)
        for i in range(s.n_layer):
            _add_layer(w, s, f"blk.{i}")
        w.close()
    return path


def write_heads(
    path: str | Path, model: str | Path, shape: Shape, arch: str, n_heads: int = 4, seed: int = 2
) -> Path:
    """Medusa or grounded Hydra heads of one block for a model of `shape`, Q4_0; keys as in docs/heads-gguf.md."""
    from .base import read_base

    s, path = shape, Path(path)
    base = read_base(Path(model))
    with atomic_path(path) as temporary:
        w = _Writer(temporary, arch, seed)
        g = w.gguf
        g.add_name(f"random {arch} heads")
        g.add_uint32("entmtp.format_version", 1)
        g.add_string("entmtp.base.name", base.name)
        g.add_string("entmtp.base.architecture", base.architecture)
        g.add_string("entmtp.tokenizer.fingerprint", base.fingerprint)
        g.add_uint32(f"{arch}.embedding_length", s.n_embd)
        g.add_uint32(f"{arch}.vocab_size", s.n_vocab)
        g.add_uint32(f"{arch}.predict_heads", n_heads)
        g.add_uint32(f"{arch}.block_count", 1)
        if arch == "hydra":
            g.add_bool("hydra.grounded", True)
            g.add_bool("hydra.prefix_layer", False)
        for i in range(n_heads):
            n_in = (i + 2) * s.n_embd if arch == "hydra" else s.n_embd
            w.matrix(f"head.{i}.blk.0.weight", s.n_embd, n_in)
            w.vector(f"head.{i}.blk.0.bias", s.n_embd, 0.0)
            if arch == "hydra":
                w.matrix(f"head.{i}.blk.0.res.weight", s.n_embd, n_in)
                w.vector(f"head.{i}.blk.0.res.bias", s.n_embd, 0.0)
            w.matrix(f"head.{i}.output.weight", s.n_vocab, s.n_embd)
        w.close()
    return path
