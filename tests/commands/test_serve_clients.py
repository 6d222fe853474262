"""Requests as clients send them: recorded from the real ones (cases/), and what each needs of the answer.

Each file of cases is one client, with the version that was recorded; keys are left out, and the model is the demo's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import types
from openai.types import chat, responses
from pydantic import TypeAdapter

from helpers.serving import Server
from helpers.typed import DEMO

FILES = sorted((Path(__file__).parent / "cases").glob("*.json"))
CASES = [
    pytest.param(case, id=f"{path.stem}-{i}-{case['name'].replace(' ', '-')}")
    for path in FILES
    for i, case in enumerate(json.loads(path.read_text("utf-8"))["cases"])
]
EVENT: TypeAdapter[Any] = TypeAdapter(responses.ResponseStreamEvent)


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server("--model", DEMO, "--ctx", 1024, "--threads", 1, "--parallel", request.param) as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_request(server: Server, case: dict[str, Any]) -> None:
    headers = {name: value.replace("KEY", server.key or "") for name, value in case["headers"].items()}
    # who sent none was asked for none
    headers |= (
        {} if {"authorization", "x-api-key"} & set(headers) else {"authorization": f"Bearer {server.key}"}
    )
    with httpx.Client(base_url=server.url, timeout=120) as http:
        answer = http.request(case["method"], case["path"], json=case["body"], headers=headers)
    assert answer.status_code == case["status"], answer.text
    assert answer.headers["x-request-id"]
    body = case["body"] or {}
    if answer.status_code != 200:
        refused(case["path"], answer.json())
    elif case["path"] in READERS:
        READERS[case["path"]](answer, body)
    else:
        assert case["path"] == f"/v1/models/{DEMO.stem}"
        assert types.Model.model_validate(answer.json(), strict=True).id == DEMO.stem


def refused(path: str, said: dict[str, Any]) -> None:
    if path.startswith("/api/"):
        assert set(said) == {"error"} and isinstance(said["error"], str)
    elif path == "/v1/messages":
        assert said["type"] == "error" and said["error"]["type"] and said["error"]["message"]
    else:
        assert said["error"]["message"] and said["error"]["type"] == "invalid_request_error"


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """What a stream of server-sent events says, each named as its data is; the end of OpenAI's is left out."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.text.split("\n\n")[:-1]:
        *names, data = event.split("\n")
        if data == "data: [DONE]":
            continue
        found.append(json.loads(data.removeprefix("data: ")))
        assert names in ([], [f"event: {found[-1].get('type')}"])
    return found


def is_call(name: Any, arguments: Any, asked: list[Any], whole: bool) -> None:
    """A call of a function that was offered, with arguments that follow its schema (as far as they go)."""
    functions = {f["name"]: f for f in (tool.get("function", tool) for tool in asked)}
    assert name in functions
    if whole:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        schema = functions[name].get("parameters") or functions[name]["input_schema"]
        for key in schema.get("required", []):
            allowed = schema["properties"][key].get("enum")
            assert key in arguments and (allowed is None or arguments[key] in allowed)


