"""Regular expressions of JSON schemas as rules of a grammar (GBNF), for what a JSON string has between its quotes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

try:
    from re import _constants as op  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # before Python 3.11
    import sre_constants as op
    import sre_parse as parser

Ranges = list[tuple[int, int]]  # of code points, both ends among them, in order

LAST = 0x10FFFF
DIGIT: Ranges = [(48, 57)]
WORD: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
SPACE: Ranges = [
    (9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
]  # fmt: skip
LINE_ENDS: Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
CATEGORIES = {
    op.CATEGORY_DIGIT: (DIGIT, False), op.CATEGORY_NOT_DIGIT: (DIGIT, True), op.CATEGORY_WORD: (WORD, False),
    op.CATEGORY_NOT_WORD: (WORD, True), op.CATEGORY_SPACE: (SPACE, False), op.CATEGORY_NOT_SPACE: (SPACE, True),
}  # fmt: skip
# what a JSON string writes by a backslash, and how; other control characters are left out
ESCAPED = {34: '"', 92: "\\", 8: "b", 9: "t", 10: "n", 12: "f", 13: "r"}
UNWRITTEN: Ranges = [(0, 0x1F), (34, 34), (92, 92), (0x7F, 0x7F), (0xD800, 0xDFFF)]  # as they are
ANYTHING = "char*"  # a rule of the converter: what a JSON string may have in one place


def rule_of_pattern(pattern: str) -> str:
    """What matches a pattern, which as ECMA 262 and JSON Schema have it may be found anywhere unless ^ and $ say where.

    Raises:
        ValueError: it is none that can be read, or has what no grammar is made of, as looking ahead.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = list(parser.parse(pattern))
        return _anywhere(parsed)
    except re.error as e:
        raise ValueError(f"pattern {pattern!r:.80} cannot be read: {e}") from None
    except RecursionError:
        raise ValueError(f"pattern {pattern!r:.80} is nested too deeply") from None


def _anywhere(parts: list[Any]) -> str:
    """Of alternatives, in front of which stands what all of them begin with, each has anchors of its own."""
    for i, (kind, value) in enumerate(parts):
        if kind is op.BRANCH:
            return _either(_anywhere([*parts[:i], *branch, *parts[i + 1 :]]) for branch in value[1])
    return _anchored(parts)


def _anchored(parts: list[Any]) -> str:
    begins = bool(parts) and parts[0][0] is op.AT and parts[0][1] in (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
    ends = bool(parts) and parts[-1][0] is op.AT and parts[-1][1] in (op.AT_END, op.AT_END_STRING)
    inner = _sequence(parts[int(begins) : len(parts) - int(ends)])
    return " ".join(x for x in ("" if begins else ANYTHING, inner, "" if ends else ANYTHING) if x)


def _sequence(parts: Iterable[Any]) -> str:
    return " ".join(x for x in map(_part, parts) if x)


def _either(rules: Iterable[str]) -> str:
    return "(" + " | ".join(rule or '""' for rule in rules) + ")"


def _part(part: Any) -> str:
    kind, value = part
    if kind is op.LITERAL:
        return _one_of([(value, value)])
    if kind is op.NOT_LITERAL:
        return _one_of(_others([(value, value)]))
    if kind is op.ANY:
        return _one_of(_others(LINE_ENDS))
    if kind is op.IN:
        return _one_of(_set(value))
    if kind is op.BRANCH:
        return _either(map(_sequence, value[1]))
    if kind is op.SUBPATTERN and not value[1] and not value[2]:
        return f"({_sequence(value[3]) or chr(34) * 2})"
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
        least, most, repeated = value
        rule = f"({_sequence(repeated) or chr(34) * 2})"
        if (least, most) == (0, 1):
            return f"{rule}?"
        if most == op.MAXREPEAT:
            return f"{rule}*" if least == 0 else f"{rule}+" if least == 1 else f"{rule}{{{least},}}"
        return f"{rule}{{{least},{most}}}" if most else ""
    what = "^ or $ in the middle" if kind is op.AT else f"{str(kind).lower().replace('_', ' ')} in it"
    raise ValueError(f"pattern: no grammar can be made of {what}")


def _set(parts: list[Any]) -> Ranges:
    found: Ranges = []
    is_other = parts[0][0] is op.NEGATE
    for kind, value in parts[int(is_other) :]:
        if kind is op.LITERAL:
            found.append((value, value))
        elif kind is op.RANGE:
            found.append(value)
        else:
            ranges, others = CATEGORIES[value]
            found += _others(ranges) if others else ranges
    return _others(found) if is_other else found


def _others(ranges: Ranges) -> Ranges:
    """All code points but these."""
    found, at = [], 0
    for first, last in sorted(ranges):
        if first > at:
            found.append((at, first - 1))
        at = max(at, last + 1)
    return [*found, (at, LAST)] if at <= LAST else found


def _one_of(ranges: Ranges) -> str:
    """One character of these, as a JSON string has it."""
    ways = [
        f'"\\\\{_char(ord(how))}"' for code, how in ESCAPED.items() if any(a <= code <= b for a, b in ranges)
    ]
    raw = _others(_others(ranges) + UNWRITTEN)
    if raw:
        ways.append("[" + "".join(_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in raw) + "]")
    if not ways:
        raise ValueError("pattern: it wants characters that a JSON string cannot have")
    return ways[0] if len(ways) == 1 else _either(ways)


def _char(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\U{code:08X}"
