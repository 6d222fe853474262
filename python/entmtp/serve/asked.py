"""What clients ask for, as OpenAI writes it: read, checked, and put into the arguments of `Llama`'s calls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import llama_cpp
from pydantic import BaseModel, ConfigDict, FailFast, Field

from ..completion import AtLeast
from ..llama import Llama
from ..models.messages import template_of
from ..request import grammar_of_text, with_schema
from .calls import demand, for_template
from .errors import Refused

MOST_CHOICES = 16  # of a prompt
MOST_ANSWERS = 128  # of a request
DEEPEST = 100  # levels of JSON; deeper, and what walks over it runs out of stack
MOST_PARTS = 1 << 16  # objects and lists of a request
MOST_STOPS, LONGEST_STOP = 128, 1024  # each is looked for after every token
MOST_LOGPROBS = 100  # of a token
LONGEST_NUMBER = 1 << 31  # tokens and counts; more does not fit into the model's own numbers
ROLES = ("system", "user", "assistant", "tool", "function")
ASSISTANTS = ("tool_calls", "function_call")  # of an assistant's messages
RANDOM = (1 << 32) - 1  # the seed by which llama.cpp draws one
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class First(FailFast):
    """A list is looked at to the first value that is wrong: a body may hold two million."""

    def __hash__(self) -> int:  # a part of a union must have one
        return hash(type(self))


T = TypeVar("T")
Some = Annotated[list[T], First()]


class Body(BaseModel):
    """What texts and chats have in common. Defaults are llama-cpp-python's server's."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stop: str | Some[str] | None = None
    seed: int | None = None
    temperature: float = 0.8
    top_k: int = Field(40, ge=0, lt=LONGEST_NUMBER)
    top_p: float = Field(0.95, ge=0.0, le=1.0)
    min_p: float = Field(0.05, ge=0.0, le=1.0)
    repeat_penalty: float = Field(1.1, gt=0.0, lt=1e6)
    presence_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    mirostat_mode: int = Field(0, ge=0, le=2)
    mirostat_tau: float = Field(5.0, ge=0.0, le=10.0)
    mirostat_eta: float = Field(0.1, ge=0.001, le=1.0)
    logit_bias: dict[str, float] | None = None
    logit_bias_type: Literal["input_ids", "tokens"] | None = None
    min_tokens: int = Field(0, ge=0, lt=LONGEST_NUMBER)
    grammar: str | None = None
    entmtp: bool = False  # a stream tells where its tokens came from


class Text(Body):
    """Of `create_completion`."""

    prompt: str | Some[str] = ""
    suffix: str | None = None
    max_tokens: int | None = Field(16, ge=0, lt=LONGEST_NUMBER)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class Chat(Body):
    """Of `create_chat_completion`."""

    messages: Some[llama_cpp.ChatCompletionRequestMessage] = []
    functions: Some[llama_cpp.ChatCompletionFunction] | None = None
    function_call: llama_cpp.ChatCompletionRequestFunctionCall | None = None
    tools: Some[llama_cpp.ChatCompletionTool] | None = None
    tool_choice: llama_cpp.ChatCompletionToolChoiceOption | None = None
    max_tokens: int | None = Field(None, lt=LONGEST_NUMBER)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: llama_cpp.ChatCompletionRequestResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)


