"""Calls of functions and thoughts that a model writes, found in its text as it comes.

Chat templates teach two kinds of forms, and a model keeps to its own: calls between tags (`FORMS`), or an answer that
is JSON as a whole (Llama 3, Mistral, whose tokens around it are no text). What is in no form, or calls a function that
there is not, stays text. Thoughts are told from the answer where they have a channel of their own (gpt-oss).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ..models.channels import CALL, TEXT, THOUGHT, Channels
from .calls import json_of

# how an answer begins that may be a call as a whole, without white space
BEGINNINGS = ('{"name"', '[{"name"', '{"type":"function"', '[{"type":"function"', '{"function"')
LONGEST = 64  # characters of an answer within which that shows

Call = dict[str, Any]
Properties = Callable[[str], Any]  # of a function's schema, by its name


def _elements(name: str, pairs: Iterable[tuple[str, str, str | None]], properties: Properties) -> Call:
    """A call whose arguments are written one by one: key, value, and whether it says of itself that it is a text."""
    known = properties(name.strip())
    arguments = {}
    for key, value, said in pairs:
        value = value.removeprefix("\n").removesuffix("\n")
        is_text = said == "true" if said else _is_text(known, key)
        arguments[key] = value if is_text else json_of(value, value)
    return {"name": name.strip(), "arguments": arguments}


def _one(text: str, properties: Properties) -> list[Any]:
    """JSON (Hermes, Qwen), elements whose names are the parameters' (Qwen's coders), or keys and values (GLM)."""
    said, closed, _ = text.strip().partition("</tool_call>")
    if said.startswith(("{", "[")):
        return [json_of(said)]
    if said.startswith("<function="):
        name, _, rest = said.removeprefix("<function=").partition(">")
        body, closed, _ = rest.rpartition("</function>")
        parts = [part.partition(">") for part in body.split("<parameter=")[1:]]
        pairs = [(key, value.rpartition("</parameter>")[0], None) for key, _, value in parts]
    else:
        name, *keyed = said.split("<arg_key>")
        parts = [part.rpartition("</arg_value>")[0].partition("</arg_key>") for part in keyed]
        pairs = [(key.strip(), value.partition("<arg_value>")[2], None) for key, _, value in parts]
    return [_elements(name, pairs, properties) if closed else None]


def _parts(text: str, begin: str, separator: str, end: str) -> Iterator[tuple[str, str]]:
    """What stands before and behind the separator of each call."""
    for part in text.split(begin)[1:]:
        head, _, rest = part.partition(end)[0].partition(separator)
        yield head.strip(), rest.strip()


def _deepseek(text: str, properties: Properties) -> list[Any]:
    """V3 and R1 write `function`, a separator, the name and JSON in a fence; V3.1 the name, a separator and JSON."""
    calls = list[Any]()
    for name, rest in _parts(text, "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"):
        if name == "function" and "\n" in rest:
            name, _, rest = rest.partition("\n")
            rest = rest.removeprefix("```json").removesuffix("```")
        calls.append({"name": name.strip(), "arguments": json_of(rest, None)})
    return calls


def _kimi(text: str, properties: Properties) -> list[Any]:
    """`functions.`, the name, a colon and the call's number; JSON."""
    parts = _parts(text, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    names = ((id.removeprefix("functions.").rpartition(":")[0], rest) for id, rest in parts)
    return [{"name": name, "arguments": json_of(rest, None)} for name, rest in names]


def _invoked(text: str, properties: Properties, mark: str = "") -> list[Any]:
    """Elements with names as attributes (MiniMax), and whether a value is a text (DeepSeek V4, each tag marked)."""
    _, *parts = re.split(rf'<{mark}invoke name="([^"]*)">', text)
    calls = list[Any]()
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        body, ended, _ = rest.rpartition(f"</{mark}invoke>")
        _, *given = re.split(rf'<{mark}parameter name="([^"]*)"(?: string="(true|false)")?>', body)
        values = [value.rpartition(f"</{mark}parameter>")[0] for value in given[2::3]]
        pairs = zip(given[::3], values, given[1::3], strict=True)
        calls.append(_elements(name, pairs, properties) if ended else None)
    return calls


# the tags around calls, and what reads the text behind the first one; the last may have been the token that ended it
FORMS: dict[str, tuple[str, Callable[[str, Properties], list[Any]]]] = {
    "<tool_call>": ("</tool_call>", _one),
    "<｜tool▁calls▁begin｜>": ("<｜tool▁calls▁end｜>", _deepseek),
    "<｜DSML｜tool_calls>": ("</｜DSML｜tool_calls>", partial(_invoked, mark="｜DSML｜")),
    "<|tool_calls_section_begin|>": ("<|tool_calls_section_end|>", _kimi),
    "<minimax:tool_call>": ("</minimax:tool_call>", _invoked),
}
TAG = re.compile("|".join(map(re.escape, FORMS)))
LONGEST_TAG = max(map(len, FORMS))


class Written:
    """The calls of one answer.

    Args:
        functions: that can be called, each with `name` and `parameters`, a JSON schema.
    """

    def __init__(self, functions: list[dict[str, Any]]):
        self.functions = {f["name"]: f.get("parameters") or {} for f in functions}
        self.held = ""  # text that may become a call
        self.n_calls = 0
        self.goes_on = False  # text came behind the last call
        self._begun = False  # something of the answer was text, or a call between tags
        self._looked = False  # for tags
        self._said = False  # some of it was text
        self._space = ""  # white space that is left out around calls

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
        if not self._begun and not self._looked:
            n_new, self._looked = len(self.held), True  # also what was held as JSON
        while self.held:
            tag = TAG.search(self.held)
            if tag is None:
                keep = 0 if last else _overlap(self.held)
                said += self._seen(self.held[: len(self.held) - keep])
                self.held = self.held[len(self.held) - keep :]
                break
            said, self.held = said + self._seen(self.held[: tag.start()]), self.held[tag.start() :]
            closed, read = FORMS[tag[0]]
            end = self.held.find(closed, max(len(tag[0]), len(self.held) - n_new - len(closed)))
            if end < 0 and not last:
                break
            end = end + len(closed) if end >= 0 else len(self.held)
            found = self._calls(read(self.held[len(tag[0]) : end], self._properties))
            calls += found
            said += "" if found else self._seen(self.held[:end])
            self.goes_on = self.goes_on and not found
            self.held = self.held[end:]
            n_new = len(self.held)
        self.n_calls += len(calls)
        said = self._space + said
        if self.n_calls and not self._said:
            said = said.lstrip()
        kept = len(said) if last and not self.n_calls else len(said.rstrip())
        said, self._space = said[:kept], said[kept:]
        self._said = self._said or bool(said)
        self._begun = self._begun or bool(said or calls)
        return said, calls

    def _seen(self, text: str) -> str:
        self.goes_on = self.goes_on or bool(text.strip())
        return text

    def _whole(self) -> list[Call]:
        """The calls that the held text consists of, which is then no longer held; none where it is anything else."""
        said = json_of(self.held)
        found = self._calls(said if isinstance(said, list) else [said])
        if found:
            self.held = ""
        return found

    def _properties(self, name: str) -> Any:
        return self.functions.get(name, {}).get("properties")

    def _calls(self, said: list[Any]) -> list[Call]:
        """All in OpenAI's form; none where one is no call."""
        calls = [call for call in map(self._call, said) if call is not None]
        return calls if len(calls) == len(said) else []

    def call(self, name: str, arguments: str) -> Call | None:
        """One whose arguments are written as JSON."""
        return self._call({"name": name, "arguments": arguments})

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
    sizes = range(min(len(text), LONGEST_TAG - 1), 0, -1)
    return next((n for n in sizes if any(tag.startswith(text[-n:]) for tag in FORMS)), 0)


class Said(NamedTuple):
    """Some of an answer."""

    text: str
    thoughts: str
    calls: list[Call]


class Parts:
    """Tells apart what one answer consists of.

    Args:
        functions: as for `Written`.
    """

    def __init__(self, functions: list[dict[str, Any]]):
        self._channels, self._written = Channels(), Written(functions)
        self._finds_calls = bool(functions)
        self.n_calls = 0
        self.goes_on = False  # text came behind the last call

    def add(self, text: str, last: bool) -> Said:
        """What the answer's next piece makes certain.

        Args:
            last: the answer ends with it.
        """
        said, thoughts, calls = "", "", list[Call]()
        for piece in self._channels.add(text, last):
            found = self._written.call(piece.function, piece.text) if piece.kind == CALL else None
            if found:
                calls.append(found)
                self.goes_on = False
            elif piece.kind in (TEXT, CALL):
                said += piece.text
                self.goes_on = self.goes_on or bool(piece.text.strip())
            elif piece.kind == THOUGHT:
                thoughts += piece.text
        if self._finds_calls and not self._channels.found:
            said, calls = self._written.add(said, last)
            self.goes_on = self._written.goes_on
        self.n_calls += len(calls)
        return Said(said, thoughts, calls)


def whole(choice: dict[str, Any], functions: list[dict[str, Any]]) -> None:
    """Make calls and thoughts of those that an answer holds."""
    message, text = choice["message"], choice["message"].get("content") or ""
    parts = Parts(functions)
    said, thoughts, calls = parts.add(text, last=True)
    if said != text:
        message["content"] = (said.strip() if calls else said) or None
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
        _end(choice, parts.goes_on)


def streamed(chunks: Iterator[dict[str, Any]], functions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The chunks of an answer, with its thoughts and calls as such: a call's text is held back until it is whole."""
    parts = Parts(functions)
    for chunk in chunks:
        choice = chunk["choices"][0]
        delta, last = choice["delta"], choice["finish_reason"] is not None
        text = delta.get("content") or ""
        said, thoughts, calls = parts.add(text, last)
        if said != text:
            delta["content"] = said
            if not said:
                del delta["content"]
        if thoughts:
            delta["reasoning_content"] = thoughts
        if calls:
            first = parts.n_calls - len(calls)
            delta["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(calls)]
        if last and parts.n_calls:
            _end(choice, parts.goes_on)
        yield chunk


def _end(choice: dict[str, Any], goes_on: bool) -> None:
    """The answer ended with a call, unless the limit of tokens cut off what came after it."""
    if choice["finish_reason"] == "stop" or not goes_on:
        choice["finish_reason"] = "tool_calls"
