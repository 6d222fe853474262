"""Parts of a Llama layer in numpy, to compare with what is computed natively."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def rms(x: npt.NDArray[Any], weight: npt.NDArray[Any], eps: float) -> npt.NDArray[Any]:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def ffn(
    x: npt.NDArray[Any], gate: npt.NDArray[Any], up: npt.NDArray[Any], down: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    z = x @ gate.T
    return (z / (1 + np.exp(-z)) * (x @ up.T)) @ down.T


def attend(
    q: npt.NDArray[Any], k: npt.NDArray[Any], v: npt.NDArray[Any], n: dict[str, Any]
) -> npt.NDArray[Any]:
    """Causal attention with rotary embeddings of neighbouring pairs.

    Args:
        q, k, v: [n_tokens, heads * head_dim].
        n: numbers of the model, `nextn.numbers_of`.
    """
    at = np.arange(len(q))

    def rope(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        half = n["head_dim"] // 2
        angle = at[:, None, None] * n["rope_base"] ** (-np.arange(half) / half)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)
        return np.stack(turned, -1).reshape(x.shape)

    q, k, v = (x.reshape(len(at), -1, n["head_dim"]) for x in (q, k, v))
    q, k = rope(q), rope(k)
    k, v = (np.repeat(x, n["n_head"] // n["n_head_kv"], 1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(n["head_dim"])
    scores[:, ~np.tri(len(at), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(len(at), -1)
