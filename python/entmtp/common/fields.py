"""Untrusted JSON, and the fields of its objects, each checked; every error names the file and the field."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

from .errors import BankError

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair


def parse_json(text: str | bytes) -> Any:
    """The value that a text holds.

    Raises:
        ValueError: it is no JSON, nested too deeply, has numbers of thousands of digits, or half of a surrogate pair.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text)
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no text") from None
    return value


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON has no words for: NaN and infinities."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Fields:
    """One JSON object of a file called `label`; `what` is what it describes."""

    def __init__(self, data: Any, label: str, what: str = "bank"):
        self.label, self.what = label, what
        if not isinstance(data, dict):
            raise BankError(f"{what} {label}: expected a JSON object")
        self.data = data

    def fail(self, key: str, expected: str) -> BankError:
        return BankError(f"{self.what} {self.label}: field {key} must be {expected}")

    def only(self, known: set[str]) -> None:
        if unknown := sorted(set(self.data) - known):
            raise BankError(f"{self.what} {self.label}: unknown field {unknown[0]}")

    def text(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def number(self, key: str, value: Any, low: float, high: float = math.inf) -> float:
        bad = (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max  # nor a whole number beyond all floats
        )
        if bad or not low <= value <= high:
            between = f"not below {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise self.fail(key, f"a number {between}")
        return float(value)

    def numbers(
        self, key: str, value: Any, low: float, high: float = math.inf, n: int | None = None
    ) -> tuple[float, ...]:
        if not isinstance(value, list) or (n is not None and len(value) != n):
            raise self.fail(key, "a list of numbers" + ("" if n is None else f" of length {n}"))
        return tuple(self.number(f"{key}[{i}]", x, low, high) for i, x in enumerate(value))
