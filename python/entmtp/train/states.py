"""The training text and what the base model thinks of it, in files that grow as text is written, and are mapped.

Per token, in the order of the texts:
    hidden   f2 [n_embd]  the input of the LM head at this token
    ids      i4 [k]       the k most probable next tokens
    p        f4 [k + 1]   their probabilities, and the mass of the rest
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.atomic import atomic_path
from .writing import Written

VERSION = 2  # of the files


@dataclass(frozen=True)
class Texts:
    """Sequences one after the other.

    Attributes:
        tokens: i4 [n]
        lengths: tokens of each sequence, [n_seqs].
        given: how many of them are not the model's answer, [n_seqs].
        held_out: not trained on, [n_seqs].
        temps: that the model wrote at, NaN where it did not, f4 [n_seqs].
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    temps: npt.NDArray[np.float32]

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def __getitem__(self, i: int) -> npt.NDArray[np.int32]:
        start = int(self.starts[i])
        return self.tokens[start : start + int(self.lengths[i])]


@dataclass(frozen=True)
class Layout:
    """Shape of the files."""

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
    """The files, mapped into memory: pages come and go as the system likes."""

    hidden: npt.NDArray[np.float16]
    ids: npt.NDArray[np.int32]
    p: npt.NDArray[np.float32]


def mapped(folder: Path, layout: Layout, n_tokens: int) -> States:
    """The files' first so many rows."""
    maps: dict[str, Any] = {
        name: np.memmap(folder / f"states.{name}", dtype, "r", shape=(n_tokens, width))
        for name, (dtype, width) in layout.files().items()
    }
    return States(**maps)


def _shards(folder: Path) -> tuple[list[Texts], int]:
    """The texts on disk, and the index of the first job that none of them tells of."""
    found, upcoming = [], 0
    for path in sorted(folder.glob("text-*.npz")):
        with np.load(path, allow_pickle=False) as a:
            found.append(Texts(*(a[f.name] for f in fields(Texts))))
            upcoming = int(a["next"])
    return found, upcoming


def _joined(shards: list[Texts]) -> Texts:
    return Texts(*(np.concatenate([getattr(t, f.name) for t in shards]) for f in fields(Texts)))


def read_texts(folder: Path) -> Texts:
    """All texts that were saved in a folder, which may be none."""
    none = Texts(*(np.empty(0, kind) for kind in ("i4", "i8", "i8", "?", "f4")))
    return _joined([none, *_shards(folder)[0]])


class Store:
    """Sequences on disk: files of rows, and shards that say which tokens they are of.

    What a shard tells of is there; rows behind the last shard are what a killed run left, and are written over.

    Args:
        folder: where the files are, or will be.
        layout: n_tokens: room for so many is taken at once, so that a full disk is found now, not in the middle.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self.shards, self.upcoming = _shards(folder)
        self.n_tokens = sum(len(t.tokens) for t in self.shards)
        self._unsaved: list[Written] = []
        self._files: dict[str, int] = {}
        for name, (dtype, width) in layout.files().items():
            self._files[name] = fd = os.open(folder / f"states.{name}", os.O_RDWR | os.O_CREAT, 0o666)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, layout.n_tokens * width * np.dtype(dtype).itemsize)

    def add(self, sequence: Written) -> None:
        for name, fd in self._files.items():
            rows = getattr(sequence.rows, name)
            _write(fd, rows, self.n_tokens * rows.itemsize * rows.shape[1])
        self._unsaved.append(sequence)
        self.n_tokens += len(sequence.tokens)

    def save(self, upcoming: int) -> None:
        """Keep what was added; the first job after it is `upcoming`."""
        if not self._unsaved:
            return
        for fd in self._files.values():
            os.fsync(fd)
        new = self._unsaved
        texts = Texts(
            np.concatenate([np.array(s.tokens, dtype=np.int32) for s in new]),
            np.array([len(s.tokens) for s in new], dtype=np.int64),
            np.array([s.n_given for s in new], dtype=np.int64),
            np.array([s.job.held_out for s in new], dtype=bool),
            np.array([np.nan if s.job.temp is None else s.job.temp for s in new], dtype=np.float32),
        )
        path = self.folder / f"text-{len(self.shards):05}.npz"
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **texts.__dict__, next=np.array(upcoming))
        self.shards.append(texts)
        self._unsaved = []

    def opened(self) -> tuple[Texts, States]:
        """All that was saved."""
        texts = _joined(self.shards)
        return texts, mapped(self.folder, self.layout, len(texts.tokens))

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files = {}


def _write(fd: int, rows: npt.NDArray[Any], offset: int) -> None:
    data = memoryview(np.ascontiguousarray(rows).data).cast("B")
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
