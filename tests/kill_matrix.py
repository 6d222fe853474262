"""`make kill-matrix KILLS=50`: every long command killed so many times; a table of what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from helpers.killing import CASES, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each command (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these commands")
    args = parser.parse_args()
    table = Table("command", "seconds", "kills", "done before", "losses", "litter", "result")
    failed = False
    for name in args.only or CASES:
        case = CASES[name]
        if case.torch and importlib.util.find_spec("torch") is None:
            table.add_row(name, "", "", "", "", "", "left out: PyTorch is not installed")
            continue
        print(f"{name}: {args.kills} kills", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="entmtp-kill-") as folder:
            try:
                row = run(case, Path(folder), args.kills, args.seed)
            except AssertionError as e:
                failed = True
                table.add_row(name, "", "", "", "", "", str(e))
                continue
        failed |= bool(row.losses or row.litter)
        figures = (row.kills, row.completions, row.losses, len(row.litter))
        said = ", ".join(row.litter) or "as undisturbed"
        table.add_row(name, f"{row.seconds:.1f}", *map(str, figures), said)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