@dataclass
class Asked:
    """A request for one or more answers.

    Attributes:
        body: of all answers.
        choices: arguments of each answer that differ from the body's; one answer each.
        n_same: answers to the same prompt that follow each other.
        include_usage: a stream ends with the number of its tokens.
        functions: the answer's text may be, or hold, calls of these.
        messages: of a chat, with all that clients say of them: templates read more than OpenAI has names for.
    """

    body: Text | Chat
    choices: list[dict[str, Any]]
    n_same: int
    include_usage: bool
    functions: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self, llama: Llama) -> dict[str, Any]:
        """Of the call that writes an answer."""
        body = self.body
        named = body.model_dump(exclude={"logit_bias_type", "min_tokens", "entmtp"})
        if body.logit_bias is not None and body.logit_bias_type == "tokens":
            named["logit_bias"] = {
                str(token): bias
                for text, bias in body.logit_bias.items()
                for token in llama.tokenize(text.encode(), add_bos=False, special=True)
            }
        if body.grammar is not None:
            named["grammar"] = grammar_of_text(body.grammar)
        if isinstance(body, Chat) and body.logprobs:
            named["top_logprobs"] = body.top_logprobs or 0  # without, llama-cpp-python tells nothing
        if isinstance(body, Chat):
            said = [
                {**{k: v for k, v in m.items() if k not in ASSISTANTS}, **checked}
                for m, checked in zip(self.messages, named["messages"], strict=True)
            ]
            named["messages"] = for_template(said, template_of(llama))
        if isinstance(body, Text) and isinstance(body.prompt, list):
            named["prompt"] = ""  # each choice has its own
        return named

    def of_choices(self, llama: Llama) -> Iterator[dict[str, Any]]:
        """Of the calls that write each of the answers."""
        named = self.arguments(llama)
        for choice in self.choices:
            one = {**named, **choice}
            if self.body.min_tokens > 0:  # counted for each
                least = AtLeast(self.body.min_tokens, llama.end_tokens)
                one["logits_processor"] = llama_cpp.LogitsProcessorList([least])
            yield one


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: it holds none, or one that is nested too deeply.
    """
    try:
        text = body.decode("utf-8-sig")
        request = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if SURROGATE.search(text):
            json.dumps(request, ensure_ascii=False).encode()
    except RecursionError:
        raise Refused("the body of the request is nested too deeply") from None
    except UnicodeEncodeError:
        raise Refused("the body of the request has half of a surrogate pair, which is no text") from None
    except ValueError as e:
        raise Refused(f"the body of the request is not JSON: {e}") from None
    if not isinstance(request, dict):
        raise Refused("the body of the request is not an object")
    level: list[Any] = [request]
    n_parts = 0
    for _ in range(DEEPEST):
        level = [
            v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, dict | list)
        ]
        if (n_parts := n_parts + len(level)) > MOST_PARTS:
            raise Refused(f"the body of the request has more than {MOST_PARTS} objects and lists")
    if level:
        raise Refused(f"the body of the request is nested too deeply: more than {DEEPEST} levels")
    return request


def _finite(word: str) -> float:
    value = float(word)
    if math.isinf(value):
        raise ValueError(f"{word:.40} is too large a number")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def text(request: dict[str, Any]) -> Asked:
    """Of `/v1/completions`."""
    return _read(request, Text, _prompts(request))


def chat(request: dict[str, Any]) -> Asked:
    """Of `/v1/chat/completions`."""
    try:
        request["response_format"] = with_schema(request.get("response_format"))
    except ValueError as e:
        raise Refused(str(e), "response_format") from None
    for name in ("tools", "functions"):
        if isinstance(request.get(name), list):
            request[name] = [_tool(tool) for tool in request[name]]
    if isinstance(request.get("messages"), list):
        request["messages"] = [_message(m) for m in request["messages"]]
    effort = request.get("reasoning_effort")
    if isinstance(effort, str):  # as gpt-oss's template calls it, and Qwen3's
        given = request.get("chat_template_kwargs") or {}
        if isinstance(given, dict):
            thinks = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
            request["chat_template_kwargs"] = {**thinks, **given}
    functions = demand(request)
    asked = _read(request, Chat, [None])
    asked.functions = functions
    asked.messages = request.get("messages") or []
    return asked


def _read(request: dict[str, Any], kind: type[Text] | type[Chat], prompts: list[Any]) -> Asked:
    _check(request)
    if request.get("max_tokens") is None and request.get("max_completion_tokens") is not None:
        request["max_tokens"] = request["max_completion_tokens"]
    n_same = request.get("n") or 1
    if len(prompts) * n_same > MOST_ANSWERS:
        raise Refused(f"prompt: at most {MOST_ANSWERS} answers at once; ask for them in parts", "prompt")
    seed = request.get("seed")
    choices = [
        ({} if prompt is None else {"prompt": prompt})
        | ({} if seed is None or n_same == 1 or seed % (1 << 32) == RANDOM else {"seed": _seed(seed, i)})
        for prompt in prompts
        for i in range(n_same)
    ]
    usage = bool((request.get("stream_options") or {}).get("include_usage"))
    given = {k: v for k, v in request.items() if v is not None or k == "max_tokens"}  # null: as if left out
    return Asked(kind.model_validate(given), choices, n_same, usage)


def _seed(seed: int, i: int) -> int:
    """Of the i-th answer; none is the one by which llama.cpp draws a seed."""
    return (seed % (1 << 32) + i) % RANDOM


def _check(request: dict[str, Any]) -> None:
    for name, least, most in (("temperature", 0.0, math.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
        value = request.get(name)
        if isinstance(value, int | float) and not least <= value <= most:
            bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise Refused(f"{name} is {value!r:.40}, it must be {bounds}", name)
    biases = request.get("logit_bias")
    for bias in biases.values() if isinstance(biases, dict) else ():
        if not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise Refused(f"logit_bias has {bias!r:.40}, it must be -100 to 100", "logit_bias")
    n, seed = request.get("n"), request.get("seed")
    if seed is not None and not is_whole(seed):
        raise Refused(f"seed is {seed!r}, it must be a whole number", "seed")
    stop = request.get("stop")
    if isinstance(stop, list) and len(stop) > MOST_STOPS:
        raise Refused(f"stop has {len(stop)} texts, there may be {MOST_STOPS}", "stop")
    for one in stop if isinstance(stop, list) else (stop,):
        if isinstance(one, str) and len(one) > LONGEST_STOP:
            raise Refused(f"stop has a text of {len(one)} characters, it may have {LONGEST_STOP}", "stop")
    if n is not None and not (is_whole(n) and 1 <= n <= MOST_CHOICES):
        raise Refused(f"n is {n!r}, it must be 1 to {MOST_CHOICES}", "n")
    if not isinstance(request.get("stream_options") or {}, dict):
        raise Refused("stream_options is not an object", "stream_options")
    if request.get("entmtp") and not request.get("stream"):
        raise Refused('entmtp: details come with a stream only; ask for "stream": true', "entmtp")
    for name, why in (("audio", "it writes text only"), ("modalities", "it writes text only")):
        value = request.get(name)
        if value and value != ["text"]:
            raise Refused(f"{name}: this server cannot do that: {why}", name)


def _message(message: Any) -> Any:
    """A message with its content as one text, of a role that chat templates know."""
    if not isinstance(message, dict):
        return message
    # null: as if left out; clients send back what they were answered with all its fields
    message = {k: v for k, v in message.items() if v is not None}
    if not message.get("tool_calls"):  # beside them there may be none
        message.setdefault("content", "")
    if message.get("role") == "developer":
        message["role"] = "system"
    if message.get("role") not in ROLES:
        raise Refused(f"messages: {message.get('role')!r:.40} is no role: {', '.join(ROLES)}", "messages")
    if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise Refused("messages: one of role tool has no tool_call_id, the id of the call", "messages")
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(_part(p) for p in message["content"])
    return message


def _tool(tool: Any) -> Any:
    """A tool, or a function of before tools, with what OpenAI lets a client leave out."""
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _tool(tool["function"])}
    said = {k: v for k, v in tool.items() if v is not None}
    return {"parameters": {"type": "object", "properties": {}}, **said} if "name" in said else tool


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
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


def is_whole(value: Any) -> TypeGuard[int]:
    """A whole number; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool)
