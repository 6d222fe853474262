"""What a request comes to: turns and fields of a chat, seeds of answers, tools with parts of their own; cut answers."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from entmtp import Llama
from entmtp.common.json_schema import check_schema
from entmtp.request import grammar_of_schema
from entmtp.serve import responses
from entmtp.serve.asked import chat, text
from entmtp.serve.calls import demand
from entmtp.serve.errors import Refused
from helpers.rewritten import rewritten
from helpers.serving import Server
from helpers.typed import DEMO

CALL = {"id": "c", "type": "function", "function": {"name": "w", "arguments": "{}"}}


def test_seeds_of_several_answers() -> None:
    """-1 draws one for each, and so does no other seed's answer."""
    for seed in (-1, (1 << 32) - 1):
        asked = text({"prompt": "x", "n": 3, "seed": seed})
        assert asked.choices == [{}] * 3 and asked.body.seed == seed
    for seed in (0, 5, -7, (1 << 32) - 2):
        seeds = [choice["seed"] for choice in text({"prompt": "x", "n": 3, "seed": seed}).choices]
        assert len({s % (1 << 32) for s in seeds}) == 3 and (1 << 32) - 1 not in seeds
        assert seeds[0] == seed % (1 << 32)


def test_what_templates_read_of_messages() -> None:
    """More than OpenAI has names for; and a null is as if it were left out."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm.", "refusal": None},
        {"role": "tool", "content": "Rain", "tool_call_id": "c", "name": "w"},
    ]
    llm = Llama(DEMO, n_ctx=64, chat_format="chatml", verbose=False)
    try:
        given = chat({"messages": json.loads(json.dumps(messages))}).arguments(llm)["messages"]
    finally:
        llm.close()
    del messages[1]["refusal"]
    assert given == messages


@pytest.mark.parametrize("calls", [[1], "abc", 7, [{}], [{"function": {"name": "x"}}]])
def test_calls_of_those_who_make_none(calls: Any) -> None:
    llm = Llama(DEMO, n_ctx=64, verbose=False)
    try:
        llm.metadata["tokenizer.chat_template"] = "{{ message.tool_calls | tojson }}"  # reads objects
        user = {"role": "user", "content": "Hi", "tool_calls": calls, "function_call": calls}
        [said] = chat({"messages": [user]}).arguments(llm)["messages"]
        assert said == {"role": "user", "content": "Hi"}
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "x"}, "no tool_call_id"),
        ({"role": "robot", "content": "x"}, "'robot' is no role"),
        ({"content": "x"}, "None is no role"),
        ({"role": [], "content": "x"}, "is no role"),
    ],
)
def test_messages_that_are_none(message: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        chat({"messages": [message]})


def test_turns_of_responses() -> None:
    """A text and calls in a row are one turn, as in a chat."""
    called = [{"type": "function_call", "call_id": str(i), "name": "w", "arguments": "{}"} for i in range(2)]
    over = [{"type": "function_call_output", "call_id": str(i), "output": "Rain"} for i in range(2)]
    asked = responses.read(
        {"input": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I look."}, *called, *over,
            called[0], over[0], {"role": "assistant", "content": "Rain."},
        ]}
    )  # fmt: skip
    turns = [(m["role"], m.get("content"), len(m.get("tool_calls", []))) for m in asked.messages]
    assert turns == [
        ("user", "Hi", 0), ("assistant", "I look.", 2), ("tool", "Rain", 0), ("tool", "Rain", 0),
        ("assistant", None, 1), ("tool", "Rain", 0), ("assistant", "Rain.", 0),
    ]  # fmt: skip


def test_several_tools_with_parts_of_their_own() -> None:
    """As pydantic writes nested models: each tool's references lead into itself."""
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {
            "type": "object", "required": ["to", "link"],
            "properties": {"to": {"$ref": "#/$defs/Address"}, "link": {"const": {"$ref": "#/x"}}},
            "$defs": {"Address": {"const": f"street {i}"}}}}}
        for i in range(2)
    ]  # fmt: skip
    request: dict[str, Any] = {"tools": tools, "tool_choice": "required"}
    demand(request)
    written = grammar_of_schema(request["response_format"]["schema"])._grammar
    assert "street 0" in written and "street 1" in written
    assert "#/x" in written and "arguments/x" not in written  # data that only looks like a reference


def test_references_into_long_lists() -> None:
    """Each is looked up, the list not walked: 237 KB of a request took half a minute."""
    schema = {"anyOf": [{"$ref": "#/x/0"}] * 3000, "x": [{"const": 1}] * 20_000}
    begun = time.process_time()
    check_schema(schema)
    assert time.process_time() - begun < 10
    for ref in ("#/x/20000", "#/x/-1", "#/x/00", "#/x/" + "1" * 5000, "#/x/\u0661"):
        with pytest.raises(ValueError, match="leads nowhere"):
            check_schema({**schema, "$ref": ref})


MOST = 6000  # tokens: seconds, in which the other request comes
SEA = [{"role": "user", "content": "The sea"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": SEA,
        "max_tokens": 400,
        "n": 2,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {"input": SEA, "max_output_tokens": MOST},
    "/v1/messages": {"messages": SEA, "max_tokens": MOST},
    "/api/chat": {"messages": SEA, "options": {"num_predict": MOST, "temperature": 0}},
}


def test_answers_that_give_way(tmp_path: Path) -> None:
    """With interrupt_requests an answer ends when another request comes, and says that it was cut."""
    goes_on = "{{ messages[-1].content }}"  # greedily, to the limit
    model = rewritten(
        DEMO,
        tmp_path / "model.gguf",
        ("tokenizer.chat",),
        partial(GGUFWriter.add_chat_template, value=goes_on),
    )
    with Server(
        "--model", model, "--n_ctx", 8192, "--n_threads", 1, "--draft", "off", "--interrupt_requests", "true",
    ) as server:  # fmt: skip
        for path, asked in PATHS.items():
            told: list[dict[str, Any]] = []
            begun = threading.Event()

            def read(path: str = path, body: Any = asked, told: Any = told, begun: Any = begun) -> None:
                body = {"stream": True, "model": "x", "temperature": 0, **body}
                with server.http() as http, http.stream("POST", path, json=body) as answer:
                    for line in answer.iter_lines():
                        if (data := line.removeprefix("data: ")).startswith("{"):
                            told.append(json.loads(data))
                        if len(told) > 8:
                            begun.set()

            reader = threading.Thread(target=read)
            reader.start()
            assert begun.wait(60)
            server.post("/v1/completions", prompt="x", max_tokens=1)
            reader.join(60)
            assert 8 < len(told) < MOST, path
            if path.startswith("/v1/chat"):
                ends = [
                    (c["index"], c["finish_reason"]) for e in told for c in e["choices"] if c["finish_reason"]
                ]
                assert (
                    ends == [(0, "length"), (1, "length")] and told[-1]["usage"]["completion_tokens"] < MOST
                )
            else:
                last = json.dumps(told[-3:])
                assert any(word in last for word in ('"incomplete"', '"max_tokens"', '"length"')), last


def test_no_token_of_a_prompt_that_is_told_again() -> None:
    with Server("--model", DEMO, "--n_ctx", 256, "--n_threads", 1) as server:
        body = {"prompt": "The sea was", "max_tokens": 12, "echo": True, "stream": True, "entmtp": True}
        shown, said = "", ""
        for line in server.post("/v1/completions", **body).text.splitlines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                said += chunk["choices"][0]["text"]
                shown += "".join(token["text"] for token in chunk["entmtp"]["tokens"])
        assert said == "The sea was" + shown and shown
