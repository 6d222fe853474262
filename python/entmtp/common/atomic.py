"""Files that are there whole or not at all, and nothing beside them of runs that were killed."""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FORGOTTEN = 86400.0  # seconds after which another machine's temporary file is taken for a killed run's
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_NAME = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\d+\.tmp$")
_numbers = itertools.count()


@contextmanager
def temporary_path(target: str | Path) -> Iterator[Path]:
    """A path beside `target` that is nobody else's; whatever is there at the end, file or folder, is removed.

    What killed runs left there for the same target is removed at the beginning.
    """
    target = Path(target)
    _sweep(target)
    temporary = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.tmp")
    try:
        yield temporary
    finally:
        _remove(temporary)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it at the end; removed if the block fails.

    A link stays one, a file keeps its rights, and into a device it is copied.

    Raises:
        OSError: it cannot be written; names `target`.
    """
    real = Path(os.path.realpath(target))
    is_special = real.exists() and not real.is_file() and not real.is_dir()
    with _place(real, is_special) as temporary, named(target, temporary):
        yield temporary
        if is_special:
            with temporary.open("rb") as source, real.open("wb") as device:
                shutil.copyfileobj(source, device)
            return
        if real.is_file() and temporary.is_file():
            with suppress(OSError):
                shutil.copymode(real, temporary)
        os.replace(temporary, real)


@contextmanager
def _place(real: Path, is_special: bool) -> Iterator[Path]:
    """Beside a file; what goes into a device waits where files belong."""
    if not is_special:
        with temporary_path(real) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="entmtp-") as folder:
        yield Path(folder) / "output"


@contextmanager
def named(target: str | Path | None, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system in the block name `target`: a full disk names none, and a temporary path says little."""
    try:
        yield
    except OSError as e:
        if target is not None and e.errno is not None and e.filename in (None, str(temporary)):
            raise type(e)(
                e.errno, e.strerror, str(target)
            ) from e  # filename2, once set, is told even if it is None
        raise


def _sweep(target: Path) -> None:
    for name in glob.glob(f".{glob.escape(target.name)}.*.tmp", root_dir=target.parent):
        found = _NAME.search(name)
        if found and _is_left(target.with_name(name), found["host"], int(found["pid"])):
            _remove(target.with_name(name))


def _is_left(path: Path, host: str, pid: int) -> bool:
    """Whether nobody writes it any more. Processes of other machines, and of containers, are not seen from here."""
    import psutil

    if host == _HOST:
        return not psutil.pid_exists(pid)
    try:
        return time.time() - path.stat().st_mtime > FORGOTTEN
    except OSError:
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
