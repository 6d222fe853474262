"""JSON schemas that a grammar is made of: what llama-cpp-python's converter would pass over in silence is refused."""

from __future__ import annotations

import re
from typing import Any

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
TIMES = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def check_schema(schema: Any, where: str = "schema", depth: int = 0) -> None:
    """Refuse a schema that answers would not follow.

    Raises:
        ValueError: names the keyword, and where it stands.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: a JSON schema is an object, not {type(schema).__name__}")
    if depth > DEEPEST:
        raise ValueError(f"{where}: this JSON schema is more than {DEEPEST} levels deep")
    if unknown := sorted(UNFOLLOWED & set(schema)):
        raise ValueError(
            f"{where}: the keyword {unknown[0]} cannot be made a grammar of, so answers would not follow it; leave it "
            "out, and check it in the answer"
        )
    for key in COUNTS:
        if key in schema and not _is_count(schema[key]):
            raise ValueError(f"{where}: {key} must be a whole number from 0 to {MOST_TIMES}")
    _check_pattern(schema.get("pattern", ""), where)
    for key in SCHEMA:
        if key in schema:
            check_schema(schema[key], f"{where}.{key}", depth + 1)
    for key in SCHEMAS:
        for i, part in enumerate(_of(schema, key, list, where)):
            check_schema(part, f"{where}.{key}[{i}]", depth + 1)
    for key in BY_NAME:
        for name, part in _of(schema, key, dict, where).items():
            check_schema(part, f"{where}.{key}.{name}", depth + 1)


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
