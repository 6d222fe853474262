"""One call at a time: who uses a model, without anybody waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import BusyError


class Use:
    """Held by the thread that is in a call, `with use: ...`; again by the same thread is fine.

    Nobody waits: a second thread gets an error. Generators hold it from one token to the next, never while they are
    suspended; so another generation may begin in between, after which `of` of the older turn raises.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turn = 0  # of the latest generation

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                "another thread is in a call of this model, which takes one at a time: wait, stop it with cancel(), "
                "or give each thread a Llama of its own"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def of_a_new_generation(self) -> Iterator[int]:
        """Hold it, for a generation that begins: yields its turn. The generations before are over."""
        with self:
            self._turn += 1
            yield self._turn

    @contextmanager
    def of(self, turn: int) -> Iterator[None]:
        """Hold it for the next token of a generation."""
        with self:
            if turn != self._turn:
                raise BusyError(
                    "this stream is over: another generation of the same model began after it; finish one before the "
                    "next, or give each a Llama of its own"
                )
            yield
