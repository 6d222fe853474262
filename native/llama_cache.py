"""The cache of sources and builds of llama.cpp: where it lies, what its keys are, who may write."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Part of every key: raise it when the recipe below changes what it produces.
RECIPE = 2


class BuildError(Exception):
    """A failure whose message tells the user what to do; shown without a traceback."""


def log(message: str) -> None:
    print(f"entmtp: {message}", file=sys.stderr, flush=True)


def default_cache() -> Path:
    if os.environ.get("ENTMTP_CACHE"):
        return Path(os.environ["ENTMTP_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "entmtp"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "entmtp" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entmtp"


def _wheels() -> Any:
    """The package's module for downloads: by its path, as the package is not installed where it is built."""
    path = Path(__file__).resolve().parents[1] / "python" / "entmtp" / "common" / "wheels.py"
    spec = importlib.util.spec_from_file_location("entmtp_wheels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pip_download = _wheels().pip_download
sha256_file = _wheels().sha256_file


def make_key(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Exclusive lock between processes. The system drops it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt
            import time

            while True:
                try:
                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.5)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another build ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file unlocks it
