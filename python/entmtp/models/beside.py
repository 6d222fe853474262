"""The heads files that were made for a model, beside it or bundled: their keys decide, not their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import ConvertError
from . import hub
from .assets import assets
from .base import read_base
from .formats.gguf_header import read_gguf_header, read_gguf_keys
from .names import Say, resolve, warn


@dataclass(frozen=True)
class FoundHeads:
    """A heads file that fits a model: same vocabulary, width and architecture."""

    path: Path
    arch: str  # "medusa" or "hydra"
    base_name: str  # general.name of the model they were made for
    same_name: bool  # as the model's


def matching_heads(model: Path, folder: Path | None = None) -> list[FoundHeads]:
    """The heads files in a folder, the model's own unless another is given, that fit it, best first.

    First those that were made for a model of this name, then Hydra before Medusa, then the latest. A model that
    cannot be read has none.
    """
    found = []
    base = None
    for path in sorted((folder or model.absolute().parent).glob("*.gguf")):
        if path.name == model.name or (keys := heads_keys(path)) is None:
            continue
        if base is None:  # takes a moment, for its fingerprint
            try:
                base = read_base(model)
            except (ConvertError, OSError):
                return []
        arch = keys["general.architecture"]
        made_for = (
            keys.get("entmtp.tokenizer.fingerprint"),
            keys.get(f"{arch}.embedding_length"),
            keys.get("entmtp.base.architecture"),
        )
        if made_for == (base.fingerprint, base.n_embd, base.architecture):
            name = str(keys.get("entmtp.base.name", ""))
            found.append(FoundHeads(path, arch, name, name == base.name))

    def rank(heads: FoundHeads) -> tuple[Any, ...]:
        return not heads.same_name, heads.arch != "hydra", -heads.path.stat().st_mtime_ns

    return sorted(found, key=rank)


def heads_keys(path: Path) -> dict[str, Any] | None:
    """The keys of a heads file; None of any other file."""
    try:
        arch = read_gguf_keys(path, lambda key: key == "general.architecture", 1)
        if arch.get("general.architecture") not in ("medusa", "hydra"):
            return None
        keys = read_gguf_header(path).keys
    except (ConvertError, OSError):
        return None
    return keys if "entmtp.format_version" in keys else None


def find_heads(model: Path, say: Say = warn) -> Path | None:
    """The heads file beside a model that was made for it, or a bundled one; None if there is none.

    The file's keys decide (docs/heads-gguf.md), not its name. Where several fit, see `matching_heads` for the order.

    Args:
        say: called with a sentence about a choice between several, or a model of another name.
    """
    model = Path(model)
    # bundled ones only for the very model: of another one with its vocabulary they might guess badly
    found = matching_heads(model) or [h for h in matching_heads(model, assets() / "heads") if h.same_name]
    if not found:
        return None
    best = found[0]
    if len(found) > 1:
        others = ", ".join(heads.path.name for heads in found[1:])
        say(f"{len(found)} heads files fit {model.name}: using {best.path.name}, not {others}")
    if not best.same_name and best.base_name:
        say(f"{best.path.name} was made for {best.base_name}, which has the same vocabulary and width")
    return best.path


def heads_of(model: str | Path, heads: str | Path | None) -> Path:
    """Path of the heads of a model: as named, by path or `hf:` name, or those beside it.

    Raises:
        ValueError: there are none.
    """
    heads = find_heads(Path(model)) if heads is None else heads
    if heads is None:
        raise ValueError(
            'draft="entmtp" needs heads=PATH, a heads file of this base model, and there is none beside it; '
            "entmtp convert makes one from a Medusa or Hydra checkpoint"
        )
    if str(heads).startswith(hub.PREFIX):
        return resolve(heads, "heads")
    if not Path(heads).is_file():
        raise ValueError(f"heads: there is no file {heads}")
    return Path(heads)
