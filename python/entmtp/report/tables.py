"""A report as text and files: Markdown tables, their cells, JSON and a picture."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.atomic import atomic_path
from ..common.fields import without_nan
from .plots import draw

Row = Mapping[str, Any]
Form = str | Callable[[Row], str]


class _Formatter(string.Formatter):
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except TypeError:  # a part of what is None
            return None, field_name

    def format_field(self, value: Any, form: str) -> str:
        if value is None:
            return "–"
        if isinstance(value, list):
            middle, low, high = (format(x, form) for x in value)
            return f"{middle} ({low}–{high})"
        return format(value, form)


def cell(form: str, row: Row) -> str:
    """A row's figures in a format as of `str.format`: a dash for what is None, median and quartiles of a list, and
    nothing at all where the row lacks one."""
    try:
        return _Formatter().vformat(form, (), row)
    except KeyError:
        return ""


def part(key: Any, form: str) -> Form:
    """The cell of a part of a row."""
    return lambda row: cell(form, row[key])


def table(columns: Mapping[str, Form], rows: Iterable[Row], n_text: int = 1) -> str:
    """A Markdown table whose first `n_text` columns are text, the others numbers.

    Args:
        columns: titles, and what stands below them: a format as of `cell`, or what makes a row's cell.
    """
    rule = ["---"] * n_text + ["--:"] * (len(columns) - n_text)
    cells = [[form(r) if callable(form) else cell(form, r) for form in columns.values()] for r in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *cells))


def write(report: dict[str, Any], text: str, path: Path) -> None:
    """The figures as JSON, beside them their tables as Markdown, and a picture if they have one."""
    for target, content in (
        (path, json.dumps(without_nan(report), indent=1) + "\n"),
        (path.with_suffix(".md"), text),
    ):
        with atomic_path(target) as temporary:
            temporary.write_text(content, "utf-8")
    try:
        draw(report, path.with_suffix(".png"))
    except ValueError as e:
        print(f"note: {e}", file=sys.stderr)
