"""Where this package keeps what is cheap to keep and dear to make again. Everything in it may be deleted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .files import expanded


def cache_folder() -> Path:
    """The user's cache for entmtp, $ENTMTP_CACHE if that is set: the one that native/llama_cpp.py builds in.

    Where there is no home folder, one that nothing can be read from or written to.
    """
    try:
        return _cache_folder()
    except RuntimeError:  # a user without a home
        return Path(os.devnull) / "entmtp"


def _cache_folder() -> Path:
    if folder := os.environ.get("ENTMTP_CACHE"):
        return expanded(folder)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "entmtp"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "entmtp" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entmtp"
