"""What the base model writes, many sequences side by side, and what it thinks at every token of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .base import Base
from .jobs import Job
from .rows import Rows, join, rows_of

MAKE_UP = 24  # tokens: so much of a text that begins with a word or two is drawn at temperature 1
MADE_UP = 8  # tokens: a beginning shorter than this says little
ASKING = 0.9  # temperature of a question that the model asks itself
QUESTION = 128  # tokens of it at most
LOOP = 48  # tokens; text that only repeats itself for so long is cut there
LONGEST_PERIOD = 16


class Written(NamedTuple):
    """A finished sequence: its job's number, its tokens, how many of them were given, and a row for every token."""

    number: int
    job: Job
    tokens: list[int]
    n_given: int
    rows: Rows


@dataclass
class _Slot:
    """A sequence that is being written."""

    job: Job
    index: int
    tokens: list[int]
    n_given: int
    asks: bool  # it writes the question still
    ended: bool  # nothing more will be drawn
    n_seen: int = 0  # tokens the model was given
    rows: list[Rows] = field(default_factory=list)

    @property
    def temp(self) -> float:
        """Of the next draw. Beginnings are made up at 1."""
        if self.asks:
            return ASKING
        if self.n_given < MADE_UP and len(self.tokens) < MAKE_UP:
            return 1.0
        return self.job.temp or 0.0

    def add(self, token: int, eog: frozenset[int], seq_len: int) -> None:
        """The next token was drawn."""
        if self.asks and (token in eog or len(self.tokens) - len(self.job.tokens) >= QUESTION):
            self.tokens += self.job.closing
            self.asks, self.n_given = False, len(self.tokens)
        else:
            self.tokens.append(token)
            self.ended = not self.asks and (token in eog or loops(self.tokens[self.n_given :]))
        if len(self.tokens) >= seq_len:
            del self.tokens[seq_len:]
            self.ended = True


def write(
    base: Base, jobs: Iterator[Job], first: int, seed: int, k: int, busy: Callable[[int], None] = lambda n: None
) -> Iterator[Written]:  # fmt: skip
    """Let the model write sequences side by side, and yield each as it is finished.

    A sequence ends with the model's end of text, at `base.seq_len` tokens, or where it only repeats itself. Prompts are
    evaluated in passes of their own, many tokens at once.

    Args:
        first: index of the first job. What is drawn depends on `seed` and a job's index, not on the others.
        k: tokens of the model's distribution to keep.
        busy: called with the number of tokens in sequences that are being written.
    """
    free = list(range(base.n_seqs))
    for seq in free:
        base.forget(seq)
    slots: dict[int, _Slot] = {}
    for index, job in enumerate(jobs, first):
        tokens = list(job.tokens[: base.seq_len])
        ended = job.temp is None or len(tokens) == base.seq_len
        slots[free.pop()] = _Slot(job, index, tokens, len(tokens), bool(job.closing), ended)
        while not free:
            yield from _advance(base, slots, free, seed, k)
            busy(sum(slot.n_seen for slot in slots.values()))
    while slots:
        yield from _advance(base, slots, free, seed, k)
        busy(sum(slot.n_seen for slot in slots.values()))


def _advance(base: Base, slots: dict[int, _Slot], free: list[int], seed: int, k: int) -> Iterator[Written]:
    """One token more in every sequence."""
    for seq, slot in slots.items():
        while len(slot.tokens) - slot.n_seen > 1:
            n = min(base.n_batch, len(slot.tokens) - slot.n_seen - (not slot.ended))
            _look(base, {seq: slot}, n, k)
    for seq, slot in list(slots.items()):
        if slot.n_seen == len(slot.tokens):
            rows = join(slot.rows)
            n_given = len(slot.tokens) if slot.asks else min(slot.n_given, len(slot.tokens))
            yield Written(slot.index, slot.job, slot.tokens, n_given, rows)
            base.forget(seq)
            del slots[seq]
            free.append(seq)
    if not slots:
        return
    slots = dict(
        sorted(slots.items())
    )  # llama.cpp evaluates sequences together whose numbers follow each other
    logits, rows = _look(base, slots, 1, k)
    drawing = [(i, slot) for i, slot in enumerate(slots.values()) if not slot.ended]
    for i, slot in drawing:
        u = uniform(seed, slot.index, len(slot.tokens))
        slot.add(draw(logits[i], rows.ids[i], slot.temp, u), base.eog, base.seq_len)


def _look(base: Base, slots: dict[int, _Slot], n: int, k: int) -> tuple[npt.NDArray[np.float32], Rows]:
    """A pass over the next `n` tokens of each sequence; its logits, valid until the next one, and what is kept."""
    tokens = [t for s in slots.values() for t in s.tokens[s.n_seen : s.n_seen + n]]
    places = [p for s in slots.values() for p in range(s.n_seen, s.n_seen + n)]
    logits = base.eval(tokens, places, [seq for seq in slots for _ in range(n)])
    rows = rows_of(base.hidden(len(tokens)), logits, k)
    for i, slot in enumerate(slots.values()):
        slot.rows.append(rows[i * n : (i + 1) * n])
        slot.n_seen += n
    return logits, rows


def draw(logits: npt.NDArray[np.float32], top: npt.NDArray[np.int32], temp: float, u: float) -> int:
    """One token of a row: the most probable at temperature 0, else where `u` in [0, 1) falls.

    Args:
        top: the most probable tokens. The distribution is laid out with them first, so most draws end there.
    """
    if temp <= 0:
        return int(top[0])
    z = np.exp((logits - logits[top[0]]) / np.float32(temp))
    at = u * float(z.sum())
    sums = np.cumsum(z[top], dtype=np.float64)
    if at < sums[-1]:
        return int(top[np.searchsorted(sums, at, side="right")])
    z[top] = 0.0
    rest = sums[-1] + np.cumsum(z, dtype=np.float64)
    found = int(np.searchsorted(rest, at, side="right"))
    return found if found < len(z) else int(top[0])


def uniform(seed: int, index: int, position: int) -> float:
    """In [0, 1), the same for the same arguments: a text does not depend on what is written beside it."""
    digest = hashlib.blake2b(f"{seed} {index} {position}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2.0**56


def loops(tokens: Sequence[int]) -> bool:
    """The last LOOP tokens are one short text over and over."""
    if len(tokens) < LOOP or len(tokens) % 8:
        return False
    tail = tokens[-LOOP:]
    return any(tail[p:] == tail[:-p] for p in range(1, LONGEST_PERIOD + 1))
