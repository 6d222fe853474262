"""An OpenAI-compatible server (docs/serve.md)."""

from .cli import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]
