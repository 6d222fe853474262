"""Trees and what is known of them, as values with their files: nothing here measures, or needs a model."""

from .bank import Bank, Ladder, dumps, from_json, load_bank, names, to_json
from .calibration import Calibration
from .costs import Costs
from .traces import Traces
from .tree import PLAIN, Paths, Tree

__all__ = [
    "PLAIN",
    "Bank",
    "Calibration",
    "Costs",
    "Ladder",
    "Paths",
    "Traces",
    "Tree",
    "dumps",
    "from_json",
    "load_bank",
    "names",
    "to_json",
]
