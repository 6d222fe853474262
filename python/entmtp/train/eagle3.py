"""An EAGLE-3 draft layer in PyTorch (arXiv 2503.01840), under the names of the GGUF that llama.cpp loads.

One decoder layer sees a token's embedding and, of the token before, the inputs of three of the base model's layers, put
together by the matrix `fc`; further ahead, where the base model has not been, its own result in their place. At the
start it is the base model's last layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from gguf import GGUFReader, quants

from ..common.errors import ModelError
from ..models.base import BaseModel
from ..models.formats.gguf_header import read_gguf_header
from .heads import State

ARCH = "eagle3"
AT_ONCE = 4  # sequences: what one gradient needs in memory
BASES = ("llama",)  # whose layers this one is shaped after
FROM_BASE = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
)  # fmt: skip
SEE_BOTH = ("attn_q", "attn_k", "attn_v")  # the embedding and the state; in the base model, the state
NOISE = 0.02  # of weights that no part of the base model could begin as
LEAST_SCALE = 0.05  # of a feature, against the median of all


@dataclass(frozen=True)
class Layer:
    """What is trained: the numbers of the base model's layers, and which of their inputs are seen."""

    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    rms_eps: float
    rope_base: float
    inputs: tuple[int, int, int]
    n_ahead: int  # tokens guessed one after the other

    lm_head = "own"  # as of a `Shape`
    n_projections = 1

    @property
    def arch(self) -> str:
        return ARCH

    @property
    def n_heads(self) -> int:
        return self.n_ahead

    def block_rows(self, head: int) -> int:
        """Rows of n_embd numbers that are read for a guess, besides those of the projection."""
        return sum(prod(size) for size in self.shapes(0).values()) // self.n_embd

    def shapes(self, n_draft: int) -> dict[str, tuple[int, ...]]:
        """Tensors, rows first."""
        d, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        return {
            "fc": (d, len(self.inputs) * d),
            "attn_norm": (d,),  # of the embedding
            "attn_norm_2": (d,),  # of what `fc` gives
            "attn_q": (q, 2 * d),
            "attn_k": (kv, 2 * d),
            "attn_v": (kv, 2 * d),
            "attn_output": (d, q),
            "ffn_norm": (d,),
            "ffn_gate": (self.n_ff, d),
            "ffn_up": (self.n_ff, d),
            "ffn_down": (d, self.n_ff),
            "output_norm": (d,),
            "output": (n_draft, d),
        }

    def floats(self, seq_len: int, batch_tokens: int) -> int:
        """Numbers in memory for a gradient, about: a batch's features, and each step's results and weights of attention
        for a few sequences."""
        d, n = self.n_embd, -(-seq_len // 128) * 128
        step = n * (16 * d + 5 * self.n_ff + 4 * self.n_head * self.head_dim + 4 * self.n_head * n)
        return 2 * 3 * d * batch_tokens + AT_ONCE * self.n_ahead * step


def layer_for(base: BaseModel, n_ahead: int) -> Layer:
    """The layer for a model.

    Raises:
        ModelError: there is none for this architecture, or for mixtures of experts.
        ConvertError: the file lacks a number.
    """
    if base.architecture not in BASES:
        raise ModelError(
            f"{base.path}: an EAGLE-3 layer is trained for the architecture {' or '.join(BASES)}, and this is "
            f"{base.architecture}; train --arch hydra"
        )
    n_head, n_layer = int(base.get("attention.head_count")), int(base.get("block_count"))
    layer = Layer(
        n_embd=base.n_embd,
        n_head=n_head,
        n_head_kv=int(base.keys.get("attention.head_count_kv") or n_head),
        head_dim=int(base.keys.get("attention.key_length") or base.n_embd // n_head),
        n_ff=int(base.get("feed_forward_length")),
        rms_eps=float(base.get("attention.layer_norm_rms_epsilon")),
        rope_base=float(base.keys.get("rope.freq_base") or 10000.0),
        inputs=(min(2, n_layer - 1), n_layer // 2, n_layer - 1),
        n_ahead=n_ahead,
    )
    tensors = read_gguf_header(base.path).tensors
    for name, ours in _last(layer).items():
        rows, *columns = layer.shapes(0)[ours]
        if ours in SEE_BOTH:
            columns = [base.n_embd]
        if name not in tensors or tensors[name].shape != (*columns, rows):
            raise ModelError(
                f"{base.path}: it has no tensor {name} as dense layers have it, which an EAGLE-3 layer begins as; "
                "train --arch hydra"
            )
    return layer


#
# how it begins
#


def _last(layer: Layer) -> dict[str, str]:
    """Tensors of the base model's last layer and its output norm: their names under `Layer.shapes`."""
    own = {f"blk.{layer.inputs[-1]}.{name}.weight": name for name in FROM_BASE}
    return {**own, "output_norm.weight": "output_norm"}


def read_last(path: Path, layer: Layer) -> State:
    """The base model's last layer and output norm, under the names of `Layer.shapes`."""
    names = _last(layer)
    return {
        names[t.name]: torch.tensor(np.array(quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        for t in GGUFReader(path).tensors
        if t.name in names
    }


def scale_of(features: npt.NDArray[np.float16]) -> torch.Tensor:
    """By what features [n, 3 n_embd] are divided so that each is about as large as any other, [3 n_embd].

    Medians, for the first token of a text has states a thousand times as large.
    """
    sizes = np.median(np.abs(features.astype(np.float32)), 0) / 0.6745  # of normal numbers: their deviation
    parts = sizes.reshape(3, -1)
    least = LEAST_SCALE * np.median(parts, 1, keepdims=True)
    return torch.from_numpy(np.maximum(parts, np.maximum(least, 1e-6)).reshape(-1))


def initial(
    layer: Layer, last: State, output: torch.Tensor, features: npt.NDArray[np.float16], scale: torch.Tensor, seed: int
) -> State:  # fmt: skip
    """The state before training: the base model's last layer over its own input, in units of `scale`; of embeddings it
    sees next to nothing.

    Args:
        last: of `read_last`.
        output: the base model's projection, the rows that can be proposed, [n_draft, n_embd].
        features: some that are trained on, [n, 3 n_embd].
    """
    g = torch.Generator().manual_seed(seed)
    d = layer.n_embd
    size = scale[-d:]
    top = torch.from_numpy(features[:, -d:].astype(np.float32))
    # a norm's weight that makes of h / size what the base's makes of h
    ratio = ((top / size).square().mean(1).sqrt() / top.square().mean(1).sqrt().clamp_min(1e-9)).median()
    state = {name: torch.zeros(shape) for name, shape in layer.shapes(len(output)).items()}
    state["fc"][:, -d:] = torch.eye(d)
    state["attn_norm"] += 1.0
    state["attn_norm_2"] = last["attn_norm"] * size * ratio
    for name in SEE_BOTH:
        noise = torch.randn(len(last[name]), d, generator=g) * NOISE
        state[name] = torch.cat([noise, last[name]], 1)
    for name in ("attn_output", "ffn_down"):
        state[name] = last[name] / size[:, None]
    for name in ("ffn_norm", "output_norm"):
        state[name] = last[name] * size * ratio
    for name in ("ffn_gate", "ffn_up"):
        state[name] = last[name].clone()
    state["output"] = output.clone()
    return state


#
# what it computes
#


def rope(x: torch.Tensor, first: int, base: float) -> torch.Tensor:
    """Rotate [n_seqs, n_head, n, head_dim] by the positions from `first` on, neighbouring dimensions paired."""
    n, half = x.shape[-2], x.shape[-1] // 2
    at = torch.arange(first, first + n, dtype=torch.float32)
    angle = torch.outer(at, base ** (-torch.arange(half, dtype=torch.float32) / half))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def unroll(
    layer: Layer, state: State, embedded: torch.Tensor, features: torch.Tensor, n_steps: int
) -> Iterator[torch.Tensor]:
    """The layer's results, one guess further ahead each time, as in training-time test: of token t + 2 from token t + 1
    and the base's features of t, then of t + 3 from token t + 2 and its own result, and so on.

    Yields:
        Of step s: [n_seqs, n - 1 - s, n_embd], row t for the guess of token t + 2 + s.

    Args:
        embedded: of tokens, [n_seqs, n, n_embd].
        features: in units of `scale_of`, [n_seqs, n, 3 n_embd].
    """
    n_seqs, n, d = embedded.shape
    repeat = layer.n_head // layer.n_head_kv
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (d,), state[name], layer.rms_eps)

    def split(x: torch.Tensor, name: str, n_head: int) -> torch.Tensor:
        y = F.linear(x, state[name]).view(n_seqs, -1, n_head, layer.head_dim).transpose(1, 2)
        return y.repeat_interleave(repeat, 1) if n_head < layer.n_head else y

    x = F.linear(features[:, :-1], state["fc"]).float()
    for step in range(min(n_steps, n - 1)):
        x = x[:, : n - 1 - step]
        both = torch.cat([norm(embedded[:, 1 + step :], "attn_norm"), norm(x, "attn_norm_2")], -1)
        q = rope(split(both, "attn_q", layer.n_head), step, layer.rope_base)
        keys.append(rope(split(both, "attn_k", layer.n_head_kv), step, layer.rope_base))
        values.append(split(both, "attn_v", layer.n_head_kv))
        mixed = _attend(q, keys, values).transpose(1, 2).reshape(n_seqs, n - 1 - step, -1)
        x = x + F.linear(mixed, state["attn_output"])
        f = norm(x, "ffn_norm")
        gated = F.silu(F.linear(f, state["ffn_gate"])) * F.linear(f, state["ffn_up"])
        x = x + F.linear(gated, state["ffn_down"])
        yield x


def _attend(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """Row t of the last step sees the first step's rows up to t, and row t of every later one: its own path.

    Args:
        q: [n_seqs, n_head, n, head_dim]; keys and values of each step, longer ones for earlier steps.
    """
    n = q.shape[2]
    first, *later = ((k[:, :, :n], v[:, :, :n]) for k, v in zip(keys, values, strict=True))
    if not later:
        return F.scaled_dot_product_attention(q, *first, is_causal=True)
    q = q * q.shape[-1] ** -0.5
    seen = (q @ first[0].transpose(-1, -2)).float()
    seen = seen.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    path = torch.stack([(q * k).sum(-1) for k, _ in later], -1).float()
    weights = torch.cat([seen, path], -1).softmax(-1).to(q.dtype)
    mixed = weights[..., :n] @ first[1]
    for i, (_, v) in enumerate(later):
        mixed = mixed + weights[..., n + i, None] * v
    return mixed


def before_projection(layer: Layer, state: State, x: torch.Tensor) -> torch.Tensor:
    """What is projected to the vocabulary, of the layer's results [.., n_embd]."""
    return F.rms_norm(x, (layer.n_embd,), state["output_norm"], layer.rms_eps)
