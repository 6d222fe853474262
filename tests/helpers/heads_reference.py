"""Forward pass of the draft heads in numpy, straight from the published checkpoint layout.

An independent reference for the native graphs and the converter: written from the heads' definition (Medusa,
arXiv 2401.10774, section 2.1; Hydra, arXiv 2402.05109, sections 3 and 4), it shares no code with either.
`state` is a checkpoint's state dict as numpy arrays, `config` its config.json. All computing is in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

State = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1.0 + np.exp(-x))


def linear(state: State, name: str, x: np.ndarray) -> np.ndarray:
    """y = x W^T + b of the layer `name`; the bias may be missing."""
    y = np.asarray(x, np.float64) @ state[f"{name}.weight"].astype(np.float64).T
    bias = state.get(f"{name}.bias")
    return y if bias is None else y + bias.astype(np.float64)


def residual_block(state: State, name: str, x: np.ndarray) -> np.ndarray:
    """R(x) + silu(W x + b), where R is the layer's `res_connection` if it has one."""
    kept = linear(state, f"{name}.res_connection", x) if f"{name}.res_connection.weight" in state else x
    return kept + silu(linear(state, f"{name}.linear", x))


def medusa_logits(state: State, config: dict[str, Any], h: np.ndarray) -> list[np.ndarray]:
    """Logits [..., n_vocab] of every Medusa head in the state, for hidden states h [..., n_embd]."""
    n_layers = config["medusa_num_layers"]
    logits = []
    while f"{len(logits)}.{n_layers}.weight" in state:
        i, x = len(logits), np.asarray(h, np.float64)
        for j in range(n_layers):
            x = residual_block(state, f"{i}.{j}", x)
        logits.append(linear(state, f"{i}.{n_layers}", x))
    return logits


def hydra_logits(
    state: State, config: dict[str, Any], head: int, h: np.ndarray, path_embeddings: np.ndarray | None = None
) -> np.ndarray:
    """Logits [..., n_vocab] of Hydra head `head` (counted from 0).

    h [..., n_embd] is the base model's hidden state; for `prefix-mlp`, `prefix_forward` of it. Grounded heads
    take `path_embeddings` [..., head + 1, n_embd]: the embeddings of the next token and of those drafted after it.
    """
    prefix = config["hydra_head_arch"] == "prefix-mlp"
    x = np.asarray(h, np.float64)
    if config["grounded_heads"]:
        if path_embeddings is None or path_embeddings.shape[-2] != head + 1:
            raise ValueError(f"grounded head {head} needs {head + 1} embeddings")
        flat = path_embeddings.reshape(*path_embeddings.shape[:-2], -1)
        x = np.concatenate([x, flat.astype(np.float64)], axis=-1)
    for j in range(config["hydra_num_layers"]):
        x = residual_block(state, f"hydra_mlp.{head}.{2 * j + 1 if prefix else j}", x)
    return linear(state, f"hydra_lm_head.{head}.1" if prefix else f"hydra_lm_head.{head}", x)


def cheap_state(state: State, projection: np.ndarray | None = None, ids: Any = None) -> State:
    """The state dict that heads amount to which share `projection` [n_vocab, n_embd] (None: have their own), with a
    draft vocabulary of the rows `ids` (None: all)."""
    blocks = ("hydra_mlp.", "prefix_embeding_layer.", "input_embed_fn.")
    out = dict(state)
    for name, array in state.items():
        if name.startswith(blocks) or ".linear." in name:
            continue
        if projection is not None and name.endswith(".weight"):
            array = projection
        out[name] = array if ids is None else array[np.asarray(ids)]
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def rope(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Rotate x [n, n_head, head_dim] by its positions [n]; pairs are (k, k + head_dim / 2), as in Hugging Face."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions, np.float64)[:, None] * base ** (-np.arange(half) / half)  # [n, half]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def prefix_forward(
    state: State,
    hidden: np.ndarray,
    positions: np.ndarray,
    n_head: int,
    n_head_kv: int,
    rms_eps: float = 1e-5,
    rope_base: float = 10000.0,
) -> np.ndarray:
    """The decoder layer of Hydra++ and its final norm, over one sequence.

    hidden [n, n_embd] are the base model's hidden states at `positions` [n], in order; each attends to itself and
    to those before it. Returns [n, n_embd]. With past hidden states in front this is what a KV cache gives.
    """
    name = "prefix_embeding_layer.layers.0."
    x = np.asarray(hidden, np.float64)
    n, n_embd = x.shape
    head_dim = n_embd // n_head
    normed = rms_norm(x, state[name + "input_layernorm.weight"], rms_eps)
    q = linear(state, name + "self_attn.q_proj", normed).reshape(n, n_head, head_dim)
    k = linear(state, name + "self_attn.k_proj", normed).reshape(n, n_head_kv, head_dim)
    v = linear(state, name + "self_attn.v_proj", normed).reshape(n, n_head_kv, head_dim)
    q, k = rope(q, positions, rope_base), rope(k, positions, rope_base)
    k, v = (np.repeat(a, n_head // n_head_kv, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(n, n_embd)
    x = x + linear(state, name + "self_attn.o_proj", mixed)
    normed = rms_norm(x, state[name + "post_attention_layernorm.weight"], rms_eps)
    gated = silu(linear(state, name + "mlp.gate_proj", normed)) * linear(state, name + "mlp.up_proj", normed)
    x = x + linear(state, name + "mlp.down_proj", gated)
    return rms_norm(x, state["prefix_embeding_layer.norm.weight"], rms_eps)
