"""What a request may not have: all the time it wants, any depth, and a memory for what its client does not read."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from entmtp.serve.answer import PING, Pipe
from entmtp.serve.requests import ServedRequest
from helpers.serving import Server
from helpers.typed import DEMO

LONG: dict[str, Any] = {"max_tokens": 4000, "min_tokens": 4000, "temperature": 1.5}
SECONDS = 0.5


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--ctx", 4096, "--threads", 1, "--parallel", request.param, "--max-seconds", SECONDS
    ) as running:
        yield running


def test_an_answer_that_takes_too_long_ends(server: Server) -> None:
    with server.http() as http:
        body = {"prompt": "The sea", **LONG}
        begun = time.monotonic()
        whole = http.post("/v1/completions", json=body).json()["choices"][0]
        assert SECONDS <= time.monotonic() - begun < SECONDS + 10
        assert whole["finish_reason"] == "length" and whole["text"]
        streamed = http.post("/v1/completions", json={**body, "stream": True}).text
        *_, last, done = streamed.strip().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        several = http.post("/v1/completions", json={**body, "n": 3}).json()["choices"]
        assert [c["finish_reason"] for c in several] == ["length"] * 3
        # who waits does not lose of its own time
        short = http.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 4, "temperature": 0})
        assert short.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/api/chat"])
@pytest.mark.parametrize("depth", [150, 900, 50_000])
def test_json_that_is_deep(server: Server, path: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    with server.http() as http:
        answer = http.post(path, content=f'{{"prompt": "x", "messages": [], "tools": {deep}}}')
    assert answer.status_code == 400, answer.text
    assert "nested too deeply" in answer.text


def test_a_schema_that_is_deep_but_not_too_deep(server: Server) -> None:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(30):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    messages = [{"role": "user", "content": "Yes?"}]
    body = {"messages": messages, "max_tokens": 4, "response_format": form}
    with server.http() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_slow_reader_makes_the_writer_wait() -> None:
    async def read() -> None:
        pipe, written, served = Pipe(most=3), list[int](), ServedRequest("/")

        def write() -> None:
            for i in range(10):
                pipe.put(i, served)
                written.append(i)

        thread = threading.Thread(target=write)
        thread.start()
        await asyncio.sleep(0.3)
        assert written == [0, 1, 2]
        assert await pipe.get() == [0, 1, 2]
        await asyncio.sleep(0.3)
        assert written == [0, 1, 2, 3, 4, 5]
        served.stop("left")  # a reader who left keeps nobody
        await asyncio.to_thread(thread.join)
        found = []
        while len(found) < 7:
            found += await pipe.get()
        assert found == [3, 4, 5, 6, 7, 8, 9]

    asyncio.run(read())


def test_a_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entmtp.serve.answer.PING_AFTER", 0.1)

    async def read() -> list[Any]:
        pipe, quiet = Pipe(pings=True), Pipe()
        found = await pipe.get() + await pipe.get()
        pipe.put("text", ServedRequest("/"))
        found += await pipe.get()
        pipe.close()
        quiet.end(None)
        return [*found, *await quiet.get()]

    assert asyncio.run(read()) == [PING, PING, "text", None]


def test_no_event_is_lost_or_late() -> None:
    """A writer and a reader who meet in every order: each event comes once, and wakes a reader who waits for it."""

    async def read() -> None:
        pipe, served = Pipe(most=5), ServedRequest("/")
        thread = threading.Thread(target=lambda: [pipe.put(i, served) for i in range(20_000)])
        thread.start()
        found: list[int] = []
        while len(found) < 20_000:
            found += await asyncio.wait_for(pipe.get(), 60)
        assert found == list(range(20_000))
        await asyncio.to_thread(thread.join)

    asyncio.run(read())


def test_a_reader_who_stops_reading_does_not_keep_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entmtp.serve.answer.STALLED", 0.3)

    async def stall() -> ServedRequest:
        pipe, served = Pipe(most=1), ServedRequest("/")
        served.start()  # it has the model

        def write() -> None:
            pipe.put("read", served)
            pipe.put("never read", served)

        await asyncio.wait_for(asyncio.to_thread(write), 10)
        return served

    assert asyncio.run(stall()).stopped == "the client stopped reading"
