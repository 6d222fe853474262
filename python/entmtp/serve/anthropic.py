"""Anthropic's Messages API: a request put into the terms of a chat, and the chat's answer into its own."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from .asked import Asked, chat, is_whole
from .calls import json_of
from .errors import Refused
from .requests import ServedRequest

SAME = ("model", "stream", "temperature", "top_p", "top_k")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read(request: dict[str, Any]) -> Asked:
    """The chat that is asked for.

    Raises:
        Refused: with one sentence for the client.
    """
    thinking = request.get("thinking")
    if thinking and not (isinstance(thinking, dict) and thinking.get("type") == "disabled"):
        raise Refused("thinking: this server does not tell thoughts apart from the answer", "thinking")
    limit = request.get("max_tokens")
    if not (is_whole(limit) and limit > 0):
        raise Refused(f"max_tokens is {limit!r}, it must be 1 or more", "max_tokens")
    messages = request.get("messages")
    if not isinstance(messages, list):
        raise Refused("messages is not a list", "messages")
    said = {name: request[name] for name in SAME if request.get(name) is not None}
    if tools := request.get("tools"):
        if not isinstance(tools, list):
            raise Refused("tools is not a list", "tools")
        said["tools"] = [_tool(tool) for tool in tools]
        said["tool_choice"] = _choice(request.get("tool_choice"))
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    said["messages"] = [*system, *(part for message in messages for part in _messages(message))]
    return chat({**said, "max_tokens": limit, "stop": request.get("stop_sequences")})


def _tool(tool: Any) -> dict[str, Any]:
    if (
        not isinstance(tool, dict)
        or tool.get("type", "custom") != "custom"
        or not isinstance(tool.get("name"), str)
    ):
        kind = tool.get("type") if isinstance(tool, dict) else None
        raise Refused(
            f"tools: this server calls functions of the client only, and a tool is {kind!r}", "tools"
        )
    function = {k: tool[k] for k in ("name", "description") if tool.get(k) is not None}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}}


def _choice(choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else "auto" if choice is None else choice
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in CHOICES:
        raise Refused(f"tool_choice is {choice!r}, its type must be auto, any, tool or none", "tool_choice")
    return CHOICES[kind]


def _messages(message: Any) -> Iterator[Any]:
    """A message in OpenAI's terms: results of tools are messages of their own, before what else it says."""
    blocks = message.get("content") if isinstance(message, dict) else None
    if not isinstance(blocks, list):
        yield message
        return
    calls, texts = [], []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            content = block.get("content")
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": "" if content is None else content,
            }
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            texts.append(block)
    if calls:
        yield {"role": message.get("role"), "content": texts, "tool_calls": calls}
    elif texts or not blocks:
        yield {"role": message.get("role"), "content": texts}


class Answer:
    """One message, as far as it is written."""

    media_type = "text/event-stream"

    def __init__(self, request: dict[str, Any], served: ServedRequest):
        self.served = served
        self.stops = request.get("stop_sequences") or []
        self.reason: str | None = None
        self.blocks: list[dict[str, Any]] = []
        self.arguments = ""  # of the call that is being written
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": request.get("model"),
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip

    def begin(self) -> Iterator[bytes]:
        self.message["usage"]["input_tokens"] = self.served.usage()["prompt_tokens"]
        yield _event("message_start", message=self.message)

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """A chunk of a chat completion, or the whole of one."""
        choice = chunk["choices"][0]
        said = choice.get("delta") or choice.get("message") or {}
        self.reason = choice.get("finish_reason") or self.reason
        if text := said.get("content"):
            if not self.blocks or self.blocks[-1]["type"] != "text":
                yield from self._open({"type": "text", "text": ""})
            self.blocks[-1]["text"] += text
            yield self._delta({"type": "text_delta", "text": text})
        for call in said.get("tool_calls") or []:
            if call.get("id"):
                name = {"id": call["id"], "name": call["function"]["name"]}
                yield from self._open({"type": "tool_use", **name, "input": {}})
            if more := call["function"].get("arguments"):
                self.arguments += more
                yield self._delta({"type": "input_json_delta", "partial_json": more})

    def end(self) -> Iterator[bytes]:
        if not self.blocks:  # an empty answer is one, too
            yield from self._open({"type": "text", "text": ""})
        yield from self._close()
        yield _event("message_delta", delta=self._ended(), usage=self._usage())
        yield _event("message_stop")

    def error(self, refused: Refused) -> bytes:
        return refused.event("/v1/messages")

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        for _ in (*self.add(answer), *self.end()):
            pass
        return {**self.message, **self._ended(), "content": self.blocks, "usage": self._usage()}

    def _open(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self.blocks.append(block)
        yield _event("content_block_start", index=len(self.blocks) - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self.blocks:
            if self.blocks[-1]["type"] == "tool_use":
                self.blocks[-1]["input"] = json_of(self.arguments)
                self.arguments = ""
            yield _event("content_block_stop", index=len(self.blocks) - 1)

    def _usage(self) -> dict[str, int]:
        usage = self.served.usage()
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}

    def _ended(self) -> dict[str, Any]:
        """Why the text ended; which of several sequences stopped it is not known."""
        if self.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self.reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if self.stops and not self.served.at_end:
            return {
                "stop_reason": "stop_sequence",
                "stop_sequence": self.stops[0] if len(self.stops) == 1 else None,
            }
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
