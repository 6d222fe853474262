"""Calls that a model writes by itself: found in its text, whole and streamed; and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entmtp.serve.anthropic import Answer
from entmtp.serve.calls import for_template
from entmtp.serve.requests import ServedRequest
from entmtp.serve.written import FORMS, Written, streamed, whole
from helpers.serving import Server

FUNCTIONS: list[dict[str, Any]] = [
    {"name": "weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "code": {"type": "string"}}}},
    {"name": "stop"},
]  # fmt: skip
PARIS = ("weather", {"city": "Paris", "days": 3})
STOP = ("stop", {})

# as models write them by their templates: the text, what is left of it, and its calls
ANSWERS: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "Hermes, Qwen": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>', "", [PARIS],
    ),
    "after a sentence, two of them": (
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>', "Let me look.", [PARIS, STOP],
    ),
    "the last tag was the end of the text": (
        '<tool_call>{"name": "stop", "arguments": {}}', "", [STOP],
    ),
    "Qwen's coders": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "<parameter=code>\n12\n</parameter>\n</function>\n</tool_call>",
        "", [("weather", {"city": "Paris", "days": 3, "code": "12"})],
    ),
    "GLM": (
        "Well.<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>stop</tool_call>", "Well.", [PARIS, STOP],
    ),
    "DeepSeek V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", [PARIS, STOP],
    ),
    "DeepSeek V3.1": (
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>", "I look.", [PARIS, STOP],
    ),
    "DeepSeek V4": (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="stop">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>', "", [PARIS, STOP],
    ),
    "DeepSeek V4, a number as text": (
        '<｜DSML｜tool_calls><｜DSML｜invoke name="weather"><｜DSML｜parameter name="days" string="true">3'
        "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜tool_calls>", "", [("weather", {"days": "3"})],
    ),
    "DeepSeek V4, its mark and other tags in a text": (
        '<｜DSML｜tool_calls><｜DSML｜invoke name="weather"><｜DSML｜parameter name="city" string="true">｜DSML｜ '
        "</parameter></｜DSML｜parameter></｜DSML｜invoke></｜DSML｜tool_calls>",
        "", [("weather", {"city": "｜DSML｜ </parameter>"})],
    ),
    "Kimi": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>", "", [PARIS, STOP],
    ),
    "MiniMax": (
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n<parameter name="code">\n12\n</parameter>\n</invoke>\n'
        '<invoke name="stop">\n</invoke>\n</minimax:tool_call>',
        "", [("weather", {"city": "Paris", "days": 3, "code": "12"}), STOP],
    ),
    "Llama 3": ('{"name": "weather", "parameters": {"city": "Paris", "days": 3}}', "", [PARIS]),
    "Llama 3, with its type": (
        ' {"type": "function", "function": {"name": "weather", "parameters": {"city": "Paris", "days": 3}}}',
        "", [PARIS],
    ),
    "Llama 3, another": ('{"type": "function", "name": "stop", "parameters": {}}', "", [STOP]),
    "Mistral": ('[{"name": "stop", "arguments": {}}, {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", '
                '\\"days\\": 3}"}]', "", [STOP, PARIS]),
    # no calls
    "text": ("It rains < 3 days <tool in Paris.", "It rains < 3 days <tool in Paris.", []),
    "white space": ("  \n ", "  \n ", []),
    "JSON": ('{"name": "Anna", "age": 3}', '{"name": "Anna", "age": 3}', []),
    "other JSON": ('{"city": "Paris"}', '{"city": "Paris"}', []),
    "an unknown function": (
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>!',
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>!', [],
    ),
    "a list with one that is none": (
        '[{"name": "stop", "arguments": {}}, {"name": "fly"}]',
        '[{"name": "stop", "arguments": {}}, {"name": "fly"}]', [],
    ),
    "cut off": ('{"name": "weather", "argum', '{"name": "weather", "argum', []),
    "cut off between tags": ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
    "cut off between elements": (text := "<tool_call><function=weather><parameter=city>Par", text, []),
    "cut off in another's arguments": (
        text := "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n", text, [],
    ),
    "cut off in an element": (
        text := '<minimax:tool_call><invoke name="weather"><parameter name="city">Paris</parameter>', text, [],
    ),
    "a section with a call of nothing": (
        text := "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>fly<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", text, [],
    ),
    "cut off in a section": (
        text := '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Par', text, [],
    ),
    "cut off in a fence": (
        text := '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city"', text, [],
    ),
    "cut off in a numbered call": (
        text := "<|tool_calls_section_begin|><|tool_call_begin|>functions.stop:0<|tool_call_argument_begin|>{",
        text, [],
    ),
    "an empty section": (text := "<|tool_calls_section_begin|><|tool_calls_section_end|>", text, []),
    "no number of JSON": (
        '{"name": "weather", "arguments": {"days": NaN}}', '{"name": "weather", "arguments": {"days": NaN}}', [],
    ),
    "no arguments": ('{"name": "stop"}', '{"name": "stop"}', []),
    "deep": ('{"name": "stop", "arguments": ' + "[" * 5000, '{"name": "stop", "arguments": ' + "[" * 5000, []),
}  # fmt: skip


def in_short(calls: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    assert all(call["type"] == "function" and call["id"] for call in calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_in_a_whole_answer(name: str) -> None:
    text, rest, calls = ANSWERS[name]
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    whole(choice, FUNCTIONS)
    assert in_short(choice["message"].get("tool_calls", [])) == calls
    assert choice["message"]["content"] == (rest or None)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("name", ANSWERS)
@given(data=st.data())
def test_pieces_of_any_size_give_the_same(name: str, data: st.DataObject) -> None:
    text, rest, calls = ANSWERS[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    found = [chunk["choices"][0] for chunk in streamed(iter(chunks), FUNCTIONS)]
    said = "".join(choice["delta"].get("content", "") for choice in found)
    deltas = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    assert in_short(deltas) == calls and [call["index"] for call in deltas] == list(range(len(calls)))
    assert said.strip() == rest.strip() if calls else said == rest
    assert found[-1]["finish_reason"] == ("tool_calls" if calls else "stop")


@given(
    st.lists(
        st.sampled_from([*FORMS, *(closed for closed, _ in FORMS.values()), *'<tool_｜>/{}[]":name stop\n']),
        max_size=30,
    ).map("".join),
    st.integers(1, 7),
)
def test_no_text_is_lost(text: str, size: int) -> None:
    """What is no call is said, character by character."""
    written = Written([])
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(written.add(piece, False)[0] for piece in pieces) + written.add("", True)[0] == text


CALL = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'


@given(
    st.lists(
        st.sampled_from([CALL, "<tool_call>{", '{"name": "stop", "', "one", "two", " ", "\n\n"]), max_size=12
    ).map("".join),
    st.integers(1, 40),
    st.sampled_from(["stop", "length"]),
)
def test_text_around_calls(text: str, size: int, end: str) -> None:
    """Streamed it is what it is whole, its white space too, and so is why it ended."""
    choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": end}
    whole(choice, FUNCTIONS)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": end}]})
    found = [chunk["choices"][0] for chunk in streamed(iter(chunks), FUNCTIONS)]
    said = "".join(choice["delta"].get("content", "") for choice in found)
    calls = [call for choice in found for call in choice["delta"].get("tool_calls", [])]
    assert in_short(calls) == in_short(choice["message"].get("tool_calls", []))
    # white space before a text is streamed before it can be known that a call comes
    assert (said.lstrip() if calls else said) == (choice["message"]["content"] or "")
    assert found[-1]["finish_reason"] == choice["finish_reason"]


def test_a_call_and_half_of_another_are_cut_off() -> None:
    text = '<tool_call>{"name": "stop", "arguments": {}}</tool_call><tool_call>{"na'
    choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": "length"}
    whole(choice, FUNCTIONS)
    assert in_short(choice["message"]["tool_calls"]) == [STOP] and choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "properties", [None, [], True, {"city": True}, {"city": {"type": ["string", "null"]}}]
)
def test_schemas_of_all_kinds(properties: Any) -> None:
    """Where a schema does not say that a parameter is a text, it is read as JSON if it is some."""
    functions = [{"name": "weather", "parameters": {"properties": properties}}]
    parts = "<parameter=city>12</parameter><parameter=day>May</parameter>"
    text = f"<tool_call><function=weather>{parts}</function></tool_call>"
    _, calls = Written(functions).add(text, last=True)
    assert in_short(calls) == [("weather", {"city": 12, "day": "May"})]


def test_arguments_as_templates_read_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    broken = {"id": "d", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages: list[Any] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call, broken]},
    ]
    for reads_objects in (
        "{{ tool_call.arguments | tojson }}", "{{- tool_call.function.arguments|tojson -}}",
        "{% for k, v in tool_call['arguments']|items %}", "{{ tool_call.function | tojson }}",
    ):  # fmt: skip
        found = for_template(messages, reads_objects)
        assert found[1]["tool_calls"][0]["function"]["arguments"] == {"n": 1}
        assert found[1]["tool_calls"][1] == broken
    for_texts = "{{ tool.function | tojson }}{{ '```json' + call.function.arguments + '```' }}"
    assert for_template(messages, for_texts) == messages
    text = "{{ '```json' + tool['function']['arguments'] + '```' }}{{ tools | tojson }}"
    assert for_template(messages, text) == messages
    assert call["function"]["arguments"] == '{"n": 1}'  # type: ignore[index]


#
# over the wire: a grammar has the toy write what a model would
#

TOOLS = [{"type": "function", "function": {**FUNCTIONS[0], "name": name}} for name in ("weather", "stop")]
WRITES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "The sea"}],
    "max_tokens": 120, "temperature": 0.0, "grammar": f"root ::= {json.dumps('Look: ' + WRITES)}",
}  # fmt: skip


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_openai(chatting: Server, choice: dict[str, str]) -> None:
    [answer] = chatting.post("/v1/chat/completions", **ASKED, **choice, tools=TOOLS).json()["choices"]
    assert in_short(answer["message"]["tool_calls"]) == [PARIS]
    assert answer["message"]["content"] == "Look:" and answer["finish_reason"] == "tool_calls"
    # as their client puts a stream together
    with chatting.client().chat.completions.stream(
        model="x", tools=TOOLS, messages=ASKED["messages"], max_tokens=120, temperature=0.0,  # type: ignore[arg-type]
        extra_body={"grammar": ASKED["grammar"]}, **choice,  # type: ignore[arg-type]
    ) as stream:  # fmt: skip
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and (final.message.content or "").strip() == "Look:"
    assert [json.loads(call.function.arguments) for call in final.message.tool_calls or []] == [PARIS[1]]


def test_none_is_wanted(chatting: Server) -> None:
    """Without tools, or where the client wants no calls, the text is what the model wrote."""
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        [answer] = chatting.post("/v1/chat/completions", **ASKED, **more).json()["choices"]
        assert answer["message"]["content"] == "Look: " + WRITES and "tool_calls" not in answer["message"]


# what Llama 3 would write
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"const": "weather"},
        "parameters": {
            "type": "object",
            "properties": {"city": {"const": "Paris"}, "days": {"const": 3}},
            "required": ["city", "days"],
        },
    },
    "required": ["name", "parameters"],
}


def test_responses(chatting: Server) -> None:
    tools = [{"type": "function", **FUNCTIONS[0], "name": name} for name in ("weather", "stop")]
    form = {"format": {"type": "json_schema", "name": "call", "schema": SCHEMA}}
    asked = {"input": "The sea", "max_output_tokens": 120, "temperature": 0.0, "text": form}
    [call] = chatting.post("/v1/responses", **asked, tools=tools).json()["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", *PARIS)


@pytest.mark.parametrize("stream", [False, True])
def test_ollama(chatting: Server, stream: bool) -> None:
    asked = {
        "messages": ASKED["messages"],
        "options": {"temperature": 0.0, "num_predict": 120},
        "format": SCHEMA,
    }
    answer = chatting.post("/api/chat", **asked, tools=TOOLS, stream=stream).text
    messages = [json.loads(line)["message"] for line in answer.splitlines()]
    [call] = [call for message in messages for call in message.get("tool_calls", [])]
    assert (call["function"]["name"], call["function"]["arguments"]) == PARIS
    assert not any(message["content"] for message in messages)


def test_anthropic() -> None:
    """Which takes no grammar: its form, of an answer that has text and calls."""
    choice: dict[str, Any] = {"message": {"content": "Look.\n" + WRITES + WRITES}, "finish_reason": "stop"}
    whole(choice, FUNCTIONS)

    async def form() -> dict[str, Any]:
        return Answer({}, ServedRequest("")).whole({"choices": [choice]})

    message = asyncio.run(form())
    assert [block["type"] for block in message["content"]] == ["text", "tool_use", "tool_use"]
    assert [(b["name"], b["input"]) for b in message["content"][1:]] == [PARIS, PARIS]
    assert message["stop_reason"] == "tool_use"
