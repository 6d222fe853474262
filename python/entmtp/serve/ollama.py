"""Ollama's API: a request put into the terms of a chat, and the chat's answer into lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request

from .. import __version__
from . import asked
from .asked import Asked, parse
from .calls import json_of
from .errors import Refused
from .model import Models
from .requests import ServedRequest

# of `options`, and what OpenAI's or llama-cpp-python's API calls it; others are of Ollama's own way to load a model
OPTIONS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "repeat_penalty": "repeat_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "mirostat": "mirostat_mode", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip


def read_chat(request: dict[str, Any]) -> Asked:
    """Of `/api/chat`; without messages a model is only loaded."""
    messages = request.get("messages") or []
    if not isinstance(messages, list):
        raise Refused("messages is not a list", "messages")
    said = {**_common(request), "messages": [_message(m) for m in messages]}
    if request.get("tools"):
        said["tools"] = request["tools"]
    return _read(asked.chat(said), bool(messages))


def read_text(request: dict[str, Any]) -> Asked:
    """Of `/api/generate`: a chat of one question; with `raw`, a text that goes on; without a prompt nothing."""
    for name in ("images", "suffix"):
        if request.get(name):
            raise Refused(f"{name}: this server cannot do that: it continues texts", name)
    prompt = request.get("prompt", "")
    if not isinstance(prompt, str):
        raise Refused("prompt is not a text", "prompt")
    said = _common(request)
    if request.get("raw"):
        if "response_format" in said:
            raise Refused("format goes with a chat; leave raw out", "format")
        said["logprobs"] = said.pop("top_logprobs", 0) if said.get("logprobs") else None
        return _read(asked.text({"max_tokens": None, **said, "prompt": prompt}), bool(prompt))
    messages = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    return _read(
        asked.chat({**said, "messages": [*messages, {"role": "user", "content": prompt}]}), bool(prompt)
    )


def _read(wanted: Asked, is_question: bool) -> Asked:
    if not is_question:
        wanted.choices = []
    return wanted


def _common(request: dict[str, Any]) -> dict[str, Any]:
    options = request.get("options") or {}
    if not isinstance(options, dict):
        raise Refused("options is not an object", "options")
    said = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
    thinks = request.get("think")
    if thinks is not None:  # yes, no, or how much
        said["reasoning_effort"] = thinks if isinstance(thinks, str) else "medium" if thinks else "none"
    said["stream"] = True if request.get("stream") is None else request["stream"]
    if isinstance(model := request.get("model"), str):
        said["model"] = model
    said |= {name: request[name] for name in ("logprobs", "top_logprobs") if request.get(name) is not None}
    limit = options.get("num_predict")
    if limit is not None and not asked.is_whole(limit):
        raise Refused(f"num_predict is {limit!r}, it must be a whole number", "options")
    if limit is not None and limit >= 0:  # below, there is no limit
        said["max_tokens"] = limit
    form = request.get("format")
    if isinstance(form, dict):
        said["response_format"] = {"type": "json_object", "schema": form}
    elif form == "json":
        said["response_format"] = {"type": "json_object"}
    elif form:
        raise Refused(f'format is {form!r}, it must be "json" or a schema', "format")
    return said


def _message(message: Any) -> Any:
    """A message as OpenAI has it: arguments of calls are a text, and an answer names its call."""
    if not isinstance(message, dict):
        raise Refused("messages: a message is not an object", "messages")
    if message.get("images"):
        raise Refused("messages: this server reads text, and a message has images", "messages")
    said = {"role": message.get("role"), "content": message.get("content", "")}
    if message.get("thinking"):
        said["reasoning_content"] = message["thinking"]
    if message.get("role") == "tool":
        said["tool_call_id"] = message.get("tool_call_id") or message.get("tool_name") or ""
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [
            {"id": f"call_{i}", "type": "function",
             "function": {"name": c["function"]["name"], "arguments": json.dumps(c["function"].get("arguments"))}}
            for i, c in enumerate(calls)
            if isinstance(c, dict) and isinstance(c.get("function"), dict) and "name" in c["function"]
        ]  # fmt: skip
    return said


class Generated:
    """An answer of `/api/generate`."""

    media_type = "application/x-ndjson"

    def __init__(self, request: dict[str, Any], served: ServedRequest):
        self.served = served
        self.model = request.get("model")
        self.reason = "load"  # nothing was asked
        self.calls: list[dict[str, str]] = []

    def said(self, text: str, thoughts: str = "") -> dict[str, Any]:
        return {"response": text} | ({"thinking": thoughts} if thoughts else {})

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        if any(parts := self._parts(chunk)):
            yield self._line(**self.said(*parts), **_logprobs(chunk), done=False)

    def end(self) -> Iterator[bytes]:
        yield self._line(**self.said(""), **self._summary())

    def error(self, refused: Refused) -> bytes:
        return refused.event(self.served.path)

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        parts = self._parts(answer) if answer else ("", "")
        return {**self._head(), **self.said(*parts), **_logprobs(answer), **self._summary()}

    def _parts(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """Text and thoughts of a chunk, or of a whole answer; calls of tools are kept for the end."""
        choice = chunk["choices"][0]
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        self.reason = "length" if choice.get("finish_reason") == "length" else "stop"
        for call in said.get("tool_calls") or []:
            function = call["function"]
            if function.get("name") and (not self.calls or call.get("id") != self.calls[-1]["id"]):
                self.calls.append({"id": call.get("id"), "name": function["name"], "arguments": ""})
            self.calls[-1]["arguments"] += function.get("arguments") or ""
        return said.get("content") or "", said.get("reasoning_content") or ""

    def _head(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": _date(time.time())}

    def _line(self, **fields: Any) -> bytes:
        return json.dumps({**self._head(), **fields}).encode() + b"\n"

    def _summary(self) -> dict[str, Any]:
        """How it ended, with times in nanoseconds."""
        served, now = self.served, time.perf_counter()
        started = served.started or now
        first = served.first_token or now
        usage = served.usage()
        return {
            "done": True, "done_reason": self.reason, "load_duration": 0,
            "total_duration": _ns(now - served.arrived),
            "prompt_eval_count": usage["prompt_tokens"], "prompt_eval_duration": _ns(first - started),
            "eval_count": usage["completion_tokens"], "eval_duration": _ns(now - first),
        }  # fmt: skip


class Chat(Generated):
    """An answer of `/api/chat`."""

    def said(self, text: str, thoughts: str = "") -> dict[str, Any]:
        told = {"thinking": thoughts} if thoughts else {}
        return {"message": {"role": "assistant", "content": text} | told}

    def end(self) -> Iterator[bytes]:
        if self.calls:
            yield self._line(
                message={"role": "assistant", "content": "", "tool_calls": self._called()}, done=False
            )
        yield from super().end()

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        whole = super().whole(answer)
        if self.calls:
            whole["message"]["tool_calls"] = self._called()
        return whole

    def _called(self) -> list[dict[str, Any]]:
        return [{"function": {"name": c["name"], "arguments": json_of(c["arguments"])}} for c in self.calls]


def _logprobs(chunk: dict[str, Any]) -> dict[str, Any]:
    """Those of a chunk, a token each."""
    told = (chunk["choices"][0] if chunk else {}).get("logprobs")
    if not told:
        return {}
    if "content" in told:
        return {
            "logprobs": [
                _token(**{k: one[k] for k in ("token", "logprob", "top_logprobs")}) for one in told["content"]
            ]
        }
    best = [[{"token": t, "logprob": p} for t, p in tops.items()] for tops in told["top_logprobs"]]
    return {"logprobs": list(map(_token, told["tokens"], told["token_logprobs"], best))}


def _token(token: str, logprob: float, top_logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    said = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    best = [_token(one["token"], one["logprob"]) for one in top_logprobs or []]
    return {**said, "top_logprobs": best} if best else said


def routes(models: Models) -> APIRouter:
    """What Ollama's clients ask before they ask a model."""
    router = APIRouter()

    def details(name: str) -> dict[str, Any]:
        known = models.metadata(name)
        family = known.get("general.architecture", "")
        return {
            "format": "gguf", "family": family, "families": [family] if family else [], "parent_model": "",
            "parameter_size": known.get("general.size_label", ""), "quantization_level": "",
        }  # fmt: skip

    def stat(name: str) -> dict[str, Any]:
        file = models.file(name)
        found = file.stat() if file.is_file() else None
        return {"size": found.st_size if found else 0, "modified_at": _date(found.st_mtime if found else 0.0)}

    def listed(name: str) -> dict[str, Any]:
        tagged = name if ":" in name else f"{name}:latest"  # Open WebUI looks for names with a tag only
        return {"name": tagged, "model": tagged, "digest": "", "details": details(name), **stat(name)}

    @router.get("/api/version", summary="Version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/api/tags", summary="Models")
    async def tags() -> dict[str, Any]:
        return {"models": [listed(name) for name in models]}

    @router.get("/api/ps", summary="Models in memory")
    async def running() -> dict[str, Any]:
        return {"models": [{**listed(name), "size_vram": 0} for name in models if models.metadata(name)]}

    @router.post("/api/show", summary="Model")
    async def show(request: Request) -> dict[str, Any]:
        body = parse(await request.body())
        name = models.known(str(body.get("model") or body.get("name")))
        if name not in list(models):
            raise Refused(f"model '{name}' not found", "model", 404)
        known = models.metadata(name)
        template = known.pop("tokenizer.chat_template", "")
        return {
            "modelfile": "", "parameters": "", "template": template, "details": details(name), "model_info": known,
            "capabilities": ["completion", *(["tools"] if "tools" in template else [])],
        }  # fmt: skip

    return router


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()
