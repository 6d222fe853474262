"""Calls of functions in OpenAI's form, where llama-cpp-python has none or another one.

It makes a call of what a grammar forces: the arguments of one function that the request names. Here a request may also
demand any one of several (`"tool_choice": "required"`), and the deltas of a stream are such as clients put together.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from .errors import Refused


def demand(request: dict[str, Any]) -> bool:
    """Put `"tool_choice": "required"` into what llama-cpp-python has.

    Returns:
        The answer will be an object with the name of a function and its arguments.
    """
    if request.get("tool_choice") != "required":
        return False
    tools = request.get("tools")
    if not isinstance(tools, list) or not tools:
        raise Refused("tool_choice is required, but there are no tools", "tool_choice")
    functions = [_function(tool) for tool in tools]
    if len(functions) == 1:
        request["tool_choice"] = {"type": "function", "function": {"name": functions[0]["name"]}}
        return False
    request["tool_choice"] = "auto"
    shapes = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f["name"]},
                "arguments": f.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
        }
        for f in functions
    ]
    request["response_format"] = {"type": "json_object", "schema": {"anyOf": shapes}}
    return True


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("tools: a tool names no function", "tools")
    return function


def called(text: str) -> dict[str, Any] | None:
    """The call that an answer holds; None: it was cut off before its end."""
    try:
        said = json.loads(text)
        function = {"name": said["name"], "arguments": json.dumps(said["arguments"])}
    except (ValueError, KeyError, TypeError):
        return None
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def whole(choice: dict[str, Any]) -> None:
    """Make a call of an answer that is one."""
    if (call := called(choice["message"]["content"])) is not None:
        choice["message"] |= {"content": None, "tool_calls": [call]}
        choice["finish_reason"] = "tool_calls"


def streamed(chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The chunks of an answer that is a call: its text is held back until it is whole."""
    text = ""
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["delta"].pop("content", None) or ""
        if choice["finish_reason"] is not None:
            if (call := called(text)) is not None:
                choice["delta"]["tool_calls"] = [{"index": 0, **call}]
                choice["finish_reason"] = "tool_calls"
            else:
                choice["delta"]["content"] = text
        yield chunk


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
        if not all(map(_is_json, begun.values())):  # the limit of tokens ended it
            choice["finish_reason"] = "length"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
