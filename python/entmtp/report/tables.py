"""A report as text and files: Markdown tables, their cells, JSON and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.atomic import atomic_path
from .plots import draw


def table(head: Sequence[str], rows: Sequence[Sequence[str]], n_text: int = 1) -> str:
    """A Markdown table whose first `n_text` columns are text, the others numbers."""
    rule = ["---"] * n_text + ["--:"] * (len(head) - n_text)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def figure(value: float | None, form: str = "{:.2f}") -> str:
    """A cell; a dash where there is no figure."""
    return "–" if value is None else form.format(value)


def spread(values: Sequence[float] | None, form: str = "{:.2f}", unit: str = "") -> str:
    """A median and, in brackets, its quartiles."""
    return "–" if values is None else f"{form}{unit} ({form}–{form})".format(*values)


def write(report: dict[str, Any], text: str, path: Path) -> None:
    """The figures as JSON, beside them their tables as Markdown, and a picture if they have one."""
    for target, content in ((path, json.dumps(report, indent=1) + "\n"), (path.with_suffix(".md"), text)):
        with atomic_path(target) as temporary:
            temporary.write_text(content, "utf-8")
    try:
        draw(report, path.with_suffix(".png"))
    except ValueError as e:
        print(f"note: {e}", file=sys.stderr)
