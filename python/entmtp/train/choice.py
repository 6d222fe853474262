"""How many tokens heads can propose, and by which projection: what makes text come fastest on this machine.

A row more of the projections costs every draft; what it brings is its share of the text, for a token that heads cannot
propose is never guessed. How often guesses will be right is not known before there are heads, so it is foreseen by
what other heads of the same kind reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..convert.draft_vocab import STEP
from .eagle3 import Layer
from .heads import Shape
from .price import Prices

MOST = 32_768  # rows that `auto` considers
ALIKE = 0.02  # of the speed

# Share of guesses that are right where those before were: with 0.41 a chain of four makes 1.675 tokens per step, as
# Hydra heads of SmolLM2-135M-Instruct do; the others stand to it as the demo's heads do (docs/train.md)
RIGHT = {"medusa": 0.29, "hydra": 0.41, "hydra++": 0.47}
# of that with other projections, same text and steps (docs/train.md)
KEPT = {"own": 1.0, "shared": 0.98, "base": 0.88}


@dataclass(frozen=True)
class Choice:
    """What heads will propose.

    Attributes:
        n_rows: tokens.
        coverage: their share of text.
        speed: tokens per second that are foreseen.
    """

    lm_head: str
    n_rows: int
    coverage: float
    speed: float


def chains(
    prices: Prices, shape: Shape | Layer, lm_head: str, n_rows: int, coverage: float
) -> list[tuple[float, float]]:
    """Of steps with a chain of one guess, two, ...: tokens that are foreseen, and microseconds."""
    right = RIGHT.get(shape.arch, RIGHT["hydra"]) * KEPT[lm_head] * coverage
    curve = prices.costs.curve()
    tokens, p, draft = 1.0, 1.0, 0.0
    found = []
    for i in range(min(shape.n_heads, len(curve) - 1)):
        p *= right
        tokens += p
        draft += prices.head(lm_head, i, n_rows, shape.block_rows(i))
        found.append((tokens, float(curve[i + 1]) + draft))
    return found


def foreseen(prices: Prices, shape: Shape | Layer, lm_head: str, n_rows: int, coverage: float) -> float:
    """Tokens per second with the chain of the best length."""
    return max(1e6 * tokens / us for tokens, us in chains(prices, shape, lm_head, n_rows, coverage))


def choose(
    prices: Prices,
    shape: Shape | Layer,
    coverage: npt.NDArray[np.float64],
    lm_heads: Sequence[str],
    sizes: Sequence[int],
    fits: Callable[[str, int], bool] = lambda lm_head, n: True,
) -> list[Choice]:
    """The best size for each kind of projection, the kind to take first, then by speed. That is the first of `lm_heads`
    that is as fast as the fastest, within what timings differ by.

    Args:
        coverage: share of unseen text that the first 1, 2, ... tokens make up, [n_vocab].
        sizes: rows to choose from, ascending.
        fits: whether there is memory to train that.
    """
    found = []
    for lm_head in lm_heads:
        options = [
            Choice(
                lm_head,
                n,
                float(coverage[n - 1]),
                foreseen(prices, shape, lm_head, n, float(coverage[n - 1])),
            )
            for n in sizes
            if fits(lm_head, n)
        ]
        if options:
            found.append(max(options, key=lambda c: c.speed))
    if not found:
        return []
    fastest = max(c.speed for c in found)
    best = next(c for c in found if c.speed >= (1 - ALIKE) * fastest)
    return [best, *sorted((c for c in found if c is not best), key=lambda c: -c.speed)]


def sizes(n_vocab: int) -> list[int]:
    """What `auto` chooses from."""
    whole = [n_vocab] if n_vocab <= MOST else []
    return [*range(STEP, min(n_vocab, MOST + 1), STEP), *whole]


def covered(n_rows: int, coverage: npt.NDArray[np.float64]) -> str:
    """What so many tokens are of the text, in one sentence."""
    if n_rows == len(coverage):
        return f"draft vocabulary: all {n_rows} tokens"
    return f"draft vocabulary: {n_rows} of {len(coverage)} tokens, {coverage[n_rows - 1]:.1%} of the text"


def why(prices: Prices, shape: Shape | Layer, choice: Choice, coverage: npt.NDArray[np.float64]) -> str:
    """What the next rows would cost and bring, in one sentence."""
    n_vocab, n = len(coverage), choice.n_rows
    said = covered(n, coverage)
    if n == n_vocab:
        return said
    more = min(STEP, n_vocab - n)
    now = chains(prices, shape, choice.lm_head, n, choice.coverage)
    then = chains(prices, shape, choice.lm_head, n + more, float(coverage[n + more - 1]))
    length = max(range(len(now)), key=lambda i: now[i][0] / now[i][1])
    (tokens, us), (more_tokens, more_us) = now[length], then[length]
    return (
        f"{said}; {more} more would cost a step {more_us - us:.1f} us ({more_us / us - 1:.2%}) and bring "
        f"{more_tokens / tokens - 1:.2%} more tokens"
    )


OWNER = {"own": "each head's own", "shared": "one for all heads", "base": "the base model's"}


def compared(choices: Sequence[Choice], passed_over: Sequence[str]) -> str:
    """Which projections, and what the others are forecast, in one sentence."""
    best, *others = choices
    said = f"projections: {OWNER[best.lm_head]}, {best.speed:.0f} tokens/s forecast"
    said += "".join(f", {OWNER[c.lm_head]} {c.speed:.0f}" for c in others)
    if passed_over:
        said += f" (no memory to train {' or '.join(OWNER[name] for name in passed_over)})"
    return said
