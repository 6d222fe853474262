"""Talk with a model in the terminal (docs/chat.md)."""

from .cli import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]
