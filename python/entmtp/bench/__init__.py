"""What is measured of decoding: side by side, in one process (docs/benchmarks.md)."""

from .cli import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]
