"""What answers in turn say: whether texts are the same, and how fast they came, by pairs of the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..native.stats import DraftStats
from .loops import before_loop, cut
from .turns import Answer

LEAST = 8  # tokens: an answer of so few says nothing about speed


def quartiles(values: Sequence[float]) -> list[float] | None:
    """Median, lower and upper quartile; None of nothing."""
    return [round(float(x), 4) for x in np.percentile(values, [50, 25, 75])] if values else None


def speed(*answers: Answer) -> float:
    """Tokens per second of all answers together."""
    return sum(len(a.tokens) - 1 for a in answers) / max(sum(a.seconds for a in answers), 1e-9)


def time_split(stats: Sequence[DraftStats], seconds: float) -> dict[str, float]:
    """Shares of the time in draft, verify, sample and host, and the rest."""
    split = {k: sum(s.time_split[k] for s in stats) / seconds for k in stats[0].time_split}
    return split | {"rest": max(0.0, 1.0 - sum(split.values()))}


class Comparison:
    """Figures of methods over the same prompts; `turns` are answers by method for each prompt, as of `in_turn`.

    All speeds, shares and tokens per step are of `pairs`: the prompts that every method answered with more than LEAST
    tokens. Whether texts are identical is asked of all.
    """

    def __init__(self, turns: Sequence[dict[str, Answer]]):
        self.turns = turns
        self.pairs = [t for t in turns if all(len(a.tokens) > LEAST for a in t.values())]

    def without_loops(self) -> Comparison:
        """The same answers, each cut where it begins to go round in a loop."""
        return Comparison(
            [{label: cut(a, before_loop(a.tokens)) for label, a in t.items()} for t in self.turns]
        )

    def ratio(self, label: str, base: str) -> list[float] | None:
        """Quartiles of a method's speed against another one's with the same prompt."""
        return quartiles([speed(t[label]) / speed(t[base]) for t in self.pairs])

    def identical(self, label: str, base: str) -> int:
        """Prompts that both methods answered with the same tokens."""
        return sum(t[label].tokens == t[base].tokens for t in self.turns)

    def row(self, label: str, base: str) -> dict[str, Any]:
        """Every figure of a method, speeds against `base`; None where there is no pair.

        "overall" is all tokens over all seconds: what a user waits for.
        """
        own, others = ([t[k] for t in self.pairs] for k in (label, base))
        row: dict[str, Any] = {
            "method": label,
            "tokens_per_second": quartiles([speed(a) for a in own]),
            "tokens_per_second_overall": round(speed(*own), 2) if own else None,
            "ratio": self.ratio(label, base),
            "overall": round(speed(*own) / speed(*others), 4) if own else None,
            "identical": self.identical(label, base),
            "answers": len(self.turns),
            "pairs": len(self.pairs),
        }
        stats = [a.stats for a in own if a.stats is not None and a.stats.n_steps]
        if stats:
            row |= {
                "tokens_per_step": 1.0 + sum(s.n_accepted for s in stats) / sum(s.n_steps for s in stats),
                "time_split": time_split(stats, sum(a.seconds for a in own)),
                "entropy": sum(s.mean_entropy for s in stats) / len(stats),
            }
        elif own and all(a.n_passes for a in own):
            n_passes = sum(a.n_passes or 0 for a in own)
            row["tokens_per_step"] = sum(len(a.tokens) - 1 for a in own) / n_passes
        return row


def remark(rows: Sequence[dict[str, Any]]) -> str:
    """Which prompts the speeds of a table are of, if not of all."""
    pairs, answers = min((r["pairs"], r["answers"]) for r in rows)
    if not pairs:
        return f"No prompt got more than {LEAST} tokens from every method: there are no speeds to compare.\n"
    these = f"Speeds are of the {pairs} of {answers} prompts that got more than {LEAST} tokens from every method.\n"
    return these if pairs < answers else ""
