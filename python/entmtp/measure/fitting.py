"""Banks fitted to rank traces under measured costs: trees, entropy bins, calibration, and the published ladders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..bank.bank import Bank, Ladder
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..bank.tree import PLAIN, Tree
from . import calibration, search
from .replay import replay
from .timing import Progress as Report

WINDOWS = (2.0, 8.0, 32.0)
BINS = (1, 2, 4, 7)


def ladders(traces: Traces, bank: Bank) -> dict[str, Ladder]:
    """Ladders of the published policies: the larger the tree, the more predictable the text; equally filled rungs."""
    trees = sorted(range(len(bank.trees)), key=lambda i: -bank.trees[i].n_nodes)
    top1 = np.stack([traces.level(h)[:, 0, 0] for h in range(traces.n_heads)], axis=1)
    scores = {
        "entropy": traces.running(bank.ema_window),
        "top1": 1.0 - traces.signals[:, 1],
        "path": 1.0 - np.exp(top1.sum(axis=1)),
    }
    result = {}
    for score, values in scores.items():
        edges = np.unique(np.quantile(values, np.arange(1, len(trees)) / len(trees)).round(4))
        edges = edges[edges > 0]
        result[score] = Ladder(tuple(float(e) for e in edges), tuple(trees[: len(edges) + 1]))
    return result


def fit(traces: Traces, costs: Costs, progress: Report | None = None) -> Bank:
    """A bank fitted to traces under measured costs: trees, bins, window, criterion, calibration, ladders."""
    single = search.best_single(traces, costs)
    options = [(w, b, c) for w in WINDOWS for b in BINS for c in ("ratio", "price")]
    # where nothing is to be gained here, the bank shall still tell predictable text from other
    options.sort(key=lambda option: option != (8.0, 4, "ratio"))
    best: tuple[float, Bank] | None = None
    for i, (window, n_bins, criterion) in enumerate(options):
        bank = search.bin_bank(traces, costs, window, n_bins, criterion, more=[single])
        us = replay(traces, bank, "entropy").us  # adapting, as it will be used
        if best is None or us < best[0] * (1 - 1e-3):
            best = (us, bank)
        if progress:
            progress("search", i + 1, len(options))
    assert best is not None
    bank = replace(best[1], calibration=calibration.fit(traces, best[1].ema_window))
    return replace(bank, published=ladders(traces, bank))


def fit_sizes(
    traces: Traces, costs: Costs, sizes: Sequence[int], window: float = 8.0, n_bins: int = 4
) -> Bank:
    """A bank for other machines too: trees of given sizes, whatever they cost here; calibrated in the same way."""
    overall = search.node_probabilities(traces.ranks)
    trees = (PLAIN, *(Tree(f"n{n}", search.grow(overall, n)) for n in sizes if n > 1))
    bank = search.calibrated(traces, costs, trees, window, n_bins)
    bank = replace(bank, calibration=calibration.fit(traces, window))
    return replace(bank, published=ladders(traces, bank))
