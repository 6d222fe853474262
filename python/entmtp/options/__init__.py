"""The options that commands share, and the files that they name."""

from .demo import AUTO, DEMO, demo_files, first_model
from .model import add_model_options, arguments, explained, load, load_engine, model_files, no_heads, words
from .table import OPTIONS

__all__ = [
    "AUTO",
    "DEMO",
    "OPTIONS",
    "add_model_options",
    "arguments",
    "demo_files",
    "explained",
    "first_model",
    "load",
    "load_engine",
    "model_files",
    "no_heads",
    "words",
]
