"""How fast an answer comes, and how fast plain decoding would have been on this machine."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..common.errors import BankError, EntmtpError
from ..native.stats import DraftStats
from .at_load import quick
from .known import cached
from .subject import Subject

ENOUGH = 16  # single-token passes that say more than the calibration


def sparkline(values: Any, width: int = 60) -> str:
    """Values as bars, averaged down to `width` characters."""
    bars = " ▁▂▃▄▅▆▇█"
    values = [float(v) for v in values]
    n = min(width, len(values))
    means = [fmean(values[i * len(values) // n : (i + 1) * len(values) // n]) for i in range(n)]
    top = max(means, default=0.0) or 1.0
    return "".join(bars[round(m / top * (len(bars) - 1))] for m in means)


@dataclass
class PlainPass:
    """What a pass over a single token takes here, microseconds: the step of plain decoding.

    Where an answer holds enough single-token passes, it is their mean: they were timed at the same depth and load as
    the rest of it. Else the mean of those of the answers before; and at first the calibrated cost, measured on this
    machine for this model and kept in the cache.
    """

    us: float | None = None
    seen: deque[float] = field(default_factory=lambda: deque(maxlen=256))

    @staticmethod
    def of(llm: Subject) -> PlainPass:
        """From the calibration; measures in under two seconds where none is kept yet (static trees)."""
        if llm.bank is None:
            return PlainPass()
        known = cached(llm)
        if known is None and llm.n_ctx() >= 128:
            before = llm.bank, llm.policy, llm.tree
            try:
                with llm.still():
                    known = quick(llm)
            except (EntmtpError, BankError):
                known = None
            finally:
                llm.set_trees(before[0], policy=before[1], tree=before[2])
        return PlainPass(known.curve()[0] if known else None)

    def observe(self, stats: DraftStats) -> None:
        """Take in the steps of an answer."""
        self.seen.extend(_single(stats))
        if len(self.seen) >= ENOUGH:
            self.us = fmean(self.seen)

    def during(self, stats: DraftStats) -> float | None:
        """What it takes while these steps are taken."""
        own = _single(stats)
        return fmean(own) if len(own) >= ENOUGH else self.us

    def seen_in(self, stats: DraftStats) -> str | None:
        """Where `during` comes from: `"this answer"`, `"answers before"`, `"calibration"`; None: it is not known."""
        if len(_single(stats)) >= ENOUGH:
            return "this answer"
        return None if self.us is None else "answers before" if len(self.seen) >= ENOUGH else "calibration"


def _single(stats: DraftStats) -> list[float]:
    """Passes over one token, microseconds."""
    return [float(us) for us in stats.steps["t_verify_us"][stats.steps["n_nodes"] == 1]]


@dataclass
class Speed:
    """Figures of an answer."""

    n_tokens: int  # tokens drawn
    seconds: float  # from the first of them to the last
    first: float  # seconds until the first token
    speedup: float | None  # against plain decoding, None if that is not known
    stats: DraftStats

    @property
    def tokens_per_second(self) -> float:
        return (self.n_tokens - 1) / self.seconds if self.n_tokens > 1 and self.seconds > 0 else 0.0

    def line(self, width: int = 200) -> str:
        """One line for people, the entropy along the answer at its end."""
        s = self.stats
        parts = [f"{self.tokens_per_second:.0f} tokens/s" if self.n_tokens > 1 else "… tokens/s"]
        if self.speedup is not None and s.n_steps:
            parts.append(f"{self.speedup:.2f}× plain")
        if s.n_steps:
            parts.append(f"{s.tokens_per_step:.2f} tokens/step")
            entropy = s.steps["entropy"][-160:]
            tail = f"{float(entropy[-1]):.2f} nats"
            room = width - len(" · ".join(parts)) - len(tail) - 12
            if room >= 4:
                parts.append(f"entropy {sparkline(entropy, min(room, 32))} {tail}")
        return " · ".join(parts)[:width]


class Meter:
    """Follows one answer of a model.

    Plain decoding is taken to need a single-token pass for each token, and all else (sampling, Python, the terminal)
    as we do: `speedup = (n_tokens * plain pass + rest) / wall`, with `rest = wall - drafts - verify passes`.
    """

    def __init__(self, llm: Subject, plain: PlainPass):
        self.llm, self.plain = llm, plain
        self.n_tokens = 0
        llm.reset_draft_stats()
        self.begin = time.perf_counter()
        self.first = self.last = self.begin

    def token(self) -> None:
        """A token was drawn."""
        self.last = time.perf_counter()
        if not self.n_tokens:
            self.first = self.last
        self.n_tokens += 1

    def speed(self) -> Speed:
        """The figures so far."""
        stats, seconds, speedup = self.llm.draft_stats, self.last - self.first, None
        n, plain_us = stats.n_steps + stats.n_accepted, self.plain.during(stats)
        if plain_us is not None and n and seconds > 0:
            passes = stats.time_split["draft"] + stats.time_split["verify"]
            rest = max(seconds - passes, 0.0)
            speedup = (n * plain_us / 1e6 + rest) / (passes + rest)
        return Speed(self.n_tokens, seconds, self.first - self.begin, speedup, stats)
