"""Convert published Medusa and Hydra draft heads to a GGUF heads file (docs/convert.md)."""

from entmtp.common.errors import ConvertError
from entmtp.convert.cli import convert, main, setup_arg_parser
from entmtp.convert.inspect import inspect_heads

__all__ = ["ConvertError", "convert", "inspect_heads", "main", "setup_arg_parser"]
