"""From names to files: models and heads by path or `hf:` name, heads beside their model, the bundled demo."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import hub
from .errors import ModelError

DEMO = "demo"  # the name of the bundled model

Say = Callable[[str], None]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def resolve(name: str | os.PathLike[str], kind: str = "model", say: Say = _warn) -> Path:
    """Path of the GGUF file that a name means.

    Args:
        name: a path, or `hf:owner/repo[/file][@revision]`. The file may be a part of a file's name, such as
            `Q4_K_M`, as long as one file matches; of a repository with one GGUF it may be left out. Downloads go
            through huggingface-hub: its cache, HF_TOKEN, HF_HUB_OFFLINE. Of a split GGUF all parts are fetched, and
            the first is returned, as llama.cpp wants it.
        kind: `"model"` or `"heads"`: for messages, and for repositories that hold both.
        say: called with a sentence that the user should read; by default it becomes a warning.

    Raises:
        ModelError: there is no such file, it cannot be had, or its SHA-256 is not what the Hub says.
        OSError: the disk is full or cannot be written to.
    """
    text = os.fspath(name)
    if text.startswith(hub.PREFIX):
        return hub.fetch_gguf(hub.Name.parse(text), kind, say)
    path = Path(text).expanduser()
    if path.is_dir():
        listed = "".join(f"\n  {p}" for p in sorted(path.glob("*.gguf")))
        raise ModelError(
            f"{text}: this is a folder; give a GGUF file" + (f", one of{listed}" if listed else "")
        )
    if not path.is_file():
        raise ModelError(
            f"{text}: there is no such {kind} file; check the path, or give a repository as hf:owner/repo/file"
        )
    first = path.with_name(hub.parts(path.name)[0])
    if not first.is_file():
        raise ModelError(
            f"{text}: this is a part of a split GGUF, and its first part {first.name} is missing"
        )
    return first


#
# heads beside their model
#


@dataclass(frozen=True)
class FoundHeads:
    """A heads file that fits a model: same vocabulary, width and architecture."""

    path: Path
    arch: str  # "medusa" or "hydra"
    base_name: str  # general.name of the model they were made for
    same_name: bool  # as the model's


def matching_heads(model: Path) -> list[FoundHeads]:
    """The heads files in the model's folder that fit it, best first.

    First those that were made for a model of this name, then Hydra before Medusa, then the latest. A model that
    cannot be read has none.
    """
    from .convert.base import read_base
    from .convert.errors import ConvertError

    found = []
    base = None
    for path in sorted(model.absolute().parent.glob("*.gguf")):
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
    from .convert.errors import ConvertError
    from .convert.gguf_header import read_gguf_header, read_gguf_keys

    try:
        arch = read_gguf_keys(path, lambda key: key == "general.architecture", 1)
        if arch.get("general.architecture") not in ("medusa", "hydra"):
            return None
        keys = read_gguf_header(path).keys
    except (ConvertError, OSError):
        return None
    return keys if "entmtp.format_version" in keys else None


def find_heads(model: Path, say: Say = _warn) -> Path | None:
    """The heads file beside a model that was made for it; None if there is none.

    The file's keys decide (docs/heads-gguf.md), not its name. Where several fit, see `matching_heads` for the order.

    Args:
        say: called with a sentence about a choice between several, or a model of another name.
    """
    found = matching_heads(Path(model))
    if not found:
        return None
    best = found[0]
    if len(found) > 1:
        others = ", ".join(heads.path.name for heads in found[1:])
        say(f"{len(found)} heads files fit {Path(model).name}: using {best.path.name}, not {others}")
    if not best.same_name and best.base_name:
        say(f"{best.path.name} was made for {best.base_name}, which has the same vocabulary and width")
    return best.path


def context_length(model: Path) -> int | None:
    """Tokens that a model was trained to see; None where its file does not say."""
    from .convert.errors import ConvertError
    from .convert.gguf_header import read_gguf_keys

    try:
        keys = read_gguf_keys(model, lambda key: key.endswith(".context_length"), 1)
    except (ConvertError, OSError):
        return None
    value = next(iter(keys.values()), None)
    return value if isinstance(value, int) and value > 0 else None


#
# the bundled demo
#


def demo_files() -> tuple[Path, Path]:
    """The bundled demo model and its Hydra heads, made once and kept in the user's cache.

    The model's weights are expanded to f32, in which passes of any size give the same bits up to the order of a sum:
    with and without drafting the text is the same.

    Raises:
        ModelError: the cache cannot be written to.
    """
    from . import __version__
    from .cache import cache_folder
    from .convert import convert
    from .gguf_expand import expand

    assets = Path(str(files(__package__) / "assets"))
    source, checkpoint = assets / "demo-base-q8_0.gguf", assets / "hydra"
    digest = hashlib.sha256(__version__.encode())
    for path in (source, *sorted(checkpoint.iterdir())):
        digest.update(path.read_bytes())
    folder = cache_folder() / "demo" / digest.hexdigest()[:12]
    model, heads = folder / "demo-base-f32.gguf", folder / "demo-hydra-heads-q4_0.gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not model.is_file():
            expand(source, model)
        if not heads.is_file():
            convert(checkpoint, model, heads, outtype="q4_0", progress=False)
    except OSError as e:
        raise ModelError(
            f"the demo model needs 30 MB in the cache folder {folder}, which cannot be written "
            f"({(e.strerror or str(e)).lower()}); set ENTMTP_CACHE to another folder"
        ) from e
    return model, heads
