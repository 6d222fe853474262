"""`entmtp doctor`: what is installed, does it work, and what to mend if not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.streams import printable
from ..common.version import __version__
from ..options.model import add_model_options
from .checks import Check, examine

MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "broken": ("✗", "bold red")}


def reporter() -> Callable[[Check], None]:
    """Prints a check: coloured on a terminal, else plain lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def one_line(text: str) -> str:  # names in files may be anything
        return printable(text).replace("\n", "\\n")

    def coloured(check: Check) -> None:
        mark, style = MARKS[check.status]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=1, style=style)
        row.add_column(width=14, style="bold")
        row.add_column(overflow="fold")
        row.add_row(mark, Text(check.what), Text(one_line(check.found)))
        if check.mend:
            row.add_row("", "", Text(one_line(f"→ {check.mend}")), style=style)
        console.print(row, markup=False, highlight=False)

    def plain(check: Check) -> None:
        print(
            one_line(
                f"{check.status:<7}{check.what:<15}{check.found}" + (f"; {check.mend}" if check.mend else "")
            ),
            flush=True,
        )

    return coloured if console.is_terminal else plain


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp doctor",
        description="Check this installation and, if it is named, a model with its heads; say what to mend.",
        epilog="example: entmtp doctor --model model.gguf --heads heads.gguf\n"
        "Exit code 1 if something is broken. Notes are about what could be better.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, model=None)
    parser.add_argument(
        "--gain", action=argparse.BooleanOptionalAction, default=True,
        help="measure what drafts bring of the model here, for about 20 seconds (default: yes)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything as JSON, for bug reports")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.model is None and args.heads:
        parser.error("--heads need --model")
    try:
        checks = []
        show = (lambda check: None) if args.json else reporter()
        for check in examine(args, args.model is not None):
            checks.append(check)
            show(check)
    except KeyboardInterrupt:
        return 130
    broken = [check for check in checks if check.status == "broken"]
    if args.json:
        report = {
            "entmtp": __version__,
            "platform": platform.platform(),
            "python": sys.version,
            "environment": {
                k: v
                for k, v in sorted(os.environ.items())
                if k.startswith(("ENTMTP_", "GGML_", "LLAMA_CPP_"))
            },
            "build": _build(),
            "checks": [asdict(check) for check in checks],
        }
        text = json.dumps(
            report, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")
        )
        home = str(Path.home())
        print(text if len(home) < 2 else text.replace(home, "~"))  # no user names in bug reports
    elif broken:
        print(f"{len(broken)} broken: {', '.join(check.what for check in broken)}")
    else:
        print("nothing is broken")
    return 1 if broken else 0


def _build() -> dict[str, Any]:
    from ..native.backends import build_info

    try:
        return build_info()
    except ImportError:
        return {}
