"""What clients ask for today, in the terms of llama-cpp-python's application; and what it would get wrong, refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = ("/v1/completions", "/v1/engines/copilot-codex/completions")
MOST_CHOICES = 16  # of a prompt
MOST_ANSWERS = 128  # of a request


class Refused(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of the response.
        param: field of the request that is to blame.
    """

    def __init__(self, text: str, param: str | None = None, status: int = 400):
        super().__init__(text)
        self.status, self.param = status, param

    def content(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}

    def body(self) -> bytes:
        return json.dumps(self.content()).encode()


@dataclass
class Asked:
    """What the application does not know of.

    Attributes:
        choices: arguments of each answer that differ from the request's; one answer each.
        n_same: answers to the same prompt that follow each other.
        include_usage: a stream ends with the number of its tokens.
    """

    choices: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    n_same: int = 1
    include_usage: bool = False


def read(path: str, body: bytes) -> tuple[bytes, Asked]:
    """The body as the application knows it, and the rest.

    Raises:
        Refused: with one sentence for the client.
    """
    asked = Asked()
    if path != CHAT and path not in COMPLETIONS:
        return body, asked
    try:
        request = json.loads(body)
    except RecursionError:
        raise Refused("the body of the request is nested too deeply") from None
    except ValueError:
        return body, asked  # the application says what is wrong with it
    if not isinstance(request, dict):
        return body, asked
    _check(request)
    if request.get("max_completion_tokens") is not None:
        request.setdefault("max_tokens", request["max_completion_tokens"])
    form = request.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise Refused("response_format: json_schema has no schema", "response_format")
        request["response_format"] = {"type": "json_object", "schema": schema["schema"]}
    if path == CHAT and isinstance(request.get("messages"), list):
        request["messages"] = [_message(m) for m in request["messages"]]
    asked.include_usage = bool((request.get("stream_options") or {}).get("include_usage"))
    asked.n_same = request.pop("n", None) or 1
    prompts = _prompts(request) if path in COMPLETIONS else [None]
    if len(prompts) * asked.n_same > MOST_ANSWERS:
        raise Refused(f"prompt: at most {MOST_ANSWERS} answers at once; ask for them in parts", "prompt")
    seed = request.get("seed")
    asked.choices = [
        ({} if prompt is None else {"prompt": prompt})
        | ({} if seed is None or asked.n_same == 1 else {"seed": (seed + i) % (1 << 32)})
        for prompt in prompts
        for i in range(asked.n_same)
    ]
    return json.dumps(request).encode(), asked


def _check(request: dict[str, Any]) -> None:
    for name, least, most in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
        value = request.get(name)
        if isinstance(value, int | float) and not least <= value <= most:
            bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise Refused(f"{name} is {value:g}, it must be {bounds}", name)
    biases = request.get("logit_bias")
    for bias in biases.values() if isinstance(biases, dict) else ():
        if isinstance(bias, int | float) and not -100 <= bias <= 100:
            raise Refused(f"logit_bias has {bias:g}, it must be -100 to 100", "logit_bias")
    n, seed = request.get("n"), request.get("seed")
    if seed is not None and not is_whole(seed):
        raise Refused(f"seed is {seed!r}, it must be a whole number", "seed")
    if n is not None and not (is_whole(n) and 1 <= n <= MOST_CHOICES):
        raise Refused(f"n is {n!r}, it must be 1 to {MOST_CHOICES}", "n")
    if not isinstance(request.get("stream_options") or {}, dict):
        raise Refused("stream_options is not an object", "stream_options")
    for name, why in (("audio", "it writes text only"), ("modalities", "it writes text only")):
        value = request.get(name)
        if value and value != ["text"]:
            raise Refused(f"{name}: this server cannot do that: {why}", name)


def _message(message: Any) -> Any:
    """A message with its content as one text, of a role that chat templates know."""
    if not isinstance(message, dict):
        return message
    if message.get("role") == "developer":
        message = {**message, "role": "system"}
    if isinstance(message.get("content"), list):
        message = {**message, "content": "\n".join(_part(p) for p in message["content"])}
    return message


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise Refused(f"messages: this server reads text, and a part of a content is {kind!r}", "messages")
    return str(part["text"])


def _prompts(request: dict[str, Any]) -> list[Any]:
    """The prompts to be answered where they are several, or not texts; [None]: the one of the request."""
    prompt = request.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return [None]
    prompts = [prompt] if _are_tokens(prompt) else prompt
    if not all(isinstance(p, str) or _are_tokens(p) for p in prompts):
        raise Refused("prompt: a list of prompts holds texts, or lists of tokens", "prompt")
    request["prompt"] = ""
    return prompts


def _are_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(is_whole(t) and t >= 0 for t in prompt)


def is_whole(value: Any) -> bool:
    """A whole number; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool)
