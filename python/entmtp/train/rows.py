"""What is kept of every token of a pass, to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..common.errors import ModelError

BLOCK = 64  # logits that are looked through together
AT_ONCE = 8  # rows: a few hundred kB of logits, which stay in the cache


@dataclass(frozen=True)
class Rows:
    """Of n tokens in a row.

    Attributes:
        hidden: the input of the LM head, f2 [n, n_embd].
        ids: the k most probable next tokens, the most probable first, i4 [n, k].
        p: their probabilities and the mass of all others, f4 [n, k + 1].
    """

    hidden: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int32]
    p: npt.NDArray[np.float32]

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.hidden[part], self.ids[part], self.p[part])


def join(rows: Sequence[Rows]) -> Rows:
    """One after the other."""
    return Rows(*(np.concatenate([getattr(r, name) for r in rows]) for name in ("hidden", "ids", "p")))


def rows_of(hidden: npt.NDArray[np.float32], logits: npt.NDArray[np.float32], k: int) -> Rows:
    """The rows of a pass: hidden states [n, n_embd] and logits [n, n_vocab].

    Raises:
        ModelError: hidden states that are no numbers, or too large for half precision.
    """
    with np.errstate(over="ignore"):
        half = hidden.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelError(
            "the base model gives hidden states that are no numbers or beyond half precision, so heads cannot be "
            "trained for it"
        )
    n, n_vocab = logits.shape
    ids, p = np.empty((n, k), np.int32), np.empty((n, k + 1), np.float32)
    n_blocks = -(-n_vocab // BLOCK)
    padded = np.empty((min(n, AT_ONCE), n_blocks * BLOCK), np.float32)
    for begin in range(0, n, AT_ONCE):
        part = slice(begin, min(begin + AT_ONCE, n))
        z = padded[: part.stop - begin]
        z[:, :n_vocab], z[:, n_vocab:] = logits[part], -np.inf
        ids[part], p[part] = _most_probable(z, n_vocab, k)
    return Rows(half, ids, p)


def _most_probable(
    z: npt.NDArray[np.float32], n_vocab: int, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The k largest of each row, and their shares and the rest's after a softmax; `z` is overwritten.

    They are in the k blocks with the largest maxima.
    """
    n = len(z)
    if z.shape[1] // BLOCK > k:
        maxima = z.reshape(n, -1, BLOCK).max(2)
        blocks = np.argpartition(-maxima, k - 1, axis=1)[:, :k]
        places = (blocks[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(n, -1)
    else:
        places = np.broadcast_to(np.arange(n_vocab), (n, n_vocab))
    found = np.take_along_axis(z, places, 1)
    best = np.argpartition(-found, min(k, found.shape[1] - 1), axis=1)[:, :k]
    ids = np.sort(np.take_along_axis(places, best, 1), axis=1)  # of equal ones the lowest id is first
    order = np.argsort(-np.take_along_axis(z, ids, 1), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    z -= np.take_along_axis(z, ids[:, :1], 1)
    np.exp(z, out=z)
    top = np.take_along_axis(z, ids, 1)
    np.put_along_axis(z, ids, 0.0, 1)
    rest = z.sum(1, keepdims=True)  # not one minus the others: a small rest would be rounding
    parts = np.concatenate([top, rest], 1)
    return ids, parts / parts.sum(1, keepdims=True)
