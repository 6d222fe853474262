"""Rank traces that are made here, without a model."""

from __future__ import annotations

import numpy as np

from entmtp.bank.traces import MAX_RANK, Traces


def make_traces(ranks: np.ndarray, lengths: list[int], entropy: np.ndarray | None = None) -> Traces:
    """Traces of given ranks; the heads' probabilities fall with the rank."""
    n, h = ranks.shape
    signals = np.zeros((n, 3), dtype=np.float32)
    signals[:, 0] = 1.0 if entropy is None else entropy
    signals[:, 1], signals[:, 2] = 0.5, -0.7
    log_p = np.tile(
        np.log(np.array([0.4, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01], dtype=np.float32)), (n, h, 1)
    )
    return Traces(
        np.array(lengths, dtype=np.int32), ("t",) * len(lengths), tuple(range(len(lengths))), signals,
        np.ascontiguousarray(ranks, dtype=np.int32), np.ascontiguousarray(log_p), False,
    )  # fmt: skip


def random_ranks(seed: int, lengths: list[int], n_heads: int, p: float = 0.5) -> np.ndarray:
    """Ranks in texts of such lengths, of heads that are right with probability p, second with p of the rest, ..."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.geometric(p, (sum(lengths), n_heads)) - 1, MAX_RANK)
    at = 0
    for n in lengths:
        for i in range(n):
            ranks[at + i, max(n - 1 - i, 0) :] = -1
        at += n
    return ranks.astype(np.int32)
