"""Ends to what a connection may wait for, over real sockets, with an application that waits or writes as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from entmtp.serve import connections

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """Writes megabytes, or nothing until it may go on."""

    def __init__(self, megabytes: int):
        self.megabytes = megabytes
        self.left, self.go_on = threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while not self.megabytes and not self.go_on.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self.megabytes):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})
        self.left.set()


@contextlib.contextmanager
def served(app: App, most: int = 100) -> Iterator[int]:
    """The application on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, http=connections.protocol(60.0, most), ws="none", lifespan="off", log_level="warning",  # type: ignore[arg-type]
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            app.go_on.set()
            server.should_exit = True
            thread.join(30)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def test_an_answer_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_UNREAD_SECONDS", 0.3)
    app = App(megabytes=200)  # more than what the system keeps for a socket
    with served(app) as port, connect(port) as client:
        client.sendall(GET)
        assert app.left.wait(30)  # what it still had to write went nowhere
        with contextlib.suppress(ConnectionError):
            n = 0
            while part := client.recv(1 << 20):
                n += len(part)
            assert n < 200 << 20


def test_who_has_waited_longest_gives_way() -> None:
    app = App(megabytes=0)
    with served(app, most=2) as port, connect(port) as first, connect(port) as second:
        second.sendall(GET)
        with connect(port) as third:
            third.sendall(GET)
            with contextlib.suppress(ConnectionError):
                assert first.recv(100) == b""  # it had asked for nothing
            with connect(port) as fourth:
                assert fourth.recv(100).startswith(b"HTTP/1.1 503 ")  # all others are being answered
            app.go_on.set()
            for client in (second, third):
                assert client.recv(100).startswith(b"HTTP/1.1 200 ")
