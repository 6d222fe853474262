"""Convert published Medusa and Hydra draft heads to a GGUF heads file (docs/convert.md)."""

from .cli import convert, main, setup_arg_parser
from .errors import ConvertError
from .inspect import inspect_heads

__all__ = ["ConvertError", "convert", "inspect_heads", "main", "setup_arg_parser"]
