"""Requests that cannot be answered as they are: a 400 that says what, streamed or not, and no traceback in the log."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.serving import Server
from helpers.settings import prompts

QUESTION = [{"role": "user", "content": "How many apples are left?"}]


def schema(**keywords: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **keywords}}}


# what is asked, and what the error says
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages are empty"),
    "bias of no token": ({"logit_bias": {"999999": 5}}, "logit_bias: '999999'"),
    "bias of a negative token": ({"logit_bias": {"-1": 5}}, "logit_bias: '-1'"),
    "negative temperature": ({"temperature": -3}, "temperature"),
    "keyword that no grammar follows": (
        {"response_format": schema(properties={"age": {"type": "integer", "minimum": 3}})},
        "schema.properties.age: the keyword minimum",
    ),
    "negation": ({"response_format": schema(**{"not": {"required": ["a"]}})}, "the keyword not"),
    "type that is none": ({"response_format": schema(properties={"a": {"type": "strin"}})}, "there is no type 'strin'"),
    "reference to nothing": ({"response_format": schema(properties={"a": {"$ref": "#/x"}})}, "leads nowhere"),
    "no schema": ({"response_format": {"type": "json_object", "schema": {"properties": 3}}}, "an object of"),
    "tool with a pattern that is none": (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "(a"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        "cannot be read",
    ),
    "grammar that is none": ({"grammar": "root ::= ("}, "the grammar cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    with Server(
        "--model",
        models["f32"],
        "--heads",
        models["hydra"],
        "--model_alias",
        "demo",
        "--n_ctx",
        512,
        "--n_threads",
        1,
    ) as server:
        yield server
        _, stderr = server.stop(15)
        assert "Traceback" not in stderr, stderr


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_400(server: Server, name: str, stream: bool) -> None:
    asked, says = MISTAKES[name]
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "stream": stream, **asked}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"], answer.text


def test_openai_raises_before_the_first_chunk(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="minimum"):
        server.client().chat.completions.create(
            model="demo", messages=QUESTION, stream=True, max_tokens=8,  # type: ignore[arg-type]
            response_format=schema(properties={"a": {"type": "number", "minimum": 0}}),  # type: ignore[arg-type]
        )  # fmt: skip


def test_an_empty_prompt_tells_nothing_of_the_request_before(server: Server) -> None:
    """llama-cpp-python makes a prompt of no tokens one of the begin token: whatever was asked before, the same text."""
    found = set()
    for before in prompts("gsm8k")[:3]:
        for prompt in ([], ""):
            with server.http() as http:
                ask = {"model": "demo", "max_tokens": 6, "temperature": 0}
                assert http.post("/v1/completions", json=ask | {"prompt": before}).status_code == 200
                answer = http.post("/v1/completions", json=ask | {"prompt": prompt})
            found.add(answer.json()["choices"][0]["text"])
    assert len(found) == 1


def test_clients_that_leave_early_and_ask_again(server: Server) -> None:
    """The prompt is in the memory, its logits are not; the same request must be answered, again and again."""
    client = server.client()
    prompt = "".join(prompts("humaneval"))[:900]

    def ask() -> str:
        return (
            client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
            .choices[0]
            .text
        )

    expected = ask()
    client.completions.create(model="demo", prompt="Something else", max_tokens=2)
    asked = {"model": "demo", "prompt": prompt, "max_tokens": 200, "temperature": 0, "stream": True}
    body = json.dumps(asked).encode()
    host, _, port = server.url.removeprefix("http://").partition(":")
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    for i in range(24):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)
            time.sleep(0.004 * i)  # before, during and after the prompt's passes
        assert ask() == expected, f"after the client that left {4 * i} ms after its request"
