"""Clients who mean no good: each gets a clear status, memory stays bounded, and others are served meanwhile."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from entmtp.serve.errors import Refused
from entmtp.serve.requests import SMALL, TOGETHER, Requests, Room
from helpers.hostile import EQUAL_WAYS, FIELDS, GRAMMARS, SCHEMAS, Raw, resident
from helpers.serving import Server
from helpers.settings import LEEWAY
from helpers.typed import DEMO

ASK: dict[str, Any] = {"prompt": "The sea", "max_tokens": 8, "temperature": 0}
MAX_RECEIVE = 1.0  # seconds
# MB that a server of the toy may come to in all of this; it begins with 110, and 231 were measured
MEMORY = 400.0 * LEEWAY
ANSWERED = (200, 400)


OPTIONS = ("--model", DEMO, "--ctx", 1024, "--threads", 1)


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    limits = ("--max-receive", MAX_RECEIVE, "--max-body", 2 << 20)
    with Server(*OPTIONS, "--parallel", request.param, *limits) as running:
        yield running
        print(f"\nat most {peak(running):.0f} MB")  # with pytest -s
        assert peak(running) < MEMORY
        code, stderr = running.stop(signal.SIGTERM)
        assert code == 0, stderr
        assert "Traceback" not in stderr, stderr


def peak(server: Server) -> float:
    """The most memory that the server has had, MB; what it has now where the system does not tell."""
    if sys.platform != "linux":
        return resident(server)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def ask(server: Server) -> str:
    """An honest question."""
    with server.http() as http:
        answer = http.post("/v1/completions", json=ASK)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    return ask(server)


def told(answer: httpx.Response, name: str) -> None:
    assert answer.status_code in ANSWERED, (name, answer.status_code, answer.text[:300])
    if answer.status_code == 400:
        assert 10 < len(answer.json()["error"]["message"]) < 1000


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_grammar_that_leads_to_too_much(server: Server, expected: str, name: str) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={**ASK, "grammar": GRAMMARS[name], "max_tokens": 40})
        assert answer.status_code == 400, (name, answer.status_code, answer.text[:300])
        assert "grammar" in answer.json()["error"]["message"]
        streamed = http.post("/v1/completions", json={**ASK, "grammar": GRAMMARS[name], "stream": True})
        assert streamed.status_code == 400 or '"error"' in streamed.text
    assert ask(server) == expected


def test_a_grammar_without_drafts() -> None:
    """llama-cpp-python's own way to sample, where an exception of llama.cpp's would end the process."""
    with Server(*OPTIONS, "--draft", "off") as server, server.http() as http:
        before = ask(server)
        for name in ("what no token says", "the same behind a letter"):
            answer = http.post("/v1/completions", json={**ASK, "grammar": GRAMMARS[name]})
            assert answer.status_code == 400 and "grammar" in answer.text
        assert ask(server) == before


def test_a_grammar_of_equal_ways(server: Server) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={**ASK, "grammar": EQUAL_WAYS})
    assert answer.json()["choices"][0]["text"] == "a"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_leads_to_too_much(server: Server, expected: str, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[name]}}
    messages = [{"role": "user", "content": "Yes?"}]
    choice = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    for how in ({"response_format": form}, choice):
        with server.http() as http:
            answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8, **how})
        assert answer.status_code == 400, (name, answer.text[:300])
        told(answer, name)
    assert ask(server) == expected


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_too_much(server: Server, name: str) -> None:
    fields = {"prompt": b'"The sea"', "max_tokens": b"4", name.strip(): FIELDS[name]}
    body = b"{" + b",".join(b'"%s":%s' % (k.encode(), v) for k, v in fields.items()) + b"}"
    with server.http() as http:
        answer = http.post("/v1/completions", content=body)
    assert answer.status_code == 400, (answer.status_code, answer.text[:300])
    told(answer, name)


@pytest.mark.parametrize("token", [-1, 4096, 10**12, 10**30])
def test_tokens_that_are_none(server: Server, token: int) -> None:
    with server.http() as http:
        answers = [
            http.post("/detokenize", json={"tokens": [1, token]}),
            http.post("/v1/completions", json={**ASK, "prompt": [1, token]}),
        ]
    for answer in answers:
        assert answer.status_code == 400, answer.text


def test_prompts_that_cannot_fit(server: Server, expected: str) -> None:
    with server.http() as http:
        for prompt in ("word " * 100_000, "x" * 1_900_000, [[5] * 100_000]):
            answer = http.post("/v1/completions", json={**ASK, "prompt": prompt})
            assert answer.status_code == 400, answer.text[:300]
            assert "context" in answer.json()["error"]["message"]
        messages = [{"role": "user", "content": "word " * 100_000}]
        for path in ("/v1/chat/completions", "/api/chat"):
            answer = http.post(path, json={"messages": messages, "max_tokens": 4, "stream": True})
            assert answer.status_code == 400 and "context" in answer.text, answer.text[:300]
    assert ask(server) == expected


def test_a_hundred_megabytes(server: Server) -> None:
    raw = Raw(server)
    raw.socket.sendall(raw.head(100 << 20))
    part = b" " * (1 << 20)
    sent = 0
    try:
        while sent < 100:
            raw.socket.sendall(part)
            sent += 1
    except OSError:
        pass
    answer = raw.read()
    raw.close()
    assert not answer or answer.startswith(b"HTTP/1.1 413"), answer[:200]
    with server.http() as http:
        assert http.post("/v1/completions", content=part * 3).status_code == 413


def test_headers_and_bodies_a_byte_at_a_time(server: Server, expected: str) -> None:
    body = json.dumps(ASK).encode()
    sent = {"nothing": b"", "headers": Raw(server).head(9) * 9, "body": None, "body of a GET": None}
    answers: dict[str, bytes] = {}
    took: dict[str, float] = {}

    def drip(name: str) -> None:
        raw = Raw(server)
        data = sent[name]
        begun = time.monotonic()
        if name == "body":
            raw.socket.sendall(raw.head(len(body) * 100))
            data = body * 100
        elif name == "body of a GET":
            raw.socket.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n")
            assert b"200 OK" in raw.socket.recv(1000)
            data = b"x" * 9000
        raw.drip(data or b"", 0.02)
        answers[name] = raw.read()
        took[name] = time.monotonic() - begun
        raw.close()

    threads = [threading.Thread(target=drip, args=(name,)) for name in sent]
    for thread in threads:
        thread.start()
    assert ask(server) == expected  # meanwhile
    for thread in threads:
        thread.join(60)
    assert set(took) == set(sent)
    assert all(MAX_RECEIVE * 0.9 <= seconds < MAX_RECEIVE + 20 for seconds in took.values()), took
    for name in ("nothing", "headers", "body"):
        assert answers[name].startswith(b"HTTP/1.1 408 "), (name, answers[name])
        assert b"max_receive" in answers[name]


def test_a_thousand_idle_connections(server: Server, expected: str) -> None:
    idle = []
    try:
        for _ in range(1000):
            idle.append(Raw(server))
            if len(idle) % 250 == 0:
                assert ask(server) == expected
        memory = resident(server)
    finally:
        for raw in idle:
            raw.close()
    assert memory < MEMORY
    assert ask(server) == expected


def test_bodies_of_many_share_the_memory(server: Server, expected: str) -> None:
    """Unfinished bodies, each as large as one may be, take all the room; a small request needs none of it."""
    body = b'{"prompt": "' + b" " * (2 << 20)
    held: list[Raw] = []
    try:
        for _ in range(40):
            raw = Raw(server)
            held.append(raw)
            raw.socket.sendall(raw.head(2 << 20))
            with contextlib.suppress(OSError):  # there may be no room for it
                raw.socket.sendall(body[: (2 << 20) - 1])
        for _ in range(3):
            assert ask(server) == expected
        statuses = [raw.read()[:12] for raw in held]
    finally:
        for raw in held:
            raw.close()
    assert set(statuses) <= {b"HTTP/1.1 429", b"HTTP/1.1 408", b""}, set(statuses)
    assert b"HTTP/1.1 429" in statuses


def test_where_no_room_is_left_small_bodies_are_taken() -> None:
    """To the byte, as no client can time it."""
    requests = Requests(
        None, lambda _: None, lambda _: True, max_body=1 << 20, max_waiting=1, max_seconds=None
    )  # type: ignore[arg-type]
    large = Room(requests)
    large.take(TOGETHER << 20)
    assert requests.n_bytes == (TOGETHER << 20) - SMALL
    large.take(SMALL)  # now all is taken
    small = Room(requests)
    small.take(SMALL // 2)
    small.take(SMALL // 2)
    with pytest.raises(Refused, match="too many large requests"):
        small.take(1)
    small.give_back()
    large.give_back()
    assert requests.n_bytes == 0


def test_what_is_no_http(server: Server, expected: str) -> None:
    for data in (b"\x16\x03\x01\x02\x00" * 100, b"\x00" * 100_000, b"GET /\r\n\r\n", b"A" * 200_000):
        raw = Raw(server)
        try:
            raw.socket.sendall(data)
            raw.socket.shutdown(1)
        except OSError:
            pass
        assert raw.read()[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
        raw.close()
    assert ask(server) == expected


def test_streams_that_nobody_reads(server: Server, expected: str) -> None:
    held = []
    for _ in range(8):
        raw = Raw(server)
        raw.post(json.dumps({**ASK, "max_tokens": 500, "min_tokens": 500, "stream": True}).encode())
        held.append(raw)
    assert ask(server) == expected
    for raw in held:
        raw.close()


def test_a_failure_in_one_answer_is_its_own(server: Server, expected: str) -> None:
    """While others are written, in the other slot where there is one, or before and after."""
    texts: list[str] = []
    others = [threading.Thread(target=lambda: texts.append(ask(server))) for _ in range(6)]
    with server.http() as http:
        for thread in others:
            thread.start()
            answer = http.post("/v1/completions", json={**ASK, "grammar": GRAMMARS["what no token says"]})
            assert answer.status_code == 400
    for thread in others:
        thread.join(60)
    assert texts == [expected] * 6


@pytest.mark.parametrize(
    ("path", "parallel"),
    [("/v1/completions", 1), ("/v1/completions", 2), ("/v1/responses", 1), ("/api/chat", 2)],
)
def test_a_server_that_ends_tells_its_streams(path: str, parallel: int) -> None:
    endless = {"type": "array", "items": {"type": "integer"}, "minItems": 400}  # no answer may end early
    asked = {
        "/v1/completions": {"prompt": "The sea", "min_tokens": 900},
        "/v1/responses": {
            "input": "Count.",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": endless}},
        },
        "/api/chat": {"messages": [{"role": "user", "content": "Count."}], "format": endless},
    }[path]
    asked = {**asked, "max_tokens": 900, "max_output_tokens": 900, "options": {"num_predict": 900}}
    with Server(*OPTIONS, "--parallel", parallel) as server:
        streams = [Raw(server) for _ in range(3)]  # one or two are written, the others wait
        unread, late = Raw(server), Raw(server)
        for raw in streams:
            raw.post(json.dumps({**asked, "stream": True}).encode(), path=path)
        late.socket.sendall(late.head(100, path=path))  # its body is still to come
        assert streams[0].socket.recv(1000)  # it has begun
        begun = time.monotonic()
        code, stderr = server.stop(signal.SIGTERM)
        assert time.monotonic() - begun < 30 * LEEWAY
        assert code == 0, stderr
        for raw in streams:
            text = raw.read().decode()
            assert "shutting down" in text, text[-500:]
            assert text.endswith(("0\r\n\r\n", "}")), text[-100:]  # an end, not a cut
        for raw in (*streams, unread, late):
            raw.close()
