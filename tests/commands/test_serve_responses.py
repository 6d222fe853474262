"""OpenAI's Responses API, asked by OpenAI's client."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from helpers.serving import Server
from helpers.settings import LEEWAY
from helpers.typed import DEMO

QUESTION = "How many apples are left?"
SETTINGS: dict[str, Any] = {"model": DEMO.stem, "temperature": 0.0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--model", DEMO, "--ctx", 512, "--threads", 1) as running:
        yield running


def test_a_response_is_the_chats_answer(server: Server) -> None:
    client = server.client()
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(
        model=DEMO.stem, messages=messages, temperature=0.0, max_completion_tokens=12
    )
    one = client.responses.create(input=QUESTION, instructions="Be brief.", **SETTINGS)
    other = client.responses.create(input=messages, **SETTINGS)
    assert one.output_text
    assert one.output_text == other.output_text == chat.choices[0].message.content
    assert one.usage is not None and chat.usage is not None
    assert one.usage.total_tokens == chat.usage.total_tokens
    assert one.model == DEMO.stem


def test_events_of_a_stream(server: Server) -> None:
    client = server.client()
    whole = client.responses.create(input=QUESTION, **SETTINGS)
    events: list[Any] = list(client.responses.create(input=QUESTION, stream=True, **SETTINGS))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", f"response.{whole.status}",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_a_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    answer = server.client().responses.create(
        model=DEMO.stem, input=QUESTION, text=form, max_output_tokens=64, temperature=0.0
    )
    assert json.loads(answer.output_text)["n"] in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_answered(server: Server, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool: Any = {"type": "function", "name": "count", "parameters": parameters}
    choice: Any = {"type": "function", "name": "count"}
    settings: dict[str, Any] = {**SETTINGS, "max_output_tokens": 64, "tools": [tool]}
    client = server.client()
    answer: Any = client.responses.create(input=QUESTION, tool_choice=choice, stream=stream, **settings)
    if stream:
        events = list(answer)
        answer = events[-1].response
        written = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert written == answer.output[0].arguments
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "count" and call.call_id
    assert json.loads(call.arguments)["n"] in (1, 2)

    said: Any = [
        {"role": "user", "content": QUESTION},
        {"type": "function_call", "call_id": call.call_id, "name": "count", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "7"},
    ]
    assert client.responses.create(input=said, **SETTINGS).status in ("completed", "incomplete")


LONG: Any = {
    "format": {
        "type": "json_schema",
        "name": "long",
        "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 40},
    }
}


def test_a_client_leaves_and_asks_again(server: Server) -> None:
    client = server.client()
    with client.responses.create(model=DEMO.stem, input=QUESTION, text=LONG, stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                break
    server.until(lambda m: m['entmtp_requests_total{path="/v1/responses",status="499"}'] == 1)
    assert client.responses.create(input=QUESTION, **SETTINGS).output_text


def test_a_stopped_server_ends_the_stream_with_an_error() -> None:
    with Server("--model", DEMO, "--ctx", 512, "--threads", 1) as server:
        body = {"input": QUESTION, "text": LONG, "stream": True}
        with server.http() as http, http.stream("POST", "/v1/responses", json=body) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line == "event: response.output_text.delta")
            server.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line.startswith("event: ")]
        assert events[-1] == "event: error"
        assert server.process.wait(10 * LEEWAY) is not None


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("max_output_tokens", {"max_output_tokens": -5}),
        ("input", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("temperature", {"temperature": -3}),
    ],
)
def test_what_cannot_be(server: Server, param: str, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().responses.create(**{"model": DEMO.stem, "input": QUESTION, **body})
    assert raised.value.param == param