def chat_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    if not asked.get("stream"):
        whole = chat.ChatCompletion.model_validate(answer.json())
        assert whole.usage and len(whole.choices) == (asked.get("n") or 1)
        for i, choice in enumerate(whole.choices):
            assert choice.index == i
            chat_choice(choice.message.content, choice.message.tool_calls, choice.finish_reason, asked)
            if asked.get("logprobs"):
                assert choice.logprobs and choice.logprobs.content
                assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
        return
    assert answer.text.endswith("data: [DONE]\n\n")
    chunks = [chat.ChatCompletionChunk.model_validate(event) for event in events(answer)]
    assert len({chunk.id for chunk in chunks}) == 1
    if (asked.get("stream_options") or {}).get("include_usage"):
        *chunks, last = chunks
        assert last.usage and not last.choices
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and not any(delta.role for delta in deltas[1:])
    # as clients do: texts of deltas are put together, whatever they are the text of
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for call in delta.tool_calls or []:
            held = calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
            assert call.function
            for key, more in (
                ("id", call.id),
                ("name", call.function.name),
                ("arguments", call.function.arguments),
            ):
                held[key] += more or ""
    made = [
        chat.ChatCompletionMessageFunctionToolCall.model_validate(
            {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
        )
        for c in calls.values()
    ]
    content = "".join(delta.content or "" for delta in deltas)
    chat_choice(content, made, chunks[-1].choices[0].finish_reason, asked)
    if asked.get("logprobs"):
        told = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
        assert "".join(told) == content


def chat_choice(content: str | None, calls: Any, reason: str | None, asked: dict[str, Any]) -> None:
    choice = asked.get("tool_choice")
    if choice == "required" or isinstance(choice, dict):
        [call] = calls
        is_call(call.function.name, call.function.arguments, asked["tools"], reason == "tool_calls")
        assert call.id and reason in ("tool_calls", "length") and not content
        if isinstance(choice, dict):
            assert call.function.name == choice["function"]["name"]
        return
    assert content is not None and reason in ("stop", "length")
    for word in [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []:
        assert word not in content
    form = asked.get("response_format") or {}
    if reason == "stop" and form.get("type") in ("json_schema", "json_object"):
        follows(json.loads(content), form.get("json_schema", {}).get("schema", {}))


def follows(value: Any, schema: dict[str, Any]) -> None:
    for key in schema.get("required", []):
        allowed = schema["properties"][key].get("enum")
        assert key in value and (allowed is None or value[key] in allowed)


def text_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    whole = types.Completion.model_validate(answer.json())
    prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
    assert whole.usage and [choice.index for choice in whole.choices] == list(range(len(prompts)))
    for choice in whole.choices:
        if asked.get("logprobs") is not None:
            assert choice.logprobs and choice.logprobs.tokens
            assert "".join(choice.logprobs.tokens) == choice.text


def models_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    told = answer.json()
    assert told["object"] == "list"
    assert [types.Model.model_validate(m, strict=True).id for m in told["data"]] == [DEMO.stem]


def response_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    if asked.get("stream"):
        found = [EVENT.validate_python(event) for event in events(answer)]
        assert [event.sequence_number for event in found] == list(range(len(found)))
        assert found[0].type == "response.created"
        whole = found[-1].response
        said = "".join(e.delta for e in found if e.type == "response.output_text.delta")
        assert whole.output_text == said
    else:
        whole = responses.Response.model_validate(answer.json())
    assert whole.usage and whole.status in ("completed", "incomplete")
    choice = asked.get("tool_choice")
    if choice == "required" or isinstance(choice, dict):
        [item] = whole.output
        is_call(item.name, item.arguments, asked["tools"], whole.status == "completed")
    form = (asked.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema" and whole.status == "completed":
        follows(json.loads(whole.output_text), form["schema"])


def message_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    if asked.get("stream"):
        found = events(answer)
        assert (found[0]["type"], found[-1]["type"]) == ("message_start", "message_stop")
        message = found[0]["message"]
        parts: dict[int, str] = {}
        for event in found:
            if event["type"] == "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            elif event["type"] == "content_block_delta":
                more = event["delta"].get("text") or event["delta"].get("partial_json") or ""
                parts[event["index"]] = parts.get(event["index"], "") + more
            elif event["type"] == "content_block_stop":
                block = message["content"][event["index"]]
                if block["type"] == "text":
                    block["text"] += parts.get(event["index"], "")
                else:
                    block["input"] = json.loads(parts[event["index"]])
            elif event["type"] == "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    else:
        message = answer.json()
    assert (
        message["id"].startswith("msg_") and message["role"] == "assistant" and message["type"] == "message"
    )
    assert message["usage"]["input_tokens"] > 0 and message["usage"]["output_tokens"] > 0
    blocks = message["content"]
    kind = (asked.get("tool_choice") or {}).get("type")
    if kind in ("any", "tool"):
        [block] = blocks
        assert block["type"] == "tool_use" and block["id"] and message["stop_reason"] == "tool_use"
        is_call(block["name"], block["input"], asked["tools"], True)
        assert kind == "any" or block["name"] == asked["tool_choice"]["name"]
    else:
        assert [block["type"] for block in blocks] == ["text"] and blocks[0]["text"]
        assert message["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence")


def counted(answer: httpx.Response, asked: dict[str, Any]) -> None:
    """As many as the message would have."""
    assert (
        answer.json() == {"input_tokens": answer.json()["input_tokens"]} and answer.json()["input_tokens"] > 5
    )


def ollama_answer(answer: httpx.Response, asked: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert asked.get("stream", True) or len(lines) == 1
    *pieces, last = lines
    assert last["done"] and not any(piece["done"] for piece in pieces)
    said = [line["message"]["content"] if "message" in line else line["response"] for line in lines]
    if not asked.get("messages") and not asked.get("prompt"):
        assert last["done_reason"] == "load" and said == [""]
        return
    assert last["done_reason"] in ("stop", "length") and last["eval_count"] > 0
    if isinstance(asked.get("format"), dict) and last["done_reason"] == "stop":
        follows(json.loads("".join(said)), asked["format"])
    if asked.get("logprobs"):
        told = [one for line in lines for one in line.get("logprobs", [])]
        assert "".join(one["token"] for one in told) == "".join(said)
        assert all(one["logprob"] <= 0 and one["top_logprobs"] for one in told)


def ollama_models(answer: httpx.Response, asked: dict[str, Any]) -> None:
    [model] = answer.json()["models"]
    assert model["name"] == model["model"] == f"{DEMO.stem}:latest" and model["size"] == DEMO.stat().st_size


def ollama_model(answer: httpx.Response, asked: dict[str, Any]) -> None:
    assert answer.json()["details"]["format"] == "gguf" and "completion" in answer.json()["capabilities"]


def ollama_version(answer: httpx.Response, asked: dict[str, Any]) -> None:
    assert answer.json()["version"]


READERS = {
    "/v1/chat/completions": chat_answer, "/v1/completions": text_answer, "/v1/models": models_answer,
    "/v1/responses": response_answer, "/v1/messages": message_answer, "/v1/messages/count_tokens": counted,
    "/api/chat": ollama_answer, "/api/generate": ollama_answer, "/api/tags": ollama_models, "/api/ps": ollama_models,
    "/api/show": ollama_model, "/api/version": ollama_version,
}  # fmt: skip


def test_tokens_are_counted_as_a_message_has_them(server: Server) -> None:
    for path in FILES:
        for case in json.loads(path.read_text("utf-8"))["cases"]:
            if case["path"] == "/v1/messages" and case["status"] == 200 and not case["body"].get("stream"):
                with server.http() as http:
                    body = case["body"]
                    count = http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
                    usage = http.post("/v1/messages", json={**body, "max_tokens": 1}).json()["usage"]
                assert count == usage["input_tokens"], case["name"]


def test_the_cases_tell_of_no_machine() -> None:
    assert {path.stem for path in FILES} >= {
        "openai", "litellm", "langchain", "llama_index", "open_webui", "ollama", "anthropic"
    }  # fmt: skip
    for path in FILES:
        text = path.read_text("utf-8")
        assert "://" not in text.replace("data:image", "") and "sk-" not in text and "127.0.0.1" not in text
        for case in json.loads(text)["cases"]:
            assert not set(case["headers"]) & {"user-agent", "host"}, path.name
