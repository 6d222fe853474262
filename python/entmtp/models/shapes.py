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
    """Shape of a Llama model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int


SHAPES = {
    "tiny": Shape(2, 64, 128, 2, 1, 4352),  # for tests
    "demo": Shape(6, 256, 768, 4, 2, 4096),  # the bundled model
    "1b": Shape(16, 2048, 8192, 32, 8, 32000),  # Llama 3.2 1B, with the vocabulary of Llama 2
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),  # Llama 2 7B
    "32b": Shape(64, 5120, 27648, 40, 8, 152064),  # Qwen2.5 32B
}


DRAWN = 1 << 22  # numbers: matrices of f16 repeat rows that were drawn


@dataclass(frozen=True)
class Quant:
    """Blocks of a quantisation: where f16 scales lie, and the root mean square of random bytes in units of a scale."""

    file_type: gguf.LlamaFileType
    scales: tuple[int, ...]  # offset in the block, bytes
    deviation: float


QUANTS = {
    "q4_0": Quant(gguf.LlamaFileType.MOSTLY_Q4_0, (0,), 4.6),
    "q8_0": Quant(gguf.LlamaFileType.MOSTLY_Q8_0, (0,), 74.0),
    "q2_k": Quant(gguf.LlamaFileType.MOSTLY_Q2_K, (80, 82), 13.4),  # 4-bit scales and mins
    "q3_k": Quant(gguf.LlamaFileType.MOSTLY_Q3_K_M, (108,), 43.3),  # 6-bit scales
    "q4_k": Quant(gguf.LlamaFileType.MOSTLY_Q4_K_M, (0, 2), 300.0),  # 6-bit scales and mins
    "q5_k": Quant(gguf.LlamaFileType.MOSTLY_Q5_K_M, (0, 2), 634.0),
    "q6_k": Quant(gguf.LlamaFileType.MOSTLY_Q6_K, (208,), 1370.0),  # 8-bit scales
    "iq4_xs": Quant(gguf.LlamaFileType.MOSTLY_IQ4_XS, (0,), 1247.0),
    "f16": Quant(gguf.LlamaFileType.MOSTLY_F16, (), 1.0),
}


def n_weights(s: Shape) -> int:
    """Weights of a model of a shape, without vectors."""
    n_kv = s.n_embd // s.n_head * s.n_head_kv
    layer = 2 * s.n_embd * s.n_embd + 2 * n_kv * s.n_embd + 3 * s.n_ff * s.n_embd
    return s.n_layer * layer + 2 * s.n_vocab * s.n_embd


def model_bytes(s: Shape, quant: str) -> int:
    """Size of a file of `write_model`, roughly."""
    n_block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant.upper()]]
    return n_weights(s) * n_bytes // n_block


def cache_bytes(s: Shape, n_ctx: int) -> int:
    """Size of the KV cache in f16."""
    return 4 * s.n_layer * (s.n_embd // s.n_head) * s.n_head_kv * n_ctx


class _Writer:
    """Adds random matrices and plain vectors to a GGUF file."""

    def __init__(self, path: Path, arch: str, seed: int, quant: str = "q4_0"):
        self.gguf = gguf.GGUFWriter(path, arch, use_temp_file=True)
        self.rng = np.random.default_rng(seed)
        self.quant = quant
        self.gguf.add_file_type(QUANTS[quant].file_type)

    def matrix(self, name: str, n_out: int, n_in: int) -> None:
        """Weights with a variance of 1 / n_in."""
        q, kind = QUANTS[self.quant], gguf.GGMLQuantizationType[self.quant.upper()]
        scale = np.array([1.0 / (q.deviation * np.sqrt(n_in))], dtype=np.float16)
        if not q.scales:
            # drawing 7e9 numbers takes minutes; the output's rows must differ, or their logits are equal
            rows = n_out if name == "output.weight" else min(n_out, max(1, DRAWN // n_in))
            drawn = self.rng.standard_normal((rows, n_in), dtype=np.float32) * np.float32(scale[0])
            self.gguf.add_tensor(name, np.resize(drawn.astype(np.float16), (n_out, n_in)))
            return
        n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = self.rng.integers(0, 256, (n_out, n_in // n_weights, n_bytes), dtype=np.uint8)
        for at in q.scales:
            blocks[..., at : at + 2] = scale.view(np.uint8)
        self.gguf.add_tensor(name, blocks.reshape(n_out, -1), raw_dtype=kind)

    def vector(self, name: str, n: int, value: float) -> None:
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


def write_model(path: str | Path, shape: Shape, seed: int = 1, quant: str = "q4_0") -> Path:
    """A Llama model of `shape`.

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
        w = _Writer(temporary, "llama", seed, quant)
        g = w.gguf
        g.add_name("random weights")
        g.add_context_length(4096)
        g.add_embedding_length(s.n_embd)
        g.add_block_count(s.n_layer)
        g.add_feed_forward_length(s.n_ff)
        g.add_head_count(s.n_head)
        g.add_head_count_kv(s.n_head_kv)
        g.add_layer_norm_rms_eps(1e-5)
        g.add_rope_dimension_count(s.n_embd // s.n_head)
        g.add_rope_freq_base(10000.0)
        g.add_vocab_size(s.n_vocab)
        _add_tokenizer(g, assets() / "demo-base-q8_0.gguf", s.n_vocab)
        n_kv = s.n_embd // s.n_head * s.n_head_kv
        w.matrix("token_embd.weight", s.n_vocab, s.n_embd)
        w.matrix("output.weight", s.n_vocab, s.n_embd)
        w.vector("output_norm.weight", s.n_embd, 1.0)
        for i in range(s.n_layer):
            b = f"blk.{i}"
            w.vector(f"{b}.attn_norm.weight", s.n_embd, 1.0)
            w.vector(f"{b}.ffn_norm.weight", s.n_embd, 1.0)
            w.matrix(f"{b}.attn_q.weight", s.n_embd, s.n_embd)
            w.matrix(f"{b}.attn_k.weight", n_kv, s.n_embd)
            w.matrix(f"{b}.attn_v.weight", n_kv, s.n_embd)
            w.matrix(f"{b}.attn_output.weight", s.n_embd, s.n_embd)
            w.matrix(f"{b}.ffn_gate.weight", s.n_ff, s.n_embd)
            w.matrix(f"{b}.ffn_up.weight", s.n_ff, s.n_embd)
            w.matrix(f"{b}.ffn_down.weight", s.n_embd, s.n_ff)
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
