"""`entmtp bench load`: numbers of threads beside busy programs, fixed ones and the one that follows the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from ..common.machine import fast_cores
from ..common.progress import stages
from ..llama import Llama
from ..measure.compare import Comparison
from ..measure.methods import ENTMTP, PLAIN_LOOP
from ..measure.stock import STOCK, stock
from ..measure.turns import Answering, answering, in_turn
from ..native import kernels
from ..options import load
from ..report.tables import Form, cell, table
from .inputs import changed, load_plain, model_of
from .questions import prompts_of, read_tasks

FOLLOWS = "as the machine is"


@contextmanager
def busy(n: int) -> Iterator[None]:
    """n programs that each keep a processor busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.5 if n else 0.0)
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def label_of(method: str, n_threads: int | None) -> str:
    return f"{method}, {FOLLOWS if n_threads is None else f'{n_threads} threads' if n_threads > 1 else '1 thread'}"


def contestants(args: Namespace, stack: ExitStack, counts: list[int]) -> tuple[Llama, dict[str, Answering]]:
    """A plain loop that follows the machine, and every method with every number of threads."""

    def loaded(n_threads: int | None, load: Callable[..., Llama], **more: Any) -> Llama:
        return stack.enter_context(closing(load(changed(args, threads=n_threads), **more)))

    plain = loaded(None, load_plain, stats=False)
    own = kernels.current()
    found: dict[str, Answering] = {}
    for n in counts:
        other = stack.enter_context(closing(stock(plain, n_threads=n, n_threads_batch=n)))
        found[label_of(STOCK, n)] = answering(other, kernels=kernels.OFF)
    found[label_of(PLAIN_LOOP.label, None)] = answering(plain, kernels=own)
    for n in counts:
        found[label_of(PLAIN_LOOP.label, n)] = answering(loaded(n, load_plain, stats=False), kernels=own)
    for number in (None, *counts):
        found[label_of(ENTMTP.label, number)] = answering(loaded(number, load, policy="auto"), kernels=own)
    return plain, found


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    counts = args.counts or sorted({1, fast_cores()})
    report["load"] = []
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, needs_heads=False))
        plain, methods = contestants(args, stack, counts)
        prompts = [
            p for temp in args.temp for task in tasks.values() for p in prompts_of(plain, task, args, temp)
        ]
        for n in args.busy:
            with busy(n), stages() as advance:
                found = Comparison(in_turn(methods, prompts, args.rounds, advance))
            rows = [found.row(label, label_of(PLAIN_LOOP.label, None)) for label in methods]
            report["load"].append({"busy": n, "rows": rows})
    yield markdown(report["load"])


def markdown(load: list[dict[str, Any]]) -> str:
    """A row for every method, with a column for each number of busy programs."""
    columns: dict[str, Form] = {"tokens/s beside": "{method}"}
    for i, beside in enumerate(load):
        programs = f"{beside['busy']} busy program{'s' if beside['busy'] != 1 else ''}"
        columns[programs] = f"{{loads[{i}][tokens_per_second_overall]:.0f}}"
    # llama-cpp-python's kernels round differently
    columns["same text"] = lambda r: "" if r["method"].startswith(STOCK) else cell("{identical}/{answers}", r)
    rows = []
    for same in zip(*(beside["rows"] for beside in load), strict=True):
        sums = {key: sum(row[key] for row in same) for key in ("identical", "answers")}
        rows.append({"method": same[0]["method"], "loads": list(same), **sums})
    return table(columns, rows)
