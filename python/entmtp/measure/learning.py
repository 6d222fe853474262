"""Weights of the acceptance model for a task: fitted to what the drafters proposed in recorded texts, and what came.

The model itself, and how it goes on learning, is native/src/acceptance.cpp. Replay gives the samples (replay.py): every
proposal at a place that a text went through, with its inputs and whether it was right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bank import Bank, Traces
from ..bank.acceptance import INPUTS, N_INPUTS, N_SETS, of_array
from ..native import abi
from ..native.heads import Heads
from .replay import AGREEMENT, Replay, replay_auto

Array = npt.NDArray[np.float64]
LEAST_GAIN = 0.01  # of the time: by less than this, weights for a task are not told from the library's
STRENGTH = 64.0  # of the prior: that of about 300 samples, as 2 to 30 texts of SmolLM2 wanted it


def shipped() -> Array:
    """Weights that the library begins with, [N_SETS, N_INPUTS]."""
    weights = np.zeros((N_SETS, N_INPUTS), dtype=np.float32)
    abi.acceptance_shipped(weights.ctypes.data)
    return weights.astype(np.float64)


def fit_towards(x: Array, y: Array, prior: Array, strength: float = STRENGTH, n_steps: int = 40) -> Array:
    """Weights of a logistic model by Newton's method, with a Gaussian prior around `prior`.

    Args:
        x: [n, n_inputs].
        y: [n] 0 or 1.
        strength: precision of the prior, in units of the inputs' own scale. What never varies stays as it is.
    """
    scale = np.sqrt((x**2).mean(axis=0))
    used = scale > 1e-6
    z, w0 = x[:, used] / scale[used], prior[used] * scale[used]
    rest = x[:, ~used] @ prior[~used]
    sign = 2.0 * y - 1.0

    def loss(w: Array) -> float:
        missed = np.logaddexp(0.0, -sign * (z @ w + rest)).sum()
        return float(missed + 0.5 * strength * ((w - w0) ** 2).sum())

    w, now = w0, loss(w0)
    for _ in range(n_steps):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w + rest, -30, 30)))
        gradient = z.T @ (y - p) - strength * (w - w0)
        hessian = (z * (p * (1 - p))[:, None]).T @ z + strength * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        while (then := loss(w + step)) > now and np.abs(step).max() > 1e-9:
            step = step / 2  # too far: the loss is convex, not quadratic
        w, now = w + step, min(then, now)
        if np.abs(step).max() < 1e-6:
            break
    out = prior.copy()
    out[used] = w / scale[used]
    return out


def inputs_of(
    proposals: npt.NDArray[np.void], without: Sequence[str] = ()
) -> tuple[npt.NDArray[np.int64], Array]:
    """Set of drafters [n] and inputs [n, N_INPUTS] of proposals, as the model sees them without some of its inputs."""
    sets, x = proposals["sources"].astype(np.int64), proposals["inputs"].astype(np.float64)
    if AGREEMENT in without:
        sets = sets & -sets
        of_input = np.array(
            [_only_for(name) for name in INPUTS]
        )  # bits of the drafters that an input is about
        x = np.where((of_input == 0) | (of_input & sets[:, None] != 0), x, 0.0)
    x[:, [i for i, name in enumerate(INPUTS) if name in without]] = 0.0
    return sets, x


def _only_for(name: str) -> int:
    """Bit of the drafter whose signal an input is, 0: of none."""
    kinds = (
        ("match", "share", "rank", "hits of text"),
        ("row:", "hits of recycling"),
        ("logit of", "hits of heads"),
    )
    for i, words in enumerate((*kinds, ("model:", "hits of model"))):
        if any(word in name for word in words):
            return 1 << i
    return 0


def fit(proposals: npt.NDArray[np.void], without: Sequence[str] = ()) -> Array:
    """Weights [N_SETS, N_INPUTS] that make what was seen most likely, near the library's where little was seen."""
    weights = shipped()
    sets, x = inputs_of(proposals, without)
    y = proposals["right"].astype(np.float64)
    for k in np.unique(sets):
        rows = sets == k
        weights[k] = fit_towards(x[rows], y[rows], weights[k])
    return np.clip(weights, -12.0, 12.0)


