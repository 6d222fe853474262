"""What a training takes, said before it starts: disk, memory, and the digests that tie its files together."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.errors import ModelError
from .heads import Shape
from .loop import Settings
from .loss import PIECE_BYTES
from .states import Layout

MARGIN = 64 << 20  # bytes of disk to leave free
TEXT = 24  # bytes of memory per token of text
LIBRARIES = 80 << 20  # bytes that PyTorch and oneDNN take as they go


def n_parameters(shape: Shape, n_draft: int) -> int:
    """Numbers that are trained."""
    d, total = shape.n_embd, 0
    for i in range(shape.n_heads):
        for j in range(shape.n_layers):
            wide = shape.grounded and j == 0
            total += (d * (i + 2) + 1) * d * 2 if wide else (d + 1) * d
        if not shape.share:
            total += n_draft * (d + 1 if shape.grounded else d)
    if shape.prefix:
        kv = d // shape.n_head * shape.n_head_kv
        total += 2 * d * d + 2 * d * kv + 3 * d * shape.n_ff + 3 * d
    return total


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    cache: int  # hidden states and distributions
    other: int  # text, checkpoints, results
    text: int  # memory for the text
    training: int  # memory, above what the process has without the base model

    @property
    def disk(self) -> int:
        return self.cache + self.other


def needs(shape: Shape, settings: Settings, layout: Layout, n_vocab: int, n_draft: int) -> Needs:
    """What a training takes on disk and in memory."""
    n = n_parameters(shape, n_draft)
    d = shape.n_embd
    # a checkpoint holds parameters and two moments, and a new one is written before the old one goes
    checkpoints = 2 * 12 * n
    results = 2 * n + 2 * (2 * n + 2 * n_vocab * d)
    # parameters, gradients and moments; a projection in bf16, and its gradient from one head
    fixed = 16 * n + 8 * n_draft * d + 4 * PIECE_BYTES + LIBRARIES
    # per token of a batch, as measured: the widest head's input in both types with what its gradient needs, and the
    # decoder layer's
    numbers = 5 * d + (5 * shape.n_heads * d if shape.grounded else 0)
    if shape.prefix:
        numbers += 2 * (12 * d + 4 * shape.n_ff)
    return Needs(
        layout.n_bytes,
        checkpoints + results + 8 * layout.n_tokens,
        TEXT * layout.n_tokens,
        fixed + 4 * numbers * settings.batch_tokens,
    )


def check_disk(need: int, folder: Path) -> None:
    """Raises ModelError if the disk is too full."""
    free = shutil.disk_usage(folder).free
    if free < need + MARGIN:
        raise ModelError(
            f"{folder}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some, or give another "
            "--work, or fewer --tokens"
        )


def digest(*parts: Any) -> str:
    """Of settings that must be the same for files to be used again."""
    plain = [asdict(p) if hasattr(p, "__dataclass_fields__") else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def claim(folder: Path, what: str, value: str, mend: str) -> None:
    """Note in `folder` what its files belong to; raises ModelError if they belong to something else."""
    path = folder / f"{what}.digest"
    if path.exists():
        if path.read_text().strip() != value:
            raise ModelError(f"{folder}: the {what} in it belong to another training; {mend}")
        return
    path.write_text(value + "\n")


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def resident() -> int:
    """Memory of this process that is its own (not mapped files), bytes; 0 where it cannot be known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
