"""What the base model thinks of the training text: hidden states and its distributions, in files that are mapped.

Per token, in the order of the texts:
    hidden   f2 [n_embd]  the input of the LM head at this token
    ids      i4 [k]       the k most probable next tokens (of the draft vocabulary, if there is one)
    p        f4 [k + 1]   their probabilities, and the mass of the rest (of the draft vocabulary)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..common.atomic import atomic_path
from ..common.errors import ModelError
from .base import Base
from .text import Texts

SAVE_EVERY = 1 << 15  # tokens


@dataclass(frozen=True)
class Layout:
    """Shape of the cache."""

    n_tokens: int
    n_embd: int
    k: int

    def files(self) -> dict[str, tuple[npt.DTypeLike, int]]:
        """Name: type, numbers per token."""
        return {"hidden": (np.float16, self.n_embd), "ids": (np.int32, self.k), "p": (np.float32, self.k + 1)}

    @property
    def bytes_per_token(self) -> int:
        return sum(np.dtype(dtype).itemsize * width for dtype, width in self.files().values())

    @property
    def n_bytes(self) -> int:
        return self.n_tokens * self.bytes_per_token


@dataclass(frozen=True)
class States:
    """The cache, mapped into memory: pages come and go as the system likes."""

    hidden: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int32]
    p: npt.NDArray[np.float32]


def record(
    base: Base,
    texts: Texts,
    layout: Layout,
    folder: Path,
    draft_vocab: Sequence[int] | None,
    advance: Callable[[int], None],
) -> States:
    """Evaluate the texts, or what an interrupted run left to do.

    Args:
        draft_vocab: base tokens that heads can propose, None for all.
        advance: called with the number of tokens so far.

    Raises:
        ModelError: hidden states that are no numbers, or too large for half precision.
        OSError: the disk is full.
    """
    progress = folder / "states.json"
    done = _read_progress(progress)
    keep = None if draft_vocab is None else torch.tensor(list(draft_vocab))
    starts = texts.starts
    out = {name: os.open(folder / f"states.{name}", os.O_RDWR | os.O_CREAT, 0o666) for name in layout.files()}
    try:
        for fd, (dtype, width) in zip(out.values(), layout.files().values(), strict=True):
            if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in the middle
                os.posix_fallocate(fd, 0, layout.n_tokens * width * np.dtype(dtype).itemsize)

        def save(count: int) -> None:
            for fd in out.values():
                os.fsync(fd)
            with atomic_path(progress) as temporary:
                temporary.write_text(json.dumps({"sequences": count}))

        unsaved = 0
        advance(int(starts[done]))
        for i in range(done, len(texts.lengths)):
            for part, hidden, logits in base.states(texts[i]):
                rows = {"hidden": _half(hidden), **_teacher(logits, layout.k, keep)}
                for name, (dtype, width) in layout.files().items():
                    size = width * np.dtype(dtype).itemsize
                    _write(out[name], rows[name], (int(starts[i]) + part.start) * size)
            unsaved += int(texts.lengths[i])
            if unsaved >= SAVE_EVERY:
                save(i + 1)
                unsaved = 0
                advance(int(starts[i + 1]))
        save(len(texts.lengths))
        advance(layout.n_tokens)
    finally:
        for fd in out.values():
            os.close(fd)
    return open_states(layout, folder)


def open_states(layout: Layout, folder: Path) -> States:
    """Map the cache, which is complete."""
    maps = {
        name: np.memmap(folder / f"states.{name}", dtype, "r", shape=(layout.n_tokens, width))
        for name, (dtype, width) in layout.files().items()
    }
    return States(**maps)


def _read_progress(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["sequences"])
    except FileNotFoundError:
        return 0


def _write(fd: int, rows: npt.NDArray[Any], offset: int) -> None:
    data = memoryview(np.ascontiguousarray(rows).data).cast("B")
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def _half(hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = hidden.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelError(
            "the base model gives hidden states that are no numbers or beyond half precision, so heads cannot be "
            "trained for it"
        )
    return half


def _teacher(
    logits: npt.NDArray[np.float32], k: int, keep: torch.Tensor | None
) -> dict[str, npt.NDArray[Any]]:
    """The k most probable tokens of each row, their probabilities under the whole distribution, and the rest's."""
    p = torch.softmax(torch.from_numpy(logits), 1)
    if keep is not None:
        p = p[:, keep]
    top, ids = torch.topk(p, k, dim=1)
    # not one minus the sum: a small rest would be rounding
    rest = p.scatter_(1, ids, 0.0).sum(1, keepdim=True)
    return {"ids": ids.to(torch.int32).numpy(), "p": torch.cat([top, rest], 1).numpy()}
