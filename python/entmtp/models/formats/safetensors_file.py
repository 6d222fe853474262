"""Read the tensors of a safetensors file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...common.errors import ConvertError
from .tensors import SourceTensor, Storage

# dtype in the file: PyTorch's name, bytes per element
DTYPES = {
    "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F64": ("float64", 8),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}  # fmt: skip


def read_safetensors_file(path: Path) -> dict[str, SourceTensor]:
    """Return the tensors of a safetensors file, by name, not loaded.

    The safetensors library opens the file and so checks the header, the shapes and that the offsets cover the file
    exactly. (It cannot hand bfloat16 to numpy, so the bytes are then read at the offsets that it has checked.)
    Names that the file's metadata gives as copies of a stored tensor, as `safetensors.torch.save_model` writes
    them for shared weights, are returned too. Raises ConvertError when the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as f:
            names, metadata = list(f.keys()), f.metadata() or {}
    except SafetensorError as e:
        raise ConvertError(
            f"{path.name}: not a whole safetensors file ({e}); download or copy it again"
        ) from e
    with open(path, "rb") as f:
        (n_header,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n_header))
    tensors: dict[str, SourceTensor] = {}
    for name in names:
        info = header[name]
        dtype, itemsize = DTYPES.get(info["dtype"], (info["dtype"], 1))
        start, end = info["data_offsets"]
        shape = tuple(info["shape"])
        strides, step = [], 1
        for dim in reversed(shape):
            strides.append(step)
            step *= dim
        storage = Storage(path, path.name, 8 + n_header + start, end - start)
        tensors[name] = SourceTensor(name, dtype, shape, tuple(reversed(strides)), 0, itemsize, storage)
    for name, kept in metadata.items():
        if name not in tensors and kept in tensors:
            tensors[name] = tensors[kept]
    return tensors
