"""Anthropic's Messages API, texts only: a request put into the terms of a chat, and the chat's answer into its own."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from .asked import Asked, chat, is_whole
from .errors import Refused
from .requests import ServedRequest

SAME = ("model", "stream", "temperature", "top_p", "top_k")


def read(request: dict[str, Any]) -> Asked:
    """The chat that is asked for.

    Raises:
        Refused: with one sentence for the client.
    """
    for name in ("tools", "thinking"):
        value = request.get(name)
        if value and not (isinstance(value, dict) and value.get("type") == "disabled"):
            raise Refused(f"{name}: this server answers /v1/messages with text only", name)
    limit = request.get("max_tokens")
    if not (is_whole(limit) and limit > 0):
        raise Refused(f"max_tokens is {limit!r}, it must be 1 or more", "max_tokens")
    messages = request.get("messages")
    if not isinstance(messages, list):
        raise Refused("messages is not a list", "messages")
    said = {name: request[name] for name in SAME if request.get(name) is not None}
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    return chat(
        {**said, "max_tokens": limit, "stop": request.get("stop_sequences"), "messages": [*system, *messages]}
    )


class Answer:
    """One message, as far as it is written."""

    media_type = "text/event-stream"

    def __init__(self, request: dict[str, Any], served: ServedRequest):
        self.served = served
        self.stops = request.get("stop_sequences") or []
        self.reason: str | None = None
        self.text = ""
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": request.get("model"),
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip

    def begin(self) -> Iterator[bytes]:
        self.message["usage"]["input_tokens"] = self.served.usage()["prompt_tokens"]
        yield _event("message_start", message=self.message)
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        choice = chunk["choices"][0]
        text = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        self.reason = choice.get("finish_reason") or self.reason
        self.text += text
        if text:
            yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self) -> Iterator[bytes]:
        yield _event("content_block_stop", index=0)
        ended = self._ended()
        yield _event("message_delta", delta=ended, usage=self._usage())
        yield _event("message_stop")

    def error(self, refused: Refused) -> bytes:
        return refused.event("/v1/messages")

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        for _ in self.add(answer):
            pass
        content = [{"type": "text", "text": self.text}]
        return {**self.message, **self._ended(), "content": content, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        usage = self.served.usage()
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}

    def _ended(self) -> dict[str, Any]:
        """Why the text ended; which of several sequences stopped it is not known."""
        if self.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self.stops and not self.served.at_end:
            return {
                "stop_reason": "stop_sequence",
                "stop_sequence": self.stops[0] if len(self.stops) == 1 else None,
            }
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
