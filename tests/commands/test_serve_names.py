"""What a request is called (X-Request-ID): given back or made, in every answer and the log. And what `/docs` tells."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from entmtp.serve.errors import request_id, worded
from entmtp.serve.metrics import PATHS
from helpers.serving import Server
from helpers.typed import DEMO

TEXT = {"prompt": "The sea", "max_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--model", DEMO, "--ctx", 256, "--threads", 1, "--max-body", 10_000) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/v1/models/none", None, 404),
        ("GET", "/nowhere", None, 404),
        ("POST", "/v1/completions", TEXT, 200),
        ("POST", "/v1/completions", {**TEXT, "stream": True}, 200),
        ("POST", "/v1/completions", {**TEXT, "temperature": -3, "stream": True}, 400),
        ("POST", "/v1/completions", {"prompt": "x" * 10_000}, 413),
        ("POST", "/api/chat", {"messages": 3}, 400),
    ],
)
def test_every_answer_has_its_requests_name(
    server: Server, method: str, path: str, body: Any, status: int
) -> None:
    with server.http() as http:
        answer = http.request(method, path, json=body, headers={"X-Request-ID": "mine-7/e"})
        assert answer.status_code == status, answer.text
        assert answer.headers.get_list("x-request-id") == ["mine-7/e"]
        made = {http.request(method, path, json=body).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2 and all(name.startswith("req_") and len(name) == 36 for name in made)


def test_without_a_key(server: Server) -> None:
    with server.http() as http:
        http.headers["Authorization"] = "Bearer wrong"
        for path in ("/v1/messages", "/v1/completions"):
            answer = http.post(path, json={}, headers={"X-Request-ID": "mine"})
            assert answer.status_code == 401 and answer.headers["x-request-id"] == "mine"
        error = http.post("/v1/messages", json={}, headers={"X-Request-ID": "mine"})
        assert error.json()["request_id"] == error.headers["request-id"] == "mine"


@pytest.mark.parametrize("name", ["", "two words", "x" * 129, "tab\there", b"\xff\xfe", "{é}".encode()])
def test_names_that_cannot_be_are_replaced(server: Server, name: Any) -> None:
    with server.http() as http:
        answer = http.get("/health", headers={"X-Request-ID": name})
        assert answer.headers["x-request-id"].startswith("req_")


def test_openais_client_knows_it(server: Server) -> None:
    client = server.client()
    answer = client.completions.create(
        model="x", prompt="The sea", max_tokens=2, extra_headers={"X-Request-ID": "a"}
    )
    assert answer._request_id == "a"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="x", prompt="x", n=1000, extra_headers={"X-Request-ID": "b"})
    assert raised.value.request_id == "b"


def test_the_log() -> None:
    with Server("--model", DEMO, "--ctx", 256, "--threads", 1, "--verbose", "true") as server:
        with server.http() as http:
            http.post("/v1/completions", json=TEXT, headers={"X-Request-ID": "named"})
            http.get("/v1/models/a%0Ab", headers={"X-Request-ID": "odd"})
        _, said = server.stop(signal.SIGTERM)
    [line] = [line for line in said.splitlines() if line.endswith(" named")]
    assert line.startswith("POST /v1/completions 200 ") and line.split()[4] == "s"
    [line] = [line for line in said.splitlines() if line.endswith(" odd")]
    assert line.startswith("GET /v1/models/a%0Ab 404 ")


def test_what_nobody_expected_is_named_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    token = request_id.set("req_1")
    try:
        assert worded(KeyError("x")).status == 500
    finally:
        request_id.reset(token)
    said = capsys.readouterr().err
    assert said.startswith("request req_1 failed:\n") and "KeyError" in said


def test_the_description_has_all_bodies(server: Server) -> None:
    with server.http() as http:
        description = http.get("/openapi.json").json()
    asked = {path: ways["post"] for path, ways in description["paths"].items() if "post" in ways}
    assert set(PATHS) <= set(asked)
    for path, way in asked.items():
        reference = way["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = description["components"]["schemas"][reference.rsplit("/")[-1]]
        assert schema["properties"], path
    fields = description["components"]["schemas"]
    assert "max_tokens" in fields["Message"]["properties"] and "logprobs" in fields["Text"]["properties"]
