"""What there is to know of a base model without loading it, read from its GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from ..common.errors import ConvertError
from .formats.gguf_header import GGUFHeader, TensorInfo, read_gguf_header, read_gguf_keys
from .hub import parts

_PLAIN = {
    GGMLQuantizationType.F32: "f32", GGMLQuantizationType.F16: "f16", GGMLQuantizationType.BF16: "bf16"
}  # fmt: skip
_PLAIN_FILE_TYPES = {0: "f32", 1: "f16", 32: "bf16"}


def fingerprint(tokens: Iterable[bytes]) -> str:
    """FNV-1a, 64 bits, over every token's bytes followed by one zero byte, as 16 hex digits."""
    h = 0xCBF29CE484222325
    for token in tokens:
        for byte in token:
            h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        h = (h * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF  # the zero byte: xor with 0 changes nothing
    return f"{h:016x}"


@dataclass(frozen=True)
class BaseModel:
    """Facts about the base model. `outtype` is the heads' type that goes with its own matrices."""

    path: Path
    name: str
    architecture: str
    n_embd: int
    n_vocab: int
    fingerprint: str
    outtype: str
    keys: dict[str, Any]  # the scalar keys below `{architecture}.`, without that prefix
    output: (
        TensorInfo | None
    )  # output projection [n_embd, n_vocab]; the token embeddings where they serve as such

    def get(self, key: str) -> Any:
        """Value of `{architecture}.{key}`. Raises ConvertError when the base model lacks it."""
        value = self.keys.get(key)
        if isinstance(value, list):  # one value per layer
            value = value[0] if value and len(set(value)) == 1 else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConvertError(
                f"{self.path}: the base model has no usable key '{self.architecture}.{key}', which a Hydra prefix "
                "layer needs; convert the base model again with a current llama.cpp"
            )
        return value


def _matrix_type(header: GGUFHeader) -> str:
    """The type most of the base model's weights have; a quantised base model gives q8_0."""
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            counts[_PLAIN.get(tensor.type, "q8_0")] += prod(tensor.shape)
    if counts:
        return counts.most_common(1)[0][0]
    return _PLAIN_FILE_TYPES.get(header.keys.get("general.file_type", 1), "q8_0")


def files_of(path: Path) -> list[Path]:
    """All parts of a split GGUF; of another the file itself.

    Raises ConvertError when a part is missing.
    """
    files = [path.with_name(name) for name in parts(path.name)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ConvertError(
            f"{path}: it is split into {len(files)} parts, and {missing.name} is missing; get it too"
        )
    return files


def read_header(path: Path) -> GGUFHeader:
    """Keys of a GGUF, and the tensors of all its parts. Raises ConvertError when it is damaged or not whole."""
    first, *others = files_of(path)
    header = read_gguf_header(first)
    for other in others:
        header.tensors.update(read_gguf_header(other).tensors)
    return header


def read_base(path: Path) -> BaseModel:
    """Read the base model's GGUF file at `path`, the first part of a split one.

    Raises ConvertError when it is missing, damaged, or not a language model with a vocabulary.
    """
    if not path.is_file():
        raise ConvertError(
            f"{path}: there is no such base model file; give the base model's GGUF with --base"
        )
    header = read_header(path)
    keys = header.keys
    arch = keys.get("general.architecture")
    tokens = keys.get("tokenizer.ggml.tokens")
    n_embd = keys.get(f"{arch}.embedding_length")
    mend = "give the GGUF of the language model that the heads were trained for"
    if not isinstance(arch, str):
        raise ConvertError(f"{path}: the key 'general.architecture' is missing, so this is no model; {mend}")
    if "entmtp.format_version" in keys:
        raise ConvertError(f"{path}: this is a heads file, not a base model; {mend}")
    if type(n_embd) is not int or n_embd <= 0:
        raise ConvertError(f"{path}: the key '{arch}.embedding_length' is missing or no number; {mend}")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], bytes):
        raise ConvertError(
            f"{path}: the key 'tokenizer.ggml.tokens' is missing, so it has no vocabulary; {mend}"
        )
    embd = header.tensors.get("token_embd.weight")
    if embd is not None and embd.shape != (n_embd, len(tokens)):
        raise ConvertError(
            f"{path}: 'token_embd.weight' has the shape {list(embd.shape)} in place of {[n_embd, len(tokens)]}, so the "
            "file contradicts itself; convert the base model again with a current llama.cpp"
        )
    output = header.tensors.get("output.weight", embd)
    name = keys.get("general.name")
    return BaseModel(
        path=path,
        name=name if isinstance(name, str) else "",
        architecture=arch,
        n_embd=n_embd,
        n_vocab=len(tokens),
        fingerprint=fingerprint(tokens),
        outtype=_matrix_type(header),
        keys={
            key.removeprefix(f"{arch}."): value for key, value in keys.items() if key.startswith(f"{arch}.")
        },
        output=output if output is not None and output.shape == (n_embd, len(tokens)) else None,
    )


def context_length(model: Path) -> int | None:
    """Tokens that a model was trained to see; None where its file does not say."""
    try:
        keys = read_gguf_keys(model, lambda key: key.endswith(".context_length"), 1)
    except (ConvertError, OSError):
        return None
    value = next(iter(keys.values()), None)
    return value if isinstance(value, int) and value > 0 else None
