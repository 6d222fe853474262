"""Calls of functions that a model writes, found in its text as it comes.

Chat templates teach two forms, and a model keeps to its own: calls between tags, as JSON (Hermes, Qwen) or as elements
(Qwen's coders), or an answer that is JSON as a whole (Llama 3, Mistral, whose tokens around it are no text). What is in
neither form, or calls a function that there is not, stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from .calls import json_of

OPENED, CLOSED = "<tool_call>", "</tool_call>"
# how an answer begins that may be a call as a whole, without white space
BEGINNINGS = ('{"name"', '[{"name"', '{"type":"function"', '[{"type":"function"', '{"function"')
LONGEST = 64  # characters of an answer within which that shows

Call = dict[str, Any]


class Written:
    """The calls of one answer.

    Args:
        functions: that can be called, each with `name` and `parameters`, a JSON schema.
    """

    def __init__(self, functions: list[dict[str, Any]]):
        self.functions = {f["name"]: f.get("parameters") or {} for f in functions}
        self.held = ""  # text that may become a call
        self.n_calls = 0
        self._begun = False  # something of the answer was text, or a call between tags

    def add(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """What the answer's next piece makes certain.

        Args:
            last: the answer ends with it.

        Returns:
            Text that belongs to no call, and the calls that are whole now.
        """
        n_new = len(text)
        self.held += text
        said, calls = "", list[Call]()
        if not self._begun and _may_be_json(self.held):
            if not last:
                return "", []
            calls = self._whole()
        while self.held:
            start = self.held.find(OPENED)
            if start < 0:
                keep = 0 if last else _overlap(self.held)
                said += self.held[: len(self.held) - keep]
                self.held = self.held[len(self.held) - keep :]
                break
            said, self.held = said + self.held[:start], self.held[start:]
            end = self.held.find(CLOSED, max(0, len(self.held) - n_new - len(CLOSED)))
            if end < 0 and not last:
                break
            end = end if end >= 0 else len(self.held)  # the tag may have been the token that ended the text
            call = self._between(self.held[len(OPENED) : end])
            if call is None:
                said += self.held[: end + len(CLOSED)]
            else:
                calls.append(call)
            self.held = self.held[end + len(CLOSED) :]
            n_new = len(self.held)
        self.n_calls += len(calls)
        if self.n_calls and said.isspace():
            said = ""  # between calls
        self._begun = self._begun or bool(said or calls)
        return said, calls

    def _whole(self) -> list[Call]:
        """The calls that the held text consists of, which is then no longer held; none where it is anything else."""
        said = json_of(self.held)
        calls = [self._call(one) for one in (said if isinstance(said, list) else [said])]
        found = [call for call in calls if call is not None]
        if not found or len(found) < len(calls):
            return []
        self.held = ""
        return found

    def _between(self, text: str) -> Call | None:
        text = text.strip()
        if not text.startswith("<function="):
            return self._call(json_of(text))
        name, _, rest = text.removeprefix("<function=").partition(">")
        properties = self.functions.get(name.strip(), {}).get("properties")
        arguments = {}
        for part in rest.removesuffix("</function>").split("<parameter=")[1:]:
            key, _, value = part.partition(">")
            value = value.rpartition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
            arguments[key] = value if _is_text(properties, key) else json_of(value, value)
        return self._call({"name": name.strip(), "arguments": arguments})

    def _call(self, said: Any) -> Call | None:
        """In OpenAI's form; None where it calls no function that there is."""
        if not isinstance(said, dict):
            return None
        if isinstance(said.get("function"), dict):
            said = said["function"]
        name = said.get("name", said.get("function"))
        arguments = said.get("arguments", said.get("parameters"))
        if isinstance(arguments, str):
            arguments = json_of(arguments, None)
        if not isinstance(name, str) or name not in self.functions or not isinstance(arguments, dict):
            return None
        try:
            function = {"name": name, "arguments": json.dumps(arguments, allow_nan=False)}
        except ValueError:  # Python reads NaN, which is no JSON
            return None
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _is_text(properties: Any, key: str) -> bool:
    """A schema's property is a text; clients write all kinds of schemas."""
    schema = properties.get(key) if isinstance(properties, dict) else None
    return isinstance(schema, dict) and schema.get("type") == "string"


def _may_be_json(text: str) -> bool:
    compact = "".join(text[:LONGEST].split())
    return any(b.startswith(compact[: len(b)]) for b in BEGINNINGS)


def _overlap(text: str) -> int:
    """Characters at the end of a text that a tag may begin with."""
    return next((n for n in range(len(OPENED) - 1, 0, -1) if text.endswith(OPENED[:n])), 0)


def whole(choice: dict[str, Any], functions: list[dict[str, Any]]) -> None:
    """Make calls of those that an answer holds."""
    message = choice["message"]
    said, calls = Written(functions).add(message.get("content") or "", last=True)
    if calls:
        message |= {"content": said.strip() or None, "tool_calls": calls}
        _end(choice, said)


def streamed(chunks: Iterator[dict[str, Any]], functions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The chunks of an answer, with its calls as such: their text is held back until they are whole."""
    written = Written(functions)
    for chunk in chunks:
        choice = chunk["choices"][0]
        delta, last = choice["delta"], choice["finish_reason"] is not None
        said, calls = written.add(delta.pop("content", None) or "", last)
        if said:
            delta["content"] = said
        if calls:
            first = written.n_calls - len(calls)
            delta["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(calls)]
        if last and written.n_calls:
            _end(choice, said)
        yield chunk


def _end(choice: dict[str, Any], rest: str) -> None:
    """The answer ended with a call, unless the limit of tokens cut off what came after it."""
    if choice["finish_reason"] == "stop" or not rest:
        choice["finish_reason"] = "tool_calls"
