"""The folder of a training: whose it is, what its files belong to, and its end."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..common.atomic import atomic_path
from ..common.errors import ModelError

_MARK = "texts.digest"  # what its texts belong to: the first file in it, and the last that goes
_OVER = "over"  # there while it is removed


def check(folder: Path) -> None:
    """Raise ModelError if a folder, which is removed at the end, holds what no training wrote."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder}: this is a file; give --work the name of a folder")
    if not folder.is_dir() or (folder / _MARK).is_file():
        return
    if any(path.suffix != ".tmp" for path in folder.iterdir()):  # of a training that was killed as it began
        raise ModelError(f"{folder}: there are files of others in it; give --work a new or an empty folder")


def begin(folder: Path, digest: str, restart: bool = False) -> None:
    """Make a folder that was checked, and note what its files belong to; what a removal left is removed.

    Raises:
        ModelError: they belong to something else.
    """
    path = folder / _MARK
    noted = path.read_text("utf-8", "replace").strip() if path.is_file() else None
    if folder.is_dir() and (restart or noted == _OVER):
        remove(folder)
    elif noted not in (None, digest):
        raise ModelError(
            f"{folder}: the texts in it belong to another training; give another --work, or --restart to begin anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _note(path, digest)


def remove(folder: Path) -> None:
    """Remove it with all that is in it. Killed meanwhile, it is none to go on with, and none of others."""
    path = folder / _MARK
    _note(path, _OVER)
    for other in folder.iterdir():
        if other == path:
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.rmtree(other)
        else:
            other.unlink()
    path.unlink()
    if not folder.is_symlink():  # a user's, to a disk with room
        folder.rmdir()


def n_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _note(path: Path, what: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(what + "\n")
