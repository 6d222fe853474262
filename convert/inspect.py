"""Check a heads file against the format (docs/heads-gguf.md) and print it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from rich.console import Console
from rich.table import Table
from rich.text import Text

from entmtp.common.errors import ConvertError
from entmtp.common.streams import printable
from entmtp.convert.writer import FORMAT_VERSION, OUTTYPES, matrix_type
from entmtp.models.formats.gguf_header import GGUFHeader, TensorInfo, read_gguf_header

_U32, _F32, _STR, _BOOL = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.STRING,
    GGUFValueType.BOOL,
)
_KEYS = {
    "general.file_type": _U32,
    "entmtp.format_version": _U32,
    "entmtp.base.name": _STR,
    "entmtp.base.architecture": _STR,
    "entmtp.tokenizer.fingerprint": _STR,
}
_ARCH_KEYS = {"embedding_length": _U32, "vocab_size": _U32, "predict_heads": _U32, "block_count": _U32}
_HYDRA_KEYS = {"hydra.grounded": _BOOL, "hydra.prefix_layer": _BOOL}
_PREFIX_KEYS = {
    "hydra.attention.head_count": _U32,
    "hydra.attention.head_count_kv": _U32,
    "hydra.attention.layer_norm_rms_epsilon": _F32,
    "hydra.rope.freq_base": _F32,
    "hydra.feed_forward_length": _U32,
}
_FILE_TYPES = {int(file_type): kind for kind, file_type in OUTTYPES.values()}


@dataclass(frozen=True)
class HeadsFile:
    """A heads file that follows the format: its keys, its tensors, and the parameters of each head."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]
    parameters: dict[str, int]  # "head.0" ..., and "prefix" and "output", where there is one


class _Checker:
    def __init__(self, header: GGUFHeader):
        self.path, self.keys, self.types = header.path, header.keys, header.types
        self.left = dict(header.tensors)  # tensors not yet accounted for
        self.matrix = _FILE_TYPES.get(header.keys.get("general.file_type", -1))

    def fail(self, what: str) -> ConvertError:
        return ConvertError(f"{self.path}: {what}; convert the checkpoint again")

    def need(self, keys: dict[str, GGUFValueType]) -> None:
        for key, kind in keys.items():
            if self.types.get(key) != kind:
                raise self.fail(f"the key '{key}' ({kind.name}) is missing or of another type")

    def tensor(self, name: str, *shape: int, optional: bool = False) -> None:
        info = self.left.pop(name, None)
        if info is None:
            if optional:
                return
            raise self.fail(f"the tensor '{name}' is missing")
        if info.shape != shape:
            raise self.fail(f"the tensor '{name}' has the shape {list(info.shape)} in place of {list(shape)}")
        kind = info.type
        if len(shape) == 1:
            expected = GGMLQuantizationType.F32
        elif self.matrix is None:
            return
        else:
            expected = matrix_type(shape[::-1], self.matrix)
        if kind != expected:
            raise self.fail(f"the tensor '{name}' is {kind.name} in place of {expected.name}")

    def check(self) -> None:
        arch = self.keys.get("general.architecture")
        if arch not in ("medusa", "hydra") or "entmtp.format_version" not in self.keys:
            raise ConvertError(
                f"{self.path}: this is no heads file (general.architecture is {arch!r}); heads files are written by "
                "entmtp convert"
            )
        version = self.keys["entmtp.format_version"]
        if version != FORMAT_VERSION:
            raise ConvertError(
                f"{self.path}: the heads file has format version {version} and this program knows {FORMAT_VERSION}; "
                "update EntMTP or convert the checkpoint again"
            )
        self.need({**_KEYS, **{f"{arch}.{key}": kind for key, kind in _ARCH_KEYS.items()}})
        if not re.fullmatch("[0-9a-f]{16}", self.keys["entmtp.tokenizer.fingerprint"]):
            raise self.fail("the tokenizer fingerprint is not 16 hex digits")
        n_embd, n_vocab, n_heads, n_blocks = (self.keys[f"{arch}.{key}"] for key in _ARCH_KEYS)
        grounded = prefix = False
        if arch == "hydra":
            self.need(_HYDRA_KEYS)
            grounded, prefix = self.keys["hydra.grounded"], self.keys["hydra.prefix_layer"]
        if min(n_embd, n_vocab, n_heads) == 0 or n_heads > len(self.left) or n_blocks > 1000:
            raise self.fail(
                f"{n_heads} heads of {n_blocks} blocks, width {n_embd} and {n_vocab} tokens cannot be"
            )
        n_draft = self.draft_vocab(n_vocab)
        shared = self.keys.get(f"{arch}.shared_output", False)
        if not isinstance(shared, bool):
            raise self.fail(f"the key '{arch}.shared_output' is neither true nor false")
        if not shared and "output.weight" in self.left:  # one for all heads
            self.tensor("output.weight", n_embd, n_draft)
            shared = True
        for i in range(n_heads):
            self.head(i, n_embd, n_draft, n_blocks, grounded, shared)
        if prefix:
            self.prefix_layer(n_embd)
        if self.left:
            raise self.fail(f"the tensor '{next(iter(self.left))}' is not part of the format")

    def draft_vocab(self, n_vocab: int) -> int:
        """Number of draft tokens; their map, if there is one, is checked."""
        info = self.left.pop("d2t", None)
        if info is None:
            return n_vocab
        if info.type != GGMLQuantizationType.I64 or len(info.shape) != 1 or not 0 < info.shape[0] <= n_vocab:
            raise self.fail(f"the draft vocabulary 'd2t' is not a list of 1 to {n_vocab} tokens")
        tokens = np.fromfile(self.path, "<i8", info.shape[0], offset=info.offset)
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            raise self.fail("the draft vocabulary 'd2t' names tokens that the base model lacks")
        if len(np.unique(tokens)) < len(tokens):
            raise self.fail("the draft vocabulary 'd2t' names a token twice")
        return info.shape[0]

    def head(self, i: int, n_embd: int, n_draft: int, n_blocks: int, grounded: bool, shared: bool) -> None:
        stored = [j for j in range(n_blocks) if j == 0 or f"head.{i}.blk.{j}.weight" in self.left]
        for j in stored:
            wide = grounded and j == 0
            for part in ("", "res.") if wide else ("",):
                self.tensor(f"head.{i}.blk.{j}.{part}weight", n_embd * (i + 2) if wide else n_embd, n_embd)
                self.tensor(f"head.{i}.blk.{j}.{part}bias", n_embd)
        if grounded and n_blocks > 1 and 1 not in stored:
            raise self.fail(
                f"the tensor 'head.{i}.blk.1.weight' is missing (block 0 of a grounded head is wider)"
            )
        if not shared:
            self.tensor(f"head.{i}.output.weight", n_embd, n_draft)
        self.tensor(f"head.{i}.output.bias", n_draft, optional=True)

    def prefix_layer(self, n_embd: int) -> None:
        self.need(_PREFIX_KEYS)
        n_head, n_kv, eps, rope, n_ff = (self.keys[key] for key in _PREFIX_KEYS)
        if min(n_head, n_kv, n_ff) == 0 or n_embd % n_head or n_head % n_kv or not eps > 0 or not rope > 1:
            raise self.fail("the prefix layer's numbers (heads, epsilon, RoPE base) cannot be")
        width = n_embd // n_head * n_kv
        for name, *shape in (
            ("attn_norm", n_embd), ("attn_q", n_embd, n_embd), ("attn_k", n_embd, width), ("attn_v", n_embd, width),
            ("attn_output", n_embd, n_embd), ("ffn_norm", n_embd), ("ffn_gate", n_embd, n_ff),
            ("ffn_up", n_embd, n_ff), ("ffn_down", n_ff, n_embd), ("output_norm", n_embd),
        ):  # fmt: skip
            self.tensor(f"prefix.{name}.weight", *shape)