def log_loss(proposals: npt.NDArray[np.void], weights: Array, without: Sequence[str] = ()) -> float:
    """Mean of -ln p(what happened) over proposals, nats; lower is better."""
    sets, x = inputs_of(proposals, without)
    z = np.clip((x * weights[sets]).sum(axis=1), -30, 30)
    signed = np.where(proposals["right"] == 1, z, -z)
    return float(np.log1p(np.exp(-signed)).mean())


def told_temperature(fitted: Traces, held_out: Traces, bank: Bank, heads: Heads | None, **how: Any) -> float:
    """Log loss on held-out texts if the temperature were an input, too: by itself, and times what the rows say."""
    found = []
    for traces in (fitted, held_out):
        r = replay_auto(traces, bank, heads, proposals=True, **how)
        assert r.proposals is not None and traces.texts is not None
        made = np.concatenate([[0], np.cumsum(1 + r.steps["n_accepted"])])[:-1]  # first token of each step
        text = np.searchsorted(np.cumsum(traces.n_tokens - 1), made[r.proposals["step"]], side="right")
        temp = traces.texts.temp[text].astype(np.float64)[:, None]
        sets, x = inputs_of(r.proposals)
        row = [INPUTS.index(name) for name in ("row: ln p", "row: ln(1 - p)")]
        found.append((sets, np.c_[x, temp, temp * x[:, row]], r.proposals["right"].astype(np.float64)))
    (sets, x, y), (new_sets, new_x, new_y) = found
    total = 0.0
    for k in np.unique(new_sets):
        w = np.r_[shipped()[k], np.zeros(x.shape[1] - N_INPUTS)]
        w = fit_towards(x[sets == k], y[sets == k], w) if (sets == k).any() else w
        rows = new_sets == k
        total += np.logaddexp(0.0, (1.0 - 2.0 * new_y[rows]) * (new_x[rows] @ w)).sum()
    return float(total / len(new_y))


def learn(fitted: Traces, bank: Bank, heads: Heads | None, **how: Any) -> Bank:
    """The bank with weights for the task of some texts; without, where the library's are about as fast.

    That is judged by texts that the weights were not fitted to: each half of the texts by the other's.

    Args:
        bank: with costs.
        how: further arguments of `replay_auto`.
    """

    def fitted_to(texts: Traces) -> Bank:
        seen = replay_auto(texts, bank, heads, proposals=True, **how).proposals
        assert seen is not None
        return replace(bank, acceptance_model=of_array(fit(seen)))

    try:
        halves = fitted.split()
    except ValueError:  # too few to judge by
        return bank
    before = sum(replay_auto(half, bank, heads, **how).us for half in halves)
    after = sum(
        replay_auto(half, fitted_to(other), heads, **how).us
        for half, other in zip(halves, halves[::-1], strict=True)
    )
    return fitted_to(fitted) if after < (1.0 - LEAST_GAIN) * before else bank


# what is left out, to see what it is worth: names of inputs
PARTS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "match length": ("match length",),
    "share of the places": ("share of places",),
    "rank of the match": ("rank of match",),
    "probability of the row": ("row: ln p", "row: ln(1 - p)"),
    "what the heads say": ("logit of heads",),
    "running entropy": ("running entropy",),
    "depth": ("depth",),
    "hits": ("hits of text", "hits of recycling", "hits of heads"),
    "agreement of drafters": (AGREEMENT,),
}
LIBRARY, FROZEN = "nothing, the library's weights", "nothing, without learning as it goes"


def ablate(
    fitted: Traces, held_out: Traces, bank: Bank, heads: Heads | None, drafters: Sequence[str]
) -> Iterator[tuple[str, float, Replay]]:
    """What each input of the acceptance model is worth: (what is left out, log loss, replay), on held-out texts.
    Without it, weights are fitted anew to the other texts, and it stays away while the model goes on learning.

    Args:
        bank: with costs, and with heads their calibration.
    """
    seen = replay_auto(fitted, bank, heads, drafters=drafters, proposals=True).proposals
    plain = replay_auto(held_out, bank, heads, drafters=drafters, proposals=True)
    new = plain.proposals
    assert seen is not None and new is not None
    yield LIBRARY, log_loss(new, shipped()), plain
    for name, without in PARTS.items():
        weights = fit(seen, without)
        own = replace(bank, acceptance_model=of_array(weights))
        loss = log_loss(new, weights, without)
        yield name, loss, replay_auto(held_out, own, heads, drafters=drafters, without=without)
        if not without:
            yield FROZEN, loss, replay_auto(held_out, own, heads, drafters=drafters, adapt=False)
