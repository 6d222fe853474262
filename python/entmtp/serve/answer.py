"""An answer, written by a thread of the model and read by a client: at once, or piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

import anyio
from fastapi import Response
from fastapi.responses import JSONResponse

from . import calls, written
from .asked import Asked, Chat
from .details import Details
from .errors import Refused, worded
from .model import Models
from .requests import ServedRequest

MOST_UNREAD = 4096  # events; a client who reads slower than that makes the model wait
# seconds that it may wait, and more for every event; then the client is taken for gone, and the model is free
STALLED, PATIENCE = 60.0, 0.05
PING_AFTER = 15.0  # seconds without an event, after which a comment keeps the connection open
PING = b": ping\n\n"


ENCODER = json.JSONEncoder(default=float)  # with logits_all logprobs are numpy's numbers


def dump(value: Any) -> bytes:
    """JSON."""
    return ENCODER.encode(value).encode()


class Form(Protocol):
    """How an API words an answer; made for each request."""

    media_type: str

    def begin(self) -> Iterator[bytes]: ...
    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]: ...
    def end(self) -> Iterator[bytes]: ...
    def error(self, refused: Refused) -> bytes: ...
    def whole(self, answer: dict[str, Any]) -> dict[str, Any]: ...


class OpenAI:
    """Chats and texts in OpenAI's form, which is llama-cpp-python's own."""

    media_type = "text/event-stream"

    def __init__(self, asked: dict[str, Any], served: ServedRequest):
        self.path = served.path

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        yield b"data: " + dump(chunk) + b"\n\n"

    def end(self) -> Iterator[bytes]:
        yield b"data: [DONE]\n\n"

    def error(self, refused: Refused) -> bytes:
        return refused.event(self.path)

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer


class Threads:
    """As many threads as there are answers at a time.

    In a larger pool every thread would get an OpenMP team and a heap of its own: 16 clients cost 50 MB in 100,000
    tokens.
    """

    def __init__(self, n: int):
        self._pool = ThreadPoolExecutor(n, thread_name_prefix="model")

    async def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run what uses a model; a cancellation waits for it."""
        work = partial(copy_context().run, call, *args)
        with anyio.CancelScope(shield=True):
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _calls(llama: Any, asked: Asked, stream: bool) -> Iterator[Any]:
    """What writes each of the answers, when it is called."""
    create = llama.create_chat_completion if isinstance(asked.body, Chat) else llama.create_completion
    for named in asked.of_choices(llama):
        yield partial(create, **{**named, "model": llama.alias, "stream": stream})


def _finish(choice: dict[str, Any], index: int, asked: Asked, begun: dict[str, str]) -> None:
    choice["index"] = index
    if isinstance(asked.body, Chat):
        calls.tidy(choice, asked.body.functions is not None, begun)


def _tells_prompt(llama: Any, named: dict[str, Any]) -> bool:
    """An answer begins with its prompt, which has a text."""
    prompt = named.get("prompt") or ""
    return bool(named.get("echo") and (prompt if isinstance(prompt, str) else llama.detokenize(prompt)))


def _cut(chunk: dict[str, Any], index: int) -> dict[str, Any]:
    """The end of an answer that gives way to another request, behind the last chunk."""
    choice = {**chunk["choices"][0], "index": index, "finish_reason": "length", "logprobs": None}
    choice["text" if "text" in choice else "delta"] = "" if "text" in choice else {}
    return {**{key: value for key, value in chunk.items() if key != "entmtp"}, "choices": [choice]}


def write_whole(llama: Any, asked: Asked, served: ServedRequest) -> dict[str, Any]:
    """One answer with all choices that the request wants; in a thread of the model."""
    answer: dict[str, Any] = {}
    for index, create in enumerate(_calls(llama, asked, False)):
        one = create()
        if isinstance(asked.body, Chat):
            written.whole(one["choices"][0], asked.functions)
        _finish(one["choices"][0], index, asked, {})
        if answer:
            answer["choices"] += one["choices"]
            answer["usage"] = served.usage()
        else:
            answer = one
        if served.stopped:
            break
    return answer


