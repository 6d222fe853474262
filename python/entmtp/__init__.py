"""EntMTP: local language models faster, with the same output.

    from entmtp import Llama
    llm = Llama("model.gguf", draft="entmtp", heads="heads.gguf")

Importing this package points llama_cpp to the libraries of this package, so that a process holds one llama.cpp.
Whatever needs the libraries is loaded on first use: the converter runs without them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .common.version import __version__
from .native import library

if TYPE_CHECKING:
    from .bank import Bank, Tree
    from .common.errors import BankError, BusyError, Cancelled, EntmtpError, ModelError, ServerError
    from .engine import Engine
    from .llama import Llama
    from .native.stats import DraftStats
    from .stream import Stream

with suppress(library.LibrariesMissing):  # said in full when something needs them
    library.prepare()

_WHERE = {
    "Llama": "llama",
    "Engine": "engine",
    "Stream": "stream",
    "Bank": "bank",
    "Tree": "bank",
    "DraftStats": "native.stats",
    "BankError": "common.errors",
    "BusyError": "common.errors",
    "Cancelled": "common.errors",
    "EntmtpError": "common.errors",
    "ModelError": "common.errors",
    "ServerError": "common.errors",
}

__all__ = [
    "Bank",
    "BankError",
    "BusyError",
    "Cancelled",
    "DraftStats",
    "Engine",
    "EntmtpError",
    "Llama",
    "ModelError",
    "ServerError",
    "Stream",
    "Tree",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
