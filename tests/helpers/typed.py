"""The demo base with all its matrices in one type of ggml, whichever: by ggml's own quantiser, block for block."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

from entmtp.models.assets import assets
from entmtp.native import library

DEMO = assets() / "demo-base-q8_0.gguf"

# every type that a GGUF's matrices may have
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
    "Q1_0",
)  # fmt: skip


def quantise(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes of rows of floats [.., k]; what each weight counts is the same (an importance matrix of ones)."""
    ggml = ctypes.CDLL(str(library.library_path("ggml-base", library.prepare())))
    ggml.ggml_quantize_chunk.restype = c_size_t
    ggml.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    block, size = GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, k = int(np.prod(rows.shape[:-1])), rows.shape[-1]
    out = np.empty((*rows.shape[:-1], k // block * size), np.uint8)
    ones = np.ones(k, np.float32)
    n = ggml.ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, n_rows, k, ones.ctypes.data)
    assert n == out.nbytes
    return out


def write_typed(path: Path, name: str, per_file: int = 0) -> Path:
    """The demo base with the matrices of its products in a type; embeddings, which are looked up, stay f16.

    With `per_file` it is split into files of as many tensors, and the first is returned.
    """
    kind = GGMLQuantizationType[name]
    reader = GGUFReader(DEMO)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents(), split_max_tensors=per_file)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=of)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        elif tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, values.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, quantise(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}*{path.suffix}")) if per_file else path
