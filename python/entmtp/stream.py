"""A text that is being written by another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from .common.errors import EntmtpError


class Stream:
    """Pieces of a text as they come, for any number of readers, each from the beginning.

    Attributes:
        cancelled: nobody wants the text any more.
        finish_reason: why the text ended: `"stop"`, `"length"`, `"tool_calls"`; None while it is written, and where it
            was cancelled before it began.
        logprobs: of the pieces so far, where they were asked for, as `create_completion` (lists by token) or
            `create_chat_completion` (`content`) has them.
        tool_calls: what a chat that names a tool calls so far, as in a message of OpenAI's.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []
        self._cancel: Callable[[], None] | None = None
        self.cancelled = False
        self._done = False
        self._error: Exception | None = None
        self.finish_reason: str | None = None
        self.logprobs: dict[str, list[Any]] = {}
        self.tool_calls: list[dict[str, Any]] = []

    # -- for the writer --

    def follow(self, chunks: Iterator[dict[str, Any]], cancel: Callable[[], None]) -> None:
        """Write what `create_completion` or `create_chat_completion` streams; `cancel` stops it."""
        with self._changed:
            self._cancel = cancel
        try:
            for chunk in () if self.cancelled else chunks:
                choice = chunk["choices"][0]
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                for delta in choice.get("delta", {}).get("tool_calls") or ():
                    self._call(delta)
                self._add(piece, choice.get("finish_reason"), choice.get("logprobs") or {})
                if self.cancelled:
                    break
            if hasattr(chunks, "close"):
                chunks.close()
        except BaseException as e:  # readers must not take what there is for all of it
            self.fail(e)
            raise
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """The text cannot be written, or not to its end: readers get the error."""
        self._end(error if isinstance(error, Exception) else EntmtpError(f"the text was ended by {error!r}"))

    def _add(self, piece: str, finish_reason: str | None, logprobs: dict[str, Any]) -> None:
        with self._changed:
            for name, values in logprobs.items():
                if isinstance(values, list):
                    self.logprobs.setdefault(name, []).extend(values)
            if piece:
                self._pieces.append(piece)
            self.finish_reason = finish_reason or self.finish_reason
            self._wake()

    def _call(self, delta: dict[str, Any]) -> None:
        at = delta.get("index", 0)
        while len(self.tool_calls) <= at:
            function = {"name": delta["function"].get("name"), "arguments": ""}
            self.tool_calls.append({"id": delta.get("id"), "type": "function", "function": function})
        self.tool_calls[at]["function"]["arguments"] += delta["function"].get("arguments") or ""

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._cancel = None
            self._done = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            with suppress(RuntimeError):  # the loop of a reader that gave up is closed
                waker()

    # -- for readers --

    def cancel(self) -> None:
        """Stop writing; what was written stays."""
        with self._changed:
            self.cancelled = True
            if self._cancel is not None:
                self._cancel()
            else:  # it was not begun, or is over
                self._done = True
                self._wake()

    def __iter__(self) -> Iterator[str]:
        n, over = 0, False
        while not over:
            with self._changed:
                while len(self._pieces) == n and not self._done:
                    self._changed.wait()
                pieces, over = self._pieces[n:], self._done
            yield from pieces
            n += len(pieces)
        self._raise()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, n, over = asyncio.get_running_loop(), 0, False
        while not over:
            more = asyncio.Event()
            with self._changed:
                pieces, over = self._pieces[n:], self._done
                if not pieces and not over:
                    self._wakers.append(partial(loop.call_soon_threadsafe, more.set))
            for piece in pieces:
                yield piece
            n += len(pieces)
            if not pieces and not over:
                await more.wait()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    @property
    def text(self) -> str:
        """All of the text; waits until it is written."""
        return "".join(self)
