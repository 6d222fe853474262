"""What the heads' probabilities are worth: the tables of the confidence policy.

Heads are over- or underconfident, differently at every depth. A guess's probability of being right (given that its path
is) is a logistic function of what is known when it is drafted. And before a head runs, its use has to be foreseen: the
same kind of model predicts how sure the head will be, and in each bin of that prediction a few scenarios say what the
best guesses looked like. measure/calibration.py fits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.fields import Fields

Array = npt.NDArray[np.float64]
# inputs of the two models, see native/include/entmtp.h
ACCEPT = ("one", "ln p", "ln 1-p", "running entropy", "entropy", "rank", "path", "hits", "spread")
AHEAD = ("one", "running entropy", "entropy", "root", "hits", "path", "last")
N_ACCEPT, N_AHEAD = len(ACCEPT), len(AHEAD)
N_BEST = 3  # guesses that a scenario holds per level
WIDTH = 4  # expanded paths per level
N_GUESS = 8  # guesses per expanded path


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tables of `struct entmtp_calibration`.

    Attributes:
        accept: [n_levels, N_ACCEPT] weights of: a guess is right, given that its path is.
        ahead: [n_levels, N_AHEAD] weights of: the best guess of a head that did not run yet is right.
        edges: [n_levels, n_bins - 1] of the foreseen probability, increasing.
        scenarios: [n_levels, n_bins, n_scenarios, n_levels, N_BEST] acceptance of the best guesses of this level and
            the ones below, relative to the greedy path they hang from.
        hits: how often the best guess of head 0 was right.
        hits_window: window of its running mean, steps.
    """

    accept: Array
    ahead: Array
    edges: Array
    scenarios: Array
    hits: float
    hits_window: float

    @property
    def n_levels(self) -> int:
        return len(self.accept)

    def to_json(self) -> dict[str, Any]:
        return {"hits": round(self.hits, 4), "hits_window": self.hits_window} | {
            k: np.round(getattr(self, k), digits).tolist()
            for k, digits in (("accept", 4), ("ahead", 4), ("edges", 4), ("scenarios", 3))
        }


def from_json(data: Any, label: str) -> Calibration:
    """A calibration from parsed JSON.

    Raises:
        BankError: names the field that is wrong.
    """
    f = Fields(data, label, "calibration in bank")
    f.only({"accept", "ahead", "edges", "scenarios", "hits", "hits_window"})

    def table(key: str, shape: tuple[int | None, ...], low: float, high: float) -> Array:
        try:
            array = np.array(f.data.get(key), dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            array = np.array(np.nan)
        wanted = len(shape) == array.ndim and all(
            n in (None, m) for n, m in zip(shape, array.shape, strict=True)
        )
        if not wanted or not np.isfinite(array).all() or (array < low).any() or (array > high).any():
            numbers = " x ".join("any" if n is None else str(n) for n in shape)
            raise f.fail(key, f"a table of {numbers} numbers between {low:g} and {high:g}")
        return array

    accept = table("accept", (None, N_ACCEPT), -1e3, 1e3)
    n = len(accept)
    if not 1 <= n <= 64:
        raise f.fail("accept", "a table for 1 to 64 heads")
    ahead = table("ahead", (n, N_AHEAD), -1e3, 1e3)
    edges = table("edges", (n, None), 0.0, 1.0) if f.data.get("edges") != [[]] * n else np.zeros((n, 0))
    for i, row in enumerate(edges):
        if any(b <= a for a, b in pairwise(row)):
            raise f.fail(f"edges[{i}]", "increasing")
    scenarios = table("scenarios", (n, edges.shape[1] + 1, None, n, N_BEST), 0.0, 1.0)
    if not 1 <= scenarios.shape[2] <= 64 or edges.shape[1] > 63:
        raise f.fail("scenarios", "a table of at most 64 bins and 64 scenarios")
    hits = f.number("hits", f.data.get("hits"), 0.0, 1.0)
    return Calibration(
        accept, ahead, edges, scenarios, hits, f.number("hits_window", f.data.get("hits_window"), 1.0, 1e6)
    )


def expanded_path(level: int, index: int) -> tuple[int, ...]:
    """Rank paths that a head may be run after, in the order they are taken; as in native/src/grower.cpp."""
    path = [0] * level
    if level == 1:
        path[0] = index
    elif level == 2 and index == 3:
        path[0] = 2
    elif index > 0:
        path[index - 1] = 1
    return tuple(path)


def expanded_parent(level: int, index: int) -> int:
    """Index of that path's parent among the paths of the level above."""
    if level <= 1:
        return 0
    parent = expanded_path(level, index)[:-1]
    return next(i for i in range(WIDTH) if expanded_path(level - 1, i) == parent)
