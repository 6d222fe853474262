"""OpenAI's Responses API: a request put into the terms of a chat, and the chat's answer into its own."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from .asked import Asked, chat, is_whole
from .errors import Refused
from .requests import ServedRequest

SAME = ("model", "stream", "temperature", "top_p", "seed", "tool_choice", "user")
UNKNOWN = {
    "previous_response_id": "answers are not kept; send the whole conversation as input",
    "conversation": "conversations are not kept; send the whole conversation as input",
    "background": "answers are not kept; wait for it, or stream it",
    "prompt": "prompts are not kept; send instructions and input",
}


def read(asked: dict[str, Any]) -> Asked:
    """The chat that is asked for.

    Raises:
        Refused: with one sentence for the client.
    """
    for name, why in UNKNOWN.items():
        if asked.get(name):
            raise Refused(f"{name}: {why}", name)
    limit = asked.get("max_output_tokens")
    if limit is not None and not (is_whole(limit) and limit > 0):
        raise Refused(f"max_output_tokens is {limit!r}, it must be 1 or more", "max_output_tokens")
    said = {name: asked[name] for name in SAME if asked.get(name) is not None}
    said["messages"] = _in_turns(_messages(asked))
    if limit is not None:
        said["max_tokens"] = limit
    if (form := _format(asked.get("text"))) is not None:
        said["response_format"] = form
    if tools := asked.get("tools"):
        said["tools"] = [_tool(tool) for tool in _list(tools, "tools")]
    choice = said.get("tool_choice")
    if isinstance(choice, dict):
        said["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    if said.get("stream"):
        said["stream_options"] = {"include_usage": True}
    return chat(said)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(f"{name} is not a list", name)
    return value


def _messages(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if (instructions := asked.get("instructions")) is not None:
        yield {"role": "system", "content": instructions}
    given = asked.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    for item in _list(given, "input"):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message" and "role" in item:
            yield {"role": item["role"], "content": item.get("content")}
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            yield {"role": "assistant", "tool_calls": [call]}
        elif kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        else:
            raise Refused(f"input: this server does not know an item of type {kind!r}", "input")


def _in_turns(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls in a row, and a text before them, are one turn of the assistant."""
    turns = list[dict[str, Any]]()
    for message in messages:
        if turns and "tool_calls" in message and turns[-1]["role"] == "assistant":
            turns[-1]["tool_calls"] = turns[-1].get("tool_calls", []) + message["tool_calls"]
        else:
            turns.append(message)
    return turns


def _format(text: Any) -> dict[str, Any] | None:
    form: Any = text.get("format") if isinstance(text, dict) else text
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema" or not isinstance(form.get("schema"), dict):
        raise Refused("text.format is text, json_object, or json_schema with a schema", "text")
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _tool(tool: Any) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise Refused(f"tools: this server calls functions only, and a tool is {kind!r}", "tools")
    function = {k: tool[k] for k in ("name", "description", "parameters") if tool.get(k) is not None}
    return {"type": "function", "function": {"parameters": {}, **function}}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Answer:
    """One response, as far as it is written."""

    media_type = "text/event-stream"

    def __init__(self, asked: dict[str, Any], served: ServedRequest):
        self.n_events = 0
        self.item: dict[str, Any] | None = None  # the one that is being written
        self.reason: str | None = None
        self.response: dict[str, Any] = {
            "id": _id("resp"), "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "model": asked.get("model"), "output": [], "error": None, "incomplete_details": None, "usage": None,
            "instructions": asked.get("instructions"), "max_output_tokens": asked.get("max_output_tokens"),
            "temperature": asked.get("temperature"), "top_p": asked.get("top_p"),
            "tools": asked.get("tools") or [], "tool_choice": asked.get("tool_choice") or "auto",
            "text": asked.get("text") or {"format": {"type": "text"}}, "parallel_tool_calls": False,
            "metadata": asked.get("metadata") or {}, "previous_response_id": None, "store": False,
        }  # fmt: skip

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.n_events, **fields}
        self.n_events += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()

    def begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """A chunk of a chat completion, or the whole of one."""
        self.response["model"] = chunk.get("model")
        for choice in chunk["choices"]:
            said = choice.get("delta") or choice.get("message") or {}
            for call in said.get("tool_calls") or []:
                yield from self._call(call)
            if said.get("content"):
                yield from self._say(said["content"])
            self.reason = choice.get("finish_reason") or self.reason
        if usage := chunk.get("usage"):
            self.response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }  # fmt: skip

    def end(self) -> Iterator[bytes]:
        if not self.response["output"] and self.item is None:
            yield from self._say("")  # an empty answer is one, too
        yield from self._close()
        cut = self.reason == "length"
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        yield self._event(f"response.{self.response['status']}", response=self.response)

    def error(self, refused: Refused) -> bytes:
        return refused.event("/v1/responses", self.n_events)

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        for _ in (*self.add(answer), *self.end()):
            pass
        return self.response

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close()
        self.item = item
        yield self._event("response.output_item.added", output_index=len(self.response["output"]), item=item)

    def _where(self) -> dict[str, Any]:
        assert self.item is not None
        where = {"item_id": self.item["id"], "output_index": len(self.response["output"])}
        return where | ({"content_index": 0} if self.item["type"] == "message" else {})

    def _say(self, text: str) -> Iterator[bytes]:
        if self.item is None or self.item["type"] != "message":
            item = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
            yield from self._open({**item, "content": []})
            assert self.item is not None
            yield self._event("response.content_part.added", **self._where(), part=_text_part(""))
            self.item["content"] = [_text_part("")]
        self.item["content"][0]["text"] += text
        if text:
            yield self._event("response.output_text.delta", **self._where(), delta=text, logprobs=[])

    def _call(self, call: dict[str, Any]) -> Iterator[bytes]:
        function = call.get("function") or {}
        if self.item is None or self.item.get("call_id") != (call.get("id") or self.item.get("call_id")):
            item = {"id": _id("fc"), "type": "function_call", "status": "in_progress", "arguments": ""}
            yield from self._open({**item, "call_id": call.get("id"), "name": function.get("name")})
            assert self.item is not None
        if more := function.get("arguments"):
            self.item["arguments"] += more
            yield self._event("response.function_call_arguments.delta", **self._where(), delta=more)

    def _close(self) -> Iterator[bytes]:
        if self.item is None:
            return
        self.item["status"] = "completed"
        if self.item["type"] == "message":
            part = self.item["content"][0]
            yield self._event("response.output_text.done", **self._where(), text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **self._where(), part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done", **self._where(), arguments=self.item["arguments"]
            )
        index = len(self.response["output"])
        yield self._event("response.output_item.done", output_index=index, item=self.item)
        self.response["output"].append(self.item)
        self.item = None