class Pipe:
    """Events from a thread to the event loop; the thread waits where `most` of them are unread.

    The loop is woken once for all events that come before it looks. With `pings` a silence has an event of its own.
    """

    def __init__(self, most: int = MOST_UNREAD, pings: bool = False):
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(most)
        self._events: deque[Any] = deque()
        self._ready = asyncio.Event()
        self._woken = False  # or about to be
        self._waited, self._n_put = 0.0, 0  # seconds for the client, and events
        self._last = self._loop.time()
        self._timer = self._loop.call_later(PING_AFTER, self._ping) if pings else None

    def put(self, event: Any, served: ServedRequest) -> None:
        """In the thread; the rest of an answer that is over does not wait."""
        begun = time.monotonic()
        while not self._room.acquire(timeout=0.1) and not served.over:
            if self._waited + time.monotonic() - begun > STALLED + PATIENCE * self._n_put:
                served.stop("the client stopped reading")
        self._waited += time.monotonic() - begun
        self._n_put += 1
        self._events.append(event)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._ready.set)

    def end(self, event: Any) -> None:
        """In the event loop: the last event, for which there is always room."""
        self._events.append(event)
        self._ready.set()

    async def get(self) -> list[Any]:
        """All events that are there, once there is one: fewer, larger writes."""
        self._woken = False  # before it looks: what comes from now on wakes it again
        while not self._events:
            await self._ready.wait()
            self._ready.clear()
            self._woken = False
        events = [self._events.popleft() for _ in range(len(self._events))]
        self._room.release(len(events))
        self._last = self._loop.time()
        return events

    def _ping(self) -> None:
        idle = self._loop.time() - self._last
        if idle >= PING_AFTER:
            self.end(PING)
            idle = 0.0
        self._timer = self._loop.call_later(PING_AFTER - idle, self._ping)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Streamed(Response):
    """An answer piece by piece; an error before the first piece is a response of its own.

    The whole answer is written in one thread, and what is ready is sent together: a change of threads per token would
    cost more than the token's own Python code. The model is free as soon as the answer is written; the answer's
    generator is closed before that, for its clean-up touches the model.
    """

    def __init__(
        self, models: Models, threads: Threads, asked: Asked, form: Form, served: ServedRequest, ping: bool
    ):
        super().__init__(media_type=form.media_type)
        self.models, self.threads, self.asked, self.form, self.served = models, threads, asked, form, served
        self.ping = ping and form.media_type == "text/event-stream"
        served.error_event, served.streams = form.error, True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.pipe = Pipe(pings=self.ping)
        try:
            await self._send(scope, receive, send)
        finally:
            self.pipe.close()

    async def _send(self, scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._answer)
            begun, more = False, True
            while more:
                events = await self.pipe.get()
                more = events[-1] is not None and not isinstance(events[-1], Refused)
                if not begun and isinstance(events[0], Refused):
                    refused = events[0]
                    self.served.streams = False
                    await JSONResponse(refused.content(self.served.path), refused.status)(
                        scope, receive, send
                    )
                    return
                head = (
                    b"" if begun else b"".join(self.form.begin())
                )  # before the rest: forms number their events
                data = head + b"".join(self._worded(events))
                if not begun:
                    begun = True
                    headers = [
                        (b"content-type", self.form.media_type.encode()),
                        (b"cache-control", b"no-store"),
                    ]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if not self.served.stopped:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _worded(self, events: list[Any]) -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Refused):
                yield self.form.error(event)
            elif event is None:
                yield from self.form.end()
            elif isinstance(event, bytes):
                yield event
            else:
                yield from self.form.add(event)

    async def _answer(self) -> None:
        try:
            async with self.models.turn(self.asked.body.model, self.threads.run) as llama:
                await self.threads.run(self._write, llama)
            self.pipe.end(None)
        except Exception as e:
            self.pipe.end(worded(e))

    def _write(self, llama: Any) -> None:
        served, functions, chunk = self.served, self.asked.functions, dict[str, Any]()
        same: dict[str, Any] = {}  # in all chunks of a request
        is_cut = False
        chat = isinstance(self.asked.body, Chat)
        if self.asked.body.entmtp:
            served.details = Details(self.models.passes)

        for index, create in enumerate(_calls(llama, self.asked, True)):
            begun = dict[str, str]()
            is_prompt = _tells_prompt(llama, create.keywords)  # the first piece
            with contextlib.closing(create()) as chunks:
                for chunk in written.streamed(chunks, functions) if chat else chunks:
                    _finish(chunk["choices"][0], index, self.asked, begun)
                    same = same or {key: chunk[key] for key in ("id", "created")}
                    chunk = {**chunk, **same}
                    if served.details is not None:
                        served.details.add_to(chunk, is_prompt)
                    is_prompt = False
                    self.pipe.put(chunk, served)
                    if is_cut := self.models.interrupted():
                        break
            if served.stopped:
                return
            if is_cut:
                first = index + (chunk["choices"][0]["finish_reason"] is not None)
                for left in range(first, len(self.asked.choices)):
                    self.pipe.put(_cut(chunk, left), served)
                break
        if self.asked.include_usage:
            rest = {k: v for k, v in chunk.items() if k != "entmtp"}
            self.pipe.put({**rest, "choices": [], "usage": served.usage()}, served)
