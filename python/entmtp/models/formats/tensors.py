"""Tensors inside a checkpoint file: where they lie, and how they are read without loading the file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import ConvertError

CHUNK_ELEMENTS = 1 << 18  # elements converted at a time: 1 MiB of float32

# dtypes that can be converted, as the numpy type that holds their bits
READABLE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(eq=False)
class Storage:
    """A run of bytes in a file that one or more tensors lie in, with the checksum it should have, if known."""

    path: Path
    label: str  # for messages, e.g. "medusa_lm_head.pt"
    offset: int  # bytes
    nbytes: int
    crc32: int | None = None
    verified: bool = False

    def verify(self) -> None:
        """Compare the bytes with the stored CRC-32, once. Raises ConvertError when they differ."""
        if self.verified or self.crc32 is None or self.nbytes == 0:
            return
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        crc = 0
        for start in range(0, self.nbytes, 1 << 20):
            crc = zlib.crc32(data[start : start + (1 << 20)].data, crc)
        if crc != self.crc32:
            raise ConvertError(
                f"{self.label}: the stored checksum does not match the weights at byte {self.offset}, so the file is "
                "damaged; download or copy it again (or save it again with torch.save, checksums on)"
            )
        self.verified = True


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint, not loaded. Shapes are in PyTorch's order, strides and offset in elements."""

    name: str
    dtype: str  # PyTorch's name, e.g. "bfloat16"
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # of element 0 within the storage
    itemsize: int  # bytes
    storage: Storage = field(repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for dim in self.shape:
            n *= dim
        return n

    @property
    def label(self) -> str:
        """The tensor and its file, for messages."""
        return f"tensor '{self.name}' of {self.storage.label}"

    def same_place(self, other: SourceTensor) -> bool:
        """Whether both are the same view of the same bytes."""
        return (
            self.storage is other.storage
            and (self.dtype, self.shape, self.strides, self.offset)
            == (other.dtype, other.shape, other.strides, other.offset)
        )  # fmt: skip

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the values as float32 [n_rows, n_cols], about CHUNK_ELEMENTS at a time; a vector is one row.

        Only this tensor's own bytes are mapped, and only while the iterator lives.
        Raises ConvertError for a dtype that cannot be converted, and for bytes that fail their checksum.
        """
        bits = READABLE.get(self.dtype)
        if bits is None:
            raise ConvertError(
                f"{self.label} is {self.dtype}, and only float32, float16 and bfloat16 can be converted; "
                "cast it with .to(torch.float32) and save the checkpoint again"
            )
        if self.size == 0:
            return
        self.storage.verify()
        span = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        start = self.storage.offset + self.offset * self.itemsize
        mapped = np.asarray(np.memmap(self.storage.path, bits, "r", start, (span,)))
        shape, strides = self.shape, tuple(s * self.itemsize for s in self.strides)
        if len(shape) < 2:
            shape, strides = (1, self.size), (0, *strides) if strides else (0, 0)
        view = np.lib.stride_tricks.as_strided(mapped, shape, strides, writeable=False)
        n_rows = max(1, CHUNK_ELEMENTS // max(1, self.size // shape[0]))
        for row in range(0, shape[0], n_rows):
            part = view[row : row + n_rows]
            if self.dtype == "bfloat16":
                part = (part.astype(np.uint32) << 16).view(np.float32)
            yield part.astype(np.float32, order="C", copy=False).reshape(len(part), -1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor (of a vector: some of its elements), in ascending order; read as a SourceTensor is."""

    source: SourceTensor
    index: np.ndarray  # i8 [n], ascending

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.source.shape[1:])

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.index) * (self.source.size // self.source.shape[0])

    @property
    def label(self) -> str:
        return self.source.label

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the rows as `SourceTensor.chunks` does."""
        vector = len(self.shape) < 2
        first = 0  # row that the chunk starts with
        for chunk in self.source.chunks():
            n = chunk.shape[1] if vector else len(chunk)
            lo, hi = np.searchsorted(self.index, (first, first + n))
            if hi > lo:
                at = self.index[lo:hi] - first
                yield np.ascontiguousarray(chunk[:, at] if vector else chunk[at])
            first += n


def equal(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors hold the same values: their first chunks, then SHA-256, so that one at a time is mapped."""
    if a.shape != b.shape:
        return False
    if a.same_place(b) or a.size == 0:
        return True
    first = (next(a.chunks()), next(b.chunks()))
    return np.array_equal(*first) and _digest(a) == _digest(b)


def _digest(tensor: SourceTensor) -> bytes:
    values = hashlib.sha256()
    for chunk in tensor.chunks():
        values.update(np.ascontiguousarray(chunk) + np.float32(0))  # -0 is 0
    return values.digest()
