"""Gemma 4's shape with random weights, and an assistant that drafts for it; what both compute, by numpy.

An assistant has no keys and values of its own: its layers look at those of the model's last layer of their kind, full
or with a sliding window. It takes a token and the hidden state before it, gives a state to go on from, and asks for
every token of a chain from the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .layers_reference import rms
from .models import N_VOCAB, Weights, add_vocab

Array = npt.NDArray[np.float64]
WINDOW = 16
EPS = 1e-6
BASE, BASE_SWA = 1e5, 1e4


@dataclass(frozen=True)
class Shape:
    """Of either model. `windows` says which layers have a sliding window; of two numbers the second is theirs."""

    arch: str
    windows: tuple[bool, ...]
    n_embd: int
    n_out: int = 0  # of the states that go in and out, an assistant's
    n_head: int = 4
    n_head_kv: tuple[int, int] = (1, 2)
    head_dim: tuple[int, int] = (64, 32)
    n_ff: int = 96
    n_shared: int = 0  # last layers that use keys and values of earlier ones
    per_layer: int = 0  # width of the embeddings that every layer has of its own
    n_expert: int = 0


TARGET = Shape("gemma4", (True, False, True, False), 64)
# as the smaller ones of the family are, and the one with experts
SHARED = Shape("gemma4", (True, False, True, False, True, False), 64, n_shared=2, per_layer=32)
EXPERTS = Shape("gemma4", (True, False, True, False), 64, n_expert=4)
ASSISTANT = Shape("gemma4-assistant", (True, True, False), 48, n_out=64)


def write(path: Path, shape: Shape, seed: int = 1) -> Path:
    """Write such a model."""
    w = gguf.GGUFWriter(path, shape.arch)
    n_layer, assists = len(shape.windows), shape.arch.endswith("assistant")
    w.add_name(f"random {shape.arch}")
    w.add_context_length(2048)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(shape.n_ff)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv([shape.n_head_kv[window] for window in shape.windows])
    w.add_key_length(shape.head_dim[0])
    w.add_value_length(shape.head_dim[0])
    w.add_key_length_swa(shape.head_dim[1])
    w.add_value_length_swa(shape.head_dim[1])
    w.add_rope_dimension_count(shape.head_dim[0])
    w.add_rope_dimension_count_swa(shape.head_dim[1])
    w.add_rope_freq_base(BASE)
    w.add_rope_freq_base_swa(BASE_SWA)
    w.add_layer_norm_rms_eps(EPS)
    w.add_sliding_window(WINDOW)
    w.add_sliding_window_pattern(list(shape.windows))
    w.add_shared_kv_layers(shape.n_shared)
    w.add_vocab_size(N_VOCAB)
    if assists:
        w.add_embedding_length_out(shape.n_out)
        w.add_nextn_predict_layers(n_layer)
    else:
        w.add_embedding_length_per_layer_input(shape.per_layer)
    if shape.n_expert:
        w.add_expert_count(shape.n_expert)
        w.add_expert_used_count(2)
        w.add_expert_feed_forward_length(32)
    add_vocab(w)
    t = Weights(w, seed)
    t.normal("token_embd.weight", N_VOCAB, shape.n_embd)
    t.norm("output_norm.weight", shape.n_embd)
    t.norm("rope_freqs.weight", shape.head_dim[0] // 2)
    if assists:
        t.normal("nextn.pre_projection.weight", shape.n_embd, 2 * shape.n_out)
        t.normal("nextn.post_projection.weight", shape.n_out, shape.n_embd)
    if shape.per_layer:
        t.normal("per_layer_token_embd.weight", N_VOCAB, shape.per_layer * n_layer)
        t.normal("per_layer_model_proj.weight", shape.per_layer * n_layer, shape.n_embd)
        t.norm("per_layer_proj_norm.weight", shape.per_layer)
    for i, window in enumerate(shape.windows):
        _layer(t, shape, f"blk.{i}", window, keys=not assists and i < n_layer - shape.n_shared)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _layer(t: Weights, shape: Shape, at: str, window: bool, keys: bool) -> None:
    d, head, n_kv = shape.n_embd, shape.head_dim[window], shape.n_head_kv[window]
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        t.norm(f"{at}.{name}.weight", d)
    t.normal(f"{at}.attn_q.weight", shape.n_head * head, d)
    t.norm(f"{at}.attn_q_norm.weight", head, head**-0.5)  # scores are not scaled by anything else
    t.normal(f"{at}.attn_output.weight", d, shape.n_head * head)
    if keys:
        t.normal(f"{at}.attn_k.weight", n_kv * head, d)
        t.normal(f"{at}.attn_v.weight", n_kv * head, d)
        t.norm(f"{at}.attn_k_norm.weight", head)
    t.normal(f"{at}.ffn_gate.weight", shape.n_ff, d)
    t.normal(f"{at}.ffn_up.weight", shape.n_ff, d)
    t.normal(f"{at}.ffn_down.weight", d, shape.n_ff)
    t.norm(f"{at}.layer_output_scale.weight", 1)
    if shape.per_layer:
        t.normal(f"{at}.inp_gate.weight", shape.per_layer, d)
        t.normal(f"{at}.proj.weight", d, shape.per_layer)
        t.norm(f"{at}.post_norm.weight", d)
    if shape.n_expert:
        for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
            t.norm(f"{at}.{name}.weight", d)
        t.normal(f"{at}.ffn_gate_inp.weight", shape.n_expert, d)
        t.norm(f"{at}.ffn_gate_inp.scale", d)
        t.normal(f"{at}.ffn_gate_exps.weight", shape.n_expert, 32, d)
        t.normal(f"{at}.ffn_up_exps.weight", shape.n_expert, 32, d)
        t.normal(f"{at}.ffn_down_exps.weight", shape.n_expert, d, 32)
        t.norm(f"{at}.ffn_down_exps.scale", shape.n_expert)


#
# what they compute, in float64
#


@dataclass
class Reference:
    """The model over a text, and the assistant after each of its places. For `TARGET` and `ASSISTANT`.

    Attributes:
        h: [n, n_embd] the model's hidden states, normed.
        keys: by whether there is a window, [n, n_head_kv, head_dim] keys and values of its last such layer.
    """

    model: Path
    assistant: Path
    text: list[int]
    h: Array = field(init=False)
    keys: dict[bool, tuple[Array, Array]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.t, self.a = _tensors(self.model), _tensors(self.assistant)
        at = np.arange(len(self.text))
        x = self.t["token_embd.weight"][self.text] * np.sqrt(TARGET.n_embd)
        for i, window in enumerate(TARGET.windows):
            a = rms(x, self.t[f"blk.{i}.attn_norm.weight"], EPS)
            k, v = (
                (a @ self.t[f"blk.{i}.attn_{part}.weight"].T).reshape(len(at), -1, TARGET.head_dim[window])
                for part in "kv"
            )
            k = _rope(rms(k, self.t[f"blk.{i}.attn_k_norm.weight"], EPS), at, window, self.t)
            self.keys[window] = k, rms(v, np.ones(1), EPS)
            x = self._layer(self.t, i, x, window, at)
        self.h = rms(x, self.t["output_norm.weight"], EPS)

    def logits(self, i: int, path: tuple[int, ...] = ()) -> Array:
        """What the assistant holds probable after text[: i + 1] and a path, [n_vocab]."""
        h, logits = self.h[i - 1], np.zeros(0)
        for token in (self.text[i], *path):
            e = self.t["token_embd.weight"][token] * np.sqrt(TARGET.n_embd)
            x = (np.concatenate([e, h]) @ self.a["nextn.pre_projection.weight"].T)[None]
            for j, window in enumerate(ASSISTANT.windows):
                x = self._layer(self.a, j, x, window, np.array([i]), n_keys=i)
            x = rms(x, self.a["output_norm.weight"], EPS)[0]
            logits = x @ self.a["token_embd.weight"].T
            h = x @ self.a["nextn.post_projection.weight"].T
        return logits

    def _layer(
        self,
        t: dict[str, Array],
        i: int,
        x: Array,
        window: bool,
        at: npt.NDArray[Any],
        n_keys: int | None = None,
    ) -> Array:
        def w(name: str) -> Array:
            return t[f"blk.{i}.{name}.weight"]

        k, v = (keys[:n_keys] for keys in self.keys[window])
        a = rms(x, w("attn_norm"), EPS)
        q = (a @ w("attn_q").T).reshape(len(at), -1, TARGET.head_dim[window])
        q = _rope(rms(q, w("attn_q_norm"), EPS), at, window, t)
        k, v = (np.repeat(keys, q.shape[1] // keys.shape[1], 1) for keys in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k)
        far = at[:, None] - np.arange(len(k))[None]
        scores[:, (far < 0) | (far >= (WINDOW if window else len(k) + 1))] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", p, v).reshape(len(at), -1) @ w("attn_output").T
        x = x + rms(mixed, w("post_attention_norm"), EPS)
        f = rms(x, w("ffn_norm"), EPS)
        gate = f @ w("ffn_gate").T
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * gate * (1 + 0.044715 * gate**2)))
        x = x + rms((gate * (f @ w("ffn_up").T)) @ w("ffn_down").T, w("post_ffw_norm"), EPS)
        return np.asarray(x * w("layer_output_scale"))


def _tensors(path: Path) -> dict[str, Array]:
    return {x.name: x.data.astype(np.float64) for x in gguf.GGUFReader(path).tensors}


def _rope(x: Array, at: npt.NDArray[Any], window: bool, t: dict[str, Array]) -> Array:
    """Rotate pairs of dimensions half a head apart; [n, heads, head_dim]."""
    half = x.shape[-1] // 2
    angle = at[:, None, None] * (BASE_SWA if window else BASE) ** (-np.arange(half) / half)
    if not window:
        angle = angle / t["rope_freqs.weight"]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