def inspect_heads(path: str | os.PathLike[str]) -> HeadsFile:
    """Read a heads file and check it against the format. Raises ConvertError when it breaks it."""
    path = Path(path)
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "there is no such file"
        raise ConvertError(f"{path}: {what}; give a heads file written by entmtp convert")
    header = read_gguf_header(path)
    _Checker(header).check()
    parameters: dict[str, int] = {}
    for name, info in header.tensors.items():
        if name != "d2t":
            first, second = name.split(".")[:2]
            owner = f"{first}.{second}" if first == "head" else first
            parameters[owner] = parameters.get(owner, 0) + prod(info.shape)
    return HeadsFile(path, header.keys, header.tensors, parameters)


def projections(heads: HeadsFile) -> str:
    """What the heads can draft, and through which projection, in a sentence."""
    arch = heads.keys["general.architecture"]
    n_vocab = heads.keys[f"{arch}.vocab_size"]
    n_draft = heads.tensors["d2t"].shape[0] if "d2t" in heads.tensors else n_vocab
    drafted = f"all {n_vocab:,} tokens" if n_draft == n_vocab else f"{n_draft:,} of {n_vocab:,} tokens"
    owner = "projections of their own"
    if heads.keys.get(f"{arch}.shared_output"):
        owner = "the base model's projection"
    elif "output.weight" in heads.tensors:
        owner = "one projection for all heads"
    return f"drafts {drafted} with {owner}\n"


def print_heads(heads: HeadsFile) -> None:
    """Print keys, tensors and parameter counts of a heads file to stdout."""
    console = Console()
    if not console.is_terminal:  # no folding of lines in a pipe
        console = Console(width=160)
    keys = Table("key", "value", title=Text(printable(str(heads.path))), title_justify="left")
    for key, value in heads.keys.items():
        keys.add_row(Text(printable(key)), Text(printable(str(value))))
    console.print(keys)
    console.print(projections(heads), highlight=False)
    tensors = Table(
        "tensor", "shape", "type", title="tensors (fastest dimension first)", title_justify="left"
    )
    tensors.add_column("bytes", justify="right")
    for info in heads.tensors.values():
        tensors.add_row(
            Text(printable(info.name)), " x ".join(map(str, info.shape)), info.type.name, f"{info.nbytes:,}"
        )
    console.print(tensors)
    counts = Table("part", title="parameters", title_justify="left")
    counts.add_column("count", justify="right")
    for owner, count in heads.parameters.items():
        counts.add_row(Text(printable(owner)), f"{count:,}")
    counts.add_row("all", f"{sum(heads.parameters.values()):,}", end_section=True)
    console.print(counts)
