"""Texts to draft from, the user's own documents or code: found, read, and kept as tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..common.atomic import atomic_path
from ..common.cache import cache_folder
from ..common.errors import ModelError
from ..common.files import expanded
from ..common.progress import stages

MOST = 32 << 20  # bytes of all texts
ENDS = np.array([-1], np.int32)  # after each text
KEPT = 16  # sets of texts whose tokens stay in the cache
BEGIN = 8192  # bytes that show whether a file is text
LEFT_OUT = {"__pycache__", "node_modules"}  # folders of what nobody wrote


def _is_text(path: Path) -> bool:
    with path.open("rb") as f:
        return b"\0" not in f.read(BEGIN)


def _inside(folder: Path) -> Iterator[Path]:
    """Files below a folder, in order; hidden ones, and links to elsewhere, are left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in LEFT_OUT)
        for name in sorted(names):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def find_texts(paths: Sequence[str | Path]) -> list[Path]:
    """The files that are named, and those of text below the folders that are.

    Raises:
        ModelError: there is no such file or no text in it, nothing at all, or too much.
    """
    found: list[Path] = []
    for name in paths:
        path = expanded(name)
        if path.is_dir():
            found += (p for p in _inside(path) if _is_text(p))
        elif not path.is_file():
            raise ModelError(f"lookup: there is no file or folder {path}")
        elif not _is_text(path):
            raise ModelError(f"lookup: {path} is no text; name files of text, or folders with some")
        else:
            found.append(path)
    found = list(dict.fromkeys(p.resolve() for p in found))
    size = sum(p.stat().st_size for p in found)
    if not size:
        raise ModelError(f"lookup: there is no text in {', '.join(map(str, paths))}")
    if size > MOST:
        raise ModelError(
            f"lookup: {size / 1e6:.0f} MB of text are more than the {MOST / 1e6:.0f} MB that can be drafted from; name "
            "the folders that matter"
        )
    return found


def corpus_tokens(
    paths: Sequence[str | Path], tokenize: Callable[[bytes], list[int]], vocabulary: int, n_vocab: int
) -> npt.NDArray[np.int32]:
    """Tokens of the texts, -1 after each; those of files that have not changed come from the user's cache.

    Args:
        tokenize: of a text, without special tokens.
        vocabulary: fingerprint of what it tokenizes into.
        n_vocab: tokens there are.

    Raises:
        ModelError: as `find_texts`, or a file cannot be read.
    """
    try:
        files = find_texts(paths)
        stats = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
        key = hashlib.sha256(repr((1, vocabulary, stats)).encode()).hexdigest()[:20]
        kept = cache_folder() / "lookup" / f"{key}.npy"
        if (tokens := _read(kept, n_vocab)) is not None:
            return tokens
        parts: list[npt.NDArray[np.int32]] = []
        with stages() as advance:
            for i, path in enumerate(files):
                parts += [np.array(tokenize(path.read_bytes()), np.int32), ENDS]
                advance("reading texts to draft from", i + 1, len(files))
    except OSError as e:
        raise ModelError(f"lookup: {e.filename} cannot be read: {e.strerror}") from e
    tokens = np.concatenate(parts)
    _keep(kept, tokens)
    return tokens


def _read(path: Path, n_vocab: int) -> npt.NDArray[np.int32] | None:
    """What was kept; None where there is nothing, or nothing of use."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = tokens.dtype == np.int32 and tokens.ndim == 1 and len(tokens) > 0
    if not sound or tokens.min() < -1 or tokens.max() >= n_vocab:
        return None
    with suppress(OSError):
        os.utime(path)  # in use
    return np.asarray(tokens)


def _keep(path: Path, tokens: npt.NDArray[np.int32]) -> None:
    """Keep tokens for the next time, where the cache can be written; what was not used for longest goes."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as f:
            np.save(f, tokens)
        for old in sorted(path.parent.glob("*.npy"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
