"""Grammars of JSON schemas: llama-cpp-python's converter, given only what it follows, and what it writes put right."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from llama_cpp import llama_grammar

from .common.json_schema import check_schema, target
from .common.patterns import rule_of_pattern

# characters of a string; llama-cpp-python's may be line ends, and half of a surrogate pair
CHAR = llama_grammar.BuiltinRule(
    r"""[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))"""
)
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}  # in a literal of a grammar

# keywords that narrow what an answer may be, by the type that they are for; all others describe
OF_TYPE: dict[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": (), "integer": (), "boolean": (), "null": (),
}  # fmt: skip
CHOICES = ("anyOf", "oneOf")
NARROWS = {
    "$ref",
    "type",
    "enum",
    "const",
    "allOf",
    *CHOICES,
    *(key for keys in OF_TYPE.values() for key in keys),
}
IS_OF: dict[str, Any] = {
    "object": lambda x: isinstance(x, dict), "array": lambda x: isinstance(x, list),
    "string": lambda x: isinstance(x, str), "boolean": lambda x: isinstance(x, bool), "null": lambda x: x is None,
    "number": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "integer": lambda x: isinstance(x, int | float) and not isinstance(x, bool) and x == int(x),
}  # fmt: skip
ANY = {"title": "any"}  # narrows nothing
REFS = re.compile(r"re(f+)")
LONGEST_GRAMMAR = 1 << 18  # characters
MOST_PARTS = 20_000  # of a schema, as often as they are looked at


def gbnf_of_schema(schema: Any) -> str:
    """The grammar of all JSON that follows a schema, or of some of it: objects with `properties` have no others, and
    what `oneOf` lists may be of several.

    Raises:
        ValueError: the schema has a part that no grammar is made of; the text names it.
    """
    check_schema(schema)
    converter = _Converter(schema)
    converter.visit(schema, "")
    return str(converter.format_grammar())


class _Converter(llama_grammar.SchemaConverter):
    def __init__(self, root: Any):
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        self._root = root
        self._named: dict[str, str] = {}  # rules of references
        self._n_parts = 0
        # of their names, as no property is called
        longest = max((len(found) for found in REFS.findall(json.dumps(root))), default=0)
        self._prefix = "re" + "f" * (longest + 1)
        self._keys: dict[tuple[str, str], str] = {}  # of rules, by their names and what they are
        self._numbers: Counter[str] = Counter()
        self._n_written = 0

    def visit(self, schema: Any, name: str) -> str:
        self._n_parts += 1
        if self._n_parts > MOST_PARTS:
            raise ValueError(f"schema: it comes to more than {MOST_PARTS} parts; write less")
        if not name and self._n_parts > 1:
            name = "empty"  # a property; the root is what has no name
        plain = self._plain(schema, f"schema, {name}" if name else "schema")
        if plain:
            return str(super().visit(plain, name))
        value = self._add_primitive("value", llama_grammar.PRIMITIVE_RULES["value"])
        return value if name else str(self._add_rule("root", value))

    # -- what it writes --

    def _add_rule(self, name: str, rule: str) -> str:
        """As there, for many rules whose names come to the same."""
        escaped = llama_grammar.INVALID_RULE_CHARS_RE.sub("-", name)
        key = self._keys.get((escaped, rule))
        if key is None:
            self._n_written += len(rule)
            if self._n_written > LONGEST_GRAMMAR:
                raise ValueError(
                    f"schema: its grammar comes to more than {LONGEST_GRAMMAR} characters; write less"
                )
            key = escaped
            while key in self._rules and self._rules[key] != rule:
                key = f"{escaped}{self._numbers[escaped]}"
                self._numbers[escaped] += 1
            self._keys[escaped, rule] = key
            self._rules[key] = rule
        return key

    def _add_primitive(self, name: str, rule: Any) -> str:
        is_char = rule is llama_grammar.PRIMITIVE_RULES["char"]
        return str(super()._add_primitive(name, CHAR if is_char else rule))

    def _format_literal(self, literal: str) -> str:
        """JSON as a literal; letters as they are, for that is how models write them."""
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + "".join(ESCAPES.get(c, c) for c in text) + '"'

    def _visit_pattern(self, pattern: str, name: str) -> str:
        self._add_primitive("char", CHAR)
        return str(self._add_rule(name, f'"\\"" {rule_of_pattern(pattern)} "\\"" space'))

    def _resolve_ref(self, ref: str) -> str:
        if ref not in self._named:
            name = self._named[ref] = f"{self._prefix}-{len(self._named)}"
            self._named[ref] = self.visit(self._behind({"$ref": ref}, "schema"), name)
        return self._named[ref]

    # -- what it is given: no keyword that it would pass over --

    def _plain(self, schema: Any, where: str) -> dict[str, Any]:
        """The same with nothing but what narrows it; empty: anything."""
        if schema is False:
            raise ValueError(f"{where}: nothing follows the schema false; leave it out")
        plain = {} if schema is True else {key: value for key, value in schema.items() if key in NARROWS}
        if "$ref" in plain:
            return _alone(plain, "$ref", where)
        if "allOf" in plain:
            return self._all_of(plain, where)
        if "enum" in plain or "const" in plain:
            return _constants(plain, where)
        for key in CHOICES:
            if key in plain:
                return self._choice(plain, key, where)
        kind = plain.get("type")
        if isinstance(kind, list):
            return {"anyOf": [{**plain, "type": one} for one in kind]}
        if kind is None:  # the first that a keyword is for
            kind = next((of for of, keys in OF_TYPE.items() if any(key in plain for key in keys)), None)
            if kind is None:
                return {}
        if not isinstance(kind, str) or kind not in OF_TYPE:
            raise ValueError(f"{where}: there is no type {kind!r:.40}")
        plain = {"type": kind, **{key: plain[key] for key in OF_TYPE[kind] if key in plain}}
        make = {"object": _object, "array": _array, "string": _string}.get(kind)
        return make(plain, where) if make else plain

    def _behind(self, schema: Any, where: str) -> Any:
        """What a schema that is a reference refers to."""
        for _ in range(MOST_PARTS):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            _alone({k: v for k, v in schema.items() if k in NARROWS}, "$ref", where)
            schema = target(self._root, schema["$ref"], where)
        raise ValueError(f"{where}: $ref refers to itself")

    def _choice(self, plain: dict[str, Any], key: str, where: str) -> dict[str, Any]:
        kind = plain.get("type")
        if set(plain) - {key, "type"}:
            raise ValueError(f"{where}: no grammar can be made of {key} beside {_first(plain, key, 'type')}")
        parts = []
        for part in plain[key]:
            if kind is not None:
                seen = self._behind(part, where)
                if not isinstance(seen, dict) or seen.get("type", kind) != kind:
                    raise ValueError(f"{where}: {key} beside type has a part of another type")
                part = part if "$ref" in part or "type" in part else {**part, "type": kind}
            parts.append(part)
        if not parts:
            raise ValueError(f"{where}: {key} is empty")
        return {"anyOf": parts}

    def _all_of(self, plain: dict[str, Any], where: str) -> dict[str, Any]:
        parts = self._flat(plain, where, 0)
        if len(parts) == 1:
            return self._plain(parts[0], where)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for part in parts:
            if part.get("type", "object") != "object" or set(part) - {"type", *OF_TYPE["object"]}:
                raise ValueError(f"{where}: no grammar can be made of allOf but of objects' properties")
            for name, schema in part.get("properties", {}).items():
                if properties.setdefault(name, schema) != schema:
                    raise ValueError(f"{where}: allOf has two schemas of the property {name!r:.40}")
            required += part.get("required", [])
        for part in parts:
            others = set(properties).union(required) - set(part.get("properties", {}))
            if part.get("additionalProperties", True) is not True and others:
                raise ValueError(f"{where}: no grammar can be made of additionalProperties in allOf")
        return _object({"type": "object", "properties": properties, "required": required}, where)

    def _flat(self, schema: Any, where: str, depth: int) -> list[dict[str, Any]]:
        self._n_parts += 1
        if self._n_parts > MOST_PARTS or depth > 100:
            raise ValueError(f"{where}: allOf refers to itself, or to too much")
        seen = self._behind(schema, where)
        seen = {k: v for k, v in seen.items() if k in NARROWS} if isinstance(seen, dict) else {}
        own = {k: v for k, v in seen.items() if k != "allOf"}
        return ([own] if own else []) + [
            one for part in seen.get("allOf", ()) for one in self._flat(part, where, depth + 1)
        ]


def _first(plain: dict[str, Any], *but: str) -> str:
    return next(key for key in plain if key not in but)


def _alone(plain: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    if len(plain) > 1:
        raise ValueError(f"{where}: no grammar can be made of {key} beside {_first(plain, key)}")
    return plain


def _constants(plain: dict[str, Any], where: str) -> dict[str, Any]:
    if others := set(plain) - {"enum", "const", "type"}:
        raise ValueError(f"{where}: no grammar can be made of enum or const beside {min(others)}")
    values = plain.get("enum", [plain.get("const")])
    if not isinstance(values, list):
        raise ValueError(f"{where}: enum must be a list")
    kinds = plain.get("type", list(OF_TYPE))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if unknown := [kind for kind in kinds if kind not in OF_TYPE]:
        raise ValueError(f"{where}: there is no type {unknown[0]!r:.40}")
    values = [
        x
        for x in values
        if any(IS_OF[kind](x) for kind in kinds) and ("const" not in plain or x == plain["const"])
    ]
    if not values:
        raise ValueError(f"{where}: none of the values of enum or const can be")
    return {"enum": values}


def _object(plain: dict[str, Any], where: str) -> dict[str, Any]:
    properties, required = dict(plain.get("properties", {})), plain.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}.required: it must be a list of names")
    others = plain.get("additionalProperties", True)
    for name in required:
        if name not in properties:
            if others is False:
                raise ValueError(f"{where}: {name!r:.40} is required, and no property may be called so")
            properties[name] = others if isinstance(others, dict) else ANY
    if properties:  # the converter would write one of these as an additional one again
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    return plain


def _array(plain: dict[str, Any], where: str) -> dict[str, Any]:
    least, most = plain.get("minItems", 0), plain.get("maxItems")
    if most is not None and least > most:
        raise ValueError(f"{where}: minItems is more than maxItems")
    if "prefixItems" in plain:
        first = plain["prefixItems"][:most]
        if len(first) < least:
            raise ValueError(f"{where}: no grammar can be made of minItems beyond prefixItems")
        return {"type": "array", "prefixItems": first}
    items = plain.get("items", True)
    if items is False:
        if least:
            raise ValueError(f"{where}: items is false, and minItems {least}")
        return {"type": "array", "prefixItems": []}
    if items is True or items == {}:
        items = ANY
    if items is ANY and len(plain) == 1:
        return plain
    return {
        "type": "array",
        "items": items,
        "minItems": least,
        **({} if most is None else {"maxItems": most}),
    }


def _string(plain: dict[str, Any], where: str) -> dict[str, Any]:
    least, most = plain.get("minLength", 0), plain.get("maxLength")
    if most is not None and least > most:
        raise ValueError(f"{where}: minLength is more than maxLength")
    has_length = least > 0 or most is not None
    if "pattern" in plain and has_length:
        raise ValueError(f"{where}: no grammar can be made of pattern beside a length; write {{n,m}} into it")
    if "pattern" in plain:
        return {"type": "string", "pattern": plain["pattern"]}
    if has_length:  # a format describes
        return {"type": "string", "minLength": least, **({} if most is None else {"maxLength": most})}
    return {key: plain[key] for key in ("type", "format") if key in plain}


# -- for chat handlers, which call the converter by its name --

_ours: ContextVar[bool] = ContextVar("ours", default=False)
_stock = llama_grammar.json_schema_to_gbnf


def _json_schema_to_gbnf(schema: str, prop_order: Any = None) -> str:
    return gbnf_of_schema(json.loads(schema)) if _ours.get() else str(_stock(schema, prop_order))


llama_grammar.json_schema_to_gbnf = _json_schema_to_gbnf


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Within this, grammars that llama-cpp-python makes of schemas are ours."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)
