"""Model files: by which names they are found, what is in them, and how they are read."""

from typing import Any

from .beside import find_heads
from .names import resolve

__all__ = ["find_heads", "resolve"]


def __getattr__(name: str) -> Any:
    """`demo_files` lives with the commands' options; this was its public name."""
    if name != "demo_files":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("entmtp.options").demo_files
