"""Draft heads for one's own model (docs/train.md)."""

from .cli import main
from .options import Options, setup_arg_parser
from .run import train

__all__ = ["Options", "main", "setup_arg_parser", "train"]
