"""Logistic models of what the heads' probabilities are worth, fitted to rank traces; their tables: bank/calibration.py.

The acceptance model is Platt scaling (Platt 1999) with the entropy as a second input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bank.calibration import (
    ACCEPT,
    AHEAD,
    N_ACCEPT,
    N_AHEAD,
    N_BEST,
    N_GUESS,
    Array,
    Calibration,
    expanded_parent,
    expanded_path,
)
from ..bank.traces import Traces


def fit_logistic(x: Array, y: Array, ridge: float = 1.0, n_steps: int = 30) -> Array:
    """Weights w of P(y) = 1 / (1 + exp(-x w)) with the largest likelihood, by Newton's method; y may be probabilities.

    Args:
        x: [n, n_inputs], the first column ones.
        y: [n] between 0 and 1.
        ridge: weight of a Gaussian prior on all weights but the first, in units of the inputs' own scale.
    """
    scale = np.maximum(x.std(axis=0), 1e-6)
    scale[0] = 1.0
    z = x / scale
    prior = np.full(x.shape[1], ridge)
    prior[0] = 1e-3
    w = np.zeros(x.shape[1])
    for _ in range(n_steps):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -30, 30)))
        gradient = z.T @ (y - p) - prior * w
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(prior)
        step = np.linalg.solve(hessian, gradient)
        w += step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-6:
            break
    return np.asarray(w / scale)


def _sigmoid(z: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -60, 60))))


def running_hits(traces: Traces, start: float, window: float) -> Array:
    """How often the best guess of head 0 was right before each position, [n], as if every token had been a step."""
    rate = 2.0 / (window + 1.0)
    hit = (traces.ranks[:, 0] == 0).astype(np.float64)
    out = np.empty(len(hit))
    for part in traces.slices():
        mean = start
        for i in range(part.start, part.stop):
            out[i] = mean
            mean += (hit[i] - mean) * rate
    return out


def accept_inputs(log_p: Array, running: Array, entropy: Array, above: Array, hits: Array) -> Array:
    """Inputs of the acceptance model for the guesses of one expanded path, [n, N_GUESS, N_ACCEPT].

    Args:
        log_p: [n, N_GUESS] ln p of the guesses.
        running, entropy: [n] nats.
        above: [n] ln p of the path they hang from.
        hits: [n] see `running_hits`.
    """
    x = np.empty((*log_p.shape, N_ACCEPT))
    x[..., 0] = 1.0
    x[..., 1] = log_p
    x[..., 2] = np.log1p(-np.minimum(np.exp(log_p), 0.9999))
    x[..., 3] = running[:, None]
    x[..., 4] = entropy[:, None]
    x[..., 5] = np.log(np.arange(1, log_p.shape[1] + 1))
    x[..., 6] = above[:, None]
    x[..., 7] = hits[:, None]
    x[..., 8] = -(np.exp(log_p) * log_p).sum(axis=1)[:, None]
    return x


def fit(
    traces: Traces,
    window: float,
    n_bins: int = 6,
    n_scenarios: int = 4,
    hits_window: float = 39.0,
    without: Sequence[str] = (),
) -> Calibration:
    """Fit everything to the traces of one kind of sampling.

    Args:
        window: of the running entropy, tokens.
        n_bins: bins of the foreseen probability.
        n_scenarios: scenarios per bin.
        hits_window: of the running mean of hits, steps.
        without: inputs to leave out (of ACCEPT and AHEAD), to see what they are worth.
    """
    n_levels = traces.n_heads
    running, entropy = traces.running(window), traces.entropy
    n = len(entropy)
    known = traces.ranks[:, 0] >= 0
    start = float((traces.ranks[known, 0] == 0).mean()) if known.any() else 0.0
    hits = running_hits(traces, start, hits_window)

    accept = np.zeros((n_levels, N_ACCEPT))
    # per level and expanded path: ln p of the path, and the calibrated probability of each guess below it
    raw: list[Array] = []  # [n, WIDTH]
    calibrated: list[Array] = []  # [n, WIDTH, N_GUESS], given the path
    for level in range(n_levels):
        log_p = traces.level(level)  # [n, width, N_GUESS]
        width = log_p.shape[1]
        above = np.zeros((n, width))
        if level > 0:
            for c in range(width):
                parent, rank = expanded_parent(level, c), expanded_path(level, c)[-1]
                above[:, c] = raw[-1][:, parent] + traces.level(level - 1)[:, parent, rank]
        raw.append(above)
        inputs = [accept_inputs(log_p[:, c], running, entropy, above[:, c], hits) for c in range(width)]
        xs, ys = [], []
        for c in range(width):
            rows = np.flatnonzero(traces.follows(expanded_path(level, c)) & (traces.ranks[:, level] >= 0))
            xs.append(inputs[c][rows].reshape(-1, N_ACCEPT))
            ys.append((traces.ranks[rows, level][:, None] == np.arange(N_GUESS)).astype(np.float64).ravel())
        x, y = np.concatenate(xs), np.concatenate(ys)
        if len(y):
            x[:, [i for i, name in enumerate(ACCEPT) if name in without]] = 0.0
            accept[level] = fit_logistic(x, y)
        calibrated.append(np.stack([_sigmoid(i @ accept[level]) for i in inputs], axis=1))

    ahead = np.zeros((n_levels, N_AHEAD))
    edges = np.zeros((n_levels, n_bins - 1))
    scenarios = np.zeros((n_levels, n_bins, n_scenarios, n_levels, N_BEST))
    for level in range(n_levels):
        x = np.zeros((n, N_AHEAD))
        x[:, :5] = np.stack([np.ones(n), running, entropy, traces.log_root, hits], axis=1)
        if level > 0:
            x[:, 5] = raw[level][:, 0]
            x[:, 6] = traces.level(level - 1)[:, 0, 0]
        x[:, [i for i, name in enumerate(AHEAD) if name in without]] = 0.0
        best = calibrated[level][:, 0, 0]
        ahead[level] = fit_logistic(x, best)
        foreseen = _sigmoid(x @ ahead[level])
        edges[level] = _increasing(np.quantile(foreseen, np.arange(1, n_bins) / n_bins))
        bins = np.searchsorted(edges[level], foreseen, side="right")

        # the best guesses on every level from here on, down the greedy path
        chain = np.ones(n)
        values = np.zeros((n, n_levels, N_BEST))
        for below in range(level, n_levels):
            values[:, below] = chain[:, None] * calibrated[below][:, 0, :N_BEST]
            chain = chain * calibrated[below][:, 0, 0]
        for b in range(n_bins):
            rows = np.flatnonzero(bins == b)
            if not len(rows):
                continue
            rows = rows[np.argsort(best[rows])]
            for i, part in enumerate(np.array_split(rows, n_scenarios)):
                scenarios[level, b, i] = values[part if len(part) else rows].mean(axis=0)
    return Calibration(
        accept, ahead, np.clip(edges, 0.0, 1.0), np.clip(scenarios, 0.0, 1.0), start, hits_window
    )


def _increasing(edges: Array) -> Array:
    """The same with equal neighbours moved apart by a hair."""
    out = np.round(edges, 4)
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + 1e-4)
    return out
