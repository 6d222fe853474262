"""Trees and their calibration for one base model, its heads, a task and this machine (docs/tune.md)."""

from .cli import main, setup_arg_parser
from .tuner import tune

__all__ = ["main", "setup_arg_parser", "tune"]
