"""The requests that the server is busy with: who waits, who is answered, and how either is stopped.

`Requests` is ASGI middleware around the whole application. It sees a client leave before the application does, and
stops the answer within one pass of the model, streamed or not; a request that still waits is dropped. The application
itself is never told: its answer just ends early, so everything is cleaned up in the usual order.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio

from . import responses
from .asked import CHAT, Asked, Refused, read

if TYPE_CHECKING:
    from ..llama import Llama

CLIENT_LEFT = "the client left"
SHUTTING_DOWN = "the server is shutting down"

App = Callable[..., Any]
Message = dict[str, Any]


class ServedRequest:
    """One request. Times are of `time.perf_counter`, None until it has come to that.

    Attributes:
        started: it has the model; before, it waits.
        first_token: the first token of the answer was drawn.
        n_prompt, n_tokens: of the prompts, and of the answers.
        stopped: why nobody wants the answer any more.
    """

    def __init__(self, path: str):
        self.path = path
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.stopped: str | None = None
        self.status: int | None = None  # of the response, once that has begun
        self.failed: int | None = None  # the status that the answer deserves
        self.streams = False  # the response is one of server-sent events
        self.complete = False
        self.asked = Asked()
        self.n_prompt = self.n_tokens = 0  # so far
        self.scope = anyio.CancelScope()
        self._llama: Llama | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """The request has the model."""
        self.started = self.started or time.perf_counter()

    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them: a prompt once, however many answers it gets."""
        n_prompt = self.n_prompt // self.asked.n_same
        return {
            "prompt_tokens": n_prompt, "completion_tokens": self.n_tokens, "total_tokens": n_prompt + self.n_tokens
        }  # fmt: skip

    def mark_first_token(self) -> None:
        self.first_token = self.first_token or time.perf_counter()

    @contextmanager
    def generating(self, llama: Llama) -> Iterator[None]:
        """While `llama` writes the answer, `stop` cancels it; called in the thread that writes."""
        with self._lock:
            self._llama = llama
        try:
            yield
        finally:
            with self._lock:  # the next answer of this model must not be hit
                self._llama = None

    def stop(self, why: str) -> None:
        """End the answer within one pass of the model, or give up the place in the queue; in the event loop."""
        with self._lock:
            self.stopped = self.stopped or why
            if self._llama is not None:
                self._llama.cancel()
        if self.started is None:
            self.scope.cancel()


current: ContextVar[ServedRequest | None] = ContextVar("current", default=None)


class Requests:
    """Middleware that knows all requests under way.

    Args:
        app: the application.
        finished: called with every request at its end.
        may_ask: whether a request, by its ASGI scope, has the key.
        max_body: bytes of a request.
        max_waiting: requests that may wait.
    """

    def __init__(
        self, app: App, finished: Callable[[ServedRequest], None], may_ask: Callable[[Message], bool],
        max_body: int, max_waiting: int,
    ):  # fmt: skip
        self.app = app
        self.finished = finished
        self.may_ask = may_ask
        self.max_body, self.max_waiting = max_body, max_waiting
        self.busy: set[ServedRequest] = set()
        self.closing = False

    def waiting(self) -> int:
        return sum(request.started is None for request in self.busy)

    def running(self) -> int:
        return len(self.busy) - self.waiting()

    def stop_all(self) -> None:
        """Stop every answer, and refuse what comes from now on."""
        self.closing = True
        for request in self.busy:
            request.stop(SHUTTING_DOWN)

    async def __call__(self, scope: Message, receive: App, send: App) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = ServedRequest(scope["path"].removeprefix(scope.get("root_path", "")))
        try:
            if not self.may_ask(scope):  # before its body is read
                raise Refused("Invalid API key", status=401)
            if (body := await read_body(receive, self.max_body)) is None:
                return  # left before it had asked
            if self.waiting() >= self.max_waiting:
                raise Refused("too many requests wait for the model; ask again later", status=429)
            if request.path == responses.PATH:
                body, asked = responses.to_chat(body)
                send = responses.translated(asked, send)
                scope = {**scope, "path": scope.get("root_path", "") + CHAT, "raw_path": CHAT.encode()}
            body, request.asked = read(scope["path"].removeprefix(scope.get("root_path", "")), body)
        except Refused as e:
            request.status, request.complete = e.status, True
            await _answer(send, e)
            self.finished(request)
            return
        if self.closing:
            request.stop(SHUTTING_DOWN)
        self.busy.add(request)
        token = current.set(request)
        watch = asyncio.create_task(self._watch(request, receive))
        try:
            with request.scope:
                await self.app(_with_length(scope, body), _replay(body), _observed(request, send))
            if request.stopped == SHUTTING_DOWN and not request.complete:
                await _refuse(request, send)
        finally:
            watch.cancel()
            current.reset(token)
            self.busy.discard(request)
            self.finished(request)

    async def _watch(self, request: ServedRequest, receive: App) -> None:
        await receive()  # after the body comes nothing but the disconnect
        if not request.complete:
            request.stop(CLIENT_LEFT)


async def read_body(receive: App, most: int) -> bytes | None:
    """The body of a request; None if the client left.

    Raises:
        Refused: it is larger than `most` bytes; the rest is not read.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            raise Refused(f"the body of the request is larger than {most} bytes (max_body)", status=413)
        if not message.get("more_body", False):
            return bytes(body)


async def _answer(send: App, refused: Refused) -> None:
    body = refused.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_length(scope: Message, body: bytes) -> Message:
    headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _replay(body: bytes) -> App:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await anyio.sleep_forever()
        raise AssertionError

    return receive


def _observed(request: ServedRequest, send: App) -> App:
    held: Message | None = None  # the start of a stream, until its first event tells how it went

    async def observed(message: Message) -> None:
        nonlocal held
        cut = request.stopped == SHUTTING_DOWN
        if message["type"] == "http.response.start":
            if cut:
                return  # half an answer must not pass for a whole one
            if any(value.startswith(b"text/event-stream") for _, value in message["headers"]):
                held = message
                return
            request.status = message["status"]
        elif message["type"] == "http.response.body":
            if held is not None and request.failed is not None:
                held = None
                await _fail(request, send, message.get("body", b""))
                return
            if request.failed is not None and request.complete:
                return  # the rest of a stream that was never begun
            if cut and (request.status is None or request.streams):
                return
            if held is not None:
                started, held = held, None
                request.status, request.streams = started["status"], True
                await send(started)
            request.complete = not message.get("more_body", False)
        await send(message)

    return observed


async def _fail(request: ServedRequest, send: App, event: bytes) -> None:
    """The error that would be the first event of a stream, as a response of its own."""
    assert request.failed is not None
    body = event.partition(b"\n")[0].removeprefix(b"data: ")
    request.status, request.complete = request.failed, True
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": request.failed, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(request: ServedRequest, send: App) -> None:
    """Tell a client that the answer was stopped: by the status, or where that is sent, by an event of the stream."""
    text = f"{SHUTTING_DOWN}; ask again when it is back"
    error = {"error": {"message": text, "type": "server_error", "param": None, "code": None}}
    body = json.dumps(error).encode()
    if request.streams:
        body = b"data: " + body + b"\n\n"
    elif request.status is not None:
        return  # cut within the body, whose length tells
    else:
        request.status = 503
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
    request.complete = True
    await send({"type": "http.response.body", "body": body})
