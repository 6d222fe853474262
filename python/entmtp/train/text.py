"""Training text: what jobs give, written and kept until there is enough.

Heads guess what the base model will say, so the best text is its own: it answers the user's prompts, continues the
beginnings of the user's documents, or, without any data, asks itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from ..common.errors import ModelError
from .base import Base
from .jobs import Job
from .states import Store
from .writing import Written, write

SAVE_EVERY = (
    15.0  # seconds: so much is lost at most when the process is killed, and what sequences were halfway
)
SHORTEST = 8  # tokens of a sequence that is kept


def gather(
    base: Base, jobs: Iterator[Job], n_tokens: int, store: Store, seed: int, advance: Callable[[int], None]
) -> None:
    """Fill a store with sequences of at least `n_tokens` tokens in all. An interrupted run goes on.

    Of equal sequences one is kept.

    Args:
        advance: called with the number of tokens so far; those that are being written count.
    """
    known = {shard[i].tobytes() for shard in store.shards for i in range(len(shard.lengths))}

    def show(n_busy: int) -> None:
        n_waiting = sum(len(w.tokens) for w in waiting.values())
        advance(min(store.n_tokens + n_waiting + n_busy, n_tokens))

    waiting: dict[int, Written] = {}
    show(0)
    if store.n_tokens >= n_tokens:
        return
    first = upcoming = store.upcoming
    rest = islice(jobs, first, None)  # what was written before is passed over
    saved = time.monotonic()
    try:
        for sequence in write(base, rest, first, seed, store.layout.k, show):
            waiting[sequence.number] = sequence
            while upcoming in waiting:  # in the order of the jobs
                new = waiting.pop(upcoming)
                upcoming += 1
                key = np.array(new.tokens, dtype=np.int32).tobytes()
                if key not in known and len(new.tokens) >= SHORTEST:
                    known.add(key)
                    store.add(new)
            if time.monotonic() - saved > SAVE_EVERY:
                store.save(upcoming)
                saved = time.monotonic()
            if store.n_tokens >= n_tokens:
                break
            if upcoming - first > 64 and upcoming > 16 * len(known):
                raise ModelError(
                    "the base model writes the same text over and over; give --data, or higher --temps"
                )
    finally:
        store.save(upcoming)
