"""Weights of the acceptance model (native/src/acceptance.cpp): how probable a proposal is, by who made it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.fields import Fields

DRAFTERS = ("text", "recycling", "heads", "model")  # enum entmtp_source, in its order
# ENTMTP_N_INPUTS, as native/include/entmtp.h describes them
INPUTS = (
    "1", "match length", "share of places", "rank of match", "row: ln p", "row: ln(1 - p)", "logit of heads",
    "running entropy", "depth", "hits of text", "hits of recycling", "hits of heads", "model: ln p",
    "model: ln(1 - p)", "hits of model",
)  # fmt: skip
# sets of drafters that may agree on a proposal, by their bits: "text", "recycling", "text+recycling", ...
SETS = tuple(
    "+".join(name for i, name in enumerate(DRAFTERS) if bits >> i & 1) for bits in range(1 << len(DRAFTERS))
)
N_SETS, N_INPUTS = len(SETS), len(INPUTS)
MOST = 100.0  # absolute value of a weight, at most

Weights = tuple[tuple[float, ...], ...]  # [N_SETS][N_INPUTS]


def of_array(weights: npt.NDArray[Any]) -> Weights:
    """The same as a value, rounded as a file holds it."""
    return tuple(tuple(round(float(x), 4) for x in row) for row in weights)


def to_json(weights: Weights) -> dict[str, list[float]]:
    """By set; the one without drafters has no meaning."""
    return {name: list(row) for name, row in zip(SETS[1:], weights[1:], strict=True)}


def from_json(data: Any, label: str) -> Weights:
    """Weights from parsed JSON.

    Raises:
        BankError: names the field that is wrong.
    """
    f = Fields(data, label, "acceptance model in bank")
    f.only(set(SETS[1:]))
    empty = (0.0,) * N_INPUTS
    rows = [f.numbers(name, f.data.get(name), -MOST, MOST, n=N_INPUTS) for name in SETS[1:]]
    return (empty, *rows)


def as_array(weights: Weights) -> npt.NDArray[np.float32]:
    """[N_SETS, N_INPUTS]"""
    return np.array(weights, dtype=np.float32)
