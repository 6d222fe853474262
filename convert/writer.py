"""Write a heads file, one chunk of one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants

from .base import BaseModel
from .errors import ConvertError
from .layout import Heads
from .tensors import SourceTensor

FORMAT_VERSION = 1

# --outtype: ggml type of the matrices, llama.cpp's number of the file type
OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

# largest absolute value each type can hold: a quantised block stores max/127 or max/8 as float16
_LIMITS = {
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.38e38,
    GGMLQuantizationType.Q8_0: 65504.0 * 127,
    GGMLQuantizationType.Q4_0: 65504.0 * 8,
}


@dataclass(frozen=True)
class Origin:
    """Where the heads come from, as far as known."""

    name: str
    license: str | None
    url: str | None


@contextmanager
def replacing(outfile: Path) -> Iterator[Path]:
    """Give a temporary path beside `outfile`, and move it there when the block succeeds; else remove it."""
    temporary = outfile.with_name(f".{outfile.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, outfile)
    finally:
        temporary.unlink(missing_ok=True)


def matrix_type(shape: tuple[int, ...], outtype: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type a tensor of this shape (PyTorch's order) is stored in: vectors f32, rows that do not fit blocks f16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return outtype if shape[-1] % GGML_QUANT_SIZES[outtype][0] == 0 else GGMLQuantizationType.F16


def _encode(chunk: np.ndarray, kind: GGMLQuantizationType, source: SourceTensor) -> np.ndarray:
    """float32 [n_rows, n_cols] in the ggml type `kind`. Raises ConvertError for values it cannot hold."""
    peak = float(max(chunk.max(), -chunk.min()))  # nan if any value is
    if not np.isfinite(peak):
        raise ConvertError(
            f"{source.label} holds NaN or infinite values; its training failed or the file is damaged, so get another "
            "checkpoint"
        )
    if peak > _LIMITS.get(kind, np.inf):
        raise ConvertError(
            f"{source.label} holds the value {peak:g}, too large for {kind.name.lower()}; convert with --outtype f32"
        )
    return quants.quantize(chunk, kind)


def write_heads(
    outfile: Path,
    heads: Heads,
    origin: Origin,
    base: BaseModel,
    outtype: str,
    advance: Callable[[str, int], None] = lambda name, n_elements: None,
) -> None:
    """Write `heads` to `outfile`, which appears (or is replaced) only when the file is complete.

    `outtype` is a key of OUTTYPES. `advance(name, n)` is called after each n elements of a tensor are written.
    Raises ConvertError for weights that cannot be stored, OSError when the file cannot be written.
    """
    kind, file_type = OUTTYPES[outtype]
    with replacing(outfile) as temporary:
        writer = GGUFWriter(temporary, heads.arch)
        try:
            _add_keys(writer, heads, origin, base, int(file_type))
            for name, source in heads.tensors:
                stored = matrix_type(source.shape, kind)
                writer.add_tensor_info(
                    name, source.shape, np.dtype(np.float32), _nbytes(source.shape, stored), stored
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            out = writer.fout[0]
            writer.write_padding(out, out.tell())
            for name, source in heads.tensors:
                for chunk in source.chunks():
                    out.write(_encode(chunk, matrix_type(source.shape, kind), source).data)
                    advance(name, chunk.size)
                writer.write_padding(out, out.tell())
            out.flush()
            os.fsync(out.fileno())
        finally:
            writer.close()


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes


def _add_keys(writer: GGUFWriter, heads: Heads, origin: Origin, base: BaseModel, file_type: int) -> None:
    def string(key: str, value: str) -> None:  # GGUFWriter.add_string drops empty strings
        writer.add_key_value(key, value, GGUFValueType.STRING)

    writer.add_name(origin.name)
    if origin.license:
        writer.add_license(origin.license)
    if origin.url:
        writer.add_source_url(origin.url)
    writer.add_file_type(file_type)
    writer.add_uint32("entmtp.format_version", FORMAT_VERSION)
    string("entmtp.base.name", base.name)
    string("entmtp.base.architecture", base.architecture)
    string("entmtp.tokenizer.fingerprint", base.fingerprint)
    arch = heads.arch
    writer.add_uint32(f"{arch}.embedding_length", base.n_embd)
    writer.add_uint32(f"{arch}.vocab_size", base.n_vocab)
    writer.add_uint32(f"{arch}.predict_heads", heads.n_heads)
    writer.add_uint32(f"{arch}.block_count", heads.n_blocks)
    if arch == "hydra":
        writer.add_bool("hydra.grounded", heads.grounded)
        writer.add_bool("hydra.prefix_layer", heads.prefix is not None)
    if heads.prefix:
        writer.add_uint32("hydra.attention.head_count", heads.prefix.n_head)
        writer.add_uint32("hydra.attention.head_count_kv", heads.prefix.n_head_kv)
        writer.add_float32("hydra.attention.layer_norm_rms_epsilon", heads.prefix.rms_eps)
        writer.add_float32("hydra.rope.freq_base", heads.prefix.rope_base)
        writer.add_uint32("hydra.feed_forward_length", heads.prefix.n_ff)
