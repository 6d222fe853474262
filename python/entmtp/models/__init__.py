"""Model files: by which names they are found, what is in them, and how they are read.

Imported on first use: `entmtp doctor` names the package that is missing where one is.
"""

from importlib import import_module
from typing import Any

# demo_files lives with the commands' options; this was its public name
_WHERE = {
    "find_heads": "entmtp.models.beside",
    "resolve": "entmtp.models.names",
    "demo_files": "entmtp.options",
}

__all__ = ["demo_files", "find_heads", "resolve"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
