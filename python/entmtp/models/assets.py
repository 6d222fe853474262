"""The model and checkpoints that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def assets() -> Path:
    """Folder of the bundled demo model and checkpoints."""
    return Path(str(files("entmtp") / "assets"))
