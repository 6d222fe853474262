"""The options that commands share, and the files that they name."""

from .demo import DEMO, demo_files
from .model import add_model_options, arguments, explained, load, model_files, no_heads, words
from .table import OPTIONS

__all__ = [
    "DEMO",
    "OPTIONS",
    "add_model_options",
    "arguments",
    "demo_files",
    "explained",
    "load",
    "model_files",
    "no_heads",
    "words",
]
