"""Read the header of a GGUF file: keys and tensor descriptions, every length checked against the file's size.

(`gguf.GGUFReader` trusts the counts in the file and so can loop for hours on a damaged one; and it keeps several numpy
objects per vocabulary entry, which takes half a gigabyte and many times as long for a vocabulary of 128k.)
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ...common.errors import ConvertError

_T = TypeVar("_T")

_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d", GGUFValueType.BOOL: "<?",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file; the shape is in ggml's order (fastest dimension first), the offset from file start."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path  # the file, which of a split GGUF may be any part


@dataclass(frozen=True)
class GGUFHeader:
    """Keys and tensors of a GGUF file. String arrays are lists of bytes, as stored; other strings are str."""

    path: Path
    keys: dict[str, Any]
    types: dict[str, GGUFValueType]
    tensors: dict[str, TensorInfo]


class _Cursor:
    def __init__(self, data: mmap.mmap):
        self.data, self.pos, self.end = data, 0, len(data)

    def take(self, n: int) -> bytes:
        if n > self.end - self.pos:
            raise ValueError("it ends inside the header")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def scalar(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def string(self) -> bytes:
        return self.take(self.scalar("<Q"))

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string().decode("utf-8", "replace")
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = GGUFValueType(self.scalar("<I")), self.scalar("<Q")
        if item == GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        width = struct.calcsize(_SCALARS[item])
        return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", self.take(count * width)))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read keys and tensor descriptions of the GGUF file at `path`. Raises ConvertError when it is damaged."""
    return _read(path, _parse)


def read_gguf_keys(path: Path, wanted: Callable[[str], bool], n: int) -> dict[str, Any]:
    """The first `n` keys that are `wanted`, in little time where they come before the vocabulary, as most do.

    Raises ConvertError when the file is damaged.
    """

    def parse(path: Path, cursor: _Cursor) -> dict[str, Any]:
        cursor.pos = 16
        found: dict[str, Any] = {}
        for _ in range(cursor.scalar("<Q")):
            key, kind = cursor.string().decode("utf-8", "replace"), GGUFValueType(cursor.scalar("<I"))
            value = cursor.value(kind)
            if wanted(key):
                found[key] = value
            if len(found) == n:
                break
        return found

    return _read(path, parse)


def _read(path: Path, parse: Callable[[Path, _Cursor], _T]) -> _T:
    with open(path, "rb") as f:
        start = f.read(8)
        if len(start) < 8 or start[:4] != b"GGUF":
            raise ConvertError(f"{path}: not a GGUF file; give a model in llama.cpp's GGUF format")
        (version,) = struct.unpack("<I", start[4:])
        if version not in (2, 3):
            raise ConvertError(
                f"{path}: GGUF version {version} is not supported (2 and 3 are, little-endian); convert the model "
                "again with a current llama.cpp"
            )
        try:
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse(path, _Cursor(data))
        except (ValueError, KeyError, OverflowError) as e:
            raise ConvertError(
                f"{path}: the GGUF file is truncated or damaged ({e}); download it again"
            ) from e


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
    cursor.pos = 8
    n_tensors, n_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    keys: dict[str, Any] = {}
    types: dict[str, GGUFValueType] = {}
    for _ in range(n_keys):
        key, kind = cursor.string().decode("utf-8", "replace"), GGUFValueType(cursor.scalar("<I"))
        if key in keys:
            raise ValueError(f"key {key!r} comes twice")
        keys[key], types[key] = cursor.value(kind), kind
    infos = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string().decode("utf-8", "replace"), cursor.scalar("<I")
        if n_dims > 4:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(n_dims))
        infos.append((name, shape, GGMLQuantizationType(cursor.scalar("<I")), cursor.scalar("<Q")))
    align = keys.get("general.alignment", 32)
    if type(align) is not int or align <= 0 or align & (align - 1):
        raise ValueError("its alignment is no power of two")
    data_start = -(-cursor.pos // align) * align
    tensors: dict[str, TensorInfo] = {}
    for name, shape, dtype, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[dtype]
        nbytes = math.prod(shape) // block * block_bytes
        if name in tensors:
            raise ValueError(f"tensor {name!r} comes twice")
        if (shape and shape[0] % block) or data_start + offset + nbytes > cursor.end:
            raise ValueError(f"tensor {name!r} reaches beyond the end of the file or breaks its blocks")
        tensors[name] = TensorInfo(name, dtype, shape, data_start + offset, nbytes, path)
    return GGUFHeader(path, keys, types, tensors)
