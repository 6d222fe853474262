"""Files that users name: to read, and to write without losing another one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .atomic import named
from .errors import ModelError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def expanded(name: str | Path) -> Path:
    """A path with `~` for a home folder.

    Raises:
        ModelError: of somebody who is not there.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ModelError(
            f"{name}: there is no such home folder; write ./{name} for a file of that name"
        ) from None


def read_text(path: str | Path) -> str:
    """All of a text file.

    Raises:
        UsageError: it is not UTF-8. OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}: this is no UTF-8 text (byte {e.start}); convert it, as with iconv"
        ) from None


def check_output(
    out: str | Path | None, inputs: Iterable[str | os.PathLike[str] | None], flag: str = "-o"
) -> None:
    """Before any work: a file can be written there, and it is none of those that are read.

    Args:
        out: None: nothing is written.
        inputs: files; None and what does not exist is passed over.

    Raises:
        UsageError: it cannot, or it is.
    """
    if out is None:
        return
    path = Path(out)
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageError(f"{path}: cannot be written, for {what}; change {flag}")
    if path.exists() and any(source is not None and _is_same(path, source) for source in inputs):
        raise UsageError(f"{path}: this is one of the files to read; give {flag} another name")


def _is_same(a: Path, b: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


@contextlib.contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Hold a file of answers, in which two commands would write over each other's.

    Raises:
        UsageError: another one holds it.
    """
    if path is None:
        yield
        return
    with named(path), path.open("ab") as file:
        if fcntl is not None and path.is_file():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{path}: another command writes its answers there; wait, or give another name"
                ) from None
            except OSError:
                pass  # a file system without locks
        yield
