"""JSON schemas: keywords that no grammar follows, sizes, references."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

# They narrow what is allowed, and the converter does not know them; what only describes (title, default, format, …) may
# be passed over. https://json-schema.org/draft/2020-12/json-schema-validation
UNFOLLOWED = frozenset((
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems", "contains",
    "minContains", "maxContains", "unevaluatedItems", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "not", "if", "then", "else",
))  # fmt: skip
# keywords whose values are schemas, lists of schemas, or schemas by name
SCHEMA, SCHEMAS = ("items", "additionalProperties"), ("allOf", "anyOf", "oneOf", "prefixItems")
BY_NAME = ("properties", "$defs", "definitions")
DEEPEST = 64
# what a grammar repeats is written as often: so many are as many as llama.cpp reads, and a pattern nests them
COUNTS, MOST_TIMES = ("minItems", "maxItems", "minLength", "maxLength"), 1000
LONGEST_PATTERN = 1000  # characters
INDEX = re.compile(r"0|[1-9]\d{0,8}")
DATA = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
TIMES = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def check_schema(schema: Any) -> None:
    """Refuse a schema with keywords that no grammar follows, or that is no schema.

    Raises:
        ValueError: names the keyword, and where it stands.
    """
    _Checker(schema).check(schema, "schema", 0)


def target(root: Any, ref: Any, where: str) -> Any:
    """What a reference into a schema leads to.

    Raises:
        ValueError: it leads nowhere.
    """
    if not isinstance(ref, str) or not (ref + "/").startswith("#/"):
        raise ValueError(f"{where}: $ref must lead to a part of this schema, as #/$defs/name")
    found = root
    for part in unquote(ref).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and INDEX.fullmatch(name) and int(name) < len(found):
            found = found[int(name)]
            continue
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"{where}: $ref {ref} leads nowhere in this schema")
        found = found[name]
    return found


def moved(schema: Any, to: str) -> Any:
    """A schema that becomes a part of another: its references lead to where it stands there, as `#/anyOf/0`."""
    if isinstance(schema, list):
        return [moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(ref := schema.get("$ref"), str) and ref[:1] == "#":
        schema = {**schema, "$ref": to + ref[1:]}
    return {key: part if key in DATA else moved(part, to) for key, part in schema.items()}


class _Checker:
    """Of one schema and all that it refers to, which the converter finds anywhere in it."""

    def __init__(self, root: Any):
        self._root = root
        self._seen: set[str] = set()  # references

    def check(self, schema: Any, where: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise ValueError(f"{where}: a JSON schema is an object, not {type(schema).__name__}")
        if depth > DEEPEST:
            raise ValueError(f"{where}: this JSON schema is more than {DEEPEST} levels deep")
        if unknown := sorted(UNFOLLOWED & set(schema)):
            raise ValueError(
                f"{where}: the keyword {unknown[0]} cannot be made a grammar of, so answers would not follow it; leave "
                "it out, and check it in the answer"
            )
        for key in COUNTS:
            if key in schema and not _is_count(schema[key]):
                raise ValueError(f"{where}: {key} must be a whole number from 0 to {MOST_TIMES}")
        _check_pattern(schema.get("pattern", ""), where)
        if (ref := schema.get("$ref")) is not None:
            found = target(self._root, ref, where)
            if ref not in self._seen:
                self._seen.add(ref)
                self.check(found, f"schema{ref[1:].replace('/', '.')}", depth + 1)
        for key in SCHEMA:
            if key in schema:
                self.check(schema[key], f"{where}.{key}", depth + 1)
        for key in SCHEMAS:
            for i, part in enumerate(_of(schema, key, list, where)):
                self.check(part, f"{where}.{key}[{i}]", depth + 1)
        for key in BY_NAME:
            for name, part in _of(schema, key, dict, where).items():
                self.check(part, f"{where}.{key}.{name}", depth + 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TIMES


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"{where}: pattern must be a text of at most {LONGEST_PATTERN} characters")
    if any(int(n) > MOST_TIMES for times in TIMES.findall(pattern) for n in times if n):
        raise ValueError(f"{where}: pattern repeats more than {MOST_TIMES} times")


def _of(schema: dict[str, Any], key: str, kind: Any, where: str) -> Any:
    value = schema.get(key, kind())
    if not isinstance(value, kind):
        raise ValueError(
            f"{where}.{key}: expected {'a list' if kind is list else 'an object'} of JSON schemas"
        )
    return value
