"""Connections that may not cost what their clients please: a request must come, and its answer be read, in time.

uvicorn waits as long as a client likes for headers, bodies and readers, and for as many clients as there are. Here each
wait has an end, and where all connections are taken, the one that has been waiting longest for a request gives way.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512  # connections
OTHER_FILES = 128  # that a server has open
MAX_UNREAD_SECONDS = 60.0  # that an answer may lie unread; as long as the model would wait for its reader
NO_REQUEST = (h11.IDLE, h11.SEND_BODY)  # what a client does that is not through with its request
TOO_SLOW = "the request did not come in time (max_receive)"


def room() -> int:
    """How many connections there may be, with as many open files as the system allows."""
    if sys.platform == "win32":
        return MOST
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(16, min(MOST, soft - OTHER_FILES))
    return MOST


def protocol(max_receive: float, most: int) -> Callable[..., asyncio.Protocol]:
    """What uvicorn calls for every connection.

    Args:
        max_receive: seconds from the connection, or from the last answer on it, to the end of a request.
        most: connections at a time.
    """
    # in the order in which they began to
    waiting: dict[Connection, None] = {}  # for their request,
    unread: dict[Connection, None] = {}  # for their client to read

    def connect(*args: Any, **kwargs: Any) -> asyncio.Protocol:
        return Connection(max_receive, most, waiting, unread, *args, **kwargs)

    return connect


class Connection(H11Protocol):
    """uvicorn's, with ends to its waits."""

    def __init__(
        self, max_receive: float, most: int, waiting: dict[Connection, None], unread: dict[Connection, None],
        *args: Any, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self._max_receive, self._most, self._waiting, self._paused = max_receive, most, waiting, unread
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            first = next(iter(self._waiting), None) or next(iter(self._paused), None)
            if first is None:
                self._end(503, "all connections are taken; ask again later")
                return
            first.transport.abort()
            first.forget()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def timeout_keep_alive_handler(self) -> None:
        self.forget()
        super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused[self] = None
        self._unread = self.loop.call_later(MAX_UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused.pop(self, None)
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def forget(self) -> None:
        """It waits for no request any more."""
        self._waiting.pop(self, None)
        self._paused.pop(self, None)
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        self._late = self._unread = None

    def _look(self) -> None:
        """Whether it waits for its request, or for the rest of it, and since when."""
        if self.transport.is_closing():
            return
        if self.conn.their_state not in NO_REQUEST:
            self._waiting.pop(self, None)
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None:
            self._waiting[self] = None
            self._late = self.loop.call_later(self._max_receive, self._end, 408, TOO_SLOW)

    def _end(self, status: int, why: str) -> None:
        """Close, with a word where none was said yet."""
        self.forget()
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            body = why.encode()
            headers = [
                ("content-type", "text/plain"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
            ):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
