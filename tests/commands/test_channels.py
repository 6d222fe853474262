"""Answers in channels, as gpt-oss writes them: thoughts, text and calls are told apart, whole and streamed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from entmtp.models.channels import CALL, TAGS, TEXT, THOUGHT, Channels, Piece
from entmtp.serve import ollama
from entmtp.serve.calls import for_template
from entmtp.serve.requests import ServedRequest
from entmtp.serve.written import streamed, whole
from helpers.serving import Server

FUNCTIONS: list[dict[str, Any]] = [{"name": "weather"}, {"name": "stop"}]
THINKS = "<|channel|>analysis<|message|>They ask 1 < 2.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes, it is <|here|>."

# as the model writes them: the text, thoughts, and calls
ANSWERS: dict[str, tuple[str, str, str, list[tuple[str, Any]]]] = {
    "thoughts and text": (THINKS + FINAL, "Yes, it is <|here|>.", "They ask 1 < 2.", []),
    "text alone": (FINAL.removeprefix("<|start|>assistant"), "Yes, it is <|here|>.", "", []),
    "a call": (
        THINKS + "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "<|Paris|>"}',
        "", "They ask 1 < 2.", [("weather", {"city": "<|Paris|>"})],
    ),
    "a call named with the role, as the template writes it": (
        THINKS + '<|start|>assistant to=functions.stop<|channel|>commentary json<|message|>{}<|call|>',
        "", "They ask 1 < 2.", [("stop", {})],
    ),
    "a call at once": (' to=functions.stop<|channel|>commentary json<|message|>{}', "", "", [("stop", {})]),
    "a sentence before a call": (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.stop "
        "json<|message|>{}",
        "I look.", "", [("stop", {})],
    ),
    "a call of nothing": (
        '<|channel|>commentary to=functions.fly json<|message|>{"to": 1}', '{"to": 1}', "", [],
    ),
    "a call that was cut off": (
        '<|channel|>commentary to=functions.weather json<|message|>{"cit', '{"cit', "", [],
    ),
    "a tool of the model's maker": (
        '<|channel|>analysis to=python code<|message|>1 + 1<|call|>', "", "1 + 1", [],
    ),
    "a channel that was begun for nothing": (
        "<|channel|>commentary to=assistant<|channel|>analysis<|message|>Hm.<|end|>" + FINAL,
        "Yes, it is <|here|>.", "Hm.", [],
    ),
    "thoughts without an end": (THINKS.removesuffix("<|end|>") + FINAL, "Yes, it is <|here|>.", "They ask 1 < 2.", []),
    "cut off in a thought": ("<|channel|>analysis<|message|>They", "", "They", []),
    "cut off in a tag": ("<|channel|>analysis<|message|>They<|en", "", "They<|en", []),
    "cut off in a channel's name": ("<|channel|>anal", "", "", []),
    "no channels": ("It is <|channel|>final<|message|>.", "It is <|channel|>final<|message|>.", "", []),
    "the beginning of a tag": ("<|chann", "<|chann", "", []),
    "to": (" to= you", " to= you", "", []),
}  # fmt: skip


def in_short(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_whole_answer(name: str) -> None:
    text, said, thoughts, calls = ANSWERS[name]
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    whole(choice, FUNCTIONS)
    message = choice["message"]
    assert in_short(message.get("tool_calls", [])) == calls
    assert message["content"] == (said or None) and message.get("reasoning_content", "") == thoughts
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("name", ANSWERS)
@given(data=st.data())
def test_a_stream(name: str, data: st.DataObject) -> None:
    text, said, thoughts, calls = ANSWERS[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    deltas: list[dict[str, Any]] = [{"role": "assistant"}]
    deltas += [{"content": text[a:b]} for a, b in itertools.pairwise(cuts)] + [{}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    found = [chunk["choices"][0] for chunk in streamed(iter(chunks), FUNCTIONS)]
    for key, expected in {"content": said, "reasoning_content": thoughts}.items():
        assert "".join(choice["delta"].get(key, "") for choice in found) == expected
    assert in_short([call for choice in found for call in choice["delta"].get("tool_calls", [])]) == calls
    assert found[-1]["finish_reason"] == ("tool_calls" if calls else "stop")


WORDS = [
    "<|channel|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>", "assistant", "analysis", "final",
    "commentary", " to=functions.f", " to=python", "<", "<|", "|>", " ", "json", "{}", "text",
]  # fmt: skip


def split(text: str) -> list[Piece]:
    """The same at once, with one expression: what stands before each message, and what in it."""
    if not re.match(r"( to=[^\s<]*\s?)?<\|channel\|>", text):
        return [Piece(TEXT, text)] if text else []
    found: list[Piece] = []
    while text:
        head = re.match(r"(?s).*?<\|message\|>", text)
        if head is None or head.end() > 256:  # no tag is so far away in these texts
            return [*found, Piece(TAGS, text)]
        function = re.findall(r" to=functions\.([^\s<]+)", head[0])
        others = [to for to in re.findall(r" to=([^\s<]*)", head[0]) if to != "assistant"]
        channels = re.findall(r"<\|channel\|>\s*(\w+)", head[0])
        named = function[-1] if function and others[-1] == f"functions.{function[-1]}" else ""
        kind = CALL if named else THOUGHT if others or channels[-1:] == ["analysis"] else TEXT
        ends = r"(?s)(.*?)(<\|end\|>|<\|call\|>|<\|return\|>|(?=<\|start\|>|<\|channel\|>)|$)"
        body = re.match(ends, text[head.end() :])
        assert body is not None
        found += [Piece(TAGS, head[0]), Piece(kind, body[1], named), Piece(TAGS, body[2])]
        text = text[head.end() + body.end() :]
    return found


def merged(pieces: list[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind and piece.kind != CALL:
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        elif piece.text:
            found.append(piece)
    return found


@given(
    st.lists(st.sampled_from(WORDS), max_size=16).map(lambda words: "<|channel|>" + "".join(words)),
    st.integers(1, 9),
)
@example("<|channel|>final<|message|><|channel|>analysis<|message|>x", 1)
def test_pieces_of_any_size_are_those_of_the_whole(text: str, size: int) -> None:
    channels = Channels()
    pieces = [p for i in range(0, len(text), size) for p in channels.add(text[i : i + size], last=False)]
    pieces += channels.add("", last=True)
    assert "".join(piece.text for piece in pieces) == text
    if "<|message|>" not in text or len(text) < 200:
        assert merged(pieces) == merged(split(text))


def test_a_head_without_an_end_is_not_kept_for_ever() -> None:
    channels = Channels()
    found = [
        channels.add("<|channel|>", last=False),
        *(channels.add("x" * 100, last=False) for _ in range(100)),
    ]
    assert sum(len(p.text) for pieces in found for p in pieces) > 9000


def test_what_was_thought_before_a_call_goes_back() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "assistant", "content": "So.", "reasoning_content": "Ah."},
    ]
    found = for_template(messages, "{{ message.thinking }}")
    assert found == [messages[0], {**messages[1], "thinking": "Hm."}, messages[2]]
    assert for_template(messages, "{{ message.content }}") == messages


#
# over the wire: a grammar has the toy write what gpt-oss would
#

TOOLS = [
    {"type": "function", "function": {"name": f["name"], "parameters": {"type": "object"}}} for f in FUNCTIONS
]
MESSAGES = [{"role": "user", "content": "The sea"}]


def writes(text: str) -> dict[str, Any]:
    return {
        "messages": MESSAGES,
        "max_tokens": 200,
        "temperature": 0.0,
        "grammar": f"root ::= {json.dumps(text)}",
    }


def test_openai(chatting: Server) -> None:
    [answer] = chatting.post("/v1/chat/completions", **writes(THINKS + FINAL)).json()["choices"]
    message = answer["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes, it is <|here|>.", "They ask 1 < 2.")
    said, thoughts, shown = "", "", ""
    asked = writes(THINKS + FINAL) | {"stream": True, "entmtp": True}
    for line in chatting.post("/v1/chat/completions", **asked).text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            delta = chunk["choices"][0]["delta"]
            said, thoughts = said + delta.get("content", ""), thoughts + delta.get("reasoning_content", "")
            shown += "".join(token["text"] for token in chunk["entmtp"]["tokens"])
    assert (said, thoughts, shown) == (
        "Yes, it is <|here|>.",
        "They ask 1 < 2.",
        "They ask 1 < 2.Yes, it is <|here|>.",
    )


def test_calls(chatting: Server) -> None:
    text, _, thoughts, calls = ANSWERS["a call"]
    [answer] = chatting.post("/v1/chat/completions", **writes(text), tools=TOOLS).json()["choices"]
    assert in_short(answer["message"]["tool_calls"]) == calls and answer["finish_reason"] == "tool_calls"
    assert answer["message"]["reasoning_content"] == thoughts and answer["message"]["content"] is None
    with chatting.client().chat.completions.stream(
        model="x", tools=TOOLS, messages=MESSAGES, max_tokens=200, temperature=0.0,  # type: ignore[arg-type]
        extra_body={"grammar": writes(text)["grammar"]},
    ) as stream:  # fmt: skip
        final = stream.get_final_completion().choices[0]
    assert [
        (c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls or []
    ] == calls
    # and back
    history = [*MESSAGES, answer["message"], {"role": "tool", "tool_call_id": "c", "content": "Rain."}]
    asked = writes("Fine.") | {"messages": history}
    assert (
        chatting.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"] == "Fine."
    )


@pytest.mark.parametrize("stream", [False, True])
def test_ollama(stream: bool) -> None:
    """Which takes no grammar: its form, of an answer that has text and thoughts."""

    async def messages_of() -> list[dict[str, Any]]:
        form = ollama.Chat({}, ServedRequest(""))
        if stream:
            texts: list[dict[str, Any]] = [{"content": THINKS}, {"content": FINAL}, {}]
            chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in texts]
            chunks[-1]["choices"][0]["finish_reason"] = "stop"
            return [json.loads(line)["message"] for c in streamed(iter(chunks), []) for line in form.add(c)]
        choice: dict[str, Any] = {"message": {"content": THINKS + FINAL}, "finish_reason": "stop"}
        whole(choice, [])
        return [form.whole({"choices": [choice]})["message"]]

    messages = asyncio.run(messages_of())
    assert "".join(message["content"] for message in messages) == "Yes, it is <|here|>."
    assert "".join(message.get("thinking", "") for message in messages) == "They ask 1 < 2."
