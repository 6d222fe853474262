"""One call at a time: who uses a model, without anybody waiting."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CLOSED, BusyError, ClosedError

OWNER = re.compile(r"owner=([1-9]\d*)")  # of a lock that is held, as it is written
PACKAGES = (__name__.partition(".")[0], "llama_cpp")
_retaking = threading.Lock()


class Use:
    """Held by the thread that is in a call, `with use: ...`; again by the same thread is fine.

    Nobody waits: a second thread gets an error, and so does what the user's own code calls while a token is drawn
    (`lent`). Generators hold it from one token to the next, never while they are suspended; so another generation may
    begin in between, after which `of` of the older turn raises.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turn = 0  # of the latest generation
        self._lent = False
        self.ended = False

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False) and not self._retaken():
            raise BusyError(
                "another thread is in a call of this model, which takes one at a time: wait, stop it with cancel(), "
                "or give each thread a Llama of its own"
            )
        if self._lent or self.ended:
            self._lock.release()
            if self.ended:
                raise ClosedError(CLOSED)
            raise BusyError("this model is drawing a token: what changes its logits cannot call it meanwhile")

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _retaken(self) -> bool:
        """Take it where nobody is in a call any more: a Ctrl-C at the very moment when a call began or ended leaves it
        held. Then its thread runs no code of this package."""
        with _retaking:
            lock, held = self._lock, repr(self._lock)
            owner = OWNER.search(held)
            frame = sys._current_frames().get(int(owner[1])) if owner else None
            while owner and frame is not None:
                if str(frame.f_globals.get("__name__", "")).partition(".")[0] in PACKAGES:
                    return False
                frame = frame.f_back
            if owner and repr(lock) == held:
                self._lock = threading.RLock()
            return self._lock.acquire(blocking=False)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While it is held: what calls the model now is called by it."""
        self._lent = True
        try:
            yield
        finally:
            self._lent = False

    def begin(self) -> None:
        """While it is held: the text is another one, and generations before are over."""
        self._turn += 1

    def end(self) -> None:
        """While it is held: there is nothing to call any more."""
        self.ended = True

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
                    "this stream is over: another generation of the same model began after it, or the model was reset; "
                    "finish one before the next, or give each a Llama of its own"
                )
            yield
