"""The requests that the server is busy with: who waits, who is answered, and how either is stopped.

`Requests` is ASGI middleware around the whole application. It sees a client leave before the application does, and
stops the answer within one pass of the model, streamed or not; a request that still waits is dropped. The application
itself is never told: its answer just ends early, so everything is cleaned up in the usual order.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio

from .errors import Refused, request_id

if TYPE_CHECKING:
    from ..llama import Llama
    from .details import Details

TOGETHER = 16  # bodies of the largest size that there is room for
SMALL = 16 << 10  # bytes of a body that need no room: those of all connections together are few megabytes
CLIENT_LEFT = "the client left"
# names that clients may give their requests: they come back in a header, and stand in the log
CALLED = re.compile(rb"[\x21-\x7e]{1,128}")
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
        expired: the answer has had its seconds, and was ended for that.
        at_end: the last token that was drawn is one that ends a text.
    """

    def __init__(self, path: str, max_seconds: float | None = None):
        self.path, self.max_seconds = path, max_seconds
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.stopped: str | None = None
        self.expired = self.at_end = False
        self.status: int | None = None  # of the response, once that has begun
        self.streams = False  # the response comes piece by piece
        self.error_event: Callable[[Refused], bytes] = lambda refused: refused.event(path)
        self.complete = False
        self.n_same = 1  # answers to each prompt
        self.details: Details | None = None  # for a client that asks for them
        self.n_prompt = self.n_tokens = 0  # so far
        self.scope = anyio.CancelScope()
        self._timer: asyncio.TimerHandle | None = None
        self._llama: Llama | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """The request has the model; in the event loop."""
        if self.started is None:
            self.started = time.perf_counter()
            if self.max_seconds is not None:
                self._timer = asyncio.get_running_loop().call_later(self.max_seconds, self._expire)

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._llama is not None:
                self._llama.cancel()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them: a prompt once, however many answers it gets."""
        n_prompt = self.n_prompt // self.n_same
        return {
            "prompt_tokens": n_prompt, "completion_tokens": self.n_tokens, "total_tokens": n_prompt + self.n_tokens
        }  # fmt: skip

    @property
    def over(self) -> bool:
        """Nothing more is to be written."""
        return self.expired or self.stopped is not None

    def mark_first_token(self) -> None:
        self.first_token = self.first_token or time.perf_counter()

    @contextmanager
    def generating(self, llama: Llama) -> Iterator[None]:
        """While `llama` writes the answer, `stop` cancels it; called in the thread that writes."""
        with self._lock:
            self._llama = llama
            llama.unwanted = lambda: self.over
        try:
            yield
        finally:
            with self._lock:  # the next answer of this model must not be hit
                self._llama = llama.unwanted = None

    def stop(self, why: str) -> None:
        """End the answer within one pass of the model, or give up the place in the queue; in the event loop."""
        with self._lock:
            self.stopped = self.stopped or why
            if self._llama is not None:
                self._llama.cancel()
        if self.started is None:
            self.scope.cancel()


current: ContextVar[ServedRequest | None] = ContextVar("current", default=None)


NOT_OURS = (
    "this server has no key and answers pages of this machine alone; call it localhost, or start it with --api-key, "
    "--cors or --allowed-hosts"
)


class Requests:
    """Middleware that knows all requests under way.

    Args:
        app: the application.
        finished: called with every request at its end.
        may_ask: whether a request, by its ASGI scope, has the key.
        max_body: bytes of a request.
        max_waiting: requests that may wait.
        max_seconds: of an answer, once the model writes it; None: no limit.
        log: called with a line about every request that was answered.
        parallel: requests that are answered at a time.
        around: middleware for all answers, refusals too.
        may_call: whether a page may have sent a request, by its ASGI scope.
        root_path: what paths may begin with.
    """

    def __init__(
        self, app: App, finished: Callable[[ServedRequest], None], may_ask: Callable[[Message], bool],
        max_body: int, max_waiting: int, max_seconds: float | None, log: Callable[[str], None] | None = None,
        parallel: int = 1, around: Callable[[App], App] = lambda app: app,
        may_call: Callable[[Message], bool] = lambda scope: True, root_path: str = "",
    ):  # fmt: skip
        self.app, self.log = app, log
        self.most = parallel + max_waiting
        self.entry = around(self._take)
        self.may_call, self.root_path = may_call, root_path.rstrip("/")
        self.finished = finished
        self.may_ask = may_ask
        self.max_body, self.max_seconds = max_body, max_seconds
        self.coming: set[ServedRequest] = set()  # their bodies are not there yet
        self.busy: set[ServedRequest] = set()
        self.n_bytes = 0  # of the bodies that are there
        self.closing = False

    def waiting(self) -> int:
        return sum(request.started is None for request in self.busy)

    def running(self) -> int:
        return len(self.busy) - self.waiting()

    def stop_all(self) -> None:
        """Stop every answer, and refuse what comes from now on."""
        self.closing = True
        for request in self.busy | self.coming:
            request.stop(SHUTTING_DOWN)

    async def __call__(self, scope: Message, receive: App, send: App) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, begun = called(scope), time.perf_counter()
        statuses: list[int] = []
        token = request_id.set(name)
        try:
            await self.entry(scope, receive, _named(send, name, statuses))
        finally:
            request_id.reset(token)
            if self.log is not None:
                status = statuses[0] if statuses else "-"
                path = scope["raw_path"].decode("latin-1")  # as it came: what is quoted in it breaks no line
                seconds = time.perf_counter() - begun
                self.log(f"{scope['method']} {path} {status} {seconds:.3f} s {name}")

    async def _take(self, scope: Message, receive: App, send: App) -> None:
        path = scope["path"]
        if path.startswith(f"{self.root_path}/"):
            path = path.removeprefix(self.root_path)
        if not self.may_call(scope):
            await _answer(send, Refused(NOT_OURS, status=403), path)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = ServedRequest(path, self.max_seconds)
        room = Room(self)
        try:
            await self._serve(scope, receive, send, request, room)
        finally:
            room.give_back()

    async def _serve(
        self, scope: Message, receive: App, send: App, request: ServedRequest, room: Room
    ) -> None:
        path = request.path
        body = None
        try:
            if not self.may_ask(scope):  # before its body is read
                raise Refused("Invalid API key", status=401)
            self.coming.add(request)
            with request.scope:
                body = await read_body(receive, self.max_body, room.take)
            if request.stopped or self.closing:
                raise shutting_down()
            if body is None:
                return  # left before it had asked
            if len(self.busy) >= self.most:
                raise Refused("too many requests wait for the model; ask again later", status=429)
        except Refused as e:
            request.status, request.complete = e.status, True
            await _answer(send, e, path)
            self.finished(request)
            return
        finally:
            self.coming.discard(request)
        request.scope = anyio.CancelScope()
        self.busy.add(request)
        token = current.set(request)
        watch = asyncio.create_task(self._watch(request, receive))
        try:
            with request.scope:
                await self.app(scope, _replay(body), _observed(request, send))
            if request.stopped == SHUTTING_DOWN and not request.complete:
                await _refuse(request, send)
        finally:
            watch.cancel()
            request.end()
            current.reset(token)
            self.busy.discard(request)
            self.finished(request)

    async def _watch(self, request: ServedRequest, receive: App) -> None:
        await receive()  # after the body comes nothing but the disconnect
        if not request.complete:
            request.stop(CLIENT_LEFT)


def called(scope: Message) -> str:
    """The request's name: the client's own, where it gives one that can be, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode("ascii") if CALLED.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _named(send: App, name: str, statuses: list[int]) -> App:
    """With the request's name among the headers: OpenAI's clients look for one, Anthropic's for the other."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
            headers = [(key, name.encode()) for key in (b"x-request-id", b"request-id")]
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return named


class Room:
    """What the body of a request takes of the memory that there is for all: its bytes after the first `SMALL`.

    So clients that send large bodies slowly keep nobody out who asks in few words.
    """

    def __init__(self, requests: Requests):
        self.requests, self.n_bytes = requests, 0
        self.n_free = SMALL

    def take(self, n: int) -> None:
        """
        Raises:
            Refused: the bodies of others have taken all.
        """
        free = min(n, self.n_free)
        self.n_free -= free
        n -= free
        if n and self.requests.n_bytes + n > TOGETHER * self.requests.max_body:
            raise Refused("too many large requests at a time; ask again later", status=429)
        self.requests.n_bytes += n
        self.n_bytes += n

    def give_back(self) -> None:
        self.requests.n_bytes -= self.n_bytes
        self.n_bytes = 0


async def read_body(receive: App, most: int, take: Callable[[int], None]) -> bytes | None:
    """The body of a request; None if the client left.

    Args:
        take: called with the bytes of each part.

    Raises:
        Refused: it is larger than `most` bytes, or there is no room for it; the rest is not read.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        if len(body) + len(part) > most:
            raise Refused(f"the body of the request is larger than {most} bytes (max_body)", status=413)
        take(len(part))
        body += part
        if not message.get("more_body", False):
            return bytes(body)


def shutting_down() -> Refused:
    return Refused(f"{SHUTTING_DOWN}; ask again when it is back", status=503)


async def _answer(send: App, refused: Refused, path: str) -> None:
    body = json.dumps(refused.content(path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes) -> App:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await anyio.sleep_forever()
        raise AssertionError

    return receive


def _observed(request: ServedRequest, send: App) -> App:
    async def observed(message: Message) -> None:
        cut = request.stopped == SHUTTING_DOWN
        if message["type"] == "http.response.start":
            if cut:
                return  # half an answer must not pass for a whole one
            request.status = message["status"]
        elif message["type"] == "http.response.body":
            if cut and (request.status is None or request.streams):
                return
            request.complete = not message.get("more_body", False)
        await send(message)

    return observed


async def _refuse(request: ServedRequest, send: App) -> None:
    """Tell a client that the answer was stopped: by the status, or where that is sent, by an event of the stream."""
    refused = shutting_down()
    if request.status is None:
        request.status = 503
        await _answer(send, refused, request.path)
    elif request.streams:
        await send({"type": "http.response.body", "body": request.error_event(refused)})
    else:
        return  # cut within the body, whose length tells
    request.complete = True
