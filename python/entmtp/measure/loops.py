"""Where an answer begins to go round in a loop, as small models do, which flatters whoever drafts from the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .turns import Answer

LOOP = 16  # tokens
TIMES = 3


def before_loop(tokens: Sequence[int]) -> int:
    """Tokens up to where a run of LOOP tokens comes for the third time: small models go on like that for ever."""
    seen: dict[tuple[int, ...], int] = {}
    for end in range(LOOP, len(tokens) + 1):
        run = tuple(tokens[end - LOOP : end])
        seen[run] = seen.get(run, 0) + 1
        if seen[run] == TIMES:
            return end
    return len(tokens)


def cut(answer: Answer, n: int) -> Answer:
    """The first n tokens of an answer, and the steps that made them."""
    if n >= len(answer.tokens):
        return answer
    stats = answer.stats
    if stats is not None:
        made = np.cumsum(1 + stats.steps["n_accepted"])
        stats = replace(stats, steps=stats.steps[: int(np.searchsorted(made, n - 1)) + 1])
    return Answer(answer.tokens[:n], answer.times[n - 1] if n else 0.0, stats, answer.times[:n])
