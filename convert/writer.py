"""Write a heads file, one chunk of one tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from entmtp.common.atomic import atomic_path
from entmtp.common.errors import ConvertError
from entmtp.convert.layout import Heads
from entmtp.convert.quantise import quantise
from entmtp.models.base import BaseModel
from entmtp.models.formats.tensors import Rows, SourceTensor

FORMAT_VERSION = 1

# --outtype: ggml type of the matrices, llama.cpp's number of the file type
OUTTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q6_k": (GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k": (GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}

# what takes the place of a type whose blocks of 256 do not divide a row; where blocks of 32 do not, f16 does
_SMALLER_BLOCKS = {
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q4_0,
}

# largest absolute value each type can hold: a quantised block stores max/127 or max/8 as float16, a block of 256 stores
# its largest scale, max/15 or max/31, divided by 63, or max/32 divided by 127
_LIMITS = {
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.38e38,
    GGMLQuantizationType.Q8_0: 65504.0 * 127,
    GGMLQuantizationType.Q4_0: 65504.0 * 8,
    GGMLQuantizationType.Q6_K: 65504.0 * 127 * 32,
    GGMLQuantizationType.Q5_K: 65504.0 * 63 * 31,
    GGMLQuantizationType.Q4_K: 65504.0 * 63 * 15,
}

Value = str | int | float


@dataclass(frozen=True)
class Origin:
    """Where the heads come from, as far as known."""

    name: str
    license: str | None
    url: str | None


def matrix_type(shape: tuple[int, ...], outtype: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type a tensor of this shape (PyTorch's order) is stored in: vectors f32, rows that do not fit blocks another."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    for kind in (outtype, _SMALLER_BLOCKS.get(outtype, outtype)):
        if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return GGMLQuantizationType.F16


def other_types(heads: Heads, outtype: str) -> str | None:
    """A sentence about matrices that `outtype` cannot hold, or None."""
    kind = OUTTYPES[outtype][0]
    stored = {
        name: matrix_type(source.shape, kind) for name, source in heads.tensors if len(source.shape) > 1
    }
    other = sorted({t.name.lower() for t in stored.values() if t != kind})
    if not other:
        return None
    n, block = sum(t != kind for t in stored.values()), GGML_QUANT_SIZES[kind][0]
    return (
        f"{n} of {len(stored)} matrices have rows that are no multiple of {block} long and are stored as "
        f"{' and '.join(other)}"
    )


def _encode(chunk: np.ndarray, kind: GGMLQuantizationType, source: SourceTensor | Rows) -> np.ndarray:
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
    return quantise(chunk, kind)


def write_heads(
    outfile: Path,
    heads: Heads,
    origin: Origin,
    base: BaseModel,
    outtype: str,
    advance: Callable[[str, int], None] = lambda name, n_elements: None,
    provenance: Mapping[str, Value] | None = None,
) -> None:
    """Write `heads` to `outfile`, which appears (or is replaced) only when the file is complete.

    `outtype` is a key of OUTTYPES. `advance(name, n)` is called after each n elements of a tensor are written.
    `provenance` becomes the keys `entmtp.train.<name>`. Heads with a draft vocabulary or without projections of their
    own: `entmtp.convert.cheap.cheapen`.
    Raises ConvertError for weights that cannot be stored, OSError when the file cannot be written.
    """
    kind, file_type = OUTTYPES[outtype]
    with atomic_path(outfile) as temporary:
        writer = GGUFWriter(temporary, heads.arch)
        try:
            _add_keys(writer, heads, origin, base, int(file_type))
            add_provenance(writer, provenance or {})
            if heads.draft_vocab is not None:
                shape = heads.draft_vocab.shape
                writer.add_tensor_info("d2t", shape, np.dtype(np.int64), heads.draft_vocab.nbytes)
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
            if heads.draft_vocab is not None:
                out.write(heads.draft_vocab.astype("<i8").data)
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
    if heads.shared_output:
        writer.add_bool(f"{arch}.shared_output", True)
    if arch == "hydra":
        writer.add_bool("hydra.grounded", heads.grounded)
        writer.add_bool("hydra.prefix_layer", heads.prefix is not None)
    if heads.prefix:
        writer.add_uint32("hydra.attention.head_count", heads.prefix.n_head)
        writer.add_uint32("hydra.attention.head_count_kv", heads.prefix.n_head_kv)
        writer.add_float32("hydra.attention.layer_norm_rms_epsilon", heads.prefix.rms_eps)
        writer.add_float32("hydra.rope.freq_base", heads.prefix.rope_base)
        writer.add_uint32("hydra.feed_forward_length", heads.prefix.n_ff)


def add_provenance(writer: GGUFWriter, provenance: Mapping[str, Value]) -> None:
    """Keys `entmtp.train.<name>`."""
    for name, value in provenance.items():
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name):
            raise ConvertError(
                f"provenance: the name {name!r} cannot be a key; use lower case letters, digits, _ and ."
            )
        key = f"entmtp.train.{name}"
        if isinstance(value, bool):
            writer.add_key_value(key, value, GGUFValueType.BOOL)
        elif isinstance(value, str):
            writer.add_key_value(key, value, GGUFValueType.STRING)
        elif isinstance(value, int):
            writer.add_key_value(key, value, GGUFValueType.INT64)
        elif isinstance(value, float):
            writer.add_key_value(key, value, GGUFValueType.FLOAT64)
        else:
            raise ConvertError(f"provenance: {name} is a {type(value).__name__}; give text or a number")
