"""Costs of this machine when a model is loaded: those of before, if a short look finds them possible; else measured."""

from __future__ import annotations

from ..bank import Costs
from .known import cached, keep
from .subject import Subject
from .timing import DEVICE_SIZES, measure, on_device

QUICK_SIZES = (1, 2, 4, 3, 8, 6, 5, 16, 7, 12, 10, 24, 32, 64)  # most telling first
CHECK_SIZES = QUICK_SIZES[:5]
SECONDS = 1.5  # that measuring may take


def quick(llm: Subject, seconds: float = SECONDS, tuned: Costs | None = None) -> Costs:
    """Costs of this machine: tuned, or cached, if a short look finds them still possible; else measured.

    Measuring takes about `seconds`; what it finds is cached if it can be trusted.
    """
    for known in (tuned, cached(llm)):
        if known is not None and not were_disturbed(llm, known):
            return known
    own = measure(
        llm, DEVICE_SIZES if on_device(llm) else QUICK_SIZES, contexts=(16,), n_rounds=8, budget=seconds
    )
    if is_steady(own):
        keep(own)
    return own


def were_disturbed(llm: Subject, known: Costs) -> bool:
    """Whether passes or drafts are much faster now than these costs of before: then another program had the cores.

    That they are slower says nothing: another program has the cores now, and the decoder follows that as it goes.
    """
    depth = min(known.verify)
    now = measure(llm, CHECK_SIZES, contexts=(depth,), n_rounds=3, budget=0.1)
    (seen,) = now.verify.values()
    passes = any(us * 1.3 < known.verify[depth].get(n, 0.0) for n, us in seen.items())
    return passes or now.chain[-1] * 1.5 < known.chain[-1]


def is_steady(costs: Costs) -> bool:
    """Whether timings are good enough to be kept: another program on the same cores can make them absurd."""
    possible = all(us <= 3 * n * row[1] for row in costs.verify.values() for n, us in row.items())
    return possible and costs.spread <= 0.5
