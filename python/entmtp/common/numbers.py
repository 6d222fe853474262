"""Numbers on a command line: what a word means, or why it means nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

INFINITE = float("inf")


def number(
    kind: type[int] | type[float], least: float, most: float = INFINITE, above: bool = False
) -> Callable[[str], Any]:
    """What makes a number of a word, for `type=` of an option.

    Args:
        above: the least is not among those that can be.
    """

    def parse(word: str) -> Any:
        try:
            value: float = kind(word)
        except (ValueError, OverflowError):
            value = float("nan")
        if not least <= value <= most or value == INFINITE or (above and value == least):
            what = "a whole number" if kind is int else "a number"
            how = f"above {least:g}" if above else f"of at least {least:g}"
            end = "" if most == INFINITE else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be {what} {how}{end}, not {word!r}")
        return value

    return parse


COUNT = number(int, 1)  # of what there must be one of
SHARE = number(float, 0, 1)
TEMPERATURE = number(float, 0, 1e6)
MOST_THREADS = 1024  # llama.cpp ends the process at many more
THREADS = number(int, 1, MOST_THREADS)
