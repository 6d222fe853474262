"""Ollama's and Anthropic's APIs: the same answers as OpenAI's, in their own form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import entmtp
from entmtp.serve import ollama
from entmtp.serve.requests import ServedRequest
from helpers.serving import Server
from helpers.typed import DEMO

QUESTION = [{"role": "user", "content": "How many apples are left?"}]
OPTIONS: dict[str, Any] = {"temperature": 0.0, "num_predict": 12}


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server("--model", DEMO, "--ctx", 512, "--threads", 1, "--parallel", request.param) as running:
        yield running


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    with server.http() as http:
        return http.post(path, json={"model": DEMO.stem, **body})


def lines(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def chat(server: Server, messages: Any = QUESTION, **settings: Any) -> str:
    asked = {"max_tokens": 12, "temperature": 0.0, **settings}
    answer = server.client().chat.completions.create(model="x", messages=messages, **asked)
    return answer.choices[0].message.content or ""


def test_ollama_chat(server: Server) -> None:
    expected = chat(server)
    whole = post(server, "/api/chat", messages=QUESTION, options=OPTIONS, stream=False).json()
    assert whole["message"] == {"role": "assistant", "content": expected}
    *pieces, last = lines(server, "/api/chat", messages=QUESTION, options=OPTIONS)
    assert "".join(p["message"]["content"] for p in pieces) == expected
    assert not any(p["done"] for p in pieces) and last["done"] and last["message"]["content"] == ""
    for end in (whole, last):
        assert end["done_reason"] == "length" and end["eval_count"] == 12 and end["prompt_eval_count"] > 5
        spent = end["prompt_eval_duration"] + end["eval_duration"]
        assert end["eval_duration"] > 0 and spent <= end["total_duration"] < 60e9
        assert end["model"] == DEMO.stem and end["created_at"].startswith("20")


def test_ollama_generate(server: Server) -> None:
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    asked = {"prompt": QUESTION[0]["content"], "system": "Be brief.", "options": OPTIONS}
    *pieces, last = lines(server, "/api/generate", **asked)
    assert "".join(p["response"] for p in pieces) == chat(server, system) and last["done"]
    text = server.client().completions.create(model="x", prompt="The sea", max_tokens=12, temperature=0.0)
    raw = post(server, "/api/generate", prompt="The sea", raw=True, stream=False, options=OPTIONS).json()
    assert raw["response"] == text.choices[0].text


def test_ollama_options(server: Server) -> None:
    drawn = {"temperature": 1.5, "seed": 3, "top_k": 20, "top_p": 0.9, "repeat_penalty": 1.3}
    extra = {"top_k": 20, "repeat_penalty": 1.3}
    expected = chat(server, temperature=1.5, seed=3, top_p=0.9, extra_body=extra)
    asked = {"messages": QUESTION, "stream": False}
    found = post(server, "/api/chat", options={**OPTIONS, **drawn}, **asked).json()["message"]["content"]
    assert found == expected
    word = expected.split()[1]
    cut = post(server, "/api/chat", options={**OPTIONS, **drawn, "stop": [word]}, **asked).json()
    assert cut["message"]["content"] == expected[: expected.index(word)] and cut["done_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_format(server: Server, stream: bool) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    asked = {"messages": QUESTION, "format": schema, "options": {"temperature": 0.0, "num_predict": 64}}
    if stream:
        text = "".join(p["message"]["content"] for p in lines(server, "/api/chat", **asked))
    else:
        text = post(server, "/api/chat", stream=False, **asked).json()["message"]["content"]
    assert json.loads(text)["n"] in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_calls_a_tool(server: Server, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    call = {"function": {"name": "count", "arguments": {"n": 1}}}
    said = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    said += [{"role": "tool", "tool_name": "count", "content": "7"}]
    answer = post(server, "/api/chat", messages=said, tools=[tool], options=OPTIONS, stream=stream)
    assert answer.status_code == 200, answer.text


def test_ollama_says_what_there_is(server: Server) -> None:
    with server.http() as http:
        assert http.get("/api/version").json() == {"version": entmtp.__version__}
        [model] = http.get("/api/tags").json()["models"]
    assert model["name"] == f"{DEMO.stem}:latest" and model["size"] == DEMO.stat().st_size
    shown = post(server, "/api/show", model=f"{DEMO.stem}:latest").json()
    assert shown["details"]["format"] == "gguf" and shown["details"]["family"]
    assert shown["model_info"]["general.architecture"] == shown["details"]["family"]
    assert shown["capabilities"] == ["completion"]
    missing = post(server, "/api/show", model="another")
    assert missing.status_code == 404 and missing.json() == {"error": "model 'another' not found"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"options": {"temperature": -3}}, "temperature"),
        ({"options": 3}, "options"),
        ({"options": {"num_predict": "many"}}, "num_predict"),
        ({"format": "xml"}, "format"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "512"),
    ],
)
def test_ollama_mistakes(server: Server, body: dict[str, Any], says: str) -> None:
    answer = post(server, "/api/chat", **{"messages": QUESTION, **body})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"} and says in answer.json()["error"]


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


MESSAGE: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 0.0}


def test_a_message(server: Server) -> None:
    expected = chat(server, [{"role": "system", "content": "Be brief."}, *QUESTION])
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    with httpx.Client(base_url=server.url, headers={"x-api-key": server.key or ""}, timeout=60) as http:
        asked = {
            **MESSAGE,
            "model": "m",
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": parts,
        }
        answer = http.post("/v1/messages", json=asked).json()
    assert answer["content"] == [{"type": "text", "text": expected}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "m")
    assert answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["output_tokens"] == 12 and answer["usage"]["input_tokens"] > 5


def test_events_of_a_message(server: Server) -> None:
    whole = post(server, "/v1/messages", **MESSAGE).json()
    found = events(post(server, "/v1/messages", stream=True, **MESSAGE))
    assert list(dict.fromkeys(name for name, _ in found)) == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert all(name == data["type"] for name, data in found)
    text = "".join(data["delta"]["text"] for name, data in found if name == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert found[0][1]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    ended = found[-2][1]
    assert ended["delta"]["stop_reason"] == "max_tokens" and ended["usage"] == whole["usage"]


TOOLS: Any = [
    {"name": name, "description": name, "input_schema": {
        "type": "object", "properties": {"n": {"enum": values}}, "required": ["n"]}}
    for name, values in (("count", [1, 2]), ("weigh", [3, 4]))
]  # fmt: skip


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weigh"}])
def test_a_message_calls_a_tool(server: Server, choice: dict[str, str]) -> None:
    asked = {**MESSAGE, "tools": TOOLS, "tool_choice": choice, "max_tokens": 64}
    whole = post(server, "/v1/messages", **asked).json()
    [block] = whole["content"]
    assert block["type"] == "tool_use" and whole["stop_reason"] == "tool_use"
    assert block["input"]["n"] in {"count": [1, 2], "weigh": [3, 4]}[block["name"]]
    assert choice.get("name", block["name"]) == block["name"]
    found = events(post(server, "/v1/messages", stream=True, **asked))
    [begun] = [data["content_block"] for name, data in found if name == "content_block_start"]
    pieces = [data["delta"]["partial_json"] for name, data in found if name == "content_block_delta"]
    assert begun["name"] == block["name"] and json.loads("".join(pieces)) == block["input"]
    # the same chat as OpenAI's, with the call's result: the text that answers it
    result = [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "seven"}]}]
    said = [
        *QUESTION,
        {"role": "assistant", "content": [{**block, "id": "c"}]},
        {"role": "user", "content": result},
    ]
    answer = post(server, "/v1/messages", **{**MESSAGE, "messages": said, "tools": TOOLS}).json()
    call = {"name": block["name"], "arguments": json.dumps(block["input"])}
    same = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "seven"},
    ]
    functions = [
        {
            "type": "function",
            "function": {**{k: t[k] for k in ("name", "description")}, "parameters": t["input_schema"]},
        }
        for t in TOOLS
    ]
    assert answer["content"][0]["text"] == chat(server, same, tools=functions)


def test_a_sequence_stops_a_message(server: Server) -> None:
    text = post(server, "/v1/messages", **MESSAGE).json()["content"][0]["text"]
    word = text.split()[1]
    answer = post(server, "/v1/messages", stop_sequences=[word], **MESSAGE).json()
    assert answer["content"][0]["text"] == text[: text.index(word)]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", word)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": "Hello"}, "messages"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_messages_mistakes(server: Server, body: dict[str, Any], says: str) -> None:
    answer = post(server, "/v1/messages", **{**MESSAGE, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert says in error["error"]["message"]


def test_keys_of_each_api(server: Server) -> None:
    with httpx.Client(base_url=server.url) as http:
        assert http.post("/api/chat", json={}).json() == {"error": "Invalid API key"}
        error = http.post("/v1/messages", json={}).json()["error"]
        assert error["type"] == "authentication_error"
        assert http.get("/api/tags").status_code == 401


def test_a_call_in_ollamas_form(server: Server) -> None:
    """Ollama's clients cannot demand a call, so what a chat says when it is demanded is put into their form."""
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": "count"}}
    asked = {"messages": QUESTION, "tools": [tool], "tool_choice": choice, "max_tokens": 64, "temperature": 0}

    async def new() -> ollama.Chat:  # a request is of an event loop
        return ollama.Chat({"model": "m"}, ServedRequest("/api/chat"))

    form = asyncio.run(new())
    streamed: list[bytes] = []
    for event in post(server, "/v1/chat/completions", stream=True, **asked).text.strip().split("\n\n")[:-1]:
        streamed += form.add(json.loads(event.removeprefix("data: ")))
    called, last = [json.loads(line) for line in (*streamed, *form.end())]
    [call] = called["message"]["tool_calls"]
    assert (
        call["function"]["name"] == "count" and call["function"]["arguments"]["n"] in (1, 2) and last["done"]
    )
    whole = asyncio.run(new()).whole(post(server, "/v1/chat/completions", **asked).json())
    assert whole["message"]["tool_calls"] == [call]
