"""Calls of functions in OpenAI's form, where llama-cpp-python has none or another one.

It makes a call of what a grammar forces: the arguments of one function that the request names. Here a request may
also demand any one of several (`"tool_choice": "required"`), `written` finds calls that a model writes by itself, and
the deltas of a stream are such as clients put together.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ..common.fields import parse_json
from ..common.json_schema import moved
from .errors import Refused


def demand(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Put `"tool_choice": "required"` into what llama-cpp-python has.

    Returns:
        Functions whose calls are to be looked for in the text of the answer.
    """
    choice, tools = request.get("tool_choice"), request.get("tools")
    if choice != "required":
        free = choice in (None, "auto") and isinstance(tools, list)
        return [_function(tool) for tool in tools] if free and tools else []
    if not isinstance(tools, list) or not tools:
        raise Refused("tool_choice is required, but there are no tools", "tool_choice")
    functions = [_function(tool) for tool in tools]
    if len(functions) == 1:
        request["tool_choice"] = {"type": "function", "function": {"name": functions[0]["name"]}}
        return []
    request["tool_choice"] = "auto"
    shapes = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f["name"]},
                "arguments": moved(
                    f.get("parameters") or {"type": "object"}, f"#/anyOf/{i}/properties/arguments"
                ),
            },
            "required": ["name", "arguments"],
        }
        for i, f in enumerate(functions)
    ]
    request["response_format"] = {"type": "json_object", "schema": {"anyOf": shapes}}
    return functions


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("tools: a tool names no function", "tools")
    return function


# a template that writes a call as JSON itself,
CALL = re.compile(r"(call\.function|tool_calls?)\W{0,3}\|\s{0,3}(tojson|items|dictsort)")
# or the arguments, by this or by a name of its own for them,
NAMED = re.compile(r"set\s{1,3}(\w{1,40})\s{0,3}=\s{0,3}[\w.]{0,60}\barguments\b")
# or walks over them
WALKED = r"\b{0}\b(\W{{0,3}}\|\s{{0,3}}(tojson|items|dictsort)|\s{{0,3}}\.(items|keys|values)\()"


@cache
def takes_objects(template: str) -> bool:
    """Whether a chat template reads the arguments of a call as an object, not as a text of JSON."""
    names = ("arguments", *NAMED.findall(template))
    return bool(CALL.search(template)) or any(re.search(WALKED.format(name), template) for name in names)


def for_template(messages: list[Any], template: str) -> list[Any]:
    """Messages with earlier calls as their chat template reads them.

    Clients send a call's arguments as a text of JSON, and some templates write that; most take an object, and would
    quote the text once more. What a model thought before its call is told where its template asks for it (gpt-oss).
    """
    if "message.thinking" in template:
        messages = [
            {**m, "thinking": m["reasoning_content"]}
            if m.get("reasoning_content") and m.get("tool_calls") and not m.get("content")
            else m
            for m in messages
        ]
    if not takes_objects(template):
        return messages
    return [
        {**m, "tool_calls": [_with_object(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m
        for m in messages
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json_of(call["function"]["arguments"], call["function"]["arguments"])
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def tidy(choice: dict[str, Any], legacy: bool, begun: dict[str, str]) -> None:
    """Leave out of an answer, or of a piece of one, what clients would take twice.

    They append the texts of deltas, so what a call is called belongs into the first one alone; and a call of a tool is
    not one of the functions that came before tools.

    Args:
        legacy: the request is of before tools.
        begun: arguments of the answer's calls so far; those of this piece join them.
    """
    said = choice.get("delta") or choice.get("message") or {}
    said.pop("tool_calls" if legacy else "function_call", None)
    for name in [name for name in said if said[name] is None and name != "content"]:
        del said[name]
    for call in [
        *(said.get("tool_calls") or []),
        *([said["function_call"]] if "function_call" in said else []),
    ]:
        name, function = call.get("id", ""), call.get("function", call)
        if name in begun:
            call.pop("id", None), call.pop("type", None), function.pop("name", None)
        begun[name] = begun.get(name, "") + (function.get("arguments") or "")
    if choice.get("finish_reason") == "tool_calls":
        choice["finish_reason"] = "function_call" if legacy else "tool_calls"
        if any(json_of(text) is BROKEN for text in begun.values()):  # the limit of tokens ended it
            choice["finish_reason"] = "length"


BROKEN: dict[str, Any] = {}  # arguments that the limit of tokens cut


def json_of(text: str, otherwise: Any = BROKEN) -> Any:
    """What a text of a model or a client says; `otherwise` where it is no JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return otherwise
