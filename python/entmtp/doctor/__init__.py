"""Does this installation work, and what is to be mended?"""

from .cli import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]
