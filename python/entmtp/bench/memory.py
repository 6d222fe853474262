"""`entmtp bench memory`: what a process holds of a model's weights, and at most while it loads them; how long it takes.

Each in a process of its own, without the context and without what a process holds with the vocabulary alone. Then, with
the context, what one holds that has written some answers, without drafts and with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from ..common.errors import EntmtpError
from ..common.machine import held_memory
from ..common.progress import stages
from ..models import hub
from ..report.tables import Form, table
from .inputs import model_of

WAYS = {
    "mapped": "mapped",
    "read": "read (use_mmap=False)",
    "locked": "locked (use_mlock=True)",
    "two": "mapped, by two processes together",
}
KERNELS = {"off": "ggml's", "auto": "ours"}
WRITES = {"plain": "without drafts", "drafting": "with drafts"}
MB = 1e6
AIM = 1.05  # of the file


class Holder:
    """A process that holds a model (bench/held.py), until it is closed."""

    def __init__(self, model: str | Path, how: str, kernels: str):
        command = [sys.executable, "-m", "entmtp.bench.held", str(model), how, kernels]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise EntmtpError(f"a process that was to hold the model ended with status {self.process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def held(self) -> dict[str, float]:
        """Bytes that it holds now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def together(model: str, how: str, kernels: str) -> float:
    """Bytes that two processes hold at a time, pages of both counted once."""
    with Holder(model, how, kernels) as one, Holder(model, how, kernels) as other:
        return one.held()["Pss"] + other.held()["Pss"]


def vocabulary(model: str) -> dict[str, float]:
    """Bytes that a process holds with the vocabulary alone."""
    with Holder(model, "none", "off") as process:
        return process.held()


def writing(model: str, base: float, advance: Any) -> dict[str, float]:
    """Bytes beyond `base` of processes that have written some answers, by whether they draft."""
    found = {}
    for i, how in enumerate(WRITES):
        with Holder(model, how, "auto") as process:
            found[how] = process.loaded["Rss"] - base
        advance("processes that write", i + 1, len(WRITES))
    return found


def measure(model: str, base: dict[str, float], n_rounds: int, advance: Any) -> list[dict[str, Any]]:
    """What is held by way of loading and kernels, all in turn.

    Args:
        base: what a process with the vocabulary alone holds.

    Returns:
        how, kernels, and in bytes without what a process with the vocabulary alone holds: held, peak while loading,
        locked, large (in pages of 2 MB); and seconds.
    """
    base_of_two = together(model, "none", "off")
    cases = [(how, kernels) for how in WAYS for kernels in KERNELS]
    loads: dict[tuple[str, str], list[dict[str, float]]] = {}
    for i in range(n_rounds):
        for j, (how, kernels) in enumerate(cases):
            advance("processes", i * len(cases) + j + 1, n_rounds * len(cases))
            if how == "two":
                if i == 0:
                    both = together(model, "mapped", kernels)
                    loads[how, kernels] = [{"Rss": both - base_of_two + base["Rss"]}]
                continue
            with Holder(model, how, kernels) as process:
                loads.setdefault((how, kernels), []).append(process.loaded)
    rows = []
    for (how, kernels), found in loads.items():
        row = {"how": how, "kernels": kernels, "held": median(x["Rss"] for x in found) - base["Rss"]}
        if how != "two":
            row |= {
                "peak": max(x["peak"] for x in found) - base["Rss"],
                "locked": found[-1]["Locked"],
                "large": found[-1]["AnonHugePages"] - base["AnonHugePages"],
                "seconds": median(x["seconds"] for x in found),
            }
        rows.append(row)
    return rows


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    if "Rss" not in held_memory():
        raise EntmtpError("this system does not say what a process holds in memory (/proc/self/smaps_rollup)")
    report["memory"] = []
    for name in [args.model, *args.more_models]:
        with ExitStack() as stack, stages() as advance:
            path = Path(stack.enter_context(model_of(args, name, drafts=False)).model)
            files = [path.with_name(part) for part in hub.parts(path.name)]
            size = sum(len(file.read_bytes()) for file in files)  # read: in the system's cache from now on
            base = vocabulary(str(path))
            found = {"model": name, "bytes": size, "rows": measure(str(path), base, args.rounds, advance)}
            found["writing"] = writing(str(path), base["Rss"], advance)
        report["memory"].append(found)
        yield markdown(found)


def markdown(found: dict[str, Any]) -> str:
    size = found["bytes"]
    rows = []
    for row in found["rows"]:
        cells = {key: row[key] / MB for key in ("held", "peak", "large", "locked") if key in row}
        cells |= {"share": row["held"] / size, "way": WAYS[row["how"]], "by": KERNELS[row["kernels"]]}
        if "peak" in row:
            cells |= {"beyond": (row["peak"] - size) / MB, "seconds": row["seconds"]}
        rows.append(cells)
    columns: dict[str, Form] = {
        "weights": "{way}", "kernels": "{by}", "held, MB": "{held:.0f}", "of the file": "{share:.2f}",
        "peak, MB": "{peak:.0f}", "beyond the file, MB": "{beyond:+.0f}", "in large pages, MB": "{large:.0f}",
        "locked, MB": "{locked:.0f}", "loaded in, s": "{seconds:.2f}",
    }  # fmt: skip
    written = [{"way": WRITES[how], "held": held / MB} for how, held in found["writing"].items()]
    of_weights = table(columns, rows, n_text=2)
    of_all = table({"has written four answers": "{way}", "held, MB": "{held:.0f}"}, written, n_text=1)
    return f"#### {found['model']}: a file of {size / MB:.0f} MB\n\n{of_weights}\n{of_all}"
