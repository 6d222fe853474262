"""The options that commands share, and the files that they name."""

from .demo import DEMO, demo_files
from .model import DRAFTS, add_model_options, explained, load, model_files

__all__ = ["DEMO", "DRAFTS", "add_model_options", "demo_files", "explained", "load", "model_files"]
